import pytest
import torch
from fastbert_kernels import configurations

from fastbert.errors import UserError
from fastbert.training import kernel_configurations
from fastbert.training.kernel_configurations import fix_kernels
from tests.gpus import report_gpus

GPU = torch.device("cuda")
TUNED = {"keys": {"16-bit, to 64": [32, 64, 4, 1, 0]}}


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    report_gpus(monkeypatch, "NVIDIA H200")
    monkeypatch.setattr(kernel_configurations, "runs_kernels", lambda x, what: True)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    monkeypatch.setattr(configurations, "_capability", lambda: 90)
    yield
    configurations.use({})


def test_without_kernels_nothing_is_set() -> None:
    assert fix_kernels(torch.device("cpu"), []) is None


def test_a_run_continues_with_its_first_configurations() -> None:
    first = fix_kernels(GPU, [])
    assert first["device"] == "NVIDIA H200" and first["configurations"]["keys"]["16-bit, to 64"] == [64, 128, 8, 2, 0]
    configurations.save_tuned(TUNED, "NVIDIA H200")  # tuned in between
    sessions = [{"resolved": {"kernels": first}}, {"resolved": {}}]
    assert fix_kernels(GPU, sessions) == first
    assert fix_kernels(GPU, [])["configurations"]["keys"]["16-bit, to 64"] == [32, 64, 4, 1, 0]
    assert configurations.tiles("keys", "16-bit, to 64") == (32, 64, 4, 1, 0)


def test_another_gpu_uses_its_own_configurations(monkeypatch) -> None:
    configurations.save_tuned(TUNED, "NVIDIA A100")
    first = fix_kernels(GPU, [])
    report_gpus(monkeypatch, "NVIDIA A100")
    assert fix_kernels(GPU, [{"resolved": {"kernels": first}}])["configurations"]["keys"]["16-bit, to 64"] == [
        32,
        64,
        4,
        1,
        0,
    ]


def test_a_damaged_file_is_named() -> None:
    configurations.save_tuned(TUNED, "NVIDIA H200").write_text("{}")
    with pytest.raises(UserError, match=r"kernels-nvidia-h200\.json is damaged .* delete it or tune again"):
        fix_kernels(GPU, [])
