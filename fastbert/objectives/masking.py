"""Which places of a row are masked and what stands there instead: hashes of the rows' keys, on the device.

Every row has the same number of places M, so shapes are static and nothing waits for the device. Where a row has fewer
words than places, the rest are marked invalid.

Shapes: B rows, T tokens, M masked places, V vocabulary.
"""

import torch
from fastbert_kernels import combine
from fastbert_kernels.hashing import threshold, uniform
from torch import Tensor

LAST = 1 << 40  # sorts after every hash word


def masked_places(length: int, rate: float) -> int:
    """M for rows of `length` tokens."""
    return max(1, round(rate * length))


def choose_places(
    input_ids: Tensor, special: Tensor, keys: Tensor, count: int, continuation: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draws `count` places in every row, uniformly among the tokens that are not special, or among whole words.

    Args:
        input_ids: [B, T].
        special: bool [V], the tokens that are never masked.
        keys: int32 [B].
        count: M.
        continuation: bool [V], the pieces that continue a word; if given, words are drawn whole. A word that no longer
            fits into the M places ends the draw, and the places left over are invalid.

    Returns:
        places, int64 [B, M] in ascending order among the valid; valid, bool [B, M].
    """
    length = input_ids.shape[1]
    place = torch.arange(length, dtype=torch.int32, device=input_ids.device)
    ordinary = ~special[input_ids]
    if continuation is None:
        # Special tokens come last and in order, so that even the places that are not used are the same everywhere.
        score = torch.where(ordinary, combine(keys[:, None], place).long(), LAST + place.long())
        chosen = torch.topk(score, count, dim=1, largest=False).indices
        chosen = chosen.sort(dim=1).values
        return chosen, ordinary.gather(1, chosen)

    starts = ordinary & ~continuation[input_ids]
    # A piece after a special token begins a word even if it is marked as a continuation (a word cut by the row's edge).
    starts |= ordinary & ~torch.nn.functional.pad(ordinary, (1, 0))[:, :-1]
    word = torch.where(starts, place, 0).long().cummax(1).values  # [B, T], where each token's word starts
    size = torch.zeros_like(word).scatter_add_(1, word, ordinary.long())
    score = torch.where(ordinary, combine(keys[:, None], place).long().gather(1, word), LAST)
    # Pieces of one word share a score; a stable sort keeps them together and in order.
    order = score.sort(dim=1, stable=True).indices[:, :count]
    rank = torch.arange(count, device=input_ids.device)
    offset = order - word.gather(1, order)
    fits = rank - offset + size.gather(1, word.gather(1, order)) <= count
    valid = fits & ordinary.gather(1, order)
    # Ascending among the valid; the invalid stand behind them.
    chosen = torch.where(valid, order, order + length).sort(dim=1).values
    return chosen % length, chosen < length


def corrupt(
    input_ids: Tensor,
    places: Tensor,
    valid: Tensor,
    keys: Tensor,
    *,
    mask_id: int,
    ordinary_ids: Tensor,
    mask_token_share: float,
    random_token_share: float,
) -> Tensor:
    """The rows with [MASK], a random word, or the word itself at the valid `places`.

    Args:
        ordinary_ids: int64, the tokens a random word is drawn from.
        mask_token_share, random_token_share: of the places; the rest keeps its word.

    Returns:
        [B, T].
    """
    original = input_ids.gather(1, places)
    fate = combine(combine(keys, 1)[:, None], places.to(torch.int32))
    draw = combine(combine(keys, 2)[:, None], places.to(torch.int32))
    random_ids = ordinary_ids[uniform(draw, len(ordinary_ids))]
    new = torch.where(fate < threshold(mask_token_share + random_token_share), random_ids, original)
    new = torch.where(fate < threshold(mask_token_share), mask_id, new)
    return input_ids.scatter(1, places, torch.where(valid, new, original))
