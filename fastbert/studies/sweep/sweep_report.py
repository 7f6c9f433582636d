"""Report of a sweep: scores with their spread, checkpoints compared with the first one, all settings, and zero-shot
evaluations."""

from collections.abc import Sequence

from fastbert.errors import plural
from fastbert.report.page import Table
from fastbert.report.report_page import ReportPage
from fastbert.studies.engine.store import ResultRow
from fastbert.studies.shared.comparison import SETTING, Comparison
from fastbert.studies.shared.evaluate_jobs import EVALUATE
from fastbert.studies.shared.finetune_jobs import ensemble_of
from fastbert.studies.shared.tuning_report import Ensembles, write_compared, write_scores, write_tried
from fastbert.studies.sweep.sweep_plan import SweepPlan
from fastbert.studies.sweep.zero_shot_report import ZeroShotResults, write_zero_shot


def dev_ensembles(comparison: Comparison, plan: SweepPlan) -> Ensembles:
    """The ensemble of the seeds of each checkpoint on each task, at its best setting.

    Raises:
        UserError: the scores of a job on dev are damaged.
    """
    return {
        (model, task): ensemble_of(trials.settings[trials.best], plan.opened[task].task, plan.opened[task].labels)
        for (model, task), trials in comparison.trials.items()
    }


def write_sweep_report(
    report: ReportPage,
    trained: Sequence[Table],
    comparison: Comparison,
    zero_shot: ZeroShotResults,
    failed: Sequence[ResultRow],
    total: int,
    ensembles: Ensembles,
) -> None:
    """Adds all sections to the page of a sweep, and writes the plots.

    Args:
        trained: tables of `SweepPlan.tables`.
        failed: rows of failed jobs.
        total: number of jobs of the sweep.
    """
    tuned = sum(len(rows) for trials in comparison.trials.values() for rows in trials.settings.values())
    count = f"{tuned + len(zero_shot)} of {total} jobs have finished" + (f", {len(failed)} failed" if failed else "")
    on = f" on {plural(len(comparison.tasks), 'task')}; scores of tasks are on dev, x 100" if comparison.tasks else ""
    report.text(f"{count}: {plural(len(comparison.models), 'checkpoint')}{on}.")
    if comparison.trials:
        write_scores(report, comparison, ensembles)
        write_compared(report, comparison)
        write_tried(report, comparison)
    if len(zero_shot):
        write_zero_shot(report, zero_shot, comparison.models[0])
    report.heading("What was trained")
    for table in trained:
        report.table(table)
    if failed:
        report.heading("Failed jobs")
        rows = [[row["task"], row["model"], format_job(row), row["reason"]] for row in failed]
        report.table(Table(["job", "checkpoint", f"{SETTING}, seed", "reason"], rows))
        report.text("The same command runs them again.")


def format_job(row: ResultRow) -> str:
    if row["kind"] == EVALUATE:
        return "zero-shot"
    return f"{row['learning_rate']:g}, {row['batch_size']}, {row['epochs']}, seed {row['seed']}"
