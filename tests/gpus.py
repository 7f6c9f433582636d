"""GPUs that torch reports and that are not there."""

import pytest
import torch


def report_gpus(
    monkeypatch: pytest.MonkeyPatch,
    name: str = "NVIDIA H100 80GB HBM3",
    capability: tuple[int, int] = (9, 0),
    count: int = 1,
) -> None:
    """Makes torch report this many of a name and compute capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
