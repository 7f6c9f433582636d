"""Distinct words drawn from a softmax over the vocabulary: by Triton kernels on a GPU, else by the reference.

Shapes as in `reference`.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastbert_kernels.backend import runs_kernels
from fastbert_kernels.sampling.reference import (
    BLOCK,
    barred_words,
    check_candidates,
    check_logits,
    empty_draws,
    sample_from_logits,
    sample_rows,
    word_floors,
)

MOST_WORDS, MOST_DRAWS = 1 << 18, 1 << 10
"""What the kernels take at most: they hold the weights of a row's blocks and the words drawn from it in registers."""


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
    """`sample_candidates_reference`; on a GPU the draws are Triton kernels', from the same noise: the words are the
    reference's but where rounding moves the bound between two words past the noise."""
    keys = check_candidates(hidden, embedding, k, temperature, seed, keys, bias, forbidden, excluded, rows)
    return sampling_operator(hidden, embedding, bias, keys, forbidden, excluded, k, temperature, rows)


@torch.no_grad()
def sample_distinct(
    logits: Tensor, k: int, keys: Tensor, *, forbidden: Tensor | None = None, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`sample_distinct_reference`; on a GPU by Triton kernels, as `sample_candidates`."""
    check_logits(logits, k, keys, forbidden, excluded)
    return drawing_operator(logits, keys, forbidden, excluded, k)


@torch.library.custom_op("fastbert_kernels::sample_candidates", mutates_args=())
def sampling_operator(
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
    """An operator that PyTorch knows, so that `torch.compile` need not look into it."""
    return sample_rows(hidden, embedding, bias, keys, forbidden, excluded, k, temperature, rows, _kernel_for)


@torch.library.custom_op("fastbert_kernels::sample_distinct", mutates_args=())
def drawing_operator(
    logits: Tensor, keys: Tensor, forbidden: Tensor | None, excluded: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    draw = _kernel_for(logits, k, barred_words(forbidden, logits.shape[1], logits.device))
    return draw(logits, keys, excluded) if draw else sample_from_logits(logits, keys, forbidden, excluded, k)


@sampling_operator.register_fake
def _(hidden, embedding, bias, keys, forbidden, excluded, k, temperature, rows):
    return empty_draws(hidden, k)


@drawing_operator.register_fake
def _(logits, keys, forbidden, excluded, k):
    return empty_draws(logits, k)


def _kernel_for(logits: Tensor, k: int, barred: Tensor) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """What draws from logits like these by kernels, given the logits, keys and excluded words; None without kernels."""
    words, low = logits.shape[1], (torch.float32, torch.bfloat16, torch.float16)
    if logits.dtype not in low or words > MOST_WORDS or k > MOST_DRAWS or not runs_kernels(logits, "sample_candidates"):
        return None
    from fastbert_kernels.sampling.triton_sampling import triton_sampling

    floors = word_floors(words + -words % BLOCK, barred)
    return functools.partial(
        triton_sampling, k=k, drawable=(floors > 0).to(torch.int8), floors=floors.view(-1, BLOCK).sum(1)
    )
