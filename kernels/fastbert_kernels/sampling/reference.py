"""Definition of the exact sampling of distinct words from a softmax, with noise that is a function of keys.

A draw inverts the distribution function in two steps: a block of words by the blocks' sums, then a word in the block.
Drawn words are taken out and their block is summed anew, so what is left is never a small difference of large numbers,
and K rounds give K distinct words whatever the distribution. It costs one exponential a word and two hashes a draw;
Gumbel noise would cost a hash and two logarithms a word.

Shapes: N rows, V words, D width, K words drawn for each row, F words that are never drawn, R rows held at a time.
"""

import functools
from collections.abc import Callable

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
"""Logits that `sample_rows` holds at a time: on a CPU about what its caches hold, on a GPU enough that no step of
a chunk leaves multiprocessors idle (docs/kernels.md)."""


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
    """`sample_distinct_reference` from the logits (hidden embedding^T + bias) / temperature, made for R rows at a time.

    Args:
        hidden: floating [N, D]; the products are in its type.
        embedding: floating [V, D].
        k: words to draw for each row, at most those it may draw.
        temperature: above 0.
        seed: of the noise, with the row's number; or give
        keys: int32 [N], one hashed key for each row, so that a row draws the same words wherever it stands.
        bias: floating [V].
        forbidden: int64 [F], words that no row may draw.
        excluded: int64 [N], a word that the row may not draw besides.
        rows: R (default: by CELLS). Changes nothing beyond rounding.

    Returns:
        ids, int64 [N, K] in the order drawn; log_probabilities [N, K], in at least float32, under the softmax over the
        words the row may draw. No gradient flows through either.

    Raises:
        ValueError: shapes, types or devices that do not fit, named; more words than a row may draw; neither or both of
            seed and keys.
    """
    keys = check_candidates(hidden, embedding, k, temperature, seed, keys, bias, forbidden, excluded, rows)
    return sample_rows(hidden, embedding, bias, keys, forbidden, excluded, k, temperature, rows)


@torch.no_grad()
def sample_distinct_reference(
    logits: Tensor, k: int, keys: Tensor, *, forbidden: Tensor | None = None, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draws `k` words without replacement for each row from the softmax over the words it may draw.

    The first is a with probability p(a), the next b with p(b) / (1 - p(a)), and so on: the law of drawing with
    replacement and discarding repeats. A word's probability is right to rounding relative to itself, as long as it is
    above 1e-37 of that of the likeliest; words further down are drawn last, in an order of no meaning. A row whose
    logits define no distribution, with NaN or an infinity among them, draws distinct words that it may draw, of no
    meaning and with log-probabilities of none.

    Args:
        logits: floating [N, V], not changed.
        k: at most the words a row may draw.
        keys: int32 [N], one hashed key for each row.
        forbidden: int64 [F], words that no row may draw.
        excluded: int64 [N], a word that the row may not draw besides.

    Returns:
        As `sample_candidates_reference`.

    Raises:
        ValueError: shapes, types or devices that do not fit, named; more words than a row may draw.
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
    """The rows' keys, once all arguments are known to fit."""
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
    """That the rest fits the rows of `x`, without looking at values: `forbidden` is taken to name each word once, and
    `excluded` none of these."""
    if keys.shape != x.shape[:1] or keys.dtype != torch.int32:
        raise ValueError(f"keys must be int32 [N], N = {len(x)}, not {keys.dtype} {tuple(keys.shape)}")
    if forbidden is not None and (forbidden.dim() != 1 or forbidden.dtype != torch.int64):
        raise ValueError(f"forbidden must be int64 [F], not {forbidden.dtype} {tuple(forbidden.shape)}")
    if excluded is not None and (excluded.shape != x.shape[:1] or excluded.dtype != torch.int64):
        raise ValueError(f"excluded must be int64 [N], N = {len(x)}, not {excluded.dtype} {tuple(excluded.shape)}")
    _check_device(x, keys=keys, forbidden=forbidden, excluded=excluded)
    most = vocabulary - (0 if forbidden is None else len(forbidden)) - (excluded is not None)
    if not 1 <= k <= most:
        raise ValueError(f"cannot draw {k} distinct words from the {most} that a row may draw")


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
    """`sample_candidates_reference` for checked arguments and a key a row, R rows at a time. `kernel_for` gives, for
    logits, k and the barred words, what draws from such logits instead of `_draw`, or None."""
    dtype, device, padding = hidden.dtype, hidden.device, -len(embedding) % BLOCK
    shift = torch.zeros(len(embedding), dtype=dtype, device=device) if bias is None else bias / temperature
    barred = barred_words(forbidden, len(embedding), device)
    shift = F.pad(shift, (0, padding)).to(dtype).index_fill(0, barred, -torch.inf)
    hidden, embedding = hidden / temperature, F.pad(embedding.to(dtype), (0, 0, 0, padding))
    rows = min(rows or max(1, CELLS.get(device.type, CELLS["cpu"]) // len(embedding)), len(hidden))
    logits = hidden.new_empty(rows, len(embedding))
    draw = kernel_for(logits, k, barred) if kernel_for else None
    if draw is None:
        draw = functools.partial(_draw, k=k, barred=barred, weights=_wide_like(logits))
    ids, log_probabilities = empty_draws(hidden, k)
    for start in range(0, len(hidden), max(1, rows)):
        chunk = slice(start, start + rows)
        mine = logits[: len(hidden[chunk])]
        torch.addmm(shift, hidden[chunk], embedding.T, out=mine)
        ids[chunk], log_probabilities[chunk] = draw(mine, keys[chunk], None if excluded is None else excluded[chunk])
    return ids, log_probabilities


def sample_from_logits(
    logits: Tensor, keys: Tensor, forbidden: Tensor | None, excluded: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """`sample_distinct_reference` for checked arguments."""
    barred = barred_words(forbidden, logits.shape[1], logits.device)
    logits = F.pad(logits, (0, -logits.shape[1] % BLOCK)).index_fill_(1, barred, -torch.inf)
    return _draw(logits, keys, excluded, k=k, barred=barred, weights=_wide_like(logits))


def empty_draws(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Memory for the ids and log-probabilities of these rows."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.new_empty(len(rows), k, dtype=torch.int64), rows.new_empty(len(rows), k, dtype=wide)


def barred_words(forbidden: Tensor | None, vocabulary: int, device: torch.device) -> Tensor:
    """The words that may not be drawn, with those that fill the vocabulary up to whole blocks."""
    padding = torch.arange(vocabulary, vocabulary + -vocabulary % BLOCK, device=device)
    return padding if forbidden is None else torch.cat([forbidden, padding])


def word_floors(words: int, barred: Tensor) -> Tensor:
    """float64 [words], what is added to each word's weight."""
    return torch.full((words,), FLOOR, dtype=torch.float64, device=barred.device).index_fill_(0, barred, 0.0)


def _wide_like(logits: Tensor) -> Tensor:
    """Where the weights for these logits can stand: in their own place if that is wide enough."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits if wide == logits.dtype else torch.empty_like(logits, dtype=wide)


def _draw(
    logits: Tensor, keys: Tensor, excluded: Tensor | None, *, k: int, barred: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """`sample_distinct_reference` where V is a multiple of BLOCK and the logits of what is barred are -inf already.

    Args:
        logits: [N, V].
        barred: int64, the words that no row may draw.
        weights: memory for [N, V] or more rows, overwritten: the logits' own, or of a wider type.
    """
    count, device, weights = len(logits), logits.device, weights[: len(logits)]
    if weights.dtype != logits.dtype:
        weights.copy_(logits)
    if excluded is not None:
        excluded = excluded[:, None]
        weights.scatter_(1, excluded, -torch.inf)
    torch.softmax(weights, -1, out=weights)  # every implementation reads a number before it writes it
    blocks = weights.view(-1, BLOCK)  # [N V / BLOCK, BLOCK]
    floors = word_floors(logits.shape[1], barred)
    # Softmax makes NaN of a row that holds NaN or an infinity; as zeros they leave each word its floor.
    sums = blocks.sum(1).nan_to_num_(nan=0.0).view(count, logits.shape[1] // BLOCK) + floors.view(-1, BLOCK).sum(1)
    first = torch.arange(count, device=device)[:, None] * sums.shape[1]  # the first of each row's blocks
    weights.index_fill_(1, barred, OUT)
    if excluded is not None:
        weights.scatter_(1, excluded, OUT)
        sums.scatter_add_(1, excluded // BLOCK, -floors[excluded])

    noise = _unit_interval(combine(keys[:, None], torch.arange(k, dtype=torch.int32, device=device)))
    ids, probabilities = [], []
    for draw in range(k):
        block, share = _invert(sums.cumsum(1), noise[:, draw : draw + 1])
        inside = blocks.index_select(0, (first + block)[:, 0]).double().nan_to_num_(nan=0.0)  # [N, BLOCK]
        inside.add_(FLOOR).clamp_(min=0.0)
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
