"""Setup of `fastbert affinity`: machine, encoder and the training splits of all tasks, and a description of the
experiment."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from fastbert import config as configuration
from fastbert.data.foreign_tokenizer import AnyTokenizer
from fastbert.errors import UserError
from fastbert.finetuning.affinity.options import AffinityOptions, check_number_of_groups
from fastbert.finetuning.batches import EncodedSplit
from fastbert.finetuning.mixture import MixedStream
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.rows import Example
from fastbert.finetuning.saved import TaskRecord, load_encoder
from fastbert.finetuning.scoring import Inputs, encode_inputs
from fastbert.finetuning.setup import fingerprint_of_weights
from fastbert.finetuning.stream import SingleTaskStream, StreamBatch
from fastbert.finetuning.tasks import Task, is_glue, open_task
from fastbert.hub.load import Pretrained, tokenizer_of
from fastbert.training.apex import check_apex
from fastbert.training.hardware import resolve_device, resolve_precision, setup_machine

_PROBES = 1 << 42  # "epoch" of the first batches of the probes, which no training reaches


def mixed(parts: list[SingleTaskStream], seed: int) -> MixedStream:
    """Every batch of every task once per epoch."""
    return MixedStream(
        {part.head: part for part in parts}, dict.fromkeys((part.head for part in parts), 1.0), 1.0, seed
    )


@dataclass
class AffinitySetup:
    """Everything that the training needs."""

    options: AffinityOptions
    """Options with length and steps resolved."""
    tasks: list[Task]
    """Sorted by name."""
    pretrained: Pretrained
    vocabulary: AnyTokenizer
    train: list[list[Example]]
    """Training examples of each task."""
    dev: dict[str, dict[str, Inputs]]
    """Task -> dev split -> its examples; empty without --train."""
    orders: dict[str, tuple[EncodedSplit, ...]]
    """Task -> its training split."""
    stream: MixedStream
    """Batches of the training."""
    probe_parts: list[SingleTaskStream]
    """Batches of the probes, of each task."""
    device: torch.device
    precision: str
    warnings: list[str]
    """Printed before training starts."""

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    @property
    def tuning(self) -> FinetuneOptions:
        """The options of the training as those of a fine-tuning."""
        own = self.options
        return FinetuneOptions(
            model=own.model,
            task=own.tasks,
            epochs=own.epochs,
            batch_size=own.batch_size,
            max_length=own.max_length,
            learning_rate=own.learning_rate,
            machine=own.machine,
        )

    def probe_batches(self, number: int) -> list[StreamBatch]:
        """A batch of each task for the probe `number`, from 0, in an order of its own. A batch without a label is
        replaced by the next one.

        Raises:
            UserError: a task has no labelled example.
        """
        found = []
        for part in self.probe_parts:
            later = (self._probe_batch(part, at) for at in range(number, number + part.batches))
            batch = next((batch for batch in later if batch.units), None)
            if batch is None:
                raise UserError(
                    f"the task {part.head} has no labelled example in train; give it labels, or leave it out"
                )
            found.append(batch)
        return found

    def _probe_batch(self, part: SingleTaskStream, number: int) -> StreamBatch:
        epoch, index = divmod(number, part.batches)
        return part.at(_PROBES + epoch, index)


def prepare_affinity(requested: AffinityOptions) -> AffinitySetup:
    """Opens machine, model and tasks, and checks everything that can be checked before training.

    Raises:
        UserError: see `AffinityOptions.check_inputs`; two tasks have one name, or a task has no train split.
    """
    device = resolve_device(requested.machine.device)
    precision, warning = resolve_precision(requested.machine.precision, device)
    if requested.machine.apex:
        check_apex("adamw", device)
    setup_machine(requested.machine, device)
    tasks = open_tasks(requested)
    pretrained = load_encoder(requested.model)
    vocabulary = tokenizer_of(pretrained)
    positions = pretrained.config.max_positions
    length = requested.max_length or positions
    if length > positions:
        raise UserError(f"max_length {length} is longer than the {positions} positions of {requested.model}; lower it")
    train = [task.examples("train") for task in tasks]
    orders = {}
    for task, examples in zip(tasks, train, strict=True):
        record = TaskRecord(task.name, task.kind, task.is_pair, False, length, requested.seed, {})
        orders[task.name] = encode_inputs(examples, vocabulary, record).orders
    settings = (requested.batch_size, requested.seed)
    # Each stream holds the order of its newest epoch, so training and probes have streams of their own.
    parts, probe_parts = ([SingleTaskStream(name, each, *settings) for name, each in orders.items()] for _ in range(2))
    stream = mixed(parts, requested.seed)
    dev = {task.name: dev_of(task, vocabulary, length) for task in tasks} if requested.train else {}
    options = replace(requested, max_length=length, steps=requested.steps or requested.epochs * stream.batches)
    warnings = [*([warning] if warning else []), *(line for task in tasks for line in task.warnings)]
    return AffinitySetup(
        options, tasks, pretrained, vocabulary, train, dev, orders, stream, probe_parts, device, precision, warnings
    )


def dev_of(task: Task, vocabulary: AnyTokenizer, length: int) -> dict[str, Inputs]:
    """The dev splits of a task.

    Raises:
        UserError: a metric is not defined on one of them.
    """
    record = TaskRecord(task.name, task.kind, task.is_pair, False, length, 0, {})
    found = {split: encode_inputs(task.examples(split), vocabulary, record) for split in task.dev_splits}
    for inputs in found.values():
        task.check_scorable(inputs.labels)
    return found


def open_tasks(requested: AffinityOptions) -> list[Task]:
    """The tasks, sorted by name.

    Raises:
        UserError: two tasks have one name, or a task has no train split.
    """
    tasks: dict[str, Task] = {}
    for name in requested.names():
        task = open_task(name, glue_dir=requested.glue_dir, glue_subset=requested.glue_subset and is_glue(name))
        if task.name in tasks:
            raise UserError(f"a task called {task.name} is given twice; leave one out, or rename one in its YAML file")
        if "train" not in task.splits:
            raise UserError(
                f"the task {task.name} has no train split, so there are no steps on it; add train to its YAML file, "
                "or leave the task out"
            )
        if requested.train and not task.dev_splits:
            raise UserError(
                f"the task {task.name} has no dev split, which --train needs; add one, or leave out --train"
            )
        tasks[task.name] = task
    check_number_of_groups(requested, len(tasks))
    return [tasks[name] for name in sorted(tasks)]


def describe_affinity(setup: AffinitySetup) -> dict[str, Any]:
    """Everything that the measured affinities depend on, by name."""
    leaves = configuration.leaves(setup.options, active=True)
    science = {leaf.name: leaf.value for leaf in leaves if leaf.role == "science" and leaf.name != "epochs"}
    return {
        **science,
        "tasks": {task.name: [task.kind.name, *task.kind.labels] for task in setup.tasks},
        "model": fingerprint_of_weights(setup.pretrained),
        "tokenizer": setup.vocabulary.fingerprint[:8],
        "data": configuration.digest(
            {
                name: [[e.text, e.pair, e.label, e.words, e.soft_label, e.weight] for e in examples]
                for name, examples in zip(setup.names, setup.train, strict=True)
            }
        ),
    }
