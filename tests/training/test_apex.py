"""`machine.apex`: used only if it is set, refused where it cannot be used, equal to torch's AdamW (the stand-in
computes the formula), and able to resume from it and vice versa."""

import json
import sys
import types

import pytest
import torch
from torch import nn

from fastbert import finetuning, pretraining
from fastbert.errors import UserError
from fastbert.finetuning.loop import build_scaled_optimizer
from fastbert.model.options import EncoderOptions
from fastbert.training.apex import check_apex
from fastbert.training.logbook import read_metrics
from fastbert.training.optimizer_state import flatten_optimizer, restore_optimizer
from fastbert.training.optimizers import build_optimizer, guarded_step
from fastbert.training.options import OptimizerOptions
from tests.finetuning.conftest import FAST, make_task, tiny_model
from tests.flags import main
from tests.training import apex_stand_in

FINITE, NOT_FINITE = torch.tensor(True), torch.tensor(False)
CUDA = torch.device("cuda")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 5))


def built(module: nn.Module, apex: bool) -> torch.optim.Optimizer:
    return build_optimizer(module.named_parameters(), OptimizerOptions(), "cuda", apex)


@pytest.fixture
def apex(monkeypatch) -> None:
    apex_stand_in.install(monkeypatch)


def test_it_is_never_selected_implicitly(apex) -> None:
    assert type(built(model(), False)) is torch.optim.AdamW
    assert type(built(model(), True)) is apex_stand_in.FusedAdam


def test_refused_where_it_cannot_be_used(monkeypatch) -> None:
    for module in ("apex", "apex.optimizers", "apex.multi_tensor_apply"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"cannot be imported .*https://github.com/NVIDIA/apex .*leave --machine.apex"):
        check_apex("adamw", CUDA)
    other = types.ModuleType("apex")  # PyPI's: a package without `optimizers`
    other.__path__ = []
    monkeypatch.delitem(sys.modules, "apex.optimizers")
    monkeypatch.delitem(sys.modules, "apex.multi_tensor_apply")
    monkeypatch.setitem(sys.modules, "apex", other)
    with pytest.raises(UserError, match=r"No module named 'apex\.multi_tensor_apply'.*on PyPI is unrelated"):
        check_apex("adamw", CUDA)
    apex_stand_in.install(monkeypatch, available=False)
    with pytest.raises(UserError, match="lacks them: build it"):
        check_apex("adamw", CUDA)
    apex_stand_in.install(monkeypatch, fused_adam=type("FusedAdam", (torch.optim.SGD,), {}))
    with pytest.raises(UserError, match="the installed one is older"):
        check_apex("adamw", CUDA)
    apex_stand_in.install(monkeypatch)
    check_apex("adamw", CUDA)
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        check_apex("adamw", torch.device("cpu"))
    with pytest.raises(UserError, match="adamw, not muon"):
        check_apex("muon", CUDA)


def test_jobs_refuse_it_before_any_work(flags, tmp_path, capsys) -> None:
    asked = ["--machine.device", "cpu", "--machine.apex"]
    assert main(["pretrain", *flags, *asked, "--out", str(tmp_path / "run")]) == 2
    task, tuned = make_task(tmp_path, "words"), tmp_path / "tuned"
    assert main(["finetune", "--model", str(tiny_model(tmp_path)), *task, *FAST, *asked, "--out", str(tuned)]) == 2
    assert capsys.readouterr().err.count("--machine.apex needs a CUDA GPU, and the device is cpu") == 2
    assert not (tmp_path / "run").exists() and not tuned.exists()


def test_only_updates_that_happen_are_counted(apex) -> None:
    module = model()
    optimizer = built(module, True)
    rates = [group["lr"] for group in optimizer.param_groups]
    done = 0
    for rate, finite in ((0.5, NOT_FINITE), (0.25, FINITE), (0.125, NOT_FINITE), (1.0, FINITE), (2.0, FINITE)):
        guarded_step(optimizer, rate, finite)
        done += int(finite)
        assert [int(group["step"]) for group in optimizer.param_groups] == [done, done]
    assert optimizer.updates == [(1, 0.25)] * 2 + [(2, 1.0)] * 2 + [(3, 2.0)] * 2
    # The tensor that the kernel reads is filled, not replaced: nothing is captured or compiled anew.
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))


def test_each_group_of_a_fine_tuning_has_its_rate(apex) -> None:
    module = nn.ModuleDict({"encoder": nn.ModuleDict({"words": nn.Linear(3, 2)}), "head": nn.Linear(2, 2)})
    config = EncoderOptions(layers=1, width=8, heads=1).resolve(11, 6)
    optimizer = build_scaled_optimizer(module.named_parameters(), config, OptimizerOptions(), 0.5, CUDA, apex=True)
    for rate in (1.0, 2.0):
        guarded_step(optimizer, rate, FINITE)
    assert sorted(optimizer.updates) == [(1, 0.25)] * 2 + [(1, 1.0)] * 2 + [(2, 0.5)] * 2 + [(2, 2.0)] * 2


@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, True)])
def test_a_checkpoint_resumes_with_and_without_it(kinds: tuple[bool, bool], apex) -> None:
    """Three updates and one that is skipped, a checkpoint, three more; against torch's AdamW without a break."""
    modules = [model(), model()]
    optimizers = [built(modules[0], False), built(modules[1], kinds[0])]

    def update(module: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        guarded_step(optimizer, 0.1 / (1 + number), NOT_FINITE if number == 1 else FINITE)
        optimizer.zero_grad()

    for number in range(7):
        if number == 4:
            tensors, rest = flatten_optimizer(optimizers[1])
            again = built(modules[1], kinds[1])
            restore_optimizer(again, tensors, json.loads(json.dumps(rest)))
            optimizers[1] = again
        for module, optimizer in zip(modules, optimizers, strict=True):
            update(module, optimizer, number)
    for ours, torchs in zip(*(module.parameters() for module in modules), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)
    # What is saved now is what the second optimizer would have saved from the start.
    plain = flatten_optimizer(built(model(), kinds[1]))[1]["param_groups"]["list"]
    resumed = flatten_optimizer(optimizers[1])[1]["param_groups"]["list"]
    names = [[{name for name, _ in group["dict"]} for group in groups] for groups in (plain, resumed)]
    assert names[0] == names[1]


def test_unequal_counts_are_refused(apex) -> None:
    module = model()
    optimizer = built(module, False)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    guarded_step(optimizer, 0.1, FINITE)
    module[0].weight.grad = None
    guarded_step(optimizer, 0.1, FINITE)
    with pytest.raises(UserError, match="different numbers of updates, which apex cannot use"):
        restore_optimizer(built(module, True), *flatten_optimizer(optimizer))


def test_runs_use_it_and_record_it(flags, tmp_path, apex, monkeypatch) -> None:
    """Pretraining and fine-tuning, on a CPU that is treated as a GPU."""
    for job in (pretraining.setup, finetuning.setup):
        monkeypatch.setattr(job, "check_apex", lambda optimizer, device: None)
    short = [*flags, "--machine.device", "cpu", "--steps", "4", "--log-every", "1", "--eval-every", "4"]
    losses = []
    for use in ([], ["--machine.apex"]):
        run = tmp_path / f"run{len(use)}"
        assert main(["pretrain", *short, *use, "--checkpoint-every", "2", "--out", str(run)]) == 0
        (session,) = json.loads((run / "manifest.json").read_text())["sessions"]
        kind = "tests.training.apex_stand_in.FusedAdam" if use else "torch.optim.adamw.AdamW"
        assert session["resolved"]["optimizer"] == kind
        losses.append([row["loss"] for row in read_metrics(run / "metrics.jsonl")])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=0)
    task, tuned = make_task(tmp_path, "words"), tmp_path / "tuned"
    given = ["--model", str(tiny_model(tmp_path)), *task, *FAST, "--epochs", "1", "--machine.apex"]
    assert main(["finetune", *given, "--out", str(tuned)]) == 0
    assert json.loads((tuned / "manifest.json").read_text())["resolved"]["optimizer"].endswith("FusedAdam")
