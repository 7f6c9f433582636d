"""The fine-tuning loop: epochs over batches of like length, a rate for each layer, one update a batch.

As in pretraining the host never waits for the step it has queued, an update that is not finite is skipped on the
device, and everything random is a function of (seed, step, place): the same options give the same bits.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from fastbert.finetuning.batches import Encoded, draw_orders, training_order
from fastbert.finetuning.model import Classifier, losses
from fastbert.finetuning.options import FinetuneOptions
from fastbert.model.config import EncoderConfig
from fastbert.randomness import row_keys
from fastbert.training.divergence import guard
from fastbert.training.hardware import autocast
from fastbert.training.interrupts import Interrupts
from fastbert.training.lagged import LaggedScalars
from fastbert.training.logbook import Logbook
from fastbert.training.optimizers import clip_gradients, guarded_step, make_optimizer
from fastbert.training.options import OptimizerOptions
from fastbert.training.schedules import learning_rate_factor

ADVICE = ". Try a lower --learning-rate, a longer --schedule.warmup, or --machine.precision fp32"


def layer_scale(name: str, layers: int, decay: float) -> float:
    """The share of the learning rate for the parameter `name` of a `Classifier`.

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
class Tuner:
    """One training of one seed: the parts, and the loop over them.

    Args:
        orders: the training split encoded once, or in both orders of its pairs: each epoch then draws one for each.
        options: with rate, epochs and length resolved.
        after_epoch: is called with the epochs and the steps done.
    """

    model: Classifier
    orders: Sequence[Encoded]
    options: FinetuneOptions
    seed: int
    device: torch.device
    precision: str
    logbook: Logbook
    after_epoch: Callable[[int, int], None]
    step: int = 0
    """Updates done or skipped."""
    skipped: int = 0
    skipped_in_row: int = 0
    seconds: float = 0.0
    """In training, without what `after_epoch` took."""
    _window: list[float] = field(default_factory=list)
    _lagged: LaggedScalars = field(default_factory=LaggedScalars)

    def __post_init__(self) -> None:
        options = self.options
        self.steps = options.steps(len(self.orders[0]))
        self._constants = options.optimizer(options.learning_rate)
        self.optimizer = build_scaled_optimizer(
            self.model.named_parameters(),
            self.model.encoder.config,
            self._constants,
            options.layer_decay,
            self.device,
            options.machine.apex,
        )

    def run(self, interrupts: Interrupts) -> bool:
        """Trains all epochs; false if a signal ended it before.

        Raises:
            UserError: loss or gradient was not finite in several steps in a row.
        """
        for epoch in range(self.options.epochs):
            start = time.perf_counter()
            data = draw_orders(self.orders, self.seed, epoch)
            for rows in training_order(data.lengths, self.options.batch_size, self.seed, epoch):
                if interrupts.caught is not None:
                    return False
                self._step(data, rows)
            self._book(self._lagged.pop())
            self.seconds += time.perf_counter() - start
            self.after_epoch(epoch + 1, self.step)
        return True

    def _rate(self, step: int) -> float:
        return self._constants.learning_rate * learning_rate_factor(self.options.schedule, step, self.steps)

    def _step(self, data: Encoded, rows: np.ndarray) -> None:
        """One update: the gradient of the mean loss over the batch, whatever the micro-batches."""
        micro = self.options.machine.micro_batch_size or len(rows)
        keys = row_keys(self.seed, "dropout", self.step, torch.arange(len(rows))).to(self.device)
        total = 0.0
        for at in range(0, len(rows), micro):
            batch = data.batch(rows[at : at + micro], self.device)
            with autocast(self.device, self.precision):
                logits = self.model(batch, keys[at : at + micro])
            loss = losses(logits, batch.labels).sum() / len(rows)
            loss.backward()
            total = total + loss.detach()
        norm = clip_gradients(self.model.parameters(), self._constants.clip_norm)
        finite = total.isfinite() & norm.isfinite()
        guarded_step(self.optimizer, self._rate(self.step), finite)
        self.optimizer.zero_grad()
        before = self._lagged.push(self.step, {"loss": total, "norm": norm, "finite": finite})
        self.step += 1
        self._book(before)

    def _book(self, scalars: tuple[int, dict[str, float]] | None) -> None:
        """Takes in the scalars of a step: the logged row, and the guard against divergence."""
        if scalars is None:
            return
        step, values = scalars
        if guard(self, step, values, self.logbook.say, lambda: ADVICE):
            self._window.append(values["loss"])
        done = step + 1
        if done % self.options.log_every == 0 or done == self.steps:
            mean = sum(self._window) / len(self._window) if self._window else float("nan")
            row = {"loss": mean, "lr": self._rate(step), "grad_norm": values["norm"], "skipped": self.skipped}
            self.logbook.log(done, "train", row)
            self._window.clear()
