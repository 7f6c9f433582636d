"""Checkpoints, written whole or not at all: safetensors and JSON, with a manifest that has the hash of every file.

    checkpoints/step-00000123/
        model.safetensors ...   one file for each group of tensors
        state.json              everything else that the run needs to resume
        manifest.json           format, step, metric, and size and SHA-256 of each file

A checkpoint is written under a temporary name and renamed, older checkpoints are removed only afterwards, and files are
verified before they are read: neither a killed save nor a damaged file costs more than one checkpoint interval. Tensors
that are not finite are neither saved nor loaded. Nothing is unpickled.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from fastbert.errors import UserError, brief
from fastbert.files import atomic_folder, disk_errors, make_inner_folder, remove, remove_leftovers
from fastbert.inputs import UnreadableError, input_errors, open_input
from fastbert.progress import amount, progress
from fastbert.records import COUNT, check, finite_or_none, parse_json, read_json, seal_of
from fastbert.training.finite import NotFiniteError, require_finite
from fastbert.training.tensors import read_tensors
from fastbert.training.world import World

FORMAT = 1
_FOLDER = re.compile(r"step-([0-9]{8,})")
_FILE = re.compile(r"[\w-]+\.(safetensors|json)")
_MANIFEST = {
    "step": COUNT,
    "metric": (float, type(None)),
    "metric_of?": (str, type(None)),
    "files": {str: {"bytes": COUNT, "sha256": str}, "state.json": dict},
}
_ALIASES = "aliases"  # safetensors metadata: names of tensors that use the memory of a stored tensor


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint, as passed to `Checkpointer.save`."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    """File name without extension -> name -> tensor, on the CPU."""
    state: dict
    metric: float | None
    metric_of: str | None = None


class Checkpointer:
    """Saves, prunes and loads the checkpoints of one run. Only one process of a run may save.

    Args:
        folder: the run's `checkpoints` folder, created if missing. Leftovers of killed saves are removed.
        keep_last: number of newest checkpoints to keep, at least 1, in addition to the one with the lowest metric.
        echo: prints warnings.
        keep: steps whose checkpoints are never removed.

    Raises:
        UserError: the folder cannot be created or written, or `keep_last` is below 1.
    """

    def __init__(
        self, folder: Path | str, keep_last: int, echo: Callable[[str], None], keep: frozenset[int] = frozenset()
    ):
        if keep_last < 1:
            raise UserError(f"keep_last is {keep_last}; at least one checkpoint must be retained")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.echo = echo
        self.keep = keep
        make_inner_folder(self.folder)
        with disk_errors(self.folder):
            remove_leftovers(self.folder)

    def paths(self) -> list[Path]:
        """Folders of all checkpoints, complete or not, oldest first."""
        return checkpoint_paths(self.folder)

    @progress("saving a checkpoint")
    def save(
        self,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict,
        metric: float | None = None,
        metric_of: str | None = None,
        prune: bool = True,
    ) -> Path:
        """Writes a checkpoint and removes outdated ones.

        Args:
            step: updates done.
            tensors: file name without extension -> name -> tensor, on any device. Tensors with common memory are stored
                once if they are the same view of it, otherwise separately.
            state: values for JSON, without NaN and infinities.
            metric: lower is better; None and NaN are never the best.
            metric_of: what was measured; metrics of something else are not compared with this one.
            prune: remove outdated checkpoints now; if false, a later save removes them.

        Returns:
            The checkpoint's folder, flushed to the disk.

        Raises:
            NotFiniteError: a tensor contains NaN or an infinity.
            UserError: no space or no permission. Older checkpoints remain unchanged.
            ValueError: `state` contains NaN or an infinity.
        """
        path = self.folder / f"step-{step:08d}"
        require_finite(tensors, f"the state after step {step}")
        if metric is not None and not math.isfinite(metric):
            metric = None
        with atomic_folder(path) as folder:
            for name, group in tensors.items():
                _write_tensors(folder / f"{name}.safetensors", group)
            (folder / "state.json").write_text(json.dumps(state, indent=1, allow_nan=False), encoding="utf-8")
            files = {
                file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())
            }
            manifest = {"format": FORMAT, "step": step, "metric": metric, "metric_of": metric_of, "files": files}
            manifest["seal"] = seal_of(manifest)
            (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, allow_nan=False), encoding="utf-8")
        if prune:
            self.prune(step, metric_of)
        return path

    def load_latest(self) -> Checkpoint | None:
        """The newest checkpoint in the folder, see `read_newest`."""
        return read_newest(self.folder, self.echo)

    def newest_whole(self) -> Path | None:
        """The folder of the checkpoint from which a resumed run would start; None if there is none."""
        for path in reversed(self.paths()):
            try:
                return _read(path).path
            except UnreadableError:
                raise
            except UserError:  # reported when the run is resumed
                continue
        return None

    def prune(self, step: int, metric_of: str | None = None) -> None:
        """Removes outdated checkpoints. The best one has the lowest metric of those that measured `metric_of`.

        Only checkpoints up to `step` are considered. Later ones exist if the run has resumed from an earlier
        checkpoint, perhaps because they are damaged: they must not cause the removal of the one just saved, and the run
        may overwrite them.
        """
        paths = [path for path in self.paths() if _step_of(path) <= step]
        metrics = {path: _metric_in(path, metric_of) for path in paths}
        retained = {*paths[-self.keep_last :], *(path for path in paths if _step_of(path) in self.keep)}
        measured = [path for path in paths if metrics[path] is not None]
        if measured:
            retained.add(min(measured, key=lambda path: metrics[path]))  # the earliest if several are equal
        with disk_errors(self.folder):
            for path in paths:
                if path not in retained:
                    # Renamed first, so that a killed process leaves a temporary folder and not a damaged checkpoint.
                    outdated = path.with_name(f".{path.name}.{os.getpid()}.tmp")
                    path.rename(outdated)
                    remove(outdated)


def checkpoint_paths(folder: Path) -> list[Path]:
    """Folders of all checkpoints in `folder`, complete or not, oldest first; empty if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _FOLDER.fullmatch(path.name)), key=_step_of)


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Reads and verifies the checkpoint in `path`. Nothing is written or removed: its run may still be training.

    Raises:
        UserError: it is missing, renamed or damaged, or its tensors are not finite.
    """
    path = Path(path).resolve()
    if not path.is_dir():
        existing = ", ".join(other.name for other in checkpoint_paths(path.parent)) if path.parent.is_dir() else ""
        raise UserError(f"there is no checkpoint {path}; those in {path.parent}: {existing or 'none'}")
    if not _FOLDER.fullmatch(path.name):
        raise UserError(f"the checkpoint {path} was renamed; rename it to step-... again")
    try:
        return _read(path)
    except NotFiniteError as error:
        raise NotFiniteError(f"{error}; use an earlier checkpoint") from None
    except UnreadableError:
        raise
    except UserError as error:
        raise UserError(f"{error}; restore the file, or delete {path} and use another checkpoint") from None


def read_newest(folder: Path, echo: Callable[[str], None]) -> Checkpoint | None:
    """Reads the newest checkpoint in `folder` that is complete and finite; None if there are no checkpoints. `echo`
    reports newer ones that are damaged. Nothing is written or removed.

    Raises:
        UserError: there are checkpoints, but none of them is complete and finite.
    """
    damaged: list[str] = []
    for path in reversed(checkpoint_paths(folder)):
        try:
            checkpoint = _read(path)
        except UnreadableError:  # resuming from an older one would lose steps
            raise
        except UserError as error:
            damaged.append(str(error))
            continue
        for problem in damaged:
            echo(f"{problem}; {path.name} is used")
        return checkpoint
    if damaged:
        raise UserError(
            f"no checkpoint in {folder} is whole: {'; '.join(damaged)}. "
            "Restore one of them, or move the folder away to start again"
        )
    return None


def on_all_ranks(world: World, checkpoint: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint that the first rank has read."""
    if world.size == 1:
        return checkpoint
    found = world.first_decides(
        lambda: checkpoint and {name: getattr(checkpoint, name) for name in ("step", "state", "metric", "metric_of")}
    )
    path = Path() if checkpoint is None else checkpoint.path
    tensors = None if checkpoint is None else checkpoint.tensors
    return found and Checkpoint(path, **found, tensors=world.from_first(tensors))


def read_state(path: Path) -> tuple[int, dict]:
    """Step and state of the checkpoint in `path`; its tensors are not read. Raises a UserError if a file is missing or
    damaged."""
    manifest, file = _read_manifest(path), path / "state.json"
    if not file.is_file() or _sha256(file) != manifest["files"]["state.json"]["sha256"]:
        raise UserError(f"the checkpoint file {file} is damaged: its SHA-256 does not match")
    return manifest["step"], read_json(file, "the checkpoint's state", dict)


def check_space(
    folder: Path | str, bytes_needed: int, what: str = "checkpoints need", remedy: str = "keep fewer checkpoints"
) -> None:
    """Checks, before work starts, that `bytes_needed` can be written to `folder`, which need not exist yet.

    Args:
        what, remedy: parts of the message: what needs the space, and what else the user can do.

    Raises:
        UserError: the disk has less free space.
    """
    free = free_space(folder)
    if free < bytes_needed:
        raise UserError(
            f"{what} {amount(bytes_needed, 'B')} and the disk of {folder} has {amount(free, 'B')} left; "
            f"free up space, choose another folder, or {remedy}"
        )


def free_space(folder: Path | str) -> int:
    """Free bytes on the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path | str) -> Path:
    """`folder`, or its nearest parent that exists."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return path


def _step_of(path: Path) -> int:
    return int(_FOLDER.fullmatch(path.name)[1])


def _metric_in(path: Path, metric_of: str | None) -> float | None:
    """The metric of a checkpoint; None if it has none, or one of something else than `metric_of`."""
    try:
        manifest = _read_manifest(path)
        return manifest["metric"] if manifest.get("metric_of") == metric_of else None
    except UnreadableError:  # it may be the best checkpoint
        raise
    except UserError:  # a damaged checkpoint is never the best
        return None


def _sha256(path: Path) -> str:
    with open_input(path) as file, input_errors(path):
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> dict:
    file = path / "manifest.json"
    manifest = read_json(file, "the checkpoint's manifest", dict)
    if manifest.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{file} has format {brief(manifest['format'])}, but this version of fastbert reads format {FORMAT}"
        )
    if manifest.get("seal") != seal_of(manifest):
        raise UserError(f"the checkpoint's manifest {file} is damaged: its hash does not match")
    manifest = check(finite_or_none(manifest), _MANIFEST, f"the checkpoint's manifest {file}")
    if unexpected := [name for name in manifest["files"] if not _FILE.fullmatch(name)]:
        raise UserError(f"the checkpoint's manifest {file} is damaged: {brief(unexpected[0])} is not a checkpoint file")
    if manifest["step"] != _step_of(path):
        raise UserError(f"the checkpoint {path} was renamed: it is from step {manifest['step']}")
    return manifest


@progress("reading a checkpoint")
def _read(path: Path) -> Checkpoint:
    """Verifies sizes and hashes, reads the files, and checks that all numbers are finite."""
    manifest = _read_manifest(path)
    files = {path / name: expected for name, expected in manifest["files"].items()}
    for file, expected in files.items():
        if not file.is_file():
            raise UserError(f"the checkpoint file {file} is missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise UserError(f"the checkpoint file {file} is damaged: {size} bytes instead of {expected['bytes']}")
    for file, expected in files.items():
        if _sha256(file) != expected["sha256"]:
            raise UserError(f"the checkpoint file {file} is damaged: its SHA-256 does not match")
    tensors = {file.stem: _read_tensors(file) for file in files if file.suffix == ".safetensors"}
    require_finite(tensors, f"the checkpoint {path}")
    state = read_json(path / "state.json", "the checkpoint's state", dict)
    return Checkpoint(path, manifest["step"], tensors, state, manifest["metric"], manifest.get("metric_of"))


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file. The format has no shared memory: equal views become aliases, overlapping ones are
    copied."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    views: dict[tuple, str] = {}
    storages: set[tuple] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        view = (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and view in views:
            aliases[name] = views[view]
            continue
        views[view] = name
        stored[name] = tensor.clone() if storage in storages else tensor
        stored[name] = stored[name].cpu().contiguous()
        storages.add(storage)
    with _safetensors_errors():
        safetensors.torch.save_file(stored, path, metadata={_ALIASES: json.dumps(aliases, allow_nan=False)})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    tensors, metadata = read_tensors(path)
    where = f"the checkpoint file {path}"
    aliases = parse_json(metadata.get(_ALIASES, "null"), where, {str: str})
    if lost := [target for target in aliases.values() if target not in tensors]:
        raise UserError(f"{where} is damaged: {brief(lost[0])} is missing")
    return tensors | {name: tensors[target] for name, target in aliases.items()}


@contextmanager
def _safetensors_errors():
    """Converts errors of the operating system, which safetensors reports as text, to OSErrors."""
    try:
        yield
    except safetensors.SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number:
            raise OSError(int(number[1]), str(error)) from error
        if "StorageFull" in str(error):
            raise OSError(errno.ENOSPC, str(error)) from error
        raise
