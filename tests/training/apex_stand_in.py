"""A stand-in for NVIDIA's apex on a machine without a GPU: FusedAdam with its signatures, counters and flags, and the
update of AdamW by the formula."""

import sys
import types

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """FusedAdam with capturable=True; its `zero_grad` takes no argument, and it needs a buffer on the GPU."""

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    ) -> None:
        assert adam_w_mode and capturable and bias_correction and not amsgrad and not master_weights
        constants = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {"lr": torch.tensor(lr), "bias_correction": bias_correction, **constants})
        for group in self.param_groups:
            group["lr"] = group["lr"].clone()  # as on a GPU, where each group gets a copy
        self.set_grad_none = set_grad_none
        self._step_supports_amp_scaling = True
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int)
        self.updates = []

    def zero_grad(self) -> None:
        if not self.set_grad_none:
            return super().zero_grad()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None) -> None:
        assert closure is grads is output_params is scale is grad_norms is None
        for group in self.param_groups:
            device = group["params"][0].device
            if "step" in group:
                group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            else:
                group["step"] = torch.tensor([1], dtype=torch.int, device=device)
            found = torch.zeros(1) if grad_scaler is None else grad_scaler._check_inf_per_device(self)[device]
            self._dummy_overflow_buf.copy_(found)
            if grad_scaler:
                assert grad_scaler._get_scale_async().double().reciprocal().float().item() == 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state["exp_avg"] = torch.zeros_like(parameter).float()
                        state["exp_avg_sq"] = torch.zeros_like(parameter).float()
                    if self._dummy_overflow_buf.item() != 1:
                        update(parameter, parameter.grad, **state, group=group)
            if self._dummy_overflow_buf.item() != 1:
                self.updates.append((int(group["step"]), float(group["lr"])))


def update(parameter: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, group: dict) -> None:
    """arXiv 1711.05101, algorithm 2."""
    (beta1, beta2), rate, step = group["betas"], float(group["lr"]), int(group["step"])
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).add_(grad * grad, alpha=1 - beta2)
    direction = (exp_avg / (1 - beta1**step)) / ((exp_avg_sq / (1 - beta2**step)).sqrt() + group["eps"])
    parameter.sub_(rate * (direction + group["weight_decay"] * parameter))


def install(monkeypatch, available: bool = True, fused_adam: type = FusedAdam) -> None:
    """Makes `import apex` find the stand-in.

    Args:
        available: whether it was built with its CUDA extensions.
    """
    package = types.ModuleType("apex")
    package.__path__ = []
    optimizers, apply = types.ModuleType("apex.optimizers"), types.ModuleType("apex.multi_tensor_apply")
    optimizers.FusedAdam = fused_adam
    apply.multi_tensor_applier = types.SimpleNamespace(available=available)
    for name, module in (("", package), (".optimizers", optimizers), (".multi_tensor_apply", apply)):
        monkeypatch.setitem(sys.modules, f"apex{name}", module)
