"""Runs the attention kernels on ragged cases and prints, as JSON, the largest errors of values and gradients against
the float64 reference, next to those of the reference in the same precision. Fails if PyTorch's checks of the operators
fail or, on a GPU, two runs differ in a bit. The argument is the name of a group of cases; runs on a GPU or, with
TRITON_INTERPRET=1, on the CPU."""

import json
import sys
from collections.abc import Callable, Sequence

import torch
from fastbert_kernels import (
    attention,
    attention_reference,
    combine,
    untied_attention,
    untied_attention_reference,
)
from fastbert_kernels.attention import triton_launch as launches
from fastbert_kernels.attention import untied as untied_module
from fastbert_kernels.attention.triton_launch import attention_forward, triton_attention
from fastbert_kernels.attention.untied import by_kernels, untied_parts
from fastbert_kernels.backend import INTERPRETED
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
GENERATOR = torch.Generator().manual_seed(0)
# Uninitialized memory is NaN: a result that depends on it is not finite.
torch.use_deterministic_algorithms(True, warn_only=True)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=GENERATOR).to(DEVICE, dtype)


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape, generator=GENERATOR).to(DEVICE)


def keys(count: int) -> Tensor:
    return combine(torch.tensor(3, dtype=torch.int32), torch.arange(count, dtype=torch.int32)).to(DEVICE)


def poisoned(x: Tensor) -> Tensor:
    """`x` as a part of a larger tensor of NaN, so that reads beyond it are detected."""
    whole = torch.full([size + 3 for size in x.shape], torch.nan, dtype=x.dtype, device=DEVICE)
    part = whole[tuple(slice(1, size + 1) for size in x.shape)]
    return part.copy_(x).requires_grad_()


def run(case: str, function: Callable, reference: Callable, tensors: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Prints a case: the errors of the kernel and of the reference for the output and every gradient. Returns those of
    the kernel."""

    def results(compute: Callable, dtype: torch.dtype | None = None) -> list[Tensor]:
        own = [x.detach().to(dtype) if dtype else x.detach() for x in tensors]
        own = [x.requires_grad_() for x in own]
        out = compute(*own)
        return [out.detach(), *torch.autograd.grad(out, own, grad.to(out.dtype))]

    exact, ours, plain = results(reference, torch.float64), results(function), results(reference)
    errors = [
        [(x.double() - true).abs().max().item() for x in both] for true, *both in zip(exact, ours, plain, strict=True)
    ]
    assert all(x.isfinite().all() for x in ours), case
    if not INTERPRETED:  # the interpreter runs one program after another, so only memory could differ
        assert all(torch.equal(a, b) for a, b in zip(ours, results(function), strict=True)), case
    print(json.dumps({"case": case, "errors": errors}), flush=True)
    return ours


def run_dense(
    dtype: torch.dtype, batch: int, length: int, size: int, biases: int | None, p=0.0, pad=False, parts=False
) -> list[Tensor]:
    tensors = [poisoned(random(batch, 2, length, size, dtype=dtype)) for _ in range(3)]
    if biases is not None:
        tensors.append(poisoned(random(biases, 2, length, length, dtype=dtype)))
    padding = uniform(batch, length) < 0.7 if pad else None
    if pad:
        padding[1] = False  # all keys of this row are masked
    segments = (uniform(batch, length) < 0.1).cumsum(1).int() if parts else None
    options = {"key_padding": padding, "segments": segments, "dropout_p": p, "keys": keys(batch) if p else None}
    return run(
        f"{dtype} B {batch} T {length} K {size} bias {biases} padding {pad} dropout {p} segments {parts}",
        lambda q, k, v, b=None: triton_attention(q, k, v, b, **options, scale=size**-0.5),
        lambda q, k, v, b=None: attention_reference(q, k, v, b, **options),
        tensors,
        random(batch, 2, length, size, dtype=dtype),
    )


def run_packed(ends: list[int], has_bias: bool, p: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE)
    longest = int(cu_seqlens.diff().max())
    tensors = [poisoned(random(1, 2, ends[-1], 16, dtype=dtype)) for _ in range(3)]
    if has_bias:
        tensors.append(poisoned(random(1, 2, longest, longest, dtype=dtype)))
    options = {"cu_seqlens": cu_seqlens, "dropout_p": p, "keys": keys(len(ends)) if p else None}
    return run(
        f"{dtype} packed {ends} bias {has_bias} dropout {p}",
        lambda q, k, v, b=None: triton_attention(q, k, v, b, **options, scale=0.25),
        lambda q, k, v, b=None: attention_reference(q, k, v, b, **options),
        tensors,
        random(1, 2, ends[-1], 16, dtype=dtype),
    )


def run_untied(
    dtype: torch.dtype, length: int, relative: bool, p=0.0, pad=False, ends: list[int] | None = None, parts=False
) -> None:
    batch, size, buckets = 1 if ends else 2, 16, 8
    tensors = [poisoned(random(batch, 2, length, size, dtype=dtype)) for _ in range(3)]
    positions = int(torch.tensor([0, *ends]).diff().max()) if ends else length
    tensors += [poisoned(random(2, positions + 2, size, dtype=dtype)) for _ in range(2)]
    tensors += [poisoned(random(2, dtype=dtype)) for _ in range(2)]
    if relative:
        tensors.append(poisoned(random(buckets, 2, dtype=dtype)))
    padding = uniform(batch, length) < 0.7 if pad else None
    segments = (uniform(batch, length) < 0.1).cumsum(1) if parts else None
    options = {
        "segments": segments,
        "cu_seqlens": torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE) if ends else None,
        "key_padding": padding,
    }
    options |= {"dropout_p": p, "keys": keys(len(ends) if ends else batch) if p else None}

    def kernels(q, k, v, pos_q, pos_k, first, other, table=None):
        components = untied_parts(q, pos_q, pos_k, first, other, table, ends is not None, 20)
        return by_kernels(q, k, v, components, **options, scale=0.2, seed=None)

    def plain(*tensors):
        return untied_attention_reference(*tensors, **options, scale=0.2, max_distance=20)

    grad = random(batch, 2, length, size, dtype=dtype)
    case = f"untied {dtype} T {length} {relative} padding {pad} segments {parts} dropout {p} {ends}"
    run(case, kernels, plain, tensors, grad)


def check_operators() -> None:
    """PyTorch's checks of a custom operator, a single graph under torch.compile, and a contiguous output."""
    q, k, v = (random(2, 2, 9, 16).requires_grad_() for _ in range(3))
    bias, options, none = random(1, 2, 9, 9).requires_grad_(), {"dropout_p": 0.1, "keys": keys(2)}, [None] * 4
    torch.library.opcheck(attention_forward, (q, k, v, bias, *none, None, None, None, keys(2), 0.25, 0.1, 9))
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    one = [x.detach()[:1].requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(attention_forward, (*one, bias, *none, bounds, None, None, None, 0.25, 0.0, 9))
    positions = [random(2, 9, 16).requires_grad_() for _ in range(2)]
    biases = [random(2, 2).requires_grad_(), random(2, 17).requires_grad_()]
    torch.library.opcheck(attention_forward, (q, k, v, None, *positions, *biases, None, None, None, None, 0.25, 0.0, 9))
    compiled = torch.compile(triton_attention, backend="aot_eager", fullgraph=True)
    out, plain = (function(q, k, v, bias, scale=0.25, **options) for function in (compiled, triton_attention))
    assert torch.equal(out, plain)
    assert torch.equal(*(torch.autograd.grad(x.sum(), bias)[0] for x in (out, plain)))
    # As in the encoder: views of one tensor, and an output that becomes [B, T, H K] without a copy.
    views = random(2, 9, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind()
    assert attention(*views, bias).transpose(1, 2).is_contiguous()


def check_edges() -> None:
    """Empty batches and sequences; strided or int64 keys, bounds and segments; expanded tensors."""
    untied_module.BIAS_BYTES = 0  # use the kernels at any size
    q, k, v = (random(2, 2, 9, 16).requires_grad_() for _ in range(3))
    bias, scattered = random(1, 2, 9, 9).requires_grad_(), keys(4)[::2]
    vectors = [random(2, 9, 16).requires_grad_() for _ in range(2)]
    numbers = [random(2).requires_grad_() for _ in range(2)]
    for none in (slice(0), (slice(None), slice(None), slice(0))):
        empty = [x[none] for x in (q, k, v)]
        own = bias if none == slice(0) else bias[:, :, :0, :0]
        out = attention(*empty, own, dropout_p=0.1, seed=1)
        assert out.shape == empty[0].shape
        assert not torch.autograd.grad(out.sum(), bias)[0].any()
    out = untied_attention(*(x[:0] for x in (q, k, v)), *vectors, *numbers)
    assert out.shape == (0, 2, 9, 16)
    assert not any(x.any() for x in torch.autograd.grad(out.sum(), vectors + numbers))

    def both(**options) -> None:
        for function in (attention, untied_attention):
            more = (bias,) if function is attention else (*vectors, *numbers)
            reference = attention_reference if function is attention else untied_attention_reference
            own = [x[:1].detach().requires_grad_() for x in (q, k, v)] if "cu_seqlens" in options else [q, k, v]
            ours, plain = (form(*own, *more, **options) for form in (function, reference))
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
            found = (torch.autograd.grad(x.sum(), (*own, *more)) for x in (ours, plain))  # the gradient is expanded
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    both(dropout_p=0.3, keys=scattered)
    bounds = torch.tensor([0, 7, 4, 7, 9, 7], dtype=torch.int32, device=DEVICE)[::2]
    both(cu_seqlens=bounds, dropout_p=0.3, keys=scattered)
    far = torch.tensor([0, 2**32, 5, 0, 5 - 2**32, 5, 2**32, 0, 0], device=DEVICE)
    both(segments=far.expand(2, 9), key_padding=(torch.arange(18, device=DEVICE) % 5 > 0).view(9, 2).T)
    odd = random(2, 2, 17, 9).transpose(2, 3)
    pieces = odd, odd.flip(2), random(1, 2, 9, 17).expand(2, -1, -1, -1)
    torch.testing.assert_close(attention(*pieces), attention_reference(*pieces), rtol=1e-5, atol=1e-5)


def dense() -> None:
    options = [(None, True, 0.2), (1, False, 0.2), (1, True, 0.0), (2, True, 0.2)]
    for biases, pad, p in options:
        run_dense(torch.float32, 2, 37, 24, biases, p, pad)
    run_dense(torch.float32, 2, 70, 16, 1, 0.1, pad=True, parts=True)
    run_dense(torch.float32, 2, 40, 17, 2, parts=True)
    for length, size in ((1, 16), (33, 128), (64, 8)):
        run_dense(torch.float32, 2, length, size, 1)
    launches.PROGRAMS = 16  # two groups of sequences, the second smaller, instead of a group for each
    run_dense(torch.float32, 3, 33, 16, 1, 0.1)


def low() -> None:
    """16-bit dtypes: sequences that fit into one tile, and longer ones; whole and ragged tiles."""
    run_dense(torch.float16, 2, 70, 24, 1, 0.1, pad=True)
    run_dense(torch.bfloat16, 2, 130, 24, 1, 0.1, pad=True, parts=True)
    run_dense(torch.bfloat16, 2, 64, 64, 1)
    run_dense(torch.bfloat16, 1, 128, 16, None, 0.1, parts=True)
    run_dense(torch.bfloat16, 1, 256, 64, 1)
    run_dense(torch.float16, 2, 35, 96, 1)
    run_packed([5, 5, 38, 168], True, 0.1, torch.bfloat16)


def packed() -> None:
    for ends, has_bias, p in (([5, 38, 38, 55], True, 0.0), ([64], True, 0.2), ([1, 2, 40], False, 0.2)):
        run_packed(ends, has_bias, p)


def run_stored(limits: Sequence[int], function: Callable, *arguments, **options) -> None:
    """Runs a case with the gradient of the scores stored for at most this number of pairs of a sequence and a head at a
    time. The results for all limits have the same bits."""
    state, form = GENERATOR.get_state(), launches._Launches.stored_group
    found = []
    for limit in limits:
        launches._Launches.stored_group = lambda call, *more, n=limit: (min(n, call.pairs), form(call, *more)[1])
        GENERATOR.set_state(state)
        found.append(function(*arguments, **options))
    launches._Launches.stored_group = form
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(found[0], one, strict=True)), arguments


def stored() -> None:
    """The backward pass with a stored gradient of the scores, in groups that end within a head and at its end."""
    run_stored((3, 9), run_dense, torch.float32, 2, 37, 17, 1, 0.2, pad=True, parts=True)
    run_stored((3,), run_dense, torch.float32, 2, 33, 16, 2, pad=True)
    run_stored((1,), run_dense, torch.float32, 1, 64, 16, 1)  # whole tiles
    run_stored((3,), run_packed, [5, 38, 38, 55], True, 0.1)
    run_stored((2,), run_packed, [1, 2, 40], False, 0.2)
    run_stored((3, 9), run_dense, torch.bfloat16, 2, 40, 24, 1, 0.1, pad=True)  # by the short kernel
    run_stored((1,), run_packed, [7, 137], True, 0.1, torch.float16)


def untied() -> None:
    run_untied(torch.float32, 37, False, pad=True, parts=True)
    run_untied(torch.float32, 64, True, pad=True)
    launches.STRIPE_CELLS = 1  # stripes of 128 queries
    run_untied(torch.bfloat16, 150, True, pad=True)
    run_untied(torch.bfloat16, 70, False, p=0.1, parts=True)
    run_untied(torch.float32, 55, True, p=0.1, ends=[5, 38, 38, 55])


if __name__ == "__main__":
    {f.__name__: f for f in (check_operators, check_edges, dense, low, packed, stored, untied)}[sys.argv[1]]()
