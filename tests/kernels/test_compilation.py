"""Every combination of arguments of the kernels compiles, with the oldest and the newest supported Triton."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from fastbert_kernels.backend import TESTED

CASES = Path(__file__).parent / "compile_cases.py"


def attention(combinations: int, with_bias: int, short: bool = True, deltas: int = 1) -> dict[str, int]:
    """Variants of each kernel: one for each combination; of the bias kernel only those with a bias; Delta has no
    options."""
    kernels = ("forward_kernel", "keys_kernel", "queries_kernel", *(("short_kernel",) if short else ()))
    return {**dict.fromkeys(kernels, combinations), "bias_kernel": with_bias, "delta_kernel": deltas}


VARIANTS = {
    "all": attention(4 * 4 * 2, 3 * 4 * 2, deltas=2),  # parts, masks, ragged or whole tiles
    "packed": attention(4, 3),
    # Three combinations in ragged and whole tiles. dQ has no options; the tile of dB is larger, so whole at T 64 only.
    "stored": {
        **{f"{name}_kernel": 6 for name in ("forward", "keys", "short")},
        **{"delta_kernel": 2, "stored_queries_kernel": 3, "stored_bias_kernel": 5},
    },
    "80 torch.bfloat16 16": attention(2, 2),
    "100 torch.float16 24": attention(2, 2),
    "90 torch.float32 16": attention(3, 3, short=False),  # short_kernel is for 16-bit dtypes; one more is packed
    "default tiles": attention(1, 1),
    "loss": {"rows_kernel": 4 * 2},  # with and without gradients
    "samples": {"block_kernel": 3 * 2, "sampling_kernel": 3 * 2},  # with and without an excluded word
}


@pytest.mark.parametrize("version", [TESTED[0], TESTED[-1]])
def test_every_combination(version: str) -> None:
    path = os.environ.get("PYTHONPATH", "")
    if version == TESTED[0]:
        oldest = Path(sys.prefix) / f"triton-{version}"
        assert (oldest / "triton").is_dir(), f"there is no {oldest}: ./run_tests.sh puts Triton {version} there"
        path = os.pathsep.join([str(oldest), *filter(None, [path])])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, CASES], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["triton"].startswith(f"{version}.")
    assert found["variants"] == VARIANTS
