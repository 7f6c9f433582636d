"""Properties of all optimizers (groups, updates that are skipped on the device, resuming), and AdamW compared with
torch's."""

import copy
import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastbert.errors import UserError
from fastbert.model.encoder import Encoder, initialize
from fastbert.model.options import EncoderOptions
from fastbert.training.optimizer_state import flatten_optimizer, restore_optimizer
from fastbert.training.optimizers import build_optimizer, clip_gradients, guarded_step
from fastbert.training.options import OPTIMIZERS, OptimizerOptions
from fastbert.training.world import World

FINITE, NOT_FINITE = torch.tensor(True), torch.tensor(False)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 5))


def encoder():
    """A network with all classes of parameters: matrices in blocks, one of them fused, tables, and vectors."""
    module = Encoder(EncoderOptions(layers=2, width=8, heads=2, position="tupe-r").resolve(11, 6))
    initialize(module, seed=0, std=0.02)
    return module


def built(module, name, **options):
    return build_optimizer(module.named_parameters(), OptimizerOptions(name=name, **options), "cpu")


def counters(optimizer):
    """Number of updates as counted by the optimizer."""
    states = [*optimizer.state.values(), *optimizer.param_groups]
    return {float(state["step"]) for state in states if "step" in state}


def fill_gradients(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def snapshot(module, optimizer):
    return copy.deepcopy((module.state_dict(), optimizer.state_dict()))


def assert_identical(left, right):
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_identical(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_identical(a, b)
    else:
        assert left == right


def test_matches_plain_adamw_step_by_step():
    options = OptimizerOptions(learning_rate=0.1, beta2=0.98, weight_decay=0.3)
    ours, theirs = model(), model()
    optimizer = build_optimizer(ours.named_parameters(), options, "cpu")
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.3},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    oracle = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, foreach=False, fused=False)
    for step in range(12):
        fill_gradients(ours, step)
        fill_gradients(theirs, step)
        for group in oracle.param_groups:
            group["lr"] = 0.1 / (step + 1)
        oracle.step()
        guarded_step(optimizer, 0.1 / (step + 1), FINITE)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 3])
def test_skipped_update_changes_no_bit(name, steps_before):
    module = encoder()
    optimizer = built(module, name)
    guarded_step(optimizer, 0.01, FINITE)  # makes no state: there are no gradients yet
    fill_gradients(module, 0)
    guarded_step(optimizer, 0.01, NOT_FINITE)  # makes the state
    for step in range(steps_before):
        fill_gradients(module, step)
        guarded_step(optimizer, 0.01, FINITE)
    before = snapshot(module, optimizer)
    for parameter, bad in zip(module.parameters(), itertools.cycle((torch.nan, torch.inf, 1.0)), strict=False):
        parameter.grad.fill_(bad)
    guarded_step(optimizer, 0.01, NOT_FINITE)
    assert_identical(snapshot(module, optimizer), before)
    assert counters(optimizer) == {steps_before}
    fill_gradients(module, 9)
    guarded_step(optimizer, 0.01, FINITE)
    assert counters(optimizer) == {steps_before + 1}
    assert not any(torch.equal(before[0][name], value) for name, value in module.state_dict().items())
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_continues_from_a_checkpoint_bit_for_bit(name):
    """Also if the first update was skipped, and with other options than the run's."""

    def train(module, optimizer, steps):
        for step in steps:
            fill_gradients(module, step)
            guarded_step(optimizer, 0.01 / (step + 1), FINITE if step else NOT_FINITE)

    whole, broken = encoder(), encoder()
    train(whole, built(whole, name), range(6))
    optimizer = built(broken, name)
    train(broken, optimizer, range(3))
    tensors, rest = flatten_optimizer(optimizer)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    again = built(broken, name, momentum=0.5, beta1=0.5, weight_decay=0.5)
    restore_optimizer(again, tensors, json.loads(json.dumps(rest)))
    train(broken, again, range(3, 6))
    assert_identical(whole.state_dict(), broken.state_dict())
    assert counters(again) == {5}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_of_another_optimizer_is_refused(name):
    module = encoder()
    tensors, rest = flatten_optimizer(built(module, name))
    for other in OPTIMIZERS.keys() - {name}:
        with pytest.raises(UserError, match="the checkpoint's optimizer has"):
            restore_optimizer(built(module, other), tensors, rest)


def test_update_reads_nothing_back():
    """On the meta device tensors have no values: any operation that needs one on the host would fail."""
    with torch.device("meta"):
        parameters = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(3))]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    norm = clip_gradients(parameters, 1.0)
    assert norm.device.type == "meta" and norm.shape == ()

    class Recorder(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self):
            self.seen = self.found_inf

    optimizer = Recorder(parameters, lr=1.0)
    guarded_step(optimizer, 0.5, norm.isfinite())
    assert optimizer.seen.device.type == "meta" and optimizer.seen.dtype == torch.float32
    assert not hasattr(optimizer, "found_inf") and optimizer.param_groups[0]["lr"] == 0.5


def test_groups_hold_every_parameter_once_in_order():
    module = model()
    tied = nn.Linear(6, 11)
    tied.weight = module[0].weight
    frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    named = [*module.named_parameters(), *tied.named_parameters("tied"), ("frozen", frozen)]
    optimizer = build_optimizer(named, OptimizerOptions(weight_decay=0.25), "cpu")
    decayed, plain = optimizer.param_groups
    assert decayed["param_names"] == ["0.weight", "2.weight"] and decayed["weight_decay"] == 0.25
    assert plain["param_names"] == ["1.weight", "1.bias", "2.bias", "tied.bias"] and plain["weight_decay"] == 0
    assert decayed["fused"] and plain["fused"]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_does_not_apply_to_vectors(name):
    module = encoder()
    optimizer = built(module, name, weight_decay=0.5)
    before = copy.deepcopy(module.state_dict())
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    guarded_step(optimizer, 0.1, FINITE)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name] * (0.95 if value.ndim > 1 else 1))


@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0])
def test_clipping(max_norm):
    module = model()
    fill_gradients(module, 1)
    module[2].bias.grad = None
    gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    expected = torch.cat([g.flatten() for g in gradients]).double().norm().item()
    norm = clip_gradients(module.parameters(), max_norm)
    assert norm.item() == pytest.approx(expected, rel=1e-5)
    factor = min(1.0, max_norm / expected) if max_norm else 1.0
    for gradient, parameter in zip(gradients, [p for p in module.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(parameter.grad, gradient * factor, rtol=1e-4, atol=1e-6)


def test_norm_of_a_nan_is_not_finite():
    module = model()
    fill_gradients(module, 1)
    module[2].bias.grad[3] = torch.nan
    assert not clip_gradients(module.parameters(), 1.0).isfinite()


def test_an_optimizer_that_cannot_skip_is_refused():
    with pytest.raises(TypeError, match="SGD cannot skip"):
        guarded_step(torch.optim.SGD(model().parameters()), 0.1, FINITE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "adam"}, "did you mean 'adamw'"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), not 1.0"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\), not 1.0"),
        ({"eps": 0.0}, "eps must be greater than 0, not 0.0"),
        ({"learning_rate": -1.0}, "learning_rate must be greater than 0, not -1.0"),
        ({"clip_norm": -1.0}, "clip_norm must be at least 0, not -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number, not nan"),
    ],
)
def test_wrong_options_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        replace(OptimizerOptions(), **change)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_reads_and_restores_the_state(name):
    """torch.distributed.checkpoint.state_dict calls `step(closure=None)`, without `found_inf`, to create the state; and
    a closure is called."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    trained, fresh = encoder(), encoder()
    optimizer, empty = built(trained, name), built(fresh, name)
    fill_gradients(trained, 0)
    guarded_step(optimizer, 0.01, FINITE)
    state = get_optimizer_state_dict(trained, optimizer)
    set_optimizer_state_dict(fresh, empty, state)
    assert_identical(flatten_optimizer(empty)[0], flatten_optimizer(optimizer)[0])
    fill_gradients(fresh, 1)
    assert empty.step(lambda: torch.tensor(3.0)) == 3.0


def test_lamb_refuses_sharded_weights():
    with pytest.raises(UserError, match="lamb does not support sharded weights"):
        build_optimizer(encoder().named_parameters(), OptimizerOptions("lamb"), "cpu", world=World(0, 2, sharded=True))
