"""Batches of a training run as a function of (epoch, index), so that it can resume at any step without saved state."""

from collections.abc import Sequence
from dataclasses import dataclass
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

    @property
    def units(self) -> int:
        """Number of units that the loss is averaged over: examples, or words."""
        return len(self.data.units_in(self.rows))


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
    """

    def __init__(self, head: str, orders: Sequence[EncodedSplit], batch_size: int, seed: int) -> None:
        self.head, self.orders, self.batch_size, self.seed = head, orders, batch_size, seed
        self.batches = -(-len(orders[0]) // batch_size)
        self._epoch = -1  # the epoch of _data and _order

    def at(self, epoch: int, index: int) -> StreamBatch:
        if epoch != self._epoch:
            self._data = sample_orders(self.orders, self.seed, epoch)
            self._order = training_order(self._data.lengths, self.batch_size, self.seed, epoch)
            self._epoch = epoch
        return StreamBatch(self._data, self._order[index], self.head)
