"""Queries of active learning: closed forms, exhaustive search on small sets, and ties."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from fastbert.dataset_work.selection.queries import (
    entropy,
    facility_location,
    gaussian_similarity,
    highest,
    k_centre,
    least_confidence,
    margin,
)


def test_uncertainties_have_closed_forms() -> None:
    p = np.array([[0.5, 0.25, 0.25], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0.1, 0.5, 0.4]])
    assert entropy(p) == pytest.approx([1.5 * np.log(2), 0, np.log(3), -(p[3] * np.log(p[3])).sum()], abs=1e-15)
    assert least_confidence(p) == pytest.approx([0.5, 0, 2 / 3, 0.5], abs=1e-15)
    assert margin(p) == pytest.approx([0.75, 0, 1, 0.9], abs=1e-15)
    binary = np.stack([p[:, 0], 1 - p[:, 0]], -1)
    assert margin(binary) == pytest.approx(2 * least_confidence(binary))
    assert entropy(np.stack([p, p])).shape == (2, 4)


def test_equal_values_are_selected_in_the_order_of_their_rows() -> None:
    assert highest([0.5, 0.9, 0.5, 0.9, 0.1], 3).rows.tolist() == [1, 3, 0]
    assert highest([0.5, 0.9], 1).values.tolist() == [0.9]
    same = np.ones((4, 3))
    assert k_centre(same, 3).rows.tolist() == k_centre(same, 3, same[:1]).rows.tolist() == [0, 1, 2]
    assert facility_location(gaussian_similarity(same), 3, np.ones(4)).rows.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="5 rows to select of 4"):
        k_centre(same, 5)


def test_k_centre_selects_the_farthest_rows_first() -> None:
    states = np.array([[0.0], [1], [4], [10]])
    assert k_centre(states, 4).rows.tolist() == [2, 3, 0, 1]  # the mean is 3.75
    assert k_centre(states, 4).values == pytest.approx([0.25, 6, 4, 1])
    assert k_centre(states, 2, np.array([[9.0]])).rows.tolist() == [0, 2]
    assert k_centre(states, 1, np.array([[9.0]])).values == pytest.approx([9])


@given(st.integers(0, 2**32 - 1), st.integers(2, 7), st.integers(1, 3), st.integers(0, 2))
@settings(max_examples=50)
def test_k_centre_is_within_twice_the_optimum(seed: int, n: int, count: int, chosen: int) -> None:
    rng = np.random.default_rng(seed)
    states, given_states = rng.normal(size=(n, 2)), rng.normal(size=(chosen, 2))
    count = min(count, n)

    def radius(rows) -> float:
        return cdist(states, np.concatenate([states[list(rows)], given_states])).min(1).max()

    best = min(radius(rows) for rows in combinations(range(n), count))
    assert radius(k_centre(states, count, given_states).rows) <= 2 * best + 1e-9


def value(similarity: np.ndarray, entropies: np.ndarray, weight: float, rows) -> float:
    """F of a set of rows, as in the paper."""
    rows = list(rows)
    covered = similarity[:, rows].max(1).astype(np.float64).sum() if rows else 0.0
    return covered + weight * np.log(1 + entropies[rows].sum())


@pytest.mark.parametrize("seed", range(30))
def test_lazy_greedy_equals_greedy_and_is_near_the_best_set(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, count, weight = int(rng.integers(6, 11)), int(rng.integers(2, 5)), float(rng.choice([0.5, 1, 5]))
    similarity = gaussian_similarity(rng.normal(size=(n, 3)), width=float(rng.choice([0.3, 1, 3])))
    if seed % 2:  # without the ties of two rows that are near each other and far from all others
        weight, similarity = 0.0, rng.uniform(size=(n, n)) ** 2
        similarity = np.maximum(similarity, similarity.T)
    entropies = rng.uniform(0, 2, n)
    found = facility_location(similarity, count, entropies, weight)
    greedy: list[int] = []
    for _ in range(count):
        rest = [row for row in range(n) if row not in greedy]
        greedy.append(max(rest, key=lambda row: value(similarity, entropies, weight, [*greedy, row])))
    assert found.rows.tolist() == greedy
    reached = value(similarity, entropies, weight, greedy)
    assert found.values.sum() == pytest.approx(reached, rel=1e-6)
    best = max(value(similarity, entropies, weight, rows) for rows in combinations(range(n), count))
    assert (1 - 1 / np.e) * best <= reached <= best + 1e-9


def test_the_weight_of_the_entropies_changes_the_selection() -> None:
    """Two groups of rows: similarities alone select one row of each, a large weight the two most uncertain rows."""
    similarity = gaussian_similarity(np.array([[0.0], [0.1], [5.0], [5.1]]), width=1.0)
    entropies = np.array([9.0, 8, 0, 0.1])
    assert facility_location(similarity, 2, entropies, 0.0).rows.tolist() == [1, 2]
    assert facility_location(similarity, 2, entropies, 100.0).rows.tolist() == [0, 1]


def test_similarity_is_a_gaussian_of_the_distance() -> None:
    states = np.random.default_rng(0).normal(size=(40, 5))
    expected = np.exp(-(cdist(states, states) ** 2) / (2 * 0.7**2))
    assert np.abs(gaussian_similarity(states, 0.7) - expected).max() < 1e-6
    median = np.median(cdist(states, states)[np.triu_indices(40, 1)])
    assert np.abs(gaussian_similarity(states) - np.exp(-(cdist(states, states) ** 2) / (2 * median**2))).max() < 1e-6
