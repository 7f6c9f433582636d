"""Groups of tasks to train together, chosen from a matrix of affinities.

    score(g, j) = mean over the other members i of g of Z(i -> j)

Choose at most B groups that cover all tasks and maximise the mean over tasks of the score in their best group. A task
may be in several groups. It is used from one of them, its best, and helps the others in the rest.

So a solution divides the tasks into at most B sets, of the tasks that are used from the same group, and the best group
for a set A is the one that contains A and has the largest sum of scores over A. Both maxima are found exactly: the best
group of every set in 3^n operations, the best division by dynamic programming over the sets in B 3^n. That is less work
than branch and bound in the worst case, and the same for all matrices: n = 12 takes about a second.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MOST_TASKS = 12
"""Maximum number of tasks: the time grows as 3^n."""
_TIE = 1e-12
"""Difference of values, relative to the largest affinity, below which they are equal: the error of rounding."""


@dataclass(frozen=True)
class Groups:
    """A solution. Indices are those of the matrix."""

    members: tuple[tuple[int, ...], ...]
    """The tasks of each group, sorted; at most B groups."""
    best: tuple[int, ...]
    """Index of the group from which each task is used."""
    scores: tuple[float, ...]
    """The score of each task in that group; 0 for a task alone."""

    @property
    def value(self) -> float:
        """The mean score."""
        return sum(self.scores) / len(self.scores)


def score(affinity: np.ndarray, group: Sequence[int], task: int) -> float:
    """The mean of Z(i -> task) over the other members of a group; 0 for a task alone, which nothing changes.

    Args:
        affinity: [n, n], Z(i -> j) in row i and column j.
    """
    others = [member for member in group if member != task]
    return float(np.mean(affinity[others, task])) if others else 0.0


def choose_groups(affinity: np.ndarray, most: int, allow_alone: bool = False) -> Groups:
    """The best groups. Of equally good ones: fewer groups, then smaller ones, then those with the earlier tasks.

    Args:
        affinity: float64 [n, n], Z(i -> j) in row i and column j; the diagonal is not used.
        most: maximum number of groups, B.
        allow_alone: also consider groups of one task, whose score is 0.

    Raises:
        ValueError: the matrix is not square or has fewer than 2 or more than `MOST_TASKS` tasks, a value off the
            diagonal is not finite, or `most` is below 1.
    """
    count = len(affinity)
    off = ~np.eye(count, dtype=bool)
    if affinity.shape != (count, count) or not 2 <= count <= MOST_TASKS or most < 1:
        raise ValueError(f"no groups of a matrix of shape {affinity.shape}, at most {most}")
    if not np.isfinite(affinity[off]).all():
        raise ValueError("an affinity is not finite")
    tie = _TIE * float(np.abs(affinity[off]).max())
    values, groups = _best_groups(affinity, 1 if allow_alone else 2, tie)
    sizes = np.array([int(group).bit_count() for group in groups])
    found = {_members(int(groups[part])) for part in _best_division(values, sizes, most, tie)}
    members = tuple(sorted(found))
    # A task that several groups contain is used from its best one; of equal ones, from the first.
    table = [[score(affinity, group, task) if task in group else -np.inf for group in members] for task in range(count)]
    best = [next(index for index, value in enumerate(row) if value >= max(row) - tie) for row in table]
    return Groups(members, tuple(best), tuple(row[index] for row, index in zip(table, best, strict=True)))


def _best_groups(affinity: np.ndarray, smallest: int, tie: float) -> tuple[np.ndarray, np.ndarray]:
    """Finds for each set of tasks the largest sum of scores over the set in one group that contains it, and that group.
    Both are [2^n], with sets and groups as bit masks."""
    count = len(affinity)
    values, groups = np.full(1 << count, -np.inf), np.zeros(1 << count, np.int64)
    for mask in _by_size(mask for mask in range(1, 1 << count) if mask.bit_count() >= smallest):
        members = _members(mask)
        sets, sums = np.zeros(1, np.int64), np.zeros(1)
        for task in members:  # all subsets of the group, and their sums of scores
            sets = np.concatenate([sets, sets | 1 << task])
            sums = np.concatenate([sums, sums + score(affinity, members, task)])
        better = sums > values[sets] + tie
        values[sets[better]], groups[sets[better]] = sums[better], mask
    return values, groups


def _best_division(values: np.ndarray, members: np.ndarray, most: int, tie: float) -> list[int]:
    """The division of all tasks into at most `most` sets with the largest sum of values; sets as bit masks.

    Args:
        values: [2^n], of each set.
        members: [2^n], number of members of the group of each set; of equal divisions, the one with fewer is preferred.
    """
    size, everything = len(values), len(values) - 1
    ranks = np.zeros(size, np.int64)
    ranks[_by_size(range(size))] = np.arange(size)
    # The best division of each set into at most k sets: its value, the first of these sets (0 if k - 1 are as good),
    # and the number of members of all groups.
    totals = np.zeros(size, np.int64)
    best, firsts = np.where(np.arange(size) == 0, 0.0, -np.inf), []
    for _ in range(min(most, everything.bit_count())):
        improved, first, larger = best.copy(), np.zeros(size, np.int64), totals.copy()
        for mask in range(1, size):
            lowest = mask & -mask
            rest = _subsets(mask ^ lowest)  # what remains when a part that has the lowest task is removed
            sums = values[mask ^ rest] + best[rest]
            equal = np.flatnonzero(sums >= sums.max() - tie)
            total = members[mask ^ rest[equal]] + totals[rest[equal]]
            chosen = equal[np.lexsort((ranks[mask ^ rest[equal]], total))[0]]
            if sums[chosen] > best[mask] + tie:
                improved[mask], first[mask], larger[mask] = sums[chosen], mask ^ int(rest[chosen]), total.min()
        best, totals = improved, larger
        firsts.append(first)
    parts, mask = [], everything
    for first in reversed(firsts):
        if mask and first[mask]:
            parts.append(int(first[mask]))
            mask ^= int(first[mask])
    return parts


def _by_size(masks: Iterable[int]) -> list[int]:
    """Sets in the order in which equally good ones are preferred: smaller ones first, then by their tasks."""
    return sorted(masks, key=lambda mask: (mask.bit_count(), _members(mask)))


def _members(mask: int) -> tuple[int, ...]:
    return tuple(task for task in range(mask.bit_length()) if mask >> task & 1)


def _subsets(mask: int) -> np.ndarray:
    """All subsets of a set, including the empty one and itself, int64."""
    sets = np.zeros(1, np.int64)
    for task in _members(mask):
        sets = np.concatenate([sets, sets | 1 << task])
    return sets
