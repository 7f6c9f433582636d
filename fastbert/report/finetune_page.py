"""The page of a fine-tuning, report.html in its results folder: metrics over the seeds, epochs, labels and options."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbert.files import atomic_file
from fastbert.report.curves import svg_of
from fastbert.report.page import Table, heading, html_page, paragraph, warning
from fastbert.report.run_page import options_section
from fastbert.report.runs import NOTHING, number
from fastbert.streams import echo
from fastbert.training.logbook import read_metrics

PAGE = "report.html"


def write_results_page(out: Path, results: Mapping[str, Any], metrics: Mapping[int, Path], options: Any) -> None:
    """Writes report.html: one file that opens without a network.

    Args:
        results: content of results.json.
        metrics: seed -> its metrics.jsonl, for the largest fraction of the training split.
        options: the options of the fine-tuning, a dataclass.

    Raises:
        UserError: the file cannot be written.
    """
    largest = max(results["fractions"], key=lambda part: part["fraction"])
    trained = f", trained{others}" if (others := other_tasks(results)) else ""
    body = [
        heading("Results"),
        results_table(results).html(),
        paragraph(
            f"Model `{results['model']}`{trained}. Metrics on dev at {best_epoch(results)}, over the seeds; std is "
            "the sample standard deviation. `last epoch` is the median without the selection of an epoch, which uses "
            "the same dev split. "
            "`ensemble` is the mean of the scores of all seeds, each at its best epoch, as one prediction."
        ),
        heading("Epochs"),
        _curves(results["metrics"][0], metrics),
        heading("Seeds"),
        seeds_table(results).html(),
        *_labels(largest["seeds"]),
        *_slices(largest.get("slices"), results["metrics"]),
        options_section(options),
    ]
    with atomic_file(out / PAGE, "w") as file:
        file.write(html_page(f"Fine-tuning on {results['task']}", "\n".join(body)))


def other_tasks(results: Mapping[str, Any]) -> str:
    """The other tasks that the encoder learned, to follow a noun: " together with a and b, after c"; empty for none."""
    parts = []
    if together := results.get("together_with"):
        parts.append(f" together with {' and '.join(together)}")
    if after := results.get("after"):
        parts.append(f" after {', then '.join(after)}")
    return ",".join(parts)


def best_epoch(results: Mapping[str, Any]) -> str:
    """The epoch of the figures, in words."""
    target = results.get("target", results["task"])
    return "the best epoch" if target == results["task"] else f"the best epoch of {target}"


def results_table(results: Mapping[str, Any]) -> Table:
    """A row for each fraction of the training split, dev split and metric."""
    rows = []
    for part in results["fractions"]:
        best, last, ensemble = part["summary"]["best"], part["summary"]["last"], part["ensemble"]
        for split, metrics in best.items():
            for name in results["metrics"]:
                values = [metrics[name][key] for key in ("median", "mean", "std", "max")]
                values += [ensemble and ensemble[split][name], last[split][name]["median"]]
                rows.append([f"{part['train_examples']:,}", split, name, *map(_text, values)])
    head = ["training examples", "split", "metric", "median", "mean", "std", "max", "ensemble", "last epoch"]
    return Table(head, rows)


def seeds_table(results: Mapping[str, Any]) -> Table:
    """A row for each seed with its metrics at the best epoch."""
    rows = []
    splits = list(results["fractions"][0]["seeds"][0]["best"]["dev"])
    for part in results["fractions"]:
        for seed in part["seeds"]:
            dev = seed["best"]["dev"]
            values = [_text(dev[split][name]) for split in splits for name in results["metrics"]]
            rows.append(
                [str(seed["seed"]), f"{part['train_examples']:,}", str(seed["best"].get("epoch", NOTHING)), *values]
            )
    names = [f"{split}: {name}" if len(splits) > 1 else name for split in splits for name in results["metrics"]]
    return Table(["seed", "training examples", "best epoch", *names], rows)


def _labels(seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    """The figures of each label, medians over the seeds; none if the task has no such figures."""
    out = []
    for split, labels in seeds[0].get("by_label", {}).items():
        rows = []
        for label in labels:
            found = [seed["by_label"][split][label] for seed in seeds]
            medians = [statistics.median(row[key] for row in found) for key in ("precision", "recall", "f1")]
            rows.append([label, *map(_text, medians), f"{found[0]['support']:.0f}"])
        table = Table(["label", "precision", "recall", "F1", "support"], rows)
        out += [heading(f"Labels on {split}, medians over the seeds"), table.html()]
    return out


def _slices(figures: Mapping[str, Any] | None, metrics: Sequence[str]) -> list[str]:
    """The metrics on each slice of dev; none without slices."""
    out = []
    for split, slices in (figures or {}).items():
        rows = []
        for name, one in slices.items():
            cells = []
            for metric in metrics:
                value = one["metrics"][metric]
                low, high = ("low", "high") if value else (None, None)
                cells += [_text(value and value["mean"])]
                cells += [NOTHING if value is None or value[low] is None else f"{value[low]:.4f} to {value[high]:.4f}"]
            rows.append([name, f"{one['examples']:,}", *cells])
        head = ["slice", "examples", *(text for metric in metrics for text in (metric, "95 % interval"))]
        out += [
            heading(f"Slices of {split}, means over the seeds"),
            Table(head, rows).html(),
            paragraph(
                "The intervals are for the choice of the examples: Wilson's for accuracy, otherwise percentiles of a "
                "bootstrap."
            ),
        ]
    return out


def _curves(metric: str, paths: Mapping[int, Path]) -> str:
    """The first metric on dev after each epoch, a line for each seed and dev split."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for seed, path in paths.items():
        for record in read_metrics(path):
            epoch, value = number(record.get("epoch")), number(record.get(metric))
            if epoch is not None and value is not None:
                lines.setdefault(f"seed {seed}, {record['split']}", []).append((epoch, value))
    if not lines:
        return warning("Without curves: metrics.jsonl has no records of epochs.")

    def plot(panels: Sequence[Any]) -> None:
        panels[0].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        for name, points in lines.items():
            panels[0].plot(*zip(*points, strict=True), "o-", markersize=3.5, label=name)

    try:
        return svg_of(plot, [metric], "epoch")
    except ImportError:
        echo("matplotlib is not installed: the page of the fine-tuning has no curves")
        return warning("Without curves: matplotlib is not installed. The values are in metrics.jsonl of each seed.")


def _text(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"
