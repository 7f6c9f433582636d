"""Losses of an objective on held-out rows, with fixed masks."""

import math
from collections.abc import Iterable

import torch

from fastbert.data.batches import Batch
from fastbert.objectives.objective import Metric, Objective
from fastbert.progress import progress
from fastbert.training.hardware import autocast
from fastbert.training.world import ONE_PROCESS, World

NOT_FINITE = "not finite"  # shown instead of a figure
MASK_SEED = 0  # the same masks for all runs, so that seeds and variants are compared on the same predictions


@torch.no_grad()
def evaluate(
    objective: Objective, batches: Iterable[Batch], precision: str, world: World = ONE_PROCESS, sequences: int = 0
) -> dict[str, float]:
    """Mean of each loss and metric over the `batches` of all ranks, and `loss`, the weighted sum of the losses.

    The training mode of the objective is restored. `sequences` is the number of sequences in all batches, for the
    progress bar.
    """
    training = objective.training
    objective.eval()
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    with progress("validating", sequences, "sequences") as shown:
        for batch in batches:
            inputs = objective.sample(batch, MASK_SEED, 0, "validation-mask")
            with autocast(batch.input_ids.device, precision):
                parts = objective(inputs)
            for name, value in parts.items():
                value, count = value if isinstance(value, tuple) else (value, inputs.counts[name])
                sums[name] = sums.get(name, 0) + inputs.counting(value).double()
                counts[name] = counts.get(name, 0) + inputs.counting(count)
            shown.update(min(shown.done + world.size * len(batch.input_ids), sequences))
    objective.train(training)
    sums, counts = world.sums(sums), world.sums(counts)
    means = {name: (sums[name] / counts[name]).item() for name in sums}
    loss = math.fsum(weight * means[name] for name, weight in objective.loss_weights.items())
    return {"loss": loss, **{name: value for name, value in means.items() if name not in objective.loss_weights}}


def shown(figure: Metric, digits: int) -> str:
    """The value of a metric, with `digits` decimals in nats and two fewer in percent, and that of a constant guess."""
    if figure.value is None:
        return NOT_FINITE
    if figure.unit == "%":
        return f"{100 * figure.value:.{digits - 2}f} %"
    if figure.unit != "nats":
        return f"{figure.value:.{digits}f}"
    chance = "" if figure.chance is None else f"   (chance: {figure.chance:.{digits}f})"
    return f"{figure.value:.{digits}f} nats{chance}"
