"""Setup of a fine-tuning, common to all seeds: machine, encoder, task and texts, and a description of the
experiment."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fastbert import config as configuration
from fastbert.data.foreign_tokenizer import AnyTokenizer
from fastbert.downloads import commit_of
from fastbert.errors import UserError
from fastbert.finetuning.batches import subset
from fastbert.finetuning.options import FinetuneOptions, science
from fastbert.finetuning.results import Figures, tuned_folder
from fastbert.finetuning.rows import Example
from fastbert.finetuning.saved import TaskRecord, fine_tuned_folder, load_encoder
from fastbert.finetuning.scoring import Inputs, encode_inputs
from fastbert.finetuning.slices import Masks, masks
from fastbert.finetuning.tasks import Task, open_task
from fastbert.hub.load import Pretrained, tokenizer_of
from fastbert.model.memory import training_memory
from fastbert.training.apex import check_apex
from fastbert.training.hardware import device_of_rank, resolve_precision, setup_machine
from fastbert.training.schedules import learning_rate_factor
from fastbert.training.world import ONE_PROCESS, World


@dataclass
class FinetuneSetup:
    """Everything that the seeds have in common."""

    options: FinetuneOptions
    task: Task
    pretrained: Pretrained
    vocabulary: AnyTokenizer
    train: list[Example]
    dev: dict[str, Inputs]
    device: torch.device
    precision: str
    warnings: list[str]
    """Printed before training starts."""
    world: World = ONE_PROCESS

    @property
    def labels(self) -> dict[str, list[Any]]:
        """Dev split -> the label of each example."""
        return {split: inputs.labels for split, inputs in self.dev.items()}

    @cached_property
    def slices(self) -> Masks:
        """The examples in each slice of dev."""
        return {split: masks(self.task.slices, inputs.examples, split) for split, inputs in self.dev.items()}

    @property
    def machine(self) -> str:
        """Devices and precision, such as "cpu fp32" or "4 x cuda bf16"."""
        several = self.world.size > 1
        return f"{f'{self.world.size} x {self.device.type}' if several else self.device} {self.precision}"


def task_record(options: FinetuneOptions, task: Task, seed: int, dev: Figures) -> TaskRecord:
    return TaskRecord(task.name, task.kind, task.is_pair, options.symmetric, options.max_length, seed, dev)


def open_encoder(requested: FinetuneOptions) -> Pretrained:
    """The encoder to start from.

    Raises:
        UserError: there is none, or --init-from is not a fine-tuned model.
    """
    if requested.init_from is None:
        return load_encoder(requested.model)
    folder = tuned_folder(Path(requested.init_from))
    if fine_tuned_folder(folder) is None:
        raise UserError(
            f"{folder} holds no fine-tuned model; give the folder of a seed of fastbert finetune, or its --out, with "
            "--init-from, and a pretrained encoder with --model"
        )
    return load_encoder(folder)


def expected_memory(setup: FinetuneSetup) -> int:
    """Bytes of main memory that the training of a seed needs, estimated; 0 (unknown) if it runs on a GPU. The longest
    training text is supposed to be as long as the longest of dev."""
    if setup.device.type != "cpu":
        return 0
    options, pretrained = setup.options, setup.pretrained
    longest = max(int(inputs.orders[0].lengths.max()) for inputs in setup.dev.values())
    tokens = (options.machine.micro_batch_size or options.batch_size) * min(longest, options.max_length)
    parameters = sum(weight.numel() for weight in pretrained.weights.values())
    return training_memory(parameters, [pretrained.config], tokens, 7, predicts_words=False)


def prepare_finetuning(
    requested: FinetuneOptions, world: World = ONE_PROCESS, encoder: Pretrained | None = None, alone: bool = True
) -> FinetuneSetup:
    """Opens machine, model, task and texts, and checks everything that can be checked before training.

    Args:
        encoder: of the options, if it is open already.
        alone: False if the task is not trained alone, so that its own number of steps does not matter.
    """
    device = device_of_rank(requested.machine.device, world)
    precision, warning = resolve_precision(requested.machine.precision, device)
    if requested.machine.apex:
        check_apex("adamw", device)
    setup_machine(requested.machine, device)
    task = open_task(
        requested.task,
        glue_dir=requested.glue_dir,
        custom=requested.custom,
        glue_subset=requested.glue_subset,
        slices=requested.slices,
    )
    if "train" not in task.splits or not task.dev_splits:
        lacking = "train" if "train" not in task.splits else "dev"
        raise UserError(
            f"the task {task.name} has no {lacking} split, and fine-tuning needs train and dev; for a "
            f"custom task, give --custom.{lacking}"
        )
    pretrained = encoder or open_encoder(requested)
    vocabulary = tokenizer_of(pretrained)
    options = requested.resolved(task, pretrained.config.max_positions)
    record = task_record(options, task, 0, {})
    train = task.examples("train")
    dev = {split: encode_inputs(task.examples(split), vocabulary, record) for split in task.dev_splits}
    for inputs in dev.values():
        task.check_scorable([example.label for example in inputs.examples])
    for fraction in options.fractions():
        rows = subset(len(train), fraction)
        if not any(train[row].weight for row in rows):
            raise UserError(
                f"the task {task.name}: all weights of the {len(rows)} training examples are 0; give examples to learn "
                "from a weight above 0"
            )
    warnings = [*([warning] if warning else []), *task.warnings]
    if len(vocabulary.tokens) < pretrained.config.vocab_size:
        warnings.append(
            f"the tokenizer in {pretrained.tokenizer} has {len(vocabulary.tokens)} tokens and {requested.start} "
            f"{pretrained.config.vocab_size}: is it the one the model was trained with?"
        )
    setup = FinetuneSetup(options, task, pretrained, vocabulary, train, dev, device, precision, warnings, world)
    _ = setup.slices  # refuses a slice without examples
    if options.slice_heads:
        check_slice_heads(setup)
    if alone:
        for fraction in options.fractions():
            check_schedule([setup], fraction)
    return setup


def check_schedule(setups: Sequence[FinetuneSetup], fraction: float = 1.0) -> None:
    """Raises a UserError if the warm-up is longer than a training on a fraction of these tasks, which have common
    options."""
    options = setups[0].options
    batches = sum(-(-rows_in(setup, fraction) // options.batch_size) for setup in setups)
    learning_rate_factor(options.schedule, 0, options.epochs * batches)


def rows_in(setup: FinetuneSetup, fraction: float) -> int:
    """Number of rows of an epoch: examples or, where words have labels, the windows that they are split into."""
    numbers = subset(len(setup.train), fraction)
    if not setup.task.kind.labels_words or setup.options.schedule.warmup < 1:  # a fraction fits any number
        return len(numbers)
    record = task_record(setup.options, setup.task, 0, {})
    return len(encode_inputs([setup.train[number] for number in numbers], setup.vocabulary, record).orders[0])


def check_slice_heads(setup: FinetuneSetup) -> None:
    """Raises a UserError if the slices of the task cannot have heads."""
    task = setup.task
    if not task.slices:
        raise UserError(f"the task {task.name} has no slices for --slice-heads; add them, or leave it out")
    if task.kind.labels_words:
        raise UserError(f"--slice-heads is for tasks with a label for each text, and {task.name} labels words")
    for fraction in setup.options.fractions():
        masks(task.slices, [setup.train[row] for row in subset(len(setup.train), fraction)], "train")


def describe_finetuning(setup: FinetuneSetup) -> dict[str, Any]:
    """Everything that the results depend on, by name."""
    return {
        **science(setup.options),
        **({"slices": str(setup.task.slices)} if setup.options.slice_heads else {}),
        "labels": list(setup.task.kind.labels),
        "metrics": list(setup.task.metrics),
        "model": fingerprint_of_weights(setup.pretrained),
        "tokenizer": setup.vocabulary.fingerprint[:8],
        "data": configuration.digest(
            {
                split: [identity(example) for example in examples]
                for split, examples in (("train", setup.train), *((s, i.examples) for s, i in setup.dev.items()))
            }
        ),
    }


def identity(example: Example) -> list[Any]:
    """Everything in an example that training depends on. Values that most tasks do not have are left out."""
    soft = example.soft_label is not None or example.weight != 1.0
    return [
        *(example.text, example.pair, example.label),
        *([] if example.words is None else [example.words]),
        *([example.soft_label, example.weight] if soft else []),
    ]


def fingerprint_of_weights(pretrained: Pretrained, parts: tuple[str, ...] = ("encoder.",)) -> str:
    """Hash of the encoder's configuration and of the weights whose names begin with one of `parts`, eight hexadecimal
    digits; for a download of the Hugging Face hub followed by owner/name@commit."""
    digest = hashlib.sha256(json.dumps(pretrained.config.to_dict(), sort_keys=True).encode())
    for name in sorted(pretrained.weights):
        if name.startswith(parts):
            digest.update(name.encode())
            digest.update(pretrained.weights[name].contiguous().view(torch.uint8).numpy())
    name = commit_of(pretrained.tokenizer)
    return digest.hexdigest()[:8] + ("" if name is None else f" of {name}")
