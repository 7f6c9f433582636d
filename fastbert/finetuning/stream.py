"""Batches of a training run as a function of (epoch, index), so that it can resume at any step without saved state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from fastbert.finetuning.batches import EncodedSplit, sample_orders, training_order


@dataclass(frozen=True)
class StreamBatch:
    """The examples of one step, all of one task."""

    data: EncodedSplit
    rows: np.ndarray
    """int64 [B], row indices in `data`."""
    head: str
    """Name of the task, whose kind gives the loss."""
    weight: float = 1.0
    """Weight of the mean loss."""
    soft_labels: np.ndarray | None = None
    """float32 [B, ...], used instead of the labels in `data`, for `TaskKind.losses`."""
    row_weights: np.ndarray | None = None
    """float32 [B], weights of the rows in the mean, 0 for a row without a label; None for 1."""
    slices: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Head of a slice -> bool [B], the rows in it, of which it learns the same labels."""

    @property
    def units(self) -> int:
        """Number of units that the loss is averaged over: examples, or words, of the rows with a label. Without any,
        and with weight 0, the batch makes no step."""
        rows = self.rows if self.row_weights is None else self.rows[self.row_weights > 0]
        return len(self.data.units_in(rows)) if self.weight else 0

    @property
    def counts(self) -> dict[str, int]:
        """Head -> number of units that its loss is averaged over: that of the task, and those of the slices with a
        labelled row."""
        labelled = np.ones(len(self.rows), bool) if self.row_weights is None else self.row_weights > 0
        slices = {head: int((mask & labelled).sum()) for head, mask in self.slices.items()}
        return {self.head: self.units, **{head: count for head, count in slices.items() if count}}


class TaskStream(Protocol):
    """The batches of a training run."""

    batches: int
    """Number of batches in an epoch."""

    def at(self, epoch: int, index: int) -> StreamBatch:
        """Batch `index` of an epoch, both from 0."""
        ...


class SingleTaskStream:
    """Every example of one task once per epoch, in batches of similar length.

    Args:
        orders: the training split encoded once, or in both orders of its pairs, of which each epoch samples one per
            pair.
        slices: head of a slice -> bool [N], the rows in it.
    """

    def __init__(
        self,
        head: str,
        orders: Sequence[EncodedSplit],
        batch_size: int,
        seed: int,
        slices: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.head, self.orders, self.batch_size, self.seed = head, orders, batch_size, seed
        self.slices = slices or {}
        self.batches = -(-len(orders[0]) // batch_size)
        self._epoch = -1  # the epoch of _data and _order

    def at(self, epoch: int, index: int) -> StreamBatch:
        if epoch != self._epoch:
            self._data = sample_orders(self.orders, self.seed, epoch)
            self._order = training_order(self._data.lengths, self.batch_size, self.seed, epoch)
            self._epoch = epoch
        batch = batch_of(self._data, self._order[index], self.head)
        return replace(batch, slices={head: mask[batch.rows] for head, mask in self.slices.items()})


def batch_of(data: EncodedSplit, rows: np.ndarray, head: str, weight: float = 1.0) -> StreamBatch:
    """The batch of `rows`, int64 [B], with their soft labels and weights."""
    soft_labels, weights = (None if values is None else values[rows] for values in (data.soft_labels, data.weights))
    return StreamBatch(data, rows, head, weight, soft_labels, weights)
