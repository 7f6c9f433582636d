"""Cross-entropy over a vocabulary without its logits."""

from fastbert_kernels.cross_entropy.dispatch import linear_cross_entropy
from fastbert_kernels.cross_entropy.reference import linear_cross_entropy_reference

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]
