"""Reading of a run folder for a report: options, machine, cost, curves and results.

A run may be unfinished, or its records damaged: what can be read is shown, and each problem becomes a warning.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastbert.errors import UserError, brief
from fastbert.inheritance import read_yaml
from fastbert.inputs import check_folder, near_name, read_or_problem
from fastbert.ranges import LARGEST
from fastbert.records import COUNT, json_text, read_json
from fastbert.training.logbook import read_records

NOTHING = "–"
_NUMBER = (float, type(None))
_MANIFEST = {"science": dict, "data": {"folder": str}, "sessions": [dict]}
_FIGURE = {"label": str, "value": _NUMBER, "unit": str, "words?": bool, "chance?": _NUMBER}
_SUMMARY = {
    **{"step": COUNT, "tokens": COUNT, "validation": {str: _NUMBER}, "unigram_entropy": float, "examples": [str]},
    **{"seconds": float, "figures?": [_FIGURE]},
    **{"parameters?": COUNT, "flops?": float, "loss_in_nats?": bool, "examples_heading?": str},
}
_NOT_A_RUN = {
    "results.json": "holds the results of a fine-tuning, with the page report.html",
    "glue.md": "holds fine-tunings on several tasks, with the table glue.md",
    "results.jsonl": "is a sweep or an ablation, with the page report/report.html",
    "dataset.json": "holds prepared data",
    "state.json": "is a checkpoint",
    "config.json": "is a model without the records of its training",
    "result.json": "is one seed of a fine-tuning",
}
"""File in a folder that is not a run -> description of that folder."""


@dataclass(frozen=True)
class Run:
    """A run, as recorded in its folder."""

    path: Path
    name: str
    manifest: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    """The lines of metrics.jsonl in the order of their steps, one for each step and split."""
    summary: Mapping[str, Any] | None
    """report/summary.json; None while the run is unfinished."""
    config: Mapping[str, Any]
    """Content of config.yaml; empty if it cannot be read."""
    warnings: Sequence[str]

    @property
    def science(self) -> Mapping[str, Any]:
        """The options that define the experiment, and the hash of its data."""
        return self.manifest["science"]

    @property
    def objective(self) -> str:
        return text_of(self.science.get("objective"))

    @cached_property
    def session(self) -> Mapping[str, Any]:
        """The last session: its machine and what the options resolved to there; empty if there is none."""
        return self.manifest["sessions"][-1] if self.manifest["sessions"] else {}

    @property
    def resolved(self) -> Mapping[str, Any]:
        return mapping(self.session.get("resolved"))

    @property
    def machine(self) -> Mapping[str, Any]:
        """The options of the group `machine`."""
        return mapping(self.config.get("machine"))

    @property
    def session_machine(self) -> Mapping[str, Any]:
        """Hardware, versions and commit of the last session."""
        return mapping(self.session.get("machine"))

    @property
    def steps(self) -> int:
        """Steps planned; 0 if unknown."""
        steps = self.science.get("steps")
        return steps if type(steps) is int else 0

    @property
    def done(self) -> int:
        """The last recorded step."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def state(self) -> str:
        return "finished" if self.finished else f"unfinished: step {self.done:,} of {self.steps:,}"

    def column(self, split: str, column: str) -> list[tuple[int, float | None]]:
        """(step, value) of the records of `split` that have the column; None for a value that was not finite."""
        return [
            (record["step"], number(record[column]))
            for record in self.records
            if record["split"] == split and column in record
        ]

    def last(self, split: str, column: str) -> float | None:
        """The last finite value of a column."""
        return next((value for _, value in reversed(self.column(split, column)) if value is not None), None)

    def median(self, column: str) -> float | None:
        """The median of a column over the training records."""
        values = [value for _, value in self.column("train", column) if value is not None]
        return statistics.median(values) if values else None

    @property
    def tokens(self) -> float | None:
        return self.summary["tokens"] if self.summary else self.last("train", "tokens")

    @property
    def flops(self) -> float | None:
        """Training FLOPs so far, by the closed forms of the model."""
        recorded = self.summary.get("flops") if self.summary else self.last("train", "flops")
        per_step = number(self.resolved.get("flops_per_step"))
        return recorded if recorded is not None or per_step is None else per_step * self.done

    @property
    def minutes(self) -> float | None:
        """Minutes of the run, validations and checkpoints included; for an unfinished run of training alone."""
        if self.summary:
            return self.summary["seconds"] / 60
        minutes = self.clock["minutes"]
        return minutes[-1] if len(minutes) > 1 else None

    @cached_property
    def clock(self) -> dict[str, list[float]]:
        """Steps of the training records, from 0, with tokens, FLOPs and minutes of training up to each."""
        clock: dict[str, list[float]] = {"steps": [0.0], "tokens": [0.0], "flops": [0.0], "minutes": [0.0]}
        per_step = number(self.resolved.get("flops_per_step")) or 0.0
        for record in self.records:
            tokens = number(record.get("tokens"))
            if record["split"] == "train" and tokens is not None:
                rate = number(record.get("tokens_per_second"))
                seconds = (tokens - clock["tokens"][-1]) / rate if rate else 0.0
                flops = number(record.get("flops"))
                clock["steps"].append(float(record["step"]))
                clock["tokens"].append(tokens)
                clock["flops"].append(record["step"] * per_step if flops is None else flops)
                clock["minutes"].append(clock["minutes"][-1] + seconds / 60)
        return clock

    @property
    def device(self) -> str:
        """Name of the GPU or CPU that the last session used."""
        gpus = self.session_machine.get("gpus")
        if text_of(self.resolved.get("device")).startswith("cuda") and isinstance(gpus, list) and gpus:
            return text_of(gpus[0])
        return text_of(self.session_machine.get("cpu"))


def read_run(path: Path | str) -> Run:
    """Reads the run in the folder `path`.

    Raises:
        UserError: it is not the folder of a run (the message states what to give instead), or its manifest is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no folder {brief(str(path), str)}{near_name(path)}; give the folder of a run")
    check_folder(path, "run")
    if _is_no_run(path):
        raise UserError(f"{path} {_found(path)}; give the folder of a run of fastbert pretrain")
    manifest = read_json(path / "manifest.json", "the run's manifest", _MANIFEST)
    records, warnings = _records(path / "metrics.jsonl")
    summary, problem = None, ""
    if (path / "report" / "summary.json").exists():
        summary, problem = read_or_problem(read_json, path / "report" / "summary.json", "the summary", _SUMMARY)
    values, config_problem = read_or_problem(read_yaml, path / "config.yaml")
    warnings += [text for text in (problem, config_problem) if text]
    config = mapping(values[0] if values else None)
    run = Run(path, path.resolve().name, manifest, records, summary, config, warnings)
    if not run.finished:
        warnings.insert(0, f"{run.state}; figures cover the run so far")
    return run


def _is_no_run(path: Path) -> bool:
    """True if `path` is another folder, such as the results of a fine-tuning, which also has a manifest."""
    return not (path / "manifest.json").exists() or any((path / name).exists() for name in _NOT_A_RUN)


def _found(path: Path) -> str:
    """Describes a folder that is not a run."""
    if what := next((what for name, what in _NOT_A_RUN.items() if (path / name).exists()), None):
        return what
    inside = sorted(child.name for child in path.iterdir() if child.is_dir() and not _is_no_run(child))
    return f"is not a run, but holds runs, such as {path / inside[0]}" if inside else "is not a run"


def _records(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records in the order of their steps, with the last one of each step and split, and warnings."""
    if not path.exists():
        return [], [f"no {path.name}: there are no curves"]
    records, damaged = read_records(path)
    warnings = []
    if damaged:
        listed = ", ".join(map(str, damaged[:10])) + (" ..." if len(damaged) > 10 else "")
        warnings.append(f"damaged lines in {path.name}, left out: {listed}")
    possible = [record for record in records if 0 <= record["step"] <= LARGEST]
    if len(possible) < len(records):
        warnings.append(f"records with impossible steps in {path.name}, left out: {len(records) - len(possible)}")
    unique = {(record["step"], record["split"]): record for record in possible}
    if len(unique) < len(possible):
        warnings.append(f"repeated records in {path.name}: the last one of each step is used")
    if not possible:
        warnings.append(f"no records in {path.name}: there are no curves")
    return sorted(unique.values(), key=lambda record: record["step"]), warnings


def number(value: Any) -> float | None:
    """`value` as a float; None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None  # false for NaN as well


def text_of(value: Any) -> str:
    """The value of an option for a table."""
    if value is None:
        return NOTHING
    return brief(value if isinstance(value, str) else json_text(value), str)


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def count_text(value: float | None, unit: str = "") -> str:
    """A large number with three digits and a letter: 61.4M, 5.31G; FLOPs as 1.59e+14."""
    if value is None:
        return NOTHING
    if unit == "flops":
        return f"{value:.2e}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}" if value < 999.5 * size else f"{value / size:,.0f}{letter}"
    return f"{value:,.0f}"
