"""Compiles the kernels with every combination of their arguments, for GPUs that this machine lacks, and prints as JSON
the version of Triton and the number of variants of each kernel. Runs with the Triton that comes first on the path,
without a cache."""

import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
from fastbert_kernels import configurations, linear_cross_entropy, sample_candidates, sample_distinct
from fastbert_kernels.attention.triton_launch import attention_forward
from fastbert_kernels.compilation import compile_target
from triton.backends.nvidia.compiler import CUDABackend

PARTS = ("none", "bias", "untied", "relative")
MASKS = tuple(itertools.product((False, True), repeat=2))
"""Padding, segments."""
LENGTHS = {True: (37, 150), False: (64, 160)}
"""Ragged or whole tiles: a length for `short_kernel`, and a longer one."""
HEADS, BATCH = 2, 3
found: dict[str, dict[str, int]] = {}


@contextmanager
def compiling_up_to(stage: str) -> Iterator[None]:
    """Stops after Triton's IR for the GPU (ttgir) or after PTX: the frontend and Triton's passes take a quarter of the
    time, and only they differ between combinations and between versions."""
    stages = {name: getattr(CUDABackend, name) for name in ("make_llir", "make_ptx", "make_cubin")}

    def nothing(backend: CUDABackend, source, metadata: dict, *more) -> str:
        if stage == "ttgir":
            scratch = dict.fromkeys(("global_scratch_align", "profile_scratch_align"), 1)
            metadata |= {"shared": 0, "tmem_size": 0, "global_scratch_size": 0, "profile_scratch_size": 0, **scratch}
            metadata["name"] = ""  # otherwise read from the PTX
        return ""

    CUDABackend.make_cubin = lambda *arguments: nothing(*arguments).encode()
    if stage == "ttgir":
        CUDABackend.make_llir = CUDABackend.make_ptx = nothing
    try:
        yield
    finally:
        for name, function in stages.items():
            setattr(CUDABackend, name, function)


@contextmanager
def gpu(name: str, capability: int) -> Iterator[None]:
    """Counts the variants compiled in this context under `name`."""
    with compile_target(capability) as compiled:
        yield
        found[name] = {one.__name__: len(one.device_caches[compiled.device][0]) for one in compiled.functions}


def attend(
    length: int,
    parts: str,
    padding: bool = False,
    segments: bool = False,
    p: float = 0.0,
    packed: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    size: int = 16,
) -> None:
    """Forward and backward."""
    rows, tokens = (1, BATCH * length) if packed else (BATCH, length)
    q, k, v = torch.zeros(rows, tokens, 3, HEADS, size, dtype=dtype, requires_grad=True).permute(2, 0, 3, 1, 4)
    bias = torch.zeros(1, HEADS, length, length, requires_grad=True) if parts == "bias" else None
    untied = [None] * 4
    if parts in ("untied", "relative"):
        untied = [torch.zeros(HEADS, length, size, dtype=dtype, requires_grad=True) for _ in range(2)]
        untied += [torch.zeros(HEADS, 2), torch.zeros(HEADS, 2 * length - 1) if parts == "relative" else None]
    masks = [
        torch.arange(0, tokens + 1, length, dtype=torch.int32) if packed else None,
        torch.ones(rows, tokens, dtype=torch.bool) if padding else None,
        torch.ones(rows, tokens, dtype=torch.int32) if segments else None,
    ]
    keys = torch.zeros(BATCH, dtype=torch.int32) if p else None
    try:
        out, _ = attention_forward(q, k, v, bias, *untied, *masks, keys, 0.1, p, length)
        out.backward(torch.zeros_like(out))
    except Exception as error:  # raised again, with the combination that does not compile
        error.add_note(f"T {length}, {parts}, padding {padding}, segments {segments}, dropout {p}, packed {packed}")
        raise


def small_tiles(stored: int = 0) -> None:
    """Selects small tiles, and a gradient of the scores that is `stored` in this number of MiB."""
    others = dict.fromkeys(configurations.TENSOR_CLASSES, (16, 16, 1, 1, 0))
    kernels = dict.fromkeys(("forward", "queries", "bias", "stored_queries"), others)
    kernels["keys"] = dict.fromkeys(configurations.TENSOR_CLASSES, (16, 16, 1, 1, stored))
    configurations.use({**kernels, "short": {configurations.TENSOR_CLASSES[0]: (16, 64, 1, 1, stored)}})


def attention() -> None:
    """Every combination for 9.0, and a few for other GPUs and dtypes, in small tiles, which compile fast; and the calls
    of a training step in the default tiles."""
    small_tiles()
    with compiling_up_to("ttgir"), gpu("all", 90):
        for (i, parts), (j, (padding, segments)) in itertools.product(enumerate(PARTS), enumerate(MASKS)):
            for length in (*LENGTHS[True], *LENGTHS[False]):
                attend(length, parts, padding, segments, p=0.1 * ((i + j) % 2))
    with compiling_up_to("ttgir"), gpu("packed", 90):
        for (i, parts), length in itertools.product(enumerate(PARTS), LENGTHS[True]):
            attend(length, parts, p=0.1 * (i % 2), packed=True)
    small_tiles(stored=1)
    with compiling_up_to("ttgir"), gpu("stored", 90):
        for length, (parts, padding, segments, packed) in itertools.product(
            (*LENGTHS[True], *LENGTHS[False]),
            (("bias", False, True, False), ("none", True, False, False), ("bias", False, False, True)),
        ):
            attend(length, parts, padding, segments, p=0.1 * padding, packed=packed)
    small_tiles()
    for capability, dtype, size in ((80, torch.bfloat16, 16), (100, torch.float16, 24), (90, torch.float32, 16)):
        with compiling_up_to("ptx"), gpu(f"{capability} {dtype} {size}", capability):
            for parts, masks in (("bias", (False, True)), ("relative", (True, True))):
                for length in LENGTHS[True]:
                    attend(length, parts, *masks, p=0.1 * (parts == "bias"), dtype=dtype, size=size)
            if capability == 90:
                attend(LENGTHS[True][1], "untied", dtype=dtype, size=size, packed=True)
    configurations.use({})
    with gpu("default tiles", 90):
        for length in (128, 512):
            attend(length, "bias", padding=True, p=0.1, size=64)


def vocabulary() -> None:
    """Losses and samples for vocabularies that are not multiples of 16, of a block or of a tile; for one row and
    more."""
    cases = ((torch.float32, 37, 1), (torch.bfloat16, 5001, 3), (torch.float16, 5001, 1), (torch.bfloat16, 37, 1))
    with gpu("loss", 90):
        for dtype, words, rows in cases:
            hidden, embedding, bias = (torch.zeros(size, dtype=dtype) for size in ((rows, 4), (words, 4), words))
            target = torch.zeros(rows, dtype=torch.int64)
            linear_cross_entropy(hidden, embedding, None, target)
            linear_cross_entropy(hidden.requires_grad_(), embedding, bias, target)
    with gpu("samples", 90):
        for dtype, words, rows in cases[:3]:
            hidden, embedding = (torch.zeros(size, dtype=dtype) for size in ((rows, 4), (words, 4)))
            keys, excluded = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)
            sample_candidates(hidden, embedding, 3, keys=keys)
            sample_distinct(torch.zeros(rows, words, dtype=dtype), 3, keys, excluded=excluded)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="fastbert-compile-") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        attention()
        vocabulary()
    print(json.dumps({"triton": triton.__version__, "variants": found}))
