"""Pretrainings as jobs of a study: the figures of a finished run, and its rows in results.jsonl."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbert.errors import UserError
from fastbert.finetuning.setup import fingerprint_of_weights
from fastbert.hub.load import load_pretrained
from fastbert.objectives import OBJECTIVES
from fastbert.records import check, read_json
from fastbert.studies.engine.outcomes import failure
from fastbert.studies.engine.store import ResultRow
from fastbert.training.logbook import read_metrics
from fastbert.training.splits import OWN, record_split

PRETRAIN, BRANCH = "pretrain", "branch"  # the kinds of these jobs
_NO_FIGURES = ("split", "tokens", "length")
_LOSS = {"loss": (float, type(None))}
_TRAINED = {
    **{"model": str, "task": str, "seed": int, "precision": str, "seconds": float, "objective": str},
    "validations": [{"step": int, **_LOSS, "splits?": {str: _LOSS}}],
}


def trained_outcome(out: Path, objective: str, fixed: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The outcome of a finished run in `out`.

    Args:
        fixed: split in the records -> name, of the further validation splits that are reported.
    """
    manifest = read_json(out / "manifest.json", "the job's manifest")
    first, last = manifest["sessions"][0], manifest["sessions"][-1]
    validations = validations_of(read_metrics(out / "metrics.jsonl"), fixed or {})
    if None in (values["loss"] for values in (validations[-1], *validations[-1].get("splits", {}).values())):
        return failure("its last validation loss is not finite", "give it a lower learning rate")
    return {
        "status": "done",
        "precision": last["resolved"]["precision"],
        # Seconds of earlier sessions, without the trunk's, which a branch inherits.
        "seconds": last.get("from_seconds", 0.0) - first.get("from_seconds", 0.0),
        "result": {
            "objective": objective,
            "validations": validations,
            "unigram_entropy": read_json(out / "report" / "summary.json", "the job's summary")["unigram_entropy"],
            "device": last["resolved"]["device"],
        },
    }


def validations_of(records: Sequence[Mapping[str, Any]], fixed: Mapping[str, str]) -> list[dict[str, Any]]:
    """Figures of each validation of a training from its records, in the order of the steps: those of its own held-out
    documents and, under `splits`, those of further splits.

    Args:
        fixed: name of a validation split of the training -> name in the result.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        figures = {name: value for name, value in record.items() if name not in _NO_FIGURES}
        found.setdefault(record["split"], {})[record["step"]] = figures
    validations = list(found[OWN].values())
    for validation in validations if fixed else ():
        step = validation["step"]
        others = {name: found[record_split(split)][step] for split, name in fixed.items()}
        validation["splits"] = {
            name: {figure: value for figure, value in figures.items() if figure != "step"}
            for name, figures in others.items()
        }
    return validations


def initial_weights(init_from: str) -> str:
    """Hash of the weights that a training starts from, eight hexadecimal digits."""
    return fingerprint_of_weights(load_pretrained(init_from), ("encoder.", "head."))


def without_masked_head(objectives: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Models whose encoder predicts no masked words, so that it has no pseudo-log-likelihood -> the reason.

    Args:
        objectives: name and objective of each model.
    """
    return {
        name: f"with objective {objective} the encoder predicts no masked words"
        for name, objective in objectives
        if not OBJECTIVES[objective].loss_in_nats
    }


def check_trained(row: ResultRow, where: str) -> None:
    """`RowCheck` of pretrainings."""
    check(row, _TRAINED, where)
    if not row["validations"]:
        raise UserError(f"{where} is damaged: validations is empty")
