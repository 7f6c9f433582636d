"""Choice of the replayed examples of a step: uniform, or those whose loss a trial step raises most (MIR).

Old examples are the first rows of the training data. Samples are hashes of (seed, step), so nothing has to be saved.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastbert.finetuning.stream import StreamBatch
from fastbert.randomness import permute
from fastbert.training.step import Updater

if TYPE_CHECKING:
    from fastbert.finetuning.continual.tuner import ContinualTuner

_REPLAY = 1 << 42  # an "epoch" of the keyed permutation that no other permutation of rows reaches


def sample_rows(count: int, old: int, seed: int, step: int) -> np.ndarray:
    """Sample of `count` different rows of the `old` first ones, all of them if there are fewer; int64."""
    return permute(np.arange(min(count, old)), old, seed, _REPLAY + step)


def uniform(tuner: "ContinualTuner", batch: StreamBatch) -> np.ndarray:
    """Rows sampled uniformly (experience replay)."""
    return sample_rows(tuner.replay, tuner.old, tuner.seed, tuner.progress.step)


def interference(tuner: "ContinualTuner", batch: StreamBatch) -> np.ndarray:
    """Rows of the candidates whose loss a trial step on the new examples would raise most (MIR, Aljundi et al. 2019,
    arXiv 1908.04742). The trial is a step of the optimizer itself, with its moments and with the dropout of the step
    that follows; the losses that are compared have no dropout."""
    rows = candidates(tuner)
    before = tuner.losses_of(rows)
    with restored(tuner.updater):
        tuner.trial_step(batch)
        raised = tuner.losses_of(rows) - before
    return rows[np.argsort(-raised, kind="stable")[: tuner.replay]]


def candidates(tuner: "ContinualTuner") -> np.ndarray:
    """Rows from which the replayed ones are chosen, sampled uniformly."""
    return sample_rows(tuner.candidates, tuner.old, tuner.seed, tuner.progress.step)


@contextmanager
def restored(updater: Updater) -> Iterator[None]:
    """Restores weights, moments and step counters to the bit when the block ends."""
    module, optimizer = updater.module, updater.optimizer
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    moments = {
        parameter: {key: value.clone() if torch.is_tensor(value) else value for key, value in state.items()}
        for parameter, state in optimizer.state.items()
    }
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        yield
    finally:
        module.load_state_dict(weights)
        optimizer.state.clear()
        optimizer.state.update(moments)
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)
        optimizer.zero_grad()


CHOICES = {"uniform": uniform, "interference": interference}
