"""Scalars read from the device one step late, so that the host never waits for the step it has just queued."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class _Pending:
    step: int
    names: list[str]
    values: Tensor
    ready: "torch.cuda.Event | None"
    time: float


class LaggedScalars:
    """Buffer for the scalars of one step until those of the next step are queued.

    Attributes:
        time: when the step of the last returned scalars was finished, in seconds of `time.perf_counter`. On a CPU that
            is when they were pushed, not when the next step, which has run meanwhile, returns them.
    """

    def __init__(self) -> None:
        self._pending: _Pending | None = None
        self.time = time.perf_counter()

    def push(self, step: int, scalars: dict[str, Tensor]) -> tuple[int, dict[str, float]] | None:
        """Queues the scalars of `step` and returns those pushed before, as (step, name -> value)."""
        before = self.pop()
        values = torch.stack([value.detach().double() for value in scalars.values()])
        ready = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(values.device))  # the copy's stream, also if another is current
            values = host
        self._pending = _Pending(step, list(scalars), values, ready, time.perf_counter())
        return before

    def pop(self) -> tuple[int, dict[str, float]] | None:
        """The pending scalars, if any; waits for them."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        self.time = pending.time
        if pending.ready is not None:
            pending.ready.synchronize()
            self.time = time.perf_counter()
        return pending.step, dict(zip(pending.names, pending.values.tolist(), strict=True))

    def shift(self, seconds: float) -> None:
        """Counts a pause after the pending step as if it had been before the step."""
        if self._pending is not None:
            self._pending.time += seconds
