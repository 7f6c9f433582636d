"""Texts of a study: the pool with known labels, or the rounds that people have labelled, encoded once for a job."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastbert import config as configuration
from fastbert.errors import UserError, plural
from fastbert.finetuning.batches import EncodedSplit, subset
from fastbert.finetuning.custom import CustomSource, CustomTaskOptions
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.rows import Example
from fastbert.finetuning.setup import FinetuneSetup, fingerprint_of_weights, identity, prepare_finetuning
from fastbert.finetuning.tasks import Task, custom_task
from fastbert.randomness import permute
from fastbert.training.schedules import learning_rate_factor

_POOL = 1 << 43  # an "epoch" of the keyed permutation that no other permutation of rows reaches


@dataclass(frozen=True)
class Texts:
    """Texts and labels of a study."""

    setup: FinetuneSetup
    """Setup of a fine-tuning with all texts as its training examples."""
    people: tuple[int, ...] = ()
    """Number of texts after each round, if people have chosen them: the first texts are the first round, ..."""
    repeated: int = 0
    """Number of texts of the training split that repeat another one, which are not in the pool."""

    @property
    def examples(self) -> list[Example]:
        return self.setup.train

    @property
    def outputs(self) -> int:
        """Number of logits of the task."""
        head = self.setup.task.kind.new_head(1, 0.0)
        return head.classifier.out_features

    def encoded(self, rows: np.ndarray | None = None) -> EncodedSplit:
        """Texts as token ids, those of `rows` (int64 [n]) in this order, or all."""
        setup = self.setup
        examples = self.examples if rows is None else [self.examples[row] for row in rows]
        return setup.task.kind.encode(examples, setup.vocabulary, setup.options.max_length)

    def fingerprint(self, count: int | None = None) -> str:
        """Hash of the texts, of the first `count` ones if people have chosen them, and of dev."""
        parts = {"texts": self.examples[:count], **{name: one.examples for name, one in self.setup.dev.items()}}
        return configuration.digest({name: [identity(example) for example in each] for name, each in parts.items()})

    @cached_property
    def encoder(self) -> dict[str, str]:
        """Hashes of model and tokenizer."""
        setup = self.setup
        return {"model": fingerprint_of_weights(setup.pretrained), "tokenizer": setup.vocabulary.fingerprint[:8]}

    def changed(self, identity: Mapping[str, Any], count: int | None) -> str | None:
        """Name of the input that differs from a job's identity; None if there is none."""
        found = self.encoder | {"data": self.fingerprint(count)}
        return next((name for name, value in found.items() if identity[name] != value), None)


def open_texts(options: FinetuneOptions, pool: int | None, files: Sequence[Path] | None = None) -> Texts:
    """Opens model and task, and reads the pool or the rounds.

    Args:
        pool: number of texts of the training split in the pool; None for all.
        files: labels that people wrote, a file for each round after the training split; None for a pool.

    Raises:
        UserError: model or task cannot be opened or do not suit a study, the pool is smaller than `pool`, or a file is
            invalid.
    """
    setup = prepare_finetuning(options, alone=False)  # the schedules are those of the rounds
    check_task(setup.task, setup.train)
    if files is not None:
        examples, sizes = labelled_rounds(setup.task, options.task, setup.train, files)
        return Texts(replace(setup, train=examples), sizes)
    distinct = list({(example.text, example.pair): example for example in reversed(setup.train)}.values())[::-1]
    repeated = len(setup.train) - len(distinct)
    if pool is not None and pool > len(distinct):
        raise UserError(
            f"pool is {pool:,}, but the training split of {setup.task.name} has "
            f"{plural(len(distinct), 'different text')}; lower it, or leave it out for all"
        )
    rows = subset(len(distinct), 1.0 if pool is None else pool / len(distinct))
    return Texts(replace(setup, train=[distinct[row] for row in rows]), (), repeated)


def check_task(task: Task, train: Sequence[Example]) -> None:
    """Raises a UserError if the task has no label for each text, or soft labels or weights, which a person who labels
    does not give."""
    if task.kind.labels_words:
        raise UserError(f"fastbert active is for tasks with a label for each text, and {task.name} labels words")
    if any(example.soft_label is not None or example.weight != 1.0 for example in train):
        raise UserError(
            f"the task {task.name} has soft labels or weights, which labels of a person do not have; leave soft and "
            "weight out"
        )


def labelled_rounds(
    task: Task, name: str, train: Sequence[Example], files: Sequence[Path]
) -> tuple[list[Example], tuple[int, ...]]:
    """The examples of the training split and of each file, and the number of examples after each round.

    Args:
        name: option `task`, for the columns of the files.

    Raises:
        UserError: a row has no label or an invalid one, or repeats a text.
    """
    declared = custom_task(name, None)
    options, folder = (CustomTaskOptions(), None) if declared is None else declared[:2]
    pair = (options.pair or "pair") if task.is_pair else None
    examples, sizes = list(train), [len(train)]
    where = {(example.text, example.pair): f"row {example.index + 1} of train" for example in train}
    for path in files:
        source = CustomSource(
            replace(
                options, train=str(path.resolve()), dev=None, test=None, pair=pair, labels=None, kind=task.kind.name
            ),
            folder,
        )
        for row in source.rows("train", []):
            label = task.kind.read(row)
            if label is None:
                raise UserError(f"{row.where} has no label; label the text, or remove the row")
            if (other := where.setdefault((row.text, row.pair), row.where)) is not row.where:
                raise UserError(f"{row.where} repeats the text of {other}; remove one of the rows")
            examples.append(Example(len(examples), row.text, row.pair, label))
        if len(examples) == sizes[-1]:
            raise UserError(f"{path} holds no example; label its texts, or remove the file")
        sizes.append(len(examples))
    return examples, tuple(sizes)


def check_schedules(options: FinetuneOptions, counts: Sequence[int]) -> None:
    """Raises a UserError if the warm-up is longer than a training on one of these numbers of examples."""
    for count in counts:
        try:
            learning_rate_factor(options.schedule, 0, options.epochs * -(-count // options.batch_size))
        except UserError as error:
            raise UserError(f"a round that trains on {plural(count, 'example')}: {error}") from None


def round_seed(seed: int, number: int) -> int:
    """Seed for order, dropout and replay of a round; that of the first round is the seed itself."""
    return (seed + (number - 1) * 0x9E3779B97F4A7C15) % 2**63


def permuted(count: int, seed: int) -> np.ndarray:
    """The texts of the pool in the order in which they are labelled without a query, int64 [count]."""
    return permute(np.arange(count), count, seed, _POOL)
