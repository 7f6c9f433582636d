"""Agreement of two models on the same texts, by which active learning can be stopped."""

import numpy as np

from fastbert.dataset_work.kappa import kappa

ENOUGH = 0.99
"""Kappa over three rounds at which Bloodgood and Vijay-Shanker stop (CoNLL 2009, arXiv 1409.5165)."""


class Agreement:
    """Counts of the pairs of labels that two models predict for the same texts, words, or labels of texts."""

    def __init__(self, labels: int) -> None:
        self.counts = np.zeros((labels, labels), np.int64)

    def add(self, first: np.ndarray, second: np.ndarray) -> None:
        """Adds the predicted ids of both models, int64 [...]."""
        labels = len(self.counts)
        pairs = np.ravel(first) * labels + np.ravel(second)
        self.counts += np.bincount(pairs, minlength=labels**2).reshape(labels, labels)

    @property
    def fraction(self) -> float:
        """Fraction of equal predictions."""
        return float(np.trace(self.counts) / self.counts.sum())

    def kappa(self) -> float | None:
        """Cohen's kappa, (fraction - chance) / (1 - chance), chance = sum over labels of the product of both models'
        fractions of the label. None if both predict only one label, the same: it is undefined then."""
        counts = self.counts / self.counts.sum()
        chance = float(counts.sum(0) @ counts.sum(1))
        return kappa(self.fraction, chance)

    def line(self, previous: str) -> str:
        """The agreement in words, with a hint if it is high."""
        kappa = self.kappa()
        text = f"agreement with {previous}: {self.fraction:.1%} of {self.counts.sum():,} predictions"
        if kappa is None:
            return f"{text}; kappa is undefined, since both models predict a single label"
        hint = f"; if it remains {ENOUGH} or more for three rounds, further labels change little: you can stop"
        return f"{text}, Cohen's kappa {kappa:.3f}{hint if kappa >= ENOUGH else ''}"
