"""Settings that save time in the tests."""

import gc
import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

MEMORY, ROOM = Path("/dev/shm"), 8 * 2**30


def temporary_folder() -> str:
    """The folder for temporary files: in memory if there is room, since every file that must last is written to the
    disk before it is renamed, thousands of times."""
    in_memory = "TMPDIR" not in os.environ and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM
    return str(MEMORY) if in_memory else tempfile.gettempdir()


def collect_seldom() -> None:
    """Lets Python's collector look through the objects of torch less often."""
    gc.set_threshold(20_000, 50, 1000)


def save_unrendered(figure: Any, file: Any, format: str, **options: Any) -> None:
    """Stand-in for the method of matplotlib's figures that renders and saves them, a third of the time of a short run.
    Everything before it, which is all of fastbert's code, is still called."""
    text = f"<svg>a figure as {format}</svg>"
    file.write(text if isinstance(file, io.TextIOBase) else text.encode())
