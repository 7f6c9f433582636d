"""The sampling kernels under Triton's interpreter, against the reference; and compiled for GPUs that this machine
lacks."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from fastbert_kernels import sample_candidates, sample_distinct
from fastbert_kernels.compilation import Resources, compile_target
from fastbert_kernels.sampling.dispatch import MAX_SAMPLES, MAX_WORDS

from tests.kernels.interpreted import interpreter


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[[str], list[dict]]]:
    with interpreter(Path(__file__).parent / "sampling_cases.py") as rows:
        yield rows


@pytest.mark.parametrize("group", ["vocabularies", "distributions", "candidates"])
def test_the_samples_are_those_of_the_reference(group: str, interpreted) -> None:
    """Rare exceptions are rows in which rounding moves the boundary between two words past the noise."""
    rows = interpreted(group)
    assert len(rows) > 1
    assert all(row["error"] <= 2e-6 for row in rows), rows
    assert sum(row["other"] for row in rows) <= 0.3, rows


def test_operators(interpreted) -> None:
    assert interpreted("check_operators") == []


def compiled(capability: int, words: int, k: int = 16, calls: tuple[int, ...] = (4,), **more) -> list[Resources]:
    """Kernels that `sample_candidates` compiles for these numbers of rows."""
    embedding, bias = torch.zeros(words, 8), torch.zeros(words)
    with compile_target(capability) as gpu:
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


def test_the_limits_of_the_kernels() -> None:
    assert len(compiled(90, MAX_WORDS, MAX_SAMPLES)) == 2
    assert compiled(90, MAX_WORDS + 1) == compiled(90, 5000, MAX_SAMPLES + 1) == []
    with compile_target(90) as gpu:
        sample_distinct(torch.zeros(2, 100, dtype=torch.float64), 2, torch.zeros(2, dtype=torch.int32))
        assert gpu.resources() == []
        sample_distinct(torch.zeros(2, 100), 2, torch.zeros(2, dtype=torch.int32))
        assert len(gpu.resources()) == 2


def test_other_numbers_of_rows_and_samples_compile_nothing_new() -> None:
    """Chunks of 3 rows have any alignment; 9 to 16 samples use the same number of registers."""
    with compile_target(90) as gpu:
        for rows, k in ((1, 9), (16, 16), (21, 10), (3, 13)):
            hidden, embedding = torch.zeros(rows, 8), torch.zeros(3000, 8)
            excluded = torch.zeros(rows, dtype=torch.int64)
            sample_candidates(hidden, embedding, k, seed=1, excluded=excluded, rows=3)
        assert len(gpu.resources()) == 2
