"""`fastbert active`: learners in rounds of growing numbers of labels, as chains of jobs; writes one report.

out/active-study.json   the study, and the ids of its jobs
out/results.jsonl       one object per job that is done, failed or was not run; rewritten whenever a job ends
out/jobs/<id>/          log.txt, and run/ of a round: see `round_job`
out/report/             report.md, report.html, plots
"""

from pathlib import Path
from typing import Any

from fastbert.errors import plural
from fastbert.files import locked_folder, make_inner_folder
from fastbert.report.report_page import ReportPage
from fastbert.streams import echo
from fastbert.studies.active.curves import Curves, score_of
from fastbert.studies.active.options import ActiveOptions, ActiveStudy
from fastbert.studies.active.plan import ActivePlan, plan_active
from fastbert.studies.active.report import printed_curves, write_active_report
from fastbert.studies.active.round_job import FINAL, MODEL, ROUND, check_round_row
from fastbert.studies.engine.backends import start
from fastbert.studies.engine.events import run_events
from fastbert.studies.engine.live_status import LiveStatus
from fastbert.studies.engine.outcomes import RUN, print_failures
from fastbert.studies.engine.store import JOBS, RESULTS, ResultRow, ResultStore, is_done
from fastbert.studies.shared.report import provenance

ACTIVE = "active-study"


def active(study: ActiveStudy, options: ActiveOptions) -> int:
    """Runs the jobs that are not done yet, then writes and prints the report.

    Returns:
        0, or 1 if a job failed; 130 or 143 after a signal: the same command resumes the study.

    Raises:
        UserError: invalid input; raised before the first job wherever it can be detected there.
    """
    name = Path(study.path).stem
    out = Path(options.out or f"runs/{name}")
    with locked_folder(out):
        store = ResultStore(out, ACTIVE, check_round_row)
        options.check_backend()
        plan = plan_active(study, options)
        store.begin(describe_active(plan), plan.jobs)
        rerun_lost_rounds(store)
        echo(f"{counted(plan)}{store.done_before}")
        if remaining := store.remaining:
            events = start(options, remaining, store, study.threads, in_place=True)
            stopped = run_events(events, store, LiveStatus(plan.jobs, store.rows, scored))
            if stopped:
                echo(f"stopped; {len(store.ended)} of {len(plan.jobs)} jobs have ended; the same command continues")
                return stopped
        store.write()
        return report_active(store, name, plan)


def scored(row: ResultRow) -> tuple[str, float]:
    """Name and value of a job's score: the first metric on dev, the mean over its splits."""
    return row["metrics"][0], score_of(row)


def rerun_lost_rounds(store: ResultStore) -> None:
    """Removes the rows of rounds whose model a remaining round needs but which is gone: they run again.

    A round's model is removed when the next one is finished. Another study of the same folder may continue from it.
    """
    needed, lost = set(), 0
    for job in reversed(store.jobs):  # a job comes after those that it depends on
        done = store.is_done(job)
        if done and job.id in needed and not (store.out / JOBS / job.id / RUN / MODEL).is_dir():
            del store.rows[job.id]
            done, lost = False, lost + 1
        if not done and job.kind == ROUND:
            needed.update(job.after)
    if lost:
        echo(
            f"the models of {plural(lost, 'finished round')}, from which others continue, were removed: they run again"
        )


def counted(plan: ActivePlan) -> str:
    """Summary of the number of jobs."""
    chains = len({(job.model, job.seed) for job in plan.jobs})
    text = (
        f"{plural(len(plan.jobs), 'job')}: {plural(len(plan.study.learners), 'learner')}, {plural(chains, 'chain')} of "
    )
    text += f"{plural(len(plan.rounds), 'round')} from {plan.rounds[0]:,} to {plan.rounds[-1]:,} labels"
    if plan.texts.people:
        return text
    repeated = plan.texts.repeated
    left_out = f" ({plural(repeated, 'repeated text')} of the training split left out)" if repeated else ""
    return f"{text}, pool of {len(plan.texts.examples):,} texts{left_out}"


def describe_active(plan: ActivePlan) -> dict[str, Any]:
    """Flat mapping of the study, for the record and for comparison with a later call."""
    identity = plan.jobs[-1].identity
    found = {name: identity[name] for name in ("model", "data", "task", "options", "threads", "precision")}
    for learner in plan.study.learners:
        found[f"learner {learner.name}"] = {"method": learner.method, "query": learner.query}
    return {**found, "rounds": list(plan.rounds)}


def report_active(store: ResultStore, name: str, plan: ActivePlan) -> int:
    """Writes the report, prints failures and scores, and returns the exit code."""
    rows = store.ended
    done = [row for row in rows if is_done(row)]
    failed = [row for row in rows if not is_done(row)]
    learners = [learner.name for learner in plan.study.learners]
    kinds = ([row for row in done if row["kind"] == kind] for kind in (ROUND, FINAL))
    curves = Curves.of(*kinds, learners, plan.rounds)
    folder = store.out / "report"
    make_inner_folder(folder)
    report = ReportPage(f"Active learning {name}", folder)
    write_active_report(report, plan, curves, failed)
    report.write(provenance(plan.study.path, plan.study.threads, done))
    if curves.finished:
        print(printed_curves(curves))
    if plan.texts.people:
        print("\n".join(["models of the last round, for fastbert select --model:", *newest_models(store, plan)]))
    print(f"{store.out / RESULTS}\n{folder / 'report.html'}")
    return print_failures(failed, len(store.jobs), lambda row: f"{row['labels']} labels, seed {row['seed']}")


def newest_models(store: ResultStore, plan: ActivePlan) -> list[str]:
    """A line for each finished last round: its learner, seed and folder."""
    last = [job for job in store.jobs if job.kind == ROUND and job.setting["labels"] == plan.rounds[-1]]
    return [f"  {job.model}, seed {job.seed}: {store.out / JOBS / job.id / RUN}" for job in last if store.is_done(job)]
