"""Recognizes files and folders given as the wrong argument and names the option that accepts them; imports no torch."""

import re
import shlex
from pathlib import Path

from fastbert.data.formats import TABLES, suffixes

YAML = (".yaml", ".yml")


def is_run(folder: Path) -> bool:
    """True if `folder` has the files of a run of `fastbert pretrain`."""
    return (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()


def usage_hint(path: Path) -> str:
    """Description of `path` with the option of `fastbert pretrain` that accepts it, as the end of a sentence; empty if
    `path` is not recognized."""
    at_step = re.fullmatch(r"(.+)@([0-9]{1,10})", str(path))
    if at_step and is_run(Path(at_step[1])):
        return f"a new run that begins with step {at_step[2]} is started with --branch {quoted(path)}"
    if is_run(path):
        return f"it is a run: {resume(path)}, or start a new run from its weights with --init-from {quoted(path)}"
    inner = "an export" if path.parent.name == "exports" else "a checkpoint"
    for run, what in ((path.parent, "the export"), (path.parent.parent, inner)):
        if is_run(run) and path.is_dir():
            return f"it is {what} of a run: {resume(run)}, or start a new run from it with --init-from {quoted(path)}"
    if (path / "dataset.json").is_file():
        return f"it is prepared data: fastbert pretrain --data {quoted(path)}"
    if (path / "config.json").is_file():
        return f"it is a model: start from its weights with --init-from {quoted(path)}"
    if path.suffix in YAML and path.is_file():
        return f"it is a YAML file, which comes first: fastbert pretrain {quoted(path)}"
    return ""


def is_text(path: Path) -> bool:
    """True if `path` is a file of text or a table by its suffix, except .json, which may be a file of options."""
    return path.suffix != ".json" and suffixes(path)[0] in (".txt", *TABLES) and path.is_file()


def resume(run: Path) -> str:
    return f"resume it with fastbert pretrain --resume {quoted(run)}"


def quoted(path: Path) -> str:
    """`path` for a shell."""
    return shlex.quote(str(path))
