"""The Triton kernels under Triton's interpreter, against the float64 reference; and compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from fastbert_kernels.compilation import attention_resources
from fastbert_kernels.triton_attention import KERNELS

CASES = Path(__file__).parent / "interpreted_attention.py"


def test_values_and_gradients() -> None:
    """All cases in one process, which has to know from its start that kernels are interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, CASES], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) > 12
    for row in rows:
        for name, (ours, plain) in row["errors"].items():
            assert ours <= 2 * plain + 1e-5, (row["case"], name)


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_for_gpus_that_are_not_here(capability: int, kernel: str) -> None:
    """With a learned bias, in bfloat16 with heads of 64. On capability 9.0 nothing is spilled."""
    found = attention_resources(kernel, capability)
    assert found.tensor_cores > 0 and found.shared < {80: 163, 90: 227, 100: 227}[capability] * 1024
    if capability >= 90:
        assert found.spilled == 0
