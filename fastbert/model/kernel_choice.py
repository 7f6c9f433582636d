"""Kernel implementations for each value of `machine.kernels`: attention, loss and sampling."""

from collections.abc import Callable
from dataclasses import dataclass

from fastbert_kernels import (
    attention,
    attention_reference,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    sample_candidates,
    sample_candidates_reference,
    sample_distinct,
    sample_distinct_reference,
)
from torch import Tensor


@dataclass(frozen=True)
class Kernels:
    """Functions of `fastbert_kernels`, or others with the same signatures."""

    attention: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]
    sample_candidates: Callable[..., tuple[Tensor, Tensor]]
    sample_distinct: Callable[..., tuple[Tensor, Tensor]]


KERNELS = {
    "auto": Kernels(attention, linear_cross_entropy, sample_candidates, sample_distinct),
    "reference": Kernels(
        attention_reference, linear_cross_entropy_reference, sample_candidates_reference, sample_distinct_reference
    ),
}
"""auto: the fastest implementation for the machine. reference: the definitions in plain PyTorch."""
