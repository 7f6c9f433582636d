"""Attention on a CPU by chunks, against its definition: values and all gradients, with every option."""

import itertools

import pytest
import torch
from fastbert_kernels import attention, attention_reference
from fastbert_kernels.attention import cpu as module
from fastbert_kernels.attention import cpu_chunks
from fastbert_kernels.attention.cpu import cpu_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernels.attention.test_cpu_chunks import divide

PLAIN = {"cu_seqlens": None, "key_padding": None, "segments": None, "dropout_p": 0.0, "keys": None}


def inputs(shape: tuple[int, int, int, int], queries: int, bias: tuple[int, int] | None, dtype=torch.float64):
    """q, k, v as views of one tensor, the bias if given; and a non-contiguous gradient of the output."""
    batch, heads, length, size = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, length, 3, heads, size, generator=generator, dtype=torch.float64).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    tensors = [q[:, :, :queries], k, v]
    if bias is not None:
        tensors.append(torch.randn(*bias, queries, length, generator=generator, dtype=torch.float64).to(dtype))
    grad = torch.randn(batch, queries, heads, size, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
    return [x.detach().requires_grad_() for x in tensors], grad


def results(function, tensors: list[Tensor], grad: Tensor, **options) -> list[Tensor]:
    out = function(*tensors[:3], tensors[3] if len(tensors) > 3 else None, **options)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-11) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    divide(monkeypatch, CELLS=60, BLOCK=4, STEP=2)


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 13), st.integers(1, 5)),
    cells=st.sampled_from([1, 30, 200, 1 << 18]),
    whole=st.booleans(),
    bias=st.sampled_from([None, "one", "heads", "rows", "both"]),
    pad=st.booleans(),
    parts=st.booleans(),
    drop=st.booleans(),
    save=st.booleans(),
)
def test_equals_the_definition(shape, cells, whole, bias, pad, parts, drop, save) -> None:
    batch, heads, length, _ = shape
    queries = length if whole else max(1, length // 2)
    sizes = {None: None, "one": (1, 1), "heads": (1, heads), "rows": (batch, 1), "both": (batch, heads)}[bias]
    tensors, grad = inputs(shape, queries, sizes)
    generator = torch.Generator().manual_seed(1)
    options = {
        **PLAIN,
        "key_padding": torch.rand(batch, length, generator=generator) < 0.6 if pad else None,
        "segments": (torch.rand(batch, length, generator=generator) < 0.3).cumsum(1) if parts else None,
        "dropout_p": 0.3 * drop,
        "keys": torch.arange(batch, dtype=torch.int32) if drop else None,
    }
    names = ("CELLS", "BLOCK", "STEP")
    before = [getattr(cpu_chunks, name) for name in names], module.SAVED_BYTES
    cpu_chunks.CELLS, cpu_chunks.BLOCK, cpu_chunks.STEP = cells, 4, 2
    module.SAVED_BYTES = before[1] if save else 0
    try:
        ours = results(cpu_attention, tensors, grad, scale=0.7, **options)
    finally:
        for name, value in zip(names, before[0], strict=True):
            setattr(cpu_chunks, name, value)
        module.SAVED_BYTES = before[1]
    assert_same(ours, results(attention_reference, tensors, grad, scale=0.7, **options))


@pytest.mark.parametrize(("p", "biased"), list(itertools.product((0.0, 0.2), (False, True))))
def test_packed_sequences(p: float, biased: bool, small_chunks) -> None:
    """Several sequences of the same length, and an empty one."""
    bounds = torch.tensor([0, 5, 8, 8, 13, 14, 19], dtype=torch.int32)
    tensors, grad = inputs((1, 2, 19, 4), 19, None)
    if biased:
        bias = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        tensors.append(bias.requires_grad_())
    options = {**PLAIN, "cu_seqlens": bounds, "dropout_p": p, "keys": torch.arange(6, dtype=torch.int32) if p else None}
    ours, theirs = (results(f, tensors, grad, scale=0.5, **options) for f in (cpu_attention, attention_reference))
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 400.0), *itertools.product((torch.float32, torch.bfloat16, torch.float16), (0.125, 20.0))],
)
def test_scores_of_any_size(scale: float, dtype: torch.dtype) -> None:
    """Scores whose powers of 2 overflow or underflow are computed with the largest subtracted."""
    tensors, grad = inputs((2, 2, 50, 16), 50, (1, 2), dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    true = results(attention_reference, exact, grad.double(), scale=scale)
    ours = results(cpu_attention, tensors, grad, scale=scale, **PLAIN)
    plain = results(attention_reference, tensors, grad, scale=scale)
    for a, b, e in zip(ours, plain, true, strict=True):
        assert a.isfinite().all() and a.dtype == b.dtype
        assert (a - e).abs().max() <= 2 * (b - e).abs().max() + 1e-5


def test_a_query_without_keys_gives_zeros() -> None:
    tensors, grad = inputs((2, 2, 6, 4), 6, (1, 2))
    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[1] = False
    out, *gradients = results(cpu_attention, tensors, grad, scale=0.5, **{**PLAIN, "key_padding": padding})
    assert (out[1] == 0).all() and all(x.isfinite().all() for x in gradients) and (gradients[0][1] == 0).all()


def test_gradcheck(small_chunks) -> None:
    tensors, _ = inputs((2, 2, 6, 3), 6, (1, 2))
    options = {**PLAIN, "dropout_p": 0.3, "keys": torch.arange(2, dtype=torch.int32)}
    torch.autograd.gradcheck(lambda *x: cpu_attention(*x, scale=0.6, **options), tensors)
    out = cpu_attention(*tensors, scale=0.6, **options)
    (first,) = torch.autograd.grad(out.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        first.sum().backward()


def test_subsets_of_gradients() -> None:
    tensors, grad = inputs((2, 2, 9, 4), 9, (1, 2))
    every = results(cpu_attention, tensors, grad, scale=0.5, **PLAIN)
    for number, one in enumerate(tensors):
        alone = [x if x is one else x.detach() for x in tensors]
        out = cpu_attention(*alone, scale=0.5, **PLAIN)
        assert torch.equal(torch.autograd.grad(out, one, grad)[0], every[1 + number])
    with torch.no_grad():
        assert torch.equal(cpu_attention(*tensors, scale=0.5, **PLAIN), every[0])


def test_the_public_function_uses_chunks_for_large_inputs(monkeypatch) -> None:
    """Checkpointed, under autocast with a float32 bias, and twice to the same bits."""
    tensors, grad = inputs((8, 8, 128, 16), 128, (1, 8), torch.bfloat16)
    tensors[3] = tensors[3].detach().float().requires_grad_()
    before = [x.detach().clone() for x in tensors]
    called = []
    monkeypatch.setattr(module, "cpu_attention", lambda *x, **more: called.append(1) or cpu_attention(*x, **more))
    ours = results(attention, tensors, grad, dropout_p=0.1, seed=4)
    again = results(
        lambda *x, **more: checkpoint(attention, *x, use_reentrant=False, **more), tensors, grad, dropout_p=0.1, seed=4
    )
    assert len(called) == 3 and all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))  # inputs are not modified
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(*tensors, dropout_p=0.1, seed=4), ours[0])
    attention(*(x[:1, :1, :8] for x in tensors[:3]))
    assert len(called) == 4  # few scores: the reference
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), attention(*tensors), rtol=0.02, atol=0.02)
