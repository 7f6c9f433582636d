"""The benchmark of step times runs, in every way it can be called."""

import importlib
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_steps.py"
SIZES = {"rounds": 3, "layers": 1, "width": 64, "vocab-size": 64, "length": 16, "batch-size": 4}
SMALL = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]


def test_a_timed_step_trains_and_writes_notes(monkeypatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    bench_steps = importlib.import_module("bench_steps")
    sizes = {name.replace("-", "_"): size for name, size in SIZES.items()}
    run = bench_steps.Run(
        Namespace(device=torch.device("cpu"), precision="fp32", share=0.5, choices=4, **sizes), words=3
    )
    before = [parameter.clone() for parameter in run.objective.parameters()]
    run()
    assert run.objective.notes.written == 3
    pairs = zip(run.objective.parameters(), before, strict=True)
    assert not any(torch.equal(parameter, old) or parameter.grad is not None for parameter, old in pairs)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["notes", "--words", "3", "50"], ["3 words, with notes over without:", "50 words, with notes over without:"]),
        (["choice", "--choices", "4"], ["multiple choice of 4 over ELECTRA:"]),
    ],
)
def test_step_times(given, said) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, *given, *SMALL, "--precision", "fp32"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    machine, *lines = done.stdout.splitlines()
    assert machine.endswith("fp32") and len(lines) == len(said)
    for line, start in zip(lines, said, strict=True):
        assert line.strip().startswith(start)
        assert 0 < float(line.partition(": ")[2].split()[0]) < math.inf  # a ratio of times, which other work distorts
