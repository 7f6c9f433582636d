"""`fastbert bench throughput` at a tiny size: the contestants, the figures computed from their times, and user errors.
No test looks at a time."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from fastbert.bench import throughput as bench_throughput
from fastbert.bench.contestants import Contestant, Runner, _bare_setup, _fastbert, _peer
from fastbert.bench.options import BenchThroughputOptions
from fastbert.bench.throughput import contestants, job_options, race
from fastbert.cli import main
from fastbert.errors import UserError
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.setup import prepare_setup

TINY = {"layers": 1, "width": 64, "length": 32, "batch_size": 4}


@pytest.fixture
def job(prepared: Path) -> PretrainOptions:
    return job_options(BenchThroughputOptions(str(prepared), **TINY))


def test_contestants_run_in_their_own_processes(prepared: Path, tmp_path: Path, capsys) -> None:
    flags = [str(x) for name, value in TINY.items() for x in (f"--{name.replace('_', '-')}", value)]
    flags += [
        "--positions",
        "tupe-r",
        "--peers",
        "fp32",
        "--rounds",
        "2",
        "--seconds",
        "0.01",
        "--machine.threads",
        "1",
    ]
    assert main(["bench", "throughput", "--data", str(prepared), *flags, "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "throughput.json").read_text())
    ours, theirs = found["rows"]
    assert (ours["contestant"], theirs["contestant"]) == ("fastbert tupe-r", "transformers fp32")
    assert found["tokens_per_second"] == ours["tokens_per_second"] and found["vocabulary"] == 600
    assert ours["over"].keys() == {"transformers fp32"} and theirs["over"].keys() == {"fastbert tupe-r"}
    assert all(0 < row["least"] <= row["tokens_per_second"] <= row["most"] for row in found["rows"])
    assert {"forward: attention", "backward: feed-forward", "optimizer"} <= {part["part"] for part in found["step"]}
    table = (tmp_path / "throughput.md").read_text()
    assert "| transformers fp32 | " in table and "600 words" in table and "| optimizer |" in table


class Clocked:
    """A runner with given seconds per step, round after round."""

    times: ClassVar = {
        "fastbert absolute": (1, 2, 1, 4),
        "fastbert tupe-r": (2, 2, 2, 4),
        "transformers fp32": (4, 4, 8, 4),
    }

    def __init__(self, contestant: Contestant) -> None:
        self.contestant, self.rest = contestant, list(self.times[contestant.name])
        self.facts = {"tokens": 100, "precision": "fp32", "device": "cpu"}
        if not contestant.peer:
            self.facts["flops"] = 5000

    def seconds(self, steps: int) -> float:
        return steps * self.rest.pop(0)

    def peak(self) -> tuple[float, str]:
        return 5000.0 * (1 + len(self.rest)), "measured"

    def memory(self) -> int:
        return 7

    def profile(self) -> list:
        return [{"part": "all", "ms": 1.0, "fraction": 1.0}]

    def close(self) -> None:
        pass


def test_rows_from_times(monkeypatch, job: PretrainOptions) -> None:
    """The first call is for the number of steps; then come three rounds."""
    monkeypatch.setattr(bench_throughput, "Runner", Clocked)
    options = BenchThroughputOptions(rounds=3, seconds=8.0, peers="fp32")
    (absolute, tupe, peer), parts, peak = race(options, contestants(options, job))
    assert (absolute["tokens_per_second"], absolute["least"], absolute["most"]) == (50, 25, 100)
    assert absolute["over"] == {"transformers fp32": [2.0, 1.0, 8.0]}
    assert tupe["over"] == {"fastbert absolute": [1.0, 0.5, 1.0], "transformers fp32": [2.0, 1.0, 4.0]}
    assert peer["over"]["fastbert absolute"][0] == 0.5 and "mfu" not in peer
    assert peak == (20000.0, "measured") and absolute["mfu"] == 50 * 50 / 20000 and absolute["step_ms"] == 2000
    assert parts[0]["part"] == "all"


def test_both_sides_train_the_same_shape(job: PretrainOptions, tmp_path: Path) -> None:
    peer = next(c for c in contestants(BenchThroughputOptions(peers="fp32"), job) if c.peer)
    setup = _bare_setup(peer.options)
    assert setup.config == _bare_setup(job).config and setup.precision == "fp32"
    seen = {}

    def spy(module, args, kwargs, output) -> None:
        if type(module).__name__ == "BertForMaskedLM":
            seen.update(kwargs, loss=output.loss, parameters=sum(p.numel() for p in module.parameters()))

    hook = torch.nn.modules.module.register_module_forward_hook(spy, with_kwargs=True)
    try:
        step, _, _ = _peer(setup, peer, tmp_path)
        next(step)
    finally:
        hook.remove()
    assert seen["input_ids"].shape == seen["labels"].shape == (4, 32) and seen["loss"].isfinite()
    assert (seen["input_ids"][:, 0] == setup.vocabulary.ids["[CLS]"]).all() and (seen["labels"] != -100).any()
    step, facts, _ = _fastbert(prepare_setup(job), Contestant("fastbert", job), tmp_path)
    next(step)
    assert facts["parameters"] == seen["parameters"]


def test_the_other_contestants(job: PretrainOptions) -> None:
    options = BenchThroughputOptions(positions="tupe-a, alibi", peers="bf16,compiled")
    found = contestants(options, job)
    assert [c.options.encoder.position for c in found] == ["tupe-a", "alibi", "absolute", "absolute"]
    assert [(c.peer, c.compiled, c.options.machine.precision) for c in found[2:]] == [
        (True, False, "bf16"),
        (True, True, "bf16"),
    ]
    assert BenchThroughputOptions(peers="none").chosen_peers == []


def test_user_errors(job: PretrainOptions, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the text is prepared
    for wrong in ({"rounds": 0}, {"length": 1}, {"seconds": 0.0}, {"batch_size": 0}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} must be"):
            BenchThroughputOptions(**wrong)
    with pytest.raises(UserError, match="unknown peer 'fp16'"):
        BenchThroughputOptions(peers="fp16")
    with pytest.raises(UserError, match="unknown position encoding"):
        BenchThroughputOptions(positions="absolut")
    with pytest.raises(UserError, match="too few distinct words for a vocabulary of"):
        text = tmp_path / "text.txt"
        text.write_text("\n\n".join(f"the words of document {n}" for n in range(60)))
        bench_throughput.bench_throughput(BenchThroughputOptions(str(text), out=str(tmp_path / "out")))
    broken = PretrainOptions(data=job.data, encoder=job.encoder, length=32, batch_size=10**6, steps=1)
    with pytest.raises(UserError, match=r"broken: the corpus has \d+ sequences"):
        Runner(Contestant("broken", broken))
