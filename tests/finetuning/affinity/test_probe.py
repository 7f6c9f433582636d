"""The probe: its values in closed form, and that it changes nothing."""

import copy
import random
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastbert.data.tokenizer import WordPiece
from fastbert.finetuning.affinity.probe import loss_part, probe
from fastbert.finetuning.batches import encode
from fastbert.finetuning.kinds.classes import Classes
from fastbert.finetuning.kinds.multi_label import MultiLabel
from fastbert.finetuning.kinds.number import Number
from fastbert.finetuning.kinds.tokens import Tokens
from fastbert.finetuning.loop import Tuner, build_scaled_optimizer
from fastbert.finetuning.model import TaskModel
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.rows import Example
from fastbert.finetuning.stream import StreamBatch, batch_of
from fastbert.model.encoder import initialize
from fastbert.randomness import row_keys
from fastbert.training.lagged import LaggedScalars
from fastbert.training.logbook import NoLogbook
from fastbert.training.options import OptimizerOptions, ScheduleOptions
from fastbert.training.step import Updater
from tests.finetuning.conftest import FILLERS, WORDS, tiny_config

TASKS = {"topic": Classes(("a", "b", "c")), "score": Number(), "soft": Classes(("a", "b"))}
RATE = 1e-3


def data_of(name: str, labels: list, **more):
    texts = [" ".join(FILLERS[n : 3 + 2 * n]) for n in range(len(labels))]
    weights = more.get("weights", [1.0] * len(labels))
    soft = more.get("soft", [None] * len(labels))
    examples = [
        Example(n, texts[n], None, labels[n], soft_label=soft[n], weight=weights[n]) for n in range(len(labels))
    ]
    return encode(examples, WordPiece(WORDS), 30, TASKS[name].targets)


@pytest.fixture(scope="module")
def batches() -> list[StreamBatch]:
    """Classes, numbers with weights of which one is 0, and soft labels."""
    soft = [(0.9, 0.1), (0.2, 0.8), (0.5, 0.5)]
    return [
        batch_of(data_of("topic", [0, 1, 2, 1]), np.array([2, 0, 1, 3]), "topic"),
        batch_of(data_of("score", [0.5, 2.0, -1.0], weights=[2.0, 0.0, 1.0]), np.array([1, 0, 2]), "score"),
        batch_of(data_of("soft", [0, 1, 0], soft=soft), np.array([0, 1, 2]), "soft"),
    ]


@pytest.fixture
def model() -> TaskModel:
    found = TaskModel(tiny_config(dropout=0.2, attention_dropout=0.1), TASKS)
    initialize(found, 0, 0.1)
    return found


def keys_of(batches: list[StreamBatch], step: int = 0) -> list[torch.Tensor]:
    return [row_keys(0, "dropout", step, torch.arange(len(batch.rows))) for batch in batches]


def tuner_of(model: TaskModel) -> Tuner:
    optimizer = build_scaled_optimizer(
        model.named_parameters(), model.encoder.config, OptimizerOptions(), 1.0, torch.device("cpu")
    )
    options = FinetuneOptions(epochs=1, learning_rate=RATE, schedule=ScheduleOptions("constant", 0.0))

    class Endless:
        batches = 100

    return Tuner(Updater(model, optimizer, 1.0, "fp32"), Endless(), options, 0, NoLogbook())


def losses_of(model: torch.nn.Module, batches: list[StreamBatch]) -> list[torch.Tensor]:
    """The three losses by torch's functions."""
    topic, score, soft = (
        model(b.data.batch(b.rows), [b.head], k)[0] for b, k in zip(batches, keys_of(batches), strict=True)
    )
    targets = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], dtype=torch.float32).double()
    return [
        F.cross_entropy(topic, torch.tensor([2, 0, 1, 1])),
        (2.0 * (score[1, 0] - 0.5) ** 2 + (score[2, 0] + 1.0) ** 2) / 2,
        F.cross_entropy(soft, targets),
    ]


def test_a_probe_is_a_step_on_one_task_and_the_losses_of_all(model, batches) -> None:
    """Closed form in a model in float64 whose encoder is moved."""
    found = probe(model, batches, RATE, keys_of(batches))
    double = copy.deepcopy(model).double()
    before = losses_of(double, batches)
    shared = list(double.encoder.parameters())
    gradients = [torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True) for loss in before]
    gradients = [[torch.zeros(()) if g is None else g for g in each] for each in gradients]
    np.testing.assert_allclose(found.losses, [loss.item() for loss in before], rtol=1e-12)
    for i, gradient in enumerate(gradients):
        moved = copy.deepcopy(double)
        with torch.no_grad():
            for parameter, change in zip(moved.encoder.parameters(), gradient, strict=True):
                parameter -= RATE * change
            after = losses_of(moved, batches)
        for j, (old, new) in enumerate(zip(before, after, strict=True)):
            assert found.affinity[i, j] == pytest.approx(1 - new.item() / old.item(), rel=1e-9), (i, j)
            product = sum((a * b).sum().item() for a, b in zip(gradient, gradients[j], strict=True))
            assert found.first_order[i, j] == pytest.approx(RATE * product / old.item(), rel=1e-9), (i, j)
    assert (np.diag(found.affinity) > 0).all() and not np.allclose(found.affinity, found.affinity.T)


def test_half_the_rate_quarters_the_difference_to_the_first_order(model, batches) -> None:
    whole, half = (probe(model, batches, rate, keys_of(batches)) for rate in (RATE, RATE / 2))
    ratio = (whole.affinity - whole.first_order) / (half.affinity - half.first_order)
    np.testing.assert_allclose(ratio, 4.0, rtol=0.1)


def test_both_losses_have_the_same_masks(model, batches) -> None:
    """Without a step nothing changes. With other masks a loss changes by more than a step changes it."""
    assert np.abs(probe(model, batches, 0.0, keys_of(batches)).affinity).max() < 1e-14
    weights = {name: value.detach().double() for name, value in model.named_parameters()}
    batch = batches[0]
    for_masks = [
        loss_part(model, weights, batch, slice(4), keys_of(batches, step)[0], torch.device("cpu")).item()
        for step in range(5)
    ]
    noise = np.std(for_masks) / np.mean(for_masks)
    assert noise > 10 * np.abs(probe(model, batches, 1e-4, keys_of(batches)).affinity[1, 0])


def test_a_probe_changes_nothing(model, batches) -> None:
    """Weights, moments that are not zero, gradients and random states are equal to the bit."""
    tuner = tuner_of(model)
    for batch in batches:
        tuner.train_step(batch)
    before = copy.deepcopy(tuner.tensors())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    probe(model, batches, 0.5, keys_of(batches))
    after = tuner.tensors()
    assert any("exp_avg" in name for name in before["optimizer"])
    for part, tensors in before.items():
        assert all(torch.equal(value, after[part][name]) for name, value in tensors.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()


def test_the_losses_are_those_of_the_training(model, batches) -> None:
    """Those of the next step, with its masks, for every kind of task."""
    tags, topics = Tokens(("N", "V")), MultiLabel(("x", "y"))
    texts = [" ".join(FILLERS[n : n + 4]) for n in range(3)]
    ranges = [tuple((m.start(), m.end()) for m in re.finditer(r"\w+", text)) for text in texts]
    tagged = [Example(n, texts[n], None, (0, 1, 1, n % 2), ranges[n]) for n in range(3)]
    labelled = [Example(n, texts[n], None, ((0,), (), (0, 1))[n]) for n in range(3)]
    more = {"tags": (tags, tagged), "topics": (topics, labelled)}
    model = TaskModel(model.encoder.config, TASKS | {name: kind for name, (kind, _) in more.items()})
    initialize(model, 0, 0.1)
    for name, (kind, examples) in more.items():
        batches = [*batches, batch_of(kind.encode(examples, WordPiece(WORDS), 30), np.array([2, 0, 1]), name)]
    for step, batch in enumerate(batches):
        tuner = tuner_of(copy.deepcopy(model))
        tuner.progress.step, tuner._lagged = step, LaggedScalars()
        expected = probe(tuner.updater.module, [batch], RATE, [keys_of([batch], step)[0]]).losses[0]
        tuner.train_step(batch)
        assert tuner._lagged.pop()[1]["loss"] == pytest.approx(expected, rel=1e-5)


def test_micro_batches_give_the_same_probe(model, batches) -> None:
    whole = probe(model, batches, RATE, keys_of(batches))
    parts = probe(model, batches, RATE, keys_of(batches), micro_batch_size=2)
    for name in ("losses", "affinity", "first_order"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-9)
