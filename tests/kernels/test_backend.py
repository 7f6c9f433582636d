import warnings

import pytest
import torch
from fastbert_kernels import backend

from tests.gpus import report_gpus


class OnGPU:
    device = torch.device("cuda")


@pytest.fixture(autouse=True)
def once(monkeypatch):
    backend.warn_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_a_cpu_runs_no_kernels() -> None:
    assert not backend.runs_kernels(torch.zeros(1), "attention")
    with backend.compiling_only():
        assert backend.runs_kernels(torch.zeros(1), "attention")
    assert not backend.runs_kernels(torch.zeros(1), "attention")


def test_a_missing_triton_gives_one_warning(monkeypatch) -> None:
    monkeypatch.setattr(backend, "TRITON", None)
    with pytest.warns(UserWarning, match="attention falls back to PyTorch on this GPU: Triton is not installed"):
        assert not backend.runs_kernels(OnGPU(), "attention")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not backend.runs_kernels(OnGPU(), "attention")


@pytest.mark.parametrize(("version", "tested"), [("3.6.0", True), ("3.7.1", True), ("3.70.0", False), ("4.0", False)])
def test_an_untested_triton_gives_one_warning(version: str, tested: bool, monkeypatch) -> None:
    monkeypatch.setattr(backend, "TRITON", version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert backend.runs_kernels(OnGPU(), "attention") and backend.runs_kernels(OnGPU(), "the loss")
    assert [str(one.message) for one in caught] == (
        [] if tested else [f"Triton {version} is not one of the versions tested with fastbert_kernels: 3.6, 3.7"]
    )


@pytest.mark.parametrize(
    ("capability", "supported"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((12, 0), True)]
)
def test_unsupported_gpus_run_no_kernels(capability, supported: bool, monkeypatch) -> None:
    report_gpus(monkeypatch, capability=capability)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert backend.runs_kernels(OnGPU(), "attention") is supported
        assert backend.runs_kernels(OnGPU(), "attention") is supported
    version = ".".join(map(str, capability))
    assert [str(one.message) for one in caught] == [
        "attention falls back to PyTorch on this GPU: Triton needs compute capability 8.0, not " + version
    ] * (not supported)


def test_the_capability_is_a_constant_to_the_compiler() -> None:
    operations = []

    def compiler(module: torch.fx.GraphModule, inputs: list):
        operations.extend(node.op for node in module.graph.nodes)
        return module.forward

    compiled = torch.compile(lambda x: x + backend._capability(x.device)[0], backend=compiler, fullgraph=True)
    assert compiled(torch.zeros(1)) == 9 and operations == ["placeholder", "call_function", "output"]


def test_the_installed_triton_is_tested() -> None:
    pytest.importorskip("triton")
    assert backend.TRITON.rpartition(".")[0] in backend.TESTED
