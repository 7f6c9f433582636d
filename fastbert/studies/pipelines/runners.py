"""Runners of a pipeline's jobs: each calls the function of the command that the report shows for it."""

import os
import shlex
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbert.config import from_dict
from fastbert.data.prepare import PrepareOptions, prepare
from fastbert.data.shards import read_record
from fastbert.files import make_folder, remove
from fastbert.finetuning.dev_ensemble import ensemble_figures
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.results import finished, read_results
from fastbert.finetuning.tasks import open_task
from fastbert.finetuning.together import finetune_together
from fastbert.pretraining.branch import branch_defaults
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.pretrain import pretrain
from fastbert.pretraining.run import stored_options
from fastbert.records import write_json
from fastbert.studies.engine.outcomes import ended, failure
from fastbert.studies.pipelines.options import BRACES
from fastbert.studies.shared.evaluate_jobs import evaluate_job
from fastbert.studies.shared.pretrain_jobs import trained_outcome
from fastbert.training.world import ONE_PROCESS

NO_PRECISION = "–"
# Runs the line $1 in the shell. Standard input is a pipe from this process: a background process of the same group
# waits for its end, which comes with that of this process, however it ends, and kills the group.
_IN_GROUP = """
exec 3<&0 </dev/null
( (read -r _; kill -s KILL 0) <&3 3<&- & )
exec sh -c "$1" 3<&-
"""


def prepare_job(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """`JobRunner` of prepared data: continues a call that was killed."""
    prepare(from_dict(PrepareOptions, job["options"] | {"out": str(out)}, "the pipeline's job"))
    record = read_record(out)
    splits = {
        name: {"documents": split["documents"], "tokens": split["tokens"]} for name, split in record["splits"].items()
    }
    return {"status": "done", "precision": NO_PRECISION, "result": {"splits": splits}}


def pretrain_job(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """`JobRunner` of a pretraining: trains or resumes, to the end."""
    if not _begun(out):
        options = from_dict(PretrainOptions, job["options"] | {"out": str(out)}, "the pipeline's job")
        return _trained(options, out)
    return _resumed(out)


def branch_job(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """`JobRunner` of a branch of another pretraining."""
    if not _begun(out):
        options = replace(branch_defaults(job["options"]["branch"]), **job["options"], out=str(out))
        return _trained(options, out)
    return _resumed(out)


def _begun(out: Path) -> bool:
    """True if there is a run to resume; otherwise removes the rest of one that was stopped before its first step."""
    begun = (out / "manifest.json").is_file()  # written after the options
    if not begun:
        remove(out)
    return begun


def _resumed(out: Path) -> dict[str, Any]:
    return _trained(replace(stored_options(str(out)), out=str(out), resume=True), out)


def _trained(options: PretrainOptions, out: Path) -> dict[str, Any]:
    code = pretrain(options, "run")
    return ended(code) if code else trained_outcome(out, options.objective)


def together_job(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """`JobRunner` of a fine-tuning on several tasks together; the result has each of them by its name in tables."""
    values = {name: value for name, value in job["options"].items() if name != "columns"}
    code = finetune_together(from_dict(FinetuneOptions, values | {"out": str(out)}, "the pipeline's job"), ONE_PROCESS)
    if code:
        return ended(code)
    tasks, precision = {}, NO_PRECISION
    for column, task in job["options"]["columns"].items():
        results = read_results(out / task)
        precision = results["precision"]
        figures = results["fractions"][0]["seeds"][0]
        figures = {name: value for name, value in figures.items() if name not in ("seed", "model")}
        tasks[column] = {"metrics": results["metrics"], **figures}
    return {"status": "done", "precision": precision, "result": {"tasks": tasks}}


def ensemble_job(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """`JobRunner` of the ensemble of several seeds: the mean of their scores on dev."""
    options = from_dict(FinetuneOptions, job["options"]["finetune"], "the pipeline's job")
    task = open_task(
        options.task,
        glue_dir=options.glue_dir,
        custom=options.custom,
        glue_subset=options.glue_subset,
        slices=options.slices,
    )
    labels = {split: [example.label for example in task.examples(split)] for split in task.dev_splits}
    folders = [Path(folder) for folder in job["options"]["folders"]]
    for folder in folders:
        if finished(folder, task.metrics) is None:
            return failure(f"{folder} holds no finished training", "run it again")
    figures = ensemble_figures(task, labels, folders)
    if figures is None:
        return failure(f"a seed below {folders[0].parent} has no scores on dev", "remove its folder, and run it again")
    write_figures(out, {"metrics": list(task.metrics), "ensemble": figures})
    return {
        "status": "done",
        "precision": NO_PRECISION,
        "metrics": list(task.metrics),
        "result": {"ensemble": figures},
    }


def evaluation_job(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """`JobRunner` of an evaluation, which also writes its figures into its folder."""
    outcome = evaluate_job(job, out)
    if outcome["status"] == "done":
        write_figures(out, outcome["result"])
    return outcome


def write_figures(out: Path, figures: dict[str, Any]) -> None:
    """Writes results.json, so that a command finds figures in the folder of every job."""
    make_folder(out)
    write_json(out / "results.json", figures)


def command_job(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """`JobRunner` of a command of the user: a line for the shell. All processes that it starts end with it, and with
    this process."""
    if not job["options"]["resumes"]:
        remove(out)  # of an attempt that was stopped
    make_folder(out)
    line = command_line(job["options"]["run"], job["options"]["folders"], out)
    print(line, flush=True)
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(["sh", "-c", _IN_GROUP, "sh", line], stdin=reading, start_new_session=True)
        os.close(reading)
        code = process.wait()
    finally:
        os.close(writing)
    if code:
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return failure(f"the command ended {how}", "see its log")
    return {"status": "done", "precision": NO_PRECISION, "result": {"exit_code": 0}}


def command_line(run: str, folders: Mapping[str, list[str]], out: Path | str) -> str:
    """The command with folders instead of names in braces."""
    given = {**folders, "out": [str(out)]}
    return BRACES.sub(lambda found: shlex.join(given[found[1]]) if found[1] in given else found[0], run)
