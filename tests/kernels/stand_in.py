"""Launches by Triton's own launcher on a machine without a GPU: a libcuda.so.1 that runs nothing records what a driver
would receive, the grid and every kernel parameter. Tensors on the CPU stand for those of the GPU."""

import ctypes
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from fastbert_kernels.compilation import Compiled, compile_target
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.kernels.compile_cases import compiling_up_to

SOURCE = Path(__file__).with_name("stand_in_cuda.c")
DEVICE, STREAM = 5, 77
TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class Config(ctypes.Structure):
    """CUlaunchConfig up to the stream."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
    ]


REPORT = ctypes.CFUNCTYPE(None, ctypes.c_size_t, ctypes.POINTER(Config), ctypes.POINTER(ctypes.c_void_p))


@dataclass(frozen=True)
class Launch:
    """A launch as the driver receives it."""

    kernel: str
    function: int
    """Handle of the compiled variant."""
    grid: tuple[int, ...]
    threads: int
    stream: int
    arguments: dict[str, Any]
    """Arguments by name, a tuple for a group of them; those that are not parameters have the value with which the
    variant was compiled."""


def build(folder: Path, compiler: str) -> ctypes.CDLL:
    """Compile the library and load it under the name by which Triton finds it."""
    path = folder / "libcuda.so.1"
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{headers}", "-o", path, SOURCE]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def missing_header() -> bool:
    return not (Path(sysconfig.get_path("include")) / "Python.h").is_file()


@contextmanager
def recorded(library: ctypes.CDLL) -> Iterator[list[Launch]]:
    """Context in which kernels are compiled for 9.0 up to Triton's IR and launched on the stand-in; yields the
    launches."""
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    launches, sources = [], []

    class Launcher(CudaLauncher):
        def __init__(self, source, metadata) -> None:
            super().__init__(source, metadata)
            self.source = source

        def __call__(self, *arguments) -> None:
            sources.append(self.source)
            super().__call__(*arguments)

    class Driver(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), Launcher

        def get_current_device(self) -> int:
            return DEVICE

        def get_current_stream(self, device: int) -> int:
            return STREAM

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    @REPORT
    def report(function: int, config, parameters) -> None:
        source = sources[-1]
        found = _arguments(source, parameters)
        received = config.contents
        launches.append(
            Launch(source.fn.__name__, function, tuple(received.grid), received.block[0], received.stream, found)
        )

    library.stand_in_report(report)
    with compiling_up_to("ttgir"), compile_target(90) as compiled:
        driver.set_active(Driver())
        try:
            yield launches
            assert len(launches) == len(sources)
            _check_parameters(compiled, launches)
        finally:
            for function in compiled.functions:
                function.device_caches.pop(DEVICE, None)


def _leaves(source) -> Iterator[tuple[tuple[int, ...], str, str]]:
    """Path, argument and type of each kernel parameter, in order."""

    def walk(path: tuple[int, ...], name: str, kind) -> Iterator[tuple[tuple[int, ...], str, str]]:
        if isinstance(kind, tuple):
            for index, part in enumerate(kind):
                yield from walk((*path, index), name, part)
        elif kind != "constexpr":
            yield path, name, kind

    for index, (name, kind) in enumerate(source.signature.items()):
        yield from walk((index,), name, kind)


def _arguments(source, parameters) -> dict[str, Any]:
    values = dict(source.constants)
    for (path, _, kind), address in zip(_leaves(source), parameters, strict=False):  # parameters have no length
        values[path] = TYPES.get(kind, ctypes.c_uint64).from_address(address).value

    def value(path: tuple[int, ...], kind) -> Any:
        if isinstance(kind, tuple):
            return tuple(value((*path, index), part) for index, part in enumerate(kind))
        return values[path]

    return {name: value((index,), kind) for index, (name, kind) in enumerate(source.signature.items())}


def _check_parameters(compiled: Compiled, launches: list[Launch]) -> None:
    """The parameters of the compiled kernels are those that the launcher passes: names, types, and the multiples of 16
    that the code assumes."""
    kernels = [k for function in compiled.functions for k in function.device_caches[DEVICE][0].values()]
    by_handle = {kernel.function: kernel for kernel in kernels}
    for launch in launches:
        kernel = by_handle[launch.function]
        header = re.search(r"tt\.func public @\w+\((.*?)\) attributes", kernel.asm["ttgir"]).group(1)
        pattern = r'%\w+: (\S+)(?: \{tt\.divisibility = (\d+) : i32\})? loc\("(\w+)"'
        found = re.findall(pattern, header)
        leaves = list(_leaves(kernel.src))
        assert [(name, kind) for kind, _, name in found] == [(name, _ir_type(kind)) for _, name, kind in leaves]
        for (_, divisor, name), (path, *_) in zip(found, leaves, strict=True):
            value = launch.arguments[name]
            for index in path[1:]:
                value = value[index]
            assert not divisor or value % int(divisor) == 0, (launch.kernel, name)


def _ir_type(kind: str) -> str:
    names = {"fp16": "f16", "fp32": "f32", "fp64": "f64"}
    if kind.startswith("*"):
        return f"!tt.ptr<{names.get(kind[1:], kind[1:])}>"
    return names.get(kind, kind)
