"""Settings that save time in the tests."""

import gc
import os
import shutil
import tempfile
from pathlib import Path

MEMORY, ROOM = Path("/dev/shm"), 8 * 2**30


def temporary_folder() -> str:
    """The folder for temporary files: in memory if there is room, since every file that must last is written to the
    disk before it is renamed, thousands of times."""
    in_memory = "TMPDIR" not in os.environ and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM
    return str(MEMORY) if in_memory else tempfile.gettempdir()


def collect_seldom() -> None:
    """Lets Python's collector look through the objects of torch less often."""
    gc.set_threshold(20_000, 50, 1000)
