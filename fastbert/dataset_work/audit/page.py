"""The report of an audit: report.md and report.html."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.dataset_work.audit.agreement import NONE, disagreements, fleiss_kappa, pairs_of
from fastbert.dataset_work.audit.curve import LearningCurve
from fastbert.dataset_work.audit.duplicates import NEAR, with_different_labels
from fastbert.dataset_work.audit.findings import RARE, Findings, Flips
from fastbert.dataset_work.audit.overlap import GRAM
from fastbert.dataset_work.audit.train import AuditSetup
from fastbert.finetuning.kinds.kind import by_class
from fastbert.report.page import Table
from fastbert.report.report_page import ReportPage
from fastbert.report.runs import NOTHING
from fastbert.training.hardware import describe_machine

EXCERPT = 200  # characters of a text in a table
MOST_LABELS = 15  # of a confusion matrix; with more labels, the most frequent confusions are listed


class Report:
    """Sections of the report of one audit."""

    def __init__(self, setup: AuditSetup, findings: Findings, out: Path) -> None:
        self.setup, self.pool, self.findings = setup, setup.pool, findings
        self.top = setup.options.top
        self.page = ReportPage(f"Audit of {self.pool.task.name}", out)

    def write(self) -> None:
        """Writes report.md and report.html."""
        self.overview()
        self.suspicious()
        if self.pool.has_classes:
            self.confusion()
            self.classes()
        self.duplicates()
        self.splits()
        self.truncated()
        if self.findings.annotations is not None:
            self.annotators()
        if self.findings.curve is not None:
            self.learning_curve(self.findings.curve)
        if self.findings.flips is not None:
            self.flips(self.findings.flips)
        options, machine = self.setup.tuning, describe_machine()
        self.page.write(
            {
                "model": f"`{self.setup.pretrained.source}`",
                "training": f"{self.setup.options.folds} folds, {options.epochs} epochs, batches of "
                f"{options.batch_size}, learning rate {options.learning_rate:g}, at most {options.max_length} tokens, "
                f"seed {self.setup.options.seed}; the scores are those of the last epoch",
                "machine": f"{machine['cpu']}, {self.setup.device} {self.setup.precision}",
            }
        )

    # --- sections

    def overview(self) -> None:
        pool, found = self.pool, self.findings
        counts = {split: pool.splits.count(split) for split in dict.fromkeys(pool.splits)}
        sizes = ", ".join(f"{count:,} of {split}" for split, count in counts.items())
        self.page.text(
            f"{len(pool):,} examples ({sizes}), each scored by a model that was trained on the other folds. "
            f"{quality(self.setup, found)} {int(found.wrong.sum()):,} labels ({found.wrong.mean():.1%}) are likely "
            "wrong. Such a list contains hard examples with correct labels too: read them before you change one."
        )

    def suspicious(self) -> None:
        """The labels to read first."""
        self.page.heading("Most suspicious labels")
        names = list(self.findings.figures[0])
        how = (
            "the lowest probability of the given label first; likely wrong by confident learning, as cleanlab's "
            "`prune_by_noise_rate`"
            if self.pool.has_classes
            else "the largest absolute residual first (prediction - label); likely wrong: more than three robust "
            "standard deviations from the median"
        )
        self.page.text(
            f"The {min(self.top, len(self.pool))} most suspicious of all labels, {how}. audit.jsonl has all."
        )
        rows = []
        for number, row in enumerate(self.findings.ranking[: self.top].tolist(), 1):
            figures = [f"{self.findings.figures[row][name]:.3f}" for name in names]
            mark = "yes" if self.findings.wrong[row] else "no"
            predicted = self.setup.pool.task.kind.prediction(self.findings.scores[row])
            labels = [self.label(row), shown(predicted)]
            rows.append([str(number), *self.where(row), *labels, *figures, mark, self.text(row)])
        head = ["#", "split", "index", "label", "predicted", *(name.replace("_", "-") for name in names)]
        self.page.table(Table([*head, "likely wrong", "text"], rows))

    def confusion(self) -> None:
        self.page.heading("Confusion matrix")
        labels, given = self.pool.task.kind.labels, np.asarray(self.pool.labels)
        predicted = self.findings.scores.argmax(axis=1)
        matrix = np.zeros((len(labels), len(labels)), dtype=int)
        np.add.at(matrix, (given, predicted), 1)
        if len(labels) <= MOST_LABELS:
            self.page.text("Given labels in rows, out-of-fold predictions in columns.")
            rows = [[label, *map(str, row)] for label, row in zip(labels, matrix.tolist(), strict=True)]
            self.page.table(Table(["given", *labels], rows))
            return
        self.page.text(f"The most frequent confusions of the {len(labels)} labels.")
        np.fill_diagonal(matrix, 0)
        pairs = np.argsort(-matrix, axis=None, kind="stable")[: self.top].tolist()
        found = [divmod(pair, len(labels)) for pair in pairs]
        rows = [[labels[i], labels[j], str(matrix[i, j])] for i, j in found if matrix[i, j]]
        self.page.table(Table(["given", "predicted", "examples"], rows))

    def classes(self) -> None:
        self.page.heading("Labels")
        labels, given = self.pool.task.kind.labels, np.asarray(self.pool.labels)
        counts = np.bincount(given, minlength=len(labels))
        figures = by_class(self.findings.scores.argmax(axis=1), given, labels)
        rare = rare_labels(counts)
        rows = []
        for number in np.argsort(counts, kind="stable").tolist():
            label, its = labels[number], figures[labels[number]]
            values = [f"{its[name]:.3f}" for name in ("precision", "recall", "f1")]
            wrong = int(self.findings.wrong[given == number].sum())
            rows.append([label, f"{counts[number]:,}", *values, str(wrong), "yes" if rare[number] else "no"])
        self.page.text(
            f"From the rarest to the most frequent. Rare: fewer than {RARE:.0%} of the mean number of examples of a "
            "label."
        )
        self.page.table(Table(["label", "examples", "precision", "recall", "F1", "likely wrong", "rare"], rows))

    def duplicates(self) -> None:
        found, labels = self.findings, self.pool.labels
        self.page.heading("Duplicates")
        copies = with_different_labels(found.copies, labels)
        extra = sum(map(len, found.copies)) - len(found.copies)
        lines = [
            f"{len(found.copies):,} texts occur more than once (not counting case and white space), with {extra:,} "
            f"examples more than needed; {len(copies):,} of these texts have different labels."
        ]
        close = []
        if found.near is None:
            lines.append("Near duplicates were not searched (`--no-near-duplicates`).")
        else:
            close = with_different_labels([(pair.first, pair.second) for pair in found.near], labels)
            lines.append(
                f"{len(found.near):,} pairs of different texts are nearly equal (a similarity of their 5-grams of at "
                f"least {NEAR}); {len(close):,} of these pairs have different labels."
            )
        self.page.points(lines)
        rows = [self.duplicate_row("same text", rows) for rows in copies[: self.top]]
        similar = {(pair.first, pair.second): pair.similarity for pair in found.near or ()}
        rows += [self.duplicate_row(f"{similar[tuple(pair)]:.2f}", pair) for pair in close[: self.top]]
        if rows:
            self.page.text(f"Duplicates with different labels, at most {self.top} of each class:")
            self.page.table(Table(["similarity", "examples", "labels", "text", "other text"], rows))

    def duplicate_row(self, similarity: str, rows: Sequence[int]) -> list[str]:
        named = ", ".join(" ".join(self.where(row)) for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
        labels = ", ".join(self.label(row) for row in rows[:5])
        other = self.text(rows[1]) if similarity != "same text" else NOTHING
        return [similarity, named, labels, self.text(rows[0]), other]

    def splits(self) -> None:
        self.page.heading("Overlap of the splits")
        pool, found = self.pool, self.findings
        dev = [row for row, split in enumerate(pool.splits) if split != "train"]
        train = {pool.keys[row] for row, split in enumerate(pool.splits) if split == "train"}
        lines = []
        if dev:
            same = sum(pool.keys[row] in train for row in dev)
            lines.append(f"{same:,} of the {len(dev):,} examples of dev ({same / len(dev):.1%}) are in train too.")
            if found.near is not None:
                lines.append(f"{len(near_of_dev(self)):,} further ones have a near duplicate in train.")
        else:
            lines.append("The task has no dev split.")
        if found.overlap is not None:
            count, of = int(found.overlap.found.sum()), found.overlap.long_enough
            lines.append(
                f"{count:,} of the {of:,} examples with a text of at least {GRAM} words occur in the pretraining text: "
                f"each of their runs of {GRAM} words does."
            )
        self.page.points(lines)

    def truncated(self) -> None:
        self.page.heading("Truncated texts")
        pool, cut = self.pool, self.setup.truncated
        lines = []
        for split in dict.fromkeys(pool.splits):
            rows = np.array([one == split for one in pool.splits])
            count = int(cut[rows].sum())
            lines.append(f"{split}: {count:,} of {int(rows.sum()):,} examples ({count / rows.sum():.1%})")
        self.page.text(f"Examples with more than {self.setup.tuning.max_length} tokens, of which the end is not read:")
        self.page.points(lines)

    def annotators(self) -> None:
        self.page.heading("Agreement of the annotators")
        names, annotations = self.setup.options.annotator_names(), self.findings.annotations
        rows = [
            [f"{a}, {b}", f"{count:,}", f"{same:.3f}" if count else NOTHING, kappa_text(kappa)]
            for a, b, count, same, kappa in pairs_of(names, annotations)
        ]
        self.page.table(Table(["annotators", "examples", "same label", "Cohen's kappa"], rows))
        whole = int((annotations != NONE).all(axis=1).sum())
        fleiss = kappa_text(fleiss_kappa(annotations, len(self.pool.task.kind.labels)))
        self.page.text(
            f"Fleiss' kappa of all {len(names)} annotators: {fleiss}, over {whole:,} examples that all labelled."
        )
        different, labels = disagreements(annotations), self.pool.task.kind.labels
        self.page.text(f"{len(different):,} examples have different labels; at most {self.top} are listed:")
        rows = []
        for row in different[: self.top].tolist():
            cells = [NOTHING if one == NONE else labels[one] for one in annotations[row].tolist()]
            rows.append([*self.where(row), self.label(row), *cells, self.text(row)])
        if rows:
            self.page.table(Table(["split", "index", "label", *names, "text"], rows))

    def learning_curve(self, curve: LearningCurve) -> None:
        self.page.heading("Learning curve")
        self.page.text(gain_text(self.setup, curve))
        name, scale = measure_name(self.setup)
        rows = []
        for size, error, (low, high) in zip(curve.sizes, curve.errors, curve.intervals, strict=True):
            fitted = NOTHING if curve.law is None else f"{scale * curve.law.at(size):.4g}"
            cells = [f"{size:,.0f}", f"{scale * error:.4g}", f"{scale * low:.4g} to {scale * high:.4g}", fitted]
            rows.append(cells)
        self.page.table(Table(["training examples", name, "95 % interval", "power law"], rows))
        self.page.plot(
            "learning_curve.svg", f"{name} out of fold over training examples", plot_curve, curve, name, scale
        )

    def flips(self, flips: Flips) -> None:
        self.page.heading("Flipped labels")
        self.page.text(
            f"{flips.count:,} labels were flipped by `--flip`. Precision at k = {flips.count:,} is the fraction of the "
            "k most suspicious examples that are flipped; wrong labels of the data itself count as false alarms."
        )
        rows = [
            ["out-of-fold self-confidence", f"{flips.out_of_fold:.3f}"],
            ["in-sample loss of one model", f"{flips.in_sample:.3f}"],
            ["random", f"{flips.random:.3f}"],
        ]
        self.page.table(Table(["ranking", "precision at k"], rows))
        self.page.text(
            f"Confident learning marks {flips.marked:,} labels: precision {flips.marked_precision:.3f}, recall "
            f"{flips.marked_recall:.3f}."
        )

    # --- cells

    def where(self, row: int) -> list[str]:
        return [self.pool.splits[row], str(self.pool.examples[row].index)]

    def label(self, row: int) -> str:
        return shown(self.pool.task.kind.file_label(self.pool.examples[row]))

    def text(self, row: int) -> str:
        example = self.pool.examples[row]
        parts = [example.text, *([] if example.pair is None else [example.pair])]
        return " / ".join(shortened(" ".join(part.split())) for part in parts)


def near_of_dev(report: Report) -> set[str]:
    """Texts of dev that are not in train, but have a near duplicate there."""
    pool = report.pool
    splits: dict[str, set[bool]] = {}
    for key, split in zip(pool.keys, pool.splits, strict=True):
        splits.setdefault(key, set()).add(split == "train")
    found = set()
    for pair in report.findings.near:
        for one, other in ((pair.first, pair.second), (pair.second, pair.first)):
            if splits[pool.keys[one]] == {False} and True in splits[pool.keys[other]]:
                found.add(pool.keys[one])
    return found


def rare_labels(counts: np.ndarray) -> np.ndarray:
    """Marks the rare labels, bool [K], from the number of examples of each."""
    return counts < RARE * counts.mean()


def quality(setup: AuditSetup, findings: Findings) -> str:
    """The out-of-fold metrics, as a sentence."""
    measured = setup.pool.task.measure(findings.scores, setup.pool.labels)
    return "Out of fold: " + ", ".join(f"{name} {value:.4f}" for name, value in measured.items()) + "."


def measure_name(setup: AuditSetup) -> tuple[str, float]:
    """Name of the error of the learning curve, and the factor with which it is shown."""
    return ("error in %", 100.0) if setup.pool.has_classes else ("mean squared error", 1.0)


def gain_text(setup: AuditSetup, curve: LearningCurve) -> str:
    """The effect of 10 % more labels, as a sentence."""
    if curve.gain is None:
        return "The effect of more labels is fitted to three or more sizes: give more values of `--train-fraction`."
    low, high = curve.gain_interval
    law = f"by the power law error = {curve.law.a:.3g} n^-{curve.law.b:.3g} + {curve.law.c:.3g}"
    if setup.pool.has_classes:
        change = f"accuracy +{100 * curve.gain:.2f} ± {50 * (high - low):.2f} points"
        return f"10 % more labels: {change} (95 % interval {100 * low:.2f} to {100 * high:.2f}), {law}."
    change = f"mean squared error -{curve.gain:.3g} ± {(high - low) / 2:.3g}"
    return f"10 % more labels: {change} (95 % interval {low:.3g} to {high:.3g}), {law}."


def plot_curve(curve: LearningCurve, name: str, scale: float) -> Any:
    """The errors with their intervals, and the power law."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained", dpi=150)
    panel = figure.subplots()
    errors = scale * np.array(curve.errors)
    low, high = scale * np.array(curve.intervals).T
    bars = [np.maximum(errors - low, 0), np.maximum(high - errors, 0)]
    panel.errorbar(curve.sizes, errors, yerr=bars, fmt="o", color="C0", capsize=3, label="out of fold, 95 % interval")
    if curve.law is not None:
        sizes = np.geomspace(curve.sizes[0], 1.5 * curve.sizes[-1], 60)
        panel.plot(sizes, [scale * curve.law.at(size) for size in sizes], "--", color="C1", label="power law")
    panel.set(xscale="log", xlabel="training examples", ylabel=name)
    panel.set_xticks(curve.sizes, [f"{size:,.0f}" for size in curve.sizes])
    panel.minorticks_off()
    panel.grid(color="0.9", linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    return figure


def kappa_text(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def shortened(text: str) -> str:
    return text if len(text) <= EXCERPT else f"{text[: EXCERPT - 3]}..."
