"""A stream of batches of several tasks, and the stream of one."""

import copy
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastbert.data.tokenizer import WordPiece
from fastbert.finetuning.batches import encode, sample_orders, training_order
from fastbert.finetuning.kinds.classes import Classes
from fastbert.finetuning.kinds.number import Number
from fastbert.finetuning.loop import Tuner, build_scaled_optimizer
from fastbert.finetuning.model import TaskModel, new_task_model
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.rows import Example
from fastbert.finetuning.saved import load_encoder
from fastbert.finetuning.stream import SingleTaskStream, StreamBatch, batch_of
from fastbert.finetuning.task_heads import PooledHead
from fastbert.model.encoder import initialize
from fastbert.training.interrupts import Interrupts
from fastbert.training.logbook import Logbook, NoLogbook, read_metrics
from fastbert.training.options import OptimizerOptions, ScheduleOptions, TrainingMachineOptions
from fastbert.training.step import Updater
from fastbert.training.world import World
from tests.finetuning.conftest import FILLERS, WORDS, tiny_config

NOBODY = Interrupts()  # no signal comes
TASKS = {"topic": Classes(("a", "b", "c")), "v1.2/score": Number()}


def encoded(kind, labels):
    texts = [" ".join(FILLERS[: 2 + n]) for n in range(len(labels))]
    return encode(
        [Example(n, text, None, labels[n]) for n, text in enumerate(texts)], WordPiece(WORDS), 30, kind.targets
    )


class Alternating:
    """A batch with soft labels, and one of numbers."""

    batches = 2
    soft = np.random.default_rng(0).dirichlet(np.ones(3), 5).astype(np.float32)

    def __init__(self) -> None:
        topic, score = TASKS
        self.parts = (
            StreamBatch(encoded(TASKS[topic], [0, 1, 2, 0, 1]), np.array([4, 0, 2, 1, 3]), topic, 0.5, self.soft),
            StreamBatch(encoded(TASKS[score], [0.5, -1.0, 3.0]), np.array([0, 2]), score, 3.0),
        )

    def at(self, epoch: int, index: int) -> StreamBatch:
        time.sleep(0.1 * (epoch == 0))
        return self.parts[index]


def test_two_tasks_train_together_by_their_own_losses_and_weights(tmp_path) -> None:
    """All steps in closed form: torch's gradient of the weighted means, and its AdamW. eps is so large that an update
    grows with the gradient."""
    model, stream = TaskModel(tiny_config(dropout=0.0, attention_dropout=0.0), TASKS), Alternating()
    initialize(model, 0, 0.1)
    theirs = copy.deepcopy(model)
    options = FinetuneOptions(
        epochs=2, learning_rate=0.1, log_every=1, schedule=ScheduleOptions(name="constant", warmup=0.0),
        machine=TrainingMachineOptions(micro_batch_size=3),
    )  # fmt: skip
    settings = OptimizerOptions(eps=1.0, weight_decay=0.0)
    optimizer = build_scaled_optimizer(
        model.named_parameters(), model.encoder.config, settings, 1.0, torch.device("cpu")
    )
    with Logbook(tmp_path, 4, quiet=True) as logbook:
        tuner = Tuner(Updater(model, optimizer, 0.0, "fp32"), stream, options, 0, logbook)
        seconds: list[float] = []
        assert tuner.run(NOBODY, lambda: seconds.append(tuner.progress.seconds))
    assert seconds[0] < seconds[1]  # a sum: the first epoch is the longer one

    reference = torch.optim.AdamW(
        theirs.parameters(), lr=0.1, betas=(settings.beta1, settings.beta2), eps=1.0, weight_decay=0.0
    )
    losses, still = [], {}
    for part in stream.parts * 2:
        batch = part.data.batch(part.rows)
        (logits,) = theirs(batch, [part.head])
        if part.head == "topic":
            loss = 0.5 * -(torch.from_numpy(part.soft_labels) * logits.log_softmax(-1)).sum(-1).mean()
        else:
            loss = 3.0 * F.mse_loss(logits[:, 0], torch.tensor([0.5, 3.0]))
        loss.backward()
        idle = {name for name, parameter in theirs.named_parameters() if parameter.grad is None}
        still[part.head] = {name for name in idle if name.startswith("heads.")}
        reference.step()
        reference.zero_grad()
        losses.append(loss.item())
    assert [len(names) for names in still.values()] == [4, 4] and not set.intersection(*still.values())
    for (name, mine), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=name)
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == pytest.approx(losses, rel=1e-5)


def test_a_batch_without_a_label_makes_no_step(tmp_path) -> None:
    """AdamW with moments would move the weights on a gradient of zero, and decay them."""
    model, parts = TaskModel(tiny_config(), TASKS), Alternating().parts
    initialize(model, 0, 0.1)
    optimizer = build_scaled_optimizer(
        model.named_parameters(), model.encoder.config, OptimizerOptions(weight_decay=0.1), 1.0, torch.device("cpu")
    )
    options = FinetuneOptions(epochs=1, learning_rate=0.1, log_every=1, schedule=ScheduleOptions("constant", 0.0))
    with Logbook(tmp_path, 5, quiet=True) as logbook:
        tuner = Tuner(Updater(model, optimizer, 0.0, "fp32"), Alternating(), options, 0, logbook)
        for part in parts:
            tuner.train_step(part)
        before = copy.deepcopy(tuner.tensors())
        tuner.train_step(replace(parts[0], row_weights=np.zeros(5, np.float32)))
        tuner.train_step(replace(parts[1], weight=0.0))
        after = tuner.tensors()
        assert all(torch.equal(before[kind][name], after[kind][name]) for kind in before for name in before[kind])
        assert tuner.progress.step == 4 and before["optimizer"]
        tuner.train_step(parts[0])
        assert any(not torch.equal(before["model"][name], value) for name, value in tuner.tensors()["model"].items())
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_the_loss_is_the_mean_over_the_rows_with_a_label() -> None:
    """Rows of weight 0 do not count, and weights have mean 1 over the split."""
    kind = TASKS["topic"]
    examples = [Example(n, " ".join(FILLERS[: 2 + n]), None, n % 3, weight=(2.0, 0.0, 6.0)[n % 3]) for n in range(6)]
    data = encode(examples, WordPiece(WORDS), 30, kind.targets)
    assert data.weights.tolist() == [0.75, 0.0, 2.25] * 2
    batch = batch_of(data, np.array([5, 1, 3]), "topic")
    assert batch.row_weights.tolist() == [2.25, 0.0, 0.75] and batch.units == 2 and batch.soft_labels is None


def test_a_slice_has_a_head_of_its_own_in_the_same_batch() -> None:
    """In closed form: the task's mean over all rows, and the slice's over its rows; a batch without such a row has no
    loss for that head, and leaves it as it is."""
    kind, name = TASKS["topic"], "topic, slice s"
    tasks = {"topic": kind, name: kind}
    model = TaskModel(tiny_config(dropout=0.0, attention_dropout=0.0), tasks)
    initialize(model, 0, 0.1)
    theirs = copy.deepcopy(model)
    data, mask = encoded(kind, [0, 1, 2, 0, 1]), np.array([True, False, False, True, False])
    batch = StreamBatch(data, np.array([4, 0, 2, 1, 3]), "topic", 0.5, slices={name: mask[[4, 0, 2, 1, 3]]})
    assert batch.counts == {"topic": 5, name: 2}
    settings = OptimizerOptions(eps=1.0, weight_decay=0.0)
    device = torch.device("cpu")
    optimizer = build_scaled_optimizer(model.named_parameters(), model.encoder.config, settings, 1.0, device)
    options = FinetuneOptions(
        epochs=1, learning_rate=0.1, schedule=ScheduleOptions(name="constant", warmup=0.0),
        machine=TrainingMachineOptions(micro_batch_size=2),
    )  # fmt: skip
    tuner = Tuner(Updater(model, optimizer, 0.0, "fp32"), Alternating(), options, 0, NoLogbook())
    tuner.train_step(batch)
    reference = torch.optim.AdamW(
        theirs.parameters(), lr=0.1, betas=(settings.beta1, settings.beta2), eps=1.0, weight_decay=0.0
    )
    inputs = data.batch(batch.rows)
    whole, part = theirs(inputs, ["topic", name])
    inside = torch.tensor([1, 4])  # the rows 0 and 3 of the split
    loss = 0.5 * F.cross_entropy(whole, inputs.labels) + 0.5 * F.cross_entropy(part[inside], inputs.labels[inside])
    loss.backward()
    reference.step()
    for (key, mine), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=key)
    before = copy.deepcopy(model.head(name).state_dict())
    empty = replace(batch, slices={name: np.zeros(5, bool)})
    assert empty.counts == {"topic": 5}
    tuner.train_step(empty)
    assert all(torch.equal(before[key], value) for key, value in model.head(name).state_dict().items())


def test_ranks_divide_the_rows_of_a_batch(tmp_path) -> None:
    """Without a sum over the ranks, each has the part of the loss of its rows."""
    options = FinetuneOptions(epochs=1, learning_rate=1e-9, log_every=1, schedule=ScheduleOptions("constant", 0.0))
    losses = {}
    for world in (World(0, 2), World(1, 2), World()):
        model, stream = TaskModel(tiny_config(), TASKS), SingleTaskStream("topic", [Alternating().parts[0].data], 5, 0)
        initialize(model, 0, 0.1)
        optimizer = build_scaled_optimizer(
            model.named_parameters(), model.encoder.config, OptimizerOptions(), 1.0, torch.device("cpu")
        )
        folder = tmp_path / f"{world.rank}-{world.size}"
        with Logbook(folder, 1, quiet=True) as logbook:
            Tuner(Updater(model, optimizer, 0.0, "fp32", world), stream, options, 0, logbook).run(NOBODY, lambda: None)
        losses[world] = read_metrics(folder / "metrics.jsonl")[0]["loss"]
    first, second, alone = losses.values()
    assert first + second == pytest.approx(alone, rel=1e-6) and min(first, second) > 0.1


def test_heads_start_from_the_same_weights_alone_and_together(bert) -> None:
    """Those of a task depend on its name: heads of the same shape differ."""
    settings = {"dropout": 0.0, "attention_dropout": 0.0, "kernels": "auto"}
    heads = []
    for tasks in ({"topic": TASKS["topic"]}, dict(reversed(TASKS.items())), TASKS | {"other": TASKS["topic"]}):
        model = new_task_model(load_encoder(bert), tasks, 3, **settings)
        heads.append(dict(model.head("topic").state_dict()))
        torch.testing.assert_close(heads[-1], heads[0], rtol=0, atol=0)
    assert not torch.equal(model.head("other").classifier.weight, heads[0]["classifier.weight"])
    assert not torch.equal(heads[0]["classifier.weight"], torch.zeros_like(heads[0]["classifier.weight"]))


def test_the_head_drops_its_input_where_there_are_keys() -> None:
    head = PooledHead(64, 64, 0.5)
    with torch.no_grad():
        for layer, weight, bias in ((head.pooler, torch.zeros(64, 64), 1.0), (head.classifier, torch.eye(64), 0.0)):
            layer.weight.copy_(weight)
            layer.bias.fill_(bias)
    hidden, whole = torch.zeros(8, 1, 64), math.tanh(1.0)
    torch.testing.assert_close(head(hidden, None), torch.full((8, 64), whole))
    dropped = head(hidden, torch.arange(8, dtype=torch.int32))
    zero = dropped == 0
    assert 0.4 < zero.float().mean() < 0.6 and not torch.equal(zero[0], zero[1])
    torch.testing.assert_close(dropped[~zero], torch.full_like(dropped[~zero], 2 * whole))


def test_a_stream_of_one_task_is_a_function_of_epoch_and_index() -> None:
    kind = TASKS["topic"]
    examples = [Example(n, " ".join(FILLERS[: 1 + n % 7]), "good bad", n % 3) for n in range(23)]
    swapped = [Example(e.index, e.pair, e.text, e.label) for e in examples]
    orders = [encode(order, WordPiece(WORDS), 30, kind.targets) for order in (examples, swapped)]
    stream = SingleTaskStream("topic", orders, 5, seed=7)
    assert stream.batches == 5
    for epoch, index in ((2, 4), (0, 1), (2, 0)):
        batch, data = stream.at(epoch, index), sample_orders(orders, 7, epoch)
        assert (batch.rows == training_order(data.lengths, 5, 7, epoch)[index]).all()
        assert (batch.data.tokens == data.tokens).all() and batch.head == "topic" and batch.weight == 1.0
    assert (stream.at(0, 0).data.tokens != stream.at(1, 0).data.tokens).any()
