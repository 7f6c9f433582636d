"""Distinct words drawn from a softmax over the vocabulary, exactly, with noise that is a function of keys.

A draw inverts the distribution function in two steps: a block of words by the blocks' sums, then a word in the block.
Drawn words are taken out and their block is summed anew, so what is left is never a small difference of large numbers,
and K rounds give K distinct words whatever the distribution. It costs one exponential a word and two hashes a draw;
Gumbel noise would cost a hash and two logarithms a word.

Shapes: N rows, V words, D width, K words drawn for each row, F words that are never drawn, R rows held at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert_kernels.hashing import combine, mix, signed

BLOCK = 64
"""Words in a block. It is part of the function: another size draws other words from the same keys."""
FLOOR = 2.0**-900
"""Added to the weight of every word that may be drawn, so that there is always one left."""
OUT = -1.0
"""The weight of a word that may not be drawn any more."""
CELLS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits that `sample_candidates` holds at a time."""


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
    """`draw_distinct` from the logits (hidden embedding^T + bias) / temperature, which are never there for all rows.

    Args:
        hidden: [N, D].
        embedding: [V, D].
        k: words to draw for each row, at most those it may draw.
        temperature: above 0.
        seed: of the noise, with the row's number; or give
        keys: int32 [N], one hashed key for each row, so that a row draws the same words wherever it stands.
        bias: [V].
        forbidden: int64 [F], words that no row may draw.
        excluded: int64 [N], a word that the row may not draw besides.
        rows: R (default: by CELLS). Changes nothing beyond rounding.

    Returns:
        ids, int64 [N, K] in the order drawn; log_probabilities [N, K] under the softmax over the words the row may
        draw. No gradient flows through either.

    Raises:
        ValueError: shapes that do not fit, more words than a row may draw, neither or both of seed and keys.
    """
    if hidden.dim() != 2 or embedding.dim() != 2 or hidden.shape[1] != embedding.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and embedding {tuple(embedding.shape)} must be [N, D], [V, D]")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    if (seed is None) == (keys is None):
        raise ValueError("give either seed or keys")
    if keys is None:
        start = torch.full((1,), signed(seed), dtype=torch.int32, device=hidden.device)
        keys = combine(mix(start), torch.arange(len(hidden), dtype=torch.int32, device=hidden.device))
    _check_count(k, len(embedding), forbidden, excluded)
    dtype, device, padding = hidden.dtype, hidden.device, -len(embedding) % BLOCK
    shift = torch.zeros(len(embedding), dtype=dtype, device=device) if bias is None else bias / temperature
    forbidden = _with_padding(forbidden, len(embedding), device)
    shift = F.pad(shift, (0, padding)).to(dtype).index_fill(0, forbidden, -torch.inf)
    hidden, embedding = hidden / temperature, F.pad(embedding.to(dtype), (0, 0, 0, padding))
    rows = rows or max(1, CELLS[device.type] // len(embedding))
    logits = torch.empty(min(rows, len(hidden)), len(embedding), dtype=dtype, device=device)
    weights = torch.empty_like(logits, dtype=torch.promote_types(dtype, torch.float32))
    parts = []
    for start in range(0, len(hidden), rows):
        chunk = slice(start, start + rows)
        size = len(hidden[chunk])
        torch.addmm(shift, hidden[chunk], embedding.T, out=logits[:size])
        without = None if excluded is None else excluded[chunk]
        parts.append(_draw(logits[:size], weights[:size], k, keys[chunk], forbidden, without))
    ids, log_probabilities = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(log_probabilities)


@torch.no_grad()
def draw_distinct(
    logits: Tensor, k: int, keys: Tensor, *, forbidden: Tensor | None = None, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draws `k` words without replacement for each row from the softmax over the words it may draw.

    The first is a with probability p(a), the next b with p(b) / (1 - p(a)), and so on: the law of drawing with
    replacement and discarding repeats. A word's probability is right to rounding relative to itself, as long as it is
    above 1e-37 of that of the likeliest; words further down are drawn last, in an order of no meaning.

    Args:
        logits: floating [N, V].
        k: at most the words a row may draw.
        keys: int32 [N], one hashed key for each row.
        forbidden: int64 [F], words that no row may draw.
        excluded: int64 [N], a word that the row may not draw besides.

    Returns:
        As `sample_candidates`.

    Raises:
        ValueError: more words than a row may draw.
    """
    _check_count(k, logits.shape[1], forbidden, excluded)
    forbidden = _with_padding(forbidden, logits.shape[1], logits.device)
    logits = F.pad(logits, (0, -logits.shape[1] % BLOCK)).index_fill(1, forbidden, -torch.inf)
    weights = torch.empty_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
    return _draw(logits, weights, k, keys, forbidden, excluded)


def _check_count(k: int, vocabulary: int, forbidden: Tensor | None, excluded: Tensor | None) -> None:
    """Without looking at values: `forbidden` is taken to name each word once, and `excluded` none of these."""
    most = vocabulary - (0 if forbidden is None else len(forbidden)) - (excluded is not None)
    if not 1 <= k <= most:
        raise ValueError(f"cannot draw {k} distinct words from the {most} that a row may draw")


def _with_padding(forbidden: Tensor | None, vocabulary: int, device: torch.device) -> Tensor:
    """The words that may not be drawn, with those that fill the vocabulary up to whole blocks."""
    padding = torch.arange(vocabulary, vocabulary + -vocabulary % BLOCK, device=device)
    return padding if forbidden is None else torch.cat([forbidden, padding])


def _draw(
    logits: Tensor, weights: Tensor, k: int, keys: Tensor, forbidden: Tensor, excluded: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`draw_distinct` where V is a multiple of BLOCK and the logits of what is forbidden are -inf already.

    `logits` and `weights` [N, V] are overwritten.
    """
    count, device = len(logits), logits.device
    if excluded is not None:
        excluded = excluded[:, None]
        logits.scatter_(1, excluded, -torch.inf)
    torch.softmax(logits, -1, dtype=weights.dtype, out=weights)
    blocks = weights.view(-1, BLOCK)  # [N V / BLOCK, BLOCK]
    floors = torch.full((logits.shape[1],), FLOOR, dtype=torch.float64, device=device).index_fill_(0, forbidden, 0.0)
    sums = blocks.sum(1).view(count, -1) + floors.view(-1, BLOCK).sum(1)
    first = torch.arange(count, device=device)[:, None] * sums.shape[1]  # the first of each row's blocks
    weights.index_fill_(1, forbidden, OUT)
    if excluded is not None:
        weights.scatter_(1, excluded, OUT)
        sums.scatter_add_(1, excluded // BLOCK, -floors[excluded])

    noise = _unit_interval(combine(keys[:, None], torch.arange(k, dtype=torch.int32, device=device)))
    ids, probabilities = [], []
    for draw in range(k):
        block, share = _invert(sums.cumsum(1), noise[:, draw : draw + 1])
        inside = blocks.index_select(0, (first + block)[:, 0]).double().add_(FLOOR).clamp_(min=0.0)  # [N, BLOCK]
        place, _ = _invert(inside.cumsum(1), share)
        ids.append(block * BLOCK + place)
        probabilities.append(inside.gather(1, place))
        weights.scatter_(1, ids[-1], OUT)
        inside.scatter_(1, place, 0.0)
        sums.scatter_(1, block, inside.sum(1, keepdim=True))
    return torch.cat(ids, 1), torch.cat(probabilities, 1).log().to(weights.dtype)


def _invert(ends: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """In which of its row's intervals `share` (float64 [N, 1], in [0, 1)) of their whole length falls.

    Args:
        ends: float64 [N, I], ascending: where the intervals end.

    Returns:
        index, int64 [N, 1], of an interval that is not empty; the share of that interval before the point, in [0, 1).
    """
    point = share * ends[:, -1:]
    index = torch.searchsorted(ends, point, right=True)
    end = ends.gather(1, index)
    start = ends.gather(1, (index - 1).clamp(min=0)) * (index > 0)
    return index, ((point - start) / (end - start)).clamp(max=1 - 2.0**-52)


def _unit_interval(words: Tensor) -> Tensor:
    """float64 in [0, 1 - 2^-52] with 52 random bits, from int32 hash words of any shape."""
    high = words.long() & 0xFFFFFFFF
    low = (combine(words, 1).long() & 0xFFFFFFFF) >> 12
    return ((high << 20) | low).double() * 2.0**-52
