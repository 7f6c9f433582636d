"""Device, precision, threads, the description of the machine and the peak for MFU."""

import ctypes
import importlib.metadata
import platform
import subprocess
import time
import types
from dataclasses import replace
from functools import partial

import pytest
import torch

from fastbert.errors import UserError
from fastbert.training import hardware
from fastbert.training.hardware import (
    autocast,
    describe_machine,
    peak_flops,
    resolve_device,
    resolve_precision,
    setup_machine,
)
from fastbert.training.options import MachineOptions
from tests.gpus import report_gpus

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    return partial(report_gpus, monkeypatch)


def test_device_with_a_gpu(gpu):
    gpu()
    assert resolve_device("auto") == CUDA
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    assert resolve_device("cpu") == CPU
    with pytest.raises(UserError, match="device is cuda:1, but there are 1 GPUs"):
        resolve_device("cuda:1")


def test_device_without_a_gpu(gpu):
    gpu(count=0)
    assert resolve_device("auto") == CPU
    with pytest.raises(UserError, match=r"no CUDA GPU.*--machine.device cpu"):
        resolve_device("cuda")


def test_the_device_is_the_current_one(monkeypatch):
    """Calls of torch.cuda without a device then use it."""
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    setup_machine(MachineOptions(), torch.device("cuda:1"))
    assert current == [torch.device("cuda:1")]
    for device in (CPU, CUDA):  # `cuda` is the current one
        setup_machine(MachineOptions(), device)
    assert len(current) == 1


def test_unknown_device_names_the_nearest():
    with pytest.raises(UserError, match="unknown device 'cdua'; did you mean 'cuda'"):
        MachineOptions(device="cdua")


def test_precision_on_gpus(gpu):
    gpu(capability=(8, 0))
    assert resolve_precision("auto", CUDA) == ("bf16", None)
    assert resolve_precision("fp32", CUDA) == ("fp32", None)
    gpu(capability=(7, 5))
    assert resolve_precision("auto", CUDA) == ("fp32", None)
    precision, warning = resolve_precision("bf16", CUDA)
    assert precision == "bf16" and "below 8.0" in warning


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("old_torch", [True, False])
def test_precision_on_cpus(monkeypatch, fast, old_torch):
    if old_torch:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast, "avx2": True}, raising=False)
    assert resolve_precision("auto", CPU) == ("bf16" if fast else "fp32", None)
    precision, warning = resolve_precision("bf16", CPU)
    assert precision == "bf16" and (warning is None) == fast


def test_autocast():
    left, right = torch.ones(2, 2), torch.ones(2, 2)
    with autocast(CPU, "bf16"):
        assert (left @ right).dtype == torch.bfloat16
    with autocast(CPU, "fp32"):
        assert (left @ right).dtype == torch.float32


def test_threads():
    before = torch.get_num_threads()
    try:
        setup_machine(MachineOptions(threads=before + 1), CPU)
        assert torch.get_num_threads() == before + 1
        setup_machine(MachineOptions(), CPU)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_memory_is_reused_on_glibc_cpus_only(monkeypatch):
    calls = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(mallopt=lambda *call: calls.append(call)))
    library = [""]  # musl, macOS
    monkeypatch.setattr(platform, "libc_ver", lambda: (library[0], "2.36"))
    setup_machine(MachineOptions(), CPU)
    library[0] = "glibc"
    setup_machine(MachineOptions(), CUDA)
    assert calls == []
    setup_machine(MachineOptions(), CPU)
    assert calls == [(-3, 2**31 - 1), (-1, -1)]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_glibc_accepts_both_settings():
    code = "import ctypes; libc = ctypes.CDLL(None); print(libc.mallopt(-3, 2**31 - 1), libc.mallopt(-1, -1))"
    assert subprocess.check_output([hardware.sys.executable, "-c", code], text=True).split() == ["1", "1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
        ({"kernels": "flash"}, "unknown kernels 'flash'"),
        ({"threads": -1}, "threads must be at least 0, not -1"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1, not 0"),
    ],
)
def test_wrong_options_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        replace(MachineOptions(), **change)


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-40GB", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756, 51.2),
        ("NVIDIA H100 NVL", 835.5, 60),
        ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 3090", 71, 35.6),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA L40", 181, 90.5),
        ("NVIDIA A10G", 70, 35),
        ("NVIDIA A10", 125, 31.2),
        ("Tesla T4", 8.1, 8.1),
        ("Tesla V100-SXM2-16GB", 15.7, 15.7),
    ],
)
def test_datasheet(gpu, name, bf16, fp32):
    gpu(name)
    assert peak_flops(CUDA, "bf16")[0] == pytest.approx(bf16 * 1e12)
    assert peak_flops(CUDA, "fp32")[0] == pytest.approx(fp32 * 1e12)
    assert name in peak_flops(CUDA, "fp32")[1]


def test_peak_is_measured_once_on_a_cpu():
    flops, how = peak_flops(CPU, "fp32")
    assert how == "measured matmul" and 1e8 < flops < 1e15
    measured = hardware.measured_flops.cache_info()
    assert peak_flops(CPU, "fp32") == (flops, how)
    assert hardware.measured_flops.cache_info() == measured._replace(hits=measured.hits + 1)


def test_measured_peak_is_the_speed_of_a_product(monkeypatch):
    """With a clock that advances 1 ms per call, the largest product determines the result."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) * 1e-3)
    hardware.measured_flops.cache_clear()
    assert peak_flops(CPU, "fp32")[0] == pytest.approx(2 * 1024**3 / 1e-3)
    hardware.measured_flops.cache_clear()


def test_description_is_json_and_names_the_versions():
    import json

    described = describe_machine()
    assert json.loads(json.dumps(described)) == described
    assert described["versions"]["torch"] == torch.__version__
    assert described["versions"]["triton"] == importlib.metadata.version("triton")
    assert described["cores"] >= 1 and described["memory_bytes"] > 2**28 and described["cpu"]


def test_commit_and_dirty_flag(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert hardware.commit_of(tmp_path) == {"commit": None, "dirty": None}
    git("init")
    assert hardware.commit_of(tmp_path) == {"commit": None, "dirty": None}
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "one")
    clean = hardware.commit_of(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "file").write_text("b")
    assert hardware.commit_of(tmp_path) == {"commit": clean["commit"], "dirty": True}
    (tmp_path / "inner").mkdir()
    assert hardware.commit_of(tmp_path / "inner") == {"commit": None, "dirty": None}
