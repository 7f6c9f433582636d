"""The loss without logits by its Triton kernel, under Triton's interpreter, against the float64 definition."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = Path(__file__).parent / "interpreted_cross_entropy.py"


def test_values_and_gradients() -> None:
    """All cases in one process, which has to know from its start that kernels are interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, CASES], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) >= 10
    for row in rows:
        for name, (ours, plain) in row["errors"].items():
            assert ours <= 2 * plain + 1e-5, (row["case"], name)
