"""Batches of examples: pairs are truncated as in BERT; a batch contains examples of similar length, padded to the
longest.

The order is a function of (seed, epoch): a keyed permutation, in which blocks of examples are sorted by length.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.data.foreign_tokenizer import AnyTokenizer
from fastbert.finetuning.rows import Example
from fastbert.randomness import permute, row_keys

POOL = 50  # batches whose examples are sorted by length together
# On a GPU, lengths are padded to a multiple of this, for tensor cores and few distinct shapes. On a CPU, the time
# depends only on the number of tokens, and for SST-2 a fifth of them would be padding.
PAD_TO = 8
TEXTS_AT_A_TIME = 4096  # for the tokenizer, whose result takes much memory

# "epochs" of the keyed permutation that no training reaches, for other permutations of the rows
_BATCH_ORDER = 1 << 40
_SUBSETS = 1 << 41


@dataclass(frozen=True)
class TaskBatch:
    """B examples, padded on the right to T tokens."""

    input_ids: Tensor
    """int64 [B, T]."""
    attention_mask: Tensor
    """bool [B, T], true for tokens."""
    token_type_ids: Tensor | None
    """int64 [B, T], 1 for the second text of a pair; None if the examples are not pairs."""
    labels: Tensor | None
    """[B, ...], in the form that `TaskKind.losses` expects; None without labels."""
    scored: Tensor | None = None
    """bool [B, T] on the host, for prediction only: the tokens that are scored; None if each row is scored as a
    whole."""


@dataclass(frozen=True)
class EncodedSplit:
    """A split of a task as token ids, including [CLS] and [SEP], all examples concatenated."""

    tokens: np.ndarray
    """int32 [sum of lengths]."""
    starts: np.ndarray
    """int64 [N + 1]: index of the first token of each example, and the end of the last."""
    firsts: np.ndarray
    """int64 [N]: number of tokens of type 0, which precede those of type 1."""
    labels: np.ndarray | None
    """Training targets of the task's kind, [N, ...], or [sum of lengths] if words have labels; None if the split has no
    labels."""
    truncated: int
    """Number of examples that were truncated to `max_length`."""
    max_length: int
    pad: int
    """The id of [PAD]."""
    is_pair: bool
    scored: np.ndarray | None = None
    """bool [sum of lengths], the tokens at which words are scored; None if each row is scored as a whole."""
    ignored: int = 0
    """Label of the tokens that are not scored."""
    units: np.ndarray | None = None
    """int64 [examples + 1]: the index of each example's first word among the words of all examples; None if each row is
    an example."""
    soft_labels: np.ndarray | None = None
    """float32 [N, ...], trained on instead of `labels`: the ideal values of the scores; None if there are none."""
    weights: np.ndarray | None = None
    """float32 [N], weights of the examples in the loss, with mean 1; None if all are 1."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]."""
        return np.diff(self.starts)

    @cached_property
    def _units_before(self) -> np.ndarray:
        """int64 [N + 1]: the number of units in the rows before each row."""
        if self.scored is None:
            return np.arange(len(self) + 1)
        return np.concatenate([[0], np.cumsum(self.scored)])[self.starts]

    def units_in(self, rows: np.ndarray) -> np.ndarray:
        """Indices of the units that are scored in `rows`, in order, int64."""
        return ranges(self._units_before[rows], self._units_before[rows + 1])

    def by_example(self, values: np.ndarray) -> list[np.ndarray]:
        """Values of all units, [U, ...], split by example."""
        return list(values) if self.units is None else np.split(values, self.units[1:-1])

    def batch(self, rows: np.ndarray, device: torch.device | str = "cpu") -> TaskBatch:
        """Batch of the examples `rows` (int64 [B]), in that order."""
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        multiple = 1 if torch.device(device).type == "cpu" else PAD_TO
        width = max(longest, min(-(-longest // multiple) * multiple, self.max_length))
        column = np.arange(width)
        real = column < lengths[:, None]

        def padded(values: np.ndarray, fill: int, dtype: type) -> np.ndarray:
            out = np.full((len(rows), width), fill, dtype)
            out[real] = np.concatenate([values[self.starts[row] : self.starts[row + 1]] for row in rows])
            return out

        ids = padded(self.tokens, self.pad, np.int64)
        types = (column >= self.firsts[rows][:, None]) & real if self.is_pair else None
        labels, scored = self.labels, None
        if self.scored is not None:
            scored = padded(self.scored, 0, bool)
            labels = None if labels is None else padded(labels, self.ignored, np.int64)
        elif labels is not None:
            labels = labels[rows]

        def put(values: np.ndarray | None) -> Tensor | None:
            return None if values is None else torch.from_numpy(values).to(device, non_blocking=True)

        return TaskBatch(
            put(ids),
            put(real),
            put(None if types is None else types.astype(np.int64)),
            put(labels),
            None if scored is None else torch.from_numpy(scored),
        )


def ranges(first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The concatenated integer ranges from `first` up to `end`, [N] each."""
    counts = end - first
    return np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)


def truncated_lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of the two texts of a pair, truncated to `room` tokens together. BERT removes tokens one by one from the
    end of the longer text, or of the second if both are equally long; this is the closed form."""
    if first + second > room:
        rest = max(min(second, room // 2), room - first)
        return min(first, room - rest), rest
    return first, second


def encode(
    examples: Sequence[Example],
    vocabulary: AnyTokenizer,
    max_length: int,
    targets: Callable[[Sequence[Any]], np.ndarray],
) -> EncodedSplit:
    """Encodes examples as [CLS] text [SEP] or [CLS] text [SEP] pair [SEP], each at most `max_length` tokens; another
    architecture has its own tokens for [CLS] and [SEP], and maybe two between the texts.

    Args:
        examples: all of them with a pair or none; all with a label or none.
        targets: converts labels to training targets, [N, ...].
    """
    tokenizer = vocabulary.build()
    cls, sep, between = vocabulary.ids["[CLS]"], vocabulary.ids["[SEP]"], vocabulary.between
    is_pair = bool(examples) and examples[0].pair is not None
    pieces, lengths, firsts, truncated = [], [], [], 0
    for at in range(0, len(examples), TEXTS_AT_A_TIME):
        part = examples[at : at + TEXTS_AT_A_TIME]
        texts = tokenizer.encode_batch_fast([example.text for example in part], add_special_tokens=False)
        pairs = (
            tokenizer.encode_batch_fast([example.pair for example in part], add_special_tokens=False)
            if is_pair
            else [None] * len(part)
        )
        for text, pair in zip(texts, pairs, strict=True):
            a, b = text.ids, [] if pair is None else pair.ids
            first, second = truncated_lengths(len(a), len(b), max_length - (2 + len(between) * is_pair))
            truncated += first + second < len(a) + len(b)
            ids = [cls, *a[:first], *(between if is_pair else ())]
            firsts.append(len(ids) if is_pair else len(ids) + 1)
            ids += [*b[:second], sep]
            lengths.append(len(ids))
            pieces.append(np.array(ids, dtype=np.int32))
    labelled = bool(examples) and examples[0].label is not None
    soft = [example.soft_label for example in examples]
    weights = np.array([example.weight for example in examples])
    return EncodedSplit(
        tokens=np.concatenate(pieces) if pieces else np.zeros(0, np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        firsts=np.array(firsts, dtype=np.int64),
        labels=targets([example.label for example in examples]) if labelled else None,
        truncated=truncated,
        max_length=max_length,
        pad=vocabulary.ids["[PAD]"],
        is_pair=is_pair,
        soft_labels=None if not soft or soft[0] is None else np.array(soft, np.float32),
        weights=(weights / weights.mean()).astype(np.float32) if (weights != 1.0).any() else None,
    )


def training_order(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Batches of an epoch, as row indices: every row once; one batch may be smaller.

    Blocks of `POOL` batches of the permuted rows are sorted by length and cut into batches, whose order is permuted as
    well: a batch has rows of similar length, and different rows in every epoch.
    """
    count = len(lengths)
    order = permute(np.arange(count), count, seed, epoch)
    batches = []
    for at in range(0, count, POOL * batch_size):
        pool = order[at : at + POOL * batch_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
    return [batches[index] for index in permute(np.arange(len(batches)), len(batches), seed, epoch + _BATCH_ORDER)]


def sample_orders(orders: Sequence[EncodedSplit], seed: int, epoch: int) -> EncodedSplit:
    """The split for one epoch: a hash of (seed, epoch, row) chooses one of the two orders of each pair.

    Args:
        orders: the split encoded once, or in both orders of its pairs. A pair has the same length in both, truncated or
            not, so the rows begin at the same indices.
    """
    if len(orders) == 1:
        return orders[0]
    first, second = orders
    swapped = (row_keys(seed, "pair", epoch, torch.arange(len(first))) & 1).bool().numpy()
    return replace(
        first,
        tokens=np.where(np.repeat(swapped, first.lengths), second.tokens, first.tokens),
        firsts=np.where(swapped, second.firsts, first.firsts),
    )


def reading_order(lengths: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Batches for prediction, the longest rows first, so that a lack of memory is noticed at once."""
    order = np.argsort(-lengths, kind="stable")
    for at in range(0, len(order), batch_size):
        yield order[at : at + batch_size]


def subset(count: int, fraction: float) -> np.ndarray:
    """Sorted row indices of a fraction of a training split: the first ones of a permutation that does not depend on the
    seed, so a smaller fraction is part of every larger one."""
    size = max(1, round(fraction * count))
    return np.sort(permute(np.arange(count), count, 0, _SUBSETS)[:size])
