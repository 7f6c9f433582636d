"""Sampling of distinct words from a softmax over the vocabulary: Triton kernels on a GPU, else the reference.

Shapes as in `reference`.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastbert_kernels.backend import runs_kernels
from fastbert_kernels.sampling.reference import (
    BLOCK,
    check_candidates,
    check_logits,
    disallowed_words,
    empty_samples,
    sample_from_logits,
    sample_rows,
    word_floors,
)

MAX_WORDS, MAX_SAMPLES = 1 << 18, 1 << 10
"""Limits of the kernels, which hold the weights of a row's blocks and its samples in registers."""


@torch.no_grad()
def sample_candidates(
    hidden: Tensor,
    embedding: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    seed: int | None = None,
    keys: Tensor | None = None,
    bias: Tensor | None = None,
    forbidden: Tensor | None = None,
    excluded: Tensor | None = None,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`sample_candidates_reference`, on a GPU by Triton kernels with the same noise. The samples are those of the
    reference, except where rounding moves the boundary between two words past the noise."""
    keys = check_candidates(hidden, embedding, k, temperature, seed, keys, bias, forbidden, excluded, rows)
    return candidates_operator(hidden, embedding, bias, keys, forbidden, excluded, k, temperature, rows)


@torch.no_grad()
def sample_distinct(
    logits: Tensor, k: int, keys: Tensor, *, forbidden: Tensor | None = None, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`sample_distinct_reference`, on a GPU by Triton kernels, as `sample_candidates`."""
    check_logits(logits, k, keys, forbidden, excluded)
    return distinct_operator(logits, keys, forbidden, excluded, k)


@torch.library.custom_op("fastbert_kernels::sample_candidates", mutates_args=())
def candidates_operator(
    hidden: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    keys: Tensor,
    forbidden: Tensor | None,
    excluded: Tensor | None,
    k: int,
    temperature: float,
    rows: int | None,
) -> tuple[Tensor, Tensor]:
    """Custom operator, so that `torch.compile` does not trace into it."""
    return sample_rows(hidden, embedding, bias, keys, forbidden, excluded, k, temperature, rows, _kernel_for)


@torch.library.custom_op("fastbert_kernels::sample_distinct", mutates_args=())
def distinct_operator(
    logits: Tensor, keys: Tensor, forbidden: Tensor | None, excluded: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """Custom operator, as `candidates_operator`."""
    sample = _kernel_for(logits, k, disallowed_words(forbidden, logits.shape[1], logits.device))
    return sample(logits, keys, excluded) if sample else sample_from_logits(logits, keys, forbidden, excluded, k)


@candidates_operator.register_fake
def _(hidden, embedding, bias, keys, forbidden, excluded, k, temperature, rows):
    return empty_samples(hidden, k)


@distinct_operator.register_fake
def _(logits, keys, forbidden, excluded, k):
    return empty_samples(logits, k)


def _kernel_for(logits: Tensor, k: int, disallowed: Tensor) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Function of logits like these, keys and excluded words that samples by kernels; None without kernels."""
    words, supported = logits.shape[1], (torch.float32, torch.bfloat16, torch.float16)
    if (
        logits.dtype not in supported
        or words > MAX_WORDS
        or k > MAX_SAMPLES
        or not runs_kernels(logits, "sample_candidates")
    ):
        return None
    from fastbert_kernels.sampling.triton_sampling import triton_sampling

    floors = word_floors(words + -words % BLOCK, disallowed)
    return functools.partial(
        triton_sampling, k=k, allowed=(floors > 0).to(torch.int8), floors=floors.view(-1, BLOCK).sum(1)
    )
