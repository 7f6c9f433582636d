"""Label models, compared with closed forms and with snorkel's LabelModel."""

from itertools import product

import numpy as np
import pytest

from fastbert.errors import UserError
from fastbert.finetuning.weak.label_models import ABSTAIN, MODELS, LabelModel, accuracy, fit, hard_labels

ACCURACIES = np.array([0.90, 0.65, 0.60, 0.60, 0.55])
SNORKEL = {
    0.5: (0.9026, (0.8691, 0.6619, 0.6076, 0.6049, 0.5568)),
    0.1: (0.9152, (0.8577, 0.6632, 0.6092, 0.6074, 0.5599)),
}
"""Fraction of positive labels -> accuracy and weights of snorkel 0.10 for the votes of `sample` with seed 0:
LabelModel(cardinality=2, verbose=False), fit(votes, class_balance=[1 - p, p], n_epochs=500, seed=0). It changes torch's
global random state, so it is no dependency of the tests."""


def sample(positive: float, count: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < positive).astype(np.int64)
    right = rng.random((count, len(ACCURACIES))) < ACCURACIES
    return np.where(right, labels[:, None], 1 - labels[:, None]), labels


def exact(positive: float) -> tuple[float, float]:
    """Accuracy of majority and of the best rule, over all 32 patterns of votes."""
    majority = best = 0.0
    for pattern in product((0, 1), repeat=5):
        votes = np.array(pattern)
        one = positive * np.prod(np.where(votes, ACCURACIES, 1 - ACCURACIES))
        zero = (1 - positive) * np.prod(np.where(votes, 1 - ACCURACIES, ACCURACIES))
        majority += one if votes.sum() > 2 else zero
        best += max(one, zero)
    return majority, best


@pytest.mark.parametrize("positive", SNORKEL)
def test_models_recover_the_accuracies_of_independent_functions(positive) -> None:
    """The published figures are samples: majority .790, model .9025 of balanced labels; .788 and at least .91 of 10 %
    positive ones. Exactly, majority has .787, and the best rule .900 and .931."""
    votes, labels = sample(positive)
    majority, best = exact(positive)
    assert majority == pytest.approx(0.7869, abs=1e-4) and best == pytest.approx({0.5: 0.9, 0.1: 0.93105}[positive])
    error = 3 * (0.25 / len(labels)) ** 0.5
    balance = np.array([1 - positive, positive])
    assert accuracy(fit("majority", votes, 2, balance).probabilities(votes), labels) == pytest.approx(
        majority, abs=error
    )
    theirs, weights = SNORKEL[positive]
    for name in ("em", "triplets"):
        for given in (balance, None):
            model = fit(name, votes, 2, given)
            assert accuracy(model.probabilities(votes), labels) == pytest.approx(best, abs=error)
            assert accuracy(model.probabilities(votes), labels) >= theirs - 0.001
            assert model.accuracies == pytest.approx(ACCURACIES, abs=0.03)
            assert model.accuracies[1:] == pytest.approx(weights[1:], abs=0.02)
            assert model.balance[1] == pytest.approx(positive, abs=0.02)


def test_copies_of_a_function_are_not_recovered() -> None:
    votes, labels = sample(0.5, 5_000)
    copied = votes[:, [4, 4, 4, 1, 2]]
    for name in MODELS:
        model = fit(name, copied, 2, np.array([0.5, 0.5]))
        assert accuracy(model.probabilities(copied), labels) < 0.58  # of the copy: .55


def test_abstentions_are_missing_votes() -> None:
    """Accuracies are those of the votes that are cast, for three labels as well."""
    rng = np.random.default_rng(0)
    labels, true = rng.integers(0, 3, 20_000), np.array([0.9, 0.7, 0.6, 0.5])
    wrong = (labels[:, None] + rng.integers(1, 3, (20_000, 4))) % 3
    votes = np.where(rng.random((20_000, 4)) < true, labels[:, None], wrong)
    votes[rng.random(votes.shape) < 0.5] = ABSTAIN
    assert fit("em", votes, 3, None).accuracies == pytest.approx(true, abs=0.03)
    with pytest.raises(UserError, match="two labels, and there are 3"):
        fit("triplets", votes, 3, None)
    two = np.where(votes == 2, ABSTAIN, votes)[labels < 2]
    cast = [(column == labels[labels < 2])[column != ABSTAIN].mean() for column in two.T]
    assert fit("triplets", two, 2, None).accuracies == pytest.approx(cast, abs=0.05)


def test_probabilities_are_bayes_rule() -> None:
    model = LabelModel("em", np.array([0.8, 0.2]), np.array([0.9, 0.6]))
    found = model.probabilities(np.array([[1, ABSTAIN], [1, 0], [ABSTAIN, ABSTAIN]]))
    assert found[:, 1] == pytest.approx([0.18 / (0.18 + 0.08), 0.072 / (0.072 + 0.048), 0.2])


def test_the_balance_decides_ties_of_majority() -> None:
    votes = np.array([[0, 1, 1], [0, 1, ABSTAIN], [ABSTAIN] * 3])
    uniform, positive = (LabelModel("majority", np.array(balance)) for balance in ((0.5, 0.5), (0.25, 0.75)))
    assert hard_labels(uniform.probabilities(votes)).tolist() == [1, ABSTAIN, ABSTAIN]
    assert hard_labels(positive.probabilities(votes)).tolist() == [1, 1, 1]
    assert positive.probabilities(votes).tolist() == [[0.0, 1.0], [0.25, 0.75], [0.25, 0.75]]
    assert accuracy(uniform.probabilities(votes), np.array([1, 0, 1])) == pytest.approx(2 / 3)


def test_triplets_needs_three_functions_that_vote_together() -> None:
    votes, _ = sample(0.5, 100)
    with pytest.raises(UserError, match="three or more"):
        fit("triplets", votes[:, :2], 2, None)
    votes[50:, 0] = votes[:50, 1:] = ABSTAIN
    with pytest.raises(UserError, match="function one votes together with no two others"):
        fit("triplets", votes, 2, None, ["one", "two", "three"])


@pytest.mark.parametrize("name", ["majority", "em"])
def test_a_label_without_a_vote_in_train_may_have_all_votes_in_dev(name) -> None:
    model = fit(name, np.array([[0, 0], [0, ABSTAIN]]), 2, None)
    found = model.probabilities(np.array([[1, 1], [0, 1], [0, 0]]))
    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    assert found[1, 0] > 0.999 and found[2, 0] > 0.999
    assert name == "em" or found[0, 1] == 1.0
