"""Label models: probabilities of the labels from the votes of labelling functions.

Shapes: N examples, M functions, K labels. Votes are label ids, `ABSTAIN` for none. All models assume that a function
has one accuracy, with its errors uniform over the other labels, and that its abstentions do not depend on the label.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from fastbert.errors import UserError

ABSTAIN = -1
MODELS = ("majority", "em", "triplets")
"""Names of the label models, in the order in which `best` prefers them at equal accuracy."""
START = 0.7  # accuracy of every function before the first round of EM, as in MeTaL
ROUNDS = 1000
TOLERANCE = 1e-7  # change of accuracies and balance in the last round of EM
SURE = 0.999  # maximum estimated accuracy, so that no function overrules all others
LEAST_PRODUCT = 1e-3  # triplets that divide by a smaller |M_jk| are left out: the quotient would be noise


@dataclass(frozen=True)
class LabelModel:
    """A fitted model."""

    name: str
    balance: np.ndarray
    """[K], the fraction of each label."""
    accuracies: np.ndarray | None = None
    """[M], the probability that a vote is correct; None for majority."""

    def probabilities(self, votes: np.ndarray) -> np.ndarray:
        """Probabilities of the labels, float64 [N, K].

        - majority: the balance, restricted to the labels with the most votes;
        - otherwise P(y | votes) ~ balance_y * prod_j (a_j if vote_j = y else (1 - a_j) / (K - 1)), over the functions
          that vote.

        Args:
            votes: [N, M].
        """
        labels = len(self.balance)
        counts = np.stack([(votes == label).sum(axis=1) for label in range(labels)], axis=1)
        if self.accuracies is None:
            # A label without any training vote has an estimated fraction of 0, and may have all votes of an example.
            weights = (counts == counts.max(axis=1, keepdims=True)) * np.maximum(self.balance, np.finfo(float).tiny)
            return weights / weights.sum(axis=1, keepdims=True)
        logs = np.log(np.maximum(self.balance, np.finfo(float).tiny)) + log_likelihoods(votes, self.accuracies, labels)
        weights = np.exp(logs - logs.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)


def log_likelihoods(votes: np.ndarray, accuracies: np.ndarray, labels: int) -> np.ndarray:
    """log P(votes | label) without the probability of voting at all, [N, K]."""
    right, wrong = np.log(accuracies), np.log((1 - accuracies) / (labels - 1))
    cast = (votes != ABSTAIN) @ wrong
    return np.stack([cast + (votes == label) @ (right - wrong) for label in range(labels)], axis=1)


def hard_labels(probabilities: np.ndarray) -> np.ndarray:
    """The most likely label, int64 [N]; `ABSTAIN` where several are equally likely."""
    top = probabilities.max(axis=1, keepdims=True)
    tied = (np.abs(probabilities - top) < 1e-9).sum(axis=1) > 1
    return np.where(tied, ABSTAIN, probabilities.argmax(axis=1))


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of correct labels; an example with K equally likely labels, one of them the correct one, counts 1/K.

    Args:
        probabilities: [N, K].
        labels: int64 [N].
    """
    top = np.abs(probabilities - probabilities.max(axis=1, keepdims=True)) < 1e-9
    return float((top[np.arange(len(labels)), labels] / top.sum(axis=1)).mean())


def fit(name: str, votes: np.ndarray, labels: int, balance: np.ndarray | None, names: Sequence[str] = ()) -> LabelModel:
    """Fits the label model `name` to the votes [N, M].

    Args:
        labels: K.
        balance: [K]; None estimates it: by EM together with the accuracies, by majority from the votes of the
            functions, each label with the same prior, by triplets with one more round of EM.
        names: of the functions, for errors.

    Raises:
        UserError: the model cannot be fitted to these functions.
    """
    if name == "majority":
        return fit_majority(votes, labels, balance)
    return fit_em(votes, labels, balance) if name == "em" else fit_triplets(votes, labels, balance, names)


def fit_majority(votes: np.ndarray, labels: int, balance: np.ndarray | None) -> LabelModel:
    uniform = np.full(labels, 1 / labels)
    if balance is None:
        voted = votes[(votes != ABSTAIN).any(axis=1)]
        shown = LabelModel("majority", uniform).probabilities(voted)
        balance = shown.mean(axis=0) if len(shown) else uniform
    return LabelModel("majority", balance)


def fit_em(votes: np.ndarray, labels: int, balance: np.ndarray | None) -> LabelModel:
    """Fits accuracies, and the balance if it is None, by EM (Dawid and Skene 1979, with one accuracy a function): the
    E step is `LabelModel.probabilities`; the M step sets a_j to the mean probability of the labels that function j
    votes for, with one correct and one wrong pseudo-vote."""
    patterns, counts = np.unique(votes, axis=0, return_counts=True)
    voted = (patterns != ABSTAIN).any(axis=1)
    patterns, counts = patterns[voted], counts[voted]
    cast = patterns != ABSTAIN
    model = LabelModel(
        "em", np.full(labels, 1 / labels) if balance is None else balance, np.full(votes.shape[1], START)
    )
    for _ in range(ROUNDS):
        posterior = model.probabilities(patterns)  # [patterns, K]
        padded = np.concatenate([posterior, np.zeros((len(patterns), 1))], axis=1)  # column -1 for abstentions
        right = np.take_along_axis(padded, patterns, axis=1)  # [patterns, M]
        accuracies = (counts @ right + 1) / (counts @ cast + 2)
        new = counts @ posterior / counts.sum() if balance is None and len(counts) else model.balance
        change = max(np.abs(accuracies - model.accuracies).max(), np.abs(new - model.balance).max())
        model = LabelModel("em", new, np.clip(accuracies, 1 - SURE, SURE))
        if change < TOLERANCE:
            break
    return model


def fit_triplets(votes: np.ndarray, labels: int, balance: np.ndarray | None, names: Sequence[str] = ()) -> LabelModel:
    """Accuracies in closed form for two labels (Fu et al. 2020): with votes of +1 and -1, a_i = E[vote_i y] =
    2 P(correct) - 1 of independent functions satisfies M_ij = E[vote_i vote_j] = a_i a_j, so
    |a_i| = sqrt(|M_ij M_ik / M_jk|), the median over the pairs (j, k). Functions are assumed to be better than chance,
    which fixes the sign.

    Raises:
        UserError: there are more than two labels, or a function has no triplet that vote together.
    """
    if labels != 2:
        raise UserError(f"triplets is for two labels, and there are {labels}; combine with majority or em")
    if votes.shape[1] < 3:
        raise UserError("triplets needs three or more functions; combine with majority or em")
    signs = np.where(votes == ABSTAIN, 0.0, 2.0 * votes - 1)  # [N, M]
    together = (signs != 0).T.astype(float) @ (signs != 0)
    moments = np.divide(signs.T @ signs, together, out=np.zeros_like(together), where=together > 0)  # [M, M]
    found = []
    for i in range(votes.shape[1]):
        others = [j for j in range(votes.shape[1]) if j != i]
        squares = [
            abs(moments[i, j] * moments[i, k] / moments[j, k])
            for j, k in combinations(others, 2)
            if min(together[i, j], together[i, k]) and abs(moments[j, k]) > LEAST_PRODUCT
        ]
        if not squares:
            function = names[i] if names else i + 1
            raise UserError(
                f"triplets: function {function} votes together with no two others that agree; combine with majority "
                "or em"
            )
        found.append(min(np.sqrt(np.median(squares)), 2 * SURE - 1))
    accuracies = (1 + np.array(found)) / 2
    if balance is None:
        balance = balance_at(votes, accuracies)
    return LabelModel("triplets", balance, accuracies)


def balance_at(votes: np.ndarray, accuracies: np.ndarray) -> np.ndarray:
    """The balance [2] of two labels with the highest likelihood at these accuracies, by EM over the balance alone."""
    patterns, counts = np.unique(votes[(votes != ABSTAIN).any(axis=1)], axis=0, return_counts=True)
    balance = np.full(2, 0.5)
    for _ in range(ROUNDS if len(counts) else 0):
        new = counts @ LabelModel("triplets", balance, accuracies).probabilities(patterns) / counts.sum()
        if np.abs(new - balance).max() < TOLERANCE:
            return new
        balance = new
    return balance
