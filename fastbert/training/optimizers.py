"""Builds the optimizer, clips gradients and performs the update, without waiting for the device.

An update whose gradients are not finite is skipped on the device, so the loop does not have to read a flag.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastbert.errors import UserError
from fastbert.training.apex import apex_step, build_fused_adam
from fastbert.training.hardware import resolve_precision
from fastbert.training.lamb import LAMB
from fastbert.training.matrices import is_hidden, matrix_counts
from fastbert.training.muon import Muon, orthogonalization_flops
from fastbert.training.options import OPTIMIZERS, OptimizerOptions
from fastbert.training.world import ONE_PROCESS, World


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    options: OptimizerOptions,
    device: torch.device | str,
    apex: bool = False,
    world: World = ONE_PROCESS,
) -> torch.optim.Optimizer:
    """Builds the optimizer over all parameters that require a gradient, for `guarded_step`.

    Args:
        named_parameters: `model.named_parameters()`, or several of these chained. A tied parameter with two names is
            included once, with the first name.
        device: device of the parameters.
        apex: use NVIDIA apex's FusedAdam for adamw (`check_apex` raises an error if it cannot be used).

    Returns:
        An optimizer with one group of matrices (with weight decay) and one of vectors and scalars (without), each in
        the given order and with "param_names". For muon, its matrices are a separate group, the first.
    """
    seen: set[int] = set()
    decayed, plain = [], []
    for name, parameter in named_parameters:
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            (decayed if parameter.ndim >= 2 else plain).append((name, parameter))
    groups = [
        {"params": group, "weight_decay": weight_decay}
        for group, weight_decay in ((decayed, options.weight_decay), (plain, 0.0))
        if group
    ]
    return make_optimizer(groups, options, torch.device(device), apex, world)


def make_optimizer(
    groups: list[dict], options: OptimizerOptions, device: torch.device, apex: bool, world: World = ONE_PROCESS
) -> torch.optim.Optimizer:
    """Builds the optimizer over groups of named parameters, in the format of `build_optimizer`."""
    if apex:
        return build_fused_adam(groups, _constants(options))
    optimizer = OPTIMIZERS[options.name](groups, options, device, world)
    check_skips(optimizer)
    return optimizer


def optimizer_flops(named_parameters: Iterable[tuple[str, nn.Parameter]], options: OptimizerOptions) -> int:
    """FLOPs of the matrix products of one update in closed form: those of Muon; the others have none."""
    if options.name != "muon":
        return 0
    named = list(named_parameters)
    counts = matrix_counts(named)
    return sum(
        orthogonalization_flops(counts[name], len(parameter) // counts[name], parameter.shape[1])
        for name, parameter in named
        if is_hidden(name, parameter)
    )


def check_skips(optimizer: torch.optim.Optimizer) -> None:
    """Raises a TypeError if the optimizer cannot skip an update when `found_inf` is 1."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise TypeError(f"{type(optimizer).__name__} cannot skip an update on the device")


def implementation(optimizer: type[torch.optim.Optimizer]) -> str:
    """Full name of the class, for manifests: torch.optim.adamw.AdamW or apex.optimizers.fused_adam.FusedAdam."""
    return f"{optimizer.__module__}.{optimizer.__qualname__}"


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, world: World = ONE_PROCESS) -> Tensor:
    """Scales all gradients together so that their norm is at most `max_norm`; 0 disables clipping.

    Returns:
        The norm before clipping, a scalar on the device. Does not wait for the device.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = world.full(nn.utils.get_total_norm([parameter.grad for parameter in parameters]))
    if max_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def guarded_step(optimizer: torch.optim.Optimizer, learning_rate: float, finite: Tensor) -> None:
    """Performs one update at `learning_rate` if `finite` is true; otherwise weights, moments and counters do not
    change.

    The decision is made on the device: nothing is copied to the host.

    Args:
        optimizer: from `build_optimizer`.
        finite: a boolean scalar on the parameters' device, such as `norm.isfinite()`.
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate
    skip = finite.logical_not()
    if hasattr(optimizer, "_dummy_overflow_buf"):
        apex_step(optimizer, skip)
    else:
        check_skips(optimizer)
        # As with torch's GradScaler: the fused kernels return at once if found_inf is 1, and subtract it from the step
        # counters, which were incremented before. Muon and LAMB follow the same protocol.
        optimizer.found_inf = skip.float()
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf


def _constants(options: OptimizerOptions) -> dict:
    """Constants of AdamW by their names in torch and apex."""
    return {
        "lr": options.learning_rate,
        "betas": (options.beta1, options.beta2),
        "eps": options.eps,
        "weight_decay": options.weight_decay,
    }


def build_adamw(
    groups: list[dict], options: OptimizerOptions, device: torch.device, world: World
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True, **_constants(options))


def build_muon(
    groups: list[dict], options: OptimizerOptions, device: torch.device, world: World
) -> torch.optim.Optimizer:
    hidden, others = [], []
    for group in groups:
        counts = matrix_counts(group["params"])
        for part, for_muon in ((hidden, True), (others, False)):
            members = [(name, value) for name, value in group["params"] if is_hidden(name, value) is for_muon]
            if members:
                matrices = {"matrices": [counts[name] for name, _ in members]} if for_muon else {}
                part.append({**group, **matrices, "params": members})
    precision, _ = resolve_precision("auto", device)
    return Muon(
        [*hidden, *others],
        lr=options.learning_rate,
        momentum=options.momentum,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        world=world,
    )


def build_lamb(
    groups: list[dict], options: OptimizerOptions, device: torch.device, world: World
) -> torch.optim.Optimizer:
    if world.sharded:  # a norm of a part of a weight is not that of the weight
        raise UserError("lamb does not support sharded weights; use adamw or muon")
    for group in groups:
        if group["params"][0][1].ndim >= 2:
            counts = matrix_counts(group["params"])
            group["matrices"] = [counts[name] for name, _ in group["params"]]
    return LAMB(groups, lr=options.learning_rate, betas=(options.beta1, options.beta2), eps=options.eps)
