"""Rows and batches from a stream of tokens. A row is [CLS] and the next T - 1 tokens; [SEP] separates documents.

Only the last tokens of the stream, which do not fill a row, are dropped. The order is a keyed permutation of the rows
for each epoch: a function of the seed and the sequence's number in the run, so any batch can be read without the
previous ones. If a run has sequences of two lengths, the stream is cut again for the second one, with different
permutations. With replay, the rows of two streams alternate: see `fastbert.data.replay`.

Shapes: B rows, T tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastbert.data.note_words import JoinedNoteWords, NoteWords, Occurrences, StepWords
from fastbert.data.replay import ReplaySchedule
from fastbert.data.stages import BatchPlan
from fastbert.errors import UserError
from fastbert.randomness import permute, random_below
from fastbert.training.world import ONE_PROCESS, World


class Stream(Protocol):
    """A split of a prepared corpus, as `fastbert.data.shards.TokenStream`."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray: ...


class InMemory:
    """A stream of tokens in memory."""

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
    row_indices: Tensor
    """int64 [B]: index of each row in the global batch (in validation: in the split)."""
    document_ids: Tensor | None = None
    """int64 [B, T] with the document mask: index of the token's document in its row."""
    position_ids: Tensor | None = None
    """Positions: int64 [B, T] with the document mask, where they restart in every document; [1, T] with an offset
    alone; otherwise None, 0 to T - 1."""
    noted: Occurrences | None = None
    """Positions of the words that have notes; None without a note dictionary."""
    counted: bool = True
    """False for a row that counts in no loss, metric or note: a rank without rows computes it, so that all ranks have
    the same number of forward and backward passes."""


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
            noted: the words of the stream that have notes, for rows of the same length.

        Raises:
            UserError: the length is below 2.
        """
        if length < 2:
            raise UserError(f"length must be at least 2, [CLS] and a word, not {length}")
        self.stream, self.length = stream, length
        self.cls_id, self.sep_id, self.document_mask, self.noted = cls_id, sep_id, document_mask, noted

    def __len__(self) -> int:
        return len(self.stream) // (self.length - 1)

    def read(
        self,
        rows: np.ndarray,
        row_indices: np.ndarray,
        device: torch.device,
        step_words: StepWords | None = None,
        counted: bool = True,
    ) -> Batch:
        """Reads `rows` of the stream onto `device`.

        Args:
            row_indices: index of each row in the global batch.
            step_words: with a note dictionary, the words of the global batch; None if `rows` are the global batch.
            counted: `Batch.counted`.
        """
        return self.moved(self.on_host(rows, row_indices, step_words, counted), device)

    def on_host(
        self, rows: np.ndarray, row_indices: np.ndarray, step_words: StepWords | None = None, counted: bool = True
    ) -> Batch:
        """Reads `rows` into memory of the host, without the documents, which the device computes."""
        ids = np.empty((len(rows), self.length), dtype=np.int64)
        ids[:, 0] = self.cls_id
        width = self.length - 1
        for i, start in enumerate((rows * width).tolist()):
            ids[i, 1:] = self.stream.read(start, start + width)
        noted = None
        if self.noted is not None:
            noted = self.noted.read(rows if counted else rows[:0], step_words or self.noted.step_words(rows))
        indices = row_indices.astype(np.int64)
        return Batch(torch.from_numpy(ids), torch.from_numpy(indices), noted=noted, counted=counted)

    def moved(self, batch: Batch, device: torch.device) -> Batch:
        """Copies a batch of `on_host` to `device` without waiting for the copy, and finds the documents."""
        batch = map_tensors(batch, lambda tensor: to_device(tensor, device))
        if self.document_mask:
            documents, positions = documents_of(batch.input_ids, self.sep_id)
            batch = replace(batch, document_ids=documents, position_ids=positions)
        return batch

    def part_on_host(
        self, part: slice, rows: np.ndarray, row_indices: np.ndarray, step_words: StepWords | None = None
    ) -> Batch:
        """Reads a `part` of `rows`; if it is empty, the first row, which does not count. Its loss is finite if that of
        all `rows` is, so that zero times its loss is zero."""
        counted = part.start < part.stop
        part = part if counted else slice(1)
        return self.on_host(rows[part], row_indices[part], step_words, counted)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A batch, or a part of one, with `function` applied to all its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if is_dataclass(value):
        return replace(value, **{f.name: map_tensors(getattr(value, f.name), function) for f in fields(value)})
    return value


def with_offset(batch: Batch, offset: int) -> Batch:
    """A batch with `offset` added to all positions except 0, which is that of [CLS]."""
    positions = batch.position_ids
    if positions is None:
        positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)[None]
    return replace(batch, position_ids=torch.where(positions > 0, positions + offset, 0))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to a device. A GPU copies it from pinned memory, which PyTorch reserves until the copy ended."""
    if device.type != "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


class JoinedStreams:
    """Two streams behind each other. The second begins at a multiple of `width` tokens, so that no row of `width`
    tokens has tokens of both."""

    def __init__(self, first: Stream, second: Stream, width: int) -> None:
        self.first, self.second = first, second
        self.border = -(-len(first) // width) * width
        """Position of the second stream's first token."""

    def __len__(self) -> int:
        return self.border + len(self.second)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start ... stop - 1, all of one stream."""
        if start >= self.border:
            return self.second.read(start - self.border, stop - self.border)
        return self.first.read(start, stop)


class ReplayedRows(PackedRows):
    """Rows of new data and, behind them, rows of old data."""

    def __init__(self, new: PackedRows, old: PackedRows, fraction: float) -> None:
        """
        Args:
            new, old: rows of the same length.
            fraction: fraction of the old rows in a run.
        """
        width = new.length - 1
        joined = JoinedStreams(new.stream, old.stream, width)
        self.new_rows, self.old_rows, self.first_old = len(new), len(old), joined.border // width
        noted = None if new.noted is None else JoinedNoteWords(new.noted, old.noted, self.first_old, fraction)
        super().__init__(joined, new.length, new.cls_id, new.sep_id, new.document_mask, noted)

    def __len__(self) -> int:
        """Number of whole rows."""
        return self.new_rows + self.old_rows


@dataclass(frozen=True)
class Replay:
    """Order of the rows of a run with replay."""

    schedule: ReplaySchedule
    seed: int
    """Seed of the order of the old rows."""


def documents_of(input_ids: Tensor, sep_id: int) -> tuple[Tensor, Tensor]:
    """Document ids and positions of packed rows.

    A document ends with its [SEP]. Positions restart in each document; position 0 is reserved for [CLS], so a document
    without [CLS] starts at 1.

    Returns:
        document_ids, position_ids: int64 [B, T].
    """
    ends = (input_ids == sep_id).long()
    document_ids = ends.cumsum(1) - ends
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    first = torch.zeros_like(input_ids)
    first[:, 1:] = torch.where(ends[:, :-1].bool(), position[1:], 0)
    start = first.cummax(1).values
    return document_ids, position - start + (document_ids > 0)


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
        replay: Replay | None = None,
    ) -> None:
        """
        Args:
            rows: length -> the stream cut into rows of this length, for each length of the plan; with `replay`
                `ReplayedRows`.
            micro_batch_size: rows of the plan's last length; the number of shorter rows is scaled to the same number of
                tokens.

        Raises:
            UserError: the corpus has fewer rows than one batch.
        """
        for stage in plan.stages:
            count = rows[stage.length].new_rows if replay else len(rows[stage.length])
            if count < stage.batch_size:
                raise UserError(
                    f"the corpus has {count} sequences of {stage.length} tokens, less than one batch of "
                    f"{stage.batch_size}; lower --batch-size or --length, or add text"
                )
            if replay and not rows[stage.length].old_rows:
                raise UserError(
                    f"the old data of --replay.data has less than one sequence of {stage.length} tokens; lower "
                    "--length, or give more text"
                )
        self.rows, self.plan, self.micro_batch_size = rows, plan, micro_batch_size
        self.seed, self.device, self.world, self.replay = seed, device, world, replay

    def at(self, step: int) -> Iterator[Batch]:
        """Micro-batches of this rank in `step` (from 0), the same number on every rank."""
        return (self.moved(batch, step) for batch in self.on_host(step))

    def on_host(self, step: int) -> Iterator[Batch]:
        """The same in memory of the host, for `moved`. A function of the step alone, so any thread may call it."""
        stage = self.plan.at(step)
        rows = self.rows[stage.length]
        row_indices = np.arange(stage.batch_size)
        selected = self.order(self.plan.sequences_before(step) + row_indices, stage.length)
        step_words = None if rows.noted is None else rows.noted.step_words(selected)
        micro = max(1, self.micro_batch_size * self.plan.lengths[-1] // stage.length)
        for part in self.world.parts(stage.batch_size, micro):
            yield rows.part_on_host(part, selected, row_indices, step_words)

    def moved(self, batch: Batch, step: int) -> Batch:
        """Copies a batch of `on_host(step)` to the device. If its stage has offsets of positions, that of the step is a
        function of the seed and the step."""
        stage = self.plan.at(step)
        batch = self.rows[stage.length].moved(batch, self.device)
        if not stage.largest_offset:
            return batch
        return with_offset(batch, random_below(self.seed, "offset", step, stage.largest_offset + 1))

    def order(self, numbers: np.ndarray, length: int) -> np.ndarray:
        """Rows of the stream, int64, for the sequences of this `length` with these numbers in the run (from 0)."""
        rows = self.rows[length]
        if self.replay is None:
            return self._permuted(numbers, length, len(rows), self.seed)
        old, within = self.replay.schedule.divide(numbers)
        out = np.empty(len(numbers), dtype=np.int64)
        out[~old] = self._permuted(within[~old], length, rows.new_rows, self.seed)
        out[old] = rows.first_old + self._permuted(within[old], length, rows.old_rows, self.replay.seed)
        return out

    def _permuted(self, numbers: np.ndarray, length: int, count: int, seed: int) -> np.ndarray:
        """Rows with these numbers in the order of `count` rows of a stream, which is another one in each epoch."""
        # From the last length, which then has the same order in runs with and without a first one.
        cut = len(self.plan.lengths) - 1 - self.plan.lengths.index(length)
        epoch, within = np.divmod(numbers, count)
        out = np.empty(len(numbers), dtype=np.int64)
        for e in np.unique(epoch):
            here = epoch == e
            out[here] = permute(within[here], count, seed, (cut << 32) + int(e))
        return out


def validation_batches(
    rows: PackedRows, sequences: int, micro_batch_size: int, device: torch.device, world: World = ONE_PROCESS
) -> Iterator[Batch]:
    """Batches of this rank: always the same `sequences` rows spread evenly over the split (all if it has fewer). All
    ranks have the same number of batches."""
    count = min(sequences, len(rows))
    indices = np.arange(count) * len(rows) // count
    for part in world.parts(count, micro_batch_size):
        yield rows.moved(rows.part_on_host(part, indices, indices), device)
