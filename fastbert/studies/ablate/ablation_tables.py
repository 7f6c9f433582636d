"""Tables of an ablation, for a page and a terminal: the trainings, fractions of the baseline's cost, final values."""

import math
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace

from fastbert.errors import plural
from fastbert.finetuning.results import score_summary
from fastbert.finetuning.table import NOTHING
from fastbert.report.page import Table
from fastbert.studies.ablate.ablation_plan import AblationPlan, PlannedVariant
from fastbert.studies.ablate.analysis import CostFraction, Measure, VariantComparison, compare_variants, limits
from fastbert.studies.ablate.measures import AblationResults
from fastbert.studies.ablate.options import UNITS, Ablation
from fastbert.studies.shared.report import WIDTH, p_value, short_count
from fastbert.studies.shared.trained import shown_size

UNIT_NAMES = {"steps": "steps", "flops": "FLOPs", "minutes": "minutes"}
OF_UNITS = tuple(f"of the {UNIT_NAMES[unit]}" for unit in UNITS)
STATISTICS = ["seeds", "median", "mean", "std", "better by", "95 % interval"]
STATISTICS += ["p (t)", "Holm", "p (sign flips)", "Holm"]


def planned_table(plan: AblationPlan, ablation: Ablation) -> Table:
    """Planned costs of one training of each variant, and of a step of it relative to the baseline's."""
    end = 1 + (ablation.anneal or 0)
    first = plan.variants[0]
    seconds = {variant.name: variant.mean(variant.step_seconds) for variant in plan.variants}

    def relative(value: float, baseline: float, variant: PlannedVariant) -> str:
        return "" if variant is first else f" ({100 * (value / baseline - 1):+.1f} %)"

    rows = [
        [
            variant.name,
            f"{variant.parameters / 1e6:.2f}M",
            f"{variant.flops:.3g}{relative(variant.flops, first.flops, variant)}",
            f"{1e3 * seconds[variant.name]:.3g}{relative(seconds[variant.name], seconds[first.name], variant)}",
            f"{100 * plan.spread(variant):.0f} %",
            f"{variant.steps}",
            f"{variant.flops_to(plan.points[variant.name][-1]):.3g}",
            f"{variant.minutes_to(plan.points[variant.name][-1]):.3g}",
        ]
        for variant in plan.variants
    ]
    steps = "steps" if end == 1 else "steps before annealing"
    head = ["variant", "parameters", "FLOPs per step", "ms per step", "spread"]
    return Table([*head, steps, "FLOPs", "minutes"], rows)


def training_sentence(plan: AblationPlan, ablation: Ablation) -> str:
    """The baseline in one sentence."""
    variant, setup = plan.variants[0], plan.variants[0].setup
    optimizer = setup.options.optimizer
    return (
        f"The baseline has {shown_size(setup.config)} (layers x width), {short_count(variant.parameters)} parameters, "
        f"and learns {setup.options.objective} on {ablation.variants[0].options.data} "
        f"({short_count(len(setup.dataset.split('train')))} tokens) in {_length(plan)}, with {optimizer.name} at a "
        f"learning rate of {optimizer.learning_rate:g}, on {setup.device.type}."
    )


def _length(plan: AblationPlan) -> str:
    """Steps and tokens of the baseline, including the last annealing."""
    variant = plan.variants[0]
    end = plan.points[variant.name][-1]
    batches = replace(variant.setup, options=end.options).plan()
    return f"{batches.describe(end.steps)}, {short_count(batches.tokens(0, end.steps))} tokens"


def trained_table(plan: AblationPlan, ablation: Ablation) -> Table:
    """The baseline in full: encoder, data, length, optimizer, machine."""
    variant, setup = plan.variants[0], plan.variants[0].setup
    options, config, train = setup.options, setup.config, setup.dataset.split("train")
    optimizer, schedule = options.optimizer, options.schedule
    annealing = f"; annealed to 0 within {100 * ablation.anneal:g} % of the steps before" if ablation.anneal else ""
    objective = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in asdict(options.of_objective).items())
    rows = {
        "encoder": f"{shown_size(config)} (layers x width), {config.heads} heads, feed-forward {config.ffn} "
        f"({config.feed_forward}), {config.norm}-norm, {config.position} positions, dropout {config.dropout:g}",
        "parameters": f"{short_count(variant.parameters)}, of all networks",
        "objective": f"{options.objective}: {objective}",
        "initial weights": options.init_from or f"random, standard deviation {config.initializer_std:g}",
        "data": f"{ablation.variants[0].options.data}: {short_count(len(train))} tokens in "
        f"{plural(setup.dataset.record['splits']['train']['documents'], 'document')}; validation "
        f"{short_count(len(setup.dataset.split('validation')))} tokens; vocabulary {config.vocab_size:,}",
        "length of training": _length(plan),
        "optimizer": f"{optimizer.name}, learning rate {optimizer.learning_rate:g}, weight decay "
        f"{optimizer.weight_decay:g}",
        "schedule": f"{'constant' if ablation.anneal else schedule.name}, warm-up {schedule.warmup:g}{annealing}",
        "seeds": ", ".join(map(str, ablation.seeds)),
        "machine": f"{setup.device.type}, {setup.precision}, {plural(ablation.threads, 'CPU thread')} for each job",
    }
    return Table(["baseline", variant.name], [[name, value] for name, value in rows.items()])


# --- fractions


def format_fraction(value: float) -> str:
    return f"{100 * value:.0f} %" if math.isfinite(value) else "not reached"


def fraction_cell(fraction: CostFraction) -> str:
    """The median over seeds and, in brackets, the smallest and the largest."""
    median = ("≤ " if fraction.median_at_most else "") + format_fraction(fraction.median)
    least, most = (format_fraction(value) for value in (min(fraction.values), max(fraction.values)))
    return median if least == most else f"{median} ({least.removesuffix(' %')} to {most})"


def fractions_table(measure: Measure, rows: Sequence[VariantComparison]) -> Table:
    """Verdicts and fractions of the baseline's cost, variants x units; only variants that have reached its quality have
    fractions."""
    body = [
        [row.variant, row.verdict, _better(measure, row), str(len(row.seeds)), *_fraction_cells(row)] for row in rows
    ]
    return Table(["variant", "verdict", "better by", "seeds", *OF_UNITS], body)


def _better(measure: Measure, row: VariantComparison) -> str:
    """The mean difference of final values from the baseline's; positive if the variant is better."""
    return format_value(measure, row.result and row.result.mean, "+")


def _fraction_cells(row: VariantComparison) -> list[str]:
    if not row.decided or math.isinf(row.fractions[UNITS[0]].median):
        return [NOTHING] * len(UNITS)
    return [fraction_cell(row.fractions[unit]) for unit in UNITS]


def targets_table(measure: Measure, compared: Mapping[float, Sequence[VariantComparison]]) -> Table:
    """Fractions of the baseline's cost at each of its points that is a target: variants x targets.

    Args:
        compared: point, as a fraction of the budget -> comparison with the baseline's values there.
    """
    baseline = next(iter(measure.curves))
    values = [statistics.median(measure.until(point).finals(baseline).values()) for point in compared]
    body = []
    for rows in zip(*(rows[1:] for rows in compared.values()), strict=True):
        for point, value, row in zip(compared, values, rows, strict=True):
            cells = [_better(measure, row), p_value(row.p), row.verdict, str(len(row.seeds))]
            target = [f"{100 * point:g} %", format_value(measure, value)]
            body.append([row.variant, *target, *cells, *_fraction_cells(row)])
    head = ["variant", "budget", "target", "better by", "p (Holm)", "verdict", "seeds"]
    return Table([*head, *OF_UNITS], body)


def seeds_table(measure: Measure, rows: Sequence[VariantComparison]) -> Table:
    """Final value and fractions of every seed, regardless of the verdict."""
    units = UNITS if measure.along else ()
    body = []
    for row in rows:
        finals = measure.finals(row.variant)
        for index, seed in enumerate(row.seeds):
            cells = []
            for unit in units:
                fraction = row.fractions[unit]
                cells.append(("≤ " if fraction.at_most[index] else "") + format_fraction(fraction.values[index]))
            body.append([row.variant, str(seed), format_value(measure, finals[seed]), *cells])
    return Table(["variant", "seed", "final", *(OF_UNITS if units else ())], body)


def format_value(measure: Measure, value: float | None, sign: str = "") -> str:
    """A value of the measure, or a difference of two with `sign` "+"."""
    return NOTHING if value is None else f"{value:{sign}z.{2 if measure.higher else 4}f}"


def finals_table(measure: Measure, rows: Sequence[VariantComparison]) -> Table:
    """Values at the end of the budget, and differences from the baseline."""
    body = [[row.variant, *_statistics(measure, row)] for row in rows]
    return Table(["variant", *STATISTICS], body)


def _statistics(measure: Measure, row: VariantComparison) -> list[str]:
    """Cells under STATISTICS."""
    values = list(measure.finals(row.variant).values())
    if not values:
        return ["0", *[NOTHING] * (len(STATISTICS) - 1)]
    figures, result = score_summary(values), row.result
    interval = NOTHING
    if result and result.low is not None:
        interval = f"[{format_value(measure, result.low, '+')}, {format_value(measure, result.high, '+')}]"
    return [
        str(len(values)),
        *(format_value(measure, figures[name]) for name in ("median", "mean", "std")),
        _better(measure, row),
        interval,
        p_value(result and result.p_t),
        p_value(row.p),
        p_value(result and result.p_flip),
        p_value(row.p_flip),
    ]


def equal_cost_table(measure: Measure, hardly_learned: bool, equal: str) -> Table:
    """Values of every variant when its steps, FLOPs or minutes equal the baseline's at its end, with the statistics of
    `finals_table`: units x variants.

    Args:
        equal: unit of the budget; at equal cost in this unit, values are final values.
    """
    first = compare_variants(measure, hardly_learned)[0]
    body = [["all", first.variant, *_statistics(measure, first), first.verdict]]
    for unit in UNITS:
        at_cost = measure if unit == equal else measure.at_cost(unit)
        for row in compare_variants(at_cost, hardly_learned)[1:]:
            both = measure.curves[row.variant].keys() & measure.curves[first.variant].keys()
            verdict = _outside(measure, row.variant, unit) if both and row.result is None else row.verdict
            body.append([UNIT_NAMES[unit], row.variant, *_statistics(at_cost, row), verdict])
    return Table(["equal", "variant", *STATISTICS, "verdict"], body)


def _outside(measure: Measure, variant: str, unit: str) -> str:
    """The reason why there is no value of `variant` at the baseline's final cost, in % of it; costs are equal for all
    seeds."""
    baseline, curve = (next(iter(measure.curves[name].values())) for name in (next(iter(measure.curves)), variant))
    first, last = (100 * getattr(point, unit) / getattr(baseline[-1], unit) for point in (curve[0], curve[-1]))
    return f"no value: {f'ends at {last:.0f}' if last < 100 else f'begins at {first:.0f}'} % of this cost"


def phenomena_table(results: AblationResults) -> Table:
    """Accuracy on minimal pairs by phenomenon at the end of the budget: variants x phenomena, medians over seeds."""
    finals = {
        variant.name: [
            figures
            for point in results.plan.points[variant.name]
            if point.fraction == 1 and (figures := results.figures("pairs", point)) is not None
        ]
        for variant in results.plan.variants
    }
    phenomena = list(dict.fromkeys(name for found in finals.values() for one in found for name in one["phenomena"]))
    rows = []
    for variant, found in finals.items():
        cells = [NOTHING] * (3 + len(phenomena))
        if found:
            accuracies = [_median_percent(one["phenomena"][name]["accuracy"] for one in found) for name in phenomena]
            others = [
                f"{name} {_median_percent(one['other_scores'][name] for one in found)}"
                for name in found[0]["other_scores"]
            ]
            ties = statistics.median(one["ties"] for one in found)
            cells = [found[0]["score"], ", ".join(others) or NOTHING, f"{ties:g}", *accuracies]
        rows.append([variant, *cells])
    names = [name.replace("_", " ") for name in phenomena]
    return Table(["variant", "score", "by other scores", "ties", *names], rows)


def _median_percent(values: Iterable[float]) -> str:
    return f"{100 * statistics.median(values):.1f}"


def printed_fractions(results: AblationResults) -> str:
    """Fractions by every measure, or final values if it was measured only at the end, for a terminal."""
    lines = []
    for measure in results.measures:
        rows = compare_variants(measure, results.hardly_learned())
        if measure.along:
            what = f"Fraction of {results.baseline.name}'s cost at which its final quality is reached: {measure.name}"
            lines += [what, fractions_table(measure, rows).plain(), ""]
        else:
            lines += [f"At the end: {measure.name}", finals_table(measure, rows).plain(), ""]
        if limit := limits(rows):
            lines[-1:] = [*textwrap.wrap(limit, WIDTH), ""]
    return "\n".join(lines) or "no variant can be compared yet: the baseline has no final value"
