"""Writes tables and a figure of quality over minutes and FLOPs, and the fraction of the cost at which one contestant
reaches the final quality of another.

    python scripts/ten_to_one/quality_report.py --measured measured.jsonl --speed speed.json --target tuned \\
        --out report --contestant tuned RUN RUN --contestant all RUN RUN ...

The runs of a contestant are its seeds and, with a constant learning rate, the annealed branches. All have the speed of
its first run that was timed. --fine-tuned NAME FILE FILE... adds the scores of fine_tune.py for the contestant's seeds.
--out receives rows.json, tables.md and quality.png.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure_checkpoints import options_of, read_rows

from fastbert.data.shards import open_dataset
from fastbert.data.stages import make_plan
from fastbert.errors import UserError
from fastbert.figures import panels_below_each_other
from fastbert.files import atomic_file
from fastbert.objectives import OBJECTIVES
from fastbert.records import read_json, write_json
from fastbert.training.optimizers import optimizer_flops

MEASURES = {"loss": "masked loss (nats)", "pairs": "minimal pairs right (%)"}
LOWER_IS_BETTER = {"loss": True, "pairs": False}


@dataclass(frozen=True)
class Point:
    """One checkpoint."""

    minutes: float
    flops: float
    seed: int
    values: dict[str, float]


def costs_of(run: Path, speed: dict[str, list[float]], data: Path) -> Callable[[int], tuple[float, float]]:
    """Function of a number of steps: minutes and FLOPs of a run until then. FLOPs are those of the closed form of
    fastbert's loop and of Muon, also for transformers, whose model computes logits and the last block at all
    positions."""
    options, dataset = options_of(run), open_dataset(data)
    config = options.encoder.resolve(dataset.vocab_size, options.length)
    objective = OBJECTIVES[options.objective](config, options.of_objective.resolve(config), dataset.wordpiece)
    update = optimizer_flops(objective.named_parameters(), options.optimizer)
    plan = make_plan(options.stages, options.batch_size, options.length, options.steps)
    if missing := [length for length in plan.lengths if str(length) not in speed]:
        raise UserError(f"{run} has sequences of {missing[0]} tokens, which were not timed")

    def costs(steps: int) -> tuple[float, float]:
        ms = plan.total(lambda _, length: statistics.median(speed[str(length)]), 0, steps)
        return ms / 60_000, float(plan.total(objective.flops, 0, steps) + update * steps)

    return costs


def points_of(
    runs: Sequence[Path], measured: Sequence[dict[str, Any]], speed: dict[str, list[float]], data: Path
) -> list[Point]:
    """The measured checkpoints of a contestant's runs, in the order of their cost."""
    found = []
    for run in runs:
        rows = [row for row in measured if row["run"] == str(run)]
        if not rows:
            raise UserError(f"{run} is not among the measured runs")
        costs, seed = costs_of(run, speed, data), options_of(run).seed
        for row in rows:
            values = {"loss": row["loss"], "pairs": 100 * row["pairs"]}
            found.append(Point(*costs(row["step"]), seed, values))
    return sorted(found, key=lambda point: point.minutes)


def mean_curve(points: Sequence[Point], cost: Callable[[Point], float], measure: str) -> list[tuple[float, float]]:
    """Cost and mean over the seeds of a measure, in the order of the cost."""
    groups: dict[float, list[float]] = {}
    for point in points:
        groups.setdefault(round(cost(point), 6), []).append(point.values[measure])
    return [(x, statistics.mean(values)) for x, values in sorted(groups.items())]


def cost_to_reach(curve: Sequence[tuple[float, float]], target: float, lower: bool) -> tuple[float, bool] | None:
    """Cost at which a curve first reaches `target`, between two checkpoints by the logarithm of the cost; True if its
    first checkpoint is already there, so that the cost is at most that. None if it never is."""
    sign = -1 if lower else 1
    before = None
    for cost, value in curve:
        if sign * (value - target) >= 0:
            if before is None:
                return cost, True
            part = (target - before[1]) / (value - before[1])
            return math.exp(np.interp(part, [0, 1], np.log([before[0], cost]))), False
        before = cost, value
    return None


def tables(contestants: dict[str, list[Point]], speeds: dict[str, dict[str, list[float]]], target: str) -> str:
    lines = ["| contestant | seeds | length: ms per step (min to max) | minutes | masked loss | minimal pairs |"]
    lines.append("|---|---:|---|---:|---:|---:|")
    for name, points in contestants.items():
        last = [point for point in points if point.minutes >= 0.999 * points[-1].minutes]
        figures = [format_seeds([point.values[measure] for point in last], measure) for measure in MEASURES]
        speed = "; ".join(f"{length}: {format_rounds(rounds)}" for length, rounds in speeds[name].items())
        lines.append(f"| {name} | {len(last)} | {speed} | {last[0].minutes:.1f} | {' | '.join(figures)} |")
    lines += ["", "| contestant | measure | final value of " + target + " | of its minutes | of its FLOPs |"]
    lines.append("|---|---|---:|---:|---:|")
    for name, points in contestants.items():
        for measure, label in MEASURES.items():
            cells = fractions(points, contestants[target], measure)
            goal = mean_curve(contestants[target], lambda point: point.minutes, measure)[-1][1]
            lines.append(f"| {name} | {label} | {goal:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def fine_tuned_table(scores: dict[str, list[dict[str, list[float]]]]) -> str:
    """Means over the fine-tunings of each pretraining seed, and the range of all of them."""
    tasks = list(dict.fromkeys(task for files in scores.values() for file in files for task in file))
    lines = [f"| contestant | {' | '.join(tasks)} |", "|---|" + "---:|" * len(tasks)]
    for name, files in scores.items():
        cells = []
        for task in tasks:
            seeds = [file[task] for file in files if task in file]
            means = ", ".join(f"{statistics.mean(seed):.1f}" for seed in seeds)
            values = [value for seed in seeds for value in seed]
            cells.append(f"{means} ({min(values):.1f} to {max(values):.1f})" if values else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def format_rounds(rounds: Sequence[float]) -> str:
    return f"{statistics.median(rounds):.1f} ({min(rounds):.1f} to {max(rounds):.1f})"


def format_seeds(values: Sequence[float], measure: str) -> str:
    digits = 3 if measure == "loss" else 1
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({', '.join(f'{value:.{digits}f}' for value in values)})"


def fractions(points: Sequence[Point], target: Sequence[Point], measure: str) -> list[str]:
    """Percentages of the target's minutes and FLOPs at which the points reach its final value."""
    cells = []
    for cost in (lambda point: point.minutes, lambda point: point.flops):
        whole, goal = mean_curve(target, cost, measure)[-1]
        found = cost_to_reach(mean_curve(points, cost, measure), goal, LOWER_IS_BETTER[measure])
        if found is None:
            cells.append("not reached")
        else:
            cells.append(f"{'at most ' if found[1] else ''}{found[0] / whole:.1%}")
    return cells


def plot(contestants: dict[str, list[Point]], entropy: float, path: Path) -> None:
    figure, panels = panels_below_each_other(7.5, 7.0, (1, 1), 0.3, dpi=120)
    for axes, (measure, label) in zip(panels, MEASURES.items(), strict=True):
        for number, (name, points) in enumerate(contestants.items()):
            color = f"C{number}"
            axes.plot(*zip(*mean_curve(points, lambda point: point.minutes, measure), strict=True), color=color)
            x, y = [point.minutes for point in points], [point.values[measure] for point in points]
            axes.plot(x, y, "o", color=color, markersize=4, label=name)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[0].axhline(entropy, color="gray", linestyle="--", linewidth=1)
    panels[0].annotate("frequencies of words alone", (1, entropy), xycoords=("axes fraction", "data"), ha="right")
    panels[-1].set_xscale("log")
    panels[-1].set_xlabel("minutes of two CPU cores")
    panels[0].legend(fontsize=8)
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, nargs="+", required=True, help="files of measure_checkpoints.py")
    parser.add_argument("--speed", type=Path, required=True, help="file of time_steps.py")
    parser.add_argument("--data", type=Path, required=True, help="prepared text of the runs")
    parser.add_argument("--contestant", nargs="+", action="append", required=True, metavar="NAME RUN...")
    parser.add_argument("--fine-tuned", nargs="+", action="append", default=[], metavar="NAME FILE...")
    parser.add_argument("--target", required=True, help="the contestant whose final quality is to be reached")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    try:
        measured = [row for path in arguments.measured for row in read_rows(path)]
        timed = read_json(arguments.speed, "the speeds")["milliseconds"]
        contestants, speeds = {}, {}
        for name, *runs in arguments.contestant:
            speeds[name] = next((timed[run] for run in runs if run in timed), None)
            if speeds[name] is None:
                raise UserError(f"no run of {name} is in {arguments.speed}")
            contestants[name] = points_of(list(map(Path, runs)), measured, speeds[name], arguments.data)
        if arguments.target not in contestants:
            raise UserError(f"--target {arguments.target} is none of the contestants")
        arguments.out.mkdir(parents=True, exist_ok=True)
        rows = {name: [vars(point) for point in points] for name, points in contestants.items()}
        write_json(arguments.out / "rows.json", {"speeds": speeds, "points": rows})
        scores = {name: [read_json(Path(file), "scores") for file in files] for name, *files in arguments.fine_tuned}
        text = tables(contestants, speeds, arguments.target)
        with atomic_file(arguments.out / "tables.md") as file:
            file.write((f"{text}\n{fine_tuned_table(scores)}" if scores else text).encode())
        entropy = open_dataset(arguments.data).record["splits"]["validation"]["unigram_entropy"]
        plot(contestants, entropy, arguments.out / "quality.png")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
