"""The examples of an audit: those of train and dev together, groups of equal texts, folds, and flipped labels.

Folds, flipped labels and training fractions are functions of the seed and of the texts, by hashes: the order of the
files has no effect, and copies of a text are in one fold. N examples.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastbert.dataset_work.audit.options import AuditOptions, check_kind
from fastbert.errors import UserError, brief, plural
from fastbert.finetuning.rows import Example
from fastbert.finetuning.tasks import Task, open_task


@dataclass(frozen=True)
class Pool:
    """The labelled examples of a task."""

    task: Task
    splits: list[str]
    """Split of each example."""
    examples: list[Example]
    """Examples with the labels that are audited, without soft labels and weights."""
    keys: list[str]
    """Normalized text of each example, equal for copies."""
    folds: np.ndarray
    """int64 [N], the fold of each example."""
    order: np.ndarray
    """float64 [N] in [0, 1): the training examples of a fraction are those with the smallest values."""
    flipped: np.ndarray
    """bool [N], True for a label that was replaced."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def labels(self) -> list:
        return [example.label for example in self.examples]

    @property
    def has_classes(self) -> bool:
        """True for kind classes, False for numbers."""
        return bool(self.task.kind.labels)

    def training_rows(self, fold: int, fraction: float) -> np.ndarray:
        """Sorted indices of the training examples of a fold: the fraction with the smallest `order`."""
        rows = np.flatnonzero(self.folds != fold)
        count = max(1, round(fraction * len(rows)))
        return np.sort(rows[np.argsort(self.order[rows], kind="stable")[:count]])

    def held_out(self, fold: int) -> np.ndarray:
        """Sorted indices of the examples of a fold."""
        return np.flatnonzero(self.folds == fold)


def open_pool(options: AuditOptions) -> Pool:
    """Reads train and dev, and divides them into folds.

    Raises:
        UserError: the task cannot be read, has another kind or no train split, there are too few texts for the folds,
            or all labels are equal.
    """
    task = open_task(options.task, glue_dir=options.glue_dir, glue_subset=options.glue_subset)
    check_kind(task.name, task.kind.name)
    if "train" not in task.splits:
        raise UserError(f"the task {task.name} has no train split, and audit needs one; add train to its YAML file")
    splits, examples = [], []
    for split in ("train", *task.dev_splits):
        its = task.examples(split)
        splits += [split] * len(its)
        examples += [replace(example, soft_label=None, weight=1.0) for example in its]
    keys = [text_key(example, task.symmetric) for example in examples]
    flipped = np.zeros(len(examples), dtype=bool)
    if options.flip:
        if not task.kind.labels:
            raise UserError(
                f"--flip replaces classes, and the task {task.name} has kind {task.kind.name}; leave it out"
            )
        examples, flipped = flip_labels(examples, keys, len(task.kind.labels), options.flip, options.seed)
    folds = folds_of(task, examples, keys, options.folds, options.seed)
    order = np.array([fraction_of_hash(options.seed, "order", key) for key in keys])
    return Pool(task, splits, examples, keys, folds, order, flipped)


def text_key(example: Example, symmetric: bool) -> str:
    """The text without differences of case, Unicode form and white space; of a pair both texts, sorted if their order
    has no meaning."""
    texts = [example.text, *([] if example.pair is None else [example.pair])]
    texts = [normalized(text) for text in texts]
    return "\n".join(sorted(texts) if symmetric else texts)


def normalized(text: str) -> str:
    """`text` in Unicode form NFKC, without case, with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def fraction_of_hash(seed: int, purpose: str, *parts: object) -> float:
    """A number in [0, 1) as a function of the seed, a purpose and further parts."""
    content = "\0".join([str(seed), purpose, *map(str, parts)])
    digest = hashlib.sha256(content.encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def folds_of(task: Task, examples: Sequence[Example], keys: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """The fold of each example, int64 [N]: the different texts, ordered by label and hash, are assigned to the folds in
    rotation. So folds differ by at most one text, and every label is in every fold. A text with several labels counts
    for the rarest of them.

    Raises:
        UserError: a label has fewer different texts than there are folds, or all labels are equal.
    """
    labels = [example.label if task.kind.labels else 0 for example in examples]
    counts = Counter(labels)
    if task.kind.labels and len(counts) == 1:
        only = task.kind.labels[labels[0]]
        raise UserError(f"all {len(labels):,} labels of {task.name} are {brief(only)}; an audit compares labels")
    rarest: dict[str, int] = {}
    for key, label in zip(keys, labels, strict=True):
        rarest[key] = min(label, rarest.get(key, label), key=lambda one: (counts[one], one))
    texts = Counter(rarest.values())
    least = min(texts, key=lambda one: (texts[one], one))
    if texts[least] < folds:
        what = f"the label {brief(task.kind.labels[least])}" if task.kind.labels else f"the task {task.name}"
        advice = f"lower --folds to {texts[least]}, or " if texts[least] > 1 else ""
        raise UserError(
            f"{what} has {plural(texts[least], 'different text')} in train and dev, fewer than the {folds} folds; "
            f"{advice}add examples, or merge the label with another one"
        )
    ordered = sorted(rarest, key=lambda key: (rarest[key], fraction_of_hash(seed, "fold", key), key))
    fold = {key: number % folds for number, key in enumerate(ordered)}
    return np.array([fold[key] for key in keys])


def flip_labels(
    examples: Sequence[Example], keys: Sequence[str], labels: int, fraction: float, seed: int
) -> tuple[list[Example], np.ndarray]:
    """Replaces a fraction of the labels by another label with equal probabilities.

    Returns:
        The examples, and which of them are changed, bool [N].
    """
    values = [fraction_of_hash(seed, "flip", key, example.index) for key, example in zip(keys, examples, strict=True)]
    flipped = np.zeros(len(examples), dtype=bool)
    flipped[np.argsort(values, kind="stable")[: round(fraction * len(examples))]] = True
    changed = []
    for example, key, wrong in zip(examples, keys, flipped, strict=True):
        if wrong:
            shift = 1 + int(fraction_of_hash(seed, "wrong label", key, example.index) * (labels - 1))
            example = replace(example, label=(example.label + shift) % labels)
        changed.append(example)
    return changed, flipped
