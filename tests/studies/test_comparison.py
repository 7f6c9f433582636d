"""Which setting is best, which pairs are compared, and when a difference counts."""

import pytest

from fastbert.studies.engine.store import ResultRow
from fastbert.studies.shared.comparison import Comparison, score

TASKS = ("cola", "mnli")


def row(model: str, seed: int, value: float, task: str = "cola", rate: float = 1e-5, **more) -> ResultRow:
    best = {"epoch": 2, "dev": {"dev": {"matthews": value, "loss": 0.7}}}
    last = {"epoch": 3, "dev": {"dev": {"matthews": value - 0.1, "loss": 0.9}}}
    return {
        **{
            "id": f"{model}{task}{rate}{seed}",
            "kind": "finetune",
            "status": "done",
            "model": model,
            "task": task,
            "seed": seed,
        },
        **{"learning_rate": rate, "batch_size": 16, "epochs": 3, "metrics": ["matthews"], "train_examples": 100},
        **{"best": best, "last": last, "seconds": 1.0, "precision": "fp32"},
        **more,
    }


def rows_of(model: str, values: dict[float, list[float]], task: str = "cola") -> list[ResultRow]:
    return [row(model, seed, value, task, rate) for rate, found in values.items() for seed, value in enumerate(found)]


def test_the_score_is_the_first_metric_over_all_dev_splits() -> None:
    dev = {"dev_matched": {"accuracy": 0.6, "f1": 0.1}, "dev_mismatched": {"accuracy": 0.8, "f1": 0.2}}
    found = row("a", 0, 0.0, metrics=["accuracy", "f1"], best={"epoch": 1, "dev": dev})
    assert score(found) == pytest.approx(0.7)
    assert score(row("a", 0, 0.5), "last") == pytest.approx(0.4)


def test_the_best_setting_has_the_highest_median_also_below_zero() -> None:
    values = {1e-5: [-0.3, -0.2, 0.9], 2e-5: [-0.1, -0.05, -0.15], 3e-5: [-0.4, -0.5, -0.6]}
    trials = Comparison(rows_of("a", values), ["a"], TASKS).trials["a", "cola"]
    assert trials.best[0] == 2e-5 and trials.scores(trials.best) == [-0.1, -0.05, -0.15]


def test_a_setting_that_lost_seeds_is_not_the_best() -> None:
    trials = Comparison(rows_of("a", {1e-5: [0.1, 0.2], 2e-5: [0.9]}), ["a"], TASKS).trials["a", "cola"]
    assert trials.best[0] == 1e-5


def test_pairs_are_of_one_setting_and_the_same_seed() -> None:
    """The first is best at 1e-5, the other at 2e-5, both together at 2e-5; seed 2 of the other is missing."""
    first = rows_of("first", {1e-5: [0.50, 0.52, 0.54], 2e-5: [0.40, 0.42, 0.44]})
    other = rows_of("other", {1e-5: [0.20, 0.22, 0.24], 2e-5: [0.58, 0.61, 0.62]})
    (line,) = Comparison(first + other, ["first", "other"], TASKS).compared("other")
    assert line.setting[0] == 2e-5 and line.result.n == 3
    assert line.result.mean == pytest.approx((0.18 + 0.19 + 0.18) / 3)
    shuffled = [*reversed(other), *first]
    assert Comparison(shuffled, ["first", "other"], TASKS).compared("other")[0].result == line.result
    del other[5], first[3]  # seed 2 of the one, seed 0 of the other at 2e-5: 1e-5 has more common seeds
    (line,) = Comparison(first + other, ["first", "other"], TASKS).compared("other")
    assert line.setting[0] == 1e-5 and line.result.mean == pytest.approx(-0.30)
    assert Comparison(first, ["first", "other"], TASKS).compared("other") == []
    far = [found | {"seed": 7} for found in other]
    assert Comparison(first + far, ["first", "other"], TASKS).compared("other") == []


def test_verdicts() -> None:
    """Three seeds and a steady difference: the t-test alone; eight seeds: both; a difference within the spread, or
    without any spread: undecided. With more tasks the same difference may not do."""

    def verdict(a: list[float], b: list[float], others: int = 0) -> str:
        rows = rows_of("a", {1e-5: a}) + rows_of("b", {1e-5: b})
        tasks = ["cola"]
        for number in range(others):
            rows += rows_of("a", {1e-5: [0.1, 0.5, 0.3]}, f"t{number}")
            rows += rows_of("b", {1e-5: [0.4, 0.1, 0.2]}, f"t{number}")
            tasks.append(f"t{number}")
        return Comparison(rows, ["a", "b"], tasks).compared("b")[0].verdict

    assert verdict([0.5, 0.6, 0.7], [0.61, 0.70, 0.80]) == "b higher, by the t-test alone"
    assert verdict([0.61, 0.70, 0.80], [0.5, 0.6, 0.7]) == "a higher, by the t-test alone"
    assert verdict([0.5, 0.6, 0.7], [0.61, 0.70, 0.80], others=80) == "undecided"
    eight = [0.5 + 0.01 * (seed % 3) for seed in range(8)]
    assert verdict(eight, [value + 0.05 + 0.001 * index for index, value in enumerate(eight)]) == "b higher"
    assert verdict([0.5, 0.6, 0.7], [0.55, 0.58, 0.78]) == "undecided"
    assert verdict([0.5, 0.6], [0.7, 0.8]) == "undecided"  # the same difference twice: no spread to judge by
    assert verdict([0.5], [0.9]) == "undecided"
