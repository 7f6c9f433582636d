"""The benchmark of step times runs, in every way it can be called."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_steps.py"
SIZES = {"rounds": 3, "layers": 1, "width": 64, "vocab-size": 64, "length": 16, "batch-size": 4}
SMALL = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]


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
