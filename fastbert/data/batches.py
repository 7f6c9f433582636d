"""Rows and batches from a stream of tokens: [CLS], then the next T - 1 tokens, documents joined by [SEP].

No token is dropped but the stream's last few. The order is a keyed permutation of the rows, new in every epoch and a
function of (seed, place in the run), so any batch can be drawn without those before it. Where a run has sequences of
two lengths, the stream is cut anew for the second, which has permutations of its own from its first epoch on.

Shapes: B rows, T tokens.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastbert.data.note_words import NoteWords, Occurrences, StepWords, to_device
from fastbert.data.stages import BatchPlan
from fastbert.errors import UserError
from fastbert.randomness import permute
from fastbert.training.world import ONE_PROCESS, World


class Stream(Protocol):
    """A split of a prepared corpus, as `fastbert.data.shards.TokenStream`."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray: ...


class InMemory:
    """A stream of tokens that lie in memory."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]


@dataclass(frozen=True)
class Batch:
    """Rows of a micro-batch."""

    input_ids: Tensor
    """int64 [B, T]."""
    places: Tensor
    """int64 [B], the rows' places in the global batch (in validation: in the split)."""
    document_ids: Tensor | None = None
    """int64 [B, T] with the document mask: which document of its row a token belongs to."""
    position_ids: Tensor | None = None
    """int64 [B, T] with the document mask: positions that start again in every document."""
    noted: Occurrences | None = None
    """Where the words that have notes stand; None without notes."""


class PackedRows:
    """A stream cut into rows of T tokens."""

    def __init__(
        self,
        stream: Stream,
        length: int,
        cls_id: int,
        sep_id: int,
        document_mask: bool = False,
        noted: NoteWords | None = None,
    ) -> None:
        """
        Args:
            noted: the words of the stream that have notes, in rows of the same length.

        Raises:
            UserError: a length under 2.
        """
        if length < 2:
            raise UserError(f"length must be at least 2, [CLS] and a word, not {length}")
        self.stream, self.length = stream, length
        self.cls_id, self.sep_id, self.document_mask, self.noted = cls_id, sep_id, document_mask, noted

    def __len__(self) -> int:
        return len(self.stream) // (self.length - 1)

    def read(
        self, indices: np.ndarray, places: np.ndarray, device: torch.device, step_words: StepWords | None = None
    ) -> Batch:
        """The rows `indices`, on `device`; `places` are their places in the global batch.

        Args:
            step_words: where words have notes, those of the global batch; if None, `indices` are all of it.
        """
        ids = np.empty((len(indices), self.length), dtype=np.int64)
        ids[:, 0] = self.cls_id
        width = self.length - 1
        for row, index in enumerate(indices):
            ids[row, 1:] = self.stream.read(int(index) * width, (int(index) + 1) * width)
        input_ids, place = (to_device(array, device) for array in (ids, places.astype(np.int64)))
        documents = documents_of(input_ids, self.sep_id) if self.document_mask else (None, None)
        noted = None
        if self.noted is not None:
            noted = self.noted.read(indices, step_words or self.noted.step_words(indices), device)
        return Batch(input_ids, place, *documents, noted)


def documents_of(input_ids: Tensor, sep_id: int) -> tuple[Tensor, Tensor]:
    """Document ids and positions of packed rows.

    A document ends with its [SEP]. Positions start again in each; position 0 is [CLS]'s, so a document that has none
    starts at 1.

    Returns:
        document_ids, position_ids: int64 [B, T].
    """
    ends = (input_ids == sep_id).long()
    document_ids = ends.cumsum(1) - ends
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    first = torch.zeros_like(input_ids)
    first[:, 1:] = torch.where(ends[:, :-1].bool(), place[1:], 0)
    start = first.cummax(1).values
    return document_ids, place - start + (document_ids > 0)


class TrainingBatches:
    """The rows of each optimizer step, in micro-batches."""

    def __init__(
        self,
        rows: Mapping[int, PackedRows],
        plan: BatchPlan,
        micro_batch_size: int,
        seed: int,
        device: torch.device,
        world: World = ONE_PROCESS,
    ) -> None:
        """
        Args:
            rows: length -> the stream cut into rows of it, for each of the plan's lengths.
            micro_batch_size: rows of the plan's last length; of shorter ones as many more as have the same tokens.

        Raises:
            UserError: the corpus has fewer rows than one batch.
        """
        for stage in plan.stages:
            if len(rows[stage.length]) < stage.batch_size:
                raise UserError(
                    f"the corpus has {len(rows[stage.length])} sequences of {stage.length} tokens, less than one batch "
                    f"of {stage.batch_size}; lower --batch-size or --length, or add text"
                )
        self.rows, self.plan, self.micro_batch_size = rows, plan, micro_batch_size
        self.seed, self.device, self.world = seed, device, world

    def at(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches of `step` (from 0)."""
        stage = self.plan.at(step)
        rows = self.rows[stage.length]
        places = np.arange(stage.batch_size)
        indices = self.order(self.plan.drawn(step) + places, stage.length)
        step_words = None if rows.noted is None else rows.noted.step_words(indices)
        micro = max(1, self.micro_batch_size * self.plan.lengths[-1] // stage.length)
        mine = self.world.rows(stage.batch_size)
        for start in range(mine.start, mine.stop, micro):
            part = slice(start, min(start + micro, mine.stop))
            yield rows.read(indices[part], places[part], self.device, step_words)

    def order(self, drawn: np.ndarray, length: int) -> np.ndarray:
        """Row indices for the run's `drawn`-th sequences of `length`, int64."""
        count, cut = len(self.rows[length]), self.plan.lengths.index(length)
        epoch, within = np.divmod(drawn, count)
        out = np.empty(len(drawn), dtype=np.int64)
        for e in np.unique(epoch):
            here = epoch == e
            out[here] = permute(torch.from_numpy(within[here]), count, self.seed, (cut << 32) + int(e)).numpy()
        return out


def validation_batches(
    rows: PackedRows, sequences: int, micro_batch_size: int, device: torch.device, world: World = ONE_PROCESS
) -> Iterator[Batch]:
    """This rank's rows of `sequences` spread evenly over the split (all if it has fewer), always the same."""
    count = min(sequences, len(rows))
    indices = (np.arange(count) * len(rows) // count)[world.rows(count)]
    for start in range(0, len(indices), micro_batch_size):
        part = indices[start : start + micro_batch_size]
        yield rows.read(part, part, device)
