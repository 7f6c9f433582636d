"""Zero-shot section of a sweep's report: accuracy on minimal pairs and pseudo-log-likelihood of every checkpoint, and
the checkpoints compared with the first one over the paradigms.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastbert.errors import plural
from fastbert.finetuning.table import NOTHING
from fastbert.report.page import Table
from fastbert.report.report_page import ReportPage
from fastbert.studies.engine.store import ResultRow
from fastbert.studies.shared.comparison import ModelComparison, adjusted
from fastbert.studies.shared.evaluate_jobs import UNITS
from fastbert.studies.shared.report import difference, interval, p_value, percent
from fastbert.studies.shared.statistics import flip_limits, paired

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class ZeroShotResults:
    """Finished evaluations of a sweep, by checkpoint in the order of the sweep."""

    pairs: dict[str, Figures]
    pll: dict[str, Figures]
    tokenizers: dict[str, str]
    """Fingerprint of the tokenizer of each checkpoint in `pll`."""
    left_out: Sequence[str] = ()
    """Reasons why checkpoints have no pseudo-log-likelihood, a line each."""

    @classmethod
    def of(cls, rows: Iterable[ResultRow], left_out: Sequence[str]) -> "ZeroShotResults":
        rows = list(rows)
        return cls(
            pairs={row["model"]: row["pairs"] for row in rows if "pairs" in row},
            pll={row["model"]: row["pll"] for row in rows if "pll" in row},
            tokenizers={row["model"]: row["configuration"]["tokenizer"] for row in rows if "pll" in row},
            left_out=left_out,
        )

    def __len__(self) -> int:
        return len(self.pairs) + len(self.pll)

    @property
    def one_tokenizer(self) -> bool:
        """True if losses per token have the same tokens, so that they can be compared."""
        return len(set(self.tokenizers.values())) == 1

    def compared(self, first: str) -> list[ModelComparison]:
        """Every other checkpoint compared with `first`, paradigm by paradigm; adjusted over the checkpoints."""
        others = [model for model in self.pairs if model != first] if first in self.pairs else []
        found = {other: paired(*self._accuracies(first, other)) for other in others}
        return [ModelComparison(first, other, found[other], *p) for other, p in adjusted(found).items()]

    def by_phenomenon(self, first: str, other: str) -> dict[str, ModelComparison]:
        """Phenomenon -> `other` compared with `first` over its paradigms; adjusted over the phenomena."""
        found = {name: paired(*self._accuracies(first, other, name)) for name in self.pairs[first]["phenomena"]}
        return {name: ModelComparison(first, other, found[name], *p) for name, p in adjusted(found).items()}

    def _accuracies(self, first: str, other: str, phenomenon: str | None = None) -> tuple[list[float], list[float]]:
        """Accuracies of two checkpoints, a value for each paradigm."""
        a, b = self.pairs[first]["paradigms"], self.pairs[other]["paradigms"]
        names = [name for name in a if phenomenon is None or a[name]["phenomenon"] == phenomenon]
        return [a[name]["accuracy"] for name in names], [b[name]["accuracy"] for name in names]


def accuracy_table(results: ZeroShotResults) -> Table:
    """Accuracy of every checkpoint, the mean over the paradigms."""
    head = ["checkpoint", "score", "accuracy", "95 % interval", "pairs", "ties", "by other scores"]
    rows = []
    for model, figures in results.pairs.items():
        score = figures["score"] + (f", {figures['pll_form']}" if figures["score"] == "pll" else "")
        ends = f"[{percent(figures['low'])}, {percent(figures['high'])}]"
        others = ", ".join(f"{name} {percent(value)}" for name, value in figures["other_scores"].items())
        counts = [str(figures["count"]), str(figures["ties"])]
        rows.append([model, score, percent(figures["accuracy"]), ends, *counts, others or NOTHING])
    return Table(head, rows)


def differences_table(compared: Mapping[str, ModelComparison], first: str) -> Table:
    """Differences by name: of checkpoints, or of phenomena."""
    head = [first, "verdict", "paradigms", "difference", "95 % interval", "p (t)", "Holm", "p (sign flips)", "Holm"]
    rows = []
    for name, line in compared.items():
        result = line.result
        tests = [p_value(p) for p in (result.p_t, line.p_t, result.p_flip, line.p_flip)]
        rows.append([name, line.verdict, str(result.n), difference(result), interval(result), *tests])
    return Table(head, rows)


def phenomena_table(results: ZeroShotResults) -> Table:
    """Accuracy by phenomenon: phenomena x checkpoints."""
    first = next(iter(results.pairs.values()))
    rows = []
    for name in first["phenomena"]:
        cells = [percent(figures["phenomena"][name]["accuracy"]) for figures in results.pairs.values()]
        rows.append([name.replace("_", " "), str(first["phenomena"][name]["count"]), *cells])
    return Table(["phenomenon", "pairs", *results.pairs], rows)


def pll_table(results: ZeroShotResults) -> Table:
    """Negative pseudo-log-likelihood of every checkpoint with its standard error. Without a common tokenizer there is
    no value per token."""
    units = [unit for unit in UNITS if results.one_tokenizer or unit != "nats_per_token"]
    rows = []
    for model, figures in results.pll.items():
        cells = [_with_error(figures[unit], figures[f"{unit}_error"]) for unit in units]
        rows.append([model, f"{figures['score']}, {figures['pll_form']}", str(figures["sentences"]), *cells])
    return Table(["checkpoint", "score", "sentences", *(unit.replace("_", " ") for unit in units)], rows)


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def write_zero_shot(report: ReportPage, results: ZeroShotResults, first: str) -> None:
    """Adds the section; the other checkpoints are compared with `first`."""
    report.heading("Zero-shot")
    if results.pairs:
        _accuracies(report, results, first)
    if results.pll:
        report.text("Negative pseudo-log-likelihood of the sampled sentences with its standard error; lower is better.")
        report.table(pll_table(results))
        report.text(pll_caveat(results))
    if results.left_out:
        report.points(results.left_out)


def _accuracies(report: ReportPage, results: ZeroShotResults, first: str) -> None:
    report.text(
        "Minimal pairs: accuracy x 100, the mean over the paradigms; a tie counts as half. The interval is about other "
        "pairs of the same paradigms."
    )
    report.table(accuracy_table(results))
    found = results.compared(first)
    if found:
        scores = {results.pairs[model]["score"] for model in (first, *(line.other for line in found))}
        limit = flip_limits((line.result.n for line in found), len(found), "paradigm")
        report.text(f"Compared with {first}, x 100:")
        report.table(differences_table({line.other: line for line in found}, "checkpoint"))
        report.text(
            "The difference is the mean over the paradigms, each a pair of accuracies. The interval and p (t) come "
            f"from the paired t-test, p (sign flips) from the permutation test over the signs. {limit and f'{limit} '}"
            f"Holm: adjusted over {plural(len(found), 'checkpoint')}. The tests show whether two checkpoints differ on "
            "constructions like these. Whether their methods differ needs several seeds of each: `fastbert ablate`."
            + (" The checkpoints are scored differently, each as its objective allows." if len(scores) > 1 else "")
        )
    if any(figures["phenomena"] for figures in results.pairs.values()):
        report.text("By phenomenon, accuracy x 100:")
        report.table(phenomena_table(results))
        for line in found:
            report.text(f"{line.other} compared with {first} by phenomenon, adjusted over the phenomena:")
            lines = {name.replace("_", " "): one for name, one in results.by_phenomenon(first, line.other).items()}
            report.table(differences_table(lines, "phenomenon"))


def pll_caveat(results: ZeroShotResults) -> str:
    """Sentences on what can be compared."""
    found = "All checkpoints have the same tokenizer, so the values per token are comparable."
    if not results.one_tokenizer:
        found = (
            "The tokenizers differ, so there is no value per token. Bits per byte compare checkpoints only if their "
            "tokenizers normalize text equally (case, accents): a lowercased text has less to predict."
        )
    lengths = {figures["length"] for figures in results.pll.values()}
    if len(lengths) > 1 and any(figures["sentences_cut"] for figures in results.pll.values()):
        found += " Sentences were cut at different lengths; give length under evaluate for an equal one."
    return found


def printed_zero_shot(results: ZeroShotResults, first: str) -> str:
    """Accuracies, differences and pseudo-log-likelihoods for a terminal."""
    lines = []
    if results.pairs:
        lines += ["Minimal pairs, accuracy x 100, the mean over the paradigms", accuracy_table(results).plain(), ""]
    if found := results.compared(first):
        rows = [
            [line.other, str(line.result.n), difference(line.result), interval(line.result), line.verdict]
            for line in found
        ]
        lines.append(f"Compared with {first}, pairs of the same paradigm")
        lines += [Table(["checkpoint", "paradigms", "difference", "95 % interval", "verdict"], rows).plain(), ""]
    if results.pll:
        lines += ["Negative pseudo-log-likelihood and its standard error", pll_table(results).plain(), ""]
    return "\n".join([*lines, *results.left_out])
