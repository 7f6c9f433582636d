"""Results of `fastbert affinity`: affinity.json, the probes one by one, and the printed table."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.files import atomic_file
from fastbert.finetuning.affinity.groups import choose_groups
from fastbert.finetuning.affinity.options import AffinityOptions
from fastbert.finetuning.affinity.run import ProbedTuner
from fastbert.finetuning.affinity.setup import AffinitySetup
from fastbert.records import COUNT, json_text, read_sealed, write_sealed

RESULTS, PROBES = "affinity.json", "probes.jsonl"
_MATRIX = [[float]]
_SHAPE = {
    **{"tasks": [str], "model": str, "steps": COUNT, "every": COUNT, "probes": COUNT, "losses": [float]},
    **{"affinity": _MATRIX, "standard_error": [[(float, type(None))]], "first_order": _MATRIX},
    **{"cost": {"training": {str: float}, "probes": {str: float}}},
}


def measured(setup: AffinitySetup, tuner: ProbedTuner) -> dict[str, Any]:
    """The results of a finished run, for JSON: means over the probes, and the cost.

    Costs are gradients of examples; a forward pass alone counts as a third of one.
    """
    table, cost = np.stack([one.affinity for one in tuner.probes]), tuner.cost
    count = len(table)
    error = table.std(axis=0, ddof=1) / math.sqrt(count) if count > 1 else np.full(table.shape[1:], np.nan)
    probes = {"gradients": cost.probed + cost.forwards / 3, "seconds": round(cost.probe_seconds, 2)}
    seconds = round(max(0.0, tuner.progress.seconds - cost.probe_seconds), 2)
    return {
        "tasks": setup.names,
        "model": setup.options.model,
        "steps": setup.options.steps,
        "every": setup.options.every,
        "probes": count,
        "losses": np.mean([one.losses for one in tuner.probes], axis=0).tolist(),
        "affinity": table.mean(axis=0).tolist(),
        "standard_error": error.tolist(),
        "first_order": np.mean([one.first_order for one in tuner.probes], axis=0).tolist(),
        "cost": {"training": {"gradients": cost.trained, "seconds": seconds}, "probes": probes},
    }


def write_probes(path: Path, setup: AffinitySetup, tuner: ProbedTuner) -> None:
    """Writes one line for each probe: step, learning rate, losses and both matrices."""
    with atomic_file(path, "w") as file:
        for number, (rate, one) in enumerate(zip(tuner.rates, tuner.probes, strict=True)):
            matrices = {"affinity": one.affinity.tolist(), "first_order": one.first_order.tolist()}
            row = {"step": number * setup.options.every, "learning_rate": rate, "losses": one.losses.tolist()}
            file.write(json_text({**row, **matrices}) + "\n")


def write_results(path: Path, results: dict[str, Any], options: AffinityOptions) -> dict[str, Any]:
    """Chooses the groups and writes affinity.json; returns its content."""
    names = results["tasks"]
    groups = choose_groups(np.array(results["affinity"]), options.groups, options.allow_alone)
    chosen = {
        "most": options.groups,
        "allow_alone": options.allow_alone,
        "value": groups.value,
        "members": [[names[task] for task in group] for group in groups.members],
        "used_from": dict(zip(names, groups.best, strict=True)),
        "scores": dict(zip(names, groups.scores, strict=True)),
    }
    content = {**results, "groups": chosen}
    write_sealed(path, content)
    return content


def read_measured(path: Path) -> dict[str, Any]:
    """The results in affinity.json, of this or other groups.

    Raises:
        UserError: the file is damaged.
    """
    return read_sealed(path, "the affinities", _SHAPE, "remove it to measure them again")


def scale_of(matrix: Sequence[Sequence[float]]) -> int:
    """The power of ten with which the largest affinity between two tasks has one digit before the point."""
    values = np.abs(np.array(matrix))
    largest = values[~np.eye(len(values), dtype=bool)].max()
    return -math.floor(math.log10(largest)) if largest > 0 else 0


def lines(results: dict[str, Any], out: Path) -> list[str]:
    """The table for standard output."""
    names, power = results["tasks"], scale_of(results["affinity"])
    width = max(map(len, names))
    column = max(width, 12)
    head = f"{results['probes']} probes in {results['steps']:,} steps, {results['model']}"
    found = [
        f"affinity x 1e{power}, with standard errors: {head}",
        f"  {'step on':<{width}}  change of the loss of (positive: lower)",
        f"  {'':<{width}}  {'  '.join(f'{name:>{column}}' for name in names)}",
    ]
    for name, values, errors in zip(names, results["affinity"], results["standard_error"], strict=True):
        cells = (_cell(value, error, power) for value, error in zip(values, errors, strict=True))
        found.append(f"  {name:<{width}}  {'  '.join(f'{cell:>{column}}' for cell in cells)}")
    found.append(
        f"groups (at most {results['groups']['most']}), with the affinity that each task receives x 1e{power}:"
    )
    found += group_lines(results, power)
    training, probes = results["cost"]["training"], results["cost"]["probes"]
    gradients, seconds = probes["gradients"], probes["seconds"]
    found.append(
        f"cost: training {training['gradients']:,.0f} example gradients, {training['seconds']:,.0f} s; probes "
        f"{gradients:,.0f}, {seconds:,.0f} s"
    )
    return [*found, f"  {out / RESULTS}"]


def group_lines(results: dict[str, Any], power: int) -> list[str]:
    """A line for each group. A task in parentheses helps the others and is used from another group."""
    groups = results["groups"]
    found = []
    for index, members in enumerate(groups["members"]):
        cells = [
            f"{name} {groups['scores'][name] * 10.0**power:.2f}" if groups["used_from"][name] == index else f"({name})"
            for name in members
        ]
        found.append(f"  {index + 1}: {', '.join(cells)}")
    return found


def _cell(value: float, error: float | None, power: int) -> str:
    spread = "" if error is None else f" ± {error * 10.0**power:.2f}"
    return f"{round(value * 10.0**power, 2) + 0.0:.2f}{spread}"  # 0.0 instead of -0.0
