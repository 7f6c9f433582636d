"""Training with interpreted Triton kernels gives the same curve as training with their references."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastbert.cli import main

pytest.importorskip("triton")


def losses(prepared: Path, out: Path, kernels: str) -> np.ndarray:
    """Loss of every step: for the kernels `auto` from a process that interprets them, otherwise from this one."""
    shape = ["--layers", "1", "--width", "32", "--heads", "2", "--length", "20", "--batch-size", "2"]
    flags = [*shape, "--position", "tupe-r", "--optimizer.learning-rate", "1e-2", "--log-every", "1", "--steps", "50"]
    flags += ["--machine.precision", "fp32", "--machine.threads", "1", "--eval-sequences", "4"]
    command = ["pretrain", "--data", str(prepared), *flags, "--out", str(out), "--machine.kernels", kernels]
    if kernels == "auto":
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "fastbert", *command]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
        assert done.returncode == 0, done.stderr
    else:
        assert main(command) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return np.array([row["loss"] for row in rows if row["split"] == "train"])


def test_fifty_steps(prepared: Path, tmp_path: Path) -> None:
    """With dropout, which is identical in the kernels."""
    ours, theirs = (losses(prepared, tmp_path / kernels, kernels) for kernels in ("auto", "reference"))
    assert len(ours) == 50 and ours[-5:].mean() < ours[:5].mean() - 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert (ours != theirs).any()  # sums in another order: the kernels did run
