"""Zero-shot evaluations as jobs of a study: pairs and text that are read and checked before the first job, the runner,
and its rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastbert.config import digest, from_dict, to_dict
from fastbert.errors import plural
from fastbert.finetuning.setup import fingerprint_of_weights
from fastbert.hub.foreign import load_any
from fastbert.hub.load import Pretrained, tokenizer_of
from fastbert.model.config import EncoderConfig
from fastbert.model.flops import encoder_flops
from fastbert.pretraining.evaluate_options import EvaluateOptions
from fastbert.pretraining.zero_shot.pair_files import Pair, read_pairs
from fastbert.pretraining.zero_shot.pairs import measure_pairs
from fastbert.pretraining.zero_shot.pll import measure_pll, read_sentences
from fastbert.records import COUNT, check
from fastbert.report.page import Table
from fastbert.studies.engine.jobs import Job
from fastbert.studies.engine.outcomes import failure
from fastbert.studies.engine.store import ResultRow
from fastbert.studies.shared.grid import StudyGrid, prefixed

EVALUATE = "evaluate"  # the kind of these jobs
EVALUATIONS = {"pairs": "minimal pairs", "pll": "pseudo-log-likelihood"}
"""Key in the YAML file and in a row of results -> name of the job in tables."""
UNITS = ("nats_per_token", "nats_per_word", "bits_per_byte")
_ACCURACY = {"accuracy": float, "low": float, "high": float, "count": COUNT, "ties": COUNT}
_FIGURES = {
    "pairs": {
        **{"score": str, "pll_form": str, "other_scores": {str: float}, **_ACCURACY},
        **{"phenomena": {str: _ACCURACY}, "paradigms": {str: {**_ACCURACY, "phenomenon": (str, type(None))}}},
    },
    "pll": {
        **{"score": str, "pll_form": str, "length": COUNT, "sentences": COUNT, **dict.fromkeys(UNITS, float)},
        **{f"{unit}_error": (float, type(None)) for unit in UNITS},  # None for one sentence
    },
}
"""Key in a row -> its figures, those of `measure_pairs` and `measure_pll`."""


@dataclass(frozen=True)
class PlannedEvaluation:
    """A checked evaluation; with a checkpoint it becomes a job."""

    key: str
    """pairs or pll."""
    options: EvaluateOptions
    """Options without a model."""
    data: str
    """Hash of the pairs or sentences, eight hexadecimal digits."""
    size: str
    """Number of pairs or sentences, for tables."""
    pairs: Sequence[Pair]
    """The minimal pairs, if they are what is evaluated."""
    work: float
    """Approximate number of token vectors to compute: the square of each sentence's length, summed."""

    def job(self, name: str, path: str, config: EncoderConfig, checkpoint: Mapping[str, Any], **fields: Any) -> Job:
        """The job that evaluates a checkpoint.

        Args:
            name: name of the checkpoint in tables.
            path: folder of the checkpoint.
            checkpoint: values that identify its weights.
            fields: further fields of the job: seed, setting, after.
        """
        machine = self.options.machine
        identity = {
            **{"evaluation": self.key, "data": self.data, "pll_form": self.options.pll_form},
            "length": self.options.length,
            **{"threads": machine.threads, "precision": machine.precision},
            **checkpoint,
        }
        return Job(
            id=digest(identity),
            model=name,
            task=EVALUATIONS[self.key],
            identity=identity,
            options=to_dict(replace(self.options, model=path)),
            folder=str(Path.cwd()),
            cost=encoder_flops(config, 1, 1) * self.work,
            runner="fastbert.studies.shared.evaluate_jobs:evaluate_job",
            kind=EVALUATE,
            device=machine.device,
            **fields,
        )


def plan_evaluations(grid: StudyGrid) -> list[PlannedEvaluation]:
    """Reads the pairs and the sentences of a study.

    Raises:
        UserError: they cannot be read.
    """
    found = []
    for key, options in grid.evaluate.items():
        with prefixed(f"{grid.path}: evaluate: {key}"):
            pairs, sentences = read_data(options)
        size = plural(len(sentences), "sentence")
        if pairs:
            size = f"{plural(len(pairs), 'pair')} in {plural(len({pair.paradigm for pair in pairs}), 'paradigm')}"
        texts = sentences or [text for pair in pairs for text in (pair.good, pair.bad)]
        work = sum((len(text) / 4) ** 2 for text in texts)
        found.append(PlannedEvaluation(key, options, hash_of(pairs, sentences), size, pairs, work))
    return found


def read_data(options: EvaluateOptions) -> tuple[list[Pair], list[str]]:
    """The minimal pairs, or the sampled sentences, whichever is evaluated."""
    if options.measurement == "pairs":
        return read_pairs(options.pairs), []
    return [], read_sentences(options)[0]


def hash_of(pairs: Sequence[Pair], sentences: Sequence[str]) -> str:
    """Hash of what is evaluated, without the names of files."""
    rows = [[pair.good, pair.bad, pair.paradigm, pair.phenomenon] for pair in pairs]
    return digest({"pairs": rows, "sentences": list(sentences)})


def fingerprints(pretrained: Pretrained) -> dict[str, str]:
    """Hashes that identify the encoder with its head, and its tokenizer."""
    return {
        "model": fingerprint_of_weights(pretrained, ("encoder.", "head.")),
        "tokenizer": tokenizer_of(pretrained).fingerprint[:8],
    }


def evaluated_table(evaluations: Sequence[PlannedEvaluation]) -> Table:
    """The pairs and the text of a study's evaluations."""
    rows = []
    for evaluation in evaluations:
        options = evaluation.options
        source = getattr(options, evaluation.key)
        rows.append([EVALUATIONS[evaluation.key], source, evaluation.size, options.pll_form])
    return Table(["zero-shot", "data", "size", "form of the pseudo-log-likelihood"], rows)


# --- the runner and its rows


def evaluate_job(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """`JobRunner` of an evaluation. It writes no files: a job that was killed starts again."""
    options = from_dict(EvaluateOptions, job["options"], where="the study's job")
    key = options.measurement
    figures = measure_pairs(options) if key == "pairs" else measure_pll(options)
    if changed := changed_since(job["identity"], options):
        return failure(f"the {changed} changed after the study had started", "run it again once nothing changes it")
    result = {name: value for name, value in figures.items() if name not in ("model", "seconds", "precision")}
    return {
        "status": "done",
        "precision": figures["precision"],
        "result": {key: result},
    }


def changed_since(identity: Mapping[str, Any], options: EvaluateOptions) -> str | None:
    """Name of the input (model, tokenizer or data) of an evaluation that differs from the plan, or None."""
    found = {"data": hash_of(*read_data(options))}
    if "model" in identity:  # else the weights are identified by the pretraining
        found |= fingerprints(load_any(options.model))
    return next((name for name, value in found.items() if identity[name] != value), None)


def check_evaluated(row: ResultRow, where: str) -> None:
    """`RowCheck` of evaluations."""
    key = "pairs" if "pairs" in row else "pll"
    check(row, {"model": str, "task": str, "precision": str, "seconds": float, key: _FIGURES[key]}, where)


def evaluated(row: ResultRow) -> tuple[str, float]:
    """Name and value of a finished evaluation, for the live status."""
    if "pairs" in row:
        return "accuracy", row["pairs"]["accuracy"]
    return "nats per token", row["pll"]["nats_per_token"]
