"""`fastbert ablate`: compares a baseline with variants on equal data, order and seeds at equal cost, in one report.

out/ablation.json    the variants, the ids of their jobs, and the step times that converted minutes to steps
out/results.jsonl    one object per job that is done, failed or was not run; rewritten whenever a job ends
out/jobs/<id>/       log.txt, and run/ as written by `fastbert pretrain` or `fastbert finetune`; an evaluation has none
out/report/          report.md, report.html, plots
"""

import statistics
from collections.abc import Container
from functools import partial
from pathlib import Path
from typing import Any

from fastbert.config import leaves
from fastbert.errors import plural
from fastbert.files import locked_folder, make_inner_folder
from fastbert.pretraining.options import science
from fastbert.report.report_page import ReportPage
from fastbert.streams import echo
from fastbert.studies.ablate.ablation_plan import ANNEALING, PRETRAINING, AblationPlan, plan_ablation
from fastbert.studies.ablate.ablation_report import (
    DIFFERENT_INPUTS,
    write_ablation_report,
)
from fastbert.studies.ablate.ablation_tables import planned_table, printed_fractions
from fastbert.studies.ablate.comparability import check_measure, check_pll
from fastbert.studies.ablate.fixed_splits import planned_reasons
from fastbert.studies.ablate.learned import data_table, learned_table, trainings_sentence
from fastbert.studies.ablate.measures import AblationResults
from fastbert.studies.ablate.options import AblateOptions, Ablation
from fastbert.studies.ablate.pretrain_jobs import check_ablation_row
from fastbert.studies.engine.backends import start
from fastbert.studies.engine.events import run_events
from fastbert.studies.engine.live_status import LiveStatus
from fastbert.studies.engine.outcomes import LOG, RUN, print_failures
from fastbert.studies.engine.store import JOBS, RESULTS, ResultRow, ResultStore
from fastbert.studies.shared.comparison import scored
from fastbert.studies.shared.evaluate_jobs import EVALUATE
from fastbert.studies.shared.finetune_jobs import FINETUNE
from fastbert.studies.shared.pretrain_jobs import BRANCH, PRETRAIN
from fastbert.studies.shared.report import provenance

ABLATION = "ablation"


def ablate(ablation: Ablation, options: AblateOptions) -> int:
    """Runs the jobs that are not done yet, then writes and prints the report.

    Returns:
        0, or 1 if a job failed; 130 or 143 after a signal: the report then covers the jobs finished so far, and the
        same command resumes the ablation.

    Raises:
        UserError: invalid input; raised before the first job wherever it can be detected there.
    """
    name = Path(ablation.path).stem
    out = Path(options.out or f"runs/{name}")
    check_measure(ablation, planned_reasons(ablation))
    check_pll(ablation)
    with locked_folder(out):
        store = ResultStore(out, ABLATION, check_ablation_row)
        options.check_backend()
        known = store.described().get("seconds", {})
        plan = plan_ablation(ablation, options.glue_dir, out, known)
        check_measure(ablation, plan.incomparable)
        if options.dry_run:
            print(described_plan(plan, ablation))
            return 0
        store.begin(describe_ablation(ablation, plan), plan.jobs, seconds={**known, **plan.seconds})
        rerun_lost_trainings(store)
        echo(f"{described_plan(plan, ablation)}{store.done_before}")
        echo(f"log of a running job: {out / JOBS / '<id>' / LOG}")
        stopped = run_remaining(plan, store, ablation.threads, options)
        store.write()
        code = report_ablation(out, name, ablation, AblationResults(plan, store.rows))
        if stopped:
            echo(f"stopped; {len(store.ended)} of {len(plan.jobs)} jobs have ended; the same command continues")
        return stopped or code


def describe_ablation(ablation: Ablation, plan: AblationPlan) -> dict[str, Any]:
    """Flat mapping of all options that define the ablation, for its record and for comparison with a later call."""
    found: dict[str, Any] = {}
    for variant in plan.variants:
        options = variant.setup.options
        for name, value in science(options, variant.setup.fingerprint).items():
            if name not in ("seed", "steps"):
                found[f"{variant.name}: {name}"] = value
        found[f"{variant.name}: steps"] = variant.steps
        if "initial" in variant.identity:
            found[f"{variant.name}: initial weights"] = variant.identity["initial"]
    found["machine"] = {leaf.name: leaf.value for leaf in leaves(options) if leaf.role == "machine"}
    tasks = [entry.task for entry in ablation.grid.tasks]
    return {
        **found,
        **{name: list(getattr(ablation, name)) for name in ("seeds", "points")},
        "anneal": ablation.anneal,
        "threads": ablation.threads,
        "tasks": tasks,
        "finetune": ablation.grid.finetune,
        **{f"evaluate {evaluation.key}": evaluation.data for evaluation in plan.evaluations},
        **{f"validation {split.name}": split.fingerprint for split in plan.splits},
    }


def rerun_lost_trainings(store: ResultStore) -> None:
    """Removes the rows of trainings whose checkpoints a remaining job needs but which are missing: they run again."""
    needed, lost = set(), 0
    for job in reversed(store.jobs):  # a job comes after those that it depends on
        checkpoints = store.out / JOBS / job.id / RUN / "checkpoints"
        if job.id in needed and store.is_done(job) and not checkpoints.is_dir():
            del store.rows[job.id]
            lost += 1
        if not store.is_done(job):
            needed.update(job.after)
    if lost:
        echo(f"the checkpoints of {plural(lost, 'earlier training')} are missing; they will run again")


def described_plan(plan: AblationPlan, ablation: Ablation) -> str:
    """Tables of the trainings and their costs, and the number of jobs, for a terminal."""
    lines = [planned_table(plan, ablation).plain(), counted_kinds(plan)]
    if plan.splits:
        lines = [data_table(plan, ablation).plain(), f"{trainings_sentence(plan, ablation)}\n", *lines]
    return "\n".join(lines)


def counted_kinds(plan: AblationPlan) -> str:
    """Summary of the number of jobs of each kind."""
    kinds = [job.kind for job in plan.jobs]
    names = {PRETRAIN: "pretraining", BRANCH: "annealing", FINETUNE: "fine-tuning", EVALUATE: "evaluation"}
    parts = [plural(kinds.count(kind), name) for kind, name in names.items() if kind in kinds]
    return f"{plural(len(kinds), 'job')}: {', '.join(parts)}"


def run_remaining(plan: AblationPlan, store: ResultStore, threads: int, options: AblateOptions) -> int:
    """Runs the remaining jobs, each after those that it depends on.

    Returns:
        0, or the exit code after a signal.
    """
    remaining = store.remaining
    if not remaining:
        return 0
    incomparable = plan.incomparable
    for left_out in plan.incomparable_on.values():  # the live status shows the mean of all splits
        incomparable |= left_out
    cells = {(variant, task) for variant in incomparable for task in (PRETRAINING, ANNEALING)}
    live = LiveStatus(plan.jobs, store.rows, partial(measured, incomparable=incomparable), cells)
    timed_on = plan.variants[0].setup.device.type
    return run_events(start(options, remaining, store, threads, in_place=True, timed_on=timed_on), store, live)


def measured(row: ResultRow, incomparable: Container[str] = ()) -> tuple[str, float]:
    """Name and value of a finished job's measure, for the live status. Losses of `incomparable`
    variants have another name than the baseline's."""
    if row["kind"] in (FINETUNE, EVALUATE):
        return scored(row)
    name = f"incomparable loss ({row['objective']})" if row["model"] in incomparable else "validation loss"
    last = row["validations"][-1]
    if "splits" not in last:
        return name, last["loss"]
    losses = [figures["loss"] for figures in last["splits"].values()]
    return name.replace("validation", "mean"), statistics.fmean(losses)


def report_ablation(out: Path, name: str, ablation: Ablation, results: AblationResults) -> int:
    """Writes the report, prints failures and the fractions of cost, and returns the exit code."""
    total, done, failed = len(results.plan.jobs), list(results.done.values()), results.failed
    folder = out / "report"
    make_inner_folder(folder)
    report = ReportPage(f"Ablation {name}", folder)
    write_ablation_report(report, ablation, results)
    report.write(provenance(ablation.path, ablation.threads, done))
    if done and results.plan.splits:
        print(f"Learned and forgotten\n{learned_table(results).plain()}\n")
    if done:
        print(printed_fractions(results))
        for line in results.left_out:
            echo(line)
        if results.losses and results.objective.second_network:
            echo(f"validation loss: {DIFFERENT_INPUTS}")
    print(f"{out / RESULTS}\n{folder / 'report.html'}")
    return print_failures(failed, total, lambda row: f"seed {row['seed']}")
