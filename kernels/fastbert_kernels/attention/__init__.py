"""Exact attention with an additive, learned bias, as a matrix or by TUPE's parts."""

from fastbert_kernels.attention.dispatch import attention
from fastbert_kernels.attention.distances import from_diagonals, relative_bucket
from fastbert_kernels.attention.reference import attention_reference
from fastbert_kernels.attention.untied import untied_attention, untied_attention_reference

__all__ = [
    "attention",
    "attention_reference",
    "from_diagonals",
    "relative_bucket",
    "untied_attention",
    "untied_attention_reference",
]
