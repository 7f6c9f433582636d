"""Continual training: closed forms of its losses, what a step does, and that a trial step leaves nothing behind."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastbert.errors import OptionError
from fastbert.finetuning.batches import encode
from fastbert.finetuning.build import build_updater
from fastbert.finetuning.continual.losses import LOSSES, Step, new_weight, step_losses
from fastbert.finetuning.continual.options import METHODS, ReplayOptions
from fastbert.finetuning.continual.outputs import outputs_of
from fastbert.finetuning.continual.replay import CHOICES, interference, restored, sample_rows
from fastbert.finetuning.continual.tuner import ContinualTuner, Cost, NewRows
from fastbert.finetuning.kinds.classes import Classes
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.rows import Example
from fastbert.finetuning.saved import load_encoder
from fastbert.hub.load import tokenizer_of
from fastbert.training.logbook import NoLogbook
from fastbert.training.optimizer_state import flatten_optimizer
from fastbert.training.options import TrainingMachineOptions

KIND = Classes(("bad", "good"))
CPU = TrainingMachineOptions(device="cpu", precision="fp32", threads=1)
OPTIONS = FinetuneOptions(learning_rate=1e-2, epochs=2, batch_size=4, max_length=30, machine=CPU)


def loss_of(name: str, f: Tensor, z: Tensor, y: Tensor, step: Step, alpha: float, beta: float = 0.0) -> Tensor:
    """The loss of a step on the logits `f` of its rows, the new ones first."""
    weights = LOSSES[name].weights(step, alpha, beta)
    is_new = torch.arange(len(f)) < step.new
    sums = step_losses(LOSSES[name], f, F.cross_entropy(f, y, reduction="none"), z, is_new)
    counts = {"new": step.new, "memory": step.replayed, "labels": step.replayed}
    return sum(weight * sums[key] / counts[key] for key, weight in weights._asdict().items())


@given(st.integers(1, 5), st.integers(2, 5), st.floats(0, 1), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=30)
def test_gradients_are_the_closed_forms(n, classes, alpha, labelled, before, seed) -> None:
    """SD: t (softmax f - y)/m on new rows, (1 - t) [a (softmax f - softmax z) + (1 - a)(softmax f - y)]/n on replayed
    ones. DER: 2 alpha (f - z)/n + beta (softmax f - y)/n. ER: (softmax f - y) over the number of all rows."""
    torch.manual_seed(seed)
    m, beta = 3, 0.7
    f = torch.randn(m + n, classes, dtype=torch.float64, requires_grad=True)
    z, y = torch.randn(m + n, classes, dtype=torch.float64), torch.randint(classes, (m + n,))
    step, t = Step(m, n, labelled, before), labelled / (labelled + before)
    p, q, hot = f.detach().softmax(-1), z.softmax(-1), F.one_hot(y, classes)
    expected = {
        "sd": torch.cat([t * (p - hot)[:m] / m, (1 - t) * (alpha * (p - q) + (1 - alpha) * (p - hot))[m:] / n]),
        "der": torch.cat([(p - hot)[:m] / m, (2 * alpha * (f.detach() - z) + beta * (p - hot))[m:] / n]),
        "er": (p - hot) / (m + n),
    }
    for name, gradient in expected.items():
        (found,) = torch.autograd.grad(loss_of(name, f, z, y, step, alpha, beta), f)
        torch.testing.assert_close(found, gradient)


def test_the_distance_is_zero_at_the_stored_logits() -> None:
    """SD with a = 1: neither loss nor gradient on replayed rows with f = z, also for z of any height."""
    z = 5 * torch.randn(4, 3, dtype=torch.float64)
    f = (z + 7.0).requires_grad_()  # the same distribution
    y, step = torch.zeros(4, dtype=torch.int64), Step(1, 3, 10, 10)
    loss = loss_of("sd", f, z, y, step, 1.0)
    assert float(loss.detach() - 0.5 * F.cross_entropy(f.detach()[:1], y[:1])) == pytest.approx(0, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, f)
    assert gradient[1:].abs().max() < 1e-12 < gradient[0].abs().max()


def test_weight_of_new_examples() -> None:
    """1, 1/2, 1/3 for equal rounds; no number of replayed examples changes it."""
    assert [new_weight(50, 50 * before) for before in range(3)] == [1, 1 / 2, 1 / 3]
    assert {LOSSES["sd"].weights(Step(4, n, 50, 100), 0.5, 0).new for n in (1, 7, 100)} == {1 / 3}


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    texts = [("the good of", 1), ("bad and to in", 0), ("is good", 1), ("he was bad that it", 0)]
    return [Example(i, f"{texts[i % 4][0]} {'the ' * (i // 4)}a", None, texts[i % 4][1]) for i in range(20)]


@pytest.fixture
def tuner(bert, examples):
    """Method and changes of the options -> its tuner, with 12 old rows."""

    def build(name: str, **changes) -> ContinualTuner:
        pretrained = load_encoder(bert)
        data = encode(examples, tokenizer_of(pretrained), 30, KIND.targets)
        changes = {"replay": 3, "candidates": 8, **changes}
        rates = dict.fromkeys(("dropout", "attention_dropout"), changes.pop("dropout", 0.1))
        options = replace(OPTIONS, machine=replace(CPU, micro_batch_size=changes.pop("micro", None)), **rates)
        updater = build_updater(options, pretrained, {"words": KIND}, 0, torch.device("cpu"), "fp32")
        stored = outputs_of(updater.module, "words", data, np.arange(12), "fp32").logits
        stream = NewRows("words", data, 12, 4, 0)
        return ContinualTuner(
            *(updater, stream, options, 0, NoLogbook()),
            loss=METHODS[name].loss,
            choose=CHOICES[METHODS[name].choice],
            stored=stored,
            settings=ReplayOptions(**changes).used(name, 4),
        )

    return build


def weights_of(tuner: ContinualTuner) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tuner.updater.module.state_dict().items()}


def test_a_trial_step_leaves_nothing(tuner) -> None:
    """Weights, moments, step counters and learning rates are the same to the bit, also before the first step, where the
    optimizer has no state; and the trial had moved the weights."""
    its = tuner("mir")
    for _ in range(2):
        batch, before = its.stream.at(0, 0), weights_of(its)
        state = {name: value.clone() for name, value in flatten_optimizer(its.updater.optimizer)[0].items()}
        rest = flatten_optimizer(its.updater.optimizer)[1]
        with restored(its.updater):
            its.trial_step(batch)
            assert any((value != before[name]).any() for name, value in weights_of(its).items())
        assert flatten_optimizer(its.updater.optimizer)[1] == rest
        after = flatten_optimizer(its.updater.optimizer)[0]
        assert after.keys() == state.keys() and all(torch.equal(after[name], value) for name, value in state.items())
        assert all(torch.equal(value, before[name]) for name, value in weights_of(its).items())
        assert all(parameter.grad is None for parameter in its.updater.module.parameters())
        its.train_step(batch)
    assert its.updater.optimizer.state


def test_mir_replays_the_rows_that_a_step_hurts_most(tuner) -> None:
    its, twin = tuner("mir"), tuner("mir")
    batch = its.stream.at(0, 0)
    rows = sample_rows(8, 12, 0, 0)
    assert len(set(rows)) == 8 and max(rows) < 12
    before = twin.losses_of(rows)
    twin.trial_step(batch)
    raised = dict(zip(rows, twin.losses_of(rows) - before, strict=True))
    assert list(interference(its, batch)) == sorted(rows, key=lambda row: -raised[row])[:3]
    assert its.cost == Cost(trials=4, forwards=16)


@pytest.mark.parametrize("name", ["er", "der", "sd"])
def test_a_step_is_the_same_in_micro_batches(tuner, name) -> None:
    """One step on 4 new and 3 replayed rows; parts may hold both."""
    found = []
    for micro in (None, 2, 3):
        its = tuner(name, micro=micro)
        its.train_step(its.stream.at(0, 0))
        assert its.cost == Cost(gradients=7)
        found.append(weights_of(its))
    for other in found[1:]:
        for key, value in found[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=2e-5)


def test_steps_have_only_the_losses_with_a_weight(tuner) -> None:
    """alpha of 0 makes DER without beta, and SD at alpha of 1, differ from each other and from ER; the stored logits
    change nothing where alpha is 0."""

    def trained(name: str, shift: float = 0.0, **changes) -> Tensor:
        its = tuner(name, **changes)
        its.stored = its.stored + np.array([shift, -shift], np.float32)
        its.train_step(its.stream.at(0, 0))
        return torch.cat([value.flatten() for value in weights_of(its).values()])

    assert torch.equal(trained("sd", alpha=0.0), trained("sd", 3.0, alpha=0.0))
    assert not torch.equal(trained("sd", alpha=0.5), trained("sd", 3.0, alpha=0.5))
    assert not torch.equal(trained("der", alpha=0.5), trained("der", 3.0, alpha=0.5))
    assert not torch.equal(trained("der", alpha=0.5, beta=0.1), trained("der", alpha=0.5, beta=1.0))
    assert torch.equal(trained("er"), trained("er", 3.0))


@pytest.mark.parametrize("name", ["sd", "der"])
def test_each_row_is_compared_with_its_own_logits(tuner, name) -> None:
    """Without dropout, nothing has changed before the first step: all distances are zero, in any order of the rows."""
    its = tuner(name, dropout=0.0)
    batch = its.stream.at(0, 0)
    batch = replace(batch, rows=np.concatenate([batch.rows, [7, 2, 11]]))
    sums = its.losses(batch, 4)(its.updater.module, slice(0, 7))
    assert float(sums["memory"].detach()) == pytest.approx(0, abs=1e-9)
    losses = its.losses_of(batch.rows)
    assert float(sums["new"].detach()) == pytest.approx(losses[:4].sum(), rel=1e-5)
    assert float(sums["labels"].detach()) == pytest.approx(losses[4:].sum(), rel=1e-5)


def test_every_new_row_once_per_epoch(tuner) -> None:
    stream = tuner("er").stream
    for epoch in range(2):
        rows = np.concatenate([stream.at(epoch, index).rows for index in range(stream.batches)])
        assert sorted(rows) == list(range(12, 20))


def test_options_of_replay() -> None:
    assert ReplayOptions(candidates=2).used("mir", 25) == {"replay": 25, "candidates": 25}
    assert ReplayOptions().used("anew", 25) == {} == ReplayOptions().used("warm", 25)
    with pytest.raises(OptionError, match="alpha must be at most 1 for sd"):
        ReplayOptions(alpha=1.5).check("sd")
    ReplayOptions(alpha=1.5).check("der")


def test_costs() -> None:
    """CoLA in the setting of the paper: 20 rounds of 50 from a pool of 8,551, 5 epochs, a replayed example for each new
    one. Training anew costs 5.2 times as much as continual training; with the scoring of the pool 1.7 times."""
    rounds = range(1, 21)
    pool = [8551 - 50 * (t - 1) if t > 1 else 0 for t in rounds]
    anew = [Cost(gradients=5 * 50 * t, pool=pool[t - 1]) for t in rounds]
    continual = [Cost(gradients=5 * 50 * (1 if t == 1 else 2), forwards=50, pool=pool[t - 1]) for t in rounds]
    assert sum(each.gradients for each in anew) == 210 * 250 and sum(each.gradients for each in continual) == 39 * 250
    ratio = sum(each.training() for each in anew) / sum(each.training() for each in continual)
    assert ratio == pytest.approx(5.2, abs=0.05)
    assert sum(each.total() for each in anew) / sum(each.total() for each in continual) == pytest.approx(1.7, abs=0.05)
