"""One step with a restored optimizer equals one step with an optimizer that never stopped."""

import json

import pytest
import torch
from torch import nn

from fastbert.errors import UserError
from fastbert.training.checkpoints import Checkpointer
from fastbert.training.optimizer_state import flatten_optimizer, restore_optimizer
from fastbert.training.optimizers import build_optimizer, guarded_step
from fastbert.training.options import OptimizerOptions

MAKERS = {
    "fused adamw": lambda module: build_optimizer(module.named_parameters(), OptimizerOptions(), "cpu"),
    "amsgrad": lambda module: torch.optim.AdamW(module.parameters(), amsgrad=True),
    "sgd": lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
    "muon": lambda module: torch.optim.Muon([p for p in module.parameters() if p.ndim == 2]),
    "adafactor": lambda module: torch.optim.Adafactor(module.parameters()),
    "lbfgs": lambda module: torch.optim.LBFGS(module.parameters(), max_iter=3),
    "tensor rate": lambda module: torch.optim.AdamW(module.parameters(), lr=torch.tensor(0.01), fused=True),
}


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def train(module, optimizer, steps):
    def closure():
        optimizer.zero_grad()
        loss = module(torch.arange(10.0).reshape(2, 5)).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("name", MAKERS)
def test_restored_optimizer_continues_bit_for_bit(tmp_path, name):
    checkpointer = Checkpointer(tmp_path, 3, print)
    module, resumed = network(0), network(1)
    optimizer = MAKERS[name](module)
    train(module, optimizer, 3)
    flat, rest = flatten_optimizer(optimizer)
    assert flat
    checkpointer.save(3, {"model": module.state_dict(), "optimizer": flat}, {"optimizer": rest})
    train(module, optimizer, 2)
    loaded = checkpointer.load_latest()
    resumed.load_state_dict(loaded.tensors["model"])
    again = MAKERS[name](resumed)
    restore_optimizer(again, loaded.tensors["optimizer"], loaded.state["optimizer"])
    train(resumed, again, 2)
    for own, other in zip(module.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(own, other)


def test_restored_moments_keep_dtype_and_strides():
    """load_state_dict alone would round the moments to bf16; a fused kernel would read unlike strides crosswise."""

    def build():
        weight = nn.Parameter(torch.arange(12.0).reshape(3, 4).t().bfloat16())
        return weight, torch.optim.AdamW([weight])

    weight, optimizer = build()
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.randn(4, 3), "exp_avg_sq": torch.rand(4, 3)}
    optimizer.state[weight] = dict(moments)
    flat, rest = flatten_optimizer(optimizer)
    weight, optimizer = build()
    restore_optimizer(optimizer, flat, json.loads(json.dumps(rest)))
    for key, value in moments.items():
        assert optimizer.state[weight][key].dtype == torch.float32
        assert torch.equal(optimizer.state[weight][key], value)
    assert optimizer.state[weight]["exp_avg"].stride() == weight.stride() == (1, 4)


def test_restoring_copies_no_whole_moments_to_the_device():
    """A sharded encoder may be larger than the device: its moments are copied one by one."""
    module = network(0)
    optimizer = MAKERS["fused adamw"](module)
    train(module, optimizer, 1)
    again, sizes = MAKERS["fused adamw"](module), []

    def record(loaded):
        sizes.extend(value.numel() for state in loaded.state.values() for value in state.values())

    again.register_load_state_dict_post_hook(record)
    restore_optimizer(again, *flatten_optimizer(optimizer))
    assert len(sizes) == 3 * len(again.state) == 18 and not any(sizes)


def test_restoring_changes_no_machine_setting():
    module = network(0)
    plain = torch.optim.AdamW(module.parameters(), lr=0.5, fused=False, foreach=False)
    train(module, plain, 1)
    fused = torch.optim.AdamW(module.parameters(), lr=0.25, fused=True)
    restore_optimizer(fused, *flatten_optimizer(plain))
    assert fused.param_groups[0]["fused"] and fused.param_groups[0]["lr"] == 0.5
    train(module, fused, 1)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 2)], r"for parameter 2.weight the shape \[3, 4\]"),
        ([nn.Linear(5, 4), nn.Linear(4, 3)], "groups of this many parameters"),
        ([nn.Linear(5, 4), nn.Linear(4, 3), nn.LayerNorm(4)], "parameter 2.weight, and here it is 1.weight"),
    ],
)
def test_another_network_is_refused(modules, message):
    module = network(0)
    optimizer = MAKERS["fused adamw"](module)
    train(module, optimizer, 1)
    another = MAKERS["fused adamw"](nn.ModuleList(modules))
    before = another.state_dict()
    with pytest.raises(UserError, match=message):
        restore_optimizer(another, *flatten_optimizer(optimizer))
    assert another.state_dict() == before


def test_another_optimizer_is_refused():
    module = network(0)
    with pytest.raises(UserError, match="the class SGD, and here it is AdamW; resume with the options"):
        restore_optimizer(MAKERS["amsgrad"](module), *flatten_optimizer(MAKERS["sgd"](module)))


def test_skipped_update_survives_a_checkpoint():
    """The counter of an update that was skipped is in the checkpoint as zero, not as missing."""
    module = network(0)
    optimizer = MAKERS["fused adamw"](module)
    module(torch.ones(1, 5)).sum().backward()
    guarded_step(optimizer, 0.1, torch.tensor(False))
    again = MAKERS["fused adamw"](module)
    restore_optimizer(again, *flatten_optimizer(optimizer))
    assert {float(state["step"]) for state in again.state.values()} == {0.0}


def test_an_incomplete_state_is_refused() -> None:
    """For example if keys were renamed between versions, or a file was edited."""
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors, rest = flatten_optimizer(optimizer)
    assert restore_optimizer(optimizer, tensors, rest) is None
    moments = [["step", {"tensor": "state.0.step"}], ["exp_avg", {"tensor": "state.0.exp_avg"}]]
    for changed, message in (
        ({key: value for key, value in rest.items() if key != "shapes"}, "shapes is missing"),
        (rest | {"state": {"dict": [[0, {"dict": moments}]]}}, "parameter 0 has no exp_avg_sq"),
        (rest | {"state": {"dict": [[9, {"dict": moments}]]}}, "9 is not a parameter with moments"),
        (rest | {"state": {"tensor": "lost"}}, "is not part of an optimizer's state"),
        (rest | {"state": {"dict": 3}}, "it holds 3, not a list"),
        (rest | {"param_groups": {"list": [{"dict": [["lr", "fast"], ["params", {"list": [0, 1]}]]}]}}, "lr is 'fast'"),
    ):
        with pytest.raises(UserError, match=message):
            restore_optimizer(optimizer, tensors, changed)
