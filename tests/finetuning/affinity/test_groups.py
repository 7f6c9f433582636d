"""Groups of tasks: the exact choice, compared with every choice and with planted solutions."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.finetuning.affinity.groups import choose_groups, score


def table_of(affinity: np.ndarray, smallest: int) -> np.ndarray:
    """The score of each task in each group, -inf for tasks outside: [groups, n]."""
    count = len(affinity)
    sizes = range(smallest, count + 1)
    inside = np.array([[t in g for t in range(count)] for k in sizes for g in itertools.combinations(range(count), k)])
    without_own = affinity * (1 - np.eye(count))
    sums = inside.astype(float) @ without_own
    return np.where(inside, sums / np.maximum(inside.sum(1, keepdims=True) - 1, 1), -np.inf)


def brute_force(affinity: np.ndarray, most: int, smallest: int) -> float:
    """The largest mean score of all choices of up to `most` groups."""
    table, best = table_of(affinity, smallest), -np.inf
    for count in range(1, most):
        for chosen in itertools.combinations(range(len(table)), count - 1):
            # one group and one more of all, at once
            base = table[list(chosen)].max(0, initial=-np.inf)
            best = max(best, np.maximum(base, table).mean(1).max())
    for chosen in itertools.combinations(range(len(table)), most - 1):
        base = table[list(chosen)].max(0, initial=-np.inf)
        best = max(best, np.maximum(base, table).mean(1).max())
    return best


def check(found, affinity: np.ndarray, most: int, smallest: int) -> None:
    """The groups are allowed, and their scores are those of the definition."""
    assert len(found.members) <= most and min(map(len, found.members)) >= smallest
    assert {task for group in found.members for task in group} == set(range(len(affinity)))
    for task, (index, value) in enumerate(zip(found.best, found.scores, strict=True)):
        of_groups = [score(affinity, group, task) for group in found.members if task in group]
        assert task in found.members[index]
        assert score(affinity, found.members[index], task) == value == pytest.approx(max(of_groups), abs=1e-9)


@settings(max_examples=60)
@given(st.integers(2, 5), st.integers(1, 3), st.booleans(), st.integers(0, 2**32), st.floats(-1, 1))
def test_no_choice_of_groups_is_better(count: int, most: int, alone: bool, seed: int, shift: float) -> None:
    affinity = np.random.default_rng(seed).normal(shift, 1.0, (count, count))
    found = choose_groups(affinity, most, alone)
    check(found, affinity, most, 1 if alone else 2)
    assert found.value == pytest.approx(brute_force(affinity, most, 1 if alone else 2), abs=1e-12)


@pytest.mark.parametrize(("count", "most"), [(6, 4), (8, 3), (12, 2)])
def test_larger_numbers_equal_brute_force(count: int, most: int) -> None:
    affinity = np.random.default_rng(count).normal(size=(count, count))
    assert choose_groups(affinity, most).value == pytest.approx(brute_force(affinity, most, 2), abs=1e-12)


def test_twelve_tasks_equal_branch_and_bound() -> None:
    """HiGHS solves the choice as an integer program: x_g = 1 if the group is chosen, y_gt = 1 if task t is used from
    it. Task 0 helps all others, the rest is near four groups of three, so that it ends in seconds."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    count, most = 12, 4
    rng = np.random.default_rng(1)
    affinity = rng.normal(size=(count, count)) + 6.0 * np.kron(np.eye(4), np.ones((3, 3)))
    affinity[0] += 6.0
    table = table_of(affinity, 2)
    group, task = np.nonzero(np.isfinite(table))
    groups, uses = len(table), len(group)
    cost = np.concatenate([np.zeros(groups), -table[group, task]])
    once = coo_array((np.ones(uses), (task, groups + np.arange(uses))), shape=(count, groups + uses))
    pairs = np.arange(uses)
    chosen = coo_array(
        (np.repeat([1.0, -1.0], uses), (np.tile(pairs, 2), np.concatenate([groups + pairs, group]))),
        shape=(uses, groups + uses),
    )
    few = coo_array((np.ones(groups), (np.zeros(groups, int), np.arange(groups))), shape=(1, groups + uses))
    constraints = [LinearConstraint(once, 1, 1), LinearConstraint(chosen, -np.inf, 0), LinearConstraint(few, 0, most)]
    integral = np.concatenate([np.ones(groups), np.zeros(uses)])
    solved = milp(cost, constraints=constraints, bounds=Bounds(0, 1), integrality=integral)
    assert solved.success
    found = choose_groups(affinity, most)
    check(found, affinity, most, 2)
    assert found.value == pytest.approx(-solved.fun / count, abs=1e-9)
    assert sum(map(len, found.members)) > count  # groups overlap


def test_the_direction_counts() -> None:
    """A step on 0 helps all others, so all groups have it. In the transpose all others help 0, most of them 1, and the
    rest is indifferent."""
    affinity = np.full((4, 4), -1.0)
    affinity[0, 1:] = [5.0, 3.0, 1.0]
    forward, backward = choose_groups(affinity, 3), choose_groups(affinity.T, 2)
    assert forward.members == ((0, 1), (0, 2), (0, 3)) and forward.scores == (-1.0, 5.0, 3.0, 1.0)
    assert backward.members == ((0, 1), (2, 3)) and backward.scores == (5.0, -1.0, -1.0, -1.0)


def test_a_task_helps_in_several_groups_and_is_used_from_its_best() -> None:
    affinity = np.array([[0.0, 2.0, 2.0], [3.0, 0.0, -9.0], [1.0, -9.0, 0.0]])
    found = choose_groups(affinity, 2)
    assert found.members == ((0, 1), (0, 2)) and found.best == (0, 0, 1) and found.scores == (3.0, 2.0, 2.0)


def test_alone_only_when_allowed() -> None:
    harmful = np.array([[0.0, 1.0, -4.0], [1.0, 0.0, -2.0], [-3.0, -3.0, 0.0]])
    assert choose_groups(harmful, 2, allow_alone=True).members == ((0, 1), (2,))
    together = choose_groups(harmful, 2)
    assert together.members == ((0, 1), (1, 2)) and together.scores == (1.0, 1.0, -2.0)
    assert choose_groups(-np.ones((3, 3)), 3, allow_alone=True).members == ((0,), (1,), (2,))


def test_ties_are_resolved_by_fewer_and_smaller_groups_and_the_order() -> None:
    assert choose_groups(np.ones((4, 4)), 4).members == ((0, 1, 2, 3),)
    cliques = np.kron(np.eye(2), np.ones((2, 2)))
    assert choose_groups(cliques, 4).members == ((0, 1), (2, 3))
    pairs = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]], float)  # 0, 1 with 2 or 3
    assert choose_groups(pairs, 2).members == ((0, 2), (1, 3))
    noise = 1e-16 * np.random.default_rng(0).normal(size=(4, 4))
    assert choose_groups(pairs + noise, 2).members == ((0, 2), (1, 3))


@pytest.mark.parametrize(
    ("affinity", "most"),
    [
        (np.ones((1, 1)), 1),
        (np.ones((13, 13)), 2),
        (np.ones((2, 3)), 1),
        (np.ones((3, 3)), 0),
        (np.full((2, 2), np.nan), 1),
    ],
)
def test_impossible_choices_are_errors(affinity, most) -> None:
    with pytest.raises(ValueError):
        choose_groups(affinity, most)
