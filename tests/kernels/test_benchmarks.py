"""The script for a GPU that is lent is rehearsed where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[2] / "kernels" / "benchmarks" / "attention.py"


def test_rehearsal(tmp_path) -> None:
    for what in ("tune", "bench"):
        more = ["--tiles", str(tmp_path / "attention-tune.json")] if what == "bench" else []
        command = [sys.executable, SCRIPT, what, "--toy", "--heads", "2", "--head-size", "16", "--rounds", "2"]
        done = subprocess.run([*command, *more, "--out", tmp_path], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    tuned, benched = (
        json.loads((tmp_path / f"attention-{name}.json").read_text())["rows"] for name in ("tune", "bench")
    )
    assert tuned[-1]["best"].keys() == {"forward", "keys", "queries", "bias"}
    assert all(row["right"] for row in tuned[:-1])
    assert {row["contestant"] for row in benched} >= {"fastbert", "fastbert, no bias", "plain"}
    for row in benched:
        assert "refused" not in row and row["both"]["ms"] > 0
