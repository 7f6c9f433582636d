"""Masking: which positions of a row are masked and what they show, as hashes of the rows' keys, on the device.

Every row has the same number M of masked positions, so shapes are static and nothing waits for the device. If a row has
fewer tokens to mask, the remaining positions are marked invalid.

Shapes: B rows, T tokens, M masked positions, V vocabulary.
"""

from typing import NamedTuple

import torch
from fastbert_kernels import combine
from fastbert_kernels.hashing import threshold, uniform
from torch import Tensor, nn

from fastbert.data.tokenizer import WordPiece
from fastbert.objectives.options import ObjectiveOptions

LAST = 1 << 40  # sorts after every hash
OVERHANG = 7  # further positions, for the end of a whole word that begins within the budget
WINDOW = 3  # combined with a row's key for the start of its window; `corrupt` uses 1 and 2


class Masks(NamedTuple):
    """Masks of a micro-batch."""

    input_ids: Tensor
    """[B, T], with masks."""
    positions: Tensor
    """int64 [B, M], in ascending order among the valid ones."""
    valid: Tensor
    """bool [B, M], true for positions that are masked."""
    targets: Tensor
    """int64 [B, M], the original words; -100 where nothing is masked."""


class Masker(nn.Module):
    """Masks rows by the options of an objective.

    Args:
        vocab_size: V, rows of the embedding.
    """

    def __init__(self, vocab_size: int, vocabulary: WordPiece, options: ObjectiveOptions) -> None:
        super().__init__()
        self.options = options
        self.mask_id, self.pad_id = vocabulary.ids["[MASK]"], vocabulary.ids["[PAD]"]
        special = torch.zeros(vocab_size, dtype=torch.bool)
        special[list(vocabulary.special_ids)] = True
        special[len(vocabulary.tokens) :] = True  # unused rows of the embedding
        continuation = torch.zeros_like(special)
        continuation[: len(vocabulary.tokens)] = torch.from_numpy(vocabulary.continuing)
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("continuation", continuation, persistent=False)
        self.register_buffer("special_ids", special.nonzero()[:, 0], persistent=False)
        self.register_buffer("ordinary_ids", (~special).nonzero()[:, 0], persistent=False)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, keys: Tensor) -> Masks:
        """Masks the rows. In validation all masked positions show [MASK]: a word that is shown unchanged would be
        known, and the loss could not be compared with the unigram entropy.

        Args:
            input_ids: [B, T].
            keys: int32 [B], keys of the rows.
        """
        options = self.options
        count = mask_count(input_ids.shape[1], options.mask_rate)
        continuation = self.continuation if options.whole_word else None
        positions, valid = choose_positions(input_ids, self.special, keys, count, continuation)
        fractions = (options.mask_token_fraction, options.random_token_fraction) if self.training else (1.0, 0.0)
        masked = corrupt(input_ids, positions, valid, keys, self.mask_id, self.ordinary_ids, fractions)
        return Masks(masked, positions, valid, torch.where(valid, input_ids.gather(1, positions), -100))

    def count(self, length: int) -> int:
        """M for rows of `length` tokens."""
        return mask_count(length, self.options.mask_rate, self.options.whole_word)


def mask_count(length: int, rate: float, whole_word: bool = False) -> int:
    """M for rows of `length` tokens; with whole words, more than the expected number of masked tokens."""
    count = max(1, round(rate * length))
    return min(length, count + OVERHANG) if whole_word else count


def choose_positions(
    input_ids: Tensor, special: Tensor, keys: Tensor, count: int, continuation: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Samples `count` positions in every row, uniformly among the tokens that are not special, or among whole words.

    Args:
        input_ids: [B, T].
        special: bool [V], tokens that are never masked.
        keys: int32 [B], keys of the rows.
        count: tokens to mask in a row; with whole words the expected number.
        continuation: bool [V], pieces that continue a word; if given, whole words are masked.

    Returns:
        positions, int64 [B, M], in ascending order among the valid ones; valid, bool [B, M]. M is `count`, or with
        whole words the result of `mask_count`.
    """
    length = input_ids.shape[1]
    index = torch.arange(length, dtype=torch.int32, device=input_ids.device)
    ordinary = ~special[input_ids]
    if continuation is None:
        # Special tokens come last and in order, so that the unused positions are deterministic as well.
        score = torch.where(ordinary, combine(keys[:, None], index).long(), LAST + index.long())
        chosen = torch.topk(score, count, dim=1, largest=False).indices
        chosen = chosen.sort(dim=1).values
        return chosen, ordinary.gather(1, chosen)

    starts = ordinary & ~continuation[input_ids]
    # A piece after a special token begins a word even if it is marked as a continuation (a word cut by the row's edge).
    starts |= ordinary & ~torch.nn.functional.pad(ordinary, (1, 0))[:, :-1]
    word = torch.where(starts, index, 0).long().cummax(1).values  # [B, T], where each token's word starts
    size = torch.zeros_like(word).scatter_add_(1, word, ordinary.long())
    score = torch.where(ordinary, combine(keys[:, None], index).long().gather(1, word), LAST)
    # Pieces of one word have the same score; a stable sort keeps them together and in order.
    order = score.sort(dim=1, stable=True).indices
    valid = _in_window(order, word.gather(1, order), size.gather(1, word), ordinary, keys, count)
    # Ascending among the valid; the invalid come after them.
    chosen = torch.where(valid, order, order + length).sort(dim=1).values[:, : min(length, count + OVERHANG)]
    return chosen % length, chosen < length


def _in_window(order: Tensor, first: Tensor, size: Tensor, ordinary: Tensor, keys: Tensor, count: int) -> Tensor:
    """Mask of the tokens to be masked as whole words: bool [B, T], in the order of `order`.

    Every word must have the same probability, regardless of its number of pieces. Filling a budget until a word does
    not fit, or skipping the words that do not fit (BERT's released code), prefers short words. Here the N ordinary
    tokens of a row, sorted by the hashes of their words, form a circle, and a window of `count` of them starts at a
    uniform offset. A word is masked if its first piece is in the window. That piece is one of N tokens, so

        P(word is masked) = count / N        exactly, and E[masked tokens] = count

    The last word of the window may end up to OVERHANG tokens beyond it. If it has more pieces than that, the first
    words of the window are dropped to make room for it. A word of more than count + OVERHANG pieces is never masked.

    Args:
        order: int64 [B, T], the tokens sorted by word, special ones last.
        first: int64 [B, T], in this order: index of the first piece of each token's word.
        size: int64 [B, T], in the order of the row: number of pieces of each token's word.
        ordinary: bool [B, T], in the order of the row.
    """
    length = order.shape[1]
    room = min(length, count + OVERHANG)
    tokens = ordinary.sum(1, keepdim=True)  # N
    window = uniform(combine(combine(keys, WINDOW), 0)[:, None], tokens)
    rank = torch.arange(length, device=order.device)
    position = (rank - (order - first) - window).remainder(tokens.clamp(min=1))  # of the word's first piece
    size = size.gather(1, order)
    inside = ordinary.gather(1, order) & (position < count) & (size <= room)
    end = torch.where(inside, position + size, 0).amax(1, keepdim=True)
    return inside & (end - position <= room)


def corrupt(
    input_ids: Tensor,
    positions: Tensor,
    valid: Tensor,
    keys: Tensor,
    mask_id: int,
    ordinary_ids: Tensor,
    fractions: tuple[float, float],
) -> Tensor:
    """Rows with [MASK], a random word, or the word itself at the valid `positions`.

    Args:
        ordinary_ids: int64, ids that random words are sampled from.
        fractions: fractions of the masked positions that show [MASK] and a random word; the rest show their word.

    Returns:
        [B, T].
    """
    original = input_ids.gather(1, positions)
    choice = combine(combine(keys, 1)[:, None], positions.to(torch.int32))
    word = combine(combine(keys, 2)[:, None], positions.to(torch.int32))
    random_ids = ordinary_ids[uniform(word, len(ordinary_ids))]
    new = torch.where(choice < threshold(sum(fractions)), random_ids, original)
    new = torch.where(choice < threshold(fractions[0]), mask_id, new)
    return input_ids.scatter(1, positions, torch.where(valid, new, original))
