"""Report of an ablation: fractions of the baseline's cost, curves, final values with their spread, cost and noise."""

import statistics
from collections.abc import Sequence
from dataclasses import replace

from fastbert.errors import plural
from fastbert.finetuning.table import NOTHING
from fastbert.report.page import Table
from fastbert.report.report_page import ReportPage
from fastbert.studies.ablate.ablation_plan import AblationPlan
from fastbert.studies.ablate.ablation_plots import plot_budgets, plot_curves, plot_fractions
from fastbert.studies.ablate.ablation_tables import (
    UNIT_NAMES,
    equal_cost_table,
    finals_table,
    format_fraction,
    format_value,
    fractions_table,
    phenomena_table,
    planned_table,
    seeds_table,
    targets_table,
    trained_table,
    training_sentence,
)
from fastbert.studies.ablate.analysis import (
    LEARNED,
    SAME_COST,
    Measure,
    VariantComparison,
    compare_variants,
    limits,
    noise,
)
from fastbert.studies.ablate.fixed_splits import shown_splits
from fastbert.studies.ablate.learned import add_learned, changed_options, data_table, described_changes
from fastbert.studies.ablate.measures import ZERO_SHOT, AblationResults
from fastbert.studies.ablate.options import UNITS, Ablation
from fastbert.studies.engine.outcomes import by_reason, parted, sentence_not_run
from fastbert.studies.shared.comparison import SETTING, format_setting
from fastbert.studies.shared.evaluate_jobs import evaluated_table
from fastbert.studies.shared.finetune_jobs import FINETUNE
from fastbert.studies.shared.plots import plot_scores
from fastbert.studies.shared.report import p_value
from fastbert.studies.shared.trained import columns_table, tuning_table

DIFFERENT_INPUTS = (
    "Each variant's generator or meta controller creates its validation inputs, so a lower loss may also mean easier "
    "inputs."
)
PAIRS_SCORES = (
    "Each sentence is scored as its model's objective allows: pll is the pseudo-log-likelihood of masked language "
    "modeling; other scores are those of the objective. A tie counts as half."
)
SATURATED = 0.7  # fraction of the steps; a baseline that reaches its final value earlier gets a remark


def write_ablation_report(report: ReportPage, ablation: Ablation, results: AblationResults) -> None:
    """Adds all sections to the page of an ablation, and writes the plots."""
    _overview(report, ablation, results)
    if results.plan.splits and results.done:
        add_learned(report, results)
    compared = {measure.name: compare_variants(measure, results.hardly_learned()) for measure in results.measures}
    along = [measure for measure in results.measures if measure.along]
    if along:
        _fractions(report, along, {measure.name: compared[measure.name] for measure in along})
    if along and ablation.anneal is not None:  # else the points before the end are not the ends of trainings
        _smaller_budgets(report, results, along)
        _equal_cost(report, ablation, results, along)
    if at_end := [measure for measure in results.measures if not measure.along]:
        _at_end(report, at_end, compared)
    if results.left_out:
        report.heading("Not compared")
        report.points(results.left_out)
    for number, measure in enumerate(results.measures):
        _measure(report, f"curves-{number}.svg", results, measure, compared[measure.name])
    if results.done:
        _validation(report, results)
        _costs(report, results)
    if len(results.done) < len(results.plan.jobs):
        _failed(report, results)
    _trained(report, ablation, results.plan)


def _overview(report: ReportPage, ablation: Ablation, results: AblationResults) -> None:
    plan = results.plan
    others = plural(len(plan.variants) - 1, "variant")
    seeds, unit = plural(len(ablation.seeds), "seed"), UNIT_NAMES[ablation.budget.equal]
    if plan.splits:
        report.text(
            f"{results.baseline.name} is the baseline; {others} that may differ from it in the data, with {seeds}, at "
            f"equal {unit}. All are validated on the same held-out documents: {shown_splits(plan.splits)}. "
            f"{training_sentence(plan, ablation)}"
        )
        report.table(data_table(plan, ablation))
        report.points(changed_options(plan, ablation))
    else:
        report.text(
            f"{results.baseline.name} is the baseline; {others} with the same data, order and {seeds}, at equal "
            f"{unit}. {training_sentence(plan, ablation)}"
        )
        report.points(described_changes({variant.name: variant.setup.options for variant in plan.variants}))
    report.table(planned_table(plan, ablation))
    report.text(
        "In brackets the difference from the baseline's step. FLOPs are computed in closed form for all networks, "
        "forward and backward. The time of a step was measured before the first job, in rounds in which the variants "
        "alternate: the fastest round, because other work on the machine only slows steps down. Spread: how much "
        "slower the slowest round was."
    )
    if ablation.anneal is None:
        points = (
            "Measured along one training with its own schedule. If its learning rate decays, the points before the end "
            "are measured at a learning rate that is still high, so the fractions are larger than a shorter "
            "training would need; `anneal` avoids that."
        )
    else:
        points = (
            "Measured after annealing: the learning rate is constant after the warm-up, and at each point it falls to "
            f"0 within {100 * ablation.anneal:g} % of the steps done so far, in a training that branches off. The cost "
            "of a point includes its annealing."
        )
    shown = ", ".join(f"{100 * point:g}" for point in ablation.points)
    report.text(f"{points} Points: {shown} % of the budget.")
    masked_loss = results.masked_loss()
    if masked_loss is None:
        return
    gain = plan.unigram_entropy - masked_loss
    of, why = "of the baseline", ""
    if second := results.objective.second_network:
        of += f"'s {second}"
        why = " (under its objective the main network predicts no masked words)"
    hardly = results.hardly_learned()
    verdict = f"less than {LEARNED} nats, so nothing is decided" if hardly else "enough for a verdict"
    own = " on its own held-out documents" if plan.splits else ""
    report.text(
        f"The masked loss {of}{own} at the end{why} is {masked_loss:.3f} nats, {abs(gain):.3f} "
        f"{'below' if gain >= 0 else 'above'} the unigram entropy of the validation text, {plan.unigram_entropy:.3f}: "
        f"{verdict}."
    )


def _trained(report: ReportPage, ablation: Ablation, plan: AblationPlan) -> None:
    report.heading("What was trained")
    report.text("The baseline; the variants differ from it as stated at the top of the page.")
    report.table(trained_table(plan, ablation))
    if plan.evaluations:
        report.table(evaluated_table(plan.evaluations))
    if plan.tasks:
        report.text("Every checkpoint was fine-tuned on:")
        report.table(columns_table("task", plan.tasks))
        report.table(tuning_table([job for job in plan.jobs if job.kind == FINETUNE]))


def _fractions(report: ReportPage, along: list[Measure], compared: dict[str, list[VariantComparison]]) -> None:
    report.heading("Fraction of the baseline's cost to reach its final quality")
    for measure in along:
        rows = compared[measure.name]
        report.text(f"By {measure.name}:")
        report.table(fractions_table(measure, rows))
        if limit := limits(rows):
            report.text(limit)
    report.text(
        "Better by: the mean difference of the final values, positive if the variant is better. Fractions: the median "
        "over the seeds, in brackets the smallest and the largest. Each seed is compared with the baseline's training "
        "of the same seed: that training's final value is the target, and fractions are relative to its final cost. "
        "The linearly interpolated curve reaches the target at the cost from which it is never "
        "worse again. `≤`: the first point already reaches the target. A variant is undecided unless its final values "
        "differ from the baseline's by more than the noise of the measure (below) and the paired t-test over seeds, "
        "adjusted over the variants by Holm's method, gives a p below 0.05; a decided variant has reached the "
        "baseline's quality if its mean is better."
    )
    caption = "Fractions by seed, the median as a bar; hollow where the verdict is undecided."
    report.plot("fractions.svg", caption, plot_fractions, compared)


def _smaller_budgets(report: ReportPage, results: AblationResults, measures: Sequence[Measure]) -> None:
    """Adds the fractions at all points of the baseline at which it has learned."""
    report.heading("Fraction of the baseline's cost at smaller budgets")
    too_early = sorted({point for measure in measures for point in measure.fractions if results.hardly_learned(point)})
    for number, measure in enumerate(measures):
        targets = [point for point in measure.fractions if point not in too_early]
        if len(targets) > 1:
            report.text(f"By {measure.name}:")
            budgets = {point: measure.until(point) for point in targets}
            compared = {point: compare_variants(until, False, measure) for point, until in budgets.items()}
            report.table(targets_table(measure, compared))
            caption = "Every seed a point, the medians a line; hollow where the verdict is undecided."
            report.plot(f"budgets-{number}.svg", caption, plot_budgets, compared)
    if too_early:
        shown = ", ".join(f"{100 * point:g}" for point in too_early)
        report.text(
            f"Points that are no targets: {shown} % of the budget, where the baseline's masked loss is less than "
            f"{LEARNED} nats below the unigram entropy."
        )
    report.text(
        "Each point of the baseline is the end of a separate, shorter training, so its value there is a target as "
        "well. A row has the difference, the p-value, the verdict and the fractions that an ablation with this "
        "fraction of the budget would have; 100 % of the cost is that of the baseline's training to this point. A "
        "variant that is worse there is `not reached`; its fractions are shown if a later point of it reaches the "
        "target, above 100 % in the unit of the budget. `≤`: its first point already reaches the target. The p-values "
        "are adjusted over the variants, not over the points."
    )


def _equal_cost(report: ReportPage, ablation: Ablation, results: AblationResults, measures: Sequence[Measure]) -> None:
    """Adds the values at equal steps, FLOPs and minutes."""
    equal = ablation.budget.equal
    report.heading("At equal cost")
    for measure in measures:
        report.text(f"By {measure.name}:")
        report.table(equal_cost_table(measure, results.hardly_learned(), equal))
    others = [UNIT_NAMES[unit] for unit in UNITS if unit != equal]
    report.text(
        f"Values when a variant has cost as much as the baseline at its end. At equal {UNIT_NAMES[equal]}, the unit of "
        f"the budget, they are the final values. At equal {others[0]} or {others[1]} they are linearly interpolated "
        "between the variant's points, each the end of a separate training; where a curve flattens, that is slightly "
        "worse than a training of this cost would be. No curve is extrapolated: a variant whose curve ends before that "
        "cost, or begins after it, has no value, and needs an ablation with this unit as `equal`; one that "
        f"ends within {100 * SAME_COST:g} % of it is read at its end. Differences, tests and verdicts are computed as "
        "for final values, adjusted over the variants in each unit."
    )


def _at_end(report: ReportPage, measures: Sequence[Measure], compared: dict[str, list[VariantComparison]]) -> None:
    """Adds the measures that exist only at the last point."""
    report.heading("Quality at the end of the budget")
    scores = {m.name: {name: list(m.finals(name).values()) for name in m.curves} for m in measures}
    report.plot("finals.svg", "Every seed a point, the median a bar.", plot_scores, scores, dict.fromkeys(scores, ""))
    body = []
    for measure in measures:
        for row in compared[measure.name][1:]:
            better = format_value(measure, row.result and row.result.mean, "+")
            body.append([measure.name, row.variant, str(len(row.seeds)), better, p_value(row.p), row.verdict])
    report.table(Table(["measure", "variant", "seeds", "better by", "p (Holm)", "verdict"], body))
    for limit in dict.fromkeys(limits(compared[measure.name]) for measure in measures):
        if limit:
            report.text(limit)
    report.text(
        "`reached`: better than the baseline at the end of the budget. The rule is the same as for fractions: a "
        "difference beyond the noise of the measure (below), and a paired t-test adjusted over the variants."
    )


def _measure(
    report: ReportPage,
    plot: str,
    results: AblationResults,
    measure: Measure,
    rows: list[VariantComparison],
) -> None:
    report.heading(f"By {measure.name}")
    floor = results.losses.get(measure.name)
    if measure.along:
        dashed = ", the unigram entropy dashed" if floor is not None else ""
        caption = f"Every seed thin, medians thick, the baseline's final median dotted{dashed}."
        report.plot(plot, caption, plot_curves, measure, floor)
    report.table(finals_table(measure, rows))
    own = rows[0].fractions["steps"]
    if measure.along and own.median < SATURATED:
        start = ("at most " if own.median_at_most else "") + format_fraction(own.median)
        report.text(
            f"The baseline itself reaches its final value by {start} of its steps: after that it no longer improves "
            "by this measure, or the noise hides it, so fractions mean little."
        )
    report.text(_noise(results, measure))
    if measure.name == ZERO_SHOT["pairs"][0]:
        report.text(
            f"By phenomenon at the end of the budget, accuracy x 100, the median over the seeds. {PAIRS_SCORES}"
        )
        report.table(phenomena_table(results))
    if measure.name in results.losses and results.objective.second_network:
        report.text(DIFFERENT_INPUTS)
    report.text("Seed by seed, for every verdict:")
    report.table(seeds_table(measure, rows))


def _noise(results: AblationResults, measure: Measure) -> str:
    found = noise(measure)
    if found is None:
        return "The noise of the measure is unknown: no variant has two finished seeds."
    text = (
        f"Noise of the measure: the final values of a variant have a standard deviation over seeds of "
        f"{format_value(measure, found.std)} (pooled over the variants, {plural(found.freedom, 'degree')} of freedom). "
        f"Differences below about {format_value(measure, found.visible)} are within the spread of this many seeds."
    )
    task = measure.name.partition(",")[0]
    if task in results.tasks and (trials := results.trial_noise(task)) is not None:
        text += f" Fine-tuning one checkpoint repeatedly gives a standard deviation of {format_value(measure, trials)}."
    settings = {v.name: results.best_setting(v, task) for v in results.plan.variants} if task in results.tasks else {}
    if chosen := {name: format_setting(setting) for name, setting in settings.items() if setting}:
        same = set(chosen.values())
        shown = same.pop() if len(same) == 1 else "; ".join(f"{name} {setting}" for name, setting in chosen.items())
        text += f" Fine-tuned with {SETTING}: {shown}."
    return text


def _validation(report: ReportPage, results: AblationResults) -> None:
    """Adds the validation figures of every variant. Losses that cannot be compared with the baseline's get
    no entry in its column."""
    own = bool(results.plan.splits)
    report.heading("Validation at the end" + (" on each variant's own held-out documents" if own else ""))
    # Each training's own documents are another text with `mode: data`.
    incomparable, rows = {} if own else results.plan.incomparable, []
    for variant in results.plan.variants:
        ends = [point for point in results.plan.points[variant.name] if point.fraction == 1]
        found = [at for point in ends if (at := results.validation(point)) is not None]
        objective = variant.setup.options.objective
        names = [name for name in found[0] if name not in ("step", "splits")] if found else []
        medians = {name: f"{statistics.median(at[name] for at in found):.4f}" for name in names}
        loss = medians.pop("loss", NOTHING)
        if found and variant.name in incomparable:
            medians, loss = {f"incomparable loss ({objective})": loss, **medians}, NOTHING
        figures = ", ".join(f"{name} {value}" for name, value in medians.items()) or NOTHING
        rows.append([variant.name, objective, str(len(found)), loss, figures])
    nats = results.objective.loss_in_nats
    column = "masked loss" if nats else f"{results.baseline.setup.options.objective} loss"
    report.table(Table(["variant", "objective", "seeds", column, "other medians"], rows))
    report.text("Medians over the seeds. Losses and entropies are in nats.")
    if own:
        report.text("These texts differ between variants with different data: their losses are not compared.")
    if incomparable:
        report.text(
            f"The losses of {', '.join(incomparable)} are not comparable with the baseline's: their validation "
            "differs (objective, masks, lengths, or the networks that create its inputs). Across objectives only "
            "fine-tuning and minimal pairs are comparable."
        )
    if any(variant.setup.note_corpus for variant in results.plan.variants):
        report.text(
            "Where a variant has a note dictionary, its validation reads it; exports, fine-tuning "
            "and evaluations do not."
        )


def _costs(report: ReportPage, results: AblationResults) -> None:
    report.heading("Cost")
    rows = []
    for variant in results.plan.variants:
        end, setup = results.plan.points[variant.name][-1], variant.setup
        minutes = variant.minutes_to(end)
        tokens = replace(setup, options=end.options).plan().tokens(0, end.steps)
        rows.append(
            [
                variant.name,
                f"{end.steps}",
                f"{tokens:.3g}",
                f"{variant.flops_to(end):.3g}",
                f"{minutes:.2f}",
                f"{tokens / (60 * minutes):.0f}",
            ]
        )
    head = ["variant", "steps", "tokens", "FLOPs", "minutes", "tokens/s"]
    report.table(Table(head, rows))
    report.text(
        "At the end of the budget, with the last annealing. Minutes are the number of steps times the measured time of "
        "a step."
    )


def _failed(report: ReportPage, results: AblationResults) -> None:
    report.heading("Missing jobs")
    failed, not_run = parted(results.failed)
    if failed:
        rows = [[row["task"], row["model"], str(row["seed"]), row["reason"]] for row in failed]
        report.table(Table(["job", "variant", "seed", "reason"], rows))
    lines = [sentence_not_run(rows) for rows in by_reason(not_run)]
    if waiting := len(results.plan.jobs) - len(results.done) - len(results.failed):
        lines.append(f"{plural(waiting, 'more job')} did not run: the ablation was stopped")
    lines += ["The same command runs the missing jobs", "Seeds without a final value are left out above"]
    report.text("".join(f"{line}. " for line in lines).strip())
