"""The attention kernels under Triton's interpreter, against the float64 reference; and compiled for
GPUs that this machine lacks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from fastbert_kernels import backend, configurations
from fastbert_kernels.attention import triton_launch
from fastbert_kernels.attention.triton_launch import attention_forward
from fastbert_kernels.compilation import SHARED_LIMIT, Resources, compile_target
from fastbert_kernels.configurations import TENSOR_CLASSES, Tiles

from tests.kernels.interpreted import interpreter


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[[str], list[dict]]]:
    with interpreter(Path(__file__).parent / "attention_cases.py") as rows:
        yield rows


@pytest.mark.parametrize("group", ["dense", "low", "packed", "stored", "untied"])
def test_values_and_gradients(group: str, interpreted) -> None:
    rows = interpreted(group)
    assert len(rows) > 2
    for row in rows:
        for number, (ours, plain) in enumerate(row["errors"]):
            assert ours <= 2 * plain + 1e-5, (row["case"], number)


@pytest.mark.parametrize("group", ["check_operators", "check_edges"])
def test_operators(group: str, interpreted) -> None:
    assert interpreted(group) == []


def compiled(
    capability: int, *shapes: tuple[int, int], dtype=torch.bfloat16, size: int = 64, p: float = 0.0, parts: bool = False
) -> list[Resources]:
    """Kernels compiled by calls with these batches and lengths, with a learned bias or, with `parts`, TUPE's
    components."""
    heads = 12
    with compile_target(capability) as gpu:
        for batch, length in shapes:
            qkv = torch.zeros(batch, length, 3, heads, size, dtype=dtype, requires_grad=True)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            bias = None if parts else torch.zeros(1, heads, length, length, requires_grad=True)
            untied = [None] * 4
            if parts:
                untied = [torch.zeros(heads, length, size, dtype=dtype, requires_grad=True) for _ in range(2)]
                untied += [torch.zeros(heads, 2), torch.zeros(heads, 2 * length - 1)]
            keys = torch.zeros(batch, dtype=torch.int32) if p else None
            out, _ = attention_forward(q, k, v, bias, *untied, None, None, None, keys, 0.1, p, length)
            out.backward(torch.zeros_like(out))
        return gpu.resources()


@contextmanager
def storing(kernel: str, numbers: Tiles | None = None) -> Iterator[None]:
    """Context in which a kernel stores the gradient of the scores, in the default configuration for 9.0 or another."""
    numbers = numbers or configurations._FOR_64[9][kernel]
    configurations.use({kernel: {TENSOR_CLASSES[0]: numbers._replace(stored=32)}})
    try:
        yield
    finally:
        configurations.use({})


FORWARD, LONG = {"forward_kernel"}, {"forward_kernel", "delta_kernel", "keys_kernel"}
FORMS = {
    ("recomputed", 128): {*FORWARD, "short_kernel", "bias_kernel"},
    ("recomputed", 512): {*LONG, "queries_kernel", "bias_kernel"},
    ("stored", 128): {*FORWARD, "short_kernel", "stored_bias_kernel"},
    ("stored", 512): {*LONG, "stored_queries_kernel", "stored_bias_kernel"},
}
"""Kernels of a training step, by form of the backward pass and length."""


@pytest.mark.parametrize(
    ("capability", "form", "length"),
    [
        *((capability, "recomputed", length) for capability in (80, 90, 100) for length in (128, 512)),
        *((89, "recomputed", 512), (89, "stored", 128), (90, "stored", 512), (100, "stored", 512)),
        *((120, "recomputed", 512), (120, "recomputed", 128), (120, "stored", 512)),
    ],
)
def test_the_defaults_spill_nothing(capability: int, form: str, length: int) -> None:
    """Training of BERT-Base: bfloat16, heads of 64, dropout 0.1."""
    kernel = "short" if length == 128 else "keys"
    default = configurations._FOR_64[capability // 10][kernel]
    with storing(kernel, default) if form == "stored" else nullcontext():
        found = {one.kernel: one for one in compiled(capability, (2, length), p=0.1)}
    assert found.keys() == FORMS[form, length]
    for one in found.values():
        assert one.spilled == 0 and one.shared <= SHARED_LIMIT[capability], one
        assert one.tensor_cores > 0 or one.kernel in ("delta_kernel", "stored_bias_kernel"), one


@pytest.mark.parametrize("capability", [90, 100, 120])
def test_everything_fits_every_gpu(capability: int) -> None:
    """A launch that needs too much shared memory fails in `compile_target` as on the GPU."""
    for dtype, size in ((torch.float32, 64), (torch.bfloat16, 128)):
        found = compiled(capability, (1, 150), dtype=dtype, size=size)
        assert len(found) == 5
        assert all(one.spilled <= 128 for one in found)
        assert len(compiled(capability, (1, 150), dtype=dtype, size=size, parts=True)) == 5
    assert compiled(capability, (1, 150), parts=True)  # without parts: the test before this one


def test_other_batches_and_lengths_of_a_bucket_compile_nothing_new() -> None:
    """Three buckets of lengths: multiples of the tile, other multiples of 16, and all others."""
    for lengths in ((256, 384, 1024), (144, 272, 400), (131, 263, 1001)):
        once = compiled(90, (2, lengths[0]))
        shapes = [(batch, length) for length, batch in zip(lengths, (1, 3, 5), strict=True)]
        assert len(compiled(90, *shapes)) == len(once)


def test_the_gpu_of_the_tensors_decides(monkeypatch) -> None:
    """Tiles and launches of forward and backward are for the tensors' GPU, which need not be the current one."""
    inside, seen = [], []

    @contextmanager
    def device_of(x: torch.Tensor) -> Iterator[None]:
        inside.append(x)
        yield
        inside.pop()

    class Launch:
        def __getitem__(self, grid: tuple[int]):
            return lambda *arguments, **options: seen.append(bool(inside))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(configurations, "_capability", lambda: seen.append(bool(inside)) or 90)
    monkeypatch.setattr(triton_launch, "KERNELS", dict.fromkeys(triton_launch.KERNELS, Launch()))
    for name in ("delta_kernel", "stored_queries_kernel", "stored_bias_kernel"):
        monkeypatch.setattr(triton_launch, name, Launch())
    q, k, v = torch.zeros(3, 1, 2, 200, 16, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(1, 2, 200, 200, requires_grad=True)
    for form in (nullcontext(), storing("keys")):
        with form:
            out, _ = attention_forward(q, k, v, bias, *[None] * 8, 0.1, 0.0, 200)
            assert len(seen) == 2 and all(seen)
            out.sum().backward()
        assert len(seen) > 7 and all(seen)
        seen.clear()


@pytest.mark.parametrize(
    ("pairs", "length", "dtype", "stored"),
    [
        ((128, 12), 512, torch.bfloat16, 64),
        ((128, 12), 509, torch.bfloat16, 64),  # rows of 512 numbers
        ((128, 12), 1024, torch.bfloat16, 16),
        ((128, 12), 2048, torch.bfloat16, 0),  # 64 programs of the keys kernel would leave half of the GPU idle
        ((2, 2), 2048, torch.bfloat16, 4),  # all pairs at once
        ((1, 1), 8192, torch.bfloat16, 0),  # more memory than 32 MiB
        ((128, 12), 128, torch.bfloat16, 1024),
        ((128, 12), 512, torch.float32, 0),  # configured for 16 bits
    ],
)
def test_the_number_of_pairs_stored_at_a_time(pairs, length: int, dtype, stored: int, monkeypatch) -> None:
    monkeypatch.setattr(configurations, "_capability", lambda: 90)
    q = torch.empty(*pairs, length, 64, dtype=dtype, device="meta")
    bias = torch.empty(1, pairs[1], length, length, device="meta")

    def group(bias, untied=None, required: bool = True) -> int:
        call = triton_launch._Launches(q, bias, untied, None, None, None, None, None, 0.1, 0.0, length)
        return call.stored_group(q.element_size(), required)[0]

    assert group(bias) == 0
    with storing("short" if length == 128 else "keys"):
        assert group(bias) == stored
        assert group(None, triton_launch.Untied(None, None, None, length)) == 0
        assert group(bias, required=False) == (0 if length == 128 else stored)


def test_tuned_configurations_are_saved_and_used(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert configurations.load_tuned("NVIDIA H200") is None
    path = configurations.save_tuned({"keys": {"16-bit, to 64": [32, 64, 4, 1, 0]}}, "NVIDIA H200")
    assert configurations.load_tuned("NVIDIA H100") is None
    try:
        configurations.use(configurations.load_tuned("NVIDIA H200"))
        with compile_target(90):
            used = configurations.in_use()
        keys = next(one for one in compiled(90, (1, 256)) if one.kernel == "keys_kernel")
    finally:
        configurations.use({})
    assert used["keys"]["16-bit, to 64"] == [32, 64, 4, 1, 0]
    assert used["forward"]["16-bit, to 64"] == [128, 64, 8, 3, 0]
    assert (keys.warps, keys.stages) == (4, 1)
    path.write_text(path.read_text().replace(backend.TRITON, "1.0"))
    assert configurations.load_tuned("NVIDIA H200") is None  # another Triton compiles other code
    path.write_text("{")
    with pytest.raises(ValueError, match=r"kernels-nvidia-h200\.json is damaged"):
        configurations.load_tuned("NVIDIA H200")
    for wrong in (
        {"sums": {"32-bit": [32, 32, 4, 1, 0]}},
        {"keys": {"8-bit": [32, 32, 4, 1, 0]}},
        {"keys": {"32-bit": [31, 2, 4, 1, 0]}},
        {"keys": {"32-bit": [32, 2, 4, 1]}},
        {"keys": {"32-bit": [32, 2, 4, 1, -1]}},
        {"queries": {"32-bit": [32, 2, 4, 1, 32]}},
    ):
        with pytest.raises(ValueError, match=r"there is no kernel|is not queries|stored must be 0 to 4096 MiB"):
            configurations.use(wrong)
