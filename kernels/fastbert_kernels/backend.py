"""Choice between Triton kernels and PyTorch. Kernels run on CUDA devices and, interpreted under TRITON_INTERPRET=1, on
any device.

Without Triton, or for tensors that a kernel does not support, the public functions fall back to PyTorch and warn once.
"""

import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""True if Triton interprets kernels. Triton reads the variable when it is imported."""
TESTED = ("3.6", "3.7")
"""Versions of Triton with which the tests compile the kernels."""
MIN_CAPABILITY = (8, 0)
"""Minimum compute capability. Triton compiles 16-bit products for older GPUs too, but ignores their smaller shared
memory."""

_compile_only = 0


def _version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # another distribution name, as in PyTorch's nightly builds
        import triton

        return triton.__version__


TRITON = _version()
"""Triton's version; None if it is not installed."""


@contextmanager
def compiling_only() -> Iterator[None]:
    """Context in which kernels are selected on any device; `fastbert_kernels.compilation` compiles them without running
    them."""
    global _compile_only
    _compile_only += 1
    try:
        yield
    finally:
        _compile_only -= 1


def runs_kernels(x: Tensor, operation: str) -> bool:
    """Report whether kernels run on x's device; warns once if `operation` has to fall back to PyTorch on a GPU."""
    if x.device.type != "cuda" and not INTERPRETED and not _compile_only:
        return False
    if TRITON is None:
        warn_once(f"{operation} falls back to PyTorch on this GPU: Triton is not installed (pip install triton)")
        return False
    if not INTERPRETED and not _compile_only and (found := _capability(x.device)) < MIN_CAPABILITY:
        least, found = (".".join(map(str, pair)) for pair in (MIN_CAPABILITY, found))
        warn_once(
            f"{operation} falls back to PyTorch on this GPU: Triton needs compute capability {least}, not {found}"
        )
        return False
    if not TRITON.startswith(tuple(f"{tested}." for tested in TESTED)):
        warn_once(f"Triton {TRITON} is not one of the versions tested with fastbert_kernels: {', '.join(TESTED)}")
    return True


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


# Set here as torch.compiler.assume_constant_result does, which would import the compiler and Triton (0.7 s).
_capability._dynamo_marked_constant = True


@cache
def warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=4)
