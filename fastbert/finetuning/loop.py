"""The fine-tuning loop: epochs over a stream of batches, a rate for each layer, one update a batch.

As in pretraining the host never waits for the step it has queued, an update that is not finite is skipped on the
device, and everything random is a function of (seed, step, place): the same options give the same bits.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.errors import UserError
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.stream import StreamBatch, TaskStream
from fastbert.model.config import EncoderConfig
from fastbert.randomness import row_keys
from fastbert.records import COUNT
from fastbert.streams import echo
from fastbert.training.checkpoints import Checkpoint
from fastbert.training.divergence import guard
from fastbert.training.interrupts import Interrupts
from fastbert.training.lagged import LaggedScalars
from fastbert.training.logbook import Logbook
from fastbert.training.optimizer_state import flatten_optimizer, restore_optimizer
from fastbert.training.optimizers import make_optimizer
from fastbert.training.options import OptimizerOptions
from fastbert.training.schedules import learning_rate_factor
from fastbert.training.step import Updater

ADVICE = ". Try a lower --learning-rate, a longer --schedule.warmup, or --machine.precision fp32"


def layer_scale(name: str, layers: int, decay: float) -> float:
    """The share of the learning rate for the parameter `name` of a `TaskModel`.

    decay^(layers + 1 - depth), with depth 0 for embeddings and positions, i + 1 for block i (and `layers` for a last
    norm), layers + 1 for the head, which has the full rate (https://arxiv.org/abs/2003.10555; its published code has
    one more factor below the head).
    """
    if not name.startswith("encoder."):
        depth = layers + 1
    elif name.startswith("encoder.blocks."):
        depth = int(name.split(".")[2]) + 1
    elif name.startswith("encoder.final_norm."):
        depth = layers
    else:
        depth = 0
    return decay ** (layers + 1 - depth)


def build_scaled_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: EncoderConfig,
    options: OptimizerOptions,
    layer_decay: float,
    device: torch.device,
    apex: bool = False,
) -> torch.optim.Optimizer:
    """An optimizer for `guarded_step` whose groups each keep the share of the rate they take, under "lr_scale".

    `guarded_step` gives all groups the same rate, and a hook of the optimizer's own multiplies it right before the
    update.
    """
    members: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named_parameters:
        weight_decay = options.weight_decay if parameter.ndim >= 2 else 0.0
        key = (layer_scale(name, config.layers, layer_decay), weight_decay)
        members.setdefault(key, []).append((name, parameter))
    groups = [
        {"params": group, "lr_scale": scale, "weight_decay": weight_decay}
        for (scale, weight_decay), group in members.items()
    ]
    optimizer = make_optimizer(groups, options, device, apex)
    optimizer.register_step_pre_hook(scale_rates)
    return optimizer


def scale_rates(optimizer: torch.optim.Optimizer, arguments: tuple, keywords: dict) -> None:
    """The hook: each group's rate, set afresh by `guarded_step`, times its share."""
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_scale"]


@dataclass
class TuningProgress:
    """What a checkpoint holds besides tensors."""

    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Updates done."""
    seconds: float = 0.0
    """In the training steps of the epochs done, over all sessions."""
    skipped: int = 0
    """Updates skipped so far."""
    skipped_in_row: int = 0
    window: list[float] = field(default_factory=list)
    """The losses since the last logged row."""


_PROGRESS = {f.name: COUNT for f in fields(TuningProgress)} | {"seconds": float, "window": [float]}
STATE = {"progress": _PROGRESS, "optimizer": dict, "metrics": {"records": COUNT, "sha256": str}}
"""The shape of a checkpoint's state, for `check`."""


@dataclass
class Tuner:
    """One training: the parts, and the loop over them.

    Args:
        updater: of a `TaskModel` and its optimizer.
        stream: what each step trains on.
        options: with rate, epochs and length resolved.
    """

    updater: Updater
    stream: TaskStream
    options: FinetuneOptions
    seed: int
    logbook: Logbook
    progress: TuningProgress = field(default_factory=TuningProgress)
    _lagged: LaggedScalars = field(default_factory=LaggedScalars)

    @property
    def steps(self) -> int:
        """Of the whole training."""
        return self.options.epochs * self.stream.batches

    def run(self, interrupts: Interrupts, after_epoch: Callable[[], object]) -> bool:
        """Trains the epochs that are not done; false if a signal ended it before.

        Args:
            after_epoch: is called when `progress` has counted an epoch.

        Raises:
            UserError: loss or gradient was not finite in several steps in a row.
        """
        progress = self.progress
        for epoch in range(progress.epoch, self.options.epochs):
            start = time.perf_counter()
            for index in range(self.stream.batches):
                if interrupts.caught is not None:
                    return False
                self.train_step(self.stream.at(epoch, index))
                epochs = f"{epoch + 1}/{self.options.epochs}"
                self.logbook.advance(progress.step, epoch=epochs, loss=self._mean_loss())
            self._book(self._lagged.pop())
            progress.seconds += time.perf_counter() - start
            progress.epoch += 1
            after_epoch()
        return True

    def _rate(self, step: int) -> float:
        return self.options.learning_rate * learning_rate_factor(self.options.schedule, step, self.steps)

    def train_step(self, batch: StreamBatch) -> None:
        """One update: the gradient of the weighted mean loss over the batch's units, whatever the micro-batches."""
        model, step, count = self.updater.module, self.progress.step, len(batch.rows)
        device, kind = next(model.parameters()).device, model.kinds[batch.head]
        keys = row_keys(self.seed, "dropout", step, torch.arange(count)).to(device)
        mine = self.updater.world.rows(count)
        micro = self.options.machine.micro_batch_size or count

        def forward(part: slice) -> dict[str, Tensor]:
            examples = batch.data.batch(batch.rows[part], device)
            logits = model(examples, batch.head, keys[part])
            targets = examples.labels
            if batch.soft_labels is not None:
                targets = torch.from_numpy(batch.soft_labels[part]).to(device, non_blocking=True)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return {"task": kind.losses(logits, targets).sum()}

        parts = [slice(at, min(at + micro, mine.stop)) for at in range(mine.start, mine.stop, micro)]
        scalars = self.updater.update(parts, forward, {"task": batch.weight}, {"task": batch.units}, self._rate(step))
        before = self._lagged.push(step, scalars)
        self.progress.step += 1
        self._book(before)

    def _book(self, scalars: tuple[int, dict[str, float]] | None) -> None:
        """Takes in the scalars of a step: the logged row, and the guard against divergence."""
        if scalars is None:
            return
        step, values = scalars
        progress = self.progress
        if guard(progress, step, values, echo, lambda: ADVICE):
            progress.window.append(values["loss"])
        done = step + 1
        if done % self.options.log_every == 0 or done == self.steps:
            figures = {"grad_norm": values["norm"], "skipped": progress.skipped}
            row = {"loss": self._mean_loss(), "lr": self._rate(step), **figures}
            self.logbook.log(done, "train", row)
            progress.window.clear()

    def _mean_loss(self) -> float | None:
        """The mean over the updates since the last logged row; None if there was none."""
        window = self.progress.window
        return sum(window) / len(window) if window else None

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds: weights, and moments and counters of the optimizer."""
        return {"model": self.updater.module.state_dict(), "optimizer": flatten_optimizer(self.updater.optimizer)[0]}

    def state(self) -> dict[str, Any]:
        """The rest of it; all records are on the disk then."""
        self.logbook.sync()
        return {
            "progress": asdict(self.progress),
            "optimizer": flatten_optimizer(self.updater.optimizer)[1],
            "metrics": self.logbook.tally(),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint, whose state has the shape `STATE`.

        Raises:
            UserError: its tensors do not fit the model or the optimizer.
        """
        try:
            self.updater.module.load_state_dict(checkpoint.tensors["model"])
        except RuntimeError as error:
            raise UserError(f"checkpoint {checkpoint.path} does not fit this training: {error}") from None
        restore_optimizer(self.updater.optimizer, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"])
        progress = checkpoint.state["progress"]
        self.progress = TuningProgress(**{f.name: progress[f.name] for f in fields(TuningProgress)})
