"""Ablations of seconds, end to end: files, resuming after kill -9, annealings compared with uninterrupted runs, a job
that fails."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fastbert.cli import main
from fastbert.data.shards import open_dataset
from fastbert.pretraining import setup
from fastbert.pretraining.evaluate_options import EvaluateOptions
from fastbert.pretraining.zero_shot.pairs import measure_pairs
from fastbert.pretraining.zero_shot.pll import measure_pll
from fastbert.studies.ablate import costs
from fastbert.studies.ablate.ablation_plan import plan_ablation
from fastbert.studies.ablate.options import load_ablation
from fastbert.studies.ablate.pretrain_jobs import pretrain_job
from fastbert.studies.engine.jobs import run_job
from fastbert.training.options import MachineOptions
from tests.stand_ins import around_steps, stopped_clock
from tests.studies.conftest import CPU, FINETUNE, command_of, read_rows, time_steps, workers_of, write_pairs
from tests.studies.test_ends import start, wait_for

BASE = {"layers": 1, "width": 16, "heads": 2, "length": 16, "batch_size": 8, "dropout": 0.1, "eval_sequences": 8}
BASE |= {"position": "absolute", "first_length": 8, "checkpoint_every": 5, "log_every": 4}
BASE |= {"schedule": {"warmup": 0.1}, "optimizer": {"learning_rate": 3e-3}}


def write(folder: Path, prepared: Path, words: str, **changes) -> str:
    """The YAML file of an ablation with two variants, two points, a task and zero-shot evaluations."""
    folder.mkdir(exist_ok=True)
    write_pairs(folder / "pairs")
    (folder / "held-out.txt").write_text("The people of the States are free. We shall have peace.")
    values = {
        "base": BASE | {"data": str(prepared)},
        "variants": {"absolute": None, "tupe-r": {"position": "tupe-r"}},
        "budget": {"equal": "flops", "steps": 30},
        "anneal": {"points": [0.5, 1.0], "fraction": 0.2},
        "tasks": [words],
        "epochs": 1,
        "finetune": FINETUNE,
        "evaluate": {"pairs": str(folder / "pairs"), "pll": str(folder / "held-out.txt"), "machine": CPU},
        "evaluate_at": [1.0],
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return str(path)


def without_times(rows: list[dict]) -> list[dict]:
    """Rows without what depends on the clock and on the folder."""
    times = ("seconds", "examples_per_second", "folder", "seal")
    return [{key: value for key, value in row.items() if key not in times} for row in rows]


def hashes(out: Path) -> dict[str, str]:
    """Hashes of every retained checkpoint of every job, of its weights and its optimizer."""
    found = {}
    for path in out.glob("jobs/*/run/checkpoints/*/manifest.json"):
        files = json.loads(path.read_text())["files"]
        name = str(path.parent.relative_to(out))
        found[name] = files["model.safetensors"]["sha256"] + files["optimizer.safetensors"]["sha256"]
    return found


@pytest.fixture(scope="module", autouse=True)
def few_steps_are_timed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "ROUND_STEPS", 3)
        yield


@pytest.fixture(scope="module")
def toy(prepared, words, tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("toy"), prepared, words)


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory) -> Path:
    """The folder of the toy, run to its end by one worker."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(["ablate", toy, "--out", str(out)]) == 0
    return out


def test_what_an_ablation_leaves(toy, whole, prepared) -> None:
    rows = read_rows(whole)
    kinds = ["pretrain", "branch", "finetune", "finetune", "evaluate", "evaluate"]
    assert [row["kind"] for row in rows] == kinds * 2
    assert all(row["status"] == "done" for row in rows)
    trunk, early, _, _, pairs, pll, *_ = rows
    assert [values["step"] for values in trunk["validations"] if values["step"] in (15, 36)] == [15, 36]
    assert early["validations"][-1]["step"] == 18
    assert [values for values in early["validations"] if values["step"] <= 15] == [
        values for values in trunk["validations"] if values["step"] <= 15
    ]
    assert rows[2]["at"] == 0.5 and rows[3]["at"] == 1.0 and rows[2]["metrics"] == ["accuracy"]
    assert rows[2]["configuration"]["pretraining"] == early["id"] and rows[2]["configuration"]["step"] == 18
    assert "model" not in rows[2]["configuration"]  # the weights are named by the pretraining
    # The same figures as from `fastbert evaluate`.
    checkpoint = f"{whole}/jobs/{trunk['id']}/run/checkpoints/step-00000036"
    machine = MachineOptions(threads=1, **CPU)
    data = {"pairs": Path(toy).parent / "pairs", "pll": Path(toy).parent / "held-out.txt"}
    for row, key, measure in ((pairs, "pairs", measure_pairs), (pll, "pll", measure_pll)):
        figures = measure(EvaluateOptions(model=checkpoint, **{key: str(data[key])}, machine=machine))
        assert row[key] == {name: figures[name] for name in row[key]} and row["at"] == 1.0
    # Fine-tuned from where the annealings end.
    config = yaml.safe_load((whole / "jobs" / rows[3]["id"] / "run" / "config.yaml").read_text())
    assert config["model"].endswith(f"{trunk['id']}/run/checkpoints/step-00000036")
    report = (whole / "report" / "report.md").read_text()
    measures = ["words, accuracy x 100", "minimal pairs, accuracy x 100", "pseudo-log-likelihood, nats per token"]
    assert re.findall("^## By (.*)$", report, re.MULTILINE) == [*measures, "validation loss"]
    # The page states what was trained.
    tables = report.partition("## What was trained")[2].split("Every checkpoint was fine-tuned on:")
    rows, tuning = (dict(re.findall(r"^\| ([a-z ]*?) +\| (.*?) +\|$", table, re.MULTILINE)) for table in tables)
    assert rows["encoder"].startswith("1 x 16 (layers x width), 2 heads, feed-forward 64 (gelu), post-norm, absolute")
    assert rows["data"].startswith(f"{prepared}: {len(open_dataset(prepared).split('train')) / 1e3:.3g}k tokens in ")
    assert rows["length of training"].startswith("36 steps: 30 of 16 x 8 tokens, 6 of 8 x 16 tokens, 4.61k tokens")
    assert rows["optimizer"].startswith("adamw, learning rate 0.003, weight decay 0.01")
    assert rows["schedule"] == "constant, warm-up 0.1; annealed to 0 within 20 % of the steps before"
    assert tuning["words"].split() == ["classes", "|", "accuracy", "|", "64", "|", "40"] and tuning["epochs"] == "1"


def test_a_dry_run_shows_the_costs_and_leaves_nothing(toy, tmp_path, capsys, monkeypatch) -> None:
    time_steps(monkeypatch, lambda *given: 2.0)
    assert main(["ablate", toy, "--dry-run", "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    *_, head, absolute, other, jobs = captured.out.splitlines()
    lines = [absolute, other]
    assert head.split()[-1] == "minutes" and lines[0].split()[0] == "absolute" and lines[0].split()[-1] == "1.2"
    assert [line.split()[0] for line in lines] == ["absolute", "tupe-r"]
    assert jobs == "12 jobs: 2 pretrainings, 2 annealings, 4 fine-tunings, 4 evaluations"
    assert not (tmp_path / "out").exists()


def test_an_annealing_equals_an_uninterrupted_run(whole, tmp_path) -> None:
    """The same schedule from the first step: warm-up, constant, and linear to 0 within a fifth of what went before.
    Weights, moments and losses bit for bit."""
    rows = [row for row in read_rows(whole) if row["kind"] in ("pretrain", "branch") and row["model"] == "tupe-r"]
    assert len(rows) == 2
    for row in rows:
        run = whole / "jobs" / row["id"] / "run"
        steps, start_step = row["steps"], round(row["steps"] / 1.2)
        options = yaml.safe_load((run / "config.yaml").read_text())
        options |= {"out": None, "steps": steps, "schedule": {"name": "wsd", "warmup": 3}}
        options["schedule"]["decay"] = (steps - start_step) / steps
        path = tmp_path / f"{steps}.yaml"
        path.write_text(yaml.safe_dump(options))
        assert main(["pretrain", str(path), "--out", str(tmp_path / path.stem)]) == 0
        alone = tmp_path / path.stem / "checkpoints" / f"step-{steps:08d}"
        for name in ("model", "optimizer"):
            file = f"{name}.safetensors"
            assert (alone / file).read_bytes() == (run / "checkpoints" / alone.name / file).read_bytes()
        last = json.loads((tmp_path / path.stem / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["loss"] == row["validations"][-1]["loss"]


def test_killed_and_continued_equals_uninterrupted(toy, whole, tmp_path, capsys) -> None:
    """kill -9 in the middle of a pretraining, with two workers; then one worker continues."""
    out = tmp_path / "out"
    process = start(toy, out, "--workers", "2", job="ablate")
    wait_for(lambda: list(out.glob("jobs/*/run/checkpoints/step-*")))
    workers = workers_of(process.pid)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(command_of(worker) for worker in workers))
    stopped = [path.parent for path in out.glob("jobs/*/run/manifest.json") if not (path.parent / "model").exists()]
    assert stopped or len(read_rows(out)) < 12
    assert main(["ablate", toy, "--out", str(out)]) == 0
    error = capsys.readouterr().err
    assert "12 jobs: 2 pretrainings, 2 annealings, 4 fine-tunings, 4 evaluations" in error
    assert any(len(json.loads((run / "manifest.json").read_text())["sessions"]) == 2 for run in stopped)
    assert without_times(read_rows(out)) == without_times(read_rows(whole))
    assert hashes(out) == hashes(whole)


def test_seconds_of_a_job_are_those_of_all_its_attempts(toy, tmp_path, monkeypatch) -> None:
    """A step takes a minute by the test's clock: 36 of a training that was stopped after 21, then the 3 of a branch."""
    stops = [20]

    def stepping(trainer: object, step: int) -> None:
        if stops and step == stops[0]:
            signal.raise_signal(signal.SIGTERM)
        now[0] += 60.0

    time_steps(monkeypatch, lambda *given: 0.01)
    ablation, options = load_ablation(toy)
    trunk, branch, *_ = plan_ablation(ablation, options.glue_dir, tmp_path, {}).jobs
    now = stopped_clock(monkeypatch)
    around_steps(monkeypatch, stepping)

    def run(part) -> dict:
        return run_job(part.to_dict(), tmp_path / "jobs" / part.id)

    assert run(trunk)["reason"] == "it was ended by SIGTERM"
    stops.clear()
    assert run(trunk)["seconds"] == 36 * 60
    stops.append(16)
    assert run(branch)["status"] == "failed"
    stops.clear()
    assert run(branch)["seconds"] == 3 * 60


def test_finished_jobs_are_not_run_again(toy, whole, prepared, words, tmp_path, capsys) -> None:
    """A variant more: only what is new is run. Another ablation has another folder."""
    before = {path: path.stat().st_mtime_ns for path in whole.glob("jobs/*/log.txt")}
    assert main(["ablate", toy, "--out", str(whole)]) == 0
    assert "; 12 done before" in capsys.readouterr().err
    variants = {"absolute": None, "tied": {"position": "tupe-r"}}
    renamed = write(tmp_path / "renamed", prepared, words, variants=variants)
    assert main(["ablate", renamed, "--out", str(whole)]) == 0
    assert "; 12 done before" in capsys.readouterr().err
    assert "tied" in (whole / "report" / "report.md").read_text()
    last = write(tmp_path / "last", prepared, words, tasks_at=[1.0])
    assert main(["ablate", last, "--out", str(whole)]) == 0
    captured = capsys.readouterr()
    assert "10 jobs: 2 pretrainings, 2 annealings, 2 fine-tunings, 4 evaluations; 10 done before" in captured.err
    assert "At the end: words, accuracy x 100" in captured.out and "quality is reached: words" not in captured.out
    report = (whole / "report" / "report.md").read_text()
    assert "## Quality at the end of the budget" in report and re.search(
        r"\| words, accuracy x 100 +\| tupe-r ", report
    )
    assert "By validation loss:" in report and "By words, accuracy x 100:" not in report
    assert (whole / "report" / "finals.svg").is_file()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    other = write(tmp_path / "other", prepared, words, budget={"steps": 31})
    assert main(["ablate", other, "--out", str(whole)]) == 2
    assert "holds another ablation" in capsys.readouterr().err
    assert main(["ablate", other, "--out", str(tmp_path)]) == 2
    assert "is not empty and holds no ablation" in capsys.readouterr().err
    assert main(["ablate", toy, "--out", str(whole)]) == 0


def test_a_failure_stays_alone(prepared, words, tmp_path, capsys) -> None:
    """A diverging variant: what needs it does not start, the others and the report are there."""
    variants = {"absolute": None, "mad": {"optimizer": {"learning_rate": 1e18, "clip_norm": 0.0}}}
    path = write(tmp_path, prepared, words, variants=variants, budget={"steps": 24})
    out = tmp_path / "out"
    assert main(["ablate", path, "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "12 jobs: 2 pretrainings, 2 annealings, 4 fine-tunings, 4 evaluations" in error
    assert "FAILED pretraining, mad, seed 0" in error and "1 of 12 jobs failed, 5 did not run" in error
    statuses = {model: [row["status"] for row in read_rows(out) if row["model"] == model] for model in variants}
    assert statuses == {"absolute": ["done"] * 6, "mad": ["failed", *["not run"] * 5]}
    report = (out / "report" / "report.md").read_text()
    assert re.search(r"pretraining \| mad .*not finite", report) and "5 jobs did not run: pretraining, mad" in report


def test_a_pretraining_without_a_final_loss_has_failed(prepared, tmp_path, monkeypatch) -> None:
    """Its weights may be finite: nothing can be compared with it."""
    monkeypatch.setattr(setup, "evaluate", lambda *arguments: {"loss": float("nan"), "accuracy": 0.5})
    options = BASE | {"data": str(prepared), "steps": 2, "schedule": {"warmup": 0.5}}
    identity = {"data": setup.data_fingerprint(open_dataset(prepared))}
    outcome = pretrain_job({"kind": "pretrain", "options": options, "identity": identity}, tmp_path / "run")
    assert outcome["status"] == "failed" and outcome["reason"] == "its last validation loss is not finite"
