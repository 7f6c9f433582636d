"""Worth of weak labels: the number of gold labels that give the same result on dev, from the learning curve."""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastbert.errors import UserError, plural
from fastbert.finetuning.results import read_results

Curve = Sequence[tuple[int, float]]
"""Number of gold labels and value, for increasing numbers."""


def print_worth(gold: Path, weak: Path) -> None:
    """Prints the worth of the weak labels.

    Args:
        gold: --out of a fine-tuning on gold labels, with several fractions of the training split.
        weak: --out of a fine-tuning on weak labels, measured on the same dev split.

    Raises:
        UserError: results are missing, have different metrics, or there is only one fraction.
    """
    curves, found = read_results(gold), read_results(weak)
    metric = curves["metrics"][0]
    if found["metrics"][0] != metric:
        raise UserError(f"{gold} is measured by {metric} and {weak} by {found['metrics'][0]}; give the same metrics")
    parts = sorted(curves["fractions"], key=lambda part: part["fraction"])
    if len(parts) < 2:
        raise UserError(f"{gold} has one fraction of the gold labels; train it with --train-fraction 0.01,0.1,1.0")
    sizes = [size_of(part, gold) for part in parts]
    by_seed: dict[int, list[tuple[int, float]]] = {}
    for size, part in zip(sizes, parts, strict=True):
        for seed in part["seeds"]:
            by_seed.setdefault(seed["seed"], []).append((size, value_of(seed, metric)))
    mean = [
        (size, statistics.fmean(value_of(seed, metric) for seed in part["seeds"]))
        for size, part in zip(sizes, parts, strict=True)
    ]
    values = [value_of(seed, metric) for seed in max(found["fractions"], key=lambda part: part["fraction"])["seeds"]]
    complete = [curve for curve in by_seed.values() if len(curve) == len(sizes)]
    each = sorted(worth(curve, value) for curve in complete for value in values)
    whole = worth(mean, statistics.fmean(values))
    print(f"weak labels: {metric} {statistics.fmean(values):.4f} on dev, mean over {plural(len(values), 'seed')}")
    for size, value in mean:
        print(f"  {size:>9,} gold labels: {value:.4f}")
    print(f"these functions are worth {described(whole, sizes)} gold labels")
    if each:
        print(
            f"  over the pairs of seeds: from {described(each[0], sizes)} to {described(each[-1], sizes)} "
            f"({plural(len(values), 'seed')} of the weak labels, {len(complete)} of the gold labels)"
        )


def size_of(part: dict[str, Any], path: Path) -> int:
    if not isinstance(part.get("train_examples"), int) or part["train_examples"] < 1:
        raise UserError(f"{path} does not have the number of training examples; run its fastbert finetune again")
    return part["train_examples"]


def value_of(seed: dict[str, Any], metric: str) -> float:
    """The metric at the best epoch, averaged over the dev splits."""
    return statistics.fmean(split[metric] for split in seed["best"]["dev"].values())


def worth(curve: Curve, value: float) -> float:
    """The smallest number of gold labels at which the curve, linear in the logarithm of the number, reaches `value`;
    0 below its first point, infinity if it does not reach it."""
    if value < curve[0][1]:
        return 0.0
    if value == curve[0][1]:
        return float(curve[0][0])
    for (small, low), (large, high) in pairwise(curve):
        if low <= value <= high and high > low:
            part = (value - low) / (high - low)
            return math.exp(math.log(small) + part * (math.log(large) - math.log(small)))
    return math.inf


def described(number: float, sizes: Sequence[int]) -> str:
    """The number for a message; "more than" and "less than" beyond the curve."""
    if number == 0:
        return f"less than {sizes[0]:,}"
    return f"more than {sizes[-1]:,}" if math.isinf(number) else f"{round(number):,}"
