"""Links, locks and folders that somebody has planted are not followed; leftovers of killed processes are removed."""

import json
import os
from pathlib import Path

import pytest
from fastbert_kernels import configurations

from fastbert.data import partial
from fastbert.data.prepare import PrepareOptions, prepare
from fastbert.errors import UserError
from fastbert.files import LOCK, atomic_file, atomic_folder, locked_folder, new_folder, remove_leftovers
from fastbert.studies.engine.jobs import run_job
from fastbert.studies.engine.outcomes import LOG
from fastbert.training.logbook import Logbook

# --- what others have planted


@pytest.fixture
def target(tmp_path) -> Path:
    path = tmp_path / "target"
    path.write_text("precious")
    return path


def test_no_lock_and_no_temporary_file_follows_a_link(tmp_path, target) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / LOCK).symlink_to(target)
    with pytest.raises(UserError, match=r"the lock .* is a link; remove it"), locked_folder(folder):
        pass
    (folder / LOCK).unlink()
    for name in (f".x.{os.getpid()}.tmp", f".y.{os.getpid()}.tmp"):
        (folder / name).symlink_to(target)
    with atomic_file(folder / "x", "w") as file:
        file.write("new")
    with atomic_folder(folder / "y") as inside:
        (inside / "z").write_text("new")
    remove_leftovers(folder)
    assert target.read_text() == "precious" and (folder / "x").read_text() == (folder / "y" / "z").read_text() == "new"


def test_no_lock_is_truncated(tmp_path) -> None:
    (tmp_path / LOCK).write_text("precious")
    with locked_folder(tmp_path):
        pass
    assert (tmp_path / LOCK).read_text() == "precious"


def test_files_of_a_run_are_not_written_through_links(tmp_path, target) -> None:
    (tmp_path / "run").mkdir()
    for name in ("metrics.jsonl", "config.yaml"):
        (tmp_path / "run" / name).symlink_to(target)
    with Logbook(tmp_path / "run", 1, quiet=True) as logbook:
        logbook.log(1, "train", {"loss": 1.0})
    with atomic_file(tmp_path / "run" / "config.yaml", "w") as file:
        file.write("new")
    assert target.read_text() == "precious"
    assert "loss" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_jobs_log_is_not_written_through_a_link(tmp_path, target) -> None:
    (tmp_path / LOG).symlink_to(target)
    outcome = run_job({"folder": "nowhere"}, tmp_path)
    assert outcome["status"] == "failed" and "a link in that path is not followed" in outcome["reason"]
    assert target.read_text() == "precious"


def test_what_was_tuned_is_not_written_through_a_link(tmp_path, target, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = configurations.file_of("GPU")
    path.parent.mkdir()
    path.with_suffix(f".{os.getpid()}").symlink_to(target)
    path.symlink_to(target)
    assert configurations.save_tuned({}, "GPU") == path
    assert target.read_text() == "precious" and '"device": "GPU"' in path.read_text()


def test_a_link_instead_of_a_folder_is_replaced(tmp_path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("precious")
    for name, leads_to in (("x", "theirs"), ("y", "nothing")):
        (tmp_path / name).symlink_to(leads_to)
        with atomic_folder(tmp_path / name) as inside:
            (inside / "new").touch()
        assert not (tmp_path / name).is_symlink() and (tmp_path / name / "new").exists()
    assert (tmp_path / "theirs" / "file").read_text() == "precious"


def test_prepare_does_not_work_in_a_planted_folder(corpus, tmp_path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("precious")
    (tmp_path / ".out.partial").symlink_to("theirs")
    with pytest.raises(UserError, match=r"\.out\.partial, the folder for unfinished work, is a link"):
        prepare(PrepareOptions(str(corpus), str(tmp_path / "out"), vocab_size=600, workers=1))
    assert (tmp_path / "theirs" / "file").read_text() == "precious"


@pytest.mark.parametrize("names", [["../target"], ["{}/target"], [".."], ["."], [""], [1], {"target": 1}, "target"])
@pytest.mark.parametrize("same", [False, True])
def test_names_that_a_killed_prepare_noted_lead_nowhere_else(tmp_path, target, names, same: bool) -> None:
    """They are moved, or with other options removed."""
    out = tmp_path / "out"
    folder = out / partial.WITHIN
    folder.mkdir(parents=True)
    (folder / "target").write_text("moved")
    names = (
        [name.format(tmp_path) if isinstance(name, str) else name for name in names] if type(names) is list else names
    )
    (folder / partial.MOVED).write_text(json.dumps(names))
    (folder / partial.MADE_OF).write_text(json.dumps({"seed": 0}))
    with (
        pytest.raises(UserError, match=r"moved\.json is damaged: .*; remove .*partial to start from the beginning"),
        partial.partial_folder(out, {"seed": 0 if same else 1}),
    ):
        pass
    assert target.read_text() == "precious" and out.is_dir()


@pytest.mark.parametrize("name", [".keys", "train-00000.tokens.npy", ".state.npz", "tokenizer", "tokenizer/vocab.txt"])
@pytest.mark.parametrize("plant", [os.symlink, os.link])
def test_prepare_does_not_resume_among_planted_links(tmp_path, target, plant, name: str) -> None:
    folder = tmp_path / ".out.partial"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / partial.MADE_OF).write_text("{}")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / ".x.0123abcd.tmp").write_text("precious")
    if name == "tokenizer":
        (folder / name).rmdir()
        (folder / name).symlink_to(theirs)
    else:
        plant(target, folder / name)
    with partial.partial_folder(tmp_path / "out", {}) as found:
        assert sorted(os.listdir(found.folder)) == [LOCK, partial.MADE_OF]
        (found.folder / "new").touch()
    assert target.read_text() == (theirs / ".x.0123abcd.tmp").read_text() == "precious"


def test_leftovers_of_killed_processes_go_and_living_ones_stay(tmp_path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / ".a.0123abcd.tmp").mkdir()
    (tmp_path / ".b.77.tmp").write_text("half")
    (tmp_path / ".c.0123abcd.old.tmp").mkdir()
    (tmp_path / ".d.0123abcd.tmp").symlink_to("theirs")
    (tmp_path / ".e.mine.tmp").touch()
    living, handle = new_folder(tmp_path / "f")
    with atomic_file(tmp_path / "g", "w") as file:
        file.write("new")
        remove_leftovers(tmp_path, "a")
        assert not (tmp_path / ".a.0123abcd.tmp").exists() and (tmp_path / ".b.77.tmp").exists()
        remove_leftovers(tmp_path)
    os.close(handle)
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "c", ".d.0123abcd.tmp", living.name, "g"}
