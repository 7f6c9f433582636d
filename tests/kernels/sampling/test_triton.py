"""The sampling kernels under Triton's interpreter, beside the reference; and compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from fastbert_kernels import sample_candidates, sample_distinct
from fastbert_kernels.compilation import Resources, pretended_gpu
from fastbert_kernels.sampling.dispatch import MOST_DRAWS, MOST_WORDS

from tests.kernels.sampling.test_sampling import assert_law

CASES = Path(__file__).parent / "sampling_cases.py"


def interpreted(group: str) -> list[dict]:
    """A process has to know from its start that kernels are interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, CASES, group], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("group", ["draws", "shapes_of_rows", "samples"])
def test_the_words_are_those_of_the_reference(group: str) -> None:
    """But for a rare row in which rounding moves the bound between two words past the noise."""
    rows = interpreted(group)
    assert len(rows) > 1
    assert all(row["error"] <= 2e-6 for row in rows), rows
    assert sum(row["other"] for row in rows) <= 0.3, rows


def test_the_law() -> None:
    (row,) = interpreted("law")
    drawn = torch.tensor(row["pairs"]).repeat_interleave(torch.tensor(row["counts"]), 0)
    assert_law(drawn, row["probabilities"])


def test_operators() -> None:
    assert interpreted("check_operators") == []


def compiled(capability: int, words: int, k: int = 16, calls: tuple[int, ...] = (4,), **more) -> list[Resources]:
    """What `sample_candidates` compiles for the given numbers of rows."""
    embedding, bias = torch.zeros(words, 8), torch.zeros(words)
    with pretended_gpu(capability) as gpu:
        for rows in calls:
            hidden, excluded = torch.zeros(rows, 8, dtype=torch.bfloat16), torch.zeros(rows, dtype=torch.int64)
            sample_candidates(hidden, embedding, k, seed=1, bias=bias, excluded=excluded, **more)
        return gpu.resources()


@pytest.mark.parametrize("words", [30522, 32768, 250112])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_nothing_spills(capability: int, words: int) -> None:
    found = {one.kernel: one for one in compiled(capability, words)}
    assert found.keys() == {"block_kernel", "sampling_kernel"}
    assert all(one.spilled == 0 for one in found.values()), found


def test_the_most_that_kernels_take() -> None:
    assert len(compiled(90, MOST_WORDS, MOST_DRAWS)) == 2
    assert compiled(90, MOST_WORDS + 1) == compiled(90, 5000, MOST_DRAWS + 1) == []
    with pretended_gpu(90) as gpu:
        sample_distinct(torch.zeros(2, 100, dtype=torch.float64), 2, torch.zeros(2, dtype=torch.int32))
        assert gpu.resources() == []
        sample_distinct(torch.zeros(2, 100), 2, torch.zeros(2, dtype=torch.int32))
        assert len(gpu.resources()) == 2


def test_other_numbers_of_rows_and_draws_compile_nothing_new() -> None:
    """Chunks of 3 rows begin anywhere in memory; 9 to 16 draws are kept in as many registers."""
    with pretended_gpu(90) as gpu:
        for rows, k in ((1, 9), (16, 16), (21, 10), (3, 13)):
            hidden, embedding = torch.zeros(rows, 8), torch.zeros(3000, 8)
            excluded = torch.zeros(rows, dtype=torch.int64)
            sample_candidates(hidden, embedding, k, seed=1, excluded=excluded, rows=3)
        assert len(gpu.resources()) == 2
