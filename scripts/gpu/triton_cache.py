"""Triton's cache of compiled kernels in a file that can be carried to another machine, and counts of its use.

A folder of the cache has a group file with absolute paths, so a cache that is only copied is not used: they are written
again where it is unpacked.
"""

import importlib.util
import lzma
import os
import tarfile
from pathlib import Path
from typing import Any

from fastbert.errors import UserError
from fastbert.files import atomic_file
from fastbert.records import read_json, write_json

GROUP, PATHS = "__grp__*", "child_paths"
READ = (".cubin", ".json")
"""Endings of the files that a launch reads."""
USES: list[tuple[str, bool]] = []
"""Name of a kernel, and True if it was in the cache, False if it was compiled."""


def pack(folder: Path, file: Path) -> int:
    """Write the kernels in a cache folder to a tar.xz file; returns the number of kernels."""
    groups = sorted(folder.glob(f"*/{GROUP}"))
    with atomic_file(file, "wb") as output, tarfile.open(fileobj=output, mode="w:xz") as tar:
        for group in groups:
            for path in sorted(group.parent.iterdir()):
                if path.suffix in READ:
                    tar.add(path, str(path.relative_to(folder)))
    return len(groups)


def unpack(file: Path, folder: Path) -> int:
    """Unpack a file of `pack` into a new cache folder; returns the number of kernels.

    Raises:
        UserError: the file is not one of `pack`.
    """
    folder.mkdir(parents=True)
    try:
        with tarfile.open(file, "r:xz") as tar:
            tar.extractall(folder, filter="data")
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise UserError(f"--cache {file} is not a file of compile_cache.py: {error}") from None
    groups = sorted(folder.glob(f"*/{GROUP}"))
    for group in groups:
        names = read_json(group, "the file of a kernel", {PATHS: dict})[PATHS]
        here = {name: str(group.parent / name) for name in names if (group.parent / name).is_file()}
        write_json(group, {PATHS: here})
    return len(groups)


def environment(folder: Path) -> dict[str, str]:
    """Environment variables of processes that use this cache. The compiler's version is a part of the keys, and
    torch.compile would select that of torch's package: the variable selects that of Triton's."""
    found = {"TRITON_CACHE_DIR": str(folder)}
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return found
    program = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    return found | ({"TRITON_PTXAS_PATH": str(program)} if os.access(program, os.X_OK) else {})


def count_uses() -> None:
    """Record in USES each of fastbert's kernels that this process needs for the first time."""
    from triton import knobs

    def listener(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if getattr(src, "fn", None) is not None and src.fn.__module__.startswith("fastbert_kernels"):
            USES.append((src.name, cache_hit))

    knobs.compilation.listener = listener


def uses() -> dict[str, Any]:
    """Number of kernels that were found in the cache and that were compiled, and the names of the latter."""
    compiled = [name for name, hit in USES if not hit]
    return {"found": len(USES) - len(compiled), "compiled": len(compiled), "names": compiled}
