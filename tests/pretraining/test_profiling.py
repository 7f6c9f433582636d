"""--profile: its arithmetic on made-up spans, and that it does not change the profiled run."""

import gzip
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.autograd import DeviceType

from fastbert.model.options import EncoderOptions
from fastbert.pretraining import loop
from fastbert.pretraining.budget import resolve_steps
from fastbert.pretraining.build import build_trainer, describe_experiment
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.profiling import choose_steps, profile_steps, spans_of
from fastbert.pretraining.run import RunFolder
from fastbert.pretraining.setup import prepare_setup
from fastbert.pretraining.spans import IDLE, LOOP, Span, operators, parts
from tests.flags import main
from tests.stand_ins import free_space

NODE = "autograd::engine::evaluate_function: XBackward0"


def one_step(backward_thread: int) -> list[Span]:
    """A step of 100 us: data 10, embedding 5, attention 20, head 5, backward 40 of which 25 attention's, and 10 the
    loop's; the same seconds on a device for each operator, but 6 for the head's."""
    nodes = [  # sequence 7 is attention's, 8 the head's, 9 that of the sum of the losses
        Span(NODE, backward_thread, 52, 77, 7, 0),
        Span("aten::mm", backward_thread, 53, 76, -1, 25),
        Span(NODE, backward_thread, 77, 79, 8, 2),
        Span(NODE, backward_thread, 79, 80, 9, 1),
        Span("autograd::engine::evaluate_function: AccumulateGrad", backward_thread, 80, 81, -1, 1),
    ]
    return [
        Span("before", 1, -5, 0, -1, 50),
        Span("step", 1, 0, 100),
        Span("data", 1, 0, 10),
        Span("aten::copy_", 1, 1, 9, -1, 10),
        Span("forward", 1, 10, 40),
        Span("embedding", 1, 10, 35),
        Span("attention", 1, 15, 35),
        Span("aten::add", 1, 16, 17, 7),  # bears the number too, but no node of its own
        Span("aten::mm", 1, 18, 34, 7, 20),
        Span("aten::mm", 1, 36, 39, 8, 6),
        Span("aten::mul", 1, 40, 41, 9, 0),
        Span("backward", 1, 50, 90),
        *nodes,
        Span("aten::side", 1, 0, 99, is_async=True, kernels=1000),
    ]


def test_parts_of_the_host() -> None:
    found = {row["part"]: row for row in parts(one_step(1), 1, device=False)}
    assert {name: round(1000 * row["ms"]) for name, row in found.items()} == {
        "data: rows and masks": 10,
        "forward: embedding": 5,
        "forward: attention": 20,
        "forward: head and loss": 5,
        "backward: attention": 25,
        "backward: head and loss": 3,
        "backward: the rest": 12,
        LOOP: 20,
    }
    assert sum(row["fraction"] for row in found.values()) == pytest.approx(1)
    assert next(iter(found)) == "data: rows and masks" and list(found)[-1] == LOOP


def test_parts_of_the_device() -> None:
    """The backward pass runs in a separate thread, and the device is idle for 37 of 100 us."""
    found = {row["part"]: round(1000 * row["ms"]) for row in parts(one_step(2), 1, device=True)}
    assert found == {
        "data: rows and masks": 10,
        "forward: attention": 20,
        "forward: head and loss": 6,
        "backward: attention": 25,
        "backward: head and loss": 3,
        "backward: the rest": 1,
        IDLE: 35,
    }


class Event(SimpleNamespace):
    """Event like kineto's, in which everything is a method."""

    def __getattribute__(self, name: str):
        values = super().__getattribute__("__dict__")
        return (lambda: values[name]) if name in values else super().__getattribute__(name)


def event(name: str, start: int, end: int, number: int = 0, linked: int = 0, gpu: bool = False, mark: bool = False):
    where = {"device_type": DeviceType.CUDA if gpu else DeviceType.CPU, "start_thread_id": 1, "end_thread_id": 1}
    links = {"correlation_id": number, "linked_correlation_id": linked, "sequence_nr": -1, "is_async": False}
    return Event(name=name, start_ns=start, end_ns=end, is_user_annotation=mark, **where, **links)


def test_kernels_belong_to_the_operator_that_started_them() -> None:
    events = [
        event("step", 0, 90_000, number=1, mark=True),
        event("aten::mm", 1000, 3000, number=2),
        event("cudaLaunchKernel", 1500, 2000, number=77, linked=2),
        event("gemm", 5000, 45_000, number=77, linked=2, gpu=True),
        event("splitk", 45_000, 46_000, number=78, linked=2, gpu=True),
        event("step", 5000, 46_000, number=1, linked=1, gpu=True, mark=True),  # covers them, and is none
    ]
    step, product = spans_of(events)
    assert (step.name, step.start, step.end, step.kernels) == ("step", 0, 90, 0)
    assert (product.name, product.end, product.kernels) == ("aten::mm", 3, 41)


def test_operators_without_what_they_call() -> None:
    first, *_, last = operators([*one_step(1), Span("aten::late", 1, 200, 300)], 1, device=False)
    assert first == {"operator": "aten::mm", "calls": 3.0, "ms": 0.042, "fraction": 0.42}
    assert last["ms"] == 0.001
    listed = {row["operator"] for row in operators(one_step(1), 1, device=False)}
    assert not {"aten::late", "before", "step", "aten::side"} & listed


@pytest.mark.parametrize(
    ("start", "stop", "intervals", "found"),
    [
        (0, 100, (50, 20), range(10, 15)),
        (0, 100, (12, 20), range(12, 17)),  # a validation after step 12, and none between the 13th and the 17th
        (3, 100, (50, 20), range(13, 18)),
        (0, 100, (3, 7), range(15, 18)),
        (0, 12, (50, 50), range(7, 12)),
        (0, 100, (1, 1), range(10, 11)),
        (0, 3, (50, 50), range(0, 3)),
        (7, 7, (50, 50), range(0)),
    ],
)
def test_no_pause_between_profiled_steps(start: int, stop: int, intervals: tuple, found: range) -> None:
    assert choose_steps(start, stop, intervals, frozenset()) == found
    assert choose_steps(start, stop, (1000, 1000), frozenset({found.start + 2})) != found or len(found) < 3


def rows(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "mfu")} for row in rows]


def test_the_run_is_the_same_and_the_profile_is_written(flags, tmp_path, capsys) -> None:
    plain, seen = tmp_path / "plain", tmp_path / "seen"
    assert main(["pretrain", *flags, "--out", str(plain)]) == 0
    assert not (plain / "profile").exists()
    capsys.readouterr()
    exported = ["--checkpoint-words", "2.1k"]  # after step 17
    assert main(["pretrain", *flags, "--out", str(seen), "--profile", *exported]) == 0
    printed = capsys.readouterr().err
    assert "Steps 22 to 26 of the run." in printed and "| forward: attention |" in printed and "perfetto" in printed
    assert rows(plain) == rows(seen)
    weights = [load_file(run / "model" / "model.safetensors") for run in (plain, seen)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert yaml.safe_load((seen / "config.yaml").read_text())["profile"] is False
    assert sorted(path.name for path in (seen / "profile").iterdir()) == ["profile.md", "trace.json.gz"]
    with gzip.open(seen / "profile" / "trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("step") >= 5 and {"data", "attention", "backward", "aten::mm"} <= set(names)
    written = (seen / "profile" / "profile.md").read_text()
    assert "| optimizer |" in written and "## The largest operators" in written and "| aten::" in written


def test_a_resumed_run_is_profiled_after_it(flags, tmp_path, capsys, monkeypatch) -> None:
    run = tmp_path / "run"
    real = loop.Trainer.train_step
    with monkeypatch.context() as patch:  # a signal while the profiler listens: no profile, and the run can be resumed
        patch.setattr(
            loop.Trainer, "train_step", lambda self, step: (step == 15 and signal.raise_signal(15)) or real(self, step)
        )
        assert main(["pretrain", *flags, "--out", str(run), "--profile"]) == 143
    assert not (run / "profile").exists()
    assert main(["pretrain", "--resume", str(run), "--profile"]) == 0
    assert "Steps 24 to 28 of the run." in capsys.readouterr().err
    assert "Steps 24 to 28" in (run / "profile" / "profile.md").read_text()
    assert main(["pretrain", "--resume", str(run), "--profile"]) == 0
    assert "there is no step left to profile" in capsys.readouterr().err


def test_a_short_run_prints_which_steps(flags, tmp_path, capsys) -> None:
    assert main(["pretrain", *flags, "--steps", "7", "--out", str(tmp_path / "x"), "--profile"]) == 0
    printed = capsys.readouterr().err
    assert (
        "with 7 steps left, only 2 warm-up steps come before the 5 profiled ones" in printed
        and "Steps 3 to 7" in printed
    )


def test_no_space(flags, tmp_path, capsys, monkeypatch) -> None:
    free_space(monkeypatch, 40_000_000)
    assert main(["pretrain", *flags, "--out", str(tmp_path / "x"), "--profile"]) == 2
    printed = capsys.readouterr().err
    assert "--profile needs 54.0 MB" in printed and "has 40.0 MB left" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("objective", ["mlm", "electra"])
def test_profile_steps(prepared, tmp_path, objective: str) -> None:
    encoder = EncoderOptions(layers=2, width=32, heads=2)
    options = PretrainOptions(str(prepared), encoder=encoder, length=32, batch_size=8, steps=20, objective=objective)
    setup = prepare_setup(options)
    setup.options = resolve_steps(setup)
    trainer = build_trainer(setup, RunFolder(tmp_path / "x"), describe_experiment(setup, {}), resumed=False, quiet=True)
    found = profile_steps(trainer, steps=2, warm_up=1)
    trainer.logbook.close()
    took = {row["part"]: row["ms"] for row in found.parts}
    ways = [f"{way}: {part}" for way in ("forward", "backward") for part in ("embedding", "attention", "feed-forward")]
    assert set(ways) <= set(took)
    assert ("backward: second network" in took) == (objective == "electra")
    assert sum(took.values()) == pytest.approx(1000 * found.seconds, rel=0.01)
    assert sum(row["fraction"] for row in found.parts) == pytest.approx(1, abs=0.01)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainer.objective.modules())
