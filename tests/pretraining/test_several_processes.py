"""A run of several processes: its files are those of one process, and any number of processes resumes it."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastbert.records import read_json
from fastbert.training.logbook import read_metrics
from tests.launch import TRAIN, launch

STEPS = 14


def options_of(prepared: Path) -> list[str]:
    return [
        *("--data", str(prepared), "--layers", "2", "--width", "32", "--heads", "2", "--length", "32"),
        *("--batch-size", "8", "--machine.micro-batch-size", "2", "--steps", str(STEPS), "--log-every", "1"),
        *("--eval-every", "7", "--checkpoint-every", "7", "--eval-sequences", "8", "--keep-checkpoints", "1"),
        *("--machine.precision", "fp32", "--machine.threads", "1", "--notes.enabled"),
    ]


def files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if "tfevents" not in path.name}


def test_two_three_one_and_four_processes_are_one(prepared: Path, tmp_path: Path) -> None:
    """Each is stopped by a signal to its last process; the second has sharded weights."""
    options = [*options_of(prepared), "--objective", "electra"]
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert launch(1, ["pretrain", *options, "--out", str(alone)], tmp_path).codes == [0]
    for size, shard in ((2, "none"), (3, "blocks"), (1, "none"), (4, "none")):
        arguments = ["--resume", str(run)] if run.exists() else [*options, "--out", str(run)]
        failures = [] if size == 4 else [(size - 1, TRAIN, 3, "term")]
        ended = launch(size, ["pretrain", *arguments, "--machine.shard", shard], tmp_path, failures)
        assert ended.codes == [0 if size == 4 else 143] * size, ended.messages
    records = [read_metrics(folder / "metrics.jsonl") for folder in (run, alone)]
    assert len(records[0]) == len(records[1]) == STEPS + 2
    for mine, theirs in zip(*records, strict=True):
        assert mine.keys() == theirs.keys() and mine["split"] == theirs["split"]
        for name in mine.keys() - {"tokens_per_second", "mfu", "split"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    assert files(run) - files(alone) <= {"checkpoints/step-00000007"} and files(alone) <= files(run)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (run, alone)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-5 for name in weights[0])
    sessions = read_json(run / "manifest.json", "the manifest", dict)["sessions"]
    counts = [session["resolved"].get("processes") for session in sessions]
    shards = [count and (count["count"], count["shard"]) for count in counts]
    assert shards == [(2, "none"), (3, "blocks"), None, (4, "none")]


def test_three_processes_resume_to_the_bit(prepared: Path, tmp_path: Path) -> None:
    """The sum of three gradients depends on their order, which DDP changes after its first backward pass."""
    last = f"checkpoints/step-{STEPS:08d}"
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = ["pretrain", *options_of(prepared), "--out"]
    assert launch(3, [*arguments, str(whole)], tmp_path).codes == [0] * 3
    assert launch(3, [*arguments, str(resumed)], tmp_path, [(2, TRAIN, 3, "term")]).codes == [143] * 3
    assert launch(3, ["pretrain", "--resume", str(resumed)], tmp_path).codes == [0] * 3
    for name in ("model", "optimizer"):
        found = [(run / last / f"{name}.safetensors").read_bytes() for run in (whole, resumed)]
        assert found[0] == found[1]
