"""A probe of the affinities: how a step on one task alone changes the losses of all tasks (TAG: Fifty et al. 2021,
https://arxiv.org/abs/2109.04617).

    Z(i -> j) = 1 - L_j(s - lr grad_s L_i, head_j) / L_j(s, head_j)

s are the shared weights, those of the encoder; heads do not move. Positive: the step on i has lowered the loss of j. To
first order Z(i -> j) = lr <grad_s L_i, grad_s L_j> / L_j.

All losses of a probe have the dropout masks of the run's step: a loss with another mask differs by 3 to 5 % (BERT with
4 layers, MRPC, RTE, STS-B, 16 rows), where Z is about 1e-5. Over 30 probes of that run the standard error of Z was a
third smaller with these masks than without dropout.

A probe computes in float64, from copies of the weights to the losses, whatever the precision of the run: in float32 the
error of Z was 1e-7 there. The model, its gradients and its optimizer are not touched.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from fastbert.finetuning.model import TaskModel
from fastbert.finetuning.stream import StreamBatch

SHARED = "encoder."  # the weights that all tasks have in common


@dataclass(frozen=True)
class Probe:
    """Results for n tasks, in the order of their batches."""

    losses: np.ndarray
    """float64 [n], the loss of each task."""
    affinity: np.ndarray
    """float64 [n, n], Z(i -> j) in row i and column j."""
    first_order: np.ndarray
    """float64 [n, n], the same to first order in the learning rate."""


def probe(
    model: TaskModel,
    batches: Sequence[StreamBatch],
    learning_rate: float,
    keys: Sequence[Tensor],
    micro_batch_size: int | None = None,
) -> Probe:
    """Measures the affinities of the tasks of `batches`, one batch of each.

    The step is plain gradient descent, as in the paper, whatever the optimizer of the run. The gradients of all tasks
    are in memory at the same time. n (n + 1) losses are computed.

    Args:
        batches: each with a labelled row. Their weights are not used: only the ratio of losses counts.
        learning_rate: of the step.
        keys: int32 [B] for each batch, keys of its dropout masks.
        micro_batch_size: number of rows in one forward pass; None for the whole batch.
    """
    device = next(model.parameters()).device
    weights = {
        name: value.detach().double() if value.is_floating_point() else value
        for name, value in (*model.named_parameters(), *model.named_buffers())
    }
    shared = {name: weights[name].requires_grad_() for name, _ in model.named_parameters() if name.startswith(SHARED)}

    def parts(changed: Mapping[str, Tensor], index: int) -> Iterator[Tensor]:
        """The loss of a batch, as one summand for each micro-batch."""
        batch, rows = batches[index], len(batches[index].rows)
        size = micro_batch_size or rows
        for at in range(0, rows, size):
            yield loss_part(model, {**weights, **changed}, batch, slice(at, at + size), keys[index], device)

    losses, gradients = np.zeros(len(batches)), []
    for index in range(len(batches)):
        total = [torch.zeros_like(value) for value in shared.values()]
        for part in parts({}, index):
            found = torch.autograd.grad(part, list(shared.values()), allow_unused=True)
            total = [value if more is None else value + more for value, more in zip(total, found, strict=True)]
            losses[index] += part.item()
        gradients.append(total)
    after, products = np.zeros((len(batches),) * 2), np.zeros((len(batches),) * 2)
    with torch.no_grad():
        for i, gradient in enumerate(gradients):
            moved = {
                name: value - learning_rate * change
                for (name, value), change in zip(shared.items(), gradient, strict=True)
            }
            for j, other in enumerate(gradients):
                after[i, j] = sum(part.item() for part in parts(moved, j))
                products[i, j] = sum((a * b).sum().item() for a, b in zip(gradient, other, strict=True))
    return Probe(losses, 1.0 - after / losses, learning_rate * products / losses)


def loss_part(
    model: TaskModel,
    weights: Mapping[str, Tensor],
    batch: StreamBatch,
    part: slice,
    keys: Tensor,
    device: torch.device,
) -> Tensor:
    """The part of the mean loss of `batch` that its rows `part` have, as `Tuner.train_step` defines it, with other
    `weights` in the model."""
    examples = batch.data.batch(batch.rows[part], device)
    (logits,) = functional_call(model, weights, (examples, [batch.head], keys[part]))
    targets = examples.labels
    if batch.soft_labels is not None:
        targets = torch.from_numpy(batch.soft_labels[part]).to(logits)
    losses = model.kinds[batch.head].losses(logits, targets)
    if batch.row_weights is not None:
        losses = losses * torch.from_numpy(batch.row_weights[part]).to(losses)
    return losses.sum() / batch.units
