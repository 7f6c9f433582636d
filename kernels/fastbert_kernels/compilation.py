"""Compiles Triton kernels for GPUs that need not be there, and reads off what they take: registers, spills, shared
memory, tensor-core instructions.

`pretended_gpu` puts a driver in Triton's place that compiles a launch for the GPU asked for and then runs nothing. So
what is compiled is what a call would launch: its types, its specializations, its configuration.
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

from fastbert_kernels.backend import pretending

SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory a block may have, by capability."""
_TENSOR_CORES = {9: "wgmma.mma_async", 10: "tcgen05.mma"}
_numbers = itertools.count()


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes."""

    kernel: str
    registers: int
    """Of each thread."""
    spilled: int
    """Bytes of local memory of each thread: registers that did not fit."""
    shared: int
    """Bytes of shared memory of each block."""
    tensor_cores: int
    """Matrix instructions in its PTX: wgmma for capability 9.0, tcgen05.mma for 10.0, mma else."""
    warps: int
    stages: int


class _Driver:
    """What Triton's runtime asks of a driver, for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.device = f"pretended-{capability}-{next(_numbers)}"  # the key of what Triton keeps for a device
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
def pretended_gpu(capability: int) -> Iterator["Compiled"]:
    """Within it the package's functions take their kernels on any device, and launches are compiled for `capability`,
    one of SHARED_LIMIT, and run nothing: their results are whatever memory held.

    Raises:
        triton.runtime.errors.OutOfResources: at a launch that would not fit this GPU.
    """
    before, hook, pretended = driver._active, knobs.runtime.jit_post_compile_hook, _Driver(capability)
    compiled = Compiled(pretended.device, capability, [])

    def note(*, fn, **more) -> None:
        if fn.jit_function not in compiled.functions:
            compiled.functions.append(fn.jit_function)

    driver.set_active(pretended)
    knobs.runtime.jit_post_compile_hook = note
    try:
        with pretending():
            yield compiled
    finally:
        driver._active, knobs.runtime.jit_post_compile_hook = before, hook
        for function in compiled.functions:
            function.device_caches.pop(pretended.device, None)


@dataclass(frozen=True)
class Compiled:
    """What has been compiled for a pretended GPU so far; to be asked inside its context."""

    device: str
    capability: int
    functions: list

    def kernels(self) -> list:
        """Triton's compiled kernels, each variant of each."""
        return [kernel for function in self.functions for kernel in function.device_caches[self.device][0].values()]

    def resources(self) -> list[Resources]:
        """Of each variant of each kernel."""
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
    """Registers and bytes of stack, from the `cuobjdump` in Triton's package."""
    program = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return int(registers), int(stack)
