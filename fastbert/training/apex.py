"""NVIDIA apex's FusedAdam as a run's AdamW: checks, an update that a flag on the device can skip, and the conversion of
its state to that of torch's AdamW and back.

It is used only if `machine.apex` is set. The package `apex` on PyPI is an unrelated project.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from fastbert.errors import UserError

HOW = (
    "build it from https://github.com/NVIDIA/apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1 (the package `apex` on PyPI is "
    "unrelated), or leave --machine.apex out"
)


def check_apex(optimizer: str, device: torch.device) -> None:
    """Checks that a run with `machine.apex` can use it.

    Args:
        optimizer: name of the optimizer in the options.

    Raises:
        UserError: apex or its CUDA extensions are missing, the device is not a GPU, or the optimizer is not adamw.
    """
    if optimizer != "adamw":
        raise UserError(f"--machine.apex replaces AdamW: it needs --optimizer.name adamw, not {optimizer}")
    if device.type != "cuda":
        raise UserError(f"--machine.apex needs a CUDA GPU, and the device is {device}; leave --machine.apex out")
    fused_adam()


def fused_adam() -> type[torch.optim.Optimizer]:
    """Apex's FusedAdam.

    Raises:
        UserError: it is missing or cannot skip an update on the device. The message explains how to install it.
    """
    try:
        from apex.multi_tensor_apply import multi_tensor_applier
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise UserError(f"--machine.apex needs NVIDIA's apex, which cannot be imported ({error}): {HOW}") from None
    if not multi_tensor_applier.available:
        raise UserError(f"--machine.apex needs apex's CUDA extensions, and the installed apex lacks them: {HOW}")
    if "capturable" not in inspect.signature(FusedAdam).parameters:
        raise UserError(f"--machine.apex needs apex's capturable FusedAdam; the installed one is older: {HOW}")
    return FusedAdam


def build_fused_adam(groups: list[dict], constants: dict[str, Any]) -> torch.optim.Optimizer:
    """FusedAdam over parameter groups in the format of torch's AdamW, with AdamW's constants."""
    optimizer = fused_adam()(groups, adam_w_mode=True, capturable=True, **constants)
    for group in optimizer.param_groups:
        # Without this, apex starts its counter at 1 in the first step even if that step is skipped.
        group["step"] = torch.zeros(1, dtype=torch.int, device=group["params"][0].device)
    return optimizer


class _Flag:
    """Substitute for a GradScaler, which is the only way to pass a skip flag to FusedAdam."""

    def __init__(self, skip: Tensor):
        self.skip = skip.float().reshape(1)

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        return {self.skip.device: self.skip}

    def _get_scale_async(self) -> Tensor:
        return torch.ones_like(self.skip)


def apex_step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Performs one update of a FusedAdam unless `skip`, a boolean scalar on the device, is true.

    Apex overwrites its skip buffer with the scaler's answer, but only after the first group's counter has been advanced
    by the buffer's old content; so the buffer is set first and the scaler repeats it.
    """
    flag = _Flag(skip)
    optimizer._dummy_overflow_buf.copy_(flag.skip)
    optimizer.step(grad_scaler=flag)


def translate(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Converts the `state_dict` of torch's AdamW into one for the FusedAdam `optimizer`, or the reverse, in place.

    Both store the same moments. FusedAdam has one update counter per group, AdamW one per parameter; FusedAdam's
    learning rate is a tensor.

    Raises:
        UserError: the parameters of a group have received different numbers of updates.
    """
    to_apex = type(optimizer).__name__ == "FusedAdam"
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=False):  # the caller compares lengths
        members = [state["state"][index] for index in group["params"] if index in state["state"]]
        if to_apex:
            steps = {int(member.pop("step")) for member in members}
            if len(steps) > 1:
                raise UserError(
                    "the checkpoint's parameters have received different numbers of updates, which apex cannot use;"
                    " resume without --machine.apex"
                )
            group["step"] = torch.tensor([max(steps, default=0)], dtype=torch.int)
            group["lr"] = torch.tensor(float(group["lr"]))
        else:
            for member in members:
                member["step"] = group["step"].reshape(()).float()
            group["lr"] = float(group["lr"])
        for name in group.keys() - own.keys():  # settings that the other optimizer does not have
            del group[name]
