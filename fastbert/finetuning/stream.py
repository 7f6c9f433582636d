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
    row_weights: np.ndarray | None = None
    """float32 [B], weights of the rows in the mean, 0 for a row without a label; None for 1."""

    @property
    def units(self) -> int:
        """Number of units that the loss is averaged over: examples, or words, of the rows with a label. Without any,
        and with weight 0, the batch makes no step."""
        rows = self.rows if self.row_weights is None else self.rows[self.row_weights > 0]
        return len(self.data.units_in(rows)) if self.weight else 0


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
        return batch_of(self._data, self._order[index], self.head)


def batch_of(data: EncodedSplit, rows: np.ndarray, head: str, weight: float = 1.0) -> StreamBatch:
    """The batch of `rows`, int64 [B], with their soft labels and weights."""
    soft_labels, weights = (None if values is None else values[rows] for values in (data.soft_labels, data.weights))
    return StreamBatch(data, rows, head, weight, soft_labels, weights)
