"""`fastbert sweep`: fine-tunes checkpoints x tasks x settings x seeds, and evaluates checkpoints, as independent jobs;
writes one report.

out/sweep.json       the axes, and the ids of their jobs
out/results.jsonl    one object per job that is done or has failed; the file is rewritten whenever a job ends
out/jobs/<id>/       log.txt, and run/ as written by `fastbert finetune`; an evaluation has none
out/report/          report.md, report.html, plots
"""

from pathlib import Path
from typing import Any

from fastbert.errors import UserError, plural
from fastbert.files import locked_folder, make_inner_folder
from fastbert.records import check
from fastbert.report.report_page import ReportPage
from fastbert.streams import echo
from fastbert.studies.engine.backends import start
from fastbert.studies.engine.events import run_events
from fastbert.studies.engine.jobs import Job
from fastbert.studies.engine.live_status import LiveStatus
from fastbert.studies.engine.outcomes import print_failures
from fastbert.studies.engine.store import RESULTS, ResultRow, ResultStore, is_done
from fastbert.studies.shared.comparison import Comparison, scored
from fastbert.studies.shared.evaluate_jobs import EVALUATE, check_evaluated
from fastbert.studies.shared.finetune_jobs import FINETUNE, check_tuned
from fastbert.studies.shared.grid import AXES, StudyGrid
from fastbert.studies.shared.report import provenance
from fastbert.studies.shared.tuning_report import printed_scores
from fastbert.studies.sweep.options import SweepOptions
from fastbert.studies.sweep.slices_report import slices_table, write_slices
from fastbert.studies.sweep.sweep_plan import SweepPlan, plan_sweep
from fastbert.studies.sweep.sweep_report import dev_ensembles, format_job, write_sweep_report
from fastbert.studies.sweep.zero_shot_report import ZeroShotResults, printed_zero_shot

SWEEP = "sweep"


def sweep(grid: StudyGrid, options: SweepOptions) -> int:
    """Runs the jobs that are not done yet, the longest first, then writes and prints the report.

    Returns:
        0, or 1 if a job failed; 130 or 143 after a signal: the same command resumes the sweep.

    Raises:
        UserError: invalid input; raised before the first job wherever it can be detected there.
    """
    name = Path(grid.path).stem
    out = Path(options.out or f"runs/{name}")
    with locked_folder(out):
        store = ResultStore(out, SWEEP, check_sweep_row)
        options.check_backend()
        plan = plan_sweep(grid, options)
        jobs = plan.jobs
        if options.backend == "ray" and any(job.options.get("save_model") for job in jobs):
            raise UserError(
                f"{grid.path}: save_model: models are not copied from the nodes of a cluster; drop it, or use "
                "--backend local"
            )
        store.begin(describe_sweep(grid, jobs), jobs)
        echo(f"{counted_jobs(jobs)}{store.done_before}")
        for line in plan.left_out:
            echo(line)
        if remaining := sorted(store.remaining, key=lambda job: -job.cost):
            events = start(options, remaining, store, grid.threads)
            stopped = run_events(events, store, LiveStatus(jobs, store.rows, scored))
            if stopped:
                echo(f"stopped; {len(store.ended)} of {len(jobs)} jobs have ended; the same command continues")
                return stopped
        store.write()
        return report_sweep(store, name, grid, plan)


def check_sweep_row(row: ResultRow, where: str) -> None:
    """`RowCheck` of a sweep's fine-tunings and evaluations."""
    kind = check(row, {"kind?": str}, where).get("kind")
    (check_evaluated if kind == EVALUATE else check_tuned)(row, where)


def counted_jobs(jobs: list[Job]) -> str:
    """Summary of the number of jobs."""
    tunings = [job for job in jobs if job.kind == FINETUNE]
    parts = []
    if tunings:
        models, tasks, seeds = ({getattr(job, name) for job in tunings} for name in ("model", "task", "seed"))
        settings = len(tunings) // (len(models) * len(seeds))
        what = plural(len(tasks), "task") + ("" if settings == len(tasks) else f" in {settings} settings")
        parts.append(f"{plural(len(models), 'checkpoint')} x {what} x {plural(len(seeds), 'seed')}")
    if evaluations := len(jobs) - len(tunings):
        parts.append(plural(evaluations, "evaluation"))
    return f"{plural(len(jobs), 'job')}: {', '.join(parts)}"


def describe_sweep(grid: StudyGrid, jobs: list[Job]) -> dict[str, Any]:
    """Flat mapping of the axes, for the record and for comparison with a later call."""
    found: dict[str, Any] = {}
    for job in jobs:
        found[f"model {job.model}"] = job.identity["model"]
        found[f"{'evaluate' if job.kind == EVALUATE else 'task'} {job.task}"] = job.identity["data"]
    for name in AXES.values():
        found[name] = sorted({job.setting[name] for job in jobs if job.kind == FINETUNE})
    return {**found, "seeds": list(grid.seeds), "threads": grid.threads, "finetune": grid.finetune}


def report_sweep(store: ResultStore, name: str, grid: StudyGrid, plan: SweepPlan) -> int:
    """Writes the report, prints failures and scores, and returns the exit code."""
    rows, total = store.ended, len(store.jobs)
    done = [row for row in rows if is_done(row)]
    failed = [row for row in rows if not is_done(row)]
    evaluations = [row for row in done if row["kind"] == EVALUATE]
    tasks = list(dict.fromkeys(row["task"] for row in rows if row["kind"] == FINETUNE))
    tuned = [row for row in done if row["kind"] == FINETUNE]
    comparison = Comparison(tuned, [model.name for model in grid.models], tasks)
    ensembles = dev_ensembles(comparison, plan)
    zero_shot = ZeroShotResults.of(evaluations, plan.left_out)
    folder = store.out / "report"
    make_inner_folder(folder)
    report = ReportPage(f"Sweep {name}", folder)
    write_sweep_report(report, plan.tables(), comparison, zero_shot, failed, total, ensembles)
    write_slices(report, slices_table(comparison, plan.opened))
    report.write(provenance(grid.path, grid.threads, done))
    if comparison.trials:
        print(printed_scores(comparison, ensembles))
    if len(zero_shot):
        print(printed_zero_shot(zero_shot, grid.models[0].name))
    print(f"{store.out / RESULTS}\n{folder / 'report.html'}")
    return print_failures(failed, total, format_job)
