"""Peak memory usage: memory allocated by torch on a GPU, resident memory of the process on a CPU."""

import ctypes
import gc
import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch


class PeakMemory:
    """Growth of the peak since this object was created.

    On a CPU it is measured on resident memory (VmHWM), whose peak is reset if the system allows it; freed memory is
    returned to the system first, so that it does not hide the growth.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):  # no such file, or not allowed
            # proc(5): resets VmHWM to the current resident memory
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self._before = _resident("VmRSS")

    def growth(self) -> int:
        """Growth in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        return max(0, _resident("VmHWM") - self._before)

    @property
    def kind(self) -> str:
        """The memory that `growth` counts."""
        return "allocated on the GPU" if self.device.type == "cuda" else "resident memory of the process"


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes; on systems other than Linux, the peak so far for both."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
