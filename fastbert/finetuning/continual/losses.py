"""Losses of a step with replay (Das, Bhatt et al. 2023, arXiv 2305.06408), as weights of three means:

    L = w_new E_new[CE(f(x), y)] + w_memory E_old[D(z', f(x'))] + w_labels E_old[CE(f(x'), y')]

f are the logits, x the m new examples of the step, x' the n replayed ones, and z' the logits of x' at the end of the
round in which x' was labelled.

    ER, MIR   the mean of CE over all m + n examples
    DER       CE_new + alpha E |f(x') - z'|^2 + beta E CE(f(x'), y'), where |.|^2 is the sum over the logits
    SD, SDS2  t CE_new + (1 - t) E[alpha KL(softmax z' || softmax f(x')) + (1 - alpha) CE(f(x'), y')],
              t = |D_t| / (|D_t| + |D_1..t-1|): 1, 1/2, 1/3 for equal rounds

t is a ratio of all labelled examples, never of a buffer: nothing that was labelled leaves the memory.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F


class Step(NamedTuple):
    """Numbers of examples on which the weights of a step depend."""

    new: int
    """New examples in the step."""
    replayed: int
    labelled: int
    """Examples that were labelled in this round."""
    before: int
    """Examples that were labelled before."""


class Weights(NamedTuple):
    """Weights of the means over the examples of a step."""

    new: float
    memory: float
    labels: float


def kl_divergence(logits: Tensor, stored: Tensor) -> Tensor:
    """KL(softmax z || softmax f) of each row, [n]: a true divergence, 0 with a gradient of 0 where both distributions
    are equal. Its gradient is softmax f - softmax z.

    Args:
        logits: f, [n, L].
        stored: z, [n, L].
    """
    target = F.log_softmax(stored, -1)
    return (target.exp() * (target - F.log_softmax(logits, -1))).sum(-1)


def squared_distance(logits: Tensor, stored: Tensor) -> Tensor:
    """|f - z|^2 of each row, the sum over the logits, [n]."""
    return (logits - stored).square().flatten(1).sum(-1)


def new_weight(labelled: int, before: int) -> float:
    """t of SD: the ratio of the examples of this round to all labelled examples."""
    return labelled / (labelled + before)


def er_weights(step: Step, alpha: float, beta: float) -> Weights:
    count = step.new + step.replayed
    return Weights(step.new / count, 0.0, step.replayed / count)


def der_weights(step: Step, alpha: float, beta: float) -> Weights:
    return Weights(1.0, alpha, beta)


def sd_weights(step: Step, alpha: float, beta: float) -> Weights:
    t = new_weight(step.labelled, step.before)
    return Weights(t, (1 - t) * alpha, (1 - t) * (1 - alpha))


class Loss(NamedTuple):
    """A loss: its weights, from the numbers of examples, alpha and beta; and its distance to the stored logits."""

    weights: Callable[[Step, float, float], Weights]
    distance: Callable[[Tensor, Tensor], Tensor]


LOSSES = {
    "er": Loss(er_weights, squared_distance),
    "der": Loss(der_weights, squared_distance),
    "sd": Loss(sd_weights, kl_divergence),
}


def step_losses(loss: Loss, logits: Tensor, losses: Tensor, stored: Tensor, is_new: Tensor) -> dict[str, Tensor]:
    """Sums over the rows of a part of a step, by the names in `Weights`.

    Args:
        logits: [B, L], of new and replayed rows.
        losses: training loss of each row, [B].
        stored: logits in the memory, [B, L]; those of new rows are not read.
        is_new: bool [B].
    """
    old = ~is_new
    return {
        "new": losses[is_new].sum(),
        "memory": loss.distance(logits[old], stored[old]).sum(),
        "labels": losses[old].sum(),
    }
