"""The machine of a run: device, precision, threads, memory, and peak FLOP/s for MFU.

Nothing in this module may change a result beyond rounding. In fp32 on CUDA, torch.set_float32_matmul_precision remains
"highest", without TF32; bf16 uses tensor cores.
"""

import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch
from fastbert_kernels.backend import TRITON

from fastbert import __version__
from fastbert.errors import UserError, choose
from fastbert.training.options import PRECISIONS, MachineOptions
from fastbert.training.world import World


def resolve_device(name: str) -> torch.device:
    """The device that `name` (auto, cpu, cuda, cuda:N) selects on this machine.

    Raises:
        UserError: unknown name, or there is no such GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = "" if torch.version.cuda else f" (torch {torch.__version__} is built without CUDA)"
            raise UserError(f"device is {name}, but torch finds no CUDA GPU{built}; use --machine.device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"device is {name}, but there are {torch.cuda.device_count()} GPUs, counted from cuda:0")
    return device


def device_of_rank(name: str, world: World) -> torch.device:
    """The device of this process: with several on a machine, the GPU with the index of the process.

    Raises:
        UserError: as `resolve_device`, or `name` gives all processes the same GPU, or there are too few GPUs.
    """
    device = resolve_device(name)
    if world.size == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise UserError(
            f"device is {name}, the same GPU for all {world.size} processes; leave out --machine.device, and choose "
            "GPUs with CUDA_VISIBLE_DEVICES"
        )
    if world.local_rank >= (gpus := torch.cuda.device_count()):
        raise UserError(
            f"a process has the number {world.local_rank} on its machine, which has {gpus} GPUs: start at most {gpus} "
            "processes (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", world.local_rank)


def resolve_precision(name: str, device: torch.device) -> tuple[str, str | None]:
    """The precision that `name` (auto, fp32, bf16) selects on `device`.

    Returns:
        "fp32" or "bf16", and a warning if bf16 was requested where it is slow.
    """
    choose("precision", name, PRECISIONS)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
        lacks = "a GPU of compute capability below 8.0"
    else:
        fast = _cpu_multiplies_bf16()
        lacks = "a CPU without AVX512-BF16 or AMX"
    if name == "auto":
        return ("bf16" if fast else "fp32"), None
    if name == "bf16" and not fast:
        return name, f"bf16 on {lacks} is emulated and probably slower than --machine.precision fp32"
    return name, None


def _cpu_multiplies_bf16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):  # newer than torch 2.11
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Context manager for the forward pass: autocast to bfloat16, or nothing for "fp32"."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def use_device(device: torch.device) -> None:
    """Makes cuda:N the current GPU of this process, which streams, events, Triton's and apex's kernels, and calls of
    torch.cuda without a device use. `cuda` without a number is already the current GPU."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def setup_machine(options: MachineOptions, device: torch.device) -> None:
    """Makes `device` the current one, sets the number of threads and, on a CPU, makes glibc reuse large freed blocks
    instead of returning them to the system.

    By default glibc maps blocks of several MiB anew each time, and the operating system zeroes their pages: an fp32
    addition of [8192, 1024] took 14.4 ms with the default and 0.9 ms without. In return the process never releases its
    peak memory.
    """
    use_device(device)
    if options.threads:
        torch.set_num_threads(options.threads)
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_mmap_threshold, m_trim_threshold = -3, -1  # malloc.h
        libc.mallopt(m_mmap_threshold, 2**31 - 1)
        libc.mallopt(m_trim_threshold, -1)  # -1: never trim


def memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of memory on `device`; on a CPU within the limit of the control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    free = total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sys.platform == "linux":
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        free = 1024 * int(fields["MemAvailable"].split()[0])
        if limits := group_memory(Path("/sys/fs/cgroup")):
            free, total = min(free, limits[0]), min(total, limits[1])
    return free, total


def group_memory(folder: Path) -> tuple[int, int] | None:
    """Free and total bytes of memory of the control group in `folder`; None without a limit. What it has read from
    files and does not use (inactive_file) is free: the system drops it when memory is needed."""
    limit, used, statistics = (folder / f"memory.{name}" for name in ("max", "current", "stat"))
    if not (limit.is_file() and used.is_file()) or (most := limit.read_text(encoding="utf-8").strip()) == "max":
        return None
    inactive = 0
    if statistics.is_file():
        lines = statistics.read_text(encoding="utf-8").splitlines()
        inactive = int(dict(line.split() for line in lines).get("inactive_file", 0))
    return max(0, int(most) - int(used.read_text(encoding="utf-8")) + inactive), int(most)


def describe_machine() -> dict[str, object]:
    """Commit, versions and hardware, on which a result depends in addition to the options, as JSON for
    manifest.json."""
    versions = {"python": platform.python_version(), "fastbert": __version__}
    for package in ("torch", "transformers", "tokenizers", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["triton"] = TRITON
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        **commit_of(Path(__file__).resolve().parents[2]),
        "versions": versions,
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }


def commit_of(root: Path) -> dict[str, object]:
    """Commit of the git checkout with this root, and whether tracked files differ from it; None without a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    # An installed package may be inside another project's checkout, for example in its virtual environment.
    if top is None or Path(top).resolve() != root:
        return {"commit": None, "dirty": None}
    commit = git("rev-parse", "--verify", "--quiet", "HEAD")
    return {"commit": commit, "dirty": commit and bool(git("status", "--porcelain", "--untracked-files=no"))}


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# Dense TFLOP/s from NVIDIA's datasheets: bf16 on tensor cores with fp32 accumulation, fp32 on CUDA cores (no TF32).
# The first pattern that occurs in the device's name applies. None: no bf16 hardware, so the fp32 figure is the peak.
_DATASHEET: tuple[tuple[str, float | None, float], ...] = (
    (r"B200", 2250.0, 75.0),
    (r"H200 NVL|H100 NVL", 835.5, 60.0),
    (r"H200|GH200", 989.4, 66.9),
    (r"H100.*PCIe", 756.0, 51.2),
    (r"H100", 989.4, 66.9),
    (r"A100", 312.0, 19.5),
    (r"A40\b", 149.7, 37.4),
    (r"A10G", 70.0, 35.0),
    (r"A10\b", 125.0, 31.2),
    (r"RTX A6000", 154.8, 38.7),
    (r"L40S", 362.0, 91.6),
    (r"L40\b", 181.0, 90.5),
    (r"L4\b", 121.0, 30.3),
    (r"RTX 4090", 165.2, 82.6),
    (r"RTX 3090", 71.0, 35.6),
    (r"V100", None, 15.7),
    (r"T4\b", None, 8.1),
)


def peak_flops(device: torch.device, precision: str, again: bool = False) -> tuple[float, str]:
    """Peak FLOP/s for MFU, and its source.

    For known GPUs it is the dense figure of their datasheet. For CPUs and other GPUs it is that of the fastest of a few
    square matrix products, timed once (a fraction of a second) with the current number of threads: MFU is then relative
    to a matrix product on this machine.

    Args:
        again: repeat the timing.
    """
    if again:
        measured_flops.cache_clear()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for pattern, bf16, fp32 in _DATASHEET:
            if re.search(pattern, name):
                if precision == "bf16" and bf16 is not None:
                    return bf16 * 1e12, f"datasheet of {name}, dense bf16"
                return fp32 * 1e12, f"datasheet of {name}, fp32"
    return measured_flops(device, precision), "measured matmul"


@cache
def measured_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of the fastest square matrix product."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    best = 0.0
    for size in (256, 512, 1024) if device.type == "cpu" else (1024, 4096):
        # Larger products are timed only if they take little time: an emulated bf16 product can be 100 times slower.
        if best and 2 * size**3 / best > 0.1:
            break
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        for attempt in range(5):
            before = time.perf_counter()
            product = matrix @ matrix
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if attempt or size > 256:  # the first product starts threads and loads libraries
                best = max(best, 2 * size**3 / (time.perf_counter() - before))
            del product
    return best
