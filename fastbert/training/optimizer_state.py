"""An optimizer's state as a checkpoint holds it, tensors apart from the rest, and back into an optimizer to the bit."""

from typing import Any

import torch
from torch import Tensor

from fastbert.errors import UserError
from fastbert.training.apex import translate


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    """Splits an optimizer's state into tensors, for safetensors, and the rest, for JSON."""
    tensors: dict[str, Tensor] = {}

    def split(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, dict):
            return {"dict": [[key, split(item, f"{name}.{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [split(item, f"{name}.{place}") for place, item in enumerate(value)]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"the optimizer's {name} is a {type(value).__name__}, which a checkpoint cannot hold")

    state = optimizer.state_dict()
    return tensors, {
        "kind": type(optimizer).__name__,
        "shapes": _shapes(optimizer),
        "state": split(state["state"], "state"),
        "param_groups": split(state["param_groups"], "group"),
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict) -> None:
    """Puts what `flatten_optimizer` gave into an optimizer over the same parameters, bit for bit.

    Constants (betas, weight decay) become those of the checkpoint, as with `load_state_dict`; switches of the machine
    (fused, foreach, capturable) stay as the optimizer was built. If an error is raised, the optimizer is unchanged.

    Raises:
        UserError: the parameters differ in number, name or shape, or the state is another kind of optimizer's.
    """

    def join(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content].clone()
        if kind == "dict":
            return {key: join(item) for key, item in content}
        return [join(item) for item in content] if kind == "list" else tuple(join(item) for item in content)

    state = {"state": join(rest["state"]), "param_groups": join(rest["param_groups"])}
    kind = type(optimizer).__name__
    if {rest["kind"], kind} == {"AdamW", "FusedAdam"}:  # the same with and without machine.apex
        translate(state, optimizer)
        rest = {**rest, "kind": kind}
    _check_same(optimizer, state["param_groups"], rest)
    for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for key, value in own.items():
            if key in ("fused", "foreach", "capturable", "differentiable") or key not in saved:
                saved[key] = value  # not in the checkpoint: torch has grown a setting since
            elif isinstance(value, Tensor):
                saved[key] = saved[key].to(value.device)
    exact = {index: dict(values) for index, values in state["state"].items()}
    optimizer.load_state_dict(state)
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                continue
            # load_state_dict has chosen the device, but rounds to the parameter's dtype; and fused kernels walk weights
            # and moments in memory order, so both must have the same strides.
            like = parameter if value.shape == parameter.shape else value
            kept = torch.empty_like(like, dtype=exact[index][key].dtype, device=value.device, requires_grad=False)
            optimizer.state[parameter][key] = kept.copy_(exact[index][key])


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [list(parameter.shape) for parameter in _parameters(optimizer)]


def _check_same(optimizer: torch.optim.Optimizer, saved_groups: list[dict], rest: dict) -> None:
    """Raises a UserError if the checkpoint's kind, groups, names or shapes are not the optimizer's."""

    def compare(what: str, saved: Any, own: Any) -> None:
        if saved != own:
            raise UserError(
                f"the checkpoint's optimizer has {what} {saved}, and here it is {own}; "
                "resume with the options the run was started with"
            )

    compare("the kind", rest["kind"], type(optimizer).__name__)
    groups = optimizer.state_dict()["param_groups"]
    sizes = [[len(group["params"]) for group in some] for some in (saved_groups, groups)]
    compare("groups of this many parameters:", *sizes)
    for saved, own in zip(saved_groups, groups, strict=True):
        for saved_name, own_name in zip(saved.get("param_names", ()), own.get("param_names", ()), strict=False):
            compare("the parameter", saved_name, own_name)
    names = [name for group in groups for name in group.get("param_names", group["params"])]
    for name, saved_shape, own_shape in zip(names, rest["shapes"], _shapes(optimizer), strict=True):
        compare(f"for parameter {name} the shape", saved_shape, own_shape)
