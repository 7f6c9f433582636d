"""The report of an ablation: shares of the baseline's cost, curves, final values with their spread, costs and noise."""

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbert.config import differences, leaves
from fastbert.finetuning.results import score_summary
from fastbert.finetuning.table import NOTHING
from fastbert.report.page import Table
from fastbert.studies.ablate.ablation_plan import AblationPlan
from fastbert.studies.ablate.ablation_plots import draw_curves, draw_shares
from fastbert.studies.ablate.analysis import (
    LEARNED,
    CostFraction,
    Measure,
    VariantComparison,
    compare_variants,
    limits,
    noise,
)
from fastbert.studies.ablate.costs import timing_key
from fastbert.studies.ablate.measures import AblationResults
from fastbert.studies.ablate.options import UNITS, Ablation
from fastbert.studies.shared.comparison import SETTING, shown_setting
from fastbert.studies.shared.plots import draw_scores
from fastbert.studies.shared.report import WIDTH, ReportPage, p_value, plural, save_drawing

UNIT_NAMES = {"steps": "steps", "flops": "FLOPs", "minutes": "minutes"}
OWN_QUESTIONS = (
    "Each variant's own generator or meta controller poses the questions here, so that a lower loss may also mean "
    "easier ones."
)
SATURATED = 0.7  # share of its own steps below which a baseline that is at its final value is remarked on


def planned_table(plan: AblationPlan, ablation: Ablation) -> Table:
    """What each variant costs, before anything runs."""
    end = 1 + (ablation.anneal or 0)
    rows = [
        [
            variant.name,
            f"{variant.parameters / 1e6:.2f}M",
            f"{variant.flops:.3g}",
            f"{variant.steps}",
            f"{variant.flops_to(plan.places[variant.name][-1]):.3g}",
        ]
        for variant in plan.variants
    ]
    steps = "steps" if end == 1 else "steps before annealing"
    return Table(["variant", "parameters", "FLOPs a step", steps, "FLOPs"], rows)


# --- shares


def shown_share(value: float) -> str:
    return f"{100 * value:.0f} %" if math.isfinite(value) else "not reached"


def share_cell(share: CostFraction) -> str:
    """The median over seeds and, in brackets, the least and the most."""
    median = ("≤ " if share.median_at_most else "") + shown_share(share.median)
    least, most = (shown_share(value) for value in (min(share.values), max(share.values)))
    return median if least == most else f"{median} ({least} to {most})"


def shares_table(rows: Sequence[VariantComparison]) -> Table:
    """Variants x units; what is undecided shows no share."""
    body = []
    for row in rows:
        if row.verdict == "not reached" or not row.decided:
            cells = [row.verdict.partition(":")[0]] * len(UNITS)
        else:
            cells = [share_cell(row.shares[unit]) for unit in UNITS]
        body.append([row.variant, str(len(row.seeds)), *cells, row.verdict])
    return Table(["variant", "seeds", *(f"of its {UNIT_NAMES[unit]}" for unit in UNITS), "verdict"], body)


def seeds_table(measure: Measure, rows: Sequence[VariantComparison]) -> Table:
    """Every seed: final value, and the shares whatever the verdict says of them."""
    units = UNITS if measure.along else ()
    body = []
    for row in rows:
        finals = measure.finals(row.variant)
        for place, seed in enumerate(row.seeds):
            cells = []
            for unit in units:
                share = row.shares[unit]
                cells.append(("≤ " if share.at_most[place] else "") + shown_share(share.values[place]))
            body.append([row.variant, str(seed), shown_value(measure, finals[seed]), *cells])
    return Table(["variant", "seed", "final", *(f"of its {UNIT_NAMES[unit]}" for unit in units)], body)


def shown_value(measure: Measure, value: float | None, sign: str = "") -> str:
    """A value of the measure, or a difference of two with `sign` "+"."""
    return NOTHING if value is None else f"{value:{sign}.{2 if measure.higher else 4}f}"


def finals_table(measure: Measure, rows: Sequence[VariantComparison]) -> Table:
    """Values at the end of the budget, and differences to the baseline."""
    head = ["variant", "seeds", "median", "mean", "std", "better by", "95 % interval"]
    head += ["p (t)", "Holm", "p (sign flips)", "Holm"]
    body = []
    for row in rows:
        values = list(measure.finals(row.variant).values())
        if not values:
            body.append([row.variant, "0", *[NOTHING] * (len(head) - 2)])
            continue
        figures, result = score_summary(values), row.result
        interval = NOTHING
        if result and result.low is not None:
            interval = f"[{shown_value(measure, result.low, '+')}, {shown_value(measure, result.high, '+')}]"
        body.append(
            [
                row.variant,
                str(len(values)),
                *(shown_value(measure, figures[name]) for name in ("median", "mean", "std")),
                shown_value(measure, result and result.mean, "+"),
                interval,
                p_value(result and result.p_t),
                p_value(row.p),
                p_value(result and result.p_flip),
                p_value(row.p_flip),
            ]
        )
    return Table(head, body)


def printed_fractions(results: AblationResults) -> str:
    """Shares by every measure, or where there is only a final value this, for a terminal."""
    lines = []
    for measure in results.measures:
        rows = compare_variants(measure, results.hardly_learned)
        if measure.along:
            what = f"Fraction of {results.baseline.name}'s cost at which its final quality is reached: {measure.name}"
            lines += [what, shares_table(rows).plain(), ""]
        else:
            lines += [f"At the end: {measure.name}", finals_table(measure, rows).plain(), ""]
        if limit := limits(rows):
            lines[-1:] = [*textwrap.wrap(limit, WIDTH), ""]
    return "\n".join(lines) or "no variant can be compared yet: the baseline has no final value"


# --- the report


def write_ablation_report(
    folder: Path, name: str, ablation: Ablation, results: AblationResults, about: dict[str, Any]
) -> None:
    """Writes report.md, report.html and the drawings; `about` as for `ReportPage.write`."""
    report = ReportPage(f"Ablation {name}")
    _question(report, ablation, results)
    compared = {measure.name: compare_variants(measure, results.hardly_learned) for measure in results.measures}
    along = {measure.name: compared[measure.name] for measure in results.measures if measure.along}
    if along:
        _shares(report, folder, along)
    if at_end := [measure for measure in results.measures if not measure.along]:
        _at_end(report, folder, at_end, compared)
    if results.left_out:
        report.heading("Not compared")
        report.points(results.left_out)
    for place, measure in enumerate(results.measures):
        _measure(report, folder, f"curves-{place}.png", results, measure, compared[measure.name])
    if results.done:
        _validation(report, results)
        _costs(report, results)
    if len(results.done) < len(results.plan.jobs):
        _failed(report, results)
    report.write(folder, about)


def _question(report: ReportPage, ablation: Ablation, results: AblationResults) -> None:
    plan = results.plan
    report.text(
        f"{results.baseline.name} is the baseline; {plural(len(plan.variants) - 1, 'variant')} with the same data, "
        f"order and {plural(len(ablation.seeds), 'seed')}, at equal {UNIT_NAMES[ablation.budget.equal]}."
    )
    first = _options(plan.variants[0])
    lines = []
    for variant in plan.variants[1:]:
        changes = [line.replace("->", "to") for line in differences(first, _options(variant))]
        lines.append(f"`{variant.name}`: {'; '.join(changes)}")
    report.points(lines)
    report.table(planned_table(plan, ablation))
    if ablation.anneal is None:
        points = (
            "Measured along one training with its own schedule. If its rate decays, points before the end are taken at "
            "a rate that is still high, and shares come out larger than what a shorter training would need; `anneal` "
            "avoids that."
        )
    else:
        points = (
            "Measured after annealing: the rate is constant after the warm-up, and at each point it falls to 0 within "
            f"{100 * ablation.anneal:g} % of the steps done so far, in a training that branches off. The cost of a "
            "point is that up to it and of its annealing."
        )
    shown = ", ".join(f"{100 * point:g}" for point in ablation.points)
    report.text(f"{points} Points: {shown} % of the budget.")
    if results.masked_loss is None:
        return
    gain = plan.unigram_entropy - results.masked_loss
    of, why = "of the baseline", ""
    if second := results.objective.second_network:
        of += f"'s {second}"
        why = " (its objective predicts no masked word with the main network)"
    verdict = f"less than {LEARNED} nats, so nothing is decided" if results.hardly_learned else "enough for a verdict"
    report.text(
        f"The masked loss {of} at the end{why} is {results.masked_loss:.3f} nats, {abs(gain):.3f} "
        f"{'under' if gain >= 0 else 'over'} the unigram entropy of the validation text, {plan.unigram_entropy:.3f}: "
        f"{verdict}."
    )


def _options(variant: Any) -> dict[str, Any]:
    return {leaf.name: leaf.value for leaf in leaves(variant.setup.options)}


def _shares(report: ReportPage, folder: Path, compared: dict[str, list[VariantComparison]]) -> None:
    report.heading("Fraction of the baseline's cost to reach its final quality")
    for name, rows in compared.items():
        report.text(f"By {name}:")
        report.table(shares_table(rows))
        if limit := limits(rows):
            report.text(limit)
    report.text(
        "The median over the seeds, in brackets the least and the most. Each seed is compared with the baseline's "
        "training of the same seed: its final value is the target, its final cost the whole. A curve, with straight "
        "lines between its points, reaches the target where it comes to it for good: from there on it is never "
        "measured worse. `≤`: it was there at the first point already. A variant is undecided unless its final values "
        "differ from the baseline's by more than the noise of the measure (below) and the paired t-test over seeds, "
        "adjusted over the variants by Holm's method, gives a p below 0.05; then it has reached the baseline's quality "
        "if it is better on the mean."
    )
    if drawing := save_drawing("shares.png", folder, draw_shares, compared):
        report.image(drawing, "Shares by seed, the median as a bar; hollow where it is undecided")


def _at_end(
    report: ReportPage, folder: Path, measures: Sequence[Measure], compared: dict[str, list[VariantComparison]]
) -> None:
    """What was measured at the last point alone."""
    report.heading("Quality at the end of the budget")
    scores = {m.name: {name: list(m.finals(name).values()) for name in m.curves} for m in measures}
    if drawing := save_drawing("finals.png", folder, draw_scores, scores, dict.fromkeys(scores, "")):
        report.image(drawing, "Every seed a point, the median a bar")
    body = []
    for measure in measures:
        for row in compared[measure.name][1:]:
            better = shown_value(measure, row.result and row.result.mean, "+")
            body.append([measure.name, row.variant, str(len(row.seeds)), better, p_value(row.p), row.verdict])
    report.table(Table(["measure", "variant", "seeds", "better by", "Holm", "verdict"], body))
    for limit in dict.fromkeys(limits(compared[measure.name]) for measure in measures):
        if limit:
            report.text(limit)
    report.text(
        "`reached`: better than the baseline at the end of the budget; the rule is that of the verdicts on shares: a "
        "difference beyond the noise of the measure (below), and a paired t-test adjusted over the variants."
    )


def _measure(
    report: ReportPage,
    folder: Path,
    drawing: str,
    results: AblationResults,
    measure: Measure,
    rows: list[VariantComparison],
) -> None:
    report.heading(f"By {measure.name}")
    loss = not measure.higher
    floor = results.plan.unigram_entropy if loss and results.objective.loss_in_nats else None
    if measure.along and (found := save_drawing(drawing, folder, draw_curves, measure, floor)):
        dashed = ", the unigram entropy dashed" if floor is not None else ""
        report.image(found, f"Every seed thin, medians thick, the baseline's final median dotted{dashed}")
    report.table(finals_table(measure, rows))
    own = rows[0].shares["steps"]
    if measure.along and own.median < SATURATED:
        start = ("at most " if own.median_at_most else "") + shown_share(own.median)
        report.text(
            f"The baseline itself is at its final value from {start} of its steps on: by this measure it learns no "
            "more then, or the noise hides it, and shares say little."
        )
    report.text(_noise(results, measure))
    if loss and results.objective.second_network:
        report.text(OWN_QUESTIONS)
    report.text("Seed by seed, whatever the verdict:")
    report.table(seeds_table(measure, rows))


def _noise(results: AblationResults, measure: Measure) -> str:
    found = noise(measure)
    if found is None:
        return "The noise of the measure is not known: no variant has two finished seeds."
    text = (
        f"Noise of the measure: the final values of a variant scatter over seeds with a standard deviation of "
        f"{shown_value(measure, found.std)} (pooled over the variants, {plural(found.freedom, 'degree')} of freedom). "
        f"Differences below about {shown_value(measure, found.visible)} are within the spread of this many seeds."
    )
    task = measure.name.partition(",")[0]
    if task in results.tasks and (trials := results.trial_noise(task)) is not None:
        text += f" Of this, fine-tuning one checkpoint again gives {shown_value(measure, trials)}."
    settings = {v.name: results.best_setting(v, task) for v in results.plan.variants} if task in results.tasks else {}
    if chosen := {name: shown_setting(setting) for name, setting in settings.items() if setting}:
        same = set(chosen.values())
        shown = same.pop() if len(same) == 1 else "; ".join(f"{name} {setting}" for name, setting in chosen.items())
        text += f" Fine-tuned with {SETTING}: {shown}."
    return text


def _validation(report: ReportPage, results: AblationResults) -> None:
    """The held-out figures of every variant. Losses that cannot be compared with the baseline's are in no column with
    it."""
    report.heading("Validation at the end")
    apart, rows = results.plan.incomparable, []
    for variant in results.plan.variants:
        ends = [place for place in results.plan.places[variant.name] if place.share == 1]
        found = [at for place in ends if (at := results.validation(place)) is not None]
        objective = variant.setup.options.objective
        names = [name for name in found[0] if name != "step"] if found else []
        medians = {name: f"{statistics.median(at[name] for at in found):.4f}" for name in names}
        loss = medians.pop("loss", NOTHING)
        if found and variant.name in apart:
            medians, loss = {f"loss of its own ({objective})": loss, **medians}, NOTHING
        figures = ", ".join(f"{name} {value}" for name, value in medians.items()) or NOTHING
        rows.append([variant.name, objective, str(len(found)), loss, figures])
    nats = results.objective.loss_in_nats
    column = "masked loss" if nats else f"{results.baseline.setup.options.objective} loss"
    report.table(Table(["variant", "objective", "seeds", column, "other medians"], rows))
    if apart:
        report.text(
            f"The losses of {', '.join(apart)} are not comparable with the baseline's: their validation asks other "
            "questions (objective, masks, lengths, or the networks that pose them). Across objectives only fine-tuning "
            "compares."
        )
    if any(variant.setup.note_corpus for variant in results.plan.variants):
        report.text("Where a variant has notes, its validation reads them; exports and fine-tuning do without.")


def _costs(report: ReportPage, results: AblationResults) -> None:
    report.heading("Cost")
    rows = []
    for variant in results.plan.variants:
        end, setup = results.plan.places[variant.name][-1], variant.setup
        minutes = variant.minutes_to(end)
        tokens = replace(setup, options=end.options).plan().tokens(0, end.steps)
        rounds = [results.plan.seconds[timing_key(setup, shape)] for shape in variant.step_flops]
        spread = max(max(times) / min(times) for times in rounds) - 1
        rows.append(
            [
                variant.name,
                f"{end.steps}",
                f"{tokens:.3g}",
                f"{variant.flops_to(end):.3g}",
                f"{minutes:.2f}",
                f"{60e3 * minutes / end.steps:.1f}",
                f"{100 * spread:.0f} %",
                f"{tokens / (60 * minutes):.0f}",
            ]
        )
    head = ["variant", "steps", "tokens", "FLOPs", "minutes", "ms a step", "spread", "tokens/s"]
    report.table(Table(head, rows))
    report.text(
        "At the end of the budget. FLOPs are the closed form of all networks, forward and backward. Minutes are steps "
        "at the time of a step that was measured before the first job, alone on the machine, the variants in turn: "
        f"the fastest of {plural(len(rounds[0]), 'round')}, because other work on the machine only makes steps slower; "
        "spread: the slowest round over the fastest."
    )


def _failed(report: ReportPage, results: AblationResults) -> None:
    report.heading("What is missing")
    if failed := results.failed:
        rows = [[row["task"], row["model"], str(row["seed"]), row["reason"]] for row in failed]
        report.table(Table(["job", "variant", "seed", "what happened"], rows))
    waiting = len(results.plan.jobs) - len(results.done) - len(failed)
    more = f"{plural(waiting, 'more job')} did not run: what they need has failed, or it was stopped. "
    report.text(
        (more if waiting else "")
        + "The same command runs what is missing. Seeds without a final value are left out above."
    )
