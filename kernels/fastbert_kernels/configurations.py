"""Tiles, warps and stages of the attention kernels: the defaults, what is tried when they are tuned, what is in use.

A configuration decides the order of sums and so the last bits of a result. So none is chosen while a training runs: it
takes the defaults, or what `fastbert bench kernels --tune` measured on this GPU and kept in a file; and it notes in its
manifest which, so that a resume takes the same.

The defaults spill no registers where they were compiled for (docs/results/kernels-compiled.md). On capability 8 and 12
they fit into the 99 KiB of shared memory of its smallest members.
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

LARGEST = 2**20  # bytes of a file of configurations
KINDS = ("16-bit, to 64", "16-bit, to 128", "32-bit")
"""Tensors that share a configuration: by the bits of their numbers and the size of their heads."""


class Tiles(NamedTuple):
    queries: int
    keys: int
    warps: int
    stages: int


_COMMON = {
    "forward": {"16-bit, to 128": Tiles(128, 64, 8, 2), "32-bit": Tiles(32, 32, 4, 2)},
    "keys": {"16-bit, to 128": Tiles(32, 64, 8, 2), "32-bit": Tiles(32, 32, 8, 1)},
    "queries": {"16-bit, to 128": Tiles(64, 64, 8, 2), "32-bit": Tiles(32, 32, 8, 2)},
    "bias": {"16-bit, to 128": Tiles(64, 32, 8, 2), "32-bit": Tiles(32, 32, 8, 1)},
    "short": {},
}
_FOR_64 = {  # by the major number of the capability
    8: {
        "forward": Tiles(128, 64, 8, 2),
        "keys": Tiles(32, 128, 8, 2),
        "queries": Tiles(128, 64, 8, 2),
        "bias": Tiles(64, 32, 4, 2),
        "short": Tiles(32, 128, 8, 2),
    },
    9: {
        "forward": Tiles(128, 64, 8, 3),
        "keys": Tiles(64, 128, 8, 2),
        "queries": Tiles(128, 64, 8, 3),
        "bias": Tiles(128, 64, 8, 2),
        "short": Tiles(64, 128, 8, 1),
    },
    10: {
        "forward": Tiles(128, 64, 8, 3),
        "keys": Tiles(64, 128, 8, 2),
        "queries": Tiles(128, 64, 8, 3),
        "bias": Tiles(64, 64, 8, 3),
        "short": Tiles(64, 128, 8, 1),
    },
}
CANDIDATES: dict[str, tuple[Tiles, ...]] = {
    "forward": (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 3), Tiles(128, 128, 8, 2)),
    "keys": (Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 2), Tiles(64, 64, 4, 2)),
    "queries": (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2), Tiles(128, 32, 4, 2)),
    "bias": (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 3), Tiles(64, 128, 8, 2), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2)),
    "short": (Tiles(64, 128, 8, 1), Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 2)),
}
"""What is tried for 16-bit heads of up to 64: of the tiles between 32 and 128 with 4 and 8 warps and 1 to 3 stages
those that spill nothing, or next to nothing, on one of the capabilities. `short` takes its keys from the length."""

_chosen: dict[str, dict[str, Tiles]] = {}


def kind(head_size: int, dtype: torch.dtype) -> str:
    """One of KINDS."""
    if dtype == torch.float32:
        return KINDS[2]
    return KINDS[0] if head_size <= 64 else KINDS[1]


def tiles(kernel: str, of: str, parts: bool = False) -> Tiles:
    """The configuration in use of a kernel for a kind of tensors; with the `parts` of a bias it holds two tiles more,
    for which capabilities 8 and 12 have room in a single stage of fewer queries only."""
    found = _chosen.get(kernel, {}).get(of) or default(kernel, of)
    return found._replace(queries=min(64, found.queries), stages=1) if parts and _major() == 8 else found


def default(kernel: str, of: str) -> Tiles:
    return _FOR_64[_major()][kernel] if of == KINDS[0] else _COMMON[kernel][of]


def _major() -> int:
    major = _capability() // 10
    return major if major in _FOR_64 else 8


def _capability() -> int:
    """Of the GPU that kernels are launched on or, by `pretended_gpu`, compiled for."""
    if INTERPRETED:
        return 90
    from triton.runtime import driver

    return driver.active.get_current_target().arch


def in_use() -> dict[str, dict[str, list[int]]]:
    """Kernel -> kind -> configuration, as JSON."""
    found = {kernel: [*kinds, *([KINDS[0]] if KINDS[0] not in kinds else [])] for kernel, kinds in _COMMON.items()}
    return {kernel: {of: list(tiles(kernel, of)) for of in kinds} for kernel, kinds in found.items()}


def use(choice: Mapping[str, Mapping[str, Any]]) -> None:
    """Takes the configurations of `choice` (as `in_use` gives them) from now on, and the defaults for what it lacks.

    Raises:
        ValueError: a kernel, a kind or numbers that there cannot be.
    """
    found: dict[str, dict[str, Tiles]] = {}
    if not isinstance(choice, Mapping) or not all(isinstance(kinds, Mapping) for kinds in choice.values()):
        raise ValueError("the configurations of kernels are no mapping of kernels and kinds to numbers")
    for kernel, kinds in choice.items():
        for of, numbers in kinds.items():
            if kernel not in _COMMON or of not in KINDS:
                raise ValueError(f"there is no kernel {kernel!r} for {of!r} tensors")
            whole = isinstance(numbers, Sequence) and len(numbers) == 4 and all(type(n) is int for n in numbers)
            if not whole or not all(0 < n <= 2**20 and n & (n - 1) == 0 for n in numbers[:3]):
                raise ValueError(f"{kernel}, {of}: {str(numbers)[:200]} is not queries, keys, warps and stages")
            found.setdefault(kernel, {})[of] = Tiles(*numbers)
    _chosen.clear()
    _chosen.update(found)


def file_of(device_name: str) -> Path:
    """Where what was tuned on a GPU is kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fastbert" / f"kernels-{re.sub(r'[^A-Za-z0-9]+', '-', device_name).lower()}.json"


def save_tuned(choice: Mapping[str, Mapping[str, Any]], device_name: str) -> Path:
    """Writes what was tuned on a GPU with this Triton to its file; returns the path."""
    path = file_of(device_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    choice = {"device": device_name, "triton": TRITON, "kernels": choice}
    write_whole(path, json.dumps(choice, indent=1, allow_nan=False))
    return path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all: under a new name, which can be nobody's link, and then renamed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_tuned(device_name: str) -> dict[str, dict[str, list[int]]] | None:
    """What was tuned on such a GPU with this version of Triton; None if nothing was.

    Raises:
        ValueError: the file cannot be read as one of `save_tuned`; it is named.
    """
    try:
        path = file_of(device_name)
    except RuntimeError:  # no home directory, so nothing was kept there
        return None
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            stored = json.loads(file.read(LARGEST))
        return stored["kernels"] if stored["triton"] == TRITON else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # no JSON, or of another shape
        raise ValueError(f"{path} is damaged ({error}); delete it or tune again") from None
