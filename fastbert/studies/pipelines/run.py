"""`fastbert run`: runs the graph of a pipeline and writes one report.

out/pipeline.json    the entries of the file, and the ids of their jobs
out/results.jsonl    one object per job that has ended; the file is rewritten whenever a job ends
out/jobs/<id>/       log.txt, and run/ as written by the command of the job
out/report/          report.md, report.html, plots
"""

from pathlib import Path
from typing import Any

from fastbert.config import differences, leaves
from fastbert.errors import UserError, plural
from fastbert.files import locked_folder
from fastbert.records import check
from fastbert.streams import echo
from fastbert.studies.engine.backends import start
from fastbert.studies.engine.events import run_events
from fastbert.studies.engine.jobs import Job, title
from fastbert.studies.engine.live_status import LiveStatus
from fastbert.studies.engine.outcomes import LOG
from fastbert.studies.engine.store import JOBS, ResultRow, ResultStore
from fastbert.studies.pipelines.graph import COMMAND, PREPARE, Graph, ancestors
from fastbert.studies.pipelines.lost import rerun_lost
from fastbert.studies.pipelines.options import RunOptions
from fastbert.studies.pipelines.pipeline import Pipeline
from fastbert.studies.pipelines.plan_text import planned_text
from fastbert.studies.pipelines.remove_models import remove_models
from fastbert.studies.pipelines.report import report_pipeline
from fastbert.studies.pipelines.tunings import ENSEMBLE, TOGETHER
from fastbert.studies.shared.comparison import mean_of_splits, scored
from fastbert.studies.shared.evaluate_jobs import EVALUATE, check_evaluated
from fastbert.studies.shared.finetune_jobs import FINETUNE, check_tuned
from fastbert.studies.shared.pretrain_jobs import BRANCH, PRETRAIN, check_trained

PIPELINE = "pipeline"
MOST_SHOWN = 12  # changes of the file


def run_pipeline(pipeline: Pipeline, options: RunOptions) -> int:
    """Runs the jobs that are not done yet, then writes and prints the report.

    Returns:
        0, or 1 if a job failed; 130 or 143 after a signal: the report then covers the jobs that are done, and the same
        command resumes the pipeline.

    Raises:
        UserError: invalid input; raised before the first job wherever it can be detected there.
    """
    out = Path(options.out or f"runs/{Path(pipeline.path).stem}")
    if options.dry_run:
        return show_plan(pipeline, options, out)
    with locked_folder(out):
        store = ResultStore(out, PIPELINE, check_pipeline_row)
        graph, selected = planned_graph(pipeline, options, out)
        before = store.described()
        description = describe_pipeline(pipeline)
        same_file = before.get("axes", {}).get("file") == description["file"]
        store.begin(description, graph.jobs, may_differ=same_file)
        rerun_lost(graph, store)
        for line in changed_lines(graph, before, description):
            echo(line)
        echo(f"{counted(graph)}{store.done_before}")
        for line in graph.left_out:
            echo(line)
        check_only(graph, store, selected)
        wanted = {job.id for job in selected}
        remaining = [job for job in store.remaining if job.id in wanted]
        stopped = 0
        if remaining:
            for job in remaining:
                store.rows.pop(job.id, None)  # it failed before; jobs that depend on it wait for it again
            echo(f"log of a running job: {out / JOBS / '<id>' / LOG}")
            live = LiveStatus(selected, store.rows, measured)
            events = start(options, remaining, store, pipeline.threads, in_place=True)
            stopped = run_events(events, store, live)
        store.write()
        if not stopped and all(map(store.is_done, graph.jobs)):
            remove_models(graph, store, options.keep)
        code = report_pipeline(graph, store, selected)
        if stopped:
            echo(f"stopped; {len(store.ended)} of {len(graph.jobs)} jobs have ended; the same command continues")
        return stopped or code


def show_plan(pipeline: Pipeline, options: RunOptions, out: Path) -> int:
    """Prints the graph, what is done of it, and estimates. Another process may be running the pipeline."""
    store = ResultStore(out, PIPELINE, check_pipeline_row)
    graph, selected = planned_graph(pipeline, options, out)
    store.read(graph.jobs)
    print(planned_text(graph, store, selected, set(store.described().get("jobs", []))))
    return 0


def planned_graph(pipeline: Pipeline, options: RunOptions, out: Path) -> tuple[Graph, list[Job]]:
    """The graph and its jobs of this call; writes warnings on standard error."""
    options.check_backend()
    graph = Graph(pipeline, options, out)
    selected = graph.selected()
    for line in graph.warnings:
        echo(line)
    return graph, selected


def check_pipeline_row(row: ResultRow, where: str) -> None:
    """`RowCheck` of all jobs of a pipeline."""
    kind = check(row, {"kind": str, "model": str, "task": str, "seconds": float}, where)["kind"]
    if row.get("seed", 0) is None:
        row = row | {"seed": 0}  # an existing checkpoint has no seed of a pretraining
    if kind in (PRETRAIN, BRANCH):
        check_trained(row, where)
    elif kind == FINETUNE:
        check_tuned(row, where)
    elif kind == EVALUATE:
        check_evaluated(row, where)
    elif kind == TOGETHER:
        for task in check(row, {"tasks": {str: dict}}, where)["tasks"].values():
            check_tuned({**row, **task}, where)
    elif kind == ENSEMBLE:
        check(row, {"metrics": [str], "ensemble": {str: {str: float}}}, where)


def measured(row: ResultRow) -> tuple[str, float]:
    """Name and value of a finished job's measure, for the live status."""
    if row["kind"] in (PRETRAIN, BRANCH):
        return "validation loss", row["validations"][-1]["loss"]
    if row["kind"] in (FINETUNE, EVALUATE):
        return scored(row)
    if row["kind"] == TOGETHER:
        values = [mean_of_splits(task["best"]["dev"], task["metrics"][0]) for task in row["tasks"].values()]
        return "mean score", sum(values) / len(values)
    if row["kind"] == ENSEMBLE:
        return f"{row['metrics'][0]} of the ensemble", mean_of_splits(row["ensemble"], row["metrics"][0])
    if row["kind"] == PREPARE:
        return "million tokens", sum(split["tokens"] for split in row["splits"].values()) / 1e6
    return "exit code", 0  # otherwise the job has failed


def describe_pipeline(pipeline: Pipeline) -> dict[str, Any]:
    """Flat mapping of the file, for the record and for comparison with a later call."""
    found: dict[str, Any] = {"file": str(Path(pipeline.path).resolve()), "threads": pipeline.threads}
    for name, data in pipeline.data.items():
        found |= {f"data {name}: {key}": value for key, value in data.options.items()}
    for name, model in pipeline.models.items():
        found[f"model {name}: seeds"] = list(model.seeds)
        values = dict(model.values)
        if model.options is not None:
            values = {leaf.name: leaf.value for leaf in leaves(model.options) if leaf.role != "machine"}
            defaults = {leaf.name: leaf.value for leaf in leaves(type(model.options)())}
            values = {key: value for key, value in values.items() if value != defaults.get(key)}
        for key in ("path", "after", "branch", "step"):
            values |= {key: getattr(model, key)} if getattr(model, key) is not None else {}
        found |= {f"model {name}: {key}": value for key, value in values.items()}
    for name, stage in pipeline.stages.items():
        values = {"seeds": stage.trials, "after": stage.after, "together": stage.together, "models": stage.models}
        values |= {**stage.mixture, **stage.grid.finetune}
        names = [task.task if task.name is None else f"{task.task} as {task.name}" for task in stage.tasks]
        values["tasks"] = names
        for called, task in zip(names, stage.tasks, strict=True):
            axes = {axis: list(dict.fromkeys(one[axis] for one in task.settings)) for axis in task.settings[0]}
            values |= {f"{called}: {key}": value for key, value in {**axes, **task.overrides}.items()}
        found |= {f"stage {name}: {key}": value for key, value in values.items()}
    for name, evaluation in pipeline.evaluate.items():
        found |= {f"evaluate {name}: {leaf.name}": leaf.value for leaf in leaves(evaluation)}
    for name, command in pipeline.commands.items():
        found |= {f"command {name}: run": command.run, f"command {name}: after": command.after}
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in found.items() if value is not None
    }


def counted(graph: Graph) -> str:
    """Summary of the number of jobs of each kind."""
    kinds = [job.kind for job in graph.jobs]
    names = {
        **{PREPARE: "prepared text", PRETRAIN: "pretraining", BRANCH: "branch", EVALUATE: "evaluation"},
        **{FINETUNE: "fine-tuning", TOGETHER: "fine-tuning on several tasks", ENSEMBLE: "ensemble"},
        COMMAND: "command",
    }
    several = {BRANCH: "branches", TOGETHER: "fine-tunings on several tasks"}
    parts = []
    for kind, name in names.items():
        if count := kinds.count(kind):
            parts.append(f"{count} {several[kind]}" if kind in several and count > 1 else plural(count, name))
    return f"{plural(len(kinds), 'job')}: {', '.join(parts)}"


def changed_lines(graph: Graph, before: dict[str, Any], description: dict[str, Any]) -> list[str]:
    """Lines on what differs from the last call in the same folder; none in the first call."""
    if not before:
        return []
    last, ids = set(before["jobs"]), {job.id for job in graph.jobs}
    changes = differences(before["axes"], description)
    if not changes and last == ids:
        return []
    changes = changes or ["the contents of its files"]
    lines = [f"changed since the last call: {line}" for line in changes[:MOST_SHOWN]]
    if len(changes) > MOST_SHOWN:
        lines.append(f"and {plural(len(changes) - MOST_SHOWN, 'further change')}")
    new = [job for job in graph.jobs if job.id not in last]
    old = len(last - ids)
    by_entry: dict[str, int] = {}
    for job in new:
        by_entry[graph.entries[job.id]] = by_entry.get(graph.entries[job.id], 0) + 1
    listed = ", ".join(f"{count} of {entry}" for entry, count in by_entry.items())
    lines.append(f"{plural(len(new), 'job')} new or changed{f' ({listed})' if new else ''}; {old} no longer needed")
    return lines


def check_only(graph: Graph, store: ResultStore, selected: list[Job]) -> None:
    """Raises a UserError if a job of --only depends on one that is not done."""
    wanted = {job.id for job in selected}
    needed = ancestors(graph.jobs, wanted) - wanted
    missing = [job for job in graph.jobs if job.id in needed and not store.is_done(job)]
    if missing:
        entries = ", ".join(dict.fromkeys(graph.entries[job.id] for job in missing))
        raise UserError(
            f"--only {graph.options.only}: it depends on jobs that are not done ({entries}), such as "
            f"{title(missing[0])}; run them too: --until {graph.options.only}"
        )
