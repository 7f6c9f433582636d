"""Sweeps at work: results that do not depend on the workers, jobs that are not run twice, folders that are refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from fastbert.cli import main
from fastbert.errors import UserError
from fastbert.studies.engine.store import ResultStore, read_result_rows
from fastbert.studies.shared.finetune_jobs import check_tuned
from fastbert.studies.sweep.options import load_sweep
from tests.studies.conftest import FINETUNE, read_rows, without_times, write_sweep


def test_what_a_sweep_leaves(finished, models, words, tmp_path) -> None:
    rows = read_rows(finished)
    assert [(row["model"], row["seed"]) for row in rows] == [("narrow", 0), ("narrow", 1), ("tupe", 0), ("tupe", 1)]
    row = rows[3]
    assert row["status"] == "done" and row["task"] == "words" and row["metrics"] == ["accuracy"]
    assert (row["learning_rate"], row["batch_size"], row["epochs"], row["train_examples"]) == (3e-3, 16, 2, 64)
    assert row["seconds"] > 0 and row["precision"] == "fp32" and row["configuration"]["dropout"] == 0.1
    assert "step 8/8" in (Path(row["folder"]) / "log.txt").read_text()
    assert (Path(row["folder"]) / "run" / "seed-1" / "metrics.jsonl").is_file()
    assert not list(finished.rglob("model.safetensors"))
    by_time = sorted(rows, key=lambda row: (Path(row["folder"]) / "log.txt").stat().st_mtime_ns)
    assert [row["model"] for row in by_time] == ["tupe", "tupe", "narrow", "narrow"]  # the longest first
    # The same as fastbert finetune with these options.
    flags = ["--model", models["tupe"], "--task", words, "--seeds", "1", "--first-seed", "1", "--no-save-model"]
    flags += ["--learning-rate", "3e-3", "--batch-size", "16", "--epochs", "2", "--machine.threads", "1"]
    flags += ["--machine.device", "cpu", "--machine.precision", "fp32", "--worst", "3"]
    assert main(["finetune", *flags, "--out", str(tmp_path / "alone")]) == 0
    (seed,) = json.loads((tmp_path / "alone" / "results.json").read_text())["fractions"][0]["seeds"]
    assert (seed["best"], seed["last"]) == (row["best"], row["last"])
    report = (finished / "report" / "report.md").read_text()
    assert ensemble_cells(report) == ensembles_by_hand(finished, words)
    assert "tupe compared with narrow" in report
    assert slice_cells(report) == slices_by_hand(finished, words)
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in report.splitlines() if line[:1] == "|"]
    config = json.loads((Path(models["narrow"]) / "config.json").read_text())
    size = f"{config['num_hidden_layers']} x {config['hidden_size']}"
    assert ["narrow", size, f"{config['num_attention_heads']}", "absolute"] in [row[:4] for row in cells]
    assert ["words", "classes", "accuracy", "64", "40"] in cells
    assert ["learning rate", "0.003"] in cells and ["epochs", "2"] in cells and ["seeds", "0, 1"] in cells


def ensemble_cells(report: str) -> dict[str, str]:
    """Checkpoint -> score of its ensemble in the first table of the report."""
    table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in report.splitlines() if line[:1] == "|"]
    column = table[0].index("ensemble")
    return {row[2]: row[column] for row in table[2:4]}


def ensembles_by_hand(out: Path, words: str) -> dict[str, str]:
    """The same from the files of the seeds: the class with the higher sum of probabilities."""
    dev = [json.loads(line) for line in (Path(words).parent / "dev.jsonl").read_text().splitlines()]
    labels = np.array([row["label"] == "good" for row in dev])
    sums: dict[str, np.ndarray] = {}
    for row in read_rows(out):
        file = Path(row["folder"]) / "run" / f"seed-{row['seed']}" / "dev_scores.safetensors"
        sums[row["model"]] = sums.get(row["model"], 0) + load_file(file)["dev"]
    return {model: f"{100 * (scores.argmax(1) == labels).mean():.2f}" for model, scores in sums.items()}


def slice_cells(report: str) -> dict[str, list[str]]:
    """Checkpoint -> its cells in the row of the slice `short`, from the number of examples."""
    lines = [line.strip("| ").split("|") for line in report.splitlines() if line.startswith("| words | short ")]
    return {row[3].strip(): [row[2].strip(), *(cell.strip() for cell in row[4:7])] for row in lines}


def slices_by_hand(out: Path, words: str) -> dict[str, list[str]]:
    dev = [json.loads(line) for line in (Path(words).parent / "dev.jsonl").read_text().splitlines()]
    short = np.array([len(row["text"].split()) <= 7 for row in dev])
    labels = np.array([row["label"] == "good" for row in dev])
    found: dict[str, list[float]] = {}
    for row in read_rows(out):
        file = Path(row["folder"]) / "run" / f"seed-{row['seed']}" / "dev_scores.safetensors"
        right = load_file(file)["dev"].argmax(1) == labels
        found.setdefault(row["model"], []).append(right[short].mean())
    assert 5 < short.sum() < 35
    means = {model: np.mean(values) for model, values in found.items()}
    apart = {"narrow": "–", "tupe": f"{100 * (means['tupe'] - means['narrow']):+.2f}"}
    return {model: [str(short.sum()), f"{100 * means[model]:.2f}", "2", apart[model]] for model in means}


def test_two_workers_give_what_one_gives(axes, finished, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["sweep", write_sweep(tmp_path, axes, workers=2), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert without_times(read_rows(out)) == without_times(read_rows(finished))
    assert "4 jobs: 2 checkpoints x 1 task x 2 seeds" in captured.err
    assert "4 of 4 done, 0 running, 0 failed, 0 left" in captured.err
    assert "report.html" in captured.out and "verdict" in captured.out


def test_a_finished_job_is_never_run_again(axes, finished, words, tmp_path, capsys) -> None:
    """Nothing to do: nothing is done. More seeds and another name: only what is new is run."""
    before = {path: path.stat().st_mtime_ns for path in finished.glob("jobs/*/log.txt")}
    renamed = [{"name": "thin", "path": axes["models"][0]["path"]}]
    assert main(["sweep", write_sweep(tmp_path, axes, models=renamed), "--out", str(finished)]) == 0
    assert "2 jobs: 1 checkpoint x 1 task x 2 seeds; 2 done before" in capsys.readouterr().err
    rows = read_rows(finished)
    assert [row["model"] for row in rows] == [
        "thin",
        "thin",
        "tupe",
        "tupe",
    ]  # rows that this call does not ask for stay
    assert main(["sweep", write_sweep(tmp_path, axes, seeds=[1, 0, 2], models=renamed), "--out", str(finished)]) == 0
    assert "3 jobs: 1 checkpoint x 1 task x 3 seeds; 2 done before" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(read_rows(finished)) == 5
    assert main(["sweep", write_sweep(tmp_path, axes), "--out", str(finished)]) == 0
    rows = read_rows(finished)
    assert len(rows) == 5 and [row["model"] for row in rows[:4]] == ["narrow", "narrow", "tupe", "tupe"]
    (finished / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))


def test_other_folders_are_refused(axes, finished, models, words, tmp_path, capsys) -> None:
    def error(out: Path, **changes) -> str:
        assert main(["sweep", write_sweep(tmp_path, axes, **changes), "--out", str(out)]) == 2
        return capsys.readouterr().err

    before = (finished / "results.jsonl").read_bytes()
    text = error(finished, finetune=FINETUNE | {"weight_decay": 0.5})
    assert "holds another sweep" in text and "finetune: {" in text and "'weight_decay': 0.5" in text
    assert (finished / "results.jsonl").read_bytes() == before
    assert "is not empty and holds no sweep" in error(Path(models["tupe"]))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    assert "is not empty and holds no sweep" in error(tmp_path / "thesis")
    assert os.listdir(tmp_path / "thesis") == ["chapter.txt"]


def test_a_damaged_line_is_named(axes, finished, tmp_path, capsys) -> None:
    path, results = write_sweep(tmp_path, axes), finished / "results.jsonl"
    before = results.read_bytes()
    digit = before.rindex(b'"accuracy": 0.') + 14
    for damaged in (
        before[:-40],
        bytes([*before[:digit], before[digit] ^ 1, *before[digit + 1 :]]),
        before[:-9] + b"\xff\n",
    ):
        results.write_bytes(damaged)
        try:
            assert main(["sweep", path, "--out", str(finished)]) == 2
            assert "results.jsonl, line 4 is damaged" in capsys.readouterr().err
        finally:
            results.write_bytes(before)


@pytest.mark.parametrize(("make", "message"), [(Path.mkdir, "is a folder"), (os.mkfifo, "is a pipe or a device")])
def test_results_that_are_no_file_are_refused_before_any_job(make, message: str, tmp_path) -> None:
    make(tmp_path / "results.jsonl")
    with pytest.raises(UserError, match=message):
        read_result_rows(tmp_path / "results.jsonl", check_tuned)


def test_the_example(tmp_path) -> None:
    """configs/sweep/glue.yaml is read; its checkpoints are for the user to name."""
    path = Path(__file__).parents[2] / "configs" / "sweep" / "glue.yaml"
    axes, _ = load_sweep(path)
    assert [task.task for task in axes.tasks] == ["cola", "rte", "mrpc", "stsb", "sst2"]
    assert axes.tasks[-1].overrides == {"train_fraction": "0.1"} and axes.seeds == (0, 1, 2)
    assert len(yaml.safe_load(path.read_text())["models"]) == 2


@pytest.mark.parametrize("what", ["sweep", "ablation"])
def test_a_link_in_place_of_the_jobs_is_not_followed(what: str, tmp_path) -> None:
    store = ResultStore(tmp_path, what, check_tuned)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "jobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="jobs is a link, which is not followed"):
        store.begin({}, [])
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "jobs"]
