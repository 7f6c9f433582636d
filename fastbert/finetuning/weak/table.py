"""The table of labelling functions: how often each votes, alone or against others, and how often it is right on dev.

Shapes: N examples, M functions. Votes are label ids [N, M], `ABSTAIN` for none.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.files import atomic_file
from fastbert.finetuning.weak.label_models import ABSTAIN
from fastbert.streams import echo

CORRELATED = 0.3  # errors with a higher correlation are reported
LEAST_PAIRS = 20  # dev examples with votes of both functions
SIGNIFICANT = 3.0  # standard errors from 0, about 1 / sqrt(n)


def describe(names: Sequence[str], train: np.ndarray, dev: np.ndarray, gold: np.ndarray) -> dict[str, Any]:
    """Figures of all functions.

    Args:
        train: [N, M].
        dev: [D, M].
        gold: labels of dev, int64 [D].
    """
    cast, cast_dev = train != ABSTAIN, dev != ABSTAIN
    several = cast.sum(axis=1) > 1
    lowest = np.where(cast, train, np.iinfo(np.int64).max).min(axis=1, initial=np.iinfo(np.int64).max)
    conflict = several & (lowest != train.max(axis=1, initial=ABSTAIN))
    correct = (dev == gold[:, None]) & cast_dev
    rows = []
    for index, name in enumerate(names):
        voted, count = cast[:, index], int(cast_dev[:, index].sum())
        others = np.delete(train, index, axis=1)
        opposed = ((others != ABSTAIN) & (others != train[:, [index]])).any(axis=1)
        rows.append(
            {
                "name": name,
                "coverage": float(voted.mean()),
                "overlaps": float((voted & several).mean()),
                "conflicts": float((voted & opposed).mean()),
                "dev_votes": count,
                "dev_correct": int(correct[:, index].sum()),
                "dev_accuracy": float(correct[:, index].sum() / count) if count else None,
            }
        )
    return {
        "train_examples": len(train),
        "dev_examples": len(dev),
        "functions": rows,
        "without_vote": {"train": float((~cast.any(axis=1)).mean()), "dev": float((~cast_dev.any(axis=1)).mean())},
        "in_conflict": float(conflict.mean()),
        "correlated_errors": correlated_errors(names, dev, gold),
        "copies": copies(names, train),
    }


def correlated_errors(names: Sequence[str], dev: np.ndarray, gold: np.ndarray) -> list[dict[str, Any]]:
    """Pairs of functions whose errors on dev are correlated, with the correlation and the number of examples."""
    found = []
    for i, j in combinations(range(len(names)), 2):
        both = (dev[:, i] != ABSTAIN) & (dev[:, j] != ABSTAIN)
        wrong = dev[both][:, [i, j]] != gold[both, None]
        count = len(wrong)
        if count < LEAST_PAIRS or not (wrong.any(axis=0) & ~wrong.all(axis=0)).all():
            continue
        value = float(np.corrcoef(wrong.T)[0, 1])
        if value > CORRELATED and value * count**0.5 > SIGNIFICANT:
            found.append({"functions": [names[i], names[j]], "correlation": value, "examples": count})
    return sorted(found, key=lambda pair: -pair["correlation"])


def copies(names: Sequence[str], train: np.ndarray) -> list[list[str]]:
    """Groups of functions with the same vote, or none, for every training example."""
    groups: dict[bytes, list[str]] = {}
    for name, column in zip(names, train.T, strict=True):
        groups.setdefault(np.ascontiguousarray(column).tobytes(), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def warnings(table: dict[str, Any], train: np.ndarray, labels: Sequence[str]) -> list[str]:
    """Warnings about functions that break the assumptions of the label models."""
    found = []
    for row, votes in zip(table["functions"], train.T, strict=True):
        if (votes == votes[0]).all():
            found.append(f"function {row['name']} votes {labels[votes[0]]} for every example and distinguishes none")
    for group in table["copies"]:
        found.append(
            f"{', '.join(group)} are copies: their votes are identical, which label models count as independent "
            "evidence; retain one of them"
        )
    together = {name for group in table["copies"] for name in group}
    for pair in table["correlated_errors"]:
        if not set(pair["functions"]) <= together:
            found.append(
                f"errors of {' and '.join(pair['functions'])} are correlated ({pair['correlation']:.2f} over "
                f"{pair['examples']} dev examples), and label models assume independent errors"
            )
    return found


def table_lines(table: dict[str, Any]) -> list[str]:
    """The table as aligned text."""
    width = max(8, *(len(row["name"]) for row in table["functions"]))
    lines = [f"  {'function':<{width}} {'coverage':>9} {'overlaps':>9} {'conflicts':>9} {'on dev':>9} {'accuracy':>9}"]
    for row in table["functions"]:
        figures = " ".join(f"{row[name]:>9.4f}" for name in ("coverage", "overlaps", "conflicts"))
        lines.append(f"  {row['name']:<{width}} {figures} {row['dev_votes']:>9} {figure(row['dev_accuracy']):>9}")
    without = table["without_vote"]
    lines.append(
        f"  without any vote: {without['train']:.1%} of {table['train_examples']:,} train examples, "
        f"{without['dev']:.1%} of {table['dev_examples']:,} dev examples; with votes in conflict: "
        f"{table['in_conflict']:.1%} of train"
    )
    for model in table["models"]:
        balance = ", ".join(f"{value:.3f}" for value in model["balance"])
        chosen = "  <- used" if model["name"] == table["used"] else ""
        lines.append(f"  {model['name']:<9} accuracy on dev {model['dev_accuracy']:.4f}, balance {balance}{chosen}")
    return lines


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def markdown(table: dict[str, Any], notices: Sequence[str]) -> str:
    """The table in Markdown, with the warnings."""
    lines = ["| function | coverage | overlaps | conflicts | dev votes | correct | accuracy |", "|---|" + "---:|" * 6]
    for row in table["functions"]:
        figures = " | ".join(f"{row[name]:.4f}" for name in ("coverage", "overlaps", "conflicts"))
        name = row["name"].replace("|", "\\|")
        counts = f"{row['dev_votes']} | {row['dev_correct']} | {figure(row['dev_accuracy'])}"
        lines.append(f"| {name} | {figures} | {counts} |")
    lines += ["", "| label model | accuracy on dev | balance |", "|---|---:|---|"]
    for model in table["models"]:
        balance = ", ".join(f"{value:.3f}" for value in model["balance"])
        used = " (used)" if model["name"] == table["used"] else ""
        lines.append(f"| {model['name']}{used} | {model['dev_accuracy']:.4f} | {balance} |")
    without = table["without_vote"]
    lines += ["", f"Without any vote: {without['train']:.1%} of train, {without['dev']:.1%} of dev."]
    return "\n".join([*lines, *(f"\nWarning: {notice}." for notice in notices)]) + "\n"


def plot(path: Path, table: dict[str, Any]) -> None:
    """Writes a picture: coverage of each function, divided by whether others vote, and its accuracy on dev."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        echo("matplotlib is not installed: no picture is plotted; table.json has the values")
        return
    rows = table["functions"][::-1]
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(rows)), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row["name"] for row in rows]
    offset = np.zeros(len(rows))
    parts = {
        "alone": [row["coverage"] - row["overlaps"] for row in rows],
        "others agree": [row["overlaps"] - row["conflicts"] for row in rows],
        "in conflict": [row["conflicts"] for row in rows],
    }
    for index, (label, values) in enumerate(parts.items()):
        left.barh(names, values, left=offset, color=f"C{index}", label=label)
        offset += values
    left.set(xlabel="fraction of train", xlim=(0, 1))
    left.legend(frameon=False, fontsize=8)
    right.barh(names, [row["dev_accuracy"] or 0.0 for row in rows], color="0.6")
    for index, row in enumerate(rows):
        right.text(0.02, index, f"{row['dev_correct']}/{row['dev_votes']}", va="center", fontsize=8)
    for model, style in zip(table["models"], ("--", ":", "-."), strict=False):
        right.axvline(model["dev_accuracy"], color="0.2", linestyle=style, label=model["name"])
    right.set(xlabel="accuracy on dev", xlim=(0, 1))
    right.legend(framealpha=0.9, edgecolor="none", fontsize=8)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    with atomic_file(path) as file:
        figure.savefig(file, format="png")
