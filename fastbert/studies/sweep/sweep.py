"""`fastbert sweep`: fine-tunes checkpoints x tasks x settings x seeds as independent jobs, and writes one report.

out/sweep.json       the axes, and the ids of their jobs
out/results.jsonl    one object per job that is done or has failed; the file is rewritten whenever a job ends
out/jobs/<id>/       log.txt, and run/ as written by `fastbert finetune`
out/report/          report.md, report.html, plots
"""

from pathlib import Path
from typing import Any

from fastbert.errors import UserError
from fastbert.files import locked_folder, make_inner_folder
from fastbert.streams import echo
from fastbert.studies.engine.backends import start
from fastbert.studies.engine.events import run_events
from fastbert.studies.engine.jobs import Job
from fastbert.studies.engine.live_status import LiveStatus
from fastbert.studies.engine.outcomes import print_failures
from fastbert.studies.engine.store import RESULTS, ResultStore, is_done
from fastbert.studies.shared.comparison import Comparison, scored
from fastbert.studies.shared.finetune_jobs import check_tuned
from fastbert.studies.shared.grid import AXES, FinetuneGrid
from fastbert.studies.shared.report import ReportPage, plural, provenance
from fastbert.studies.sweep.options import SweepOptions
from fastbert.studies.sweep.sweep_plan import SweepPlan, plan_sweep
from fastbert.studies.sweep.sweep_report import format_job, printed_scores, write_sweep_report

SWEEP = "sweep"


def sweep(grid: FinetuneGrid, options: SweepOptions) -> int:
    """Runs the jobs that are not done yet, the longest first, then writes and prints the report.

    Returns:
        0, or 1 if a job failed; 130 or 143 after a signal: the same command resumes the sweep.

    Raises:
        UserError: invalid input; raised before the first job wherever it can be detected there.
    """
    name = Path(grid.path).stem
    out = Path(options.out or f"runs/{name}")
    with locked_folder(out):
        store = ResultStore(out, SWEEP, check_tuned)
        options.check_backend()
        plan = plan_sweep(grid, options)
        jobs = plan.jobs
        if options.backend == "ray" and any(job.options["save_model"] for job in jobs):
            raise UserError(
                f"{grid.path}: save_model: models are not copied from the nodes of a cluster; drop it, or use "
                "--backend local"
            )
        store.begin(describe_sweep(grid, jobs), jobs)
        echo(f"{counted_jobs(jobs)}{store.done_before}")
        if remaining := sorted(store.remaining, key=lambda job: -job.cost):
            events = start(options, remaining, store, grid.threads)
            stopped = run_events(events, store, LiveStatus(jobs, store.rows, scored))
            if stopped:
                echo(f"stopped; {len(store.ended)} of {len(jobs)} jobs have ended; the same command continues")
                return stopped
        store.write()
        return report_sweep(store, name, grid, plan)


def counted_jobs(jobs: list[Job]) -> str:
    """Summary of the number of jobs."""
    models, tasks, seeds = ({getattr(job, name) for job in jobs} for name in ("model", "task", "seed"))
    settings = len(jobs) // (len(models) * len(seeds))
    what = plural(len(tasks), "task") + ("" if settings == len(tasks) else f" in {settings} settings")
    every = f"{plural(len(models), 'checkpoint')} x {what} x {plural(len(seeds), 'seed')}"
    return f"{plural(len(jobs), 'job')}: {every}"


def describe_sweep(grid: FinetuneGrid, jobs: list[Job]) -> dict[str, Any]:
    """Flat mapping of the axes, for the record and for comparison with a later call."""
    found: dict[str, Any] = {}
    for job in jobs:
        found[f"model {job.model}"] = job.identity["model"]
        found[f"task {job.task}"] = job.identity["data"]
    for name in AXES.values():
        found[name] = sorted({job.setting[name] for job in jobs})
    return {**found, "seeds": list(grid.seeds), "threads": grid.threads, "finetune": grid.finetune}


def report_sweep(store: ResultStore, name: str, grid: FinetuneGrid, plan: SweepPlan) -> int:
    """Writes the report, prints failures and scores, and returns the exit code."""
    rows, total = store.ended, len(store.jobs)
    done = [row for row in rows if is_done(row)]
    failed = [row for row in rows if not is_done(row)]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    comparison = Comparison(done, [model.name for model in grid.models], tasks)
    folder = store.out / "report"
    make_inner_folder(folder)
    report = ReportPage(f"Sweep {name}", folder)
    write_sweep_report(report, plan.tables(), comparison, failed, total)
    report.write(provenance(grid.path, grid.threads, done))
    if done:
        print(printed_scores(comparison))
    print(f"{store.out / RESULTS}\n{folder / 'report.html'}")
    return print_failures(failed, total, format_job)
