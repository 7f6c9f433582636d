"""The batches of several tasks that train together: each from one task."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from fastbert.finetuning.stream import SingleTaskStream, StreamBatch
from fastbert.randomness import permute, row_keys

_TASKS = 1 << 42  # "epochs" of the keyed permutation of the tasks, which the order within a task never reaches


class MixedStream:
    """A mixture of the streams of several tasks. An epoch has the number of batches of all tasks.

    With temperature 1 it has every batch of every task once, in an order that is permuted anew in each epoch. With a
    higher temperature T, a hash of (seed, epoch, index) samples the task of each batch, task i of n_i batches with
    probability n_i^(1/T) / sum_j n_j^(1/T), so small tasks are seen more often and large ones less. Either way this
    decides only which task comes: its batches come in the order of its own `SingleTaskStream`, whose epochs are
    counted over the epochs of the mixture.

    Args:
        streams: the stream of each task, by its name. Their order has no effect.
        weights: weight of the mean loss of each task, above 0.
    """

    def __init__(
        self, streams: Mapping[str, SingleTaskStream], weights: Mapping[str, float], temperature: float, seed: int
    ) -> None:
        self.names = sorted(streams)
        self.streams = [streams[name] for name in self.names]
        self.weights = [weights[name] for name in self.names]
        self.temperature, self.seed = temperature, seed
        self._sizes = np.array([stream.batches for stream in self.streams])
        self.batches = int(self._sizes.sum())
        self._epoch = -1  # the epoch of _tasks and _numbers

    def at(self, epoch: int, index: int) -> StreamBatch:
        if epoch != self._epoch:
            self._tasks = self.tasks(epoch)
            self._numbers, self._epoch = self._counted(epoch), epoch
        task = int(self._tasks[index])
        stream = self.streams[task]
        batch = stream.at(*divmod(int(self._numbers[index]), stream.batches))
        return replace(batch, weight=self.weights[task])

    def tasks(self, epoch: int) -> np.ndarray:
        """The task of each batch of an epoch, an index in `names`, int64 [batches]."""
        if self.temperature == 1.0:
            every = np.repeat(np.arange(len(self._sizes)), self._sizes)
            if len(self._sizes) == 1:
                return every
            return every[permute(np.arange(self.batches), self.batches, self.seed, epoch + _TASKS)]
        powers = self._sizes ** (1.0 / self.temperature)
        keys = row_keys(self.seed, "task", epoch, torch.arange(self.batches)).numpy()
        uniform = (keys.astype(np.int64) + 2**31 + 0.5) / 2**32  # in (0, 1)
        return np.searchsorted(np.cumsum(powers / powers.sum())[:-1], uniform)

    def _counted(self, epoch: int) -> np.ndarray:
        """The number of each batch of an epoch among those of its task in the whole training, int64 [batches]."""
        before = np.zeros(len(self._sizes), np.int64)
        if self.temperature == 1.0:
            before += epoch * self._sizes
        else:
            for earlier in range(epoch):
                before += np.bincount(self.tasks(earlier), minlength=len(before))
        numbers = np.empty(self.batches, np.int64)
        for task, first in enumerate(before):
            indices = np.flatnonzero(self._tasks == task)
            numbers[indices] = first + np.arange(len(indices))
        return numbers
