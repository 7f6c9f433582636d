"""Reads the YAML file of a pipeline, strictly: every entry is checked against the options of its job."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastbert.config import from_dict, to_dict, with_underscores
from fastbert.data.prepare import PrepareOptions
from fastbert.errors import UserError, brief, closest, nearest
from fastbert.finetuning.mixture_options import MixtureOptions
from fastbert.finetuning.options import FinetuneOptions
from fastbert.inheritance import merged, read_yaml
from fastbert.named_configs import config_path
from fastbert.pretraining.options import BUDGETS, LAUNCH, PretrainOptions
from fastbert.ranges import LONGEST_NAME, Workers, text_problem
from fastbert.studies.pipelines.options import BRACES, Command, DataEntry, EncoderEntry, RunOptions, Stage
from fastbert.studies.pipelines.pipeline import Pipeline
from fastbert.studies.shared.grid import (
    AXES,
    Repeats,
    StudyGrid,
    check_keys,
    format_option,
    prefixed,
    read_axis,
    read_count,
    read_evaluate,
    read_finetune,
    read_mapping,
    read_seeds,
    read_task,
    refuse_too_many,
)

EVALUATIONS = ("pairs", "pll")
_PARTS = ("data", "models", "stages", "evaluate", "commands", "report", "threads", "finetune")
_JOB = "a job of a pipeline is one process; give workers and backend at the top"
_RESERVED = {
    "seed": "give seeds",
    "out": "the folder of a job is inside that of the pipeline; give --out",
    "minutes": "a budget in minutes depends on the load of the machine; give steps or tokens",
    "resume": "the same command resumes a stopped pipeline",
    "init_from": "give after: another model of the file, or a model with a path",
    "anneal": "give it with branch: model@step",
    **dict.fromkeys(("dry_run", "profile"), "it is for a single run"),
    **dict.fromkeys(LAUNCH, _JOB),
}
_MODEL = ("name", "like", "pretrain", "path", "after", "branch", "seeds")
_BRANCH = ("anneal", "steps")
_MIXTURE = ("target", "weights", "temperature")
_STAGE = ("name", "tasks", "after", "together", "seeds", "models", *_MIXTURE, *AXES)
_REFUSED = {
    "stages": "give a second stage with after: and the name of the first",
    "then_single": "give a second stage with after: and the name of the first",
    "save_model": "give keep next to stages",
    "mixture": "give together, target, weights and temperature in the entry of a stage",
}


def load_pipeline(path: str | Path) -> tuple[Pipeline, RunOptions]:
    """Reads a YAML file: the pipeline, and the values of flags that the file sets.

    Raises:
        UserError: states the file, the entry, and what is expected.
    """
    values, where = read_yaml(path)
    values = read_mapping(values, where, "models, and stages, evaluate or commands")
    values = {key: value for key, value in values.items() if value is not None}  # all its entries are comments
    flags = {f.name for f in fields(RunOptions)} - {"dry_run", "only", "until"}
    check_keys(values, {*_PARTS, *flags}, where, "finetune", {f.name for f in fields(FinetuneOptions)}, {})
    options = from_dict(RunOptions, {key: value for key, value in values.items() if key in flags}, where)
    threads = read_count(values, "threads", where, Workers)
    data = _read_data(values.get("data", {}), f"{where}: data")
    models = _read_models(values.get("models"), threads, f"{where}: models")
    finetune = read_finetune(values.get("finetune", {}), f"{where}: finetune")
    stages = _read_stages(values.get("stages", []), finetune, threads, str(path), f"{where}: stages")
    evaluate = _read_evaluations(values.get("evaluate"), threads, f"{where}: evaluate")
    if finetune and not stages:
        raise UserError(f"{where}: finetune needs fine-tuning, but there are no stages; add stages, or leave it out")
    names = [*data, *models, *stages]
    commands = _read_commands(values.get("commands", []), {*names, *evaluate}, f"{where}: commands")
    _refuse_repeated([*names, *commands], where)
    report = read_mapping(values.get("report", {}), f"{where}: report", "baseline")
    check_keys(report, {"baseline"}, f"{where}: report", "", set(), {})
    baseline = _text(report, "baseline", f"{where}: report") or next(iter(models))
    if baseline not in models:
        raise UserError(f"{where}: report: baseline: there is no model {brief(baseline)}; {nearest(baseline, models)}")
    pipeline = Pipeline(str(path), data, models, stages, evaluate, commands, baseline, threads)
    _check_references(pipeline, where)
    refuse_too_many(sum(_trainings(stage, models) for stage in stages.values()), where)
    return pipeline, options


def _trainings(stage: Stage, models: Mapping[str, EncoderEntry]) -> int:
    seeds = sum(len(model.seeds) for name, model in models.items() if stage.models is None or name in stage.models)
    settings = [len(task.settings) for task in stage.tasks]
    return seeds * stage.trials * (settings[0] if stage.together else sum(settings))


# --- names


def _name(value: Any, where: str) -> str:
    """A name for an entry, which is also one for folders and flags."""
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: expected a name, found {format_option(value)}")
    if value.startswith("-"):
        raise UserError(f"{where}: the name {brief(value)} begins with -, like a flag; choose another")
    if problem := text_problem(value):
        raise UserError(f"{where}: the name {problem}")
    if value in (*EVALUATIONS, "out") or set(value) & set(",@{}/\\\"'") or value != value.strip():
        raise UserError(
            f"{where}: {brief(value)} is not a name for an entry: it must not be pairs, pll or out, must have none of "
            ", @ { } / \\ and quotes, and no space around it"
        )
    return value


def _refuse_repeated(names: Iterable[str], where: str) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise UserError(f"{where}: two entries are called {brief(name, str)}; give one of them another name")
        seen.add(name)


def _entries(values: Any, where: str) -> list[dict[str, Any]]:
    """Mappings with a name, from a list."""
    if not isinstance(values, list):
        raise UserError(f"{where} must be a list, found {format_option(values)}")
    found = []
    for number, entry in enumerate(values, 1):
        if not isinstance(entry, dict):
            raise UserError(f"{where}: entry {number} must be a mapping with a name, found {format_option(entry)}")
        entry = read_mapping(entry, f"{where}: entry {number}", "a name")
        if "name" not in entry:
            raise UserError(f"{where}: entry {number} has no name; give it one")
        found.append(entry | {"name": _name(entry["name"], where)})
    _refuse_repeated([entry["name"] for entry in found], where)
    return found


def _text(values: Mapping[str, Any], key: str, where: str) -> str | None:
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} must be text, found {format_option(value)}")
    if problem := text_problem(value):
        raise UserError(f"{where}: {key} {problem}")
    return value


def _shell_text(value: Any, where: str) -> str:
    """One line or several for the shell, of any length; empty if there is none."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where} must be text, found {format_option(value)}")
    for word in value.split():
        pieces = (word[at : at + LONGEST_NAME // 4] for at in range(0, len(word), LONGEST_NAME // 4))
        if problem := next(filter(None, map(text_problem, pieces)), None):
            raise UserError(f"{where} {problem}")
    return value.strip()


def _names(value: Any, where: str) -> tuple[str, ...]:
    """One name or a list of names."""
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise UserError(f"{where} must be a name or a list of names, found {format_option(value)}")
    return tuple(dict.fromkeys(value))


# --- data and models


def _read_data(values: Any, where: str) -> dict[str, DataEntry]:
    entries: dict[str, DataEntry] = {}
    if not isinstance(values, dict):
        found = format_option(values)
        raise UserError(f"{where} must be a mapping of names to options of fastbert prepare, found {found}")
    for name, given in values.items():
        here = f"{where}: {brief(name, str)}"
        _name(name, where)
        options = {"source": given} if isinstance(given, str) else read_mapping(given, here, "a source")
        if "out" in options:
            raise UserError(f"{here}: out cannot be given here; the folder of a job is inside that of the pipeline")
        if "part" in options:
            raise UserError(f"{here}: part cannot be given here, since a pipeline prepares the whole source in one job")
        from_dict(PrepareOptions, {**options, "out": "data"}, here)
        entries[name] = DataEntry(name, options)
    return entries


def _read_models(values: Any, threads: int, where: str) -> dict[str, EncoderEntry]:
    found: dict[str, EncoderEntry] = {}
    written: dict[str, dict[str, Any]] = {}
    for entry in _entries(values, where) if values else []:
        name, here = entry["name"], f"{where}: {entry['name']}"
        if (like := _text(entry, "like", here)) is not None:
            if like not in written:
                raise UserError(f"{here}: like: there is no model {brief(like)} above it; {nearest(like, written)}")
            over = {key: value for key, value in entry.items() if key != "like"}
            base = written[like]
            if _budget(over):
                base = {key: value for key, value in base.items() if key not in BUDGETS}
            entry = merged(base, over)
        written[name] = entry
        with prefixed(here):
            found[name] = _read_model(name, entry, threads)
    if not found:
        raise UserError(f"{where}: give at least one model: {{name: base, pretrain: small, data: ...}}")
    return found


def _budget(values: Mapping[str, Any]) -> bool:
    return any(values.get(name) is not None for name in BUDGETS)


def _read_model(name: str, entry: dict[str, Any], threads: int) -> EncoderEntry:
    where = "pretrain"
    given = {key: value for key, value in entry.items() if key not in _MODEL}
    path, branch, after = (_text(entry, key, where) for key in ("path", "branch", "after"))
    if path is not None:
        if others := sorted({*given, *(key for key in ("pretrain", "after", "branch", "seeds") if key in entry)}):
            raise UserError(f"an existing checkpoint (path) takes no {others[0]}; leave it out, or leave path out")
        return EncoderEntry(name, (None,), {}, path=path)
    seeds = read_seeds(entry.get("seeds", 1), where)
    if branch is not None:
        return _read_branch(name, entry, given, branch, seeds)
    file = _text(entry, "pretrain", where)
    base: dict[str, Any] = {}
    if file is not None:
        values, where = read_yaml(config_path("pretrain", file))
        base = read_mapping(values, where, "options of fastbert pretrain")
    if _budget(given):
        base = {key: value for key, value in base.items() if key not in BUDGETS}
    for key in given:
        if key in _RESERVED:
            raise UserError(f"{key} cannot be given here; {_RESERVED[key]}")
    values = merged(base, given)
    machine = values.get("machine", {})
    if isinstance(machine, dict):
        if isinstance(given.get("machine"), dict) and "threads" in given["machine"]:
            raise UserError("machine: threads cannot be given here; give threads next to models, for all jobs")
        values["machine"] = {**machine, "threads": threads}
    values = {key: value for key, value in values.items() if key not in ("seed", "out")}
    known = set(to_dict(PretrainOptions()))
    check_keys(given, {*known, *_MODEL}, where, "", set(), {})
    options = from_dict(PretrainOptions, values, where)
    if options.minutes is not None:
        raise UserError(f"minutes cannot be given here; {_RESERVED['minutes']}")
    if (options.steps is None) == (options.tokens is None):
        raise UserError("give the budget of the pretraining: steps or tokens")
    if after is not None and options.init_from is not None:
        raise UserError(f"after is the model to start from, and so is init_from in {file}; leave one of them out")
    return EncoderEntry(name, seeds, values, options, after=after)


def _read_branch(
    name: str, entry: Mapping[str, Any], given: Mapping[str, Any], branch: str, seeds: tuple[int, ...]
) -> EncoderEntry:
    if others := [key for key in ("pretrain", "after") if key in entry]:
        raise UserError(f"a branch has the options of the model that it begins with; leave {others[0]} out")
    for key in given:
        if key not in _BRANCH:
            raise UserError(f"a branch has the options of the model that it begins with; leave {brief(key, str)} out")
    model, at, step = branch.partition("@")
    if at and not re.fullmatch(r"[1-9][0-9]{0,9}", step):
        raise UserError(f"branch must be a model, or model@step such as base@2000, not {brief(branch)}")
    # `PretrainOptions` checks that one of anneal and steps is given, and its range.
    from_dict(PretrainOptions, {"branch": branch, **given}, "branch")
    return EncoderEntry(name, seeds, given, branch=model, step=int(step) if at else None)


# --- stages, evaluations and commands


def _read_stages(values: Any, finetune: dict[str, Any], threads: int, path: str, where: str) -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    for entry in _entries(values, where):
        name = entry["name"]
        found[name] = _read_stage(name, entry, finetune, threads, path, f"{where}: {name}")
    return found


def _read_stage(
    name: str, entry: dict[str, Any], finetune: dict[str, Any], threads: int, path: str, where: str
) -> Stage:
    for key in entry:
        if key in _REFUSED:
            raise UserError(f"{where}: {key} cannot be given here; {_REFUSED[key]}")
    own = read_finetune({key: value for key, value in entry.items() if key not in _STAGE}, where, _STAGE)
    common = merged(finetune, own)
    axes = {axis: read_axis(entry[axis], axis, where) for axis in AXES if axis in entry}
    tasks = entry.get("tasks")
    tasks = [tasks] if isinstance(tasks, str) else tasks
    if not isinstance(tasks, list) or not tasks:
        raise UserError(f"{where}: tasks must be a list of GLUE tasks and YAML files, found {format_option(tasks)}")
    entries = tuple(read_task(task, axes, common, where) for task in tasks)
    for group in (common, *(entry.overrides for entry in entries)):
        for key in ("save_model", "mixture"):
            if key in group:
                raise UserError(f"{where}: {key} cannot be given for single jobs; {_REFUSED[key]}")
    together = entry.get("together", False)
    if type(together) is not bool:
        raise UserError(f"{where}: together must be true or false, found {format_option(together)}")
    mixture = {key: entry[key] for key in _MIXTURE if key in entry}
    checked = from_dict(MixtureOptions, {**mixture, "together": together}, where)
    if together and any(task.overrides or task.name or task.settings != entries[0].settings for task in entries):
        raise UserError(
            f"{where}: tasks that are trained together have common options; give them next to tasks, and the names of "
            "the tasks alone"
        )
    trials = read_count(entry, "seeds", where, Repeats)
    models = _names(entry["models"], f"{where}: models") if "models" in entry else None
    grid = StudyGrid((), entries, (), threads, common, {}, path)
    mixture = {key: getattr(checked, key) for key in mixture}
    return Stage(name, entries, grid, trials, _text(entry, "after", where), together, mixture, models)


def _read_evaluations(values: Any, threads: int, where: str) -> dict[str, Any]:
    """Evaluations from a mapping, as in a sweep, or from a list of mappings."""
    if values is None:
        return {}
    joined: dict[str, Any] = {}
    for entry in values if isinstance(values, list) else [values]:
        if not isinstance(entry, dict):
            raise UserError(f"{where}: expected a mapping such as {{pairs: blimp}}, found {format_option(entry)}")
        for key, value in with_underscores(entry, where).items():
            if key in joined and joined[key] != value:
                raise UserError(f"{where}: {brief(key, str)} is given twice; a pipeline has one evaluation of a kind")
            joined[key] = value
    return read_evaluate(joined, threads, where)


def _read_commands(values: Any, names: set[str], where: str) -> dict[str, Command]:
    found: dict[str, Command] = {}
    entries = _entries(values, where)
    below = {entry["name"] for entry in entries}
    for entry in entries:
        name, here = entry["name"], f"{where}: {entry['name']}"
        check_keys(entry, {"name", "run", "after", "resumes"}, here, "", set(), {})
        run = _shell_text(entry.get("run"), f"{here}: run")
        if not run:
            raise UserError(f"{here}: run is missing: a line for the shell, such as 'python plot.py {{base}} {{out}}'")
        after = _names(entry["after"], f"{here}: after") if "after" in entry else ()
        known = names | set(found)
        braces = [one for one in BRACES.findall(run) if one != "out"]
        for one in (*after, *(one for one in braces if one in below)):
            if one in below - known:
                raise UserError(f"{here}: it needs {brief(one)}; put that command above it")
            if one not in known:
                raise UserError(f"{here}: after: there is no {brief(one)}; {nearest(one, known)}")
        for one in braces:
            if one not in known and (close := closest(one, known, likeness=0.75)):
                raise UserError(
                    f"{here}: {{{brief(one, str)}}} in the line is no name of this file; did you mean {close!r}?"
                )
        if not isinstance(resumes := entry.get("resumes", False), bool):
            raise UserError(f"{here}: resumes must be true or false, not {brief(resumes)}")
        inside = [one for one in braces if one in known]
        found[name] = Command(name, run, tuple(dict.fromkeys([*after, *inside])), resumes)
    return found


# --- references


def _check_references(pipeline: Pipeline, where: str) -> None:
    """Raises a UserError if an entry names another one that does not exist, or that does not fit."""
    models, stages = pipeline.models, pipeline.stages
    above: dict[str, EncoderEntry] = {}
    for name, model in models.items():
        for key, other in (("after", model.after), ("branch", model.branch)):
            if other is None:
                continue
            if other not in above:
                raise UserError(
                    f"{where}: models: {name}: {key}: there is no model {brief(other)} above it; "
                    f"{nearest(other, above)}"
                )
            parent = above[other]
            if key == "branch" and parent.path is not None:
                raise UserError(f"{where}: models: {name}: {other} has a path: only a model of this file has branches")
            if parent.path is None and (missing := [seed for seed in model.seeds if seed not in parent.seeds]):
                raise UserError(
                    f"{where}: models: {name}: each seed starts from the same seed of {other}, which has no seed "
                    f"{missing[0]}; give both the same seeds"
                )
        above[name] = model
    for name, data in pipeline.data.items():
        tokenizer = data.options.get("tokenizer")
        if tokenizer == name:
            raise UserError(f"{where}: data: {name}: its tokenizer is its own; leave tokenizer out")
    before: dict[str, Stage] = {}
    for name, stage in stages.items():
        here = f"{where}: stages: {name}"
        for model in stage.models or ():
            if model not in models:
                raise UserError(f"{here}: models: there is no model {brief(model)}; {nearest(model, models)}")
        if stage.after is not None:
            if stage.after not in before:
                raise UserError(f"{here}: after: there is no stage {brief(stage.after)} above it")
            _check_follows(stage, before[stage.after], here)
        before[name] = stage


def _check_follows(stage: Stage, parent: Stage, where: str) -> None:
    """Raises a UserError unless each fine-tuning of a stage has one encoder of the stage before to start from."""
    if not parent.together and len(parent.tasks) > 1:
        raise UserError(
            f"{where}: after: {parent.name} has {len(parent.tasks)} tasks, each with an encoder of its own; give one "
            "task there, or together: true"
        )
    if len(parent.tasks[0].settings) > 1:
        raise UserError(
            f"{where}: after: {parent.name} has {len(parent.tasks[0].settings)} settings, and the encoder to start "
            "from must be one; give one learning rate, batch size and number of epochs there"
        )
    if parent.trials not in (1, stage.trials):
        raise UserError(
            f"{where}: after: {parent.name} has {parent.trials} seeds and {stage.name} {stage.trials}; give both the "
            f"same number, or {parent.name} one"
        )
    if parent.models is not None and not set(stage.models or [""]) <= set(parent.models):
        raise UserError(
            f"{where}: after: {parent.name} is for the models {', '.join(parent.models)} only; give models here too"
        )
