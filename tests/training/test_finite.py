"""Finite or not, as torch.isfinite finds for every number, without waiting and for all tensors of a checkpoint."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.training import finite
from fastbert.training.finite import NotFiniteError, all_finite, require_finite

NUMBER = st.one_of(st.floats(width=16), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0]))
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("form", [finite.foreach_bounds, finite.extremes])
@given(values=st.lists(st.lists(NUMBER, max_size=5), max_size=4), dtypes=st.lists(st.sampled_from(TYPES), min_size=4))
@settings(max_examples=60)
def test_equals_torch(form, values, dtypes) -> None:
    """Also in the form for GPUs, which is slow on CPUs."""
    tensors = [torch.tensor(row).to(dtype) for row, dtype in zip(values, dtypes, strict=False)]
    expected = all(tensor.isfinite().all() for tensor in tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finite, "extremes", form)
        found = all_finite(tensors)
    assert found.shape == () and found.dtype == torch.bool and bool(found) == expected


@pytest.mark.parametrize("form", [finite.foreach_bounds, finite.extremes])
@pytest.mark.parametrize("dtype", TYPES)
def test_one_number_of_many(form, dtype) -> None:
    """With and without vectorization, at the edges of blocks; the largest finite numbers do not overflow."""
    numbers = torch.full((100_003,), torch.finfo(dtype).max, dtype=dtype)
    numbers[::2] *= -1
    assert torch.stack(form([numbers, numbers.view(1, -1).mT])).isfinite().all()
    for index in (0, 63, 64, 50_001, 100_002):
        for bad in (math.nan, math.inf, -math.inf):
            other = numbers.clone()
            other[index] = bad
            assert not torch.stack(form([numbers, other])).isfinite().all()


@pytest.mark.parametrize("form", [finite.foreach_bounds, finite.extremes])
def test_integers_and_empty_tensors_are_finite(form, monkeypatch) -> None:
    monkeypatch.setattr(finite, "extremes", form)
    assert all_finite([])
    assert all_finite([torch.arange(3), torch.tensor([True]), torch.zeros(0), torch.zeros(0, 3), torch.tensor(7.0)])


def test_error_names_tensors_that_are_not_finite() -> None:
    good, bad = torch.ones(2, 3), torch.tensor([1.0, math.nan])
    require_finite({"model": {"a": good}, "optimizer": {}}, "it")
    groups = {"model": {"a": good, "b": bad}, "optimizer": {f"m{index}": -bad for index in range(4)}}
    with pytest.raises(NotFiniteError, match=r"^it holds .*: model b, optimizer m0, optimizer m1 and 2 more$"):
        require_finite(groups, "it")
