"""Where the Triton kernels run: on CUDA devices, and under TRITON_INTERPRET=1 on any, interpreted.

Without Triton, or for tensors that a kernel does not take, the public functions fall back to PyTorch and say so once.
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
"""Whether Triton interprets kernels, which it decides when it is imported."""
TESTED = ("3.6", "3.7")
"""Versions of Triton that the kernels were compiled with in the tests."""
LEAST_CAPABILITY = (8, 0)
"""Of GPUs that Triton supports. It compiles 16-bit products for older ones too, but not for their shared memory."""

_pretended = 0


def _version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # under another name, as in PyTorch's nightly builds
        import triton

        return triton.__version__


TRITON = _version()
"""Triton's version; None without it."""


@contextmanager
def pretending() -> Iterator[None]:
    """Within it, kernels are taken on any device: `fastbert_kernels.compilation` sees to it that they do not run."""
    global _pretended
    _pretended += 1
    try:
        yield
    finally:
        _pretended -= 1


def runs_kernels(x: Tensor, what: str) -> bool:
    """Whether kernels can take tensors of x's device; a warning, once, if `what` has to do without them on a GPU."""
    if x.device.type != "cuda" and not INTERPRETED and not _pretended:
        return False
    if TRITON is None:
        warn_once(f"{what} takes PyTorch's own form on this GPU: Triton is not installed (pip install triton)")
        return False
    if not INTERPRETED and not _pretended and (found := _capability(x.device)) < LEAST_CAPABILITY:
        least, found = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, found))
        warn_once(f"{what} takes PyTorch's own form on this GPU: Triton needs compute capability {least}, not {found}")
        return False
    if not TRITON.startswith(tuple(f"{tested}." for tested in TESTED)):
        warn_once(f"Triton {TRITON} is not among the tested versions of fastbert_kernels: {', '.join(TESTED)}")
    return True


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


# What torch.compiler.assume_constant_result sets. That function imports the compiler, and with it Triton: 0.7 s.
_capability._dynamo_marked_constant = True


@cache
def warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=4)
