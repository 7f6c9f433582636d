"""Curves of a study from the rows of its finished jobs: score and cost after each round, areas, paired tests."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fastbert.finetuning.continual.tuner import Cost
from fastbert.studies.engine.store import ResultRow
from fastbert.studies.shared.comparison import ModelComparison, adjusted, mean_of_splits
from fastbert.studies.shared.statistics import paired


@dataclass(frozen=True)
class Point:
    """A learner after a round, with one seed. Costs are sums over the rounds so far."""

    labels: int
    score: float
    """First metric on dev, the mean over its splits."""
    training: float
    """Cost without the query, in gradients of an example."""
    total: float
    """Cost with the query."""
    seconds_training: float
    seconds_total: float


Chain = list[Point]
"""The points of one learner and one seed, all rounds."""


def score_of(row: ResultRow) -> float:
    return mean_of_splits(row["dev"], row["metrics"][0])


@dataclass(frozen=True)
class Curves:
    """Results of the learners, of which the first is the baseline."""

    learners: Sequence[str]
    rounds: Sequence[int]
    chains: dict[str, dict[int, Chain]]
    """Learner -> seed -> its points; only seeds that have finished all rounds."""
    final: dict[str, dict[int, float]]
    """Learner -> seed -> score of the model that was trained anew on its labels of the last round."""
    metric: str

    @classmethod
    def of(
        cls, rows: Sequence[ResultRow], finals: Sequence[ResultRow], learners: Sequence[str], rounds: Sequence[int]
    ) -> "Curves":
        """The curves from the rows of finished rounds and final trainings."""
        found: dict[str, dict[int, list[ResultRow]]] = {name: {} for name in learners}
        for row in rows:
            found[row["model"]].setdefault(row["seed"], []).append(row)
        chains = {
            name: {seed: points_of(each) for seed, each in seeds.items() if len(each) == len(rounds)}
            for name, seeds in found.items()
        }
        final: dict[str, dict[int, float]] = {name: {} for name in learners}
        for row in finals:
            final[row["model"]][row["seed"]] = score_of(row)
        return cls(learners, rounds, chains, final, rows[0]["metrics"][0] if rows else "")

    @property
    def finished(self) -> list[str]:
        """Learners that have finished all rounds with a seed."""
        return [name for name in self.learners if self.chains[name]]

    def values(self, learner: str, name: str) -> list[list[float]]:
        """Attribute `name` of the points of a learner: round -> a value for each seed."""
        chains = [self.chains[learner][seed] for seed in sorted(self.chains[learner])]
        return [[getattr(point, name) for point in points] for points in zip(*chains, strict=True)]

    def means(self, learner: str, name: str) -> list[float]:
        """Attribute `name` after each round, the mean over the seeds."""
        return [statistics.fmean(values) for values in self.values(learner, name)]

    @cached_property
    def areas(self) -> dict[str, dict[int, float]]:
        """Learner -> seed -> `area` of its scores over the numbers of labels."""
        return {
            name: {seed: area(self.rounds, [point.score for point in points]) for seed, points in chains.items()}
            for name, chains in self.chains.items()
        }

    @cached_property
    def compared(self) -> list[ModelComparison]:
        """The areas of the other learners compared with those of the first one, over the seeds of both; p-values are
        adjusted over the learners."""
        first, results = self.learners[0], {}
        for other in self.learners[1:]:
            if seeds := sorted(self.areas[first].keys() & self.areas[other].keys()):
                results[other] = paired(
                    [self.areas[first][seed] for seed in seeds], [self.areas[other][seed] for seed in seeds]
                )
        p = adjusted(results)
        return [ModelComparison(first, other, result, *p[other]) for other, result in results.items()]

    def cost_to_reach(self, learner: str, score: float) -> tuple[int, float, float] | None:
        """Labels, and cost without and with the query, after the first round whose mean score is at least `score`; None
        if there is none."""
        for index, mean in enumerate(self.means(learner, "score")):
            if mean >= score:
                return self.rounds[index], self.means(learner, "training")[index], self.means(learner, "total")[index]
        return None


def points_of(rows: Sequence[ResultRow]) -> Chain:
    """The points of a chain from the rows of its rounds."""
    points, training, total, seconds, seconds_total = [], 0.0, 0.0, 0.0, 0.0
    for row in sorted(rows, key=lambda row: row["round"]):
        cost = Cost(**row["cost"])
        training, total = training + cost.training(), total + cost.total()
        seconds += row["seconds_training"]
        seconds_total += row["seconds_training"] + row["seconds_query"]
        points.append(Point(row["labels"], score_of(row), training, total, seconds, seconds_total))
    return points


def area(labels: Sequence[int], scores: Sequence[float]) -> float:
    """Area under the scores over the numbers of labels by the trapezoidal rule, divided by the width: the mean score.
    With one round, its score."""
    if len(labels) == 1:
        return scores[0]
    parts = ((b - a) * (x + y) / 2 for a, b, x, y in zip(labels, labels[1:], scores, scores[1:], strict=False))
    return sum(parts) / (labels[-1] - labels[0])
