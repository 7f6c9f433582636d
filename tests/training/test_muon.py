"""Muon compared with torch's, its Newton-Schulz iteration with singular values, and the parameters that it updates."""

import json
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastbert.data.tokenizer import WordPiece
from fastbert.model.options import EncoderOptions
from fastbert.objectives.electra import Electra
from fastbert.objectives.options import ElectraOptions
from fastbert.training import muon, optimizers
from fastbert.training.optimizer_state import flatten_optimizer
from fastbert.training.optimizers import build_optimizer, guarded_step
from fastbert.training.options import OptimizerOptions

FINITE = torch.tensor(True)
QKV, OUT = "blocks.0.attention.qkv.weight", "blocks.0.attention.out.weight"
UP, DOWN = "blocks.0.feed_forward.up.weight", "blocks.0.feed_forward.down.weight"
SHAPES = {QKV: (24, 8), OUT: (8, 8), UP: (40, 8), DOWN: (8, 20), "words.weight": (11, 8)}
PARTS = {QKV: 3, OUT: 1, UP: 2, DOWN: 1}


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(("stacked", "dtype"), [(2**25, "fp32"), (1, "fp32"), (300, "fp32"), (2**25, "bf16")])
def test_agrees_with_torch_step_by_step(monkeypatch, stacked: int, dtype: str) -> None:
    """Compared with torch's on each matrix of the fused weights. Its products in bfloat16 are replaced to compare
    closely; in bfloat16, the small singular values are noise in both."""
    monkeypatch.setattr(muon, "STACKED", stacked)
    if dtype == "fp32":
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    ours = {name: nn.Parameter(value) for name, value in weights(0).items()}
    optimizer = build_optimizer(ours.items(), OptimizerOptions("muon", weight_decay=0.3), "cpu")
    optimizer.dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    start = {name: parameter.detach().clone() for name, parameter in ours.items()}
    theirs = {name: [nn.Parameter(part.clone()) for part in ours[name].chunk(n)] for name, n in PARTS.items()}
    oracle = torch.optim.Muon(
        [part for parts in theirs.values() for part in parts], weight_decay=0.3, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(6):
        rate = 0.1 / (step + 1)
        oracle.param_groups[0]["lr"] = rate
        for name, gradient in weights(step + 1).items():
            ours[name].grad = gradient
            for part, of_part in zip(theirs.get(name, ()), gradient.chunk(PARTS.get(name, 1)), strict=False):
                part.grad = of_part.clone()
        oracle.step()
        guarded_step(optimizer, rate, FINITE)
        for name, parts in theirs.items():
            expected = torch.cat(list(parts)) - start[name]
            error = (ours[name] - start[name] - expected).norm() / expected.norm()
            assert error < (1e-5 if dtype == "fp32" else 0.02), (step, name)
            momentum = torch.cat([oracle.state[part]["momentum_buffer"] for part in parts])
            torch.testing.assert_close(optimizer.state[ours[name]]["momentum_buffer"], momentum)


@pytest.mark.parametrize("shape", [(3, 5, 9), (2, 9, 5), (1, 4, 4)])
def test_orthogonalized_maps_the_singular_values(shape: tuple[int, int, int]) -> None:
    """In float64: U and V do not change, and the polynomial is applied five times to each singular value."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(muon.orthogonalized(matrices, torch.float64), u * s[:, None] @ v)
    assert ((s > 0.6) & (s < 1.3)).all()
    assert not muon.orthogonalized(torch.zeros(shape), torch.float32).any()


@pytest.mark.parametrize("smallest", [1e-1, 1e-3, 1e-6, 0.0])
@pytest.mark.parametrize("tall", [False, True])
def test_wide_matrices_in_float32_with_fewer_operations(smallest: float, tall: bool) -> None:
    """Compared with the iteration in float64, for singular values from 1 to `smallest` of the largest."""
    generator = torch.Generator().manual_seed(2)
    u, _, v = torch.linalg.svd(torch.randn(2, 48, 160, generator=generator, dtype=torch.float64), full_matrices=False)
    s = torch.logspace(0, math.log10(smallest or 1e-6), 48, dtype=torch.float64)
    s[24:] *= smallest > 0
    wide = (u * s) @ v
    matrices = wide.mT if tall else wide
    with FlopCounterMode(display=False) as counter:
        found = muon.orthogonalized(matrices.float(), torch.float32)
    error = torch.linalg.matrix_norm(found - muon.orthogonalized(matrices, torch.float64), 2)
    assert error.max() < 1e-3  # of the largest singular value, about 1; in bfloat16 it is 0.1
    unit = 2 * 2 * 48**2  # operations per column, for the two matrices
    assert counter.get_total_flops() == unit * (2 * 160 + 17 * 48) < unit * (10 * 160 + 5 * 48)


def test_flops_of_an_update_are_counted(monkeypatch) -> None:
    """Compared with torch's counter, in the form for bfloat16; AdamW multiplies no matrices."""
    monkeypatch.setattr(optimizers, "resolve_precision", lambda *_: ("bf16", ""))
    parameters = {name: nn.Parameter(value) for name, value in weights(0).items()}
    for name, gradient in weights(1).items():
        parameters[name].grad = gradient
    for kind in ("muon", "adamw"):
        options = OptimizerOptions(kind)
        optimizer = build_optimizer(parameters.items(), options, "cpu")
        with FlopCounterMode(display=False) as counter:
            guarded_step(optimizer, 0.1, FINITE)
        found = optimizers.optimizer_flops(parameters.items(), options)
        assert counter.get_total_flops() == found and (found > 0) == (kind == "muon")


@pytest.mark.parametrize("rows", [20, 40])
def test_a_gated_unit_is_two_matrices(rows: int) -> None:
    named = [(UP, nn.Parameter(torch.zeros(rows, 8))), (DOWN, nn.Parameter(torch.zeros(8, 20)))]
    optimizer = build_optimizer([*named, ("bias", nn.Parameter(torch.zeros(8)))], OptimizerOptions("muon"), "cpu")
    assert optimizer.param_groups[0]["matrices"] == [rows // 20, 1]


def test_the_matrices_of_all_blocks_and_of_tupe_and_nothing_else() -> None:
    vocabulary = WordPiece(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##c"))
    config = EncoderOptions(layers=1, width=16, heads=2, position="tupe-r").resolve(8, 12)
    objective = Electra(config, ElectraOptions(), vocabulary)
    optimizer = build_optimizer(objective.named_parameters(), OptimizerOptions("muon", weight_decay=0.2), "cpu")
    hidden, others, plain = optimizer.param_groups
    of_a_block = [
        f"blocks.0.{name}" for name in ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")
    ]
    wanted = {
        f"{network}.{name}.weight": 3 if name.endswith("qkv") else 1
        for network in ("encoder", "small")
        for name in (*of_a_block, "positions.query", "positions.key")
    }
    assert dict(zip(hidden["param_names"], hidden["matrices"], strict=True)) == wanted
    assert (hidden["weight_decay"], others["weight_decay"], plain["weight_decay"]) == (0.2, 0.2, 0.0)
    named = dict(objective.named_parameters())
    assert {*hidden["param_names"], *others["param_names"], *plain["param_names"]} == named.keys()
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    guarded_step(optimizer, 0.1, FINITE)
    kinds = {name: sorted(optimizer.state[parameter]) for name, parameter in named.items()}
    assert {name for name, kind in kinds.items() if kind == ["momentum_buffer"]} == set(hidden["param_names"])
    assert {tuple(kind) for kind in kinds.values()} == {("momentum_buffer",), ("exp_avg", "exp_avg_sq", "step")}
    json.dumps(flatten_optimizer(optimizer)[1])
