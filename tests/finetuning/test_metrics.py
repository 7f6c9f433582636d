"""Metrics compared with scikit-learn, SciPy, formulas and counts by hand, and errors for undefined metrics."""

import itertools
import math
import warnings

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastbert.errors import UserError
from fastbert.finetuning.dev_scores import selection_value
from fastbert.finetuning.kinds.classes import Classes
from fastbert.finetuning.kinds.number import Number
from fastbert.finetuning.metrics import METRICS
from fastbert.finetuning.tasks import Task

NUMBER = st.floats(-100, 100, allow_nan=False, width=32)
FEW = st.sampled_from([-1.0, 0.0, 0.5, 2.0])  # ties


def task(*metrics: str, labels: tuple[str, ...] = ("0", "1"), kind: str = "classes") -> Task:
    made = Classes(labels) if kind == "classes" else Number()
    return Task("made", made, False, metrics, False, {}, source=None)


def pairs_of(first: st.SearchStrategy, second: st.SearchStrategy) -> st.SearchStrategy:
    pairs = st.lists(st.tuples(first, second), min_size=2, max_size=30)
    return pairs.map(lambda rows: tuple(np.array(column) for column in zip(*rows, strict=True)))


@settings(max_examples=50)
@given(pairs_of(st.integers(0, 1), st.integers(0, 1)))
def test_two_classes_against_the_counts(rows: tuple[np.ndarray, np.ndarray]) -> None:
    predictions, labels = rows
    tp, tn = int(((predictions == 1) & (labels == 1)).sum()), int(((predictions == 0) & (labels == 0)).sum())
    fp, fn = int(((predictions == 1) & (labels == 0)).sum()), int(((predictions == 0) & (labels == 1)).sum())
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert METRICS["accuracy"](*rows) == pytest.approx((tp + tn) / len(labels))
        assert METRICS["f1"](*rows) == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp else 0.0)
        matthews = METRICS["matthews"](*rows)
    assert matthews == pytest.approx((tp * tn - fp * fn) / math.sqrt(product) if product else 0.0)


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(max_examples=50)
@given(pairs_of(st.integers(0, 3), st.integers(0, 3)))
def test_more_classes_against_scikit_learn(rows: tuple[np.ndarray, np.ndarray]) -> None:
    predictions, labels = rows
    assert METRICS["accuracy"](*rows) == sklearn.metrics.accuracy_score(labels, predictions)
    assert METRICS["matthews"](*rows) == pytest.approx(sklearn.metrics.matthews_corrcoef(labels, predictions))
    scores = []
    for label in set(labels.tolist()) | set(predictions.tolist()):
        hits = int(((labels == label) & (predictions == label)).sum())
        scores.append(2 * hits / (int((labels == label).sum()) + int((predictions == label).sum())))
    assert METRICS["macro_f1"](*rows) == pytest.approx(sum(scores) / len(scores))


@settings(max_examples=50)
@given(st.one_of(pairs_of(NUMBER, NUMBER), pairs_of(FEW, FEW)))
def test_correlations_against_scipy(rows: tuple[np.ndarray, np.ndarray]) -> None:
    predictions, labels = rows
    assume(predictions.std() > 1e-3 and labels.std() > 1e-3)
    assert METRICS["pearson"](*rows) == pytest.approx(np.corrcoef(predictions, labels)[0, 1], abs=1e-9)
    assert METRICS["pearson"](*rows) == scipy.stats.pearsonr(predictions, labels).statistic
    ranks = [scipy.stats.rankdata(column) for column in rows]
    assert METRICS["spearman"](*rows) == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)
    assert METRICS["spearman"](*rows) == scipy.stats.spearmanr(predictions, labels).statistic


@pytest.mark.parametrize("metric", ["pearson", "spearman", "matthews"])
@pytest.mark.parametrize("which", [0, 1])
def test_correlations_with_a_constant_are_zero(metric: str, which: int) -> None:
    rows = [np.array([0, 1, 1, 0]), np.array([0, 1, 1, 0])]
    rows[which] = np.ones(4, dtype=int)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert METRICS[metric](*rows) == 0.0
        assert METRICS[metric](rows[which][:1], rows[which][:1]) == 0.0


def ordered_right(scores: np.ndarray, labels: np.ndarray) -> float:
    right = [
        0.5 + 0.5 * np.sign((scores[i] - scores[j]) * (labels[i] - labels[j]))
        for i, j in itertools.combinations(range(len(labels)), 2)
        if labels[i] != labels[j]
    ]
    return sum(right) / len(right)


@settings(max_examples=50)
@given(st.one_of(pairs_of(FEW, FEW), pairs_of(st.integers(-9, 9), st.integers(-9, 9)), pairs_of(FEW, NUMBER)))
def test_pairwise_accuracy_against_all_pairs(rows: tuple[np.ndarray, np.ndarray]) -> None:
    assume(len(set(rows[1].tolist())) > 1)
    assert METRICS["pairwise_accuracy"](*rows) == pytest.approx(ordered_right(*rows), abs=1e-12)


@settings(max_examples=50)
@given(pairs_of(FEW, st.integers(0, 1)))
def test_auc_is_pairwise_accuracy_of_two_labels(rows: tuple[np.ndarray, np.ndarray]) -> None:
    assume(len(set(rows[1].tolist())) > 1)
    assert METRICS["auc"](*rows) == pytest.approx(ordered_right(*rows), abs=1e-12)


def test_perfect_and_reversed_orders() -> None:
    values = np.random.default_rng(0).normal(size=2000)
    assert METRICS["pairwise_accuracy"](values, values) == pytest.approx(1.0, abs=1e-12)
    assert METRICS["pairwise_accuracy"](-values, values) == pytest.approx(0.0, abs=1e-12)
    assert METRICS["pairwise_accuracy"](np.zeros(2000), values) == 0.5


@pytest.mark.parametrize(("metric", "start"), [("auc", "AUC needs"), ("pairwise_accuracy", "pairwise accuracy needs")])
def test_no_ranking_of_a_single_label(metric: str, start: str) -> None:
    with pytest.raises(UserError, match=f"{start} examples .* all 3 have the same; give more"):
        task(metric).measure(np.eye(2)[[0, 1, 0]], [1, 1, 1])


def test_compute_reads_labels_or_scores_as_each_metric_does() -> None:
    scores, labels = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.5], [1.0, 0.0]]), [0, 1, 1, 0]
    found = task("accuracy", "f1", "matthews", "auc", "pairwise_accuracy").measure(scores, labels)
    chosen = [0, 1, 0, 0]
    assert list(found) == ["accuracy", "f1", "matthews", "auc", "pairwise_accuracy"]
    assert found["accuracy"] == 0.75 and found["f1"] == pytest.approx(2 / 3)
    assert found["matthews"] == pytest.approx(sklearn.metrics.matthews_corrcoef(labels, chosen))
    assert found["auc"] == found["pairwise_accuracy"] == 1.0  # 3 and -0.5 stand above -1 and -1
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert task("auc", "accuracy").measure(probabilities, labels) == {"auc": 1.0, "accuracy": 0.75}
    numbers = np.array([0.0, 1.0, 3.0])
    assert task("pearson", kind="number").measure(numbers, [0.0, 2.0, 6.0])["pearson"] == pytest.approx(1.0)


def test_whether_labels_can_be_scored_is_known_before_there_are_scores() -> None:
    task("auc", "accuracy", labels=("a", "b")).check_scorable([0, 1])
    task("accuracy", "matthews", labels=("a", "b", "c")).check_scorable([2, 2])
    task("pearson", "pairwise_accuracy", kind="number").check_scorable([0.5, 7.0])
    for made, labels in (
        (task("accuracy", "auc"), [1, 1]),
        (task("pearson", "pairwise_accuracy", kind="number"), [0.5, 0.5]),
    ):
        with pytest.raises(UserError):
            made.check_scorable(labels)


def test_splits_that_cannot_be_scored() -> None:
    with pytest.raises(UserError, match="2 of 3 examples have no label, so they can be predicted but not scored"):
        task("accuracy").measure(np.zeros((3, 2)), [None, 1, None])
    with pytest.raises(UserError, match="there is no example to score"):
        task("accuracy").measure(np.zeros((0, 2)), [])
    with pytest.raises(UserError, match="not finite, training diverged; lower the learning rate"):
        task("accuracy").measure(np.array([[0.0, np.nan]]), [1])
    with pytest.raises(ValueError, match="shape"):
        task("accuracy").measure(np.zeros((3, 3)), [0, 1, 0])


@pytest.mark.parametrize(
    ("metrics", "labels", "kind", "message"),
    [
        ((), ("0", "1"), "classes", "a task needs a metric; name one of: accuracy"),
        (("acuracy",), ("0", "1"), "classes", "unknown metric 'acuracy'; did you mean 'accuracy'"),
        (("pearson",), ("0", "1"), "classes", "pearson does not fit labels that are classes; give one of: accuracy"),
        (("accuracy",), (), "number", "accuracy does not fit labels that are numbers; give one of: pearson"),
        (("f1",), ("a", "b", "c"), "classes", "f1 is for two labels, and there are 3; give one of: accuracy, macro_f1"),
        (("auc",), ("a", "b", "c"), "classes", "auc is for two labels"),
        (("pairwise_accuracy",), ("a", "b", "c"), "classes", "pairwise_accuracy is for two labels"),
    ],
)
def test_unsuitable_metrics(metrics: tuple, labels: tuple, kind: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        task(*metrics, labels=labels, kind=kind)


def test_the_first_metric_and_the_mean_over_dev_splits_choose_the_best_epoch() -> None:
    figures = {"dev_matched": {"f1": 0.5, "accuracy": 0.9}, "dev_mismatched": {"f1": 0.2, "accuracy": 0.7}}
    assert selection_value(task("f1", "accuracy"), figures) == pytest.approx(0.35)
    assert selection_value(task("accuracy", "f1"), figures) == pytest.approx(0.8)
