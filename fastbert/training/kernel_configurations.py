"""Which configurations of the kernels a training takes: the same from its first step to its last, resumes included."""

from typing import Any

import torch
from fastbert_kernels.backend import runs_kernels

from fastbert.errors import UserError


def fix_kernels(device: torch.device, sessions: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Sets the configurations of the kernels, which decide the last bits of a result: those of the run's latest session
    on such a GPU; else what was tuned on this one (`fastbert bench kernels --tune`); else the defaults.

    Args:
        sessions: of the manifest, before this one.

    Returns:
        What is in use, for the manifest; None where no kernels run.

    Raises:
        UserError: the file of what was tuned, or the manifest, holds something else.
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
