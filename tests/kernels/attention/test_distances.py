"""Diagonals of a bias: by a view, and by indices when traced."""

import pytest
import torch
from fastbert_kernels import from_diagonals
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(1, 9), st.integers(0, 8), st.integers(0, 8), st.integers(0, 8))
def test_view_and_index_are_equal_to_the_bit(longest: int, first: int, rows: int, length: int) -> None:
    first, length = first % longest, 1 + length % longest
    rows = 1 + rows % (longest - first)
    by_distance = torch.randn(2, 2 * longest - 1, requires_grad=True)
    by_view = from_diagonals(by_distance, first, rows, length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.jit, "is_tracing", lambda: True)
        by_index = from_diagonals(by_distance, first, rows, length)
    distances = torch.arange(length) - torch.arange(first, first + rows)[:, None]
    assert torch.equal(by_view, by_distance[:, distances + longest - 1])
    assert torch.equal(by_view, by_index)
    gradient = torch.randint(-9, 9, by_view.shape).float()  # whole numbers: their sums are exact in any order
    of_view, of_index = (torch.autograd.grad(form, by_distance, gradient)[0] for form in (by_view, by_index))
    assert torch.equal(of_view, of_index)
    assert of_view.sum() == gradient.sum()
