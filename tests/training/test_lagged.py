"""Scalars of a step that are read one step later."""

import torch

from fastbert.training.lagged import LaggedScalars


def test_lagged_scalars_wait_for_the_gpu_that_has_them(monkeypatch) -> None:
    """The event is recorded on the copy's stream, on the device of the values, and has ended before the host reads."""
    calls = []

    class OnGPU(torch.Tensor):
        device = torch.device("cuda:1")

    class Event:
        def record(self, stream: str) -> None:
            calls.append(stream)

        def synchronize(self) -> None:
            calls.append("waited")

    stack, empty = torch.stack, torch.empty
    monkeypatch.setattr(torch, "stack", lambda tensors: stack(tensors).as_subclass(OnGPU))
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: empty(shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    lagged = LaggedScalars()
    lagged.push(0, {"x": torch.tensor(2.0)})
    assert calls == ["stream of cuda:1"]
    assert lagged.pop() == (0, {"x": 2.0}) and calls[1:] == ["waited"]


def test_lagged_scalars_come_one_step_late() -> None:
    lagged = LaggedScalars()
    assert lagged.push(0, {"x": torch.tensor(1.0)}) is None
    assert lagged.push(1, {"x": torch.tensor(2.0)}) == (0, {"x": 1.0})
    assert lagged.pop() == (1, {"x": 2.0})
