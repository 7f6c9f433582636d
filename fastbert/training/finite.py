"""Checks that weights and optimizer moments are finite. States that are not finite are never saved, exported or used as
a start.

A number that is not finite never becomes finite again, since an update only multiplies and adds. So it is enough to
check at intervals and before anything is saved.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fastbert.errors import UserError

SHOWN = 3  # names in a message


class NotFiniteError(UserError):
    """Weights, buffers or moments contain NaN or an infinity."""


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Bool scalar on the device of the first tensor: whether all numbers in `tensors` are finite. Does not wait for the
    device.

    Tensors of integers or booleans and empty tensors count as finite.
    """
    tensors = [tensor.detach() for tensor in tensors]
    home = tensors[0].device if tensors else torch.device("cpu")
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    found = torch.ones((), dtype=torch.bool, device=home)
    for (device, _), members in groups.items():
        bounds = foreach_bounds(members) if device.type == "cuda" else extremes(members)
        found = found & torch.stack(bounds).isfinite().all().to(home)
    return found


def foreach_bounds(tensors: list[Tensor]) -> list[Tensor]:
    """The largest absolute value of each tensor, NaN if it contains NaN. A few launches on a GPU, slow on a CPU.

    Unlike a sum or a Euclidean norm it never overflows if all numbers are finite.
    """
    return list(torch._foreach_norm(tensors, ord=float("inf")))


def extremes(tensors: list[Tensor]) -> list[Tensor]:
    """Minimum and maximum of each tensor, NaN if it contains NaN. One launch per tensor, vectorized on a CPU."""
    return [bound for tensor in tensors for bound in tensor.aminmax()]


def not_finite(named: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that contain NaN or an infinity. Waits for the device."""
    if all_finite(named.values()):
        return []
    return [name for name, tensor in named.items() if not all_finite([tensor])]


def require_finite(groups: Mapping[str, Mapping[str, Tensor]], what: str) -> None:
    """Checks that all numbers are finite. Waits for the device.

    Args:
        groups: name of a group, such as "model" or "optimizer" -> name -> tensor.
        what: the owner of the tensors, for the message.

    Raises:
        NotFiniteError: the message names the first tensors that contain NaN or an infinity.
    """
    bad = [f"{group} {name}" for group, named in groups.items() for name in not_finite(named)]
    if bad:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise NotFiniteError(f"{what} holds numbers that are not finite: {', '.join(bad[:SHOWN])}{more}")
