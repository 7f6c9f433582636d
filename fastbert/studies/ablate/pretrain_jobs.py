"""Pretraining job of an ablation: runs or resumes `fastbert pretrain`, and returns a row of results.

A branch starts as a folder with a checkpoint of another run and its own schedule, and is then resumed
(fastbert/pretraining/branch.py).
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbert.config import from_dict
from fastbert.data.shards import open_dataset
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
from fastbert.studies.shared.pretrain_jobs import BRANCH, check_trained, initial_weights, trained_outcome
from fastbert.training.splits import named_folders

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
    return trained_outcome(out, options.objective, {PREFIX + name: name for name in fixed})


def check_ablation_row(row: ResultRow, where: str) -> None:
    """`RowCheck` of an ablation's pretrainings, fine-tunings and evaluations."""
    kind = check(row, {"kind": str}, where)["kind"]
    if kind in (FINETUNE, EVALUATE):
        (check_tuned if kind == FINETUNE else check_evaluated)(row, where)
        return
    check_trained(row, where)
