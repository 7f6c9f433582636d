"""`fastbert sweep`: checkpoints x tasks x settings x seeds as independent jobs, and one report.

out/sweep.json       the axes, and the ids of their jobs
out/results.jsonl    an object for each job that has ended, done or failed; rewritten whole whenever one ends
out/jobs/<id>/       log.txt, and run/ as `fastbert finetune` writes it
out/report/          report.md, report.html, drawings
"""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from fastbert.config import differences
from fastbert.errors import LINE, UserError
from fastbert.files import (
    atomic_file,
    contents,
    locked_folder,
    make_inner_folder,
    refuse_link,
    remove_leftovers,
)
from fastbert.finetuning.results import check_best
from fastbert.inputs import read_input
from fastbert.records import COUNT, check, finite_or_none, json_text, parse_json, read_sealed, seal_of, write_sealed
from fastbert.streams import say
from fastbert.studies.engine.jobs import LOG, Job
from fastbert.studies.engine.live_status import Board
from fastbert.studies.engine.local import Event, run_local
from fastbert.studies.shared.comparison import Comparison, Row
from fastbert.studies.sweep.options import Axes, SweepOptions
from fastbert.studies.sweep.sweep_jobs import plan
from fastbert.studies.sweep.sweep_report import plural, printed, shown_job, write_report
from fastbert.training.hardware import describe_machine
from fastbert.training.interrupts import Interrupts

RESULTS, SWEEP = "results.jsonl", "sweep"
LARGEST_RESULTS = 2**28  # bytes
_FIGURES = {"dev": {str: {str: (float, type(None))}}}
# The rows of finished jobs, for `check`: a fine-tuning's, and an ablation's pretraining's.
TUNED = {
    **{"model": str, "task": str, "seed": int, "precision": str, "seconds": float, "metrics": [str]},
    **{"learning_rate": float, "batch_size": int, "epochs": int, "train_examples": COUNT},
    **{"best": _FIGURES, "last": _FIGURES},
}
TRAINED = {
    **{"model": str, "task": str, "seed": int, "precision": str, "seconds": float, "objective": str},
    "validations": [{"step": int, "loss": (float, type(None))}],
}


def sweep(axes: Axes, options: SweepOptions) -> int:
    """Runs the jobs that are not done yet, then writes and prints the report.

    Returns:
        0, or 1 if a job failed; 130 or 143 if a signal ended it: the same command continues.

    Raises:
        UserError: anything the user can mend, before a job starts if it can be seen then.
    """
    name = Path(axes.path).stem
    out = Path(options.out or f"runs/{name}")
    with locked_folder(out):
        check_out(out, SWEEP)
        if options.backend == "ray":
            from fastbert.studies.engine.ray_backend import check_ray

            check_ray(options.ray_address)
        jobs = plan(axes, options)
        if options.backend == "ray" and any(job.options["save_model"] for job in jobs):
            raise UserError(
                f"{axes.path}: save_model: models do not come back from the nodes of a cluster; drop it, or use "
                "--backend local"
            )
        open_folder(out, SWEEP, describe(axes, jobs), jobs)
        rows = read_results(out / RESULTS)
        for job in jobs:
            if job.id in rows:
                rows[job.id] |= place_of(job, out)  # names in the YAML file and --out may have changed
        left = [job for job in jobs if not is_done(rows, job)]
        say(counted(jobs, len(jobs) - len(left), sum(job.id in rows for job in left)))
        stopped = run_left(jobs, left, rows, axes, options, out) if left else 0
        ended = [rows[job.id] for job in jobs if job.id in rows]
        if stopped:
            say(f"stopped; {len(ended)} of {len(jobs)} jobs have ended, the same command continues")
            return stopped
        write_results(out / RESULTS, rows, jobs)
        return finish(out, name, axes, ended, len(jobs))


def run_left(
    jobs: list[Job], left: list[Job], rows: dict[str, Row], axes: Axes, options: SweepOptions, out: Path
) -> int:
    """Runs the jobs that are left, the longest first, and puts their rows into `rows` and results.jsonl.

    Returns:
        0, or the exit code after a signal.
    """
    left = sorted(left, key=lambda job: -job.cost)
    with (
        Interrupts() as interrupts,
        closing(start(left, options, axes, out)) as events,
        Board(jobs, [rows[job.id] for job in jobs if is_done(rows, job)]) as board,
    ):
        for job, outcome in until_stopped(events, interrupts, board):
            rows[job.id] = result_row(job, outcome, out)
            write_results(out / RESULTS, rows, jobs)
            board.ended(job, rows[job.id])
    return interrupts.exit_code


def until_stopped(
    events: Iterator[Event], interrupts: Interrupts, board: Board
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Jobs that have ended, and their outcomes; the others the board is told. A signal ends it."""
    for event in events:
        job, outcome = event or (None, None)
        stopped = interrupts.caught is not None
        if outcome is not None and not (stopped and outcome["status"] == "failed"):
            # A signal to all processes of the group ends the jobs too, and these have not failed.
            yield job, outcome
        elif job is not None and outcome is None:
            board.begun(job)
        else:
            board.tick()
        if stopped:
            break


def start(jobs: list[Job], options: SweepOptions, axes: Axes, out: Path) -> Iterator[Event]:
    """The back end, at work."""
    if options.backend == "local":
        return run_local(jobs, options.workers, axes.threads, out / "jobs")
    from fastbert.studies.engine.ray_backend import connect, run_ray

    gpus = int(str(axes.finetune.get("machine", {}).get("device", "")).startswith("cuda"))
    ray = connect(options.workers, axes.threads, options.ray_address)
    return run_ray(ray, jobs, options.workers, axes.threads, gpus, out / "jobs")


def counted(jobs: list[Job], done: int, failed: int) -> str:
    """How many jobs there are, and of what."""
    models, tasks, seeds = ({getattr(job, name) for job in jobs} for name in ("model", "task", "seed"))
    settings = len(jobs) // (len(models) * len(seeds))
    what = plural(len(tasks), "task") + ("" if settings == len(tasks) else f" in {settings} settings")
    before = f"; {done} done before" if done else ""
    again = f"; {failed} failed before and run again" if failed else ""
    every = f"{plural(len(models), 'checkpoint')} x {what} x {plural(len(seeds), 'seed')}"
    return f"{plural(len(jobs), 'job')}: {every}{before}{again}"


# --- the folder


def check_out(out: Path, what: str) -> None:
    """Raises a UserError if `out`, which is there, holds something else than a `what` (a sweep or an ablation)."""
    if not (out / f"{what}.json").is_file() and contents(out):
        raise UserError(f"{out} is not empty and holds no {what}; choose another --out")


def describe(axes: Axes, jobs: list[Job]) -> dict[str, Any]:
    """The axes by name, flat, for the record and for differences."""
    found: dict[str, Any] = {}
    for job in jobs:
        found[f"model {job.model}"] = job.identity["model"]
        found[f"task {job.task}"] = job.identity["data"]
    for name in ("learning_rate", "batch_size", "epochs"):
        found[name] = sorted({job.setting[name] for job in jobs})
    return {**found, "seeds": list(axes.seeds), "threads": axes.threads, "finetune": axes.finetune}


def open_folder(out: Path, what: str, description: dict[str, Any], jobs: list[Job], **more: Any) -> None:
    """Writes what the sweep, or another `what`, is. Its axes may have grown or shrunk since the last call; one that
    shares no job with what is there is another one.

    Args:
        more: to be kept besides.

    Raises:
        UserError: `out` holds another one, or a link in the place of its jobs.
    """
    refuse_link(out / "jobs")
    ids = [job.id for job in jobs]
    record = out / f"{what}.json"
    if record.is_file():
        before = read_described(record, what)
        if not set(ids) & {*before["jobs"], *read_results(out / RESULTS)}:
            changed = LINE.join(differences(before["axes"], description))
            raise UserError(
                f"{out} holds another {what}: no job of it is in this one. What differs:{LINE}{changed}{LINE}"
                "Give the same file to continue it, or choose another --out"
            )
    remove_leftovers(out)
    write_sealed(record, {"axes": description, "jobs": ids, **more, "machine": describe_machine()})


def read_described(record: Path, what: str) -> dict[str, Any]:
    """What `open_folder` wrote.

    Raises:
        UserError: it is damaged.
    """
    shape = {"axes": dict, "jobs": [str], "seconds?": {str: [float]}}
    return read_sealed(record, f"the record of the {what}", shape, "restore it, or choose another --out")


def read_results(path: Path) -> dict[str, Row]:
    """The rows of results.jsonl by the jobs' ids; none if there is no file yet.

    Raises:
        UserError: a line is damaged, or it is no file: found here, before any job, and not when its row is written.
    """
    rows: dict[str, Row] = {}
    if not os.path.lexists(path):
        return rows
    for number, line in enumerate(read_input(path, most=LARGEST_RESULTS).split(b"\n"), 1):
        if not line:
            continue
        try:
            row = read_row(line, f"{path}, line {number}")
        except UserError as error:
            raise UserError(f"{error}; delete the line, and its job is run again") from None
        rows[row["id"]] = row
    return rows


def read_row(line: bytes, where: str) -> Row:
    """The row in a line of results.jsonl, without its seal.

    Raises:
        UserError: it is damaged.
    """
    row = parse_json(line, where, {"id": str, "status": str})
    if row.pop("seal", None) not in (None, seal_of(row)):  # None: older
        raise UserError(f"{where} is damaged: its hash does not fit")
    if row["status"] == "done":
        check(row, TUNED if "metrics" in row else TRAINED, where)
        if "metrics" in row:
            check_best(row, row["metrics"], where)
            for split, figures in row["last"]["dev"].items():  # null: not finite
                check(figures, dict.fromkeys(row["metrics"], (float, type(None))), where, f"last.dev.{split}")
        elif not row["validations"]:
            raise UserError(f"{where} is damaged: validations is empty")
    else:
        if "mend" in row:  # its name in older results
            row["fix"] = row.pop("mend")
        check(row, {"reason": str, "fix": str, "log": [str]}, where)
    return row


def write_results(path: Path, rows: dict[str, Row], jobs: list[Job]) -> None:
    """All rows, those of the sweep in its order, then those of jobs that it had in an earlier call."""
    ids = [job.id for job in jobs if job.id in rows]
    with atomic_file(path, "w") as file:
        for key in dict.fromkeys([*ids, *rows]):
            row = finite_or_none(rows[key])
            file.write(json_text({**row, "seal": seal_of(row)}, ensure_ascii=False) + "\n")


def is_done(rows: dict[str, Row], job: Job) -> bool:
    return job.id in rows and rows[job.id]["status"] == "done"


def result_row(job: Job, outcome: dict[str, Any], out: Path) -> Row:
    """The line of results.jsonl."""
    row = {"id": job.id, "status": outcome["status"], **place_of(job, out), "seed": job.seed, **job.setting}
    if outcome["status"] == "done":
        result = {key: value for key, value in outcome["result"].items() if key not in ("seed", "model")}
        row |= {"metrics": outcome["metrics"], **result, "precision": outcome["precision"]}
    else:
        row |= {key: outcome[key] for key in ("reason", "fix", "log") if key in outcome}
    return row | {"seconds": outcome.get("seconds"), "configuration": job.identity}


def place_of(job: Job, out: Path) -> Row:
    """What a row says of its job that defines no result."""
    return {"model": job.model, "task": job.task, "folder": str(out / "jobs" / job.id)}


# --- the end


def finish(out: Path, name: str, axes: Axes, rows: list[Row], total: int) -> int:
    """The report, what failed, and the scores on standard output."""
    done = [row for row in rows if row["status"] == "done"]
    failed = [row for row in rows if row["status"] == "failed"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    comparison = Comparison(done, [model.name for model in axes.models], tasks)
    make_inner_folder(out / "report")
    write_report(out / "report", name, comparison, failed, total, circumstances(axes.path, axes.threads, done))
    if done:
        print(printed(comparison))
    print(f"{out / RESULTS}\n{out / 'report' / 'report.html'}")
    return say_failures(failed, total, shown_job)


def circumstances(path: str, threads: int, done: list[Row]) -> dict[str, str]:
    """Lines by name for the end of a report: where and with what the finished jobs were run."""
    machine = describe_machine()
    precisions = ", ".join(sorted({row["precision"] for row in done}))
    return {
        "axes": f"`{path}`",
        "machine": f"{machine['cpu']}, {machine['cores']} cores" + "".join(f", {gpu}" for gpu in machine["gpus"]),
        "versions": ", ".join(f"{package} {version}" for package, version in machine["versions"].items()),
        "commit": f"{machine['commit']}" + (", with changes" if machine["dirty"] else ""),
        "a job": f"CPU threads {threads}, precision {precisions or 'unknown'}",
        "work": f"{sum(row['seconds'] for row in done) / 60:.1f} minutes, summed over the finished jobs",
    }


def say_failures(failed: list[Row], total: int, shown: Callable[[Row], str]) -> int:
    """Says why jobs failed; returns the exit code.

    Args:
        shown: what tells a job from others of its model and task.
    """
    for row in failed:
        log = "".join(f"\n    {line}" for line in row["log"])
        fix = f"\n  to fix it: {row['fix']}" if row["fix"] else ""
        say(f"\nFAILED {row['task']}, {row['model']}, {shown(row)}\n  {row['reason']}{fix}")
        if log:
            say(f"  the end of {Path(row['folder']) / LOG}:{log}")
    if failed:
        say(f"\n{len(failed)} of {total} jobs failed; the same command runs them again")
    return 1 if failed else 0
