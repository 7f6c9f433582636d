"""Between two sessions of a run its data, manifest, options and records may be damaged: training never uses damaged
content, and values that the hashed checkpoint has are read from it."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.flags import main
from tests.pretraining.test_resume import assert_same_run, metrics


@pytest.fixture(scope="module")
def whole(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, and its data."""
    folder = tmp_path_factory.mktemp("damage")
    data = shutil.copytree(prepared, folder / "data")
    shape = ["--layers", "1", "--width", "16", "--heads", "2", "--length", "32", "--batch-size", "8"]
    steps = ["--steps", "12", "--eval-every", "4", "--checkpoint-every", "8", "--log-every", "2"]
    more = ["--eval-sequences", "16", "--machine.threads", "1", "--schedule.warmup", "0.1"]
    assert main(["pretrain", "--data", str(data), *shape, *steps, *more, "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """The run after 8 of its 12 steps, with its own copy of the data in `data` next to it."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for path in (run / "checkpoints").iterdir():
        if path.name != "step-00000008":
            shutil.rmtree(path)
    shutil.copytree(whole.parent / "data", tmp_path / "data")
    edit(run / "manifest.json", lambda manifest: manifest["data"].update(folder=str(tmp_path / "data")))
    return run


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def resumed(run: Path, capsys, *flags: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main(["pretrain", "--resume", str(run), *flags]) == code
    return " ".join(capsys.readouterr().err.split())


def flip_a_token(run: Path) -> None:
    path = run.parent / "data" / "train-00000.tokens.npy"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_data_that_changed_between_two_sessions(whole: Path, run: Path, capsys) -> None:
    assert "seal" in json.loads((run.parent / "data" / "dataset.json").read_text())
    printed = resumed(run, capsys, "--verify-data")
    assert "metrics.jsonl" not in printed and "manifest.json" not in printed and "config.yaml" not in printed
    assert_same_run(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    flip_a_token(run)  # as a disk does it: nothing else changes
    assert "tokens.npy is damaged" in resumed(run, capsys, "--verify-data", code=2)
    assert "verify_data: true" not in (run / "config.yaml").read_text()
    os.utime(run.parent / "data" / "train-00000.tokens.npy")
    assert "tokens.npy is damaged" in resumed(run, capsys, code=2)
    new = ["pretrain", "--data", str(run.parent / "data"), "--steps", "1", "--out", str(run.parent / "new")]
    assert main(new) == 2 and not (run.parent / "new").exists()


@pytest.mark.parametrize("damage", ["encoder", "science", "cut", "missing", "branch"])
def test_a_damaged_manifest_is_overruled_by_the_checkpoint(whole: Path, run: Path, capsys, damage: str) -> None:
    manifest, message = run / "manifest.json", "differs from that in"
    if damage == "encoder":
        edit(manifest, lambda content: content["encoder"].update(dropout=0.0, norm_eps=0.1))
        message = "norm_eps: 1e-12 -> 0.1"
    elif damage == "science":
        edit(manifest, lambda content: content["science"].update(seed=5))
        message = "seed: 0 -> 5"
    elif damage == "cut":
        manifest.write_bytes(manifest.read_bytes()[:-30])
        message = "is damaged"
    elif damage == "missing":
        manifest.unlink()
        message = "does not exist; it is written again"
    else:  # it claims to have begun with another run's checkpoint
        edit(manifest, lambda content: content.update(branch={"step": 8, "science": content["science"] | {"seed": 5}}))
        edit(manifest, lambda content: content["science"].update(seed=5))
        message = "seed: 0 -> 5"
    data = () if manifest.exists() else ("--data", str(run.parent / "data"))
    assert message in resumed(run, capsys, *data)
    assert_same_run(whole, run)
    anew, true = (json.loads((folder / "manifest.json").read_text()) for folder in (run, whole))
    assert all(anew[name] == true[name] for name in ("encoder", "science", "experiment"))


def test_a_damaged_config_is_overruled_or_refused(whole: Path, run: Path, capsys) -> None:
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("seed: 0", "seed: 1"))
    printed = resumed(run, capsys, code=2)
    assert "seed: 0 -> 1" in printed and "config.yaml was changed after the run was started: restore seed" in printed
    config.write_text(
        text.replace("notes:\n  enabled: false", "notes:\n  enabled: true")
    )  # as if these were new options
    printed = resumed(run, capsys, code=2)
    assert "The run has no notes.enabled, notes.half_window" in printed and "by an older version of fastbert" in printed
    config.write_text(text.replace("eval_sequences: 16", "eval_sequences: 20"))
    printed = resumed(run, capsys)
    assert "config.yaml was changed after the run was started: eval_sequences: 16 -> 20" in printed
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    for damage in (lambda: config.write_text("steps: [1"), config.unlink):
        damage()
        printed = resumed(run, capsys)
        assert "config.yaml" in printed and "is written again" in printed
        assert_same_run(whole, run)
        assert config.read_text() == text.replace(f"out: {whole}", f"out: {run}")
        shutil.rmtree(run / "checkpoints" / "step-00000012")


@pytest.mark.parametrize("name", ["checkpoints", "report", "model"])
def test_folders_of_a_run_that_were_replaced_by_links(run: Path, capsys, name: str) -> None:
    theirs = run.parent / "theirs"
    theirs.mkdir()
    (theirs / ".x.0123abcd.tmp").touch()
    shutil.rmtree(run / name)
    (run / name).symlink_to(theirs)
    before = (run / "metrics.jsonl").stat().st_mtime_ns
    assert f"{run / name} is a link, which is not followed" in resumed(run, capsys, code=2)
    assert os.listdir(theirs) == [".x.0123abcd.tmp"]
    assert (run / "metrics.jsonl").stat().st_mtime_ns == before


def test_files_of_a_run_that_were_replaced_by_folders(whole: Path, run: Path, capsys) -> None:
    for name in ("manifest.json", "config.yaml"):
        (run / name).unlink()
        (run / name).symlink_to(run.parent)
    (run / "checkpoints" / "step-00000020").touch()
    (run / "checkpoints" / "step-00000004").symlink_to(run.parent)
    report = resumed(run, capsys)
    assert (
        "manifest.json is damaged: it is a folder" in report and "step-00000020/manifest.json does not exist" in report
    )
    assert_same_run(whole, run)
    assert (run.parent / "data").is_dir()
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert "metrics.jsonl: it is a folder" in resumed(run, capsys, code=2)


def test_records_that_are_damaged_or_missing_are_reported(whole: Path, run: Path, capsys) -> None:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines[:6]] == [2, 4, 4, 6, 8, 8]
    damaged = [lines[0], lines[1][:30] + "\n", *lines[2:5], lines[2], lines[5]]
    metrics.write_text("".join(damaged))
    printed = resumed(run, capsys)
    assert (
        "metrics.jsonl was changed after it was logged up to step 8: damaged: line 2; repeated: line 6; missing: 1 of 6"
        in printed
    )
    assert "train after line 1 (step 2)" in printed
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [2, 4, 6, 8, 8, 10, 12, 12]
    shutil.rmtree(run / "checkpoints" / "step-00000008")  # the next checkpoint knows what is left
    assert "metrics.jsonl is not as" not in resumed(run, capsys)
    assert (run / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


def test_checkpoints_that_a_killed_save_did_not_remove(whole: Path, run: Path, capsys) -> None:
    """All checkpoints are written, and the newest is the run's last: no later save would remove the older ones."""
    last = "step-00000012"
    shutil.copytree(whole / "checkpoints" / last, run / "checkpoints" / last)
    best = min(row["loss"] for row in metrics(whole) if row["split"] == "validation")
    names = sorted(os.listdir(whole / "checkpoints"))
    assert metrics(whole)[-1]["loss"] == best and "step-00000008" in names
    resumed(run, capsys, "--keep-checkpoints", "1")
    assert os.listdir(run / "checkpoints") == [last]


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt and tokenizer.json"])
def test_the_tokenizer_of_the_run(name: str, whole: Path, run: Path, capsys) -> None:
    """Damaged, or replaced by another one of equal size: the export has the tokenizer of the weights."""
    if name == "tokenizer.json":
        (run / "tokenizer" / name).write_bytes(b"{")
    else:
        (run / "tokenizer" / "tokenizer.json").unlink()
        tokens = (run / "tokenizer" / "vocab.txt").read_text().split("\n")
        (run / "tokenizer" / "vocab.txt").write_text("\n".join([*tokens[:5], *tokens[-2:4:-1], ""]))
    assert "tokenizer" in (printed := resumed(run, capsys)) and "it is written again" in printed
    for path in ("tokenizer/tokenizer.json", "model/tokenizer.json", "model/model.safetensors"):
        assert (run / path).read_bytes() == (whole / path).read_bytes()


def test_all_records_are_lost(whole: Path, tmp_path: Path, capsys) -> None:
    """After the last checkpoint, so that no record is logged any more: the run still finishes, without curves."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "report")
    printed = resumed(run, capsys)
    assert "missing: 9 of 9 records" in printed and "no curves are plotted: there is no loss to" in printed
    assert (run / "model" / "model.safetensors").is_file()
    assert {*os.listdir(run / "report")} == {"summary.json", "index.html"}
