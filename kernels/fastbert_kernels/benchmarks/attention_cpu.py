"""Attention on a CPU compared with implementations in PyTorch: 8,192 tokens, 12 heads of 64, and the shape of a small
run, with and without a learned bias, forward only and with the backward pass. Contestants alternate, so other load
on the machine affects all of them."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert_kernels import attention, attention_reference
from fastbert_kernels.benchmarks.measuring import ResultRows, Settings

SHAPES = (
    (64, 4, 128, 64),
    (64, 12, 128, 64),
    (32, 12, 256, 64),
    (16, 12, 512, 64),
    (8, 12, 1024, 64),
    (4, 12, 2048, 64),
)
"""B, H, T, K."""
TOY = ((2, 2, 16, 16),)


def masked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    mask = None if bias is None else bias.to(q.dtype).expand(len(q), -1, -1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def concatenated(q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> Tensor:
    """TUPE-A's bias (without its reset) as longer queries and keys: `positions` [2, H, T, K]."""
    longer = [
        torch.cat([x, pos.to(x.dtype).expand(len(x), -1, -1, -1)], -1) for x, pos in zip((q, k), positions, strict=True)
    ]
    return F.scaled_dot_product_attention(*longer, v, scale=q.shape[-1] ** -0.5)


def contestants(biased: bool) -> dict[str, Callable]:
    found = {"fastbert": attention, "plain products": attention_reference, "SDPA": masked}
    return {**found, "SDPA, concatenated": concatenated} if biased else found


def bench(settings: Settings) -> ResultRows:
    """Milliseconds of each contestant, and its time relative to fastbert's: the median ratio over all rounds."""
    rows = ResultRows("attention-cpu", settings, threads=torch.get_num_threads())
    for shape in TOY if settings.toy else SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            for biased in (True, False):
                inputs = tensors(shape, dtype)
                for backward in (True, False):
                    if rows.over:
                        return rows
                    what = {
                        "shape": list(shape),
                        "dtype": str(dtype).removeprefix("torch."),
                        "bias": "learned" if biased else "none",
                    }
                    what["passes"] = "forward and backward" if backward else "forward"
                    race(rows, what, calls(inputs, biased, backward), settings.rounds)
    return rows


def tensors(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    batch, heads, length, size = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, length, 3, heads, size, generator=generator).to(dtype)
    return {
        "qkv": [x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4)],
        "bias": torch.randn(1, heads, length, length, generator=generator).requires_grad_(),
        "positions": torch.randn(2, heads, length, size, generator=generator).requires_grad_(),
        "grad": torch.randn(batch, length, heads, size, generator=generator).to(dtype).transpose(1, 2),
    }


def calls(inputs: dict[str, Any], biased: bool, backward: bool) -> dict[str, Callable[[], Any]]:
    def call(name: str, function: Callable) -> Callable[[], Any]:
        more = inputs["positions" if "concatenated" in name else "bias"] if biased else None
        required = [*inputs["qkv"], *([more] if biased else [])]

        def run() -> Any:
            with torch.set_grad_enabled(backward):
                out = function(*inputs["qkv"], more)
            return torch.autograd.grad(out, required, inputs["grad"]) if backward else out

        return run

    return {name: call(name, function) for name, function in contestants(biased).items()}


def race(rows: ResultRows, what: dict[str, Any], functions: dict[str, Callable[[], Any]], rounds: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if number:  # the first is a warm-up
                times[name].append(1000 * (time.perf_counter() - start))
    for name, found in times.items():
        over = statistics.median(a / b for a, b in zip(found, times["fastbert"], strict=True))
        spread = {"ms": statistics.median(found), "least": min(found), "most": max(found)}
        rows.add(**what, contestant=name, **{k: round(x, 3) for k, x in spread.items()}, over=round(over, 3))
