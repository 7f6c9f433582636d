"""`fastbert ablate`: a baseline and its variants with equal data, order and seeds at equal cost, and one report.

out/ablation.json    the variants, the ids of their jobs, and the times that minutes were turned into steps with
out/results.jsonl    an object for each job that has ended, done or failed; rewritten whole whenever one ends
out/jobs/<id>/       log.txt, and run/ as `fastbert pretrain` or `fastbert finetune` writes it
out/report/          report.md, report.html, drawings
"""

from collections.abc import Container, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from fastbert.config import leaves
from fastbert.files import locked_folder, make_inner_folder
from fastbert.pretraining.options import science
from fastbert.pretraining.setup import data_fingerprint
from fastbert.streams import say
from fastbert.studies.ablate.ablation_plan import Plan, plan
from fastbert.studies.ablate.ablation_report import OWN_QUESTIONS, planned_table, printed, write_report
from fastbert.studies.ablate.measures import Results
from fastbert.studies.ablate.options import AblateOptions, Ablation
from fastbert.studies.ablate.questions import check_measure, incomparable, planned_questions
from fastbert.studies.engine.jobs import LOG, RUN, Job
from fastbert.studies.engine.live_status import Board, scored
from fastbert.studies.engine.local import run_local
from fastbert.studies.shared.comparison import Row
from fastbert.studies.sweep.sweep import (
    RESULTS,
    check_out,
    circumstances,
    is_done,
    open_folder,
    place_of,
    read_described,
    read_results,
    result_row,
    say_failures,
    until_stopped,
    write_results,
)
from fastbert.studies.sweep.sweep_report import plural
from fastbert.training.interrupts import Interrupts

ABLATION = "ablation"


def ablate(ablation: Ablation, options: AblateOptions) -> int:
    """Runs the jobs that are not done yet, then writes and prints the report.

    Returns:
        0, or 1 if a job failed; 130 or 143 if a signal ended it: the report is of what was done until then, and the
        same command goes on.

    Raises:
        UserError: anything the user can mend, before a job starts if it can be seen then.
    """
    name = Path(ablation.path).stem
    out = Path(options.out or f"runs/{name}")
    check_measure(ablation, incomparable(planned_questions(ablation)))
    with locked_folder(out):
        check_out(out, ABLATION)
        record = out / f"{ABLATION}.json"
        known = read_described(record, ABLATION).get("seconds", {}) if record.is_file() else {}
        study = plan(ablation, options, out, known)
        check_measure(ablation, study.incomparable)
        jobs = study.jobs
        open_folder(out, ABLATION, describe(ablation, study), jobs, seconds={**known, **study.seconds})
        rows = read_results(out / RESULTS)
        for job in jobs:
            if job.id in rows:
                rows[job.id] |= place_of(job, out)  # names in the YAML file and --out may have changed
        forget_lost(rows, jobs, out)
        left = [job for job in jobs if not is_done(rows, job)]
        say(planned_table(study, ablation).plain())
        say(counted(study, len(jobs) - len(left), sum(job.id in rows for job in left)))
        say(f"what a job says while it runs: {out / 'jobs' / '<id>' / LOG}")
        stopped = run_left(study, left, rows, ablation.threads, options.workers, out) if left else 0
        ended = [rows[job.id] for job in jobs if job.id in rows]
        write_results(out / RESULTS, rows, jobs)
        code = finish(out, name, ablation, Results(study, rows), ended)
        if stopped:
            say(f"stopped; {len(ended)} of {len(jobs)} jobs have ended, the same command continues")
        return stopped or code


def describe(ablation: Ablation, study: Plan) -> dict[str, Any]:
    """The axes by name, flat, for the record and for differences."""
    found: dict[str, Any] = {}
    for variant in study.variants:
        options = variant.setup.options
        for name, value in science(options, data_fingerprint(variant.setup.dataset)).items():
            if name not in ("seed", "steps"):
                found[f"{variant.name}: {name}"] = value
        found[f"{variant.name}: steps"] = variant.steps
    found["machine"] = {leaf.name: leaf.value for leaf in leaves(options) if leaf.role == "machine"}
    tasks = [entry.task for entry in ablation.axes.tasks]
    return {
        **found,
        **{name: list(getattr(ablation, name)) for name in ("seeds", "points")},
        "anneal": ablation.anneal,
        "threads": ablation.threads,
        "tasks": tasks,
        "finetune": ablation.axes.finetune,
    }


def forget_lost(rows: dict[str, Row], jobs: list[Job], out: Path) -> None:
    """Takes away the rows of trainings whose checkpoints are gone, if a job that starts from one is left: they are run
    again."""
    needed, lost = set(), 0
    for job in reversed(jobs):  # what a job needs stands before it
        if job.id in needed and is_done(rows, job) and not (out / "jobs" / job.id / RUN / "checkpoints").is_dir():
            del rows[job.id]
            lost += 1
        if job.after and not is_done(rows, job):
            needed.add(job.after)
    if lost:
        say(f"{plural(lost, 'training')} of an earlier call left no checkpoints here and will be run again")


def counted(study: Plan, done: int, failed: int) -> str:
    """How many jobs there are, and of what."""
    kinds = [job.kind for job in study.jobs]
    names = {"pretrain": "pretraining", "branch": "annealing", "finetune": "fine-tuning"}
    parts = [plural(kinds.count(kind), name) for kind, name in names.items() if kind in kinds]
    before = f"; {done} done before" if done else ""
    again = f"; {failed} failed before and run again" if failed else ""
    return f"{plural(len(kinds), 'job')}: {', '.join(parts)}{before}{again}"


# --- running


def run_left(study: Plan, left: list[Job], rows: dict[str, Row], threads: int, workers: int, out: Path) -> int:
    """Runs the jobs that are left, each when the one it needs is done, and puts their rows into `rows` and
    results.jsonl.

    Returns:
        0, or the exit code after a signal.
    """
    done = [rows[job.id] for job in study.jobs if is_done(rows, job)]
    apart = study.incomparable
    with (
        Interrupts() as interrupts,
        closing(run_local(startable(left, rows), workers, threads, out / "jobs")) as events,
        Board(study.jobs, done, measured=partial(measured, apart=apart), apart=apart) as board,
    ):
        for job in left:
            rows.pop(job.id, None)  # it failed before, and what needs it waits for it again
        for job, outcome in until_stopped(events, interrupts, board):
            rows[job.id] = row_of(job, outcome, out)
            write_results(out / RESULTS, rows, study.jobs)
            board.ended(job, rows[job.id])
    return interrupts.exit_code


def startable(left: list[Job], rows: dict[str, Row]) -> Iterator[Job | None]:
    """The jobs in their order, each once the one it needs is done; None where all that are left must wait. Those that
    need one that failed are left out."""
    waiting, lost = list(left), set()
    while waiting:
        for job in waiting:  # what a job needs stands before it
            if job.after in lost or (job.after in rows and rows[job.after]["status"] == "failed"):
                lost.add(job.id)
        waiting = [job for job in waiting if job.id not in lost]
        found = next((job for job in waiting if job.after is None or job.after in rows), None)
        if found:
            waiting.remove(found)
        if waiting or found:
            yield found


def measured(row: Row, apart: Container[str] = ()) -> tuple[str, float]:
    """What is shown of a finished job while others run.

    Args:
        apart: variants whose losses cannot be compared with the baseline's.
    """
    if "metrics" in row:
        return scored(row)
    name = f"loss of its own ({row['objective']})" if row["model"] in apart else "validation loss"
    return name, row["validations"][-1]["loss"]


def row_of(job: Job, outcome: dict[str, Any], out: Path) -> Row:
    """The line of results.jsonl."""
    row = result_row(job, {"metrics": None, **outcome}, out)
    if job.kind != "finetune":
        row.pop("metrics", None)
    return {"id": row.pop("id"), "kind": job.kind, **row}


# --- the end


def finish(out: Path, name: str, ablation: Ablation, results: Results, rows: list[Row]) -> int:
    """The report, what failed, and the shares on standard output."""
    done = [row for row in rows if row["status"] == "done"]
    failed = [row for row in rows if row["status"] == "failed"]
    make_inner_folder(out / "report")
    about = circumstances(ablation.path, ablation.threads, done)
    write_report(out / "report", name, ablation, results, failed, about)
    if done:
        print(printed(results))
        for line in results.left_out:
            say(line)
        if results.validation_loss and results.baseline.setup.options.objective != "mlm":
            say(f"validation loss: {OWN_QUESTIONS}")
    print(f"{out / RESULTS}\n{out / 'report' / 'report.html'}")
    missing = len(results.plan.jobs) - len(rows)
    if missing and failed:
        say(f"{plural(missing, 'job')} did not run: what they need has failed, or it was stopped")
    return say_failures(failed, len(results.plan.jobs), lambda row: f"seed {row['seed']}")
