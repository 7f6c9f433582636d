"""The --out for several tasks: its checks, the options of each task, and the GLUE table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbert.errors import LINE, UserError, about
from fastbert.files import atomic_file, contents
from fastbert.finetuning.mixture_options import MixtureOptions
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.results import read_results
from fastbert.finetuning.table import Summary, glue_lines, glue_table, with_ensembles
from fastbert.finetuning.tasks import is_glue, open_task
from fastbert.inheritance import read_yaml
from fastbert.outputs import check_output_folder, refuse_other_job

TABLE, OPTIONS = "glue.md", "config.yaml"
"""Files in --out, next to the folders of the tasks."""


def write_table(requested: FinetuneOptions, parts: list[FinetuneOptions]) -> None:
    """Writes and prints the results of all tasks."""
    mixture, path = requested.mixture, Path(requested.out) / TABLE
    name = f"{requested.start}, tasks together" if mixture.together and len(parts) > 1 else requested.start
    rows = table_rows(name, [Path(options.out) for options in parts])
    note = "" if mixture.target is None else f"The best epoch is that of {mixture.target}.\n"
    with atomic_file(path, "w") as file:
        file.write(glue_table(rows, requested.seeds) + note)
    print(f"{glue_lines(rows, requested.seeds)}\n{note}\n  {path}")


def check_tasks_folder(requested: FinetuneOptions) -> None:
    """Raises a UserError if --out cannot be written, or contains anything other than the results of several tasks that
    were trained in the same way: together, in stages, or independently."""
    out = Path(requested.out)
    check_output_folder(out)
    if not out.is_dir():
        return
    refuse_other_job(out, "finetune")
    if (out / "manifest.json").is_file():
        raise UserError(f"{out} holds the results of one task; choose another --out for several")
    if not (out / OPTIONS).is_file():
        if contents(out):
            raise UserError(f"{out} is not empty and holds no results of fastbert finetune; choose another --out")
        return
    try:
        values, _ = read_yaml(out / OPTIONS)
    except UserError:  # damaged: it is written anew
        return
    if not isinstance(values, dict) or "together" not in values:
        return
    before, now = way(values), way(vars(requested.mixture))
    if before != now:
        raise UserError(
            f"{out} holds the results of tasks that were trained {before}; choose another --out to train them {now}"
        )


def way(options: Mapping[str, Any]) -> str:
    """Description of how several tasks are trained with these options, to follow "trained"."""
    if options.get("together"):
        return "with --together"
    return "independently" if options.get("stages") is None else "with --stages"


def each_task(
    requested: FinetuneOptions,
    names: Sequence[str],
    check: Callable[[FinetuneOptions], None],
    folder_name: Callable[[int, str], str] = lambda number, task: task,
) -> list[FinetuneOptions]:
    """The options of each task.

    Args:
        check: called with them; may raise UserError.
        folder_name: (number from 1, name of the task) -> name of its folder in --out.

    Raises:
        UserError: lists every task that cannot be trained and why, and the others.
    """
    parts: dict[str, FinetuneOptions] = {}
    problems: dict[str, str] = {}
    for number, name in enumerate(names, 1):
        try:
            its = requested if is_glue(name) else replace(requested, glue_dir=None, glue_subset=False)
            task = open_task(name, glue_dir=its.glue_dir, glue_subset=its.glue_subset)
            if task.name in parts:
                raise UserError(
                    f"a task called {task.name} is given twice; leave one out, or rename one in its YAML file"
                )
            if Path(task.name).name != task.name or task.name.startswith(".") or task.name in (TABLE, OPTIONS):
                raise UserError(f"{task.name!r} is not a name for a folder; rename the task in its YAML file")
            folder = Path(requested.out) / folder_name(number, task.name)
            symmetric = requested.symmetric and task.symmetric and task.is_pair
            options = replace(its, task=name, out=str(folder), symmetric=symmetric, mixture=MixtureOptions())
            check_output_folder(folder)
            check(options)
            parts[task.name] = options
        except UserError as error:
            problems[name] = str(error)
    if problems:
        lines = LINE.join(about(name, problem) for name, problem in problems.items())
        rest = ",".join(name for name in names if name not in problems)
        option = "--task" if requested.mixture.stages is None else "--stages"
        remedy = f"{LINE}Fix that, or train the others: {option} {rest}" if rest else ""
        raise UserError(f"{len(problems)} of {len(names)} tasks cannot be trained:{LINE}{lines}{remedy}")
    if requested.symmetric and not any(options.symmetric for options in parts.values()):
        raise UserError("the order of the texts matters in all of these tasks: leave --symmetric out")
    return list(parts.values())


def table_rows(model: str, folders: list[Path]) -> dict[str, Mapping[str, Summary]]:
    """Rows of the table from the results in `folders`: one for each fraction of the training splits, and one for its
    ensemble of seeds."""
    rows: dict[str, dict[str, Summary]] = {}
    ensembles: dict[str, dict[str, Any]] = {}
    for folder in folders:
        results = read_results(folder)
        for part in results["fractions"]:
            name = model + ("" if part["fraction"] == 1.0 else f", {100 * part['fraction']:g} % of train")
            rows.setdefault(name, {})[results["task"]] = part["summary"]["best"]
            ensembles.setdefault(name, {})[results["task"]] = part.get("ensemble")
    return with_ensembles(rows, ensembles)
