"""Result rows that are saved at once, times by the device's clock, and a machine's peak performance."""

import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.errors import TritonError

from fastbert_kernels.configurations import write_whole

FAILURES = (RuntimeError, TritonError)
"""Errors of a contestant that does not support a case; the row records them."""


@dataclass(frozen=True)
class Settings:
    """Settings of one benchmark."""

    out: Path
    seconds: float = 480.0
    """Time limit for starting a new row."""
    rounds: int = 20
    toy: bool = False
    """Dry run with tiny shapes, on any machine; times are meaningless."""
    added: Callable[[dict[str, Any]], None] | None = None
    """Called with each new row."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class ResultRows:
    """A growing JSON file of rows, with a time limit. Each row is also printed to standard error."""

    def __init__(self, name: str, settings: Settings, steps: int | None = None, **header: Any) -> None:
        """Open the file.

        Args:
            steps: total number of calls of `step`, for the time left; None if unknown.
            header: more entries of the file.
        """
        settings.out.mkdir(parents=True, exist_ok=True)
        self.path, self.start, self.rows = settings.out / f"{name}.json", time.monotonic(), []
        self.added = settings.added
        self.end, self.steps, self.done = self.start + settings.seconds, steps, 0
        cuda = settings.device.type == "cuda"
        self.header = {
            "benchmark": name,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "toy": settings.toy,
            **header,
        }

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        texts = [_text(name, value) for name, value in row.items() if name != "errors"]
        print(f"{self.clock()}  {', '.join(texts)}", file=sys.stderr, flush=True)
        write_whole(self.path, finite_json({**self.header, "rows": self.rows}) + "\n")
        if self.added is not None:
            self.added(row)

    def step(self) -> None:
        self.done += 1

    def clock(self) -> str:
        passed = time.monotonic() - self.start
        if not self.steps or not self.done:
            return f"{passed:4.0f} s"
        left = passed / self.done * (self.steps - self.done)
        return f"{passed:4.0f} s, {self.done} of {self.steps}, {left:.0f} s left"

    @property
    def over(self) -> bool:
        return bool(self.rows) and time.monotonic() > self.end  # at least one row, so that there is a report


def finite_json(value: Any) -> str:
    """`value` as JSON with null for numbers that are not finite, such as the error of a kernel that returns NaN."""

    def finite(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(finite(value), indent=1, allow_nan=False)


def _text(name: str, value: Any) -> str:
    if isinstance(value, dict) and "ms" in value:
        return f"{name} {value['ms']} ms"
    return str(value) if isinstance(value, str) else f"{name} {value}"


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def timed(function: Callable[[], Any], device: torch.device, rounds: int) -> dict[str, float]:
    """Milliseconds: median, minimum and maximum over rounds, after three warm-up calls, with a cold L2 cache on a
    GPU."""
    for _ in range(3):
        function()
    times = []
    if device.type != "cuda":
        for _ in range(rounds):
            start = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - start))
    else:
        flush = torch.empty(1 << 26, dtype=torch.int32, device=device)  # 256 MiB, more than the L2 cache
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for start, stop in marks:
            flush.zero_()
            start.record()
            function()
            stop.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(stop) for start, stop in marks]
    return {"ms": round(statistics.median(times), 4), "least": round(min(times), 4), "most": round(max(times), 4)}


def peak_mib(function: Callable[[], Any], device: torch.device) -> float | None:
    """Peak memory of a call beyond that in use before, in MiB; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def ceilings(device: torch.device, toy: bool) -> dict[str, float]:
    """TFLOP/s of a large product of random bfloat16 matrices, and TB/s of a copy, counting both directions."""
    size, cells = (64, 1 << 10) if toy else (8192, 1 << 29)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = timed(lambda: a @ b, device, 5)["ms"]
    x = torch.empty(cells, dtype=torch.float32, device=device)
    copy = timed(lambda: x.clone(), device, 5)["ms"]
    return {"tflops": float(f"{2 * size**3 / product / 1e9:.4g}"), "tbytes": float(f"{8 * cells / copy / 1e9:.4g}")}
