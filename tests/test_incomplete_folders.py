"""A folder whose creation was killed is started again by the same command, at whatever operation the kill came; a
folder that contains something else is not mistaken for one."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastbert.errors import UserError
from fastbert.files import LOCK, locked_folder
from fastbert.finetuning import folder, several_tasks
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.setup import describe_finetuning, prepare_finetuning
from fastbert.flags import parse
from fastbert.pretraining.build import describe_experiment
from fastbert.pretraining.options import PretrainOptions, science
from fastbert.pretraining.run import RunFolder, new_folder, stored_options
from fastbert.pretraining.setup import data_fingerprint, prepare_setup
from fastbert.studies.engine import store
from fastbert.studies.engine.store import ResultStore
from fastbert.studies.shared.finetune_jobs import check_tuned
from tests.finetuning.conftest import make_task, tiny_model
from tests.processes import kills
from tests.test_cli import refused


def every_kill(out: Path, make: Callable[[], object], check: Callable[[], object]) -> int:
    """Kills `make` before each of its changes, every time in a new folder; `check` looks at what is there, and at once
    after it `make` must come to its end."""
    count = 0
    for _ in kills(make, out.parent):
        check()
        make()
        shutil.rmtree(out)
        count += 1
    shutil.rmtree(out)
    return count


@pytest.fixture(autouse=True)
def machine(monkeypatch) -> None:
    """It takes a while to describe."""
    for module in (folder, store):
        monkeypatch.setattr(module, "describe_machine", dict)


def test_a_run(flags, tmp_path) -> None:
    setup = prepare_setup(parse(PretrainOptions, flags, "pretrain"))
    manifest = describe_experiment(setup, science(setup.options, data_fingerprint(setup.dataset)))
    out, begun = tmp_path / "run", []

    def make() -> None:
        run = RunFolder(out) if begun else new_folder(str(out), "name")
        with locked_folder(out):
            run.write(setup.options, manifest, setup.dataset.tokenizer)

    def check() -> None:
        begun.clear()
        if (out / "manifest.json").exists():  # then it can be resumed, and not be begun again
            begun.append(True)
            assert stored_options(str(out)) == setup.options
            with pytest.raises(UserError, match="already contains a run; resume it with --resume"):
                new_folder(str(out), "name")
        elif out.exists() and (out / LOCK).exists():
            with pytest.raises(UserError, match=r"without --resume|leave --resume out"):
                stored_options(str(out))

    assert every_kill(out, lambda: (make(), begun.clear())[0], check) > 12


def test_the_users_own_files_are_no_incomplete_run(tmp_path) -> None:
    for name in ("config.yaml", "tokenizer", "text.txt"):
        out = tmp_path / name / "out"
        out.mkdir(parents=True)
        (out / name).touch()
        with pytest.raises(UserError, match="already contains"):
            new_folder(str(out), "name")
    (tmp_path / "locked").mkdir()
    for name in (LOCK, "config.yaml", "notes.txt"):
        (tmp_path / "locked" / name).touch()
    with pytest.raises(UserError, match="already contains"):
        new_folder(str(tmp_path / "locked"), "name")


def test_a_run_that_another_process_has_begun_meanwhile(flags, tmp_path, monkeypatch, capsys) -> None:
    def late(*parts: object) -> dict:
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        return {}

    monkeypatch.setattr("fastbert.pretraining.pretrain.describe_experiment", late)
    assert "another process has started a run" in refused(capsys, "pretrain", *flags, "--out", tmp_path / "run")


def test_a_fine_tuning(tmp_path, capsys) -> None:
    flags = ["--model", str(tiny_model(tmp_path)), *make_task(tmp_path, "words", 16, 8), "--machine.threads", "1"]
    out = tmp_path / "outs" / "out"
    out.parent.mkdir()
    setup = prepare_finetuning(parse(FinetuneOptions, [*flags, "--out", str(out)], "finetune"))

    def make() -> None:
        with locked_folder(out):
            folder.open_folder(out, setup, describe_finetuning(setup))

    assert every_kill(out, make, lambda: None) > 6
    out.mkdir()
    (out / "config.yaml").touch()  # not fastbert's: there is no lock
    assert "not empty and holds no results" in refused(capsys, "finetune", *flags, "--out", out)


def test_several_fine_tunings_and_a_sweep(tmp_path) -> None:
    out = tmp_path / "outs" / "out"
    out.parent.mkdir()

    def write_options() -> None:
        several_tasks.check_tasks_folder(FinetuneOptions(out=str(out)))
        folder.write_options(out, FinetuneOptions())

    def open_sweep() -> None:
        with locked_folder(out):
            ResultStore(out, "sweep", check_tuned).begin({}, [])

    assert every_kill(out, write_options, lambda: None) > 2
    assert every_kill(out, lambda: open_sweep() if not (out / "sweep.json").exists() else None, lambda: None) > 4
