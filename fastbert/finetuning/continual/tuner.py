"""Training of a round: steps on the new examples and a replay of the old ones.

The training data are all labelled examples in the order of the rounds: `old` rows of earlier rounds, then the new ones.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.finetuning.batches import EncodedSplit, training_order
from fastbert.finetuning.continual.losses import LOSSES, Step, Weights, step_losses
from fastbert.finetuning.continual.outputs import Outputs, outputs_of
from fastbert.finetuning.loop import Tuner
from fastbert.finetuning.scoring import BATCH
from fastbert.finetuning.stream import StreamBatch
from fastbert.randomness import row_keys

PASSES = 3
"""Cost of a gradient of an example relative to a forward pass: the backward pass is twice as expensive."""


@dataclass
class Cost:
    """Work of a round, in examples."""

    gradients: int = 0
    """Forward and backward passes in the steps, of new and replayed examples."""
    trials: int = 0
    """Forward and backward passes in MIR's trial steps."""
    forwards: int = 0
    """Further forward passes of the training: to choose replayed examples, and to store logits."""
    pool: int = 0
    """Forward passes of the query: the pool, and for k-centre the labelled examples."""

    def training(self) -> float:
        """Cost without the query, in gradients of an example."""
        return self.gradients + self.trials + self.forwards / PASSES

    def total(self) -> float:
        """Cost with the query, in gradients of an example."""
        return self.training() + self.pool / PASSES

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


class NewRows:
    """A stream with every new row once per epoch, in batches of similar length.

    Args:
        first: index of the first new row.
    """

    def __init__(self, head: str, data: EncodedSplit, first: int, batch_size: int, seed: int) -> None:
        self.head, self.data, self.first, self.batch_size, self.seed = head, data, first, batch_size, seed
        self.batches = -(-(len(data) - first) // batch_size)
        self._epoch = -1  # the epoch of _order

    def at(self, epoch: int, index: int) -> StreamBatch:
        if epoch != self._epoch:
            self._order = training_order(self.data.lengths[self.first :], self.batch_size, self.seed, epoch)
            self._epoch = epoch
        return StreamBatch(self.data, self.first + self._order[index], self.head)


@dataclass
class ContinualTuner(Tuner):
    """A training on new examples with replay.

    Args:
        loss: name in `LOSSES`.
        choose: chooses the replayed rows of a step, at most `replay` of the rows below `old`.
        stored: logits of the old rows in the memory, float32 [old, L].
        settings: values of `ReplayOptions.used`.
    """

    loss: str = "er"
    choose: Callable[["ContinualTuner", StreamBatch], np.ndarray] | None = None
    stored: np.ndarray | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)

    @property
    def old(self) -> int:
        """Number of rows of earlier rounds."""
        return len(self.stored)

    @property
    def replay(self) -> int:
        return self.settings["replay"]

    @property
    def candidates(self) -> int:
        return self.settings["candidates"]

    def train_step(self, batch: StreamBatch) -> None:
        replayed = self.choose(self, batch)
        step = Step(len(batch.rows), len(replayed), len(batch.data) - self.old, self.old)
        batch = replace(batch, rows=np.concatenate([batch.rows, replayed]))
        weights = {name: weight for name, weight in self.weights(step)._asdict().items() if weight}
        counts = {name: step.new if name == "new" else step.replayed for name in weights}
        scalars = self._update(batch, self.losses(batch, step.new), weights, counts)
        self.cost.gradients += len(batch.rows)
        before = self._lagged.push(self.progress.step, scalars)
        self.progress.step += 1
        self._log(before)

    def weights(self, step: Step) -> Weights:
        """Weights of the losses of a step."""
        return LOSSES[self.loss].weights(step, self.settings.get("alpha", 0.0), self.settings.get("beta", 0.0))

    def trial_step(self, batch: StreamBatch) -> None:
        """Performs the update on the new examples alone, which MIR undoes."""
        count = len(batch.rows)
        self._update(batch, self.losses(batch, count), {"new": 1.0}, {"new": count})
        self.cost.trials += count

    def _update(
        self, batch: StreamBatch, forward: Callable, weights: dict[str, float], counts: dict[str, int]
    ) -> dict[str, Tensor]:
        count = len(batch.rows)
        parts = list(self.updater.world.parts(count, self.options.machine.micro_batch_size or count))
        return self.updater.update(parts, forward, weights, counts, self._rate(self.progress.step))

    def losses(self, batch: StreamBatch, new: int) -> Callable[[nn.Module, slice], dict[str, Tensor]]:
        """The sums of the losses over a part of the rows of `batch`, the first `new` of which are new, for
        `Updater.update`."""
        model = self.updater.module
        device, kind = next(model.parameters()).device, model.kinds[batch.head]
        keys = row_keys(self.seed, "dropout", self.progress.step, torch.arange(len(batch.rows))).to(device)
        is_new = torch.arange(len(batch.rows)) < new
        # New rows have no stored logits; their rows here are not read.
        stored = torch.from_numpy(self.stored[np.where(is_new.numpy(), 0, batch.rows)])

        def forward(network: nn.Module, part: slice) -> dict[str, Tensor]:
            examples = batch.data.batch(batch.rows[part], device)
            (logits,) = network(examples, [batch.head], keys[part])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses = kind.losses(logits, examples.labels)
            parts = stored[part].to(device), is_new[part].to(device)
            return step_losses(LOSSES[self.loss], logits, losses, *parts)

        return forward

    def losses_of(self, rows: np.ndarray) -> np.ndarray:
        """Training loss of each row without dropout, float32 [n]."""
        logits, targets = (
            torch.from_numpy(each) for each in (self.outputs(rows).logits, self.stream.data.labels[rows])
        )
        return self.updater.module.kinds[self.stream.head].losses(logits, targets).numpy()

    def outputs(self, rows: np.ndarray) -> Outputs:
        """Outputs for the rows with the current weights."""
        self.cost.forwards += len(rows)
        what = (self.updater.module, self.stream.head, self.stream.data, rows, self.updater.precision)
        return outputs_of(*what, self.options.machine.micro_batch_size or BATCH)
