"""Results of a fine-tuning over its seeds: results.json, a printed table, and a learning curve."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.errors import UserError
from fastbert.figures import panels_below_each_other
from fastbert.files import atomic_file
from fastbert.finetuning.dev_ensemble import Labels, ensemble_figures
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.saved import fine_tuned_folder
from fastbert.finetuning.slice_figures import slice_figures, slice_lines
from fastbert.finetuning.slices import Masks
from fastbert.finetuning.tasks import Task
from fastbert.records import COUNT, check, read_sealed, write_sealed
from fastbert.report.finetune_page import PAGE, best_epoch, other_tasks, write_results_page
from fastbert.streams import echo

Figures = dict[str, dict[str, float | None]]
"""dev split -> metric (or loss) -> value. None for a value that was not finite, which the best epoch never has."""


_NUMBER = (float, type(None))
EPOCH = {"epoch?": COUNT, "dev": {str: {str: _NUMBER}}}
SEED = {"seed": COUNT, "best": EPOCH, "last": EPOCH, "train_examples": COUNT, "truncated": {str: COUNT}}
"""Schema of a seed's result.json, for `check`."""
STATISTICS = ("median", "mean", "std", "max")
_SUMMARY = {str: {str: dict.fromkeys(STATISTICS, _NUMBER)}}
RESULTS = {
    **{"task": str, "metrics": [str], "precision?": str, "together_with?": [str], "target?": str, "after?": [str]},
    "fractions": [
        {
            **{"fraction": float, "seeds": [{"seed": COUNT, "best": EPOCH}], "summary?": {"best": _SUMMARY}},
            "ensemble?": ({str: {str: _NUMBER}}, type(None)),
            "slices?": ({str: {str: dict}}, type(None)),
        }
    ],
}


@dataclass(frozen=True)
class Company:
    """The other tasks that an encoder learned."""

    together_with: Sequence[str] = ()
    """Names of the tasks of the same training."""
    target: str | None = None
    """Task whose best epoch is that of all tasks of the training."""
    after: Sequence[str] = ()
    """Earlier trainings, each described by its tasks."""

    def to_json(self) -> dict[str, Any]:
        """Entries of results.json, without those that are empty."""
        return {name: value if name == "target" else list(value) for name, value in vars(self).items() if value}


ALONE = Company()


def write_results(
    options: FinetuneOptions,
    task: Task,
    precision: str,
    out: Path,
    results: dict[float, list[dict[str, Any]]],
    labels: Labels,
    slices: Masks | None = None,
    company: Company = ALONE,
) -> None:
    """Writes results.json and the learning curve, and prints the table.

    Args:
        results: fraction of the training split -> results of the seeds.
        labels: of the dev splits, for the ensemble of the seeds.
        slices: of the dev splits.
        company: the other tasks that the encoder learned.
    """
    fractions = [
        {
            "fraction": fraction,
            "train_examples": seeds[0]["train_examples"],
            "summary": {epoch: summary([seed[epoch]["dev"] for seed in seeds]) for epoch in ("best", "last")},
            "ensemble": ensemble_figures(task, labels, [seed_folder(out, fraction, seed["seed"]) for seed in seeds]),
            **(
                {"slices": slice_figures(task, slices, labels, [seed_folder(out, fraction, s["seed"]) for s in seeds])}
                if slices and any(slices.values())
                else {}
            ),
            "seeds": seeds,
        }
        for fraction, seeds in results.items()
    ]
    record = {
        "task": task.name,
        **company.to_json(),
        "model": options.start,
        "metrics": list(task.metrics),
        "learning_rate": options.learning_rate,
        "batch_size": options.batch_size,
        "epochs": options.epochs,
        "precision": precision,
        "fractions": fractions,
    }
    write_sealed(out / "results.json", record)
    largest = max(results)
    metrics = {seed["seed"]: seed_folder(out, largest, seed["seed"]) / "metrics.jsonl" for seed in results[largest]}
    write_results_page(out, record, metrics, options)
    plural = "s" if options.seeds > 1 else ""
    name = task.name + other_tasks(record)
    lines = [f"{name}, {options.start}: dev at {best_epoch(record)}, over {options.seeds} seed{plural}"]
    several = options.seeds > 1
    columns = " ".join(f"{name:>8}" for name in (*STATISTICS, *(["ensemble"] if several else [])))
    lines.append(f"  {'train':>8}  {'split':<14} {'metric':<18} {columns}")
    for part in fractions:
        for split, metrics in part["summary"]["best"].items():
            for name in task.metrics:
                values = [metrics[name][key] for key in STATISTICS]
                values += [part["ensemble"] and part["ensemble"][split][name]] if several else []
                cells = " ".join(map(cell, values))
                lines.append(f"  {part['train_examples']:>8}  {split:<14} {name:<18} {cells}")
    lines += fitted_lines(fractions[-1]["seeds"])
    lines += label_table(fractions[-1]["seeds"])
    if figures := fractions[-1].get("slices"):
        lines += slice_lines(figures, task.metrics[0])
    truncated = results[max(results)][0]["truncated"]
    if any(truncated.values()):
        cut = ", ".join(f"{count} of {split}" for split, count in truncated.items() if count)
        lines.append(f"  cut to {options.max_length} tokens: {cut}")
    if len(fractions) > 1:
        plot = learning_curve(out / "learning_curve.png", task, options.start, fractions)
        lines += [f"  {plot}"] if plot else []
    print("\n".join([*lines, f"  {out / 'results.json'}", f"  {out / PAGE}"]))


def fitted_lines(seeds: list[dict[str, Any]]) -> list[str]:
    """Lines with the metrics at the best epoch with thresholds fitted to the same dev split, medians over the seeds;
    empty if the kind has none."""
    lines = []
    for split, metrics in seeds[0].get("fitted_to_dev", {}).items():
        values = {name: [seed["fitted_to_dev"][split][name] for seed in seeds] for name in metrics}
        figures = "  ".join(f"{name} {statistics.median(each):.4f}" for name, each in values.items())
        lines.append(f"  with thresholds fitted to {split} itself (optimistic): {figures}")
    return lines


def label_table(seeds: list[dict[str, Any]]) -> list[str]:
    """Lines with the figures of each label at the best epoch, medians over the seeds; empty if the kind has none."""
    lines = []
    for split, table in seeds[0].get("by_label", {}).items():
        width = max(14, *(len(name) for name in table))
        lines.append(f"  {split + ', by label':<{width}} {'precision':>10} {'recall':>10} {'f1':>10} {'support':>10}")
        for name in table:
            rows = [seed["by_label"][split][name] for seed in seeds]
            cells = [statistics.median(row[key] for row in rows) for key in ("precision", "recall", "f1")]
            figures = " ".join(f"{value:>10.4f}" for value in cells)
            lines.append(f"  {name:<{width}} {figures} {rows[0]['support']:>10.0f}")
    return lines


def read_results(out: Path) -> dict[str, Any]:
    """Reads results.json in `out`.

    Raises:
        UserError: it is missing or damaged.
    """
    fix = (
        "run fastbert finetune again with the same --out, which rewrites the file without training finished seeds again"
    )
    results = read_sealed(out / "results.json", "the results of fastbert finetune", RESULTS, fix)
    where = f"the results of fastbert finetune {out / 'results.json'}"
    try:
        if not results["fractions"] or not all(part["seeds"] for part in results["fractions"]):
            raise UserError(f"{where} is damaged: it holds no seeds")
        for part in results["fractions"]:
            for seed in part["seeds"]:
                check_best(seed, results["metrics"], f"{where}, seed {seed['seed']},")
    except UserError as error:
        raise UserError(f"{error}; {fix}") from None
    return results


def check_best(result: dict[str, Any], metrics: Sequence[str], where: str) -> None:
    """Raises a UserError if the best epoch in a seed's result lacks one of the task's metrics on dev."""
    if not metrics or not result["best"]["dev"]:
        raise UserError(f"{where} is damaged: it holds no metrics on dev")
    for split, figures in result["best"]["dev"].items():
        check(figures, dict.fromkeys(metrics, float), where, f"best.dev.{split}")


def finished(folder: Path, metrics: Sequence[str]) -> dict[str, Any] | None:
    """The result of a finished seed of a task with `metrics`; None if it is not finished.

    Raises:
        UserError: it is damaged.
    """
    path = folder / "result.json"
    if not path.is_file():
        return None
    fix = f"remove {folder} to train the seed again"
    result = read_sealed(path, "the seed's result", SEED, fix)
    try:
        check_best(result, metrics, f"the seed's result {path}")
    except UserError as error:
        raise UserError(f"{error}; {fix}") from None
    return result


def seed_folder(out: Path, fraction: float, seed: int) -> Path:
    return (out if fraction == 1.0 else out / f"fraction-{fraction}") / f"seed-{seed}"


def tuned_folder(path: Path) -> Path:
    """`path`, or the best seed in it if it is the --out of a fine-tuning."""
    return best_seed(path) if fine_tuned_folder(path) is None and (path / "results.json").is_file() else path


def best_seed(out: Path) -> Path:
    """Folder of the seed whose best epoch has the highest value on dev of the task's first metric, averaged over its
    dev splits. Of several fractions of the training split, the largest is used.

    Raises:
        UserError: there are no results, or the model of that seed was not saved.
    """
    results = read_results(out)
    metric = results["metrics"][0]
    part = max(results["fractions"], key=lambda part: part["fraction"])
    values = [statistics.fmean(split[metric] for split in seed["best"]["dev"].values()) for seed in part["seeds"]]
    value = max(values)
    folder = seed_folder(out, part["fraction"], part["seeds"][values.index(value)]["seed"])
    if not (folder / "model").is_dir():
        raise UserError(
            f"{folder} is the best seed of {out} ({metric} {value:.4f}) and its model was not saved; train it again "
            "without --no-save-model, or give another seed"
        )
    return folder


def summary(seeds: list[Figures]) -> dict[str, dict[str, dict[str, float | None]]]:
    """dev split -> metric -> median, mean, sample standard deviation (None for one seed) and maximum over the seeds;
    all None if the value of a seed was not finite."""
    out: dict[str, dict[str, dict[str, float | None]]] = {}
    for split in seeds[0]:
        out[split] = {}
        for name in seeds[0][split]:
            values = [seed[split][name] for seed in seeds]
            out[split][name] = dict.fromkeys(STATISTICS) if None in values else score_summary(values)
    return out


def score_summary(values: Sequence[float]) -> dict[str, float | None]:
    """Median, mean, sample standard deviation (None for one value) and maximum."""
    return {
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "max": max(values),
    }


def cell(value: float | None) -> str:
    return f"{'-':>8}" if value is None else f"{value:>8.4f}"


def learning_curve(path: Path, task: Task, model: str, fractions: list[dict[str, Any]]) -> Path | None:
    """Plots the first metric against the number of training examples: a point for each seed, a line for the median."""
    try:
        figure, (panel,) = panels_below_each_other(6, 4, [1], top=0.35, dpi=150)
    except ImportError:
        echo("matplotlib is not installed: no learning curve is plotted; results.json has the values")
        return None
    metric = task.metrics[0]
    parts = sorted(fractions, key=lambda part: part["train_examples"])
    for index, split in enumerate(parts[0]["summary"]["best"]):
        color = f"C{index}"
        medians = []
        for part in parts:
            size = part["train_examples"]
            values = [seed["best"]["dev"][split][metric] for seed in part["seeds"]]
            panel.plot([size] * len(values), values, "o", color=color, alpha=0.5, markersize=4)
            medians.append((size, statistics.median(values)))
        panel.plot(*zip(*medians, strict=True), "-", color=color, label=f"{split}: each seed, and the median")
    panel.set(xscale="log", xlabel="training examples", ylabel=metric)
    sizes = [part["train_examples"] for part in parts]
    panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
    panel.minorticks_off()
    panel.set_title(f"{task.name}: {model}", loc="left", fontsize=10)
    panel.grid(color="0.9", linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    with atomic_file(path) as file:
        figure.savefig(file, format="png")
    return path
