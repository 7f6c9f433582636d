"""Report of a study of active learning: scores over labels and over cost, areas with paired tests, final trainings."""

import statistics
from collections.abc import Sequence
from typing import Any

from fastbert.config import leaves
from fastbert.errors import plural
from fastbert.finetuning.continual.tuner import PASSES
from fastbert.finetuning.table import NOTHING
from fastbert.report.page import Table
from fastbert.report.report_page import ReportPage
from fastbert.studies.active.curves import Curves
from fastbert.studies.active.plan import ActivePlan
from fastbert.studies.engine.outcomes import by_reason, parted, sentence_not_run
from fastbert.studies.engine.store import ResultRow
from fastbert.studies.shared.plots import add_legend, new_panels, series_style, style_axes
from fastbert.studies.shared.report import difference, interval, p_value, percent, short_count
from fastbert.studies.shared.statistics import flip_limits
from fastbert.studies.shared.trained import columns_table, encoder_columns, task_columns


def write_active_report(report: ReportPage, plan: ActivePlan, curves: Curves, failed: Sequence[ResultRow]) -> None:
    """Adds all sections to the page, and writes the plots.

    Args:
        failed: rows of the jobs that failed, or did not run because another one failed.
    """
    failed, not_run = parted(failed)
    chains = sum(map(len, curves.chains.values()))
    total = sum(len(learner.seeds) for learner in plan.study.learners)
    report.text(
        f"{chains} of {plural(total, 'chain')} of {plural(len(plan.rounds), 'round')} have finished"
        + (f", {plural(len(failed), 'job')} failed" if failed else "")
        + f". Scores are {curves.metric or 'the first metric'} on dev x 100 after the last epoch of a round: no epoch "
        "is selected on dev."
    )
    if curves.finished:
        report.heading("Scores over labels")
        report.table(scores_table(curves))
        report.plot("labels.svg", "score over the number of labels", plot_labels, curves)
        write_areas(report, curves)
        write_costs(report, curves)
        write_final(report, curves)
    report.heading("What was trained")
    setup = plan.texts.setup
    report.table(columns_table("checkpoint", {plan.study.model: encoder_columns(setup.pretrained)}))
    report.table(columns_table("task", {setup.task.name: task_columns(setup)}))
    report.table(learners_table(plan))
    report.table(options_table(plan))
    if failed:
        report.heading("Failed jobs")
        rows = [[row["model"], f"{row['labels']}", f"{row['seed']}", row["reason"]] for row in failed]
        report.table(Table(["learner", "labels", "seed", "reason"], rows))
        lines = [sentence_not_run(rows) for rows in by_reason(not_run)]
        report.text("".join(f"{line}. " for line in (*lines, "The same command runs all of them")).strip())


def scores_table(curves: Curves) -> Table:
    """The mean score after each round."""
    rows = [
        [name, f"{len(curves.chains[name])}", *(percent(mean) for mean in curves.means(name, "score"))]
        for name in curves.finished
    ]
    return Table(["learner", "seeds", *(f"{labels:,} labels" for labels in curves.rounds)], rows)


def write_areas(report: ReportPage, curves: Curves) -> None:
    """Adds the areas under the curves and the paired tests."""
    report.heading("Area under the curve")
    rows = []
    for name in curves.finished:
        values = list(curves.areas[name].values())
        spread = f"{100 * statistics.stdev(values):.2f}" if len(values) > 1 else NOTHING
        rows.append([name, percent(statistics.fmean(values)), spread, f"{len(values)}"])
    report.table(Table(["learner", "area", "standard deviation", "seeds"], rows))
    report.text(
        "The area under the score over the number of labels, divided by the width: the mean score of all numbers of "
        "labels between the first and the last round."
    )
    if not curves.compared:
        return
    rows = [
        [
            *(one.other, f"{one.result.n}", difference(one.result), interval(one.result)),
            *(p_value(one.p_t), p_value(one.p_flip), one.verdict),
        ]
        for one in curves.compared
    ]
    head = ["learner", "pairs", f"minus {curves.learners[0]}", "95 % interval", "p (t, Holm)", "p (sign flip, Holm)"]
    report.table(Table([*head, "verdict"], rows))
    if limits := flip_limits([one.result.n for one in curves.compared], len(curves.compared)):
        report.text(limits)


def write_costs(report: ReportPage, curves: Curves) -> None:
    """Adds the costs and the scores over cost."""
    report.heading("Scores over cost")
    report.table(cost_table(curves))
    report.text(
        f"Costs are in gradients of an example: forward and backward; a further forward pass counts 1/{PASSES}. The "
        "training includes replay, trial steps, the choice of replayed examples and the stored logits. The query is "
        "the scoring of the pool before each round after the first. Seconds depend on what else the machine was doing."
    )
    report.table(reached_table(curves))
    report.plot("cost.svg", "score over cost", plot_costs, curves)


def cost_table(curves: Curves) -> Table:
    """The costs of all rounds, and the ratios of the first learner's costs to them."""
    first, rows = curves.learners[0], []
    whole = {name: {key: curves.means(name, key)[-1] for key in COSTS} for name in curves.finished}
    for name, costs in whole.items():
        ratios = [
            f"{whole[first][key] / costs[key]:.2f}" if first in whole and costs[key] else NOTHING
            for key in ("training", "total")
        ]
        cells = [short_count(round(costs["training"])), short_count(round(costs["total"])), *ratios]
        rows.append([name, *cells, f"{costs['seconds_training']:.1f}", f"{costs['seconds_total']:.1f}"])
    head = ["learner", "training", "with query", f"{first} / training", f"{first} / with query"]
    return Table([*head, "seconds of training", "seconds with query"], rows)


COSTS = ("training", "total", "seconds_training", "seconds_total")


def reached_table(curves: Curves) -> Table:
    """The cost at which each learner reaches the last score of the first one."""
    first = curves.learners[0] if curves.chains[curves.learners[0]] else curves.finished[0]
    goal = curves.means(first, "score")[-1]
    rows = []
    for name in curves.finished:
        found = curves.cost_to_reach(name, goal)
        cells = [NOTHING] * 3
        if found is not None:
            cells = [f"{found[0]:,}", short_count(round(found[1])), short_count(round(found[2]))]
        rows.append([name, percent(curves.means(name, "score")[-1]), *cells])
    return Table(
        ["learner", "last score", f"labels to {percent(goal)}, the last of {first}", "training", "with query"], rows
    )


def write_final(report: ReportPage, curves: Curves) -> None:
    """Adds the models that were trained anew on the labels of the last round."""
    rows = []
    for name in curves.finished:
        seeds = sorted(curves.final[name].keys() & curves.chains[name].keys())
        if seeds:
            last = [curves.chains[name][seed][-1].score for seed in seeds]
            anew = [curves.final[name][seed] for seed in seeds]
            rows.append([name, percent(statistics.fmean(last)), percent(statistics.fmean(anew)), f"{len(seeds)}"])
    if rows:
        report.heading("Trained anew on the chosen labels")
        report.table(Table(["learner", "after the last round", "anew on the same labels", "seeds"], rows))


def learners_table(plan: ActivePlan) -> Table:
    rows = []
    for learner in plan.study.learners:
        used = learner.replay.used(learner.method, plan.texts.setup.options.batch_size)
        settings = ", ".join(
            f"{name.replace('_', ' ')} {'median distance' if v is None else f'{v:g}'}" for name, v in used.items()
        )
        rows.append([learner.name, learner.method, learner.query or "people", settings])
    return Table(["learner", "method", "query", "replay"], rows)


def options_table(plan: ActivePlan) -> Table:
    """Options of the trainings."""
    options = plan.texts.setup.options
    names = ("learning_rate", "batch_size", "epochs", "max_length", "schedule.name", "schedule.warmup", "dropout")
    values = {leaf.name: leaf.value for leaf in leaves(options)}
    rows = [
        [name.replace("_", " ").removesuffix(".name").replace("schedule.", ""), f"{values[name]}"] for name in names
    ]
    rows += [["pool", f"{len(plan.texts.examples):,} texts"]] if not plan.texts.people else []
    return Table(["option", "value"], rows)


def printed_curves(curves: Curves) -> str:
    """Scores and areas for a terminal."""
    head = ["learner", "seeds", *(f"{labels}" for labels in shown_rounds(curves.rounds)), "area", "training", "+ query"]
    rows = []
    for name in curves.finished:
        means = dict(zip(curves.rounds, curves.means(name, "score"), strict=True))
        cells = [percent(means[labels]) for labels in shown_rounds(curves.rounds)]
        cells.append(percent(statistics.fmean(curves.areas[name].values())))
        cells += [short_count(round(curves.means(name, key)[-1])) for key in ("training", "total")]
        rows.append([name, f"{len(curves.chains[name])}", *cells])
    lines = [f"{curves.metric} on dev x 100 after rounds with these numbers of labels; cost in gradients of an example"]
    lines.append(Table(head, rows).plain())
    for one in curves.compared:
        lines.append(
            f"area of {one.other} minus {one.first}: {difference(one.result)} {interval(one.result)}, {one.verdict}"
        )
    return "\n".join(lines)


def shown_rounds(rounds: Sequence[int], most: int = 6) -> list[int]:
    """Up to `most` of the rounds, evenly spaced, with the first and the last."""
    if len(rounds) <= most:
        return list(rounds)
    return [rounds[round(index * (len(rounds) - 1) / (most - 1))] for index in range(most)]


# --- plots


def plot_labels(curves: Curves) -> Any:
    """One panel: the mean over the seeds as a line, each seed as points."""
    figure, axes = new_panels(1, 6.5)
    for number, name in enumerate(curves.learners):
        if curves.chains[name]:
            style = series_style(number)
            for points in curves.chains[name].values():
                plain = {**style, "linestyle": "", "alpha": 0.35, "markersize": 3}
                axes[0].plot(curves.rounds, [100 * point.score for point in points], **plain)
            means = [100 * mean for mean in curves.means(name, "score")]
            axes[0].plot(curves.rounds, means, **style, markersize=4, label=name)
    axes[0].set_xlabel("labels", fontsize=9)
    axes[0].set_ylabel(f"{curves.metric} x 100", fontsize=9)
    style_axes(axes[0], "both")
    add_legend(figure, axes)
    return figure


def plot_costs(curves: Curves) -> Any:
    """Two panels, without and with the query: mean score over mean cost."""
    titles = {"training": "training", "total": "training and query"}
    figure, axes = new_panels(2, 5.0)
    for panel, (key, title) in zip(axes, titles.items(), strict=True):
        for number, name in enumerate(curves.learners):
            if curves.chains[name]:
                means = [100 * mean for mean in curves.means(name, "score")]
                panel.plot(curves.means(name, key), means, **series_style(number), markersize=4, label=name)
        panel.xaxis.set_major_formatter(lambda value, position: short_count(value))
        panel.set_xlabel("cost in gradients of an example", fontsize=9)
        panel.set_ylabel(f"{curves.metric} x 100", fontsize=9)
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
        style_axes(panel, "both")
    add_legend(figure, axes)
    return figure
