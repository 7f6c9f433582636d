"""`linear_cross_entropy` by its Triton kernel, under Triton's interpreter, against the float64 definition."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from fastbert_kernels.compilation import compile_target
from fastbert_kernels.cross_entropy.triton_rows import triton_row_losses

CASES = Path(__file__).parent / "cross_entropy_cases.py"


def test_values_and_gradients() -> None:
    """All cases in one process in which kernels are interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, CASES], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) >= 10
    for row in rows:
        for name, (ours, plain) in row["errors"].items():
            assert ours <= 2 * plain + 1e-5, (row["case"], name)


def test_chunks_do_not_recompile() -> None:
    logits, target, losses = torch.zeros(40, 5008)[:, :5000], torch.zeros(40, dtype=torch.int64), torch.zeros(40)
    bias = torch.zeros(5000)
    with compile_target(90) as compiled:
        for start, rows, ignore_index in ((0, 16, -100), (1, 16, 1), (17, 1, 0), (24, 16, -(2**31))):
            part = slice(start, start + rows)
            triton_row_losses(logits[part], bias, target[part], ignore_index, losses[part], True)
        assert len(compiled.kernels()) == 1
        triton_row_losses(logits, bias, target, -100, losses, False)
        assert len(compiled.kernels()) == 2
