"""Conversion of an optimizer's state for a checkpoint, with tensors separate from the rest, and its exact
restoration."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from fastbert.errors import UserError, brief
from fastbert.records import check
from fastbert.training.apex import translate

_SHAPE = {"kind": str, "shapes": [[int]], "state": dict, "param_groups": dict}


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
            return {type(value).__name__: [split(item, f"{name}.{index}") for index, item in enumerate(value)]}
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


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    rest: dict,
    like: Callable[[Tensor, Tensor], Tensor] = lambda full, parameter: full,
    remedy: str = "resume with the options with which the run was started",
) -> None:
    """Restores the output of `flatten_optimizer` in an optimizer over the same parameters, bit for bit.

    Constants (betas, weight decay) become those of the checkpoint, as with `load_state_dict`; machine settings (fused,
    foreach, capturable) remain those of the optimizer. If an error is raised, the optimizer is unchanged.

    Args:
        like: (a moment, its parameter) -> the moment, sharded as the parameter is.
        remedy: advice for other parameters or another optimizer, as the end of the message.

    Raises:
        UserError: the parameters differ in number, name or shape, or the state belongs to another optimizer class.
    """

    def join(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        (kind, content), *more = value.items() or [(None, None)]
        if not more and kind == "tensor" and isinstance(content, str) and content in tensors:
            return tensors[content].clone()
        if not more and kind == "dict":
            check(content, [list], where)
            if all(len(pair) == 2 and isinstance(pair[0], str | int) for pair in content):
                return {key: join(item) for key, item in content}
        if not more and kind in ("list", "tuple"):
            items = [join(item) for item in check(content, [object], where)]
            return items if kind == "list" else tuple(items)
        raise UserError(f"{where} is damaged: {brief(value)} is not part of an optimizer's state")

    where = "the optimizer's state in the checkpoint"
    check(rest, _SHAPE, where)
    state = {"state": join(rest["state"]), "param_groups": join(rest["param_groups"])}
    check(state, {"state": {}, "param_groups": [{"params": list, "param_names?": list}]}, where)
    _check_moments(state["state"], rest["kind"], dict(enumerate(rest["shapes"])), where)
    kind = type(optimizer).__name__
    if {rest["kind"], kind} == {"AdamW", "FusedAdam"}:  # both are AdamW, without or with machine.apex
        translate(state, optimizer)
        rest = {**rest, "kind": kind}
    _check_same(optimizer, state["param_groups"], rest, remedy)
    for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for key, value in own.items():
            if key in ("fused", "foreach", "capturable", "differentiable") or key not in saved:
                saved[key] = value  # machine settings, and settings of newer versions of torch
            elif not _alike(saved[key], value):
                raise UserError(f"{where} is damaged: {key} is {brief(saved[key])}, where this optimizer has {value}")
            elif isinstance(value, Tensor):
                saved[key] = saved[key].to(value.device)
    exact = state["state"]
    # load_state_dict would copy whole moments to the device, even those of sharded weights.
    optimizer.load_state_dict({**state, "state": _without_elements(exact)})
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                continue
            # load_state_dict has chosen the device, but rounds to the parameter's dtype; and fused kernels read weights
            # and moments in memory order, so both must have the same strides.
            moment = exact[index][key]
            if moment.shape == parameter.shape:
                restored = torch.empty_like(parameter, dtype=moment.dtype, requires_grad=False)
                moment = like(moment, parameter)
            else:
                restored = torch.empty(moment.shape, dtype=moment.dtype, device=value.device)
            optimizer.state[parameter][key] = restored.copy_(moment)


def grow_moments(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict, names: Collection[str], new: slice
) -> tuple[dict[str, Tensor], dict]:
    """The output of `flatten_optimizer`, with the number of rows of `optimizer` in the moments of the parameters
    `names`.

    Args:
        names: parameters with a row for each word.
        new: rows whose moments are zero.
    """
    shapes = check(rest, _SHAPE, "the optimizer's state in the checkpoint")["shapes"]
    own = [name for group in optimizer.state_dict()["param_groups"] for name in group["param_names"]]
    grown, resized = dict(tensors), list(shapes)
    for index, (name, parameter) in enumerate(zip(own[: len(shapes)], _parameters(optimizer), strict=False)):
        if name not in names or not shapes[index] or shapes[index][0] > len(parameter):
            continue
        resized[index] = [len(parameter), *shapes[index][1:]]
        for key, tensor in tensors.items():
            if key.startswith(f"state.{index}.") and list(tensor.shape) == shapes[index]:
                grown[key] = tensor.new_zeros(resized[index])
                grown[key][: len(tensor)] = tensor
                grown[key][new] = 0
    return grown, {**rest, "shapes": resized}


def _without_elements(state: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The state of the parameters with an empty tensor for each tensor."""
    return {
        index: {key: value.new_empty(0) if isinstance(value, Tensor) else value for key, value in values.items()}
        for index, values in state.items()
    }


_MOMENTS = {name: ("exp_avg", "exp_avg_sq") for name in ("AdamW", "FusedAdam", "Lamb")}


def _check_moments(state: Any, kind: str, shapes: dict[int, list[int]], where: str) -> None:
    """Raises a UserError if a parameter, given by its index, lacks a moment or has a moment of another shape."""
    for index, values in check(state, dict, where).items():
        if not isinstance(values, dict) or index not in shapes:
            raise UserError(f"{where} is damaged: {brief(index)} is not a parameter with moments")
        for name in _MOMENTS.get(kind, ()):
            if not isinstance(values.get(name), Tensor) or list(values[name].shape) != shapes[index]:
                raise UserError(f"{where} is damaged: parameter {index} has no {name}, or it has another shape")
        if kind == "AdamW" and not (isinstance(values.get("step"), Tensor) and values["step"].numel() == 1):
            raise UserError(f"{where} is damaged: parameter {index} has no step")


def _alike(saved: Any, own: Any) -> bool:
    """True if the saved setting of a parameter group has the type and shape of the optimizer's `own`."""
    if isinstance(own, tuple):
        return isinstance(saved, tuple) and len(saved) == len(own) and all(map(_alike, saved, own))
    if isinstance(own, Tensor):
        return isinstance(saved, Tensor) and saved.shape == own.shape
    return not isinstance(own, int | float) or isinstance(saved, int | float)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [list(parameter.shape) for parameter in _parameters(optimizer)]


def _check_same(optimizer: torch.optim.Optimizer, saved_groups: list[dict], rest: dict, remedy: str) -> None:
    """Raises a UserError if class, groups, names or shapes in the checkpoint differ from the optimizer's."""

    def compare(what: str, saved: Any, own: Any) -> None:
        if saved != own:
            raise UserError(
                f"the checkpoint's optimizer has {what} {brief(saved, str)}, and here it is {brief(own, str)}; {remedy}"
            )

    compare("the class", rest["kind"], type(optimizer).__name__)
    groups = optimizer.state_dict()["param_groups"]
    sizes = [[len(group["params"]) for group in all_groups] for all_groups in (saved_groups, groups)]
    compare("groups of this many parameters:", *sizes)
    for saved, own in zip(saved_groups, groups, strict=True):
        for saved_name, own_name in zip(saved.get("param_names", ()), own.get("param_names", ()), strict=False):
            compare("the parameter", saved_name, own_name)
    names = [name for group in groups for name in group.get("param_names", group["params"])]
    compare("this many parameters:", len(rest["shapes"]), len(names))
    for name, saved_shape, own_shape in zip(names, rest["shapes"], _shapes(optimizer), strict=True):
        compare(f"for parameter {name} the shape", saved_shape, own_shape)
