"""Compilation of Triton kernels for GPUs that this machine need not have, and their resource usage: registers, spills,
shared memory, tensor-core instructions.

`compile_target` replaces Triton's driver by one that compiles each launch for the requested GPU and runs nothing. The
compiled variants are therefore those of a real call: the same types, specializations and configuration.
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastbert_kernels.backend import compiling_only

SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Maximum bytes of shared memory of a block, by capability."""
_TENSOR_CORES = {9: "wgmma.mma_async", 10: "tcgen05.mma"}
_numbers = itertools.count()


@dataclass(frozen=True)
class Resources:
    """Resource usage of a compiled kernel."""

    kernel: str
    registers: int
    """Per thread."""
    spilled: int
    """Bytes of local memory per thread, for registers that did not fit."""
    shared: int
    """Bytes of shared memory per block."""
    tensor_cores: int
    """Matrix instructions in its PTX: wgmma for capability 9.0, tcgen05.mma for 10.0, mma for others."""
    warps: int
    stages: int


class _Driver:
    """The part of a Triton driver that compilation needs, for a GPU that is not present."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.device = f"compile-only-{capability}-{next(_numbers)}"  # key of Triton's cache of a device
        limits = {"max_shared_mem": SHARED_LIMIT[capability], "multiprocessor_count": 132}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: limits,
            load_binary=lambda name, binary, shared, device: (1, 1, 0, 0, 1024),
        )

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    @staticmethod
    def launcher_cls(source, metadata):
        return lambda *arguments: None


@contextmanager
def compile_target(capability: int) -> Iterator["Compiled"]:
    """Context in which the package's functions select their kernels on any device and launches are compiled for
    `capability` (a key of SHARED_LIMIT) without running: results are uninitialized memory.

    Raises:
        triton.runtime.errors.OutOfResources: a launch does not fit this GPU.
    """
    active, hook, target = driver._active, knobs.runtime.jit_post_compile_hook, _Driver(capability)
    compiled = Compiled(target.device, capability, [])

    def record(*, fn, **more) -> None:
        if fn.jit_function not in compiled.functions:
            compiled.functions.append(fn.jit_function)

    driver.set_active(target)
    knobs.runtime.jit_post_compile_hook = record
    try:
        with compiling_only():
            yield compiled
    finally:
        driver._active, knobs.runtime.jit_post_compile_hook = active, hook
        for function in compiled.functions:
            function.device_caches.pop(target.device, None)


@dataclass(frozen=True)
class Compiled:
    """Kernels compiled so far in the context of a `compile_target`; valid inside that context."""

    device: str
    capability: int
    functions: list

    def kernels(self) -> list:
        """Triton's compiled kernels, all variants."""
        return [kernel for function in self.functions for kernel in function.device_caches[self.device][0].values()]

    def resources(self) -> list[Resources]:
        """Resource usage of each variant of each kernel."""
        instruction = _TENSOR_CORES.get(self.capability // 10, "mma.sync")
        found = []
        for kernel in self.kernels():
            registers, spilled = _usage(kernel.asm["cubin"])
            count = kernel.asm["ptx"].count(instruction)
            meta = kernel.metadata
            found.append(
                Resources(kernel.name, registers, spilled, meta.shared, count, meta.num_warps, meta.num_stages)
            )
        return found


def _usage(binary: bytes) -> tuple[int, int]:
    """Registers and bytes of stack, read by the `cuobjdump` in Triton's package."""
    program = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)
