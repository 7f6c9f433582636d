"""fastbert_kernels: fast operations for encoders, each with a PyTorch reference that defines it.

The package does not depend on fastbert and can be used with any model.
"""

from fastbert_kernels.attention.dispatch import attention
from fastbert_kernels.attention.distances import from_diagonals, relative_bucket
from fastbert_kernels.attention.reference import attention_reference
from fastbert_kernels.attention.untied import untied_attention, untied_attention_reference
from fastbert_kernels.cross_entropy.dispatch import linear_cross_entropy
from fastbert_kernels.cross_entropy.reference import linear_cross_entropy_reference
from fastbert_kernels.dropout import hash_dropout, keep_mask
from fastbert_kernels.hashing import combine, mix
from fastbert_kernels.sampling.dispatch import sample_candidates, sample_distinct
from fastbert_kernels.sampling.reference import sample_candidates_reference, sample_distinct_reference
from fastbert_kernels.sampling.repeats import with_replacement
from fastbert_kernels.scores import candidate_scores

__all__ = [
    "attention",
    "attention_reference",
    "candidate_scores",
    "combine",
    "from_diagonals",
    "hash_dropout",
    "keep_mask",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "mix",
    "relative_bucket",
    "sample_candidates",
    "sample_candidates_reference",
    "sample_distinct",
    "sample_distinct_reference",
    "untied_attention",
    "untied_attention_reference",
    "with_replacement",
]
