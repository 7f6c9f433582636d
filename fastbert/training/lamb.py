"""LAMB (You et al., ICLR 2020, arXiv 1904.00962): Adam's update, scaled for each weight by the norm of the weight.

NVIDIA apex has a fused version, but FusedLAMB counts its steps on the host, has no flag to skip an update, and computes
one norm for a fused weight. So LAMB is implemented here with torch's foreach operations.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class LAMB(torch.optim.Optimizer):
    """The LAMB optimizer. For a weight w, its gradient g, rate eta and weight decay lambda, at update t:

        m  <-  beta1 m + (1 - beta1) g                  v  <-  beta2 v + (1 - beta2) g^2
        u   =  m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)  +  lambda w
        w  <-  w - eta |w| / |u| u

    |w| / |u|, the trust ratio, is 1 if either norm is 0, and in groups without "matrices", which contain the vectors,
    as in the authors' code. Each matrix of a fused weight has a separate ratio.

    `guarded_step` steps it like torch's fused optimizers: if `found_inf` is 1, nothing changes.
    """

    _step_supports_amp_scaling = True  # reads `found_inf`

    def __init__(self, groups: list[dict], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        """
        Args:
            groups: parameter groups. A group with "matrices" has trust ratios; "matrices" lists the number of matrices
                stacked in each of its parameters.
        """
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        for group in self.param_groups:
            group["step"] = torch.zeros((), device=group["params"][0].device)  # number of updates

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            skip = torch.zeros_like(group["step"], dtype=torch.bool) if found_inf is None else found_inf != 0
            self._step_group(group, skip)
        return loss

    def _step_group(self, group: dict, skip: Tensor) -> None:
        """Updates a group unless `skip`, a boolean scalar on the device, is true."""
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        first, second = (
            [self.state[parameter][name] for parameter in parameters] for name in ("exp_avg", "exp_avg_sq")
        )
        for gradient in gradients:  # they may contain NaN, and 0 * NaN is NaN
            gradient.masked_fill_(skip, 0.0)
        beta1, beta2 = group["betas"]
        group["step"] += skip.logical_not()
        torch._foreach_mul_(first, torch.where(skip, 1.0, beta1))
        torch._foreach_add_(first, gradients, alpha=1 - beta1)
        torch._foreach_mul_(second, torch.where(skip, 1.0, beta2))
        torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)

        step = group["step"].double().clamp(min=1)  # 0 if every update was skipped
        updates = torch._foreach_mul(second, (1 / (1 - beta2**step)).float())
        torch._foreach_sqrt_(updates)
        torch._foreach_add_(updates, group["eps"])
        torch._foreach_reciprocal_(updates)
        torch._foreach_mul_(updates, first)
        torch._foreach_mul_(updates, (1 / (1 - beta1**step)).float())
        torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        if "matrices" in group:
            counts = [n for p, n in zip(group["params"], group["matrices"], strict=True) if p.grad is not None]
            apply_trust_ratios(updates, parameters, counts)
        torch._foreach_mul_(updates, torch.where(skip, 0.0, -group["lr"]))
        torch._foreach_add_(parameters, updates)


def apply_trust_ratios(updates: list[Tensor], weights: list[Tensor], counts: list[int]) -> None:
    """Scales each matrix of `updates` to the norm of the corresponding matrix of `weights`, unless either norm is 0.

    Args:
        counts: number of matrices stacked in each weight.
    """
    parts = [
        [part for tensor, count in zip(tensors, counts, strict=True) for part in tensor.chunk(count)]
        for tensors in (updates, weights)
    ]
    of_updates, of_weights = (torch.stack(torch._foreach_norm(tensors)) for tensors in parts)
    ratios = torch.where((of_updates > 0) & (of_weights > 0), of_weights / of_updates, 1.0)
    torch._foreach_mul_(parts[0], list(ratios.unbind()))
