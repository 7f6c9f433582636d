"""`fastbert finetune` for several tasks: one after the other, each in its folder; then the GLUE table.

out/config.yaml   the options
out/<task>/       the output for one task, see finetune.py
out/glue.md       the table
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbert.config import from_dict, to_dict
from fastbert.errors import LINE, UserError
from fastbert.files import atomic_file, contents
from fastbert.finetuning.finetune import finetune
from fastbert.finetuning.folder import check_results_folder, write_options
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.results import read_results
from fastbert.finetuning.setup import describe_finetuning, open_encoder, prepare_finetuning
from fastbert.finetuning.table import Summary, glue_lines, glue_table, with_ensembles
from fastbert.finetuning.tasks import is_glue, open_task, task_names
from fastbert.outputs import check_output_folder
from fastbert.streams import echo
from fastbert.training.launch import join

TABLE = "glue.md"


def finetune_tasks(requested: FinetuneOptions) -> int:
    """Trains one task or several; returns the exit code. Under torchrun, every process calls this function.

    Another call with the same --out trains what is missing: interrupted seeds and additional tasks.

    Raises:
        UserError: any user error, before the first task is trained if possible.
    """
    names = task_names(requested.task)
    with join(requested.machine.timeout) as world:
        if names is None:
            return finetune(requested, world)
        begun = world.first_decides(lambda: begin(requested, names))
        parts = [from_dict(FinetuneOptions, part, "the options of a task") for part in begun]
        for number, options in enumerate(parts, 1):
            echo(f"task {number} of {len(parts)}: {options.task}")
            code = finetune(options, world)
            if code:
                return code
        if world.first:
            write_table(requested, parts)
    return 0


def begin(requested: FinetuneOptions, names: list[str]) -> list[dict[str, Any]]:
    """Checks everything, writes the options to --out, and returns those of each task, for JSON."""
    requested.check_inputs()
    out = Path(requested.out)
    check_tasks_folder(out)
    parts = check_tasks(requested, names)
    write_options(out, requested)
    return [to_dict(options) for options in parts]


def write_table(requested: FinetuneOptions, parts: list[FinetuneOptions]) -> None:
    """Writes and prints the results of all tasks."""
    path, rows = Path(requested.out) / TABLE, table_rows(requested.start, [Path(options.out) for options in parts])
    with atomic_file(path, "w") as file:
        file.write(glue_table(rows, requested.seeds))
    print(f"{glue_lines(rows, requested.seeds)}\n\n  {path}")


def check_tasks_folder(out: Path) -> None:
    """Raises a UserError if `out` cannot be written, or contains anything other than the results of several tasks."""
    check_output_folder(out)
    if not out.is_dir():
        return
    if (out / "manifest.json").is_file():
        raise UserError(f"{out} holds the results of one task; choose another --out for several")
    if not (out / "config.yaml").is_file() and contents(out):
        raise UserError(f"{out} is not empty and holds no results of fastbert finetune; choose another --out")


def check_tasks(requested: FinetuneOptions, names: list[str]) -> list[FinetuneOptions]:
    """Options of each task. Reads all model and task files once, since the last task may start hours later.

    Raises:
        UserError: lists every task that cannot be trained and why, and the others.
    """
    open_encoder(requested)
    parts: dict[str, FinetuneOptions] = {}
    problems: dict[str, str] = {}
    for name in names:
        try:
            its = requested if is_glue(name) else replace(requested, glue_dir=None, glue_subset=False)
            task = open_task(name, glue_dir=its.glue_dir, glue_subset=its.glue_subset)
            if task.name in parts:
                raise UserError(
                    f"a task called {task.name} is given twice; leave one out, or rename one in its YAML file"
                )
            if Path(task.name).name != task.name:
                raise UserError(f"{task.name!r} is not a name for a folder; rename the task in its YAML file")
            folder = Path(requested.out) / task.name
            symmetric = requested.symmetric and task.symmetric and task.is_pair
            options = replace(its, task=name, out=str(folder), symmetric=symmetric)
            check_output_folder(folder)
            setup = prepare_finetuning(options)
            if folder.is_dir():
                check_results_folder(folder, setup, describe_finetuning(setup))
            parts[task.name] = options
        except UserError as error:
            problems[name] = str(error)
    if problems:
        lines = LINE.join(f"{name}: {problem}" for name, problem in problems.items())
        rest = ",".join(name for name in names if name not in problems)
        remedy = f"{LINE}Fix that, or train the others: --task {rest}" if rest else ""
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
