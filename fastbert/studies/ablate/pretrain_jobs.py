"""Pretraining job of an ablation: runs or resumes `fastbert pretrain`, and returns a row of results.

A branch starts as a folder with a checkpoint of another run and its own schedule, and is then resumed
(fastbert/pretraining/branch.py).
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbert.config import from_dict
from fastbert.errors import UserError
from fastbert.pretraining.branch import branch
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.pretrain import pretrain
from fastbert.records import check, read_json
from fastbert.studies.engine.outcomes import RUN, ended, failure
from fastbert.studies.engine.store import ResultRow
from fastbert.studies.shared.evaluate_jobs import EVALUATE, check_evaluated
from fastbert.studies.shared.finetune_jobs import FINETUNE, check_tuned
from fastbert.training.logbook import read_metrics

PRETRAIN, BRANCH = "pretrain", "branch"  # the kinds of these jobs
_NO_FIGURES = ("split", "tokens", "length")
_TRAINED = {
    **{"model": str, "task": str, "seed": int, "precision": str, "seconds": float, "objective": str},
    "validations": [{"step": int, "loss": (float, type(None))}],
}


def pretrain_job(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """The `JobRunner` of a pretraining: trains or resumes, to the end."""
    options = from_dict(PretrainOptions, job["options"] | {"out": str(out)}, where="the ablation's job")
    begun = (out / "manifest.json").is_file()  # written after the options
    if not begun:
        shutil.rmtree(out, ignore_errors=True)
        if job["kind"] == BRANCH:
            branch(out.parent.parent / job["after"] / RUN, job["identity"]["start"], options, out)
            begun = True
    code = pretrain(replace(options, resume=begun), "ablate")
    if code:
        return ended(code)
    manifest = read_json(out / "manifest.json", "the job's manifest")
    if manifest["science"]["data"] != job["identity"]["data"]:
        return failure("the data changed after the ablation had started", "run it again once nothing changes the data")
    first, last = manifest["sessions"][0], manifest["sessions"][-1]
    records = read_metrics(out / "metrics.jsonl")
    validations = [
        {name: value for name, value in record.items() if name not in _NO_FIGURES}
        for record in records
        if record["split"] == "validation"
    ]
    if validations[-1]["loss"] is None:
        return failure("its last validation loss is not finite", "give the variant a lower learning rate")
    return {
        "status": "done",
        "precision": last["resolved"]["precision"],
        # Seconds of earlier sessions, without the trunk's, which a branch inherits.
        "seconds": last.get("from_seconds", 0.0) - first.get("from_seconds", 0.0),
        "result": {
            "objective": options.objective,
            "validations": validations,
            "unigram_entropy": read_json(out / "report" / "summary.json", "the job's summary")["unigram_entropy"],
            "device": last["resolved"]["device"],
        },
    }


def check_ablation_row(row: ResultRow, where: str) -> None:
    """`RowCheck` of an ablation's pretrainings, fine-tunings and evaluations."""
    kind = check(row, {"kind": str}, where)["kind"]
    if kind in (FINETUNE, EVALUATE):
        (check_tuned if kind == FINETUNE else check_evaluated)(row, where)
        return
    check(row, _TRAINED, where)
    if not row["validations"]:
        raise UserError(f"{where} is damaged: validations is empty")
