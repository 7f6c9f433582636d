"""TUPE's attention from the components of its bias, against the explicit formula, torch's own attention and
transformers' buckets."""

import pytest
import torch
import torch.nn.functional as F
from fastbert_kernels import untied_attention
from fastbert_kernels.attention import untied
from fastbert_kernels.attention.untied import by_matrix, by_stripes
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.t5.modeling_t5 import T5Attention

from tests.kernels.largest import Largest

B, H, T, K, R = 2, 3, 11, 4, 8


def inputs(
    relative: bool = True, batch: int = B, length: int = T, positions: int = T, dtype=torch.float64
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, H, length, K)] * 3 + [(H, positions, K)] * 2 + [(H,)] * 2 + [(R, H)] * relative
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def plain(q, k, v, pos_q, pos_k, cls_to_all, all_to_cls, table=None, max_distance: int = 128) -> torch.Tensor:
    """The paper's formula, cell by cell, with the buckets of transformers' T5."""
    length = q.shape[2]
    rows = []
    for i in range(length):
        row = []
        for j in range(length):
            score = (pos_q[:, i] * pos_k[:, j]).sum(-1) / (2 * K) ** 0.5
            if table is not None:
                bucket = T5Attention._relative_position_bucket(torch.tensor(j - i), True, len(table), max_distance)
                score = score + table[bucket]
            row.append(cls_to_all if i == 0 else all_to_cls if j == 0 else score)
        rows.append(torch.stack(row, -1))
    scores = q @ k.transpose(-1, -2) / (2 * K) ** 0.5 + torch.stack(rows, -2)
    return scores.softmax(-1) @ v


def assert_same(
    ours: torch.Tensor, theirs: torch.Tensor, tensors: list[torch.Tensor], tolerance: float = 1e-11
) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    for a, b in zip(torch.autograd.grad(ours, tensors, grad), torch.autograd.grad(theirs, tensors, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def cells(request, monkeypatch) -> int:
    """Number of scores computed at a time."""
    monkeypatch.setattr(untied, "CELLS", request.param)
    return request.param


# Queries one by one, four at a time, all at once.
@pytest.mark.parametrize("cells", [1, 2 * H * T * 4, 1 << 23], indirect=True)
@pytest.mark.parametrize("relative", [False, True])
def test_equals_the_formula(relative: bool, cells: int) -> None:
    tensors = inputs(relative)
    assert_same(untied_attention(*tensors), plain(*tensors), tensors)


def test_max_distance_changes_the_buckets() -> None:
    tensors = inputs()
    ours = untied_attention(*tensors, max_distance=5)
    assert_same(ours, plain(*tensors, max_distance=5), tensors)
    assert not torch.allclose(ours, untied_attention(*tensors))


@pytest.mark.parametrize("cells", [100], indirect=True)
def test_tupe_a_equals_torchs_attention_on_longer_vectors(cells: int) -> None:
    """The bias with its reset is an inner product of vectors of size K + 2."""
    tensors = inputs(False)
    q, k, v, pos_q, pos_k, cls_to_all, all_to_cls = tensors
    scale, first = (2 * K) ** -0.5, (torch.arange(T) == 0).double()[:, None]
    rest = 1 - first
    ones = torch.ones(B, H, T, 1, dtype=torch.float64)
    longer_q = torch.cat([q * scale, (pos_q * rest * scale).expand(B, -1, -1, -1), ones * first, ones * rest], -1)
    to_first = torch.stack([cls_to_all[:, None].expand(-1, T), all_to_cls[:, None] * first[:, 0]], -1)
    longer_k = torch.cat([k, (pos_k * rest).expand(B, -1, -1, -1), to_first.expand(B, -1, -1, -1)], -1)
    assert_same(untied_attention(*tensors), F.scaled_dot_product_attention(longer_q, longer_k, v, scale=1.0), tensors)


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 40), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_stripes_equal_the_matrix(length: int, cells: int, relative: bool, pad: bool, parts: bool, drop: bool) -> None:
    tensors = inputs(relative, length=length, positions=length + 3)
    generator = torch.Generator().manual_seed(2)
    padding = torch.rand(B, length, generator=generator) < 0.6 if pad else None
    segments = torch.randint(0, 2, (B, length), generator=generator) if parts else None
    options = {"key_padding": padding, "segments": segments, "dropout_p": 0.3 * drop, "seed": 5 if drop else None}
    before, untied.CELLS = untied.CELLS, cells

    def result(form) -> torch.Tensor:
        components = untied.untied_parts(tensors[0], *tensors[3:7], tensors[7] if relative else None, False, 128)
        return form(*tensors[:3], components, cu_seqlens=None, scale=0.4, keys=None, **options)

    try:
        assert_same(result(by_stripes), result(by_matrix), tensors)
    finally:
        untied.CELLS = before


@pytest.mark.parametrize("cells", [1, 1 << 23], indirect=True)
def test_packed_sequences_equal_separate_ones(cells: int) -> None:
    tensors = inputs(batch=1, positions=6)
    bounds = torch.tensor([0, 5, 5, 6, 11], dtype=torch.int32)
    keys = torch.arange(4, dtype=torch.int32)
    for drop in (0.0, 0.5):
        ours = untied_attention(*tensors, cu_seqlens=bounds, dropout_p=drop, keys=keys if drop else None)
        alone = []
        for number, a, b in ((0, 0, 5), (2, 5, 6), (3, 6, 11)):
            key = keys[number : number + 1] if drop else None
            alone.append(untied_attention(*(x[:, :, a:b] for x in tensors[:3]), *tensors[3:], dropout_p=drop, keys=key))
        assert_same(ours, torch.cat(alone, 2), tensors)


@pytest.mark.parametrize("cells", [60], indirect=True)
def test_gradcheck(cells: int) -> None:
    tensors = inputs(batch=1, length=4, positions=5)
    torch.autograd.gradcheck(lambda *x: untied_attention(*x, dropout_p=0.2, seed=3), tensors)


@pytest.mark.parametrize("cells", [40_000], indirect=True)
def test_long_sequences_have_no_matrix(cells: int) -> None:
    tensors = inputs(batch=1, length=300, positions=300, dtype=torch.float32)
    with Largest() as largest:
        untied_attention(*tensors).sum().backward()
    assert largest.size <= cells  # a matrix for each head has 270,000


@pytest.mark.parametrize("cells", [60, 1 << 23], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_precision(dtype: torch.dtype, cells: int) -> None:
    exact = inputs()
    low = [x.detach().to(dtype).requires_grad_() for x in exact]
    same = [x.detach().double() for x in low]
    out = untied_attention(*low)
    assert out.dtype == dtype and [g.dtype for g in torch.autograd.grad(out.sum(), low)] == [dtype] * len(low)
    reference = untied.untied_attention_reference(*low)
    error, theirs = ((x.double() - plain(*same)).abs().max() for x in (out, reference))
    assert error <= 2 * theirs + 1e-5


def test_wrong_arguments() -> None:
    good = inputs()
    for index, wrong, message in (
        (3, good[3][:, :-1], r"pos_q \(3, 10, 4\) must be \[H, P, K\]"),
        (4, torch.zeros(H, T + 1, K), "must have the same shape"),
        (5, torch.zeros(2), r"cls_to_all \(2,\) must be \[H\] \(3,\)"),
        (7, good[7].T, r"relative_table \(3, 8\) must be \[R, H\]"),
        (7, torch.zeros(R, H, dtype=torch.int64), "relative_table .* must be floating-point"),
        (1, good[1][:, :, :-1], "do not match"),
        (3, good[3].to("meta"), "pos_q .* on q's device"),
    ):
        with pytest.raises(ValueError, match=message):
            untied_attention(*good[:index], wrong, *good[index + 1 :])
    with pytest.raises(ValueError, match="with T at least 1"):
        untied_attention(*(x[:, :, :0] for x in good[:3]), *good[3:])
    with pytest.raises(ValueError, match="keys must be int32"):
        untied_attention(*good, dropout_p=0.5, keys=torch.zeros(B, dtype=torch.int64))
    with pytest.raises(ValueError, match="max_distance 2 must exceed"):
        untied_attention(*good, max_distance=2)
    with pytest.raises(ValueError, match="dropout needs a seed"):
        untied_attention(*good, dropout_p=0.5)
