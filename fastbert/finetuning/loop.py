"""The fine-tuning loop: epochs over a stream of batches, one update for each batch, a learning rate for each layer.

As in pretraining, the host does not wait for the step it has queued, an update that is not finite is skipped on the
device, and randomness is a function of (seed, step, index): the same options give the same result bit for bit.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastbert.errors import UserError
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.stream import StreamBatch, TaskStream
from fastbert.model.config import EncoderConfig
from fastbert.model.foreign import ForeignConfig, block_number
from fastbert.randomness import row_keys
from fastbert.records import COUNT
from fastbert.streams import echo
from fastbert.training.checkpoints import Checkpoint
from fastbert.training.divergence import guard
from fastbert.training.interrupts import Interrupts
from fastbert.training.lagged import LaggedScalars
from fastbert.training.logbook import Logbook, NoLogbook
from fastbert.training.optimizer_state import flatten_optimizer, restore_optimizer
from fastbert.training.optimizers import make_optimizer
from fastbert.training.options import OptimizerOptions
from fastbert.training.schedules import learning_rate_factor
from fastbert.training.step import Updater

ADVICE = ". Try a lower --learning-rate, a longer --schedule.warmup, or --machine.precision fp32"


def block_of(name: str) -> int | None:
    """The number of the block that the parameter `name` of a `TaskModel` belongs to, from 0; None for others."""
    return int(name.split(".")[2]) if name.startswith("encoder.blocks.") else block_number(name)


def layer_scale(name: str, layers: int, decay: float) -> float:
    """Factor on the learning rate of the parameter `name` of a `TaskModel`.

    decay^(layers + 1 - depth), with depth 0 for embeddings and positions, i + 1 for block i (and `layers` for a last
    norm), layers + 1 for the head, which has the full rate (https://arxiv.org/abs/2003.10555, whose published code
    has one more factor below the head).
    """
    if not name.startswith("encoder."):
        depth = layers + 1
    elif (block := block_of(name)) is not None:
        depth = block + 1
    elif name.startswith(("encoder.final_norm.", "encoder.model.final_norm.")):
        depth = layers
    else:
        depth = 0
    return decay ** (layers + 1 - depth)


def build_scaled_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: EncoderConfig | ForeignConfig,
    options: OptimizerOptions,
    layer_decay: float,
    device: torch.device,
    apex: bool = False,
) -> torch.optim.Optimizer:
    """Builds an optimizer for `guarded_step` in which each group has a factor on the learning rate, "lr_scale".

    `guarded_step` sets the same rate for all groups, and a hook of the optimizer multiplies it before the update.
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
    """The hook: multiplies the rate of each group, which `guarded_step` has set, by its factor."""
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_scale"]


@dataclass
class TuningProgress:
    """Progress of a training run, as saved in a checkpoint."""

    epoch: int = 0
    """Completed epochs."""
    step: int = 0
    """Completed updates."""
    seconds: float = 0.0
    """Seconds in the training steps of the completed epochs, over all sessions."""
    skipped: int = 0
    """Updates skipped so far."""
    skipped_in_row: int = 0
    window: list[float] = field(default_factory=list)
    """The losses since the last logged row."""


_PROGRESS = {f.name: COUNT for f in fields(TuningProgress)} | {"seconds": float, "window": [float]}
STATE = {"progress": _PROGRESS, "optimizer": dict, "metrics": {"records": COUNT, "sha256": str}}
"""Schema of a checkpoint's state, for `check`."""


@dataclass
class Tuner:
    """A training run: its components and the loop.

    Args:
        updater: with a `TaskModel` and its optimizer.
        stream: the batch of each step.
        options: with learning rate, epochs and length resolved.
        logbook: the first rank's; the others have none.
    """

    advice: ClassVar[str] = ADVICE
    """End of the error if training diverges."""

    updater: Updater
    stream: TaskStream
    options: FinetuneOptions
    seed: int
    logbook: Logbook | NoLogbook
    progress: TuningProgress = field(default_factory=TuningProgress)
    interrupts: Interrupts = field(default_factory=Interrupts)
    _lagged: LaggedScalars = field(default_factory=LaggedScalars)

    @property
    def steps(self) -> int:
        """Number of steps of the whole run."""
        return self.options.epochs * self.stream.batches

    def run(self, interrupts: Interrupts, after_epoch: Callable[[], object]) -> bool:
        """Trains the remaining epochs; returns false if a signal stopped it early.

        Args:
            after_epoch: called after each epoch.

        Raises:
            UserError: loss or gradient was not finite in several steps in a row.
        """
        progress, self.interrupts = self.progress, interrupts
        if progress.epoch < self.options.epochs:
            self._settle()
        for epoch in range(progress.epoch, self.options.epochs):
            start = time.perf_counter()
            for index in range(self.stream.batches):
                if interrupts.caught is not None:
                    return False
                self.train_step(self.stream.at(epoch, index))
                epochs = f"{epoch + 1}/{self.options.epochs}"
                self.logbook.advance(progress.step, epoch=epochs, loss=self._mean_loss())
            self._log(self._lagged.pop())
            progress.seconds += time.perf_counter() - start
            progress.epoch += 1
            after_epoch()
        return True

    def _rate(self, step: int) -> float:
        return self.options.learning_rate * learning_rate_factor(self.options.schedule, step, self.steps)

    def train_step(self, batch: StreamBatch) -> None:
        """Performs one update with the gradient of the weighted mean loss over the units of the batch, for any
        micro-batch size and number of ranks.

        A batch without a label makes none: with a gradient of zero, AdamW would move the weights by its momentum and
        its weight decay. It counts as a step of the stream and of the schedule."""
        step, count = self.progress.step, len(batch.rows)
        if not batch.units:
            before = self._lagged.pop()
            self.progress.step += 1
            self._log(before)
            self._log((step, {}))
            return
        parts = list(self.updater.world.parts(count, self.options.machine.micro_batch_size or count))
        counts, signals = batch.counts, self.interrupts.flags
        weights = dict.fromkeys(counts, batch.weight)
        scalars = self.updater.update(parts, self._forward(batch), weights, counts, self._rate(step), signals)
        before = self._lagged.push(step, scalars)
        self.progress.step += 1
        self._log(before)

    def _forward(self, batch: StreamBatch) -> Callable[[nn.Module, slice], dict[str, Tensor]]:
        """The sum of the losses of each head over a part of the rows of `batch`, for `Updater.update`. Without rows it
        is zero, and so are its gradients, which all ranks must have."""
        model, heads = self.updater.module, list(batch.counts)
        device, kind = next(model.parameters()).device, model.kinds[batch.head]
        keys = row_keys(self.seed, "dropout", self.progress.step, torch.arange(len(batch.rows))).to(device)

        def forward(network: nn.Module, part: slice) -> dict[str, Tensor]:
            empty = part.start == part.stop
            part = slice(1) if empty else part
            examples = batch.data.batch(batch.rows[part], device)
            outputs = network(examples, heads, keys[part])
            targets = examples.labels
            if batch.soft_labels is not None:
                targets = torch.from_numpy(batch.soft_labels[part]).to(device, non_blocking=True)
            found = {}
            for head, logits in zip(heads, outputs, strict=True):
                losses = kind.losses(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)
                for factor in (batch.row_weights, batch.slices.get(head)):
                    if factor is not None:
                        losses = losses * torch.from_numpy(factor[part]).to(device, non_blocking=True)
                found[head] = 0.0 * losses.sum() if empty else losses.sum()
            return found

        return forward

    def _settle(self) -> None:
        """Lets the ranks arrange their messages before the first step, see `fastbert.training.step.settle`."""
        if self.updater.world.size > 1:
            batch = self.stream.at(self.progress.epoch, 0)
            ones = dict.fromkeys(batch.counts, 1)
            self.updater.add_gradient(slice(0, 0), self._forward(batch), ones, ones, last=True)
            self.updater.optimizer.zero_grad()

    def _log(self, scalars: tuple[int, dict[str, float]] | None) -> None:
        """Checks the scalars of a step, empty for one without an update, for divergence, and logs a row if one is
        due."""
        if scalars is None:
            return
        step, values = scalars
        progress = self.progress
        if values:
            self.interrupts.agree(values)
            if guard(progress, step, values, echo, lambda: self.advice):
                progress.window.append(values["loss"])
        done = step + 1
        if done % self.options.log_every == 0 or done == self.steps:
            figures = {"grad_norm": values.get("norm"), "skipped": progress.skipped}
            row = {"loss": self._mean_loss(), "lr": self._rate(step), **figures}
            self.logbook.log(done, "train", row)
            progress.window.clear()

    def _mean_loss(self) -> float | None:
        """The mean over the updates since the last logged row; None if there was none."""
        window = self.progress.window
        return sum(window) / len(window) if window else None

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of a checkpoint: weights, and moments and counters of the optimizer."""
        return {"model": self.updater.module.state_dict(), "optimizer": flatten_optimizer(self.updater.optimizer)[0]}

    def state(self) -> dict[str, Any]:
        """State of a checkpoint other than tensors; flushes all logged records to disk."""
        self.logbook.sync()
        return {
            "progress": asdict(self.progress),
            "optimizer": flatten_optimizer(self.updater.optimizer)[1],
            "metrics": self.logbook.tally(),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Resumes from a checkpoint whose state matches the schema `STATE`.

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
