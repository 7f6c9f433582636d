"""Attention with a learned bias on the GPU that is here: is every configuration right, which is fastest, how fast is
that beside what PyTorch has. Needs torch, Triton and this checkout, nothing else.

    PYTHONPATH=kernels python3 kernels/benchmarks/attention.py tune  --out $OUT
    PYTHONPATH=kernels python3 kernels/benchmarks/attention.py bench --out $OUT

`tune` tries tiles, warps and stages of each kernel at one shape: error against float64, time, the best last. `bench`
times forward, backward and both at B T = 65,536 tokens, 12 heads of 64, bfloat16, with the defaults or with the JSON of
`tune` (--tiles). Every row is written as soon as it is known, and both end within --seconds. `--toy` rehearses them on
any machine, at tiny shapes and without meaning.
"""

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from fastbert_kernels import triton_attention
from fastbert_kernels.attention import attention, attention_reference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import TritonError

HEADS, HEAD_SIZE, TOKENS = 12, 64, 65_536
LENGTHS = (128, 256, 512, 1024, 2048)
CANDIDATES = tuple(itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)))
"""Queries, keys, warps, stages."""
REFUSALS = (RuntimeError, TritonError)


class Rows:
    """A JSON file of rows that grows, and the clock that ends it."""

    def __init__(self, path: Path, seconds: float, device: torch.device) -> None:
        self.path, self.end, self.rows = path, time.monotonic() + seconds, []
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.about = {"device": name, "torch": torch.__version__, "triton": triton.__version__}

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.path.write_text(json.dumps({**self.about, "rows": self.rows}, indent=1))

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end


def tensors(batch: int, length: int, arguments: argparse.Namespace, biased: bool = True) -> list[Tensor | None]:
    """q, k, v as the encoder has them, views of one tensor; the bias; a gradient of the output."""
    heads, size, device = arguments.heads, arguments.head_size, arguments.device
    generator = torch.Generator(device).manual_seed(0)
    given = {"generator": generator, "device": device}
    qkv = torch.randn(batch, length, 3, heads, size, **given).to(torch.bfloat16)
    q, k, v = (x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4))
    bias = torch.randn(1, heads, length, length, **given).requires_grad_() if biased else None
    grad = torch.randn(batch, heads, length, size, **given).to(torch.bfloat16)
    return [q, k, v, bias, grad]


# --- contestants: (q, k, v, bias) -> output


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    mask = None if bias is None else bias.to(q.dtype).expand(len(q), -1, -1, -1)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex(function: Callable, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return function(q, k, v, score_mod=lambda score, b, h, m, n: score + bias[0, h, m, n])


def contestants(cuda: bool) -> dict[str, tuple[bool, Callable]]:
    """Name -> whether with a bias, and the function."""
    found = {"fastbert": (True, attention), "fastbert, no bias": (False, attention)}
    found["plain"] = (True, attention_reference)
    if not cuda:
        return found
    from torch.nn.attention.flex_attention import flex_attention

    return {
        **found,
        "plain, compiled": (True, torch.compile(attention_reference, dynamic=False)),
        "SDPA memory-efficient": (True, functools.partial(sdpa, SDPBackend.EFFICIENT_ATTENTION)),
        "FlexAttention": (True, functools.partial(flex, torch.compile(flex_attention, dynamic=False))),
        "SDPA flash, no bias": (False, functools.partial(sdpa, SDPBackend.FLASH_ATTENTION)),
        "SDPA cuDNN, no bias": (False, functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION)),
    }


# --- measuring


def timed(function: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
    """Milliseconds of each round, after two to warm up."""
    for _ in range(2):
        function()
    if device.type != "cuda":
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - start))
        return times
    flush = torch.empty(1 << 26, dtype=torch.int32, device=device)  # 256 MiB, more than the L2 cache
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, stop in marks:
        flush.zero_()
        start.record()
        function()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in marks]


def spread(times: list[float]) -> dict[str, float]:
    return {"ms": round(statistics.median(times), 4), "least": round(min(times), 4), "most": round(max(times), 4)}


def errors(function: Callable, arguments: argparse.Namespace, length: int) -> dict[str, list[float]]:
    """Of output and gradients against float64, beside those of the reference in bfloat16."""
    *given, grad = tensors(2, length, arguments)

    def results(compute: Callable, dtype: torch.dtype | None = None) -> list[Tensor]:
        own = given if dtype is None else [x.detach().to(dtype).requires_grad_() for x in given]
        out = compute(*own)
        return [out.detach(), *torch.autograd.grad(out, own, grad.to(out.dtype))]

    exact, ours, plain = results(attention_reference, torch.float64), results(function), results(attention_reference)
    names = ("out", "q", "k", "v", "bias")
    found = zip(names, exact, ours, plain, strict=True)
    return {name: [(x.double() - true).abs().max().item() for x in (a, b)] for name, true, a, b in found}


def within(found: dict[str, list[float]]) -> bool:
    """The rule: at most twice plain PyTorch's error in the same precision, plus 1e-5."""
    return all(ours <= 2 * plain + 1e-5 for ours, plain in found.values())


# --- tune


def tune(arguments: argparse.Namespace) -> None:
    rows = Rows(arguments.out / "attention-tune.json", arguments.seconds, arguments.device)
    length = 64 if arguments.toy else 512
    *given, grad = tensors(2 if arguments.toy else TOKENS // length, length, arguments)
    candidates = CANDIDATES[:2] if arguments.toy else CANDIDATES
    best: dict[str, tuple[float, tuple[int, ...]]] = {}
    for kernel, tiles in itertools.product(triton_attention.TILES, candidates):
        if rows.over:
            break
        before = triton_attention.TILES[kernel]
        triton_attention.TILES[kernel] = tiles
        row: dict[str, Any] = {"kernel": kernel, "tiles": tiles}
        try:
            found = errors(attention, arguments, 2 * length - 3 if arguments.toy else length - 3)
            out = attention(*given)
            part = functools.partial(attention, *given)
            if kernel != "forward":
                part = functools.partial(torch.autograd.grad, out, given, grad, retain_graph=True)
            row |= {"right": within(found), "errors": found, **spread(timed(part, arguments.device, arguments.rounds))}
        except REFUSALS as error:  # that a configuration does not fit this GPU is a result
            row |= {"right": False, "refused": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        triton_attention.TILES[kernel] = before
        rows.add(row)
        if row["right"]:
            best[kernel] = min(best.get(kernel, (row["ms"], tiles)), (row["ms"], tiles))
    rows.add({"best": {kernel: tiles for kernel, (_, tiles) in best.items()}})


# --- bench


def bench(arguments: argparse.Namespace) -> None:
    if arguments.tiles:
        chosen = json.loads(arguments.tiles.read_text())["rows"][-1]["best"]
        triton_attention.TILES.update({kernel: tuple(tiles) for kernel, tiles in chosen.items()})
    rows = Rows(arguments.out / "attention-bench.json", arguments.seconds, arguments.device)
    cuda = arguments.device.type == "cuda"
    for length, (name, (biased, function)) in itertools.product(
        (32, 48) if arguments.toy else LENGTHS, contestants(cuda).items()
    ):
        if rows.over:
            break
        batch = 2 if arguments.toy else TOKENS // length
        row = {"length": length, "batch": batch, "contestant": name}
        try:
            for kind, measured in measure(function, tensors(batch, length, arguments, biased), arguments):
                row[kind] = measured
            if biased:
                row["errors"] = errors(function, arguments, length)
        except REFUSALS as error:  # that a backend does not take this shape is a result
            row["refused"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        rows.add(row)


def measure(function: Callable, given: list[Tensor | None], arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Times with TFLOP/s (4 B H T T K forward, 10 backward), and the peak of memory beyond the inputs in MiB."""
    *inputs, grad = given
    wanted = [x for x in inputs if x is not None]
    cuda = arguments.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    out = function(*inputs)

    def backward() -> Any:
        return torch.autograd.grad(out, wanted, grad, retain_graph=True)

    def both() -> Any:
        return torch.autograd.grad(function(*inputs), wanted, grad)

    both()
    if cuda:
        yield "peak_mib", round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    batch, heads, length, size = inputs[0].shape
    unit = batch * heads * length * length * size / 1e9
    for kind, call, products in (
        ("forward", functools.partial(function, *inputs), 4),
        ("backward", backward, 10),
        ("both", both, 14),
    ):
        found = spread(timed(call, arguments.device, arguments.rounds))
        yield kind, {**found, "tflops": round(products * unit / found["ms"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "bench"))
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--tiles", type=Path, help="attention-tune.json, whose best tiles `bench` takes")
    parser.add_argument("--seconds", type=float, default=480, help="no new row after this (default: 480)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--head-size", type=int, default=HEAD_SIZE)
    parser.add_argument("--toy", action="store_true", help="tiny shapes, on any machine")
    arguments = parser.parse_args()
    if not arguments.toy and not torch.cuda.is_available():
        parser.error("there is no GPU here; --toy rehearses without one")
    arguments.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments.out.mkdir(parents=True, exist_ok=True)
    {"tune": tune, "bench": bench}[arguments.what](arguments)


if __name__ == "__main__":
    main()
