"""Runs the attention kernels of `fastbert_kernels.triton_attention` over ragged cases and prints, as JSON, the largest
errors of values and gradients against the float64 reference, each beside that of the reference in the same precision;
fails if the operators are not what PyTorch wants of them. To be run with TRITON_INTERPRET=1."""

import json

import torch
from fastbert_kernels.attention import attention_reference, triton_attention
from fastbert_kernels.hashing import combine
from fastbert_kernels.triton_attention import attention_forward
from torch import Tensor

NAMES = ("out", "q", "k", "v", "bias")


def keys(count: int) -> Tensor:
    return combine(torch.tensor(3, dtype=torch.int32), torch.arange(count, dtype=torch.int32))


def poisoned(x: Tensor) -> Tensor:
    """`x` as a part of a larger tensor whose other numbers are NaN: whatever reads beyond it shows."""
    whole = torch.full([size + 3 for size in x.shape], torch.nan, dtype=x.dtype)
    part = whole[tuple(slice(1, size + 1) for size in x.shape)]
    return part.copy_(x).requires_grad_()


def run(case: str, function, reference, tensors: list[Tensor | None], grad: Tensor) -> None:
    """Prints a case: for the output and every gradient the errors of the kernel and of the plain way."""

    def results(compute, dtype=None):
        own = [x if x is None or dtype is None else x.detach().to(dtype).requires_grad_() for x in tensors]
        own = [x if x is None else x.detach().requires_grad_() if dtype else x for x in own]
        out = compute(*own)
        given = [x for x in own if x is not None]
        found = torch.autograd.grad(out, given, grad.to(out.dtype))
        named = zip((n for n, x in zip(NAMES[1:], own, strict=True) if x is not None), found, strict=True)
        return {"out": out.detach(), **dict(named)}

    exact, ours, plain = results(reference, torch.float64), results(function), results(reference, tensors[0].dtype)
    errors = {n: [(x[n].double() - exact[n]).abs().max().item() for x in (ours, plain)] for n in exact}
    assert all(x.isfinite().all() for x in ours.values()), case
    again = results(function)
    assert all(torch.equal(ours[n], again[n]) for n in ours), case
    print(json.dumps({"case": case, "errors": errors}), flush=True)


GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=GENERATOR).to(dtype)


def run_dense(
    dtype: torch.dtype, length: int, size: int, biases: int | None, pad: bool, p: float, parts: bool = False
) -> None:
    tensors = [poisoned(random(2, 2, length, size, dtype=dtype)) for _ in range(3)]
    tensors.append(None if biases is None else poisoned(random(biases, 2, length, length, dtype=dtype)))
    padding = torch.rand(2, length, generator=GENERATOR) < 0.7 if pad else None
    if pad:
        padding[1] = False  # no query of this row sees a key
    segments = (torch.rand(2, length, generator=GENERATOR) < 0.1).cumsum(1).int() if parts else None
    given = {"key_padding": padding, "segments": segments, "dropout_p": p, "keys": keys(2) if p else None}
    run(
        f"{dtype} T {length} K {size} bias {biases} padding {pad} dropout {p} segments {parts}",
        lambda q, k, v, b: triton_attention(q, k, v, b, **given, scale=size**-0.5),
        lambda q, k, v, b: attention_reference(q, k, v, b, **given),
        tensors,
        random(2, 2, length, size, dtype=dtype),
    )


def run_packed(ends: list[int], has_bias: bool, p: float) -> None:
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32)
    longest = int(cu_seqlens.diff().max())
    tensors = [poisoned(random(1, 2, ends[-1], 16)) for _ in range(3)]
    tensors.append(poisoned(random(1, 2, longest, longest)) if has_bias else None)
    given = {"cu_seqlens": cu_seqlens, "dropout_p": p, "keys": keys(len(ends)) if p else None}
    run(
        f"packed {ends} bias {has_bias} dropout {p}",
        lambda q, k, v, b: triton_attention(q, k, v, b, **given, scale=0.25),
        lambda q, k, v, b: attention_reference(q, k, v, b, **given),
        tensors,
        random(1, 2, ends[-1], 16),
    )


def check_operators() -> None:
    """PyTorch's own checks of a custom operator, and one graph under torch.compile."""
    q, k, v = (random(2, 2, 9, 16).requires_grad_() for _ in range(3))
    bias, given = random(1, 2, 9, 9).requires_grad_(), {"dropout_p": 0.1, "keys": keys(2)}
    torch.library.opcheck(attention_forward, (q, k, v, bias, None, None, None, keys(2), 0.25, 0.1, 9))
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    one = [x.detach()[:1].requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(attention_forward, (*one, bias, bounds, None, None, None, 0.25, 0.0, 9))
    compiled = torch.compile(triton_attention, backend="aot_eager", fullgraph=True)
    out, plain = (function(q, k, v, bias, scale=0.25, **given) for function in (compiled, triton_attention))
    assert torch.equal(out, plain)
    assert torch.equal(*(torch.autograd.grad(x.sum(), bias)[0] for x in (out, plain)))


def main() -> None:
    check_operators()
    options = [(None, False, 0.0), (None, True, 0.2), (1, False, 0.2), (1, True, 0.0), (2, True, 0.2), (2, False, 0.0)]
    for biases, pad, p in options:
        run_dense(torch.float32, 37, 24, biases, pad, p)
    run_dense(torch.float32, 70, 16, 1, True, 0.1, parts=True)
    run_dense(torch.float32, 40, 16, None, False, 0.0, parts=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        run_dense(dtype, 70, 64, 1, True, 0.1)
    for length, size in ((1, 16), (33, 128), (65, 8)):
        run_dense(torch.float32, length, size, 1, False, 0.0)
    for ends, has_bias, p in (([5, 38, 38, 55], True, 0.0), ([64], True, 0.2), ([1, 2, 40], False, 0.2)):
        run_packed(ends, has_bias, p)


if __name__ == "__main__":
    main()
