"""Distinct words drawn from a softmax over the vocabulary."""

from fastbert_kernels.sampling.dispatch import draw_distinct, sample_candidates
from fastbert_kernels.sampling.reference import BLOCK, draw_distinct_reference, sample_candidates_reference

__all__ = ["BLOCK", "draw_distinct", "draw_distinct_reference", "sample_candidates", "sample_candidates_reference"]
