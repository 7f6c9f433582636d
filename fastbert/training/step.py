"""One optimizer step, the same for pretraining, its timing and dry run, benchmarks and fine-tuning.

    L = sum over losses l of weight_l * (sum of l over the global batch) / (count of l in the global batch)

Counts are known before the first forward pass, so the gradient is exactly that of the mean over the global batch, for
any number of micro-batches and processes. Nothing waits for the device: an update whose loss or gradient is not finite
is skipped on the device.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastbert.training.hardware import autocast
from fastbert.training.optimizers import clip_gradients, guarded_step
from fastbert.training.world import ONE_PROCESS, World

Part = TypeVar("Part")


@dataclass(frozen=True)
class Updater:
    """Module, optimizer and settings of an update, the same for all steps of a run.

    Args:
        clip_norm: largest norm of the whole gradient; 0 disables clipping.
        precision: fp32 or bf16, for the forward passes.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    clip_norm: float
    precision: str
    world: World = ONE_PROCESS

    def update(
        self,
        parts: Sequence[Part],
        forward: Callable[[Part], Mapping[str, Any]],
        weights: Mapping[str, float],
        counts: Mapping[str, Tensor | int],
        learning_rate: float,
    ) -> dict[str, Tensor]:
        """Accumulates the gradients of all micro-batches and updates the weights.

        Args:
            parts: this rank's micro-batches.
            forward: micro-batch -> name of a loss -> its sum over the micro-batch; other names are ignored.
            weights: name of a loss -> its weight.
            counts: name of a loss -> the divisor of its sum over the global batch.

        Returns:
            Scalars on the device: `loss`; `norm` of the gradient before clipping; `finite`, whether both are finite and
            the update was performed.
        """
        parameters = list(self.module.parameters())
        device = parameters[0].device
        total = 0.0
        for part in parts:
            with record_function("forward"), autocast(device, self.precision):
                sums = forward(part)
            loss = sum(weight * sums[name] / counts[name] for name, weight in weights.items())
            with record_function("backward"):
                loss.backward()
            total = total + loss.detach()
        with record_function("clipping"):
            total = self.sum_over_ranks(total, parameters)
            norm = clip_gradients(parameters, self.clip_norm)
            finite = total.isfinite() & norm.isfinite()
        with record_function("optimizer"):
            guarded_step(self.optimizer, learning_rate, finite)
            self.optimizer.zero_grad()
        return {"loss": total, "norm": norm, "finite": finite}

    def sum_over_ranks(self, loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Sums loss and gradients over the processes."""
        if self.world.size > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = self.world.sum(parameter.grad)
            loss = self.world.sum(loss)
        return loss


def objective_step(
    updater: Updater, batches: Iterable[Any], seed: int, step: int, learning_rate: float
) -> dict[str, Tensor]:
    """Performs one training step of the objective in `updater`.

    Args:
        batches: this rank's micro-batches of the step.
        seed: seed of the experiment.
        step: number of the step, from 0; masks, samples and dropout depend on it.

    Returns:
        The scalars of `Updater.update` and those of the objective.
    """
    objective, world = updater.module, updater.world
    with record_function("data"):
        micro_batches = [objective.sample(batch, seed, step) for batch in batches]
        counts = {name: world.sum(sum(part.counts[name] for part in micro_batches)) for name in objective.loss_weights}
    scalars = updater.update(micro_batches, objective, objective.loss_weights, counts, learning_rate)
    with record_function("after the step"):
        measured = objective.after_step(micro_batches, scalars["finite"], world)
    return scalars | measured
