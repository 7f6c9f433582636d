"""Attention on a CPU with each option, beside what PyTorch has there: time and memory.

    PYTHONPATH=kernels python3 -m fastbert_kernels.benchmarks.attention_cpu_options --out FOLDER

Contestants take turns. SDPA gets bias and masks as one additive mask; packed sequences go to it one by one; it has no
dropout that repeats. Freed memory is kept (mallopt), as `fastbert pretrain` does.
"""

import argparse
import ctypes
import functools
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastbert_kernels.attention import allowed_pairs, attention, attention_reference
from fastbert_kernels.benchmarks.measuring import Rows, Settings, json_text
from fastbert_kernels.benchmarks.report import about, table
from fastbert_kernels.configurations import write_whole

SHAPES = ((64, 4, 128, 64), (16, 12, 512, 64), (4, 12, 2048, 64))
TOY = ((2, 2, 16, 8), (1, 2, 24, 8))
"""B, H, T, K."""
OPTIONS = ("key_padding", "segments", "dropout", "packed", "first query")


def options_of(name: str, batch: int, length: int) -> dict[str, Any]:
    """Rows of 50 to 100 % real tokens, documents of 300 tokens, dropout 0.1, or sequences of T / 8 to T tokens."""
    generator = torch.Generator().manual_seed(0)
    if name == "key_padding":
        real = torch.randint(length // 2, length + 1, (batch, 1), generator=generator)
        return {"key_padding": torch.arange(length) < real}
    if name == "segments":
        return {"segments": (torch.rand(batch, length, generator=generator) < 1 / 300).cumsum(1)}
    if name == "dropout":
        return {"dropout_p": 0.1, "seed": 1}
    if name == "packed":
        ends = torch.randint(max(1, length // 8), length + 1, (16 * batch,), generator=generator).cumsum(0)
        return {"cu_seqlens": F.pad(ends[ends < batch * length], (1, 1)).to(torch.int32)}
    return {}


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    key_padding: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    if cu_seqlens is not None:
        parts = [
            sdpa(*(x[:, :, a:b] for x in (q, k, v)), bias[..., : b - a, : b - a])
            for a, b in itertools.pairwise(cu_seqlens.tolist())
        ]
        return torch.cat(parts, 2)
    mask = bias.to(q.dtype)
    if (allowed := allowed_pairs(key_padding, segments, q.shape[2])) is not None:
        mask = mask.masked_fill(~allowed, torch.finfo(q.dtype).min)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(len(q), q.shape[1], -1, -1))


def calls(shape: tuple[int, int, int, int], dtype: torch.dtype, option: str, backward: bool) -> dict[str, Callable]:
    """Of each contestant, with a learned bias in float32."""
    batch, heads, length, size = shape
    generator = torch.Generator().manual_seed(0)
    given, queries = options_of(option, batch, length), 1 if option == "first query" else length
    bias = torch.randn(1, heads, queries, length, generator=generator).requires_grad_()
    if "cu_seqlens" in given:
        given["cu_seqlens"][-1] = batch * length
        batch, length = 1, batch * length
        queries = length
        bias = bias[..., : int(given["cu_seqlens"].diff().max()), : int(given["cu_seqlens"].diff().max())]
        bias = bias.detach().requires_grad_()
    qkv = torch.randn(batch, length, 3, heads, size, generator=generator).to(dtype).permute(2, 0, 3, 1, 4)
    tensors = [x.detach().requires_grad_() for x in (qkv[0][:, :, :queries], qkv[1], qkv[2])] + [bias]
    grad = torch.randn(batch, queries, heads, size, generator=generator).to(dtype).transpose(1, 2)

    def run(function: Callable) -> Any:
        with torch.set_grad_enabled(backward):
            out = function(*tensors, **given)
        return torch.autograd.grad(out, tensors, grad) if backward else out

    found = {"fastbert": attention, "plain products": attention_reference}
    found |= {} if option == "dropout" else {"SDPA": sdpa}
    return {name: functools.partial(run, function) for name, function in found.items()}


def race(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each by round, after one to warm up. Each round begins with another, for who comes after a larger
    one finds the caches cold."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        names = list(functions)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            functions[name]()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: found[1:] for name, found in times.items()}


def peak_mib(function: Callable[[], Any]) -> float:
    """What a call has at a time beyond what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    changes = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0) / 2**20


def cpu() -> str:
    """Its name, and whether it multiplies bf16, as far as the system says."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    said = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    said = {name.strip(): value.strip() for name, value in said.items()}
    fast = "with" if "avx512_bf16" in said.get("flags", "") else "without"
    return f"{said.get('model name', platform.processor())}, {fast} AVX512-BF16"


def bench(settings: Settings) -> Rows:
    rows = Rows("attention-cpu-options", settings, threads=torch.get_num_threads(), cpu=cpu())
    shapes = TOY if settings.toy else SHAPES
    for shape, dtype, option in itertools.product(shapes, (torch.bfloat16, torch.float32), OPTIONS):
        what = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "option": option}
        for passes in ("forward and backward", "forward"):
            if rows.over:
                return rows
            functions = calls(shape, dtype, option, passes != "forward")
            times = race(functions, settings.rounds)
            for name, function in functions.items():
                over = statistics.median(a / b for a, b in zip(times[name], times["fastbert"], strict=True))
                spread = {"ms": statistics.median(times[name]), "least": min(times[name]), "most": max(times[name])}
                spread |= {"over": over, "peak_mib": peak_mib(function)}
                rows.add(**what, passes=passes, contestant=name, **{k: round(x, 3) for k, x in spread.items()})
    return rows


def text(found: dict[str, Any]) -> str:
    names = ("dtype", "option", "passes", "contestant", "ms", "least", "most", "over", "peak_mib")
    head = ["B, H, T, K", *names[:-2], "its time over fastbert's", "MiB"]
    lines = ([", ".join(map(str, row["shape"])), *(row.get(name) for name in names)] for row in found["rows"])
    said = options_of.__doc__.rstrip(".")
    said = f"{about(found)}\n- cpu: {found['cpu']}\n\nA learned bias in float32. {said}."
    return f"# {found['benchmark']}\n\n{said}\n\n{table(head, lines)}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for attention-cpu-options.json and .md")
    parser.add_argument("--rounds", type=int, default=9, help="that are timed (default: 9)")
    parser.add_argument("--seconds", type=float, default=480.0, help="no new case after this (default: 480)")
    parser.add_argument("--json", action="store_true", help="the results on standard output, as JSON")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, to rehearse")
    args = parser.parse_args(arguments)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**31 - 1), libc.mallopt(-1, -1)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    rows = bench(Settings(args.out, args.seconds, args.rounds, args.toy))
    found = {**rows.about, "rows": rows.rows}
    write_whole(rows.path, json_text(found, indent=1) + "\n")
    write_whole(rows.path.with_suffix(".md"), text(found))
    print(json_text(found) if args.json else text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
