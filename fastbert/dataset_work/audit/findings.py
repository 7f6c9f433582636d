"""Findings of an audit, from the scores of the folds and the texts: what the report and audit.jsonl contain.

Shapes: N examples, K labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastbert.dataset_work.audit.agreement import read_annotations
from fastbert.dataset_work.audit.confident import likely_wrong, margins, self_confidence
from fastbert.dataset_work.audit.curve import LearningCurve, learning_curve
from fastbert.dataset_work.audit.duplicates import NearPair, groups_of, near_pairs
from fastbert.dataset_work.audit.options import AuditOptions
from fastbert.dataset_work.audit.overlap import Overlap, pretraining_overlap
from fastbert.dataset_work.audit.pool import Pool
from fastbert.dataset_work.audit.train import FoldScores

OUTLIER = 3.0  # robust standard deviations of a residual
NORMAL = 1.4826  # ratio of the standard deviation to the median absolute deviation of a normal distribution
RARE = 0.1  # of the mean number of examples of a label

Folds = Mapping[float, Sequence[FoldScores]]
"""Fraction of the training examples -> the scores of each fold."""


@dataclass(frozen=True)
class Flips:
    """Detection of flipped labels. k is their number; precision at k equals recall at k."""

    count: int
    out_of_fold: float
    """Precision of the k examples with the lowest out-of-fold self-confidence."""
    in_sample: float
    """Precision of the k examples with the largest loss in a model that was trained on them: the mean over the choices
    of that model."""
    random: float
    """Precision of k random examples, k / N."""
    marked: int
    """Number of labels that confident learning marks."""
    marked_precision: float
    marked_recall: float


@dataclass(frozen=True)
class Findings:
    """Everything that was found."""

    scores: np.ndarray
    """float64 [N, ...], the out-of-fold scores."""
    wrong: np.ndarray
    """bool [N], the labels that are likely wrong."""
    ranking: np.ndarray
    """int64 [N], the examples from the most to the least suspicious: by self-confidence, or by the absolute residual of
    a number."""
    figures: list[dict[str, float]]
    """Numbers that rank each example: self_confidence and margin, or residual."""
    copies: list[list[int]]
    """Groups of examples with the same text."""
    near: list[NearPair] | None
    """None if near duplicates were not searched."""
    overlap: Overlap | None
    """None without --pretraining-text."""
    annotations: np.ndarray | None
    """int64 [N, A], label ids of the annotators; None without --annotators."""
    curve: LearningCurve | None
    """None for one fraction."""
    flips: Flips | None
    """None without --flip."""


@dataclass(frozen=True)
class Texts:
    """Findings that need no training."""

    copies: list[list[int]]
    near: list[NearPair] | None
    overlap: Overlap | None
    annotations: np.ndarray | None


def search_texts(pool: Pool, options: AuditOptions) -> Texts:
    """Searches duplicates and overlaps, and reads the annotators' labels.

    Raises:
        UserError: a column of an annotator is missing, or the pretraining text cannot be read.
    """
    names = options.annotator_names()
    annotations = read_annotations(pool, names) if names else None
    near = near_pairs(pool.keys) if options.near_duplicates else None
    overlap = None
    if options.pretraining_text is not None:
        overlap = pretraining_overlap(pool.examples, options.pretraining_text)
    return Texts(groups_of(pool.keys), near, overlap, annotations)


def find(pool: Pool, folds: Folds, texts: Texts, seed: int) -> Findings:
    """Evaluates the scores.

    Args:
        folds: with the fraction 1.
        seed: of the bootstrap of the learning curve.
    """
    scores = out_of_fold(pool, folds[1.0])
    labels = np.asarray(pool.labels)
    if pool.has_classes:
        confidence, difference = self_confidence(scores, labels), margins(scores, labels)
        figures = [
            {"self_confidence": float(a), "margin": float(b)} for a, b in zip(confidence, difference, strict=True)
        ]
        suspicion, wrong = confidence, likely_wrong(scores, labels)
    else:
        residuals = scores - labels
        figures = [{"residual": float(value)} for value in residuals]
        suspicion, wrong = -np.abs(residuals), outliers(residuals)
    curve = None
    if len(folds) > 1:
        ordered = sorted(folds)
        sizes = [float(np.mean([fold.train_examples for fold in folds[fraction]])) for fraction in ordered]
        losses = np.stack([errors_of(pool, out_of_fold(pool, folds[fraction])) for fraction in ordered])
        curve = learning_curve(sizes, losses, pool.folds, seed)
    flips = measure_flips(pool, folds[1.0], suspicion, wrong) if pool.flipped.any() else None
    return Findings(
        scores=scores,
        wrong=wrong,
        ranking=np.argsort(suspicion, kind="stable"),
        figures=figures,
        copies=texts.copies,
        near=texts.near,
        overlap=texts.overlap,
        annotations=texts.annotations,
        curve=curve,
        flips=flips,
    )


def out_of_fold(pool: Pool, folds: Sequence[FoldScores]) -> np.ndarray:
    """The score of each example by the model that was not trained on it, float64 [N, ...]."""
    scores = np.full((len(pool), *pool.task.kind.score_shape()), np.nan)
    for number, fold in enumerate(folds):
        held_out = pool.folds[fold.rows] == number
        scores[fold.rows[held_out]] = fold.scores[held_out]
    if np.isnan(scores).any():
        raise ValueError("the folds do not cover all examples")
    return scores


def errors_of(pool: Pool, scores: np.ndarray) -> np.ndarray:
    """0 or 1 for a class, the squared error of a number, float64 [N]."""
    labels = np.asarray(pool.labels)
    if pool.has_classes:
        return (scores.argmax(axis=1) != labels).astype(float)
    return (scores - labels) ** 2


def outliers(residuals: np.ndarray) -> np.ndarray:
    """Residuals further from their median than `OUTLIER` robust standard deviations, bool [N]."""
    centered = np.abs(residuals - np.median(residuals))
    return centered > OUTLIER * NORMAL * np.median(centered)


def measure_flips(pool: Pool, folds: Sequence[FoldScores], suspicion: np.ndarray, wrong: np.ndarray) -> Flips:
    """Measures how well the flipped labels are detected.

    Args:
        folds: with scores of all examples.
        suspicion: [N], lower for more suspicious labels.
    """
    losses = np.stack([pool.task.kind.score_losses(fold.scores, pool.labels) for fold in folds])  # [folds, N]
    count, every = int(pool.flipped.sum()), np.arange(len(pool))

    def precision(values: np.ndarray) -> float:
        return float(pool.flipped[np.argsort(values, kind="stable")[:count]].mean())

    others = [(pool.folds + shift) % len(folds) for shift in range(1, len(folds))]  # models trained on each example
    hits = int((wrong & pool.flipped).sum())
    return Flips(
        count=count,
        out_of_fold=precision(suspicion),
        in_sample=float(np.mean([precision(-losses[other, every]) for other in others])),
        random=count / len(pool),
        marked=int(wrong.sum()),
        marked_precision=hits / max(1, int(wrong.sum())),
        marked_recall=hits / count,
    )


def rows_of(pool: Pool, truncated: np.ndarray, findings: Findings, most: int = 10) -> list[dict[str, Any]]:
    """The lines of audit.jsonl, in the order of the examples.

    Args:
        truncated: bool [N].
        most: number of duplicates of an example that are named.
    """
    kind = pool.task.kind
    same: dict[int, list[int]] = {row: rows for rows in findings.copies for row in rows}
    near: dict[int, list[tuple[int, float]]] = {}
    for pair in findings.near or ():
        near.setdefault(pair.first, []).append((pair.second, pair.similarity))
        near.setdefault(pair.second, []).append((pair.first, pair.similarity))

    def named(row: int) -> list[Any]:
        return [pool.splits[row], pool.examples[row].index]

    lines = []
    for row, example in enumerate(pool.examples):
        group = same.get(row, [row])
        close = near.get(group[0], [])  # near duplicates are those of the first copy
        lines.append(
            {
                "split": pool.splits[row],
                "index": example.index,
                "label": kind.file_label(example),
                "predicted": kind.prediction(findings.scores[row]),
                **findings.figures[row],
                "likely_wrong": bool(findings.wrong[row]),
                "fold": int(pool.folds[row]),
                "truncated": bool(truncated[row]),
                "duplicates": [named(other) for other in group if other != row][:most],
                "near_duplicates": [[*named(other), round(value, 3)] for other, value in close][:most],
                **({} if findings.overlap is None else {"in_pretraining_text": bool(findings.overlap.found[row])}),
                **({} if findings.flips is None else {"flipped": bool(pool.flipped[row])}),
                "text": example.text,
                **({} if example.pair is None else {"pair": example.pair}),
            }
        )
    return lines
