"""Tiles, warps and stages of the attention kernels: defaults, candidates for tuning, and the selection in use.

A configuration decides the order of summation and so the last bits of a result. No configuration is therefore selected
during a run. A run uses the defaults, or those that `fastbert bench kernels --tune` measured on this GPU and saved to a
file, and records them in its manifest, so that a resumed run uses the same.

The defaults for 16-bit heads of 64 in whole tiles spill no registers on the capabilities for which they are selected
(docs/results/kernels-compiled.md). On capabilities 8 and 12 they fit into 99 KiB of shared memory, the limit of the
smallest GPUs.
"""

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastbert_kernels.backend import INTERPRETED, TRITON

MAX_FILE_BYTES = 2**20
TENSOR_CLASSES = ("16-bit, to 64", "16-bit, to 128", "32-bit")
"""Classes of tensors with one configuration each: by bits per number and head size."""


class Tiles(NamedTuple):
    queries: int
    keys: int
    warps: int
    stages: int
    stored: int = 0
    """MiB of memory in which the backward pass stores the gradient of the scores, a group of sequences and heads at a
    time; 0: it is recomputed. The size does not change a result."""


STORING = ("keys", "short")
"""Kernels that can store the gradient of the scores."""
MAX_STORED = 2**12
_COMMON = {
    "forward": {"16-bit, to 128": Tiles(128, 64, 8, 2), "32-bit": Tiles(32, 32, 4, 2)},
    "keys": {"16-bit, to 128": Tiles(32, 64, 8, 2), "32-bit": Tiles(32, 32, 8, 1)},
    "queries": {"16-bit, to 128": Tiles(64, 64, 8, 2), "32-bit": Tiles(32, 32, 8, 2)},
    "bias": {"16-bit, to 128": Tiles(64, 32, 8, 2), "32-bit": Tiles(32, 32, 8, 1)},
    "short": {},
    "stored_queries": {"16-bit, to 128": Tiles(128, 64, 8, 2), "32-bit": Tiles(32, 32, 8, 2)},
}
_FOR_64 = {  # by the major version of the capability
    8: {
        "forward": Tiles(128, 64, 8, 2),
        "keys": Tiles(32, 128, 8, 2),
        "queries": Tiles(128, 64, 8, 2),
        "bias": Tiles(64, 32, 4, 2),
        "short": Tiles(32, 128, 8, 2),
        "stored_queries": Tiles(128, 64, 8, 3),
    },
    9: {
        "forward": Tiles(128, 64, 8, 3),
        "keys": Tiles(64, 128, 8, 2),
        "queries": Tiles(128, 64, 8, 3),
        "bias": Tiles(128, 64, 8, 2),
        "short": Tiles(64, 128, 8, 1),
        "stored_queries": Tiles(128, 64, 4, 3),
    },
    10: {
        "forward": Tiles(128, 64, 8, 3),
        "keys": Tiles(64, 128, 8, 2),
        "queries": Tiles(128, 64, 8, 3),
        "bias": Tiles(64, 64, 8, 3),
        "short": Tiles(64, 128, 8, 1),
        "stored_queries": Tiles(128, 64, 4, 3),
    },
}
_FOR_64[12] = {**_FOR_64[8], "short": Tiles(16, 128, 8, 2)}
CANDIDATES: dict[str, tuple[Tiles, ...]] = {
    "forward": (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 3), Tiles(128, 128, 8, 2)),
    "queries": (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2), Tiles(128, 32, 4, 2)),
    "bias": (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 3), Tiles(64, 128, 8, 2), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2)),
    "keys": (
        *(Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 2), Tiles(64, 64, 4, 2)),
        *(Tiles(64, 128, 8, 2, 32), Tiles(32, 128, 8, 2, 32), Tiles(64, 128, 8, 2, 256)),
    ),
    "short": (
        *(Tiles(64, 128, 8, 1), Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 2)),
        *(Tiles(64, 128, 8, 1, 32), Tiles(32, 128, 8, 2, 32)),
    ),
}
"""Candidates for tuning, for 16-bit heads of up to 64: of all tiles between 32 and 128 with 4 or 8 warps and 1 to 3
stages, those with no or few spills on one of the capabilities. The number of keys of `short` follows from the length.
In this order each is timed with the fastest of the kernels before it, so that the forms with and without a stored
gradient of the scores are compared at their best."""

_selected: dict[str, dict[str, Tiles]] = {}


def tensor_class(head_size: int, dtype: torch.dtype) -> str:
    """One of TENSOR_CLASSES."""
    if dtype == torch.float32:
        return TENSOR_CLASSES[2]
    return TENSOR_CLASSES[0] if head_size <= 64 else TENSOR_CLASSES[1]


def tiles(kernel: str, tensors: str, untied: bool = False) -> Tiles:
    """The configuration in use of a kernel for a class of tensors. An `untied` bias needs two more tiles, for which
    capabilities 8 and 12 have room only with a single stage and fewer queries."""
    found = _selected.get(kernel, {}).get(tensors) or default(kernel, tensors)
    return found._replace(queries=min(64, found.queries), stages=1) if untied and _major() in (8, 12) else found


def default(kernel: str, tensors: str) -> Tiles:
    return _FOR_64[_major()][kernel] if tensors == TENSOR_CLASSES[0] else _COMMON[kernel][tensors]


def _major() -> int:
    major = _capability() // 10
    return major if major in _FOR_64 else 8


def _capability() -> int:
    """Capability of the GPU that kernels are launched on or, in a `compile_target`, compiled for."""
    if INTERPRETED:
        return 90
    from triton.runtime import driver

    return driver.active.get_current_target().arch


def in_use() -> dict[str, dict[str, list[int]]]:
    """Kernel -> class of tensors -> configuration, as JSON."""
    found = {kernel: dict.fromkeys([*classes, TENSOR_CLASSES[0]]) for kernel, classes in _COMMON.items()}
    return {kernel: {name: list(tiles(kernel, name)) for name in classes} for kernel, classes in found.items()}


def use(choice: Mapping[str, Mapping[str, Any]]) -> None:
    """Select the configurations of `choice` (in the form of `in_use`), and the defaults for what it lacks.

    Raises:
        ValueError: an unknown kernel or class of tensors, or invalid numbers.
    """
    found: dict[str, dict[str, Tiles]] = {}
    if not isinstance(choice, Mapping) or not all(isinstance(classes, Mapping) for classes in choice.values()):
        raise ValueError("kernel configurations must map kernels and classes of tensors to numbers")
    for kernel, classes in choice.items():
        for tensors, numbers in classes.items():
            if kernel not in _COMMON or tensors not in TENSOR_CLASSES:
                raise ValueError(f"there is no kernel {kernel!r} for {tensors!r} tensors")
            whole = isinstance(numbers, Sequence) and len(numbers) == 5 and all(type(n) is int for n in numbers)
            if not whole or not all(0 < n <= 2**20 and n & (n - 1) == 0 for n in numbers[:3]):
                raise ValueError(f"{kernel}, {tensors}: {str(numbers)[:200]} is not {', '.join(Tiles._fields)}")
            if not 0 <= numbers[4] <= (MAX_STORED if kernel in STORING else 0):
                raise ValueError(f"{kernel}, {tensors}: stored must be 0 to {MAX_STORED} MiB for {STORING}, else 0")
            found.setdefault(kernel, {})[tensors] = Tiles(*numbers)
    _selected.clear()
    _selected.update(found)


def file_of(device_name: str) -> Path:
    """Path of the configurations tuned on a GPU."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fastbert" / f"kernels-{re.sub(r'[^A-Za-z0-9]+', '-', device_name).lower()}.json"


def save_tuned(choice: Mapping[str, Mapping[str, Any]], device_name: str) -> Path:
    """Write the configurations tuned on a GPU with this version of Triton; returns the path."""
    path = file_of(device_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    choice = {"device": device_name, "triton": TRITON, "kernels": choice}
    write_whole(path, json.dumps(choice, indent=1, allow_nan=False))
    return path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: under a new name, which cannot be a link to another file, and then rename
    it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_tuned(device_name: str) -> dict[str, dict[str, list[int]]] | None:
    """The configurations tuned on such a GPU with this version of Triton; None if there are none.

    Raises:
        ValueError: the file is not one that `save_tuned` wrote; the message names it.
    """
    try:
        path = file_of(device_name)
    except RuntimeError:  # no home directory, so nothing was saved there
        return None
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            stored = json.loads(file.read(MAX_FILE_BYTES))
        return stored["kernels"] if stored["triton"] == TRITON else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # not JSON, or another structure
        raise ValueError(f"{path} is damaged ({error}); delete it or tune again") from None
