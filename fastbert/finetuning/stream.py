"""What each step trains on: a function of (epoch, index), so that a training resumes anywhere and repeats no state."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fastbert.finetuning.batches import EncodedSplit, draw_orders, training_order


@dataclass(frozen=True)
class StreamBatch:
    """The examples of one step, all of one task."""

    data: EncodedSplit
    rows: np.ndarray
    """int64 [B], of `data`."""
    head: str
    """Name of the task, whose kind gives the loss."""
    weight: float = 1.0
    """On the mean loss."""
    soft_labels: np.ndarray | None = None
    """float32 [B, ...] in place of the labels in `data`, as `TaskKind.losses` reads them."""

    @property
    def units(self) -> int:
        """What the loss is the mean over: examples, or words."""
        return len(self.data.units_in(self.rows))


class TaskStream(Protocol):
    """The batches of a training."""

    batches: int
    """In each epoch."""

    def at(self, epoch: int, index: int) -> StreamBatch:
        """Batch `index` of an epoch, both from 0."""
        ...


class SingleTaskStream:
    """Every example of one task once an epoch, in batches of like length.

    Args:
        orders: its training split encoded once, or in both orders of its pairs: each epoch then draws one for each.
    """

    def __init__(self, head: str, orders: Sequence[EncodedSplit], batch_size: int, seed: int) -> None:
        self.head, self.orders, self.batch_size, self.seed = head, orders, batch_size, seed
        self.batches = -(-len(orders[0]) // batch_size)
        self._epoch = -1  # whose data and order are at hand

    def at(self, epoch: int, index: int) -> StreamBatch:
        if epoch != self._epoch:
            self._data = draw_orders(self.orders, self.seed, epoch)
            self._order = training_order(self._data.lengths, self.batch_size, self.seed, epoch)
            self._epoch = epoch
        return StreamBatch(self._data, self._order[index], self.head)
