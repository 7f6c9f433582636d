"""Agreement of annotators: Cohen's kappa of two, Fleiss' kappa of all, and the examples on which they disagree.

kappa = (p_o - p_e) / (1 - p_e), with the observed agreement p_o and the agreement by chance p_e. Shapes: N examples, A
annotators, K labels. Annotations are label ids [N, A], `NONE` where an annotator has none.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from fastbert.data.columns import Columns
from fastbert.data.tables import read_rows
from fastbert.dataset_work.audit.pool import Pool
from fastbert.dataset_work.kappa import kappa
from fastbert.errors import UserError
from fastbert.finetuning.custom import TEXT, CustomSource
from fastbert.finetuning.rows import Row

NONE = -1


def read_annotations(pool: Pool, columns: Sequence[str]) -> np.ndarray:
    """The annotations of all examples, int64 [N, A].

    Raises:
        UserError: the task is not one of classes, a column is missing, or a cell is not a label of the task.
    """
    task = pool.task
    if not pool.has_classes or not isinstance(task.source, CustomSource):
        raise UserError(f"--annotators is for custom tasks of kind classes, and {task.name} is none; leave it out")
    text = task.source.options.text or TEXT
    wanted = Columns((text,), others=tuple(columns), remedy="name the annotators' columns with --annotators")
    found = []
    for split in dict.fromkeys(pool.splits):
        for _, where, (_, *cells) in read_rows(task.source.paths[split], wanted):
            found.append(
                [read_cell(pool, f"{where}, column {name!r}", cell) for name, cell in zip(columns, cells, strict=True)]
            )
    return np.array(found)


def read_cell(pool: Pool, where: str, cell: object) -> int:
    """The label id in a cell; `NONE` if it is empty."""
    label = pool.task.kind.read(Row(where, "", None, cell))
    return NONE if label is None else label


def cohen_kappa(first: np.ndarray, second: np.ndarray) -> float | None:
    """Cohen's kappa of two annotators over the examples that both have labelled; None if there are none, or if both
    give all of them the same label.

    Args:
        first, second: int64 [N].
    """
    both = (first != NONE) & (second != NONE)
    a, b = first[both], second[both]
    if not len(a):
        return None
    count = int(max(a.max(), b.max())) + 1
    expected = float((np.bincount(a, minlength=count) * np.bincount(b, minlength=count)).sum()) / len(a) ** 2
    return kappa(float((a == b).mean()), expected)


def fleiss_kappa(annotations: np.ndarray, labels: int) -> float | None:
    """Fleiss' kappa over the examples that all annotators have labelled; None if it is undefined, as in
    `cohen_kappa`."""
    rated = annotations[(annotations != NONE).all(axis=1)]
    if not len(rated):
        return None
    counts = np.stack([(rated == label).sum(axis=1) for label in range(labels)], axis=1)  # [N, K]
    raters = rated.shape[1]
    observed = ((counts**2).sum(axis=1) - raters) / (raters * (raters - 1))
    return kappa(float(observed.mean()), float(((counts.sum(axis=0) / counts.sum()) ** 2).sum()))


def pairs_of(names: Sequence[str], annotations: np.ndarray) -> Iterator[tuple[str, str, int, float, float | None]]:
    """Names of each pair of annotators, the number of examples that both have labelled, the fraction with the same
    label, and Cohen's kappa."""
    for i, j in combinations(range(len(names)), 2):
        a, b = annotations[:, i], annotations[:, j]
        both = (a != NONE) & (b != NONE)
        same = float((a == b)[both].mean()) if both.any() else 0.0
        yield names[i], names[j], int(both.sum()), same, cohen_kappa(a, b)


def disagreements(annotations: np.ndarray) -> np.ndarray:
    """Indices of the examples with two or more different annotations, those with the most first."""
    different = np.array([len(set(row[row != NONE].tolist())) for row in annotations])
    rows = np.flatnonzero(different > 1)
    return rows[np.argsort(-different[rows], kind="stable")]
