"""Every kernel by Triton's own launcher: the grid and all parameters that a GPU's driver would receive, compared with
the tensors and numbers of the call. What the kernels compute from them is tested in Triton's interpreter."""

import ctypes
import shutil
from collections.abc import Iterator
from math import ceil
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from fastbert_kernels import attention, configurations, linear_cross_entropy, sample_candidates, untied_attention
from fastbert_kernels.attention import triton_launch, untied
from fastbert_kernels.configurations import STORING, TENSOR_CLASSES
from torch import Tensor

from tests.kernels import stand_in
from tests.kernels.stand_in import STREAM, Launch, recorded

B, H, K = 3, 2, 16
M, N = 32, 16
"""Tiles of the attention kernels."""
TENSORS = ("q", "k", "v", "do", "out", "dq", "dk", "dv")
COMPILER = shutil.which("gcc") or shutil.which("clang")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Iterator[ctypes.CDLL]:
    if COMPILER is None or stand_in.missing_header():
        pytest.skip("Triton's launcher is C code: it needs gcc or clang, and Python.h")
    if torch.cuda.is_available():
        pytest.skip("this machine's own driver is in use; scripts/gpu/measure.py runs the kernels there")
    from triton.backends.nvidia import driver

    folder = tmp_path_factory.mktemp("stand-in")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_LIBCUDA_PATH", str(folder))
        found = stand_in.build(folder, COMPILER)
        driver.CudaUtils()  # Triton's launcher, compiled for this Python
        patch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))  # these kernels are not compiled to the end
        yield found
    for cached in (driver.libcuda_dirs, driver.library_dirs):
        cached.cache_clear()


@pytest.fixture
def launches(library) -> Iterator[list[Launch]]:
    """Launches of the test, whose kernels have small tiles that compile fast."""
    with recorded(library) as found:
        select(0)
        yield found
    configurations.use({})


def select(stored: int) -> None:
    kernels = ("forward", "keys", "queries", "bias", "short", "stored_queries")
    sizes = {kernel: [M, N, 1, 1, stored if kernel in STORING else 0] for kernel in kernels}
    configurations.use({kernel: dict.fromkeys(TENSOR_CLASSES, numbers) for kernel, numbers in sizes.items()})


class Own:
    """A pointer to memory that the call allocates: equal to the pointer with which it is compared first, if no other
    tensor has that."""

    def __init__(self, used: set[int]) -> None:
        self.used, self.pointer = used, None

    def __eq__(self, pointer: object) -> bool:
        if self.pointer is None and pointer not in self.used:
            self.pointer = pointer
            self.used.add(pointer)
        return self.pointer == pointer

    def __repr__(self) -> str:
        return f"own memory {self.pointer}"


def rows(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else (x.data_ptr(), *x.stride())


def single(x: float) -> float:
    return ctypes.c_float(x).value


def check(launch: Launch, kernel: str, programs: tuple[int, ...], threads: int, meant: dict[str, Any]) -> None:
    assert (launch.kernel, launch.stream, launch.threads) == (f"{kernel}_kernel", STREAM, threads)
    assert launch.grid == (*programs, 1, 1)[:3]
    for name, value in launch.arguments.items():
        assert meant[name] == value, (kernel, name)


def strided(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that has other strides in each dimension than a tensor of its own."""
    whole = torch.zeros([size + 2 + 2 * index for index, size in enumerate(shape)], dtype=dtype)
    return whole[tuple(slice(1, size + 1) for size in shape)]


def attend(launches: list[Launch], length: int, *, biases: int | None, p: float, packed: bool = False) -> None:
    """Attention and its gradients, each launch compared with what was meant."""
    masked, before = biases is not None and not packed, len(launches)
    ends = [0, 1, length + 1, 2 * length] if packed else None
    batch, tokens = (1, ends[-1]) if packed else (B, length)
    q, k, v, grad = (strided(batch, H, tokens, K + extra, dtype=torch.bfloat16)[..., :K] for extra in (0, 2, 4, 6))
    bias = None if biases is None else strided(biases, H, length, length)
    bounds = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    padding = strided(batch, length, dtype=torch.bool) if masked else None
    segments = strided(batch, length, dtype=torch.int64) if masked else None
    keys = torch.zeros(B, dtype=torch.int32) if p else None
    inputs = [x.requires_grad_() for x in (q, k, v, bias) if x is not None]
    options = {"cu_seqlens": bounds, "key_padding": padding, "segments": segments, "dropout_p": p, "keys": keys}
    out = attention(q, k, v, bias, **options, scale=0.3, max_seqlen=length)
    dq, dk, dv, *dbias = torch.autograd.grad(out, inputs, grad)

    tensors = [q, k, v, grad, bias, out, dq, dk, dv, *dbias, bounds, padding, segments, keys]
    used = {x.data_ptr() for x in tensors if x is not None}
    meant = {name: rows(x) for name, x in zip(TENSORS, (q, k, v, grad, out, dq, dk, dv), strict=True)}
    meant |= {name: (Own(used), H * tokens, tokens) for name in ("lse", "delta")}
    meant |= {"bias": None, "untied": None, "relative": None, "bounds": None if ends is None else bounds.data_ptr()}
    if bias is not None:
        meant["bias"] = (bias.data_ptr(), bias.stride(0) if biases > 1 else 0, *bias.stride()[1:])
    limit = 2 * round(p * 2**31) - 2**31
    meant |= {"padding": rows(padding), "segments": rows(segments)}
    meant |= {"dropout": (keys.data_ptr(), limit, single(1 / (1 - p))) if p else None, "UPCAST": False}
    meant |= {"scale": single(0.3), "T": length, "B": B, "H": H, "K": K, "BLOCK_M": M, "BLOCK_N": N, "BLOCK_K": K}
    meant |= {"stored": None, "first_pair": 0, "EVEN": length % 64 == 0 and not packed}
    by_queries, by_keys = ceil(length / M), ceil(length / N)
    found = iter(launches[before:])
    check(next(found), "forward", (by_queries * B * H,), 32, meant)
    short = length <= 128
    if not short:
        sizes = {"T": tokens, "BLOCK_M": 32}
        check(next(found), "delta", (ceil(tokens / 32) * batch * H,), 128, meant | sizes)
    if any("stored" in launch.kernel for launch in launches[before:]):
        check_stored(found, length, short, dbias[0] if dbias else None, meant, used)
    elif short:
        check(next(found), "short", (B * H,), 32, meant | {"BLOCK_N": 128})
    else:
        check(next(found), "keys", (by_keys * B * H,), 32, meant)
        check(next(found), "queries", (by_queries * B * H,), 32, meant)
    last = next(found, None)
    if last is not None:
        count = 2 if biases == 1 else 1  # sequences per group
        groups = ceil(B / count)
        sums = (Own(used), H * length**2, length**2, length, 1) if biases == 1 else rows(dbias[0])
        meant |= {"dbias": sums, "first_row": 0, "rows": length, "count": count}
        check(last, "bias", (by_queries * by_keys * H * groups,), 32, meant)
    assert next(found, None) is None


def check_stored(found, length: int, short: bool, dbias: Tensor | None, meant: dict[str, Any], used) -> None:
    """Groups of 4 pairs of a sequence and a head, and of 2."""
    columns = ceil(length / 64) * 64
    meant |= {"stored": (Own(used), length * columns, columns), "dbias": None if dbias is None else rows(dbias)}
    blocks = {"BLOCK_N": 128} if short else {}
    for first, pairs in ((0, 4), (4, 2)):
        meant |= {"first_pair": first, "pairs": pairs}
        programs = 1 if short else ceil(length / N)
        check(next(found), "short" if short else "keys", (programs * pairs,), 32, meant | blocks)
        if not short:
            check(next(found), "stored_queries", (ceil(length / M) * pairs,), 32, meant)
        if dbias is not None:
            per_output = B if len(dbias) == 1 else 1
            outputs = len({pair // per_output for pair in range(first, first + pairs)})
            sizes = {"BLOCK_M": 64, "BLOCK_N": 16, "per_output": per_output}
            programs = ceil(length / 64) * ceil(length / 16) * outputs
            check(next(found), "stored_bias", (programs,), 128, meant | sizes)


@pytest.mark.parametrize("stored", [0, 1])
def test_attention(stored: int, launches, monkeypatch) -> None:
    """A bias for the batch with masks and dropout, one for each of short sequences, packed sequences, whole tiles."""
    select(stored)
    monkeypatch.setattr(triton_launch, "STORED_PROGRAMS", 1)
    for length, biases, p, packed in (
        (150, 1, 0.1, False),
        (100, B, 0.0, False),
        (192, None, 0.0, True),
        (192, None, 0.0, False),
    ):
        tiles = ceil(length / M) * ceil(length / N) * H
        monkeypatch.setattr(triton_launch, "PROGRAMS", tiles * 2)
        monkeypatch.setattr(triton_launch, "MIB", length * ceil(length / 64) * 64 * 2 * 4)
        attend(launches, length, biases=biases, p=p, packed=packed)


def test_untied_attention(launches, monkeypatch) -> None:
    """TUPE's components, whose gradients are computed in stripes of 128 queries."""
    select(1)  # not for this call
    length, count = 150, 2
    monkeypatch.setattr(untied, "BIAS_BYTES", 0)
    monkeypatch.setattr(triton_launch, "STRIPE_CELLS", 1)
    monkeypatch.setattr(triton_launch, "PROGRAMS", 1)
    q, k, v, grad = (strided(count, H, length, K, dtype=torch.bfloat16).requires_grad_() for _ in range(4))
    pos_q, pos_k = (torch.zeros(H, length, K, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    first, other, table = torch.zeros(H), torch.zeros(H), torch.zeros(8, H)
    out = untied_attention(q, k, v, pos_q, pos_k, first, other, table, scale=0.3)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v, pos_q), grad)[:3]
    used = {x.data_ptr() for x in (q, k, v, grad, pos_q, pos_k, first, other, table, out, dq, dk, dv)}
    meant = {name: rows(x) for name, x in zip(TENSORS, (q, k, v, grad, out, dq, dk, dv), strict=True)}
    meant |= {name: (Own(used), H * length, length) for name in ("lse", "delta")}
    meant |= {"untied": (pos_q.data_ptr(), pos_k.data_ptr(), Own(used), length), "relative": Own(used), "stored": None}
    meant |= dict.fromkeys(("bias", "bounds", "padding", "segments", "dropout")) | {
        "first_pair": 0,
        "scale": single(0.3),
    }
    meant |= {"T": length, "B": count, "H": H, "K": K, "BLOCK_M": M, "BLOCK_N": N, "BLOCK_K": K}
    meant |= {"UPCAST": False, "EVEN": False}
    programs = {name: ceil(length / size) * count * H for name, size in (("queries", M), ("keys", N))}
    found = iter(launches)
    check(next(found), "forward", (programs["queries"],), 32, meant)
    check(next(found), "delta", (ceil(length / 32) * count * H,), 128, meant | {"BLOCK_M": 32})
    for kernel in ("keys", "queries"):
        check(next(found), kernel, (programs[kernel],), 32, meant)
    for start, stripe in ((0, 128), (128, 22)):
        sums = Own({meant["q"][0]}), H * stripe * length, stripe * length, length, 1
        meant |= {"dbias": sums, "first_row": start, "rows": stripe, "count": count}
        check(next(found), "bias", (ceil(stripe / M) * ceil(length / N) * H,), 32, meant)
    assert next(found, None) is None


def test_losses(launches) -> None:
    """Chunks of 2 and 1 rows of targets; the kernel adds the bias, which the products do not."""
    count, words = 5, 37
    hidden, embedding = (torch.zeros(size, 8, dtype=torch.bfloat16, requires_grad=True) for size in (count, words))
    bias, target = torch.zeros(words, dtype=torch.bfloat16), torch.zeros(count, dtype=torch.int64)
    linear_cross_entropy(hidden, embedding, bias, target, ignore_index=3, rows=2)
    used = {x.data_ptr() for x in (hidden, embedding, bias, target)}
    meant = {"p_logits": Own(used), "row_stride": 48, "ignore_index": 3, "V": words, "GRADIENTS": True, "BLOCK": 64}
    meant |= {"p_bias": bias.data_ptr(), "BIAS": True}
    losses = launches[0].arguments["p_loss"]
    assert losses not in used and len(launches) == 3
    for start, launch in zip((0, 2, 4), launches, strict=True):
        pointers = {"p_target": target.data_ptr() + 8 * start, "p_loss": losses + 4 * start, "INTERPRETED": False}
        check(launch, "rows", (min(2, count - start),), 256, meant | pointers)


def test_samples(launches) -> None:
    """Chunks of 2 and 1 rows, whose vocabulary of 79 blocks takes two programs a row."""
    count, words, k = 3, 79 * 64 - 5, 3
    hidden, embedding = (torch.zeros(size, 8, dtype=torch.bfloat16) for size in (count, words))
    keys, excluded = torch.zeros(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int64)
    sample_candidates(hidden, embedding, k, keys=keys, excluded=excluded, rows=2)
    used = {x.data_ptr() for x in (hidden, embedding, keys, excluded)}
    call = {name: Own(used) for name in ("p_logits", "p_allowed", "p_floor")}
    call |= {"row_stride": 79 * 64, "V": 79 * 64, "B": 79, "K": k, "BLOCK": 64, "GROUP": 64}
    call |= {"BLOCKS": 128, "SAMPLES": 4}
    found = iter(launches)
    for start, size in ((0, 2), (2, 1)):
        inside = set(used)
        meant = call | {name: Own(inside) for name in ("p_max", "p_sum", "p_ids", "p_log")}
        meant |= {"p_keys": keys.data_ptr() + 4 * start, "p_excluded": excluded.data_ptr() + 8 * start}
        check(next(found), "block", (size, 2), 128, meant)
        check(next(found), "sampling", (size,), 32, meant)
    assert next(found, None) is None
