"""One optimizer step, the same for pretraining, its timing and dry run, benchmarks and fine-tuning.

    L = sum over losses l of weight_l * (sum of l over the global batch) / (count of l in the global batch)

Counts are known before the first forward pass, so the gradient is exactly that of the mean over the global batch, for
any number of micro-batches and processes. Nothing waits for the device: an update whose loss or gradient is not finite
is skipped on the device.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastbert.training.hardware import autocast
from fastbert.training.optimizers import clip_gradients, guarded_step
from fastbert.training.world import ONE_PROCESS, World

Part = TypeVar("Part")
NO_SIGNALS: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Updater:
    """Module, optimizer and settings of an update, the same for all steps of a run.

    Args:
        clip_norm: largest norm of the whole gradient; 0 disables clipping.
        precision: fp32 or bf16, for the forward passes.
        network: the module that computes `module` on all ranks, by `World.distributed`; `module` itself in one process.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    clip_norm: float
    precision: str
    world: World = ONE_PROCESS
    network: nn.Module | None = None

    def update(
        self,
        parts: Sequence[Part],
        forward: Callable[[nn.Module, Part], Mapping[str, Any]],
        weights: Mapping[str, float],
        counts: Mapping[str, Tensor | int],
        learning_rate: float,
        signals: Mapping[str, float] = NO_SIGNALS,
    ) -> dict[str, Tensor]:
        """Accumulates the gradients of all micro-batches and updates the weights.

        Args:
            parts: this rank's micro-batches, the same number on every rank.
            forward: (network, micro-batch) -> name of a loss -> its sum over the micro-batch; other names are ignored.
            weights: name of a loss -> its weight.
            counts: name of a loss -> the divisor of its sum over the global batch.
            signals: further numbers, which are summed over the ranks together with the loss.

        Returns:
            Scalars on the device: `loss`; `norm` of the gradient before clipping; `finite`, whether both are finite and
            the update was performed; the sums of `signals`.
        """
        device = next(self.module.parameters()).device
        total = torch.zeros((), device=device)
        for index, part in enumerate(parts):
            total = total + self.add_gradient(part, forward, weights, counts, index == len(parts) - 1)
        with record_function("clipping"):
            messages = {name: torch.full((), value, device=device) for name, value in signals.items()}
            sums = self.world.sums({"loss": total, **messages})
            parameters = list(self.module.parameters())  # sharded again after the backward pass
            norm = clip_gradients(parameters, self.clip_norm, self.world)
            finite = sums["loss"].isfinite() & norm.isfinite()
        with record_function("optimizer"):
            guarded_step(self.optimizer, learning_rate, finite)
            self.optimizer.zero_grad()
        return {**sums, "norm": norm, "finite": finite}

    def add_gradient(
        self,
        part: Part,
        forward: Callable[[nn.Module, Part], Mapping[str, Any]],
        weights: Mapping[str, float],
        counts: Mapping[str, Tensor | int],
        last: bool,
    ) -> Tensor:
        """Adds the gradient of a micro-batch; after the `last` one, the gradients are those of the global batch.

        Returns:
            The part of the loss that this micro-batch has.
        """
        network = self.module if self.network is None else self.network
        with self.world.accumulating(network, last):
            with record_function("forward"), autocast(next(self.module.parameters()).device, self.precision):
                sums = forward(network, part)
            loss = sum(weight * sums[name] / counts[name] for name, weight in weights.items())
            with record_function("backward"):
                # The ranks average their gradients, and each has divided by the count of the global batch.
                (loss * self.world.size if self.world.size > 1 else loss).backward()
        return loss.detach()


def objective_step(
    updater: Updater,
    batches: Iterable[Any],
    seed: int,
    step: int,
    learning_rate: float,
    signals: Mapping[str, float] = NO_SIGNALS,
) -> dict[str, Tensor]:
    """Performs one training step of the objective in `updater`.

    Args:
        batches: this rank's micro-batches of the step.
        seed: seed of the experiment.
        step: number of the step, from 0; masks, samples and dropout depend on it.
        signals: as for `Updater.update`.

    Returns:
        The scalars of `Updater.update` and those of the objective.
    """
    objective, world = updater.module, updater.world
    with record_function("data"):
        micro_batches = [objective.sample(batch, seed, step) for batch in batches]
        counts = world.sums(
            {name: sum(part.counting(part.counts[name]) for part in micro_batches) for name in objective.loss_weights}
        )
    scalars = updater.update(micro_batches, counted_losses, objective.loss_weights, counts, learning_rate, signals)
    with record_function("after the step"):
        measured = objective.after_step(micro_batches, scalars["finite"], world)
    return scalars | measured


def counted_losses(network: nn.Module, inputs: Any) -> Mapping[str, Any]:
    """Losses of a micro-batch; those of one that does not count are zero, with gradients that are zero."""
    sums = network(inputs)
    return sums if inputs.counted else {name: 0.0 * value for name, value in sums.items() if isinstance(value, Tensor)}


def settle(updater: Updater, batches: Iterable[Any], seed: int, step: int) -> None:
    """Lets the ranks arrange their messages, as they do after their first backward pass: without this, the first step
    of a resumed run would sum its gradients in another order than the same step of an uninterrupted run."""
    if updater.world.size == 1 or updater.world.sharded:
        return
    objective = updater.module
    inputs = replace(objective.sample(next(iter(batches)), seed, step), counted=False)
    counts = dict.fromkeys(objective.loss_weights, 1)
    updater.add_gradient(inputs, counted_losses, objective.loss_weights, counts, last=True)
    updater.optimizer.zero_grad()
