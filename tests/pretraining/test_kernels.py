"""`machine.kernels`: the functions that each choice calls, and equal training with both."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from fastbert_kernels.cross_entropy import dispatch

from fastbert.config import from_dict
from fastbert.model.kernel_choice import KERNELS, Kernels
from fastbert.objectives import OBJECTIVES
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.setup import prepare_setup

USED = {
    "mlm": {"attention", "linear_cross_entropy"},
    "electra": {"attention", "sample_distinct"},
    "multiple-choice": {"attention", "sample_distinct", "sample_candidates"},
}


def trained(prepared: Path, objective: str, kernels: str) -> list[float]:
    """The losses of a few steps in float32."""
    values = {
        **{"data": str(prepared), "objective": objective, "position": "tupe-r", "steps": 1},
        **{"layers": 2, "width": 32, "heads": 2, "length": 32, "batch_size": 4},
        "multiple_choice": {"choices": 4},
        "machine": {"threads": 1, "precision": "fp32", "kernels": kernels},
    }
    setup = prepare_setup(from_dict(PretrainOptions, values, "the test"))
    trained = setup.objective().train()
    optimizer, losses = torch.optim.AdamW(trained.parameters(), 1e-3), []
    for step in range(4):
        inputs = trained.sample(next(iter(setup.batches().at(step))), seed=0, step=step)
        sums = trained(inputs)
        loss = sum(weight * sums[name] / inputs.counts[name] for name, weight in trained.loss_weights.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_each_choice_calls_its_functions_and_both_train_alike(objective: str, prepared, monkeypatch) -> None:
    # A machine's own loss is plain for as few logits as here.
    monkeypatch.setattr(dispatch, "FEW", 0)
    called: set[tuple[str, str]] = set()

    def noting(choice: str, name: str):
        function = getattr(KERNELS[choice], name)
        return lambda *given, **more: called.add((choice, name)) or function(*given, **more)

    for choice in KERNELS:
        names = [field.name for field in fields(Kernels)]
        monkeypatch.setitem(KERNELS, choice, Kernels(**{name: noting(choice, name) for name in names}))
    losses = {}
    for choice in KERNELS:
        called.clear()
        losses[choice] = trained(prepared, objective, choice)
        assert called == {(choice, name) for name in USED[objective]}
    assert losses["auto"] == pytest.approx(losses["reference"], rel=1e-5)
    assert len(set(losses["auto"])) == 4


def test_the_choices_differ() -> None:
    for field in fields(Kernels):
        assert getattr(KERNELS["auto"], field.name) is not getattr(KERNELS["reference"], field.name)
