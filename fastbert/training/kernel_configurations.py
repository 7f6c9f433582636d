"""Kernel configurations of a run: the same from the first step to the last, also after resuming."""

from typing import Any

import torch
from fastbert_kernels.backend import runs_kernels

from fastbert.errors import UserError


def fix_kernels(device: torch.device, sessions: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Sets the configurations of the kernels, which affect the rounding of results: those of the run's latest session
    on the same GPU model; without one, the tuned ones (`fastbert bench kernels --tune`) or the defaults.

    Args:
        sessions: the earlier sessions in the manifest.

    Returns:
        The configurations in use, for the manifest; None if no kernels run.

    Raises:
        UserError: the manifest or the file of tuned configurations is damaged.
    """
    if device.type != "cuda" or not runs_kernels(torch.empty(0, device=device), "training"):
        return None
    from fastbert_kernels import configurations

    name = torch.cuda.get_device_name(device)
    before = (session.get("resolved", {}).get("kernels") for session in reversed(sessions))
    stored = next((found["configurations"] for found in before if found and found["device"] == name), None)
    try:
        configurations.use(stored or configurations.load_tuned(name) or {})
    except ValueError as error:
        raise UserError(str(error)) from None
    return {"device": name, "configurations": configurations.in_use()}
