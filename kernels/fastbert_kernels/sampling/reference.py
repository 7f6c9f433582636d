"""Definition of exact sampling of distinct words from a softmax, with noise that is a function of keys.

Each sample inverts the cumulative distribution in two steps: first a block of words, by the sums of the blocks, then a
word in the block. A sampled word is removed and its block is summed again, so the remaining mass is never a small
difference of large numbers, and K rounds give K distinct words for any distribution. This costs one exponential per
word and two hashes per sample; Gumbel noise would cost a hash and two logarithms per word.

Shapes: N rows, V words, D width, K samples per row, F forbidden words, R rows in memory at a time.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert_kernels.hashing import combine, mix, signed

BLOCK = 64
"""Words in a block. Part of the definition: with another size the same keys give other samples."""
FLOOR = 2.0**-900
"""Added to the weight of every allowed word, so that a word with a positive weight always remains."""
REMOVED = -1.0
"""Weight of a word that is not allowed or already sampled."""
CELLS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits that `sample_rows` has in memory at a time: on a CPU about the size of its caches, on a GPU enough that no
step of a chunk leaves multiprocessors idle (docs/kernels.md)."""


@torch.no_grad()
def sample_candidates_reference(
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
    """`sample_distinct_reference` from the logits (hidden embedding^T + bias) / temperature, computed for R rows at a
    time.

    Args:
        hidden: floating [N, D]; products are computed in its dtype.
        embedding: floating [V, D].
        k: samples per row, at most the number of allowed words.
        temperature: above 0.
        seed: random seed of the noise, hashed with the row index; or give
        keys: int32 [N], one hashed key per row, so that the samples of a row do not depend on its index.
        bias: floating [V].
        forbidden: int64 [F], words that are not allowed in any row.
        excluded: int64 [N], one more word per row that is not allowed in it.
        rows: R (default: by CELLS). Changes nothing beyond rounding.

    Returns:
        ids, int64 [N, K] in sampling order; log_probabilities [N, K], in at least float32, under the softmax over the
        allowed words of the row. Neither has a gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; k exceeds the number of allowed words; neither or both
            of seed and keys.
    """
    keys = check_candidates(hidden, embedding, k, temperature, seed, keys, bias, forbidden, excluded, rows)
    return sample_rows(hidden, embedding, bias, keys, forbidden, excluded, k, temperature, rows)


@torch.no_grad()
def sample_distinct_reference(
    logits: Tensor, k: int, keys: Tensor, *, forbidden: Tensor | None = None, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample `k` words without replacement for each row from the softmax over its allowed words.

    The first is a with probability p(a), the next b with p(b) / (1 - p(a)), and so on: the distribution of sampling
    with replacement and discarding repeats. The relative error of a word's probability is that of rounding, as long as
    the probability is above 1e-37 of the largest; less likely words come last, in arbitrary order. A row whose logits
    define no distribution (NaN or an infinity among them) gets distinct allowed words, which are arbitrary, as are
    their log-probabilities.

    Args:
        logits: floating [N, V], not changed.
        k: samples per row, at most the number of allowed words.
        keys: int32 [N], one hashed key for each row.
        forbidden: int64 [F], words that are not allowed in any row.
        excluded: int64 [N], one more word per row that is not allowed in it.

    Returns:
        As `sample_candidates_reference`.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; k exceeds the number of allowed words.
    """
    check_logits(logits, k, keys, forbidden, excluded)
    return sample_from_logits(logits, keys, forbidden, excluded, k)


def check_logits(logits: Tensor, k: int, keys: Tensor, forbidden: Tensor | None, excluded: Tensor | None) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits {tuple(logits.shape)} must be [N, V]")
    _check_floating(logits=logits)
    _check(logits, logits.shape[1], k, keys, forbidden, excluded)


def check_candidates(
    hidden: Tensor,
    embedding: Tensor,
    k: int,
    temperature: float,
    seed: int | None,
    keys: Tensor | None,
    bias: Tensor | None,
    forbidden: Tensor | None,
    excluded: Tensor | None,
    rows: int | None,
) -> Tensor:
    """Check all arguments; returns the rows' keys."""
    if hidden.dim() != 2 or embedding.dim() != 2 or hidden.shape[1] != embedding.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and embedding {tuple(embedding.shape)} must be [N, D], [V, D]")
    if bias is not None and bias.shape != embedding.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [V] for embedding {tuple(embedding.shape)}")
    _check_floating(hidden=hidden, embedding=embedding, bias=bias)
    _check_device(hidden, embedding=embedding, bias=bias)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    if rows is not None and rows < 1:
        raise ValueError(f"rows must be at least 1, not {rows}")
    if (seed is None) == (keys is None):
        raise ValueError("give either seed or keys")
    if keys is None:
        start = torch.full((1,), signed(seed), dtype=torch.int32, device=hidden.device)
        keys = combine(mix(start), torch.arange(len(hidden), dtype=torch.int32, device=hidden.device))
    _check(hidden, len(embedding), k, keys, forbidden, excluded)
    return keys


def _check(x: Tensor, vocabulary: int, k: int, keys: Tensor, forbidden: Tensor | None, excluded: Tensor | None) -> None:
    """Check the other arguments against the rows of `x`, without reading values: `forbidden` is assumed to list each
    word once, and `excluded` none of these."""
    if keys.shape != x.shape[:1] or keys.dtype != torch.int32:
        raise ValueError(f"keys must be int32 [N], N = {len(x)}, not {keys.dtype} {tuple(keys.shape)}")
    if forbidden is not None and (forbidden.dim() != 1 or forbidden.dtype != torch.int64):
        raise ValueError(f"forbidden must be int64 [F], not {forbidden.dtype} {tuple(forbidden.shape)}")
    if excluded is not None and (excluded.shape != x.shape[:1] or excluded.dtype != torch.int64):
        raise ValueError(f"excluded must be int64 [N], N = {len(x)}, not {excluded.dtype} {tuple(excluded.shape)}")
    _check_device(x, keys=keys, forbidden=forbidden, excluded=excluded)
    most = vocabulary - (0 if forbidden is None else len(forbidden)) - (excluded is not None)
    if not 1 <= k <= most:
        raise ValueError(f"cannot sample {k} distinct words from the {most} that are allowed in a row")


def _check_floating(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name} must be floating, not {x.dtype}")


def _check_device(rows: Tensor, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.device != rows.device:
            raise ValueError(f"{name} is on {x.device}, but the rows are on {rows.device}")


def sample_rows(
    hidden: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    keys: Tensor,
    forbidden: Tensor | None,
    excluded: Tensor | None,
    k: int,
    temperature: float,
    rows: int | None,
    kernel_for: Callable[[Tensor, int, Tensor], Callable[..., tuple[Tensor, Tensor]] | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """`sample_candidates_reference` for checked arguments and one key per row, R rows at a time. `kernel_for` returns,
    for logits, k and the disallowed words, a function that samples from such logits instead of `_sample`, or None."""
    dtype, device, padding = hidden.dtype, hidden.device, -len(embedding) % BLOCK
    shift = torch.zeros(len(embedding), dtype=dtype, device=device) if bias is None else bias / temperature
    disallowed = disallowed_words(forbidden, len(embedding), device)
    shift = F.pad(shift, (0, padding)).to(dtype).index_fill(0, disallowed, -torch.inf)
    hidden, embedding = hidden / temperature, F.pad(embedding.to(dtype), (0, 0, 0, padding))
    rows = min(rows or max(1, CELLS.get(device.type, CELLS["cpu"]) // len(embedding)), len(hidden))
    logits = hidden.new_empty(rows, len(embedding))
    sample = kernel_for(logits, k, disallowed) if kernel_for else None
    if sample is None:
        sample = functools.partial(_sample, k=k, disallowed=disallowed, weights=_wide_like(logits))
    ids, log_probabilities = empty_samples(hidden, k)
    for start in range(0, len(hidden), max(1, rows)):
        chunk = slice(start, start + rows)
        part = logits[: len(hidden[chunk])]
        torch.addmm(shift, hidden[chunk], embedding.T, out=part)
        ids[chunk], log_probabilities[chunk] = sample(part, keys[chunk], None if excluded is None else excluded[chunk])
    return ids, log_probabilities


def sample_from_logits(
    logits: Tensor, keys: Tensor, forbidden: Tensor | None, excluded: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """`sample_distinct_reference` for checked arguments."""
    disallowed = disallowed_words(forbidden, logits.shape[1], logits.device)
    logits = F.pad(logits, (0, -logits.shape[1] % BLOCK)).index_fill_(1, disallowed, -torch.inf)
    return _sample(logits, keys, excluded, k=k, disallowed=disallowed, weights=_wide_like(logits))


def empty_samples(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Memory for the ids and log-probabilities of these rows."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.new_empty(len(rows), k, dtype=torch.int64), rows.new_empty(len(rows), k, dtype=wide)


def disallowed_words(forbidden: Tensor | None, vocabulary: int, device: torch.device) -> Tensor:
    """The forbidden words, and the ids that pad the vocabulary to whole blocks."""
    padding = torch.arange(vocabulary, vocabulary + -vocabulary % BLOCK, device=device)
    return padding if forbidden is None else torch.cat([forbidden, padding])


def word_floors(words: int, disallowed: Tensor) -> Tensor:
    """float64 [words], the constant added to each word's weight: FLOOR, or 0 for disallowed words."""
    return torch.full((words,), FLOOR, dtype=torch.float64, device=disallowed.device).index_fill_(0, disallowed, 0.0)


def _wide_like(logits: Tensor) -> Tensor:
    """Memory for the weights of these logits: the logits themselves if their dtype is wide enough."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits if wide == logits.dtype else torch.empty_like(logits, dtype=wide)


def _sample(
    logits: Tensor, keys: Tensor, excluded: Tensor | None, *, k: int, disallowed: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """`sample_distinct_reference` where V is a multiple of BLOCK and the logits of disallowed words are already -inf.

    Args:
        logits: [N, V].
        disallowed: int64, words that are not allowed in any row.
        weights: memory [at least N, V], overwritten: the logits themselves, or of a wider dtype.
    """
    count, device, weights = len(logits), logits.device, weights[: len(logits)]
    if weights.dtype != logits.dtype:
        weights.copy_(logits)
    if excluded is not None:
        excluded = excluded[:, None]
        weights.scatter_(1, excluded, -torch.inf)
    torch.softmax(weights, -1, out=weights)  # in place: all implementations read a number before they write it
    blocks = weights.view(-1, BLOCK)  # [N V / BLOCK, BLOCK]
    floors = word_floors(logits.shape[1], disallowed)
    # Softmax gives NaN for a row with NaN or an infinity; zeros instead leave each word its floor.
    sums = blocks.sum(1).nan_to_num_(nan=0.0).view(count, logits.shape[1] // BLOCK) + floors.view(-1, BLOCK).sum(1)
    first = torch.arange(count, device=device)[:, None] * sums.shape[1]  # index of each row's first block
    weights.index_fill_(1, disallowed, REMOVED)
    if excluded is not None:
        weights.scatter_(1, excluded, REMOVED)
        sums.scatter_add_(1, excluded // BLOCK, -floors[excluded])

    noise = unit_interval(combine(keys[:, None], torch.arange(k, dtype=torch.int32, device=device)))
    ids, probabilities = [], []
    for index in range(k):
        block, fraction = _invert(sums.cumsum(1), noise[:, index : index + 1])
        inside = blocks.index_select(0, (first + block)[:, 0]).double().nan_to_num_(nan=0.0)  # [N, BLOCK]
        inside.add_(FLOOR).clamp_(min=0.0)
        offset, _ = _invert(inside.cumsum(1), fraction)
        ids.append(block * BLOCK + offset)
        probabilities.append(inside.gather(1, offset))
        weights.scatter_(1, ids[-1], REMOVED)
        inside.scatter_(1, offset, 0.0)
        sums.scatter_(1, block, inside.sum(1, keepdim=True))
    return torch.cat(ids, 1), torch.cat(probabilities, 1).log().to(weights.dtype)


def _invert(ends: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor]:
    """Find the interval of each row that contains the point at `fraction` of the total length.

    Args:
        ends: float64 [N, I], ascending: the ends of the intervals.
        fraction: float64 [N, 1], in [0, 1).

    Returns:
        index, int64 [N, 1], of a non-empty interval; the fraction of that interval before the point, in [0, 1).
    """
    point = fraction * ends[:, -1:]
    index = torch.searchsorted(ends, point, right=True)
    end = ends.gather(1, index)
    start = ends.gather(1, (index - 1).clamp(min=0)) * (index > 0)
    return index, ((point - start) / (end - start)).clamp(max=1 - 2.0**-52)


def unit_interval(words: Tensor) -> Tensor:
    """float64 in [0, 1 - 2^-52] with 52 random bits, from int32 hash words of any shape."""
    high = words.long() & 0xFFFFFFFF
    low = (combine(words, 1).long() & 0xFFFFFFFF) >> 12
    return ((high << 20) | low).double() * 2.0**-52
