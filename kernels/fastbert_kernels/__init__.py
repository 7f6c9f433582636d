"""fastbert_kernels: the operations that decide the speed of an encoder, each with a PyTorch reference that defines it.

The package knows nothing of fastbert: anyone with another model can use it.
"""

from fastbert_kernels.attention import attention, attention_reference
from fastbert_kernels.dropout import hash_dropout, keep_mask
from fastbert_kernels.hashing import combine, mix

__all__ = ["attention", "attention_reference", "combine", "hash_dropout", "keep_mask", "mix"]
