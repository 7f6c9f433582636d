"""CPU attention for every division into chunks: values, errors in low precision, memory."""

import itertools
import platform
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from fastbert_kernels import attention_reference, combine
from fastbert_kernels.attention import cpu, cpu_chunks
from fastbert_kernels.attention.cpu import cpu_attention as by_chunks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.largest import Largest

H, K = 2, 12
DIVISIONS = {
    "one chunk": {},
    "rows": {"CELLS": 4000},
    "heads": {"CELLS": 1500},
    "blocks of queries": {"CELLS": 300},
    "blocks of segments": {"BLOCK": 8, "STEP": 4},
    "oneDNN, nothing saved": {"SINGLE": 1, "SAVED_BYTES": 0, "CELLS": 1500},
    "nothing saved": {"SAVED_BYTES": 0},
}
"""Constants with which a call of a few thousand scores is divided like a large one."""
OPTIONS = {
    "plain": {},
    "bias": {"bias": (1, H)},
    "bias by row": {"bias": (3, H), "padding": True},
    "bias for all heads": {"bias": (1, 1), "segments": True},
    "bias by row for all heads": {"bias": (3, 1), "dropout_p": 0.2},
    "float32 bias": {"bias": (1, H), "bias_dtype": torch.float32, "padding": True},
    "padding": {"padding": True, "dropout_p": 0.2},
    "segments": {"segments": True, "dropout_p": 0.2},
    "padding and segments": {"bias": (1, H), "padding": True, "segments": True, "dropout_p": 0.2},
    "first query": {"bias": (1, H), "queries": 1, "padding": True, "dropout_p": 0.2},
    "few queries": {"bias": (1, H), "queries": 5, "segments": True},
    "packed": {"sizes": [5, 0, 17, 33, 16, 17], "bias": (1, H), "dropout_p": 0.2},
    "packed alike": {"sizes": [19, 19, 19], "bias": (1, 1)},
    "packed, no bias": {"sizes": [30, 7, 1, 1]},
}


def divide(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Set the constants of `cpu_chunks` and `cpu`, so that small calls are divided like large ones."""
    for name, value in sizes.items():
        monkeypatch.setattr(cpu if hasattr(cpu, name) else cpu_chunks, name, value)


def case(
    dtype: torch.dtype,
    *,
    batch: int = 3,
    queries: int = 37,
    length: int = 37,
    bias: tuple[int, int] | None = None,
    bias_dtype: torch.dtype | None = None,
    padding: bool = False,
    segments: bool = False,
    dropout_p: float = 0.0,
    sizes: list[int] | None = None,
    seed: int = 0,
) -> tuple[list[Tensor], dict, Tensor]:
    """Tensors, options, and a gradient of the output; q, k, v are views of one tensor, as in the encoder."""
    generator = torch.Generator().manual_seed(seed)
    if sizes:
        batch, queries, length = 1, sum(sizes), sum(sizes)
    qkv = torch.randn(batch, length, 3, H, K, generator=generator).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    tensors = [q[:, :, :queries], k, v]
    if bias:
        side = max(sizes) if sizes else length
        shape = *bias, side if sizes else queries, side
        tensors.append(torch.randn(shape, generator=generator).to(bias_dtype or dtype))
    rows = len(sizes) if sizes else batch
    options = {
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32) if sizes else None,
        "key_padding": torch.rand(batch, length, generator=generator) < 0.7 if padding else None,
        "segments": (torch.rand(batch, length, generator=generator) < 0.1).cumsum(1) if segments else None,
        "scale": 0.3,
        "dropout_p": dropout_p,
        "keys": combine(torch.tensor(seed, dtype=torch.int32), torch.arange(rows, dtype=torch.int32)),
    }
    options["keys"] = options["keys"] if dropout_p else None
    return tensors, options, torch.randn(batch, queries, H, K, generator=generator).to(dtype).transpose(1, 2)


def results(function, tensors: list[Tensor], options: dict, grad: Tensor, dtype: torch.dtype | None = None):
    """The output and all gradients, in `dtype` if it is given."""
    own = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out = function(*own, *[None] * (4 - len(own)), **options)
    return [out.detach(), *torch.autograd.grad(out, own, grad.to(out.dtype))]


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_reference(name: str, division: str, monkeypatch) -> None:
    divide(monkeypatch, **DIVISIONS[division])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        given = case(dtype, **{**OPTIONS[name], "bias_dtype": None})
        for ours, theirs in zip(results(by_chunks, *given), results(attention_reference, *given), strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", OPTIONS)
def test_errors_are_those_of_the_reference(name: str, dtype: torch.dtype) -> None:
    """The largest and the root mean square error of each tensor against float64, over 30 seeds."""
    errors = []
    for seed in range(30):
        given = case(dtype, seed=seed, **OPTIONS[name])
        exact = results(attention_reference, *given, torch.float64)
        both = results(by_chunks, *given), results(attention_reference, *given)
        errors.append([[(x.double() - true).flatten() for x, true in zip(own, exact, strict=True)] for own in both])
        assert [x.dtype for x in both[0]] == [x.dtype for x in both[1]]
    for tensor in range(len(exact)):
        ours, plain = (torch.cat([seed[side][tensor] for seed in errors]) for side in (0, 1))
        assert ours.abs().max() <= 2 * plain.abs().max() + 1e-5, tensor
        assert ours.square().mean().sqrt() <= 1.5 * plain.square().mean().sqrt() + 1e-6, tensor


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialized memory is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("division", DIVISIONS)
def test_uninitialized_memory_is_not_read(division: str, poisoned, monkeypatch) -> None:
    assert torch.empty(1).isnan()
    divide(monkeypatch, **DIVISIONS[division])
    for dtype, name in itertools.product((torch.float32, torch.bfloat16), ("plain", "padding and segments", "packed")):
        given = case(dtype, **OPTIONS[name])
        first, again = results(by_chunks, *given), results(by_chunks, *given)
        assert all(x.isfinite().all() for x in first)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [-1, 1])
def test_chunks_outside_the_range_of_powers(dtype: torch.dtype, sign: int, monkeypatch) -> None:
    divide(monkeypatch, **DIVISIONS["rows"])
    for name in ("bias", "padding and segments"):
        (q, k, v, bias), options, grad = case(dtype, **OPTIONS[name])
        bias = bias.repeat(3, 1, 1, 1)
        bias[1] += sign * 100
        bias[2, 1, :, ::3] -= 200
        given = [q, k, v, bias], options, grad
        exact = results(attention_reference, *given, torch.float64)
        for a, b, true in zip(results(by_chunks, *given), results(attention_reference, *given), exact, strict=True):
            assert (a - true).norm() <= 1.5 * (b - true).norm() + 1e-6 * true.norm()


class Operators(TorchDispatchMode):
    """Names of the operators called in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("cells", [37 * 37, 37 * 37 + 1])
def test_large_matrices_are_multiplied_by_onednn(cells: int, monkeypatch) -> None:
    """The operator is private to PyTorch: this test fails with a version that removed it."""
    divide(monkeypatch, SINGLE=cells)
    with Operators() as called:
        results(by_chunks, *case(torch.float32, **OPTIONS["bias"]))
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    assert ("mkldnn::_linear_pointwise" in called.names) == (x86 and cells == 37 * 37)


def test_large_scores_of_masked_keys_do_not_matter() -> None:
    tensors, options, grad = case(torch.float32)
    options["key_padding"] = (torch.arange(37) % 3 > 0).expand(3, -1)
    expected = results(by_chunks, tensors, options, grad)
    tensors[1] = torch.where(options["key_padding"][:, None, :, None], tensors[1], 1e30)
    for a, b in zip(results(by_chunks, tensors, options, grad), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("given", [{}, {"sizes": [9, 9]}, {"sizes": [4, 7]}])
def test_short_sequences_in_float32_without_gradients(given: dict) -> None:
    """Short sequences are not divided; the alternative gives the same result."""
    tensors, options, _ = case(torch.float32, **given)
    with torch.no_grad():
        ours, theirs = (f(*tensors, None, **options) for f in (by_chunks, attention_reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("limit", "count"), [(1 << 30, 1), (0, 0)])
def test_memory(limit: int, count: int, monkeypatch) -> None:
    """No operation computes all scores at once; saved is one matrix of probabilities, or nothing of that size."""
    divide(monkeypatch, CELLS=1 << 14, SAVED_BYTES=limit)
    tensors, options, grad = case(torch.bfloat16, batch=4, queries=120, length=120, bias=(1, H), dropout_p=0.2)
    saved: list[int] = []
    leaves = [x.detach().requires_grad_() for x in tensors]
    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            out = by_chunks(*leaves, **options)
        torch.autograd.grad(out, leaves, grad)
    assert largest.size <= H * 120 * 120
    assert sum(saved) == count * 4 * H * 120 * 120 + sum(x.numel() for x in tensors)


def test_gradients_of_many_chunks_are_added_in_float32(monkeypatch) -> None:
    """Each of 512 queries is a chunk and adds 1/512 to each value: in bfloat16 the sum would stop at a half."""
    divide(monkeypatch, CELLS=512)
    q, k, v = torch.zeros(3, 1, 1, 512, 4, dtype=torch.bfloat16)
    masks = {"cu_seqlens": None, "key_padding": None, "segments": None}
    out = by_chunks(q, k, v.requires_grad_(), None, **masks, scale=1.0, dropout_p=0.0, keys=None)
    out.backward(torch.ones_like(out))
    assert (v.grad == 1.0).all()


def test_a_layer_learns_the_same() -> None:
    """Losses of 8 steps with chunks and with the reference agree, with dropout."""

    def losses(function) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(4, 30, H * K, generator=generator) for _ in range(2))
        weight = (0.3 * torch.randn(3 * H * K, H * K, generator=generator)).requires_grad_()
        bias = torch.zeros(1, H, 30, 30, requires_grad=True)
        masks, found = {"cu_seqlens": None, "key_padding": None, "segments": None}, []
        for step in range(8):
            q, k, v = F.linear(x, weight).unflatten(-1, (3, H, K)).permute(2, 0, 3, 1, 4)
            keys = torch.arange(4 * step, 4 * step + 4, dtype=torch.int32)
            out = function(q, k, v, bias, **masks, scale=0.3, dropout_p=0.1, keys=keys)
            loss = F.mse_loss(out.transpose(1, 2).flatten(2), y)
            found.append(loss.item())
            for parameter, gradient in zip((weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True):
                parameter.data -= 2.0 * gradient
        return found

    ours, theirs = losses(by_chunks), losses(attention_reference)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[-1] < ours[0]
