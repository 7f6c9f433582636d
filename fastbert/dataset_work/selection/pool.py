"""The pool: rows without labels in a file. It is read once to find the texts that can be selected, and again to score
them and to write the selected ones, so that only hashes are in memory."""

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastbert.data.formats import suffixes
from fastbert.data.tables import whole_rows
from fastbert.dataset_work.selection.queries import highest
from fastbert.errors import UserError, brief, nearest
from fastbert.finetuning.custom import TEXT, CustomSource, CustomTaskOptions
from fastbert.finetuning.kinds import KINDS
from fastbert.finetuning.rows import Example, Row
from fastbert.finetuning.tasks import Task, custom_task
from fastbert.finetuning.word_rows import is_conll, word_columns
from fastbert.progress import progress

PAIR = "pair"
SCORE, REASON = "score", "reason"
"""Columns of the output."""
DIGITS = 5
"""Decimals of scores: the other rows of a batch change the last bits of a forward pass."""

Item = TypeVar("Item")


@dataclass(frozen=True, order=True)
class Chosen:
    """A selected text. In ascending order the best one is first, of equal ones that with the lower hash."""

    minus_score: float
    key: int
    index: int
    """Index of its row in the pool."""
    reason: str

    @classmethod
    def of(cls, score: float, key: int, index: int, reason: str) -> "Chosen":
        return cls(-float(score), int(key), int(index), reason)

    @property
    def score(self) -> float:
        return 0.0 - self.minus_score


@dataclass(frozen=True)
class Pool:
    """Rows of a pool that can be selected: distinct, without a label, and in the subsample if there is one."""

    path: Path
    source: CustomSource
    symmetric: bool
    keys: np.ndarray
    """uint64 [rows], a hash of the text of each row."""
    usable: np.ndarray
    """bool [rows]."""
    labelled: dict[str, int]
    """Split of the task -> number of rows of the pool whose text is in it."""
    repeated: int
    """Number of rows that repeat an earlier one, among those without a label."""
    remaining: int
    """Number of other rows, before subsampling."""

    def __len__(self) -> int:
        """Number of usable rows."""
        return int(self.usable.sum())

    def examples(self) -> Iterator[Example]:
        """The usable rows, in the order of the file.

        Raises:
            UserError: the file has changed since it was read first.
        """
        for index, row in enumerate(self._checked(self.source.rows("test", []), lambda row: row)):
            if self.usable[index]:
                yield Example(index, row.text, row.pair, None, row.words)

    def cells(self, wanted: set[int]) -> dict[int, dict[str, Any]]:
        """All cells of the rows at these indices of the file, by index. Raises the same errors as `examples`."""
        found = {}
        with progress("reading the selected rows", len(self.keys), "rows") as shown:
            rows = self._checked(rows_with_cells(self.source, self.path), lambda both: both[0])
            for index, (_, cells) in enumerate(rows):
                if index in wanted:
                    found[index] = cells
                shown.update(index)
        return found

    def _checked(self, items: Iterator[Item], row_of: Callable[[Item], Row]) -> Iterator[Item]:
        """Yields `items`, as long as their texts are those of the first reading."""
        index = -1
        for index, item in enumerate(items):
            row = row_of(item)
            if index >= len(self.keys) or key(row.text, row.pair, self.symmetric) != self.keys[index]:
                raise changed(self.path)
            yield item
        if index + 1 < len(self.keys):
            raise changed(self.path)

    def excluded(self) -> str:
        """The rows that cannot be selected, for messages; empty if there are none."""
        parts = [f"{count:,} labelled in {split}" for split, count in self.labelled.items()]
        return ", ".join(parts + ([f"{self.repeated:,} repeated"] if self.repeated else []))


def read_pool(path: str, task: Task, task_name: str, limit: int | None, seed: int) -> Pool:
    """Reads the whole pool once.

    Args:
        task_name: --task, for the columns.
        limit: maximum number of usable rows, a hashed sample of those that remain; None for all.

    Raises:
        UserError: the pool is empty, a row is invalid, a column is missing or has the name of one of the output, or no
            row remains.
    """
    source = pool_source(Path(path), task, task_name)
    hashes = array("Q")
    with progress("reading the pool", 0, "texts") as shown:
        for row, _ in rows_with_cells(source, Path(path)):
            hashes.append(key(row.text, row.pair, task.symmetric))
            shown.update(len(hashes))
    if not hashes:
        raise UserError(f"the pool {path} holds no text; give a file with rows")
    keys = np.frombuffer(hashes, np.uint64)
    free = np.ones(len(keys), bool)
    labelled = {}
    for split in task.splits:
        found = free & np.isin(keys, labelled_keys(task, split))
        free &= ~found
        if found.any():
            labelled[split] = int(found.sum())
    _, first = np.unique(keys, return_index=True)
    distinct = np.zeros(len(keys), bool)
    distinct[first] = True
    repeated, free = int((free & ~distinct).sum()), free & distinct
    remaining = int(free.sum())
    if limit is not None and limit < remaining:
        rows = np.flatnonzero(free)
        free = np.zeros(len(keys), bool)
        free[rows[np.argsort(order_of(keys[rows], seed, "pool"))[:limit]]] = True
    pool = Pool(Path(path), source, task.symmetric, keys, free, labelled, repeated, remaining)
    if not remaining:
        raise UserError(f"no text of the pool {path} remains ({pool.excluded()}); add texts without labels")
    return pool


def pool_source(path: Path, task: Task, task_name: str) -> CustomSource:
    """Source of the pool's rows as the split test, with the columns of the task."""
    declared = custom_task(task_name, None)
    options = CustomTaskOptions(kind=task.kind.name) if declared is None else declared[0]
    pair = (options.pair or PAIR) if task.is_pair else None
    return CustomSource(
        replace(options, train=None, dev=None, test=str(path), pair=pair, labels=None, soft=None, weight=None)
    )


def rows_with_cells(source: CustomSource, path: Path) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Each row with all its cells; those of CoNLL columns are the words and their tags."""
    if source.options.kind == "tokens" and is_conll(path):
        for row in source.rows("test", []):
            words = {"tokens": [row.text[start:end] for start, end in row.words]}
            yield row, words | ({} if row.label is None else {"tags": row.label})
        return
    rows = source.rows("test", [])
    for cells in cells_of_rows(source, path):
        if (row := next(rows, None)) is None:
            raise changed(path)
        yield row, cells
    if next(rows, None) is not None:
        raise changed(path)


def changed(path: Path) -> UserError:
    return UserError(f"the pool {path} was changed while it was read; run the command again")


def cells_of_rows(source: CustomSource, path: Path) -> Iterator[dict[str, Any]]:
    """All cells of each row of a table.

    Raises:
        UserError: a column of the task's texts is missing, or a column has the name of one that the output adds.
    """
    options = source.options
    if KINDS[options.kind].labels_words and suffixes(path)[0] != ".csv":
        texts = word_columns(path, options.text, options.label, may_lack_labels=True).texts
    else:
        texts = tuple(name for name in (options.text or TEXT, options.pair) if name is not None)
    for where, cells in whole_rows(path, texts):
        for name in texts:
            if name not in cells:
                raise UserError(
                    f"{where} has no column {brief(name)}, in which the task has its texts; {nearest(name, cells)}; "
                    "rename the column of the pool"
                )
        for name in (SCORE, REASON):
            if name in cells:
                raise UserError(f"{where} has a column {brief(name)}, which select adds; rename it in the pool")
        yield cells


def labelled_keys(task: Task, split: str) -> np.ndarray:
    """uint64, the hashes of the texts of a split that have a label: all but those of test without one."""
    rows = task.source.rows(split, [])
    found = (
        key(row.text, row.pair, task.symmetric)
        for row in rows
        if not split.startswith("test") or row.label not in (None, "")
    )
    return np.fromiter(found, np.uint64)


def labelled_examples(task: Task, most: int, seed: int) -> list[Example]:
    """Distinct texts of train without their labels, in the order of their hashes; of more than `most` a hashed
    sample."""
    keys = np.unique(labelled_keys(task, "train"))
    wanted = set(keys[np.argsort(order_of(keys, seed, "labelled"))[:most]].tolist())
    found = {}
    for row in task.source.rows("train", []):
        if (one := key(row.text, row.pair, task.symmetric)) in wanted:
            found.setdefault(one, Example(len(found), row.text, row.pair, None, row.words))
    return [found[one] for one in sorted(found)]


def random_rows(pool: Pool, count: int, seed: int) -> list[Chosen]:
    """Rows in the order of a hash of (text, seed), which is their score in [0, 1)."""
    rows = np.flatnonzero(pool.usable)
    found = highest(order_of(pool.keys[rows], seed, "random") / 2.0**64, count)
    chosen = zip(rows[found.rows].tolist(), found.values.round(DIGITS).tolist(), strict=True)
    return [Chosen.of(value, pool.keys[row], row, "random") for row, value in chosen]


def key(text: str, pair: str | None, symmetric: bool) -> int:
    """A 64-bit hash of a text or a pair: the same one for texts that differ in white space alone, and, if the task is
    symmetric, for both orders of a pair."""
    texts = [" ".join(one.split()) for one in (text, pair) if one is not None]
    texts = sorted(texts) if symmetric else texts
    return int.from_bytes(hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest(), "little")


def order_of(keys: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """Uniform uint64 numbers that are a function of (key, seed, purpose), distinct for distinct keys: the output
    function of splitmix64."""
    start = hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest()
    x = keys ^ np.uint64(int.from_bytes(start, "little"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
