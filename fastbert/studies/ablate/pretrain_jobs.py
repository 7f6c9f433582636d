"""Pretraining job of an ablation: runs or resumes `fastbert pretrain`, and returns a row of results.

A branch starts as a folder with a checkpoint of another run and its own schedule, and is then resumed
(fastbert/pretraining/branch.py).
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbert.config import from_dict
from fastbert.data.shards import open_dataset
from fastbert.errors import UserError
from fastbert.finetuning.setup import fingerprint_of_weights
from fastbert.hub.load import load_pretrained
from fastbert.pretraining.branch import branch
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.pretrain import pretrain
from fastbert.pretraining.setup import data_fingerprint
from fastbert.records import check, read_json
from fastbert.studies.ablate.data_mode import PREFIX
from fastbert.studies.engine.outcomes import RUN, ended, failure
from fastbert.studies.engine.store import ResultRow
from fastbert.studies.shared.evaluate_jobs import EVALUATE, check_evaluated
from fastbert.studies.shared.finetune_jobs import FINETUNE, check_tuned
from fastbert.training.logbook import read_metrics
from fastbert.training.splits import OWN, named_folders, record_split

PRETRAIN, BRANCH = "pretrain", "branch"  # the kinds of these jobs
_NO_FIGURES = ("split", "tokens", "length")
_LOSS = {"loss": (float, type(None))}
_TRAINED = {
    **{"model": str, "task": str, "seed": int, "precision": str, "seconds": float, "objective": str},
    "validations": [{"step": int, **_LOSS, "splits?": {str: _LOSS}}],
}
CHANGED = ("the data changed after the ablation had started", "run it again once nothing changes the data")


def pretrain_job(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """The `JobRunner` of a pretraining: trains or resumes, to the end."""
    options = from_dict(PretrainOptions, job["options"] | {"out": str(out)}, where="the ablation's job")
    begun, identity = (out / "manifest.json").is_file(), job["identity"]  # written after the options
    if not begun and "initial" in identity and initial_weights(options.init_from) != identity["initial"]:
        return failure(f"the weights of {options.init_from} changed after the ablation had started", "run it again")
    if not begun:
        shutil.rmtree(out, ignore_errors=True)
        if job["kind"] == BRANCH:
            (trunk,) = job["after"]
            branch(out.parent.parent / trunk / RUN, job["identity"]["start"], options, out)
            begun = True
    code = pretrain(replace(options, resume=begun), "ablate")
    if code:
        return ended(code)
    manifest = read_json(out / "manifest.json", "the job's manifest")
    folders = {name.removeprefix(PREFIX): folder for name, folder in named_folders(options.eval_data).items()}
    fixed = {name: folders[name] for name in identity.get("validation", ())}
    if manifest["science"]["data"] != identity["data"] or any(
        data_fingerprint(open_dataset(folder)) != identity["validation"][name] for name, folder in fixed.items()
    ):
        return failure(*CHANGED)
    first, last = manifest["sessions"][0], manifest["sessions"][-1]
    validations = validations_of(read_metrics(out / "metrics.jsonl"), list(fixed))
    if None in (values["loss"] for values in (validations[-1], *validations[-1].get("splits", {}).values())):
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


def validations_of(records: Sequence[Mapping[str, Any]], fixed: Sequence[str]) -> list[dict[str, Any]]:
    """Figures of each validation of a training from its records, in the order of the steps: those of its own held-out
    documents and, under `splits`, those of the fixed splits of the ablation by name."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        figures = {name: value for name, value in record.items() if name not in _NO_FIGURES}
        found.setdefault(record["split"], {})[record["step"]] = figures
    validations = list(found[OWN].values())
    for validation in validations if fixed else ():
        step = validation["step"]
        others = {name: found[record_split(PREFIX + name)][step] for name in fixed}
        validation["splits"] = {
            name: {figure: value for figure, value in figures.items() if figure != "step"}
            for name, figures in others.items()
        }
    return validations


def initial_weights(init_from: str) -> str:
    """Hash of the weights that a training starts from, eight hexadecimal digits."""
    return fingerprint_of_weights(load_pretrained(init_from), ("encoder.", "head."))


def check_ablation_row(row: ResultRow, where: str) -> None:
    """`RowCheck` of an ablation's pretrainings, fine-tunings and evaluations."""
    kind = check(row, {"kind": str}, where)["kind"]
    if kind in (FINETUNE, EVALUATE):
        (check_tuned if kind == FINETUNE else check_evaluated)(row, where)
        return
    check(row, _TRAINED, where)
    if not row["validations"]:
        raise UserError(f"{where} is damaged: validations is empty")
