"""The command line that repeats a job of a pipeline alone."""

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, replace
from types import MappingProxyType
from typing import Any

from fastbert.config import from_dict
from fastbert.data.prepare import PrepareOptions
from fastbert.finetuning.options import FinetuneOptions, PredictOptions
from fastbert.flags import Flag, flags_of
from fastbert.pretraining.evaluate_options import EvaluateOptions
from fastbert.pretraining.options import PretrainOptions
from fastbert.studies.engine.jobs import Job
from fastbert.studies.pipelines.graph import COMMAND, PREPARE
from fastbert.studies.pipelines.runners import command_line
from fastbert.studies.pipelines.tunings import ENSEMBLE, TOGETHER
from fastbert.studies.shared.evaluate_jobs import EVALUATE
from fastbert.studies.shared.finetune_jobs import FINETUNE
from fastbert.studies.shared.pretrain_jobs import BRANCH, PRETRAIN

_JOBS = {
    PREPARE: ("prepare", PrepareOptions),
    PRETRAIN: ("pretrain", PretrainOptions),
    FINETUNE: ("finetune", FinetuneOptions),
    TOGETHER: ("finetune", FinetuneOptions),
    EVALUATE: ("evaluate", EvaluateOptions),
}
"""Kind of a job -> its command and options."""


def repeated(job: str) -> str:
    """Folder in which the command of a job writes."""
    return f"repeated/{job}"


def command_of(job: Job, moved: Mapping[str, str] = MappingProxyType({})) -> str:
    """A line for the shell that does what a job does, with what earlier jobs wrote, in a folder of its own.

    Args:
        moved: folder of an earlier job -> the folder to read instead.
    """
    job = replace(job, options=_moved(job.options, moved))
    out = repeated(job.id)
    if job.kind == COMMAND:
        return f"mkdir -p {out} && {command_line(job.options['run'], job.options['folders'], out)}"
    if job.kind == BRANCH:
        given = [f"--{name} {shlex.quote(str(value))}" for name, value in job.options.items()]
        return " ".join(["fastbert pretrain", *given, f"--out {out}"])
    if job.kind == ENSEMBLE:
        options = from_dict(FinetuneOptions, job.options["finetune"], "the pipeline's job")
        shared = {name: getattr(options, name) for name in ("task", "glue_dir", "glue_subset", "machine")}
        predict = PredictOptions(model=",".join(job.options["folders"]), out=f"{out}/predictions.jsonl", **shared)
        return f"mkdir -p {out} && {shlex.join(['fastbert', 'predict', *flags(predict)])}"
    name, cls = _JOBS[job.kind]
    values = {key: value for key, value in job.options.items() if key not in ("columns", "save_model")}
    if name != "evaluate":
        values["out"] = out
    return shlex.join(["fastbert", name, *flags(from_dict(cls, values, "the pipeline's job"))])


def flags(options: Any) -> list[str]:
    """The flags with which a command has these options: all that differ from the defaults."""
    found = []
    for flag in flags_of(type(options)):
        value, default = options, _default(flag, options)
        for name in flag.path:
            value = getattr(value, name)
        if value == default:
            continue
        if flag.is_switch:
            found.append(f"--{flag.name if value else flag.negation}")
        else:
            found += [f"--{flag.name}", _text(value)]
    return found


def _default(flag: Flag, options: Any) -> Any:
    """The default of an option; MISSING if it is required. A group may have other defaults than its class."""
    parent: Any = type(options)
    for name in flag.path[:-1]:
        field = parent.__dataclass_fields__[name] if isinstance(parent, type) else None
        parent = field.default_factory() if field is not None else getattr(parent, name)
    if not isinstance(parent, type):
        return getattr(parent, flag.path[-1])
    field = parent.__dataclass_fields__[flag.path[-1]]
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _moved(value: Any, moved: Mapping[str, str]) -> Any:
    """A value of JSON, with other folders at the beginning of paths."""
    if isinstance(value, str):
        for old, new in moved.items():
            value = new + value.removeprefix(old) if value.startswith(f"{old}/") else value
        return value
    if isinstance(value, list):
        return [_moved(each, moved) for each in value]
    return {key: _moved(each, moved) for key, each in value.items()} if isinstance(value, dict) else value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)
