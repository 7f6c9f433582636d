"""Attention on this machine's GPU: errors and times of all configurations, and times compared with PyTorch. B T =
65,536 tokens, 12 heads of 64, bfloat16; as in the encoder, q, k, v are views of one tensor and the bias is float32."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert_kernels import attention, attention_reference, configurations
from fastbert_kernels.attention.untied import by_kernels, by_matrix, untied_parts
from fastbert_kernels.benchmarks.contestants import BACKENDS, Contestant, contestants, sdpa
from fastbert_kernels.benchmarks.measuring import FAILURES, ResultRows, Settings, ceilings, failure, peak_mib, timed
from fastbert_kernels.configurations import CANDIDATES, TENSOR_CLASSES, Tiles

HEADS, HEAD_SIZE, TOKENS = 12, 64, 65_536
LENGTHS = (512, 128, 1024, 2048, 256)
"""Most informative first, since the time limit may end the benchmark."""
WRONG = 0.03
"""Error relative to the norm above which a result is wrong: rounding to bfloat16 gives less than 0.01."""
TOY = {"heads": 2, "size": 16, "lengths": (32, 48), "tokens": 96}


def shape(settings: Settings) -> tuple[int, int, tuple[int, ...], int]:
    return tuple(TOY.values()) if settings.toy else (HEADS, HEAD_SIZE, LENGTHS, TOKENS)


def tensors(settings: Settings, length: int, biased: bool, batch: int | None = None) -> list[Tensor]:
    """q, k, v, with `biased` the bias, and a gradient of the output."""
    heads, size, _, tokens = shape(settings)
    batch = batch or tokens // length
    options = {"generator": torch.Generator(settings.device).manual_seed(0), "device": settings.device}
    qkv = torch.randn(batch, length, 3, heads, size, **options).to(torch.bfloat16)
    found = [x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4)]
    if biased:
        found.append(torch.randn(1, heads, length, length, **options).requires_grad_())
    return [*found, torch.randn(batch, length, heads, size, **options).to(torch.bfloat16).transpose(1, 2)]


def packed_tensors(settings: Settings, length: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Sequences of 1/4 to all of `length`: padded tensors as in `tensors`; key_padding; and the bounds when packed."""
    found = tensors(settings, length, True)
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(length // 4, length + 1, (len(found[0]),), generator=generator)
    sizes[0] = length
    bounds = F.pad(sizes.cumsum(0), (1, 0)).to(settings.device, torch.int32)
    return found, (torch.arange(length) < sizes[:, None]).to(settings.device), bounds


def concatenated(q: Tensor, k: Tensor, v: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
    """TUPE-A without its reset, as attention with heads of twice the size, by cuDNN or flash."""
    longer = [torch.cat([x, pos.expand(len(x), -1, -1, -1)], -1) for x, pos in ((q, pos_q), (k, pos_k))]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        out = F.scaled_dot_product_attention(*longer, F.pad(v, (0, v.shape[-1])), scale=longer[0].shape[-1] ** -0.5)
    return out[..., : v.shape[-1]]


# --- errors


def results(compute: Callable, inputs: list[Tensor], grad: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and gradients, of inputs in `dtype` or as they are."""
    leaves = inputs if dtype is None else [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = compute(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def errors(settings: Settings, function: Callable, length: int, biased: bool = True) -> dict[str, list[float]]:
    """Maximum errors of output and gradients against float64, each with that of the reference in bfloat16, and the
    function's error relative to the norm."""
    *inputs, grad = tensors(settings, length, biased, batch=3)
    exact = results(attention_reference, inputs, grad, torch.float64)
    ours, plain = (results(compute, inputs, grad) for compute in (function, attention_reference))
    found = zip(("out", "q", "k", "v", "bias"), exact, ours, plain, strict=False)
    return {
        name: [
            *((x.double() - true).abs().max().item() for x in (a, b)),
            ((a.double() - true).norm() / true.norm()).item(),
        ]
        for name, true, a, b in found
    }


def within(found: dict[str, list[float]]) -> bool:
    """Report whether errors are at most twice those of plain PyTorch in the same precision, plus 1e-5."""
    return all(ours <= 2 * plain + 1e-5 for ours, plain, _ in found.values())


def wrong(found: dict[str, list[float]]) -> str | None:
    """The results that are not those of this function, whatever the rounding in bfloat16; None if there are none."""
    others = [f"{name} by {relative:.2g}" for name, (*_, relative) in found.items() if not relative <= WRONG]
    return f"wrong: error relative to the norm of {', '.join(others)}" if others else None


# --- tune


def tune(settings: Settings, save: bool = False) -> ResultRows:
    """Measure every configuration of every kernel: errors with ragged and whole tiles, and the time of a forward or
    backward pass with the fastest correct configurations of the kernels before it and defaults for those after it. With
    `save`, the fastest correct ones are saved for this GPU."""
    rows = ResultRows("attention-tune", settings)
    long, short = (64, 32) if settings.toy else (512, 128)
    best: dict[str, tuple[float, Tiles]] = {}
    for kernel, choices in CANDIDATES.items():
        length = short if kernel == "short" else long
        *inputs, grad = tensors(settings, length, True)
        chosen = {name: {TENSOR_CLASSES[0]: tiles} for name, (_, tiles) in best.items()}
        for tiles in (choices[0], choices[-1]) if settings.toy else choices:
            if rows.over:
                break
            row: dict[str, Any] = {"kernel": kernel, "tiles": list(tiles), "length": length}
            configurations.use({**chosen, kernel: {TENSOR_CLASSES[0]: tiles}})
            try:
                found = {n: errors(settings, attention, n) for n in (length, length - 3)}
                row |= {"correct": all(map(within, found.values())), "errors": {str(n): e for n, e in found.items()}}
                out = attention(*inputs)
                part = functools.partial(attention, *inputs)
                if kernel != "forward":
                    part = functools.partial(torch.autograd.grad, out, inputs, grad, retain_graph=True)
                row |= timed(part, settings.device, settings.rounds)
            except FAILURES as error:  # a configuration that does not fit this GPU is a result too
                row |= {"correct": False, "failed": failure(error)}
            finally:
                configurations.use({})
            rows.add(**row)
            if row["correct"]:
                best[kernel] = min(best.get(kernel, (row["ms"], tiles)), (row["ms"], tiles))
    choice = {kernel: {TENSOR_CLASSES[0]: list(tiles)} for kernel, (_, tiles) in best.items()}
    rows.add(best=choice)
    if save and settings.device.type == "cuda":
        rows.add(saved=str(configurations.save_tuned(choice, torch.cuda.get_device_name())))
    return rows


# --- bench


def bench(
    settings: Settings,
    tiles: dict | None = None,
    lengths: Sequence[int] | None = None,
    others: bool = True,
    ready: Callable[[], None] = lambda: None,
) -> ResultRows:
    """Measure forward, backward and both, peak memory and errors of every contestant; then, if `others`, packed
    sequences and TUPE. A contestant is timed only if its results are right.

    Args:
        tiles: configurations of the kernels.
        lengths: those of LENGTHS by default.
        ready: called when the contestants of a length have been compiled and checked, before they are timed.
    """
    if tiles:
        configurations.use(tiles)
    device = settings.device
    heads, size, default_lengths, tokens = shape(settings)
    header = {"ceilings": ceilings(device, settings.toy), "tiles": tiles or "default"}
    rows = ResultRows("attention", settings, **header, shape={"heads": heads, "head_size": size, "tokens": tokens})
    for length in lengths or default_lengths:
        checked = [
            (one.biased, *check(settings, name, one, length))
            for name, one in contestants(device.type == "cuda").items()
            if not rows.over
        ]
        ready()
        for biased, function, row in checked:
            if function is not None and not rows.over:
                measure(row, settings, function, lambda n=length, b=biased: tensors(settings, n, b))
            rows.add(**row)
        for name, function, inputs, grad in itertools.chain(packed(settings, length), untied(settings, length)):
            if rows.over or not others:
                break
            row = {"case": "packed" if "pa" in name else "TUPE", "length": length, "contestant": name}
            measure(row, settings, function, lambda found=(*inputs, grad): found)
            rows.add(**row)
    configurations.use({})
    return rows


def check(settings: Settings, name: str, one: Contestant, length: int) -> tuple[Callable | None, dict[str, Any]]:
    """Build a contestant, compile it for the shape that is timed, and compare it with float64.

    Returns:
        Its function, or None if it is not installed, fails or is wrong; and its row so far, which reports that.
    """
    row: dict[str, Any] = {"case": "batch", "length": length, "contestant": name}
    try:
        function = one.build()
        row["errors"] = errors(settings, function, length, one.biased)
        if (found := wrong(row["errors"])) is not None:
            return None, row | {"wrong": found}
        *inputs, grad = tensors(settings, length, one.biased)
        results(function, inputs, grad)
    except ModuleNotFoundError as error:
        return None, row | {"failed": f"not installed: no module {error.name}; pip install {one.package}"}
    except Exception as error:  # of any package, such as a shape that it does not support: a result too
        return None, row | {"failed": failure(error)}
    finally:
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
    return function, row


def measure(
    row: dict[str, Any], settings: Settings, function: Callable, prepare: Callable[[], Sequence[Tensor]]
) -> None:
    """Add the times of a contestant, or how it failed, to `row`; `prepare` returns the inputs and a gradient."""
    try:
        *inputs, grad = prepare()
        time_passes(row, settings, function, inputs, grad)
    except Exception as error:  # of any package: the others are measured
        row["failed"] = failure(error)


def packed(settings: Settings, length: int) -> Iterator[tuple[str, Callable, list[Tensor], Tensor]]:
    """The same sequences packed and padded, to compare times, not TFLOP/s."""
    (q, k, v, bias, grad), real, bounds = packed_tensors(settings, length)
    flat = [x.detach().transpose(1, 2)[real].transpose(0, 1)[None].requires_grad_() for x in (q, k, v)]
    rows_of_grad = grad.transpose(1, 2)[real].transpose(0, 1)[None]
    yield "fastbert, packed", functools.partial(attention, cu_seqlens=bounds), [*flat, bias], rows_of_grad
    yield "fastbert, padded", functools.partial(attention, key_padding=real), [q, k, v, bias], grad
    if settings.device.type == "cuda":
        efficient = functools.partial(sdpa, BACKENDS["memory-efficient"], real=real)
        yield "SDPA memory-efficient, padded", efficient, [q, k, v, bias], grad


def untied(settings: Settings, length: int) -> Iterator[tuple[str, Callable, list[Tensor], Tensor]]:
    """The implementations of `untied_attention`, and the concatenated form."""
    q, k, v, grad = tensors(settings, length, False)
    heads, size, *_ = shape(settings)
    options = {"generator": torch.Generator(q.device).manual_seed(2), "device": q.device, "dtype": q.dtype}
    pos_q, pos_k = (torch.randn(heads, length, size, **options).requires_grad_() for _ in range(2))
    first, other = (torch.randn(heads, **options).requires_grad_() for _ in range(2))
    table = torch.randn(32, heads, **options).requires_grad_()
    plain = {"cu_seqlens": None, "key_padding": None, "segments": None, "scale": (2 * size) ** -0.5}
    plain |= {"dropout_p": 0.0, "seed": None, "keys": None}

    def form(compute: Callable) -> Callable:
        return lambda q, k, v, *parts: compute(q, k, v, untied_parts(q, *parts, False, 128), **plain)

    parts = [pos_q, pos_k, first, other, table]
    yield "TUPE-R as a matrix", form(by_matrix), [q, k, v, *parts], grad
    if settings.device.type == "cuda":
        yield "TUPE-R by components", form(by_kernels), [q, k, v, *parts], grad
        compiled = torch.compile(concatenated, dynamic=False)
        yield "TUPE-A without reset, concatenated", compiled, [q, k, v, pos_q, pos_k], grad


def time_passes(
    row: dict[str, Any], settings: Settings, function: Callable, inputs: list[Tensor], grad: Tensor
) -> None:
    """Add the times of a contestant to `row`, with TFLOP/s (4 B H T T K forward, 10 backward, without recomputation),
    and its peak memory beyond the inputs in MiB."""

    def both() -> Any:
        return torch.autograd.grad(function(*inputs), inputs, grad)

    both()
    row["peak_mib"] = peak_mib(both, settings.device)
    out = function(*inputs)
    batch, heads, length, size = inputs[0].shape
    for passes, call, products in (
        ("forward", functools.partial(function, *inputs), 4),
        ("backward", functools.partial(torch.autograd.grad, out, inputs, grad, retain_graph=True), 10),
        ("both", both, 14),
    ):
        row[passes] = timed(call, settings.device, settings.rounds)
        if batch > 1:
            row[passes]["tflops"] = round(products * batch * heads * length**2 * size / row[passes]["ms"] / 1e9, 2)
