"""`fastbert affinity --train`: fine-tunes the chosen groups and the baselines, and compares them.

Every model is trained for the same number of steps, that of the run that was probed. A setting defines from which model
each task is used:

    single     the task alone
    together   all tasks
    largest    the task and the one with the most training examples; that one alone
    groups     the group that was chosen for it

out/comparison.json has the score of every model, and is written after each training: the same command continues.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastbert import config as configuration
from fastbert.errors import UserError, plural
from fastbert.finetuning.affinity.affinity import affinity
from fastbert.finetuning.affinity.options import AffinityOptions
from fastbert.finetuning.affinity.setup import AffinitySetup
from fastbert.finetuning.affinity.train import train_group
from fastbert.records import COUNT, read_sealed, write_sealed
from fastbert.streams import echo
from fastbert.studies.shared.statistics import Paired, flip_limits, holm, paired
from fastbert.training.interrupts import Interrupts

COMPARISON = "comparison.json"
BASELINES = ("single", "together", "largest")
MEAN = "mean"  # of the scores of all tasks
_SHAPE = {"dev": str, "models": [{"tasks": [str], "seed": COUNT, "scores": {str: float}}]}

Model = tuple[str, ...]
"""The tasks of a model, sorted."""


def affinity_and_comparison(requested: AffinityOptions) -> int:
    """Measures affinities and chooses groups, then compares; returns the exit code."""
    return affinity(requested, compare)


def settings_of(sizes: dict[str, int], groups: dict[str, Any]) -> dict[str, dict[str, Model]]:
    """Setting -> task -> the model from which it is used.

    Args:
        sizes: number of training examples of each task.
        groups: those in affinity.json.
    """
    names = sorted(sizes)
    largest = max(names, key=sizes.__getitem__)
    return {
        "single": {name: (name,) for name in names},
        "together": {name: tuple(names) for name in names},
        "largest": {name: tuple(sorted({name, largest})) for name in names},
        "groups": {name: tuple(groups["members"][groups["used_from"][name]]) for name in names},
    }


def compare(setup: AffinitySetup, content: dict[str, Any], interrupts: Interrupts) -> int:
    """Trains all models that are not in comparison.json, with every seed, and prints the comparison; returns the exit
    code.

    Raises:
        UserError: training diverged; comparison.json is damaged or belongs to other dev splits.
    """
    options, path = setup.options, Path(setup.options.out) / COMPARISON
    sizes = {name: len(examples) for name, examples in zip(setup.names, setup.train, strict=True)}
    settings, data = settings_of(sizes, content["groups"]), digest_of_dev(setup)
    models = sorted({model for each in settings.values() for model in each.values()}, key=lambda m: (len(m), m))
    seeds = list(range(options.seed, options.seed + options.seeds))
    found = read_models(path, data)
    missing = [(model, seed) for seed in seeds for model in models if (model, seed) not in found]
    for number, (model, seed) in enumerate(missing, 1):
        echo(f"model {number} of {len(missing)}: {', '.join(model)}, seed {seed}")
        scores = train_group(setup, model, seed, interrupts)
        if scores is None:
            echo(f"stopped; the same command continues with {path}")
            return interrupts.exit_code
        found[model, seed] = scores
        write_sealed(path, record_of(found, data))
    scores = scores_of(settings, found, seeds)
    write_sealed(path, {**record_of(found, data), **summary(settings, scores, options.steps)})
    print("\n".join([*table(settings, scores, options), f"  {path}"]))
    return 0


def digest_of_dev(setup: AffinitySetup) -> str:
    dev = {f"{name} {split}": inputs for name, splits in setup.dev.items() for split, inputs in splits.items()}
    return configuration.digest(
        {name: [[e.text, e.pair, e.label, e.words] for e in inputs.examples] for name, inputs in dev.items()}
    )


def read_models(path: Path, data: str) -> dict[tuple[Model, int], dict[str, float]]:
    """(Tasks, seed) -> the scores of the models that are already trained."""
    if not path.is_file():
        return {}
    fix = "remove it to train its models again"
    record = read_sealed(path, "the comparison", _SHAPE, fix)
    if record["dev"] != data:
        raise UserError(f"the comparison {path} has scores on other dev splits; {fix}, or choose another --out")
    return {(tuple(one["tasks"]), one["seed"]): one["scores"] for one in record["models"]}


def record_of(found: dict[tuple[Model, int], dict[str, float]], data: str) -> dict[str, Any]:
    models = [{"tasks": list(model), "seed": seed, "scores": scores} for (model, seed), scores in found.items()]
    return {"dev": data, "models": models}


Scores = dict[str, dict[str, list[float]]]
"""Setting -> task, or `MEAN` -> the score of each seed."""


def scores_of(
    settings: dict[str, dict[str, Model]], found: dict[tuple[Model, int], dict[str, float]], seeds: Sequence[int]
) -> Scores:
    scores: Scores = {}
    for setting, uses in settings.items():
        each = {task: [found[model, seed][task] for seed in seeds] for task, model in uses.items()}
        scores[setting] = {**each, MEAN: [statistics.fmean(values) for values in zip(*each.values(), strict=True)]}
    return scores


def differences(scores: Scores) -> dict[str, dict[str, Paired]]:
    """Baseline -> task, or `MEAN` -> the paired test of the groups against it, over the seeds."""
    return {
        baseline: {task: paired(scores[baseline][task], values) for task, values in scores["groups"].items()}
        for baseline in BASELINES
    }


def adjusted(tests: dict[str, dict[str, Paired]]) -> dict[str, float]:
    """Baseline -> p of the t-test of the mean score, adjusted over the baselines by Holm; without those of one seed."""
    return holm({name: each[MEAN].p_t for name, each in tests.items() if each[MEAN].p_t is not None})


def summary(settings: dict[str, dict[str, Model]], scores: Scores, steps: int) -> dict[str, Any]:
    tests = differences(scores)
    return {
        "settings": {name: {task: list(model) for task, model in uses.items()} for name, uses in settings.items()},
        "steps": {name: steps * len(set(uses.values())) for name, uses in settings.items()},
        "scores": scores,
        "groups_minus": {name: {task: asdict(test) for task, test in each.items()} for name, each in tests.items()},
        "p_holm": adjusted(tests),
    }


def table(settings: dict[str, dict[str, Model]], scores: Scores, options: AffinityOptions) -> list[str]:
    """The comparison for standard output."""
    names = [*settings["single"], MEAN]
    width = max(map(len, names))
    lines = [
        f"first metric on dev after {options.steps:,} steps of each model, mean and standard deviation over "
        f"{plural(options.seeds, 'seed')}",
        f"  {'':<{width}}  {'  '.join(f'{setting:>16}' for setting in settings)}",
    ]
    for name in names:
        cells = (_cell(scores[setting][name]) for setting in settings)
        lines.append(f"  {name:<{width}}  {'  '.join(f'{cell:>16}' for cell in cells)}")
    counts = (plural(len(set(uses.values())), "model") for uses in settings.values())
    lines.append(f"  {'':<{width}}  {'  '.join(f'{count:>16}' for count in counts)}")
    tests = differences(scores)
    p_values = adjusted(tests)
    lines.append("groups minus a baseline, mean over tasks: difference, 95 % interval, p (t, Holm), p (sign flip)")
    for baseline in BASELINES:
        test = tests[baseline][MEAN]
        interval = "no interval" if test.low is None else f"[{test.low:+.4f}, {test.high:+.4f}]"
        p = f"{p_values[baseline]:.3f}" if baseline in p_values else "-"
        lines.append(f"  {baseline:<9} {test.mean:+.4f}  {interval}  {p}  {test.p_flip:.3f}")
    if limits := flip_limits([options.seeds]):
        lines.append(limits)
    return lines


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"
