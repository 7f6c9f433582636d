"""LAMB compared with the paper's equations in float64, and with AdamW if its trust ratio is 1."""

import numpy as np
import pytest
import torch
from torch import nn

from fastbert.training.lamb import LAMB, apply_trust_ratios
from fastbert.training.optimizers import build_optimizer, guarded_step
from fastbert.training.options import OptimizerOptions

FINITE, NOT_FINITE = torch.tensor(True), torch.tensor(False)
QKV = "blocks.0.attention.qkv.weight"
SHAPES = {QKV: (24, 8), "words.weight": (11, 8), "zeros.weight": (4, 4), "bias": (8,)}


def random_weights(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def papers_update(w: np.ndarray, gradients: list[np.ndarray], rates: list[float], decay: float, trusted: bool):
    """Algorithm 2 of the paper, in float64, on one layer."""
    beta1, beta2, eps = 0.9, 0.98, 1e-6
    w, m, v = w.astype(np.float64), np.zeros(w.shape), np.zeros(w.shape)
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        g = g.astype(np.float64)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        r = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        ratio = np.linalg.norm(w) / np.linalg.norm(r + decay * w) if trusted and w.any() else 1.0
        w = w - rate * ratio * (r + decay * w)
    return w


def test_agrees_with_the_paper() -> None:
    """Over several updates, one of them skipped; q, k and v are three layers, and a bias has no trust ratio."""
    start = {**random_weights(0), "zeros.weight": np.zeros((4, 4), np.float32)}
    parameters = {name: nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
    optimizer = build_optimizer(parameters.items(), OptimizerOptions("lamb", beta2=0.98, weight_decay=0.2), "cpu")
    assert type(optimizer) is LAMB
    rates = [0.1, 0.2, 0.05, 0.1, 0.02]
    gradients = [random_weights(step + 1) for step in range(len(rates))]
    for step, rate in enumerate(rates):
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(gradients[step][name].copy())
        guarded_step(optimizer, rate, FINITE)
        if step == 1:
            parameters["bias"].grad.fill_(torch.nan)
            guarded_step(optimizer, rate, NOT_FINITE)
    for name, parts in {QKV: 3, "words.weight": 1, "zeros.weight": 1, "bias": 1}.items():
        decay = 0.0 if name == "bias" else 0.2
        expected = [
            papers_update(
                np.split(start[name], parts)[part],
                [np.split(gradient[name], parts)[part] for gradient in gradients],
                rates,
                decay,
                trusted=name != "bias",
            )
            for part in range(parts)
        ]
        np.testing.assert_allclose(parameters[name].detach().numpy(), np.concatenate(expected), rtol=2e-5, atol=2e-6)


def test_without_trust_ratios_it_is_adamw() -> None:
    ours, theirs = ([nn.Parameter(torch.from_numpy(value)) for value in random_weights(0).values()] for _ in range(2))
    optimizer = LAMB([{"params": ours, "weight_decay": 0.3}], lr=0.1, betas=(0.9, 0.98), eps=1e-6)
    oracle = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.3)
    for step in range(8):
        for parameters in (ours, theirs):
            for parameter, gradient in zip(parameters, random_weights(step + 1).values(), strict=True):
                parameter.grad = torch.from_numpy(gradient)
        guarded_step(optimizer, 0.1, FINITE)
        oracle.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("weight", "update", "expected"), [(6.0, 2.0, 6.0), (0.0, 2.0, 2.0), (6.0, 0.0, 0.0)])
def test_trust_gives_an_update_the_norm_of_its_weight(weight: float, update: float, expected: float) -> None:
    updates = [torch.full((4, 4), update), torch.full((6, 2), 3.0)]
    apply_trust_ratios(
        updates, [torch.full((4, 4), weight), torch.arange(1.0, 4).repeat_interleave(4).view(6, 2)], [1, 3]
    )
    assert (updates[0] == expected).all()
    torch.testing.assert_close(updates[1][:, 0], torch.tensor([1.0, 1, 2, 2, 3, 3]))
