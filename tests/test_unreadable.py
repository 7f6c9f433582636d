"""Files that exist and cannot be read: no permission, limits. They are not treated as damaged."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from fastbert import cli
from fastbert.data.array_files import map_array
from fastbert.data.columns import Columns
from fastbert.data.integrity import hash_of, npy_header
from fastbert.data.partial import Partial, partial_folder
from fastbert.data.sources import open_source
from fastbert.data.tables import read_rows
from fastbert.errors import UserError
from fastbert.files import atomic_file, disk_errors
from fastbert.hub.weight_files import read_weights
from fastbert.inputs import UnreadableError, open_input, read_text_input
from fastbert.pretraining.run import RunFolder
from fastbert.studies.engine.store import read_result_rows
from fastbert.studies.shared.finetune_jobs import check_tuned
from fastbert.training.checkpoints import Checkpointer, read_newest
from fastbert.training.logbook import read_metrics
from fastbert.training.tensors import read_metadata, read_tensors
from tests.processes import in_child

# --- files without permission


def as_nobody(action: Callable[[], object]) -> int:
    """The exit code of `action` in a process that may read nothing of this one's."""
    return in_child(action, (lambda: os.setuid(65534)) if os.getuid() == 0 else lambda: None)


def let_pass(folder: Path) -> None:
    """Lets every user into `folder`, through those above it that pytest has made."""
    for above in (folder, *folder.parents):
        if above.stat().st_mode & 0o005 != 0o005:
            above.chmod(0o755)


def test_files_that_may_not_be_read(tmp_path) -> None:
    import pyarrow.parquet

    (tmp_path / "open").mkdir()
    folder = tmp_path / "open"
    let_pass(folder)
    safetensors.torch.save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")
    (folder / "numbers.npy").write_bytes(npy_header(np.dtype("uint16"), 2) + bytes(4))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), folder / "t.parquet")
    np.savez(folder / ".state.npz", record=np.zeros(1, np.uint8))
    for name in ("results.jsonl", "metrics.jsonl", "a.txt", "a.txt.gz", "t.jsonl"):
        (folder / name).write_text("{}\n")

    def source(path: Path) -> object:
        return open_source(str(path), "text")

    reads = {
        "model.safetensors": [read_metadata, read_tensors, lambda path: read_weights(path.parent)],
        "pytorch_model.bin": [_bare],
        "numbers.npy": [partial(map_array, dtype=np.dtype("uint16")), hash_of],
        "t.parquet": [
            lambda path: list(read_rows(path, Columns(("text",)))),
            source,
        ],
        ".state.npz": [lambda path: Partial(path.parent).load()],
        "results.jsonl": [lambda path: read_result_rows(path, check_tuned)],
        "metrics.jsonl": [read_metrics],
        "a.txt": [read_text_input, source],
        "a.txt.gz": [source],
        "t.jsonl": [lambda path: list(read_rows(path, Columns(("text",))))],
    }
    assert {path.name for path in folder.iterdir()} == set(reads)
    for path in folder.iterdir():
        path.chmod(0)

    def check() -> int:
        for name, functions in reads.items():
            for read in functions:
                try:
                    read(folder / name)
                except UnreadableError as error:
                    assert "no permission to read" in str(error) and name in str(error), error
                else:
                    raise AssertionError(f"{name} was read")
        return 0

    assert as_nobody(check) == 0


def _bare(path: Path) -> object:
    """The weights of a folder that has no safetensors."""
    real = Path.is_file
    try:
        Path.is_file = lambda self: self.name != "model.safetensors" and real(self)
        return read_weights(path.parent)
    finally:
        Path.is_file = real


def test_a_folder_that_may_not_be_searched(tmp_path, capfd) -> None:
    let_pass(tmp_path)
    (tmp_path / "shut").mkdir()
    (tmp_path / "shut" / "a.yaml").write_text("seed: 1")
    (tmp_path / "shut").chmod(0)
    tmp_path.chmod(0o755)
    for arguments in (["pretrain", f"{tmp_path}/shut/a.yaml"], ["export", f"{tmp_path}/shut/model", "--out", "/tmp/x"]):
        assert as_nobody(partial(cli.main, arguments)) == 2
        assert "no permission" in (printed := capfd.readouterr().err) and printed.count("\n") == 1


@contextmanager
def limited(what: int, most: int) -> Iterator[None]:
    before = resource.getrlimit(what)
    resource.setrlimit(what, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def test_too_many_open_files(tmp_path) -> None:
    (tmp_path / "a").write_text("x")
    with limited(resource.RLIMIT_NOFILE, 3):
        with pytest.raises(UnreadableError, match=r"cannot be read: too many files are open; .*ulimit -n"):
            open_input(tmp_path / "a")
        with pytest.raises(UserError, match=r"too many files .*ulimit -n"), atomic_file(tmp_path / "b"):
            pass
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_over_the_limit(tmp_path) -> None:
    with (
        limited(resource.RLIMIT_FSIZE, 1000),
        pytest.raises(UserError, match=r"larger than the limit .*ulimit -f"),
        atomic_file(tmp_path / "b") as file,
    ):
        np.save(file, np.ones(1000))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_was_removed_meanwhile(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    with (
        pytest.raises(UserError, match="its folder was removed in the meantime"),
        atomic_file(tmp_path / "run" / "a") as file,
    ):
        file.write(b"x")
        file.flush()
        for path in (tmp_path / "run").iterdir():
            path.unlink()
        (tmp_path / "run").rmdir()
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path / "a"):
        raise FileNotFoundError(errno.ENOENT, "internal", "b")


# --- what cannot be read is not damaged


@pytest.fixture
def run_of_two(tmp_path) -> Checkpointer:
    checkpointer = Checkpointer(tmp_path / "checkpoints", 1, lambda _: None)
    for step, loss in ((1, 0.5), (2, 0.9)):
        checkpointer.save(step, {"model": {"w": torch.ones(2)}}, {}, loss)
    return checkpointer


def refusing(monkeypatch, name: str) -> None:
    real = os.open

    def refuse(path, *arguments, **more) -> int:
        if str(path).endswith(name):
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", refuse)


def test_checkpoints_that_cannot_be_read_are_neither_passed_over_nor_removed(run_of_two, monkeypatch) -> None:
    """The one of step 1 is the best, that of step 2 the newest."""
    with monkeypatch.context() as patch:
        refusing(patch, "step-00000002/model.safetensors")
        for find in (partial(read_newest, run_of_two.folder, pytest.fail), run_of_two.newest_whole):
            with pytest.raises(UnreadableError, match=r"step-00000002/model\.safetensors"):
                find()
    with monkeypatch.context() as patch:
        refusing(patch, "step-00000001/manifest.json")
        with pytest.raises(UnreadableError):
            run_of_two.prune(2)
    assert len(run_of_two.paths()) == 2


def test_what_a_run_is_is_not_written_anew(tmp_path, monkeypatch) -> None:
    run = RunFolder(tmp_path)
    run.tokenizer.mkdir()
    (run.tokenizer / "tokenizer.json").write_text("{}")
    refusing(monkeypatch, "tokenizer.json")
    with pytest.raises(UnreadableError):
        run.restore_tokenizer(None)
    assert (run.tokenizer / "tokenizer.json").stat().st_size == 2


def test_what_an_interrupted_preparation_left_is_not_dropped(tmp_path, monkeypatch) -> None:
    left = tmp_path / ".out.partial"
    with pytest.raises(KeyboardInterrupt), partial_folder(tmp_path / "out", {"a": 1}) as part:
        part.save({"b": 2}, {"c": np.ones(3)})
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        refusing(patch, ".state.npz")
        with pytest.raises(UnreadableError), partial_folder(tmp_path / "out", {"a": 1}) as part:
            part.load()
    assert (left / ".state.npz").is_file()
