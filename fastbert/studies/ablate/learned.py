"""Parts of the report of an ablation with `mode: data`: the data of each variant, the losses on the fixed splits before
and after the training, and a plot of what was learned against what was forgotten."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastbert.config import leaves
from fastbert.errors import plural
from fastbert.finetuning.table import NOTHING
from fastbert.pretraining.options import PretrainOptions
from fastbert.report.page import Table
from fastbert.report.report_page import ReportPage
from fastbert.studies.ablate.ablation_plan import AblationPlan
from fastbert.studies.ablate.costs import PlannedVariant
from fastbert.studies.ablate.fixed_splits import shown_splits
from fastbert.studies.ablate.measures import AblationResults
from fastbert.studies.ablate.options import Ablation
from fastbert.studies.shared.plots import add_legend, new_panels, series_style, style_axes
from fastbert.studies.shared.report import short_count
from fastbert.training.splits import OLD

# --- before the first job


def trainings_sentence(plan: AblationPlan, ablation: Ablation) -> str:
    """Number of trainings, and the splits on which they are validated."""
    variants, seeds = len(plan.variants), len(ablation.seeds)
    return (
        f"{plural(variants * seeds, 'training')}: {plural(variants, 'variant')} with {plural(seeds, 'seed')} each, all "
        f"validated on {shown_splits(plan.splits)}"
    )


def data_table(plan: AblationPlan, ablation: Ablation) -> Table:
    """Data, replay, vocabulary and initial weights of each variant."""
    rows = []
    for given, variant in zip(ablation.variants, plan.variants, strict=True):
        options, setup, replay = given.options, variant.setup, NOTHING
        if options.replay.active:
            tokens = short_count(len(setup.others[OLD].split("train")))
            replay = f"{100 * options.replay.fraction:g} % of {options.replay.data} ({tokens} tokens)"
        data = f"{options.data} ({short_count(len(setup.dataset.split('train')))} tokens)"
        rows.append([variant.name, data, replay, f"{len(setup.vocabulary.tokens):,}", options.init_from or "random"])
    return Table(["variant", "data", "replay", "vocabulary", "initial weights"], rows)


def described_changes(options: Mapping[str, PretrainOptions]) -> list[str]:
    """A line for each variant but the first, the baseline, with the options that differ from the baseline's."""
    first, *others = map(_values, options.values())
    lines = []
    for variant, values in zip(list(options)[1:], others, strict=True):
        changes = (_change(name, value, first[name]) for name, value in values.items() if value != first[name])
        lines.append(f"`{variant}`: {', '.join(changes)}")
    return lines


def _values(options: PretrainOptions) -> dict[str, Any]:
    """Values of the options by name; those of replay are None without replay."""
    values = {leaf.name: leaf.value for leaf in leaves(options)}
    return values if options.replay.active else values | {"replay.fraction": None, "replay.seed": None}


def changed_options(plan: AblationPlan, ablation: Ablation) -> list[str]:
    """Lines of `described_changes` for the options in the file, and what else differs in the encoders: random weights
    and those of `init_from` may have another shape."""
    lines = described_changes({variant.name: variant.options for variant in ablation.variants})
    first = plan.variants[0].setup.config.to_dict()
    for number, variant in enumerate(plan.variants[1:]):
        before, after = (_values(ablation.variants[index].options) for index in (0, number + 1))
        given = {name for name in after if after[name] != before[name]}
        config = variant.setup.config.to_dict()
        lines[number] += "".join(
            f", {_change(name, config[name], first[name])}"
            for name in config
            if config[name] != first[name] and name not in {"vocab_size", *given}
        )
    return lines


def _change(name: str, value: Any, before: Any) -> str:
    """The value of an option that a variant changes, and the baseline's, if it has one."""
    shown = f"{name} {'none' if value is None else value}"
    return shown if before is None else f"{shown} (instead of {before})"


# --- after the last job


@dataclass(frozen=True)
class SplitLosses:
    """Losses of a variant on a fixed split, by seed; trainings that have not finished are left out."""

    ends: dict[int, float]
    starts: dict[int, float]
    """Losses of the model before its first step; empty for random weights."""

    @property
    def changes(self) -> list[float]:
        """Differences of end and start; positive if the model has forgotten."""
        return [self.ends[seed] - self.starts[seed] for seed in self.ends if seed in self.starts]


def split_losses(results: AblationResults, variant: PlannedVariant, split: str) -> SplitLosses:
    """Losses on a split; none if the variant's vocabulary, objective or masks are not those of the others."""
    ends: dict[int, float] = {}
    starts: dict[int, float] = {}
    left_out = variant.name in results.plan.incomparable_on[split]
    for point in () if left_out else results.plan.points[variant.name]:
        if point.fraction == 1 and (loss := results.split_loss(point, split)) is not None:
            ends[point.seed] = loss
            if (start := results.start_loss(point, split)) is not None:
                starts[point.seed] = start
    return SplitLosses(ends, starts)


def learned_table(results: AblationResults) -> Table:
    """Losses on each fixed split at the start and at the end, their change, and the mean of the splits at the end."""
    splits = [split.name for split in results.plan.splits]
    rows = []
    for variant in results.plan.variants:
        found = [split_losses(results, variant, split) for split in splits]
        cells = []
        for losses in found:
            cells += [_median(list(losses.starts.values())), _median(list(losses.ends.values()))]
            cells.append(_median(losses.changes, "+"))
        means = [
            statistics.fmean(losses.ends[seed] for losses in found)
            for seed in found[0].ends
            if all(seed in losses.ends for losses in found)
        ]
        seeds = sum(results.validation(p) is not None for p in results.plan.points[variant.name] if p.fraction == 1)
        rows.append([variant.name, str(seeds), *cells, *([_median(means)] if len(splits) > 1 else [])])
    head = [f"{split}: {when}" for split in splits for when in ("start", "end", "change")]
    return Table(["variant", "seeds", *head, *(["mean: end"] if len(splits) > 1 else [])], rows)


def _median(values: Sequence[float], sign: str = "") -> str:
    """The median and, in brackets, the smallest and the largest value."""
    if not values:
        return NOTHING
    median, least, most = (f"{value:{sign}z.4f}" for value in (statistics.median(values), min(values), max(values)))
    return median if least == most else f"{median} ({least} to {most})"


def add_learned(report: ReportPage, results: AblationResults) -> None:
    """Adds the section on what was learned and forgotten."""
    report.heading("Learned and forgotten")
    report.table(learned_table(results))
    report.text(
        "Losses on the held-out documents of each fixed split, which are the same for all variants: medians over the "
        "seeds, in brackets the smallest and the largest. Start: the model before its first step; random weights have "
        "none. A change below 0 was learned, one above 0 was forgotten."
    )
    if len(results.plan.splits) > 1:
        caption = "Every seed a point at the end of its training; a star where the initial weights start."
        report.plot("learned.svg", caption, plot_learned, results)


def plot_learned(results: AblationResults) -> Any:
    """A panel for each split but the first: the loss on it at the end over the loss on the first split, every seed a
    point, and the models before their first step as stars."""
    first, *others = (split.name for split in results.plan.splits)
    figure, panels = new_panels(len(others), 4.6)
    for panel, other in zip(panels, others, strict=True):
        stars: dict[tuple[float, float], str] = {}
        for number, variant in enumerate(results.plan.variants):
            x, y = (split_losses(results, variant, split) for split in (first, other))
            style = series_style(number) | {"linestyle": ""}
            points = [(x.ends[seed], y.ends[seed]) for seed in x.ends if seed in y.ends]
            if points:
                panel.plot(*zip(*points, strict=True), **style, alpha=0.75, markersize=5, label=variant.name)
            source = variant.setup.options.init_from
            stars |= {(x.starts[seed], y.starts[seed]): f"start: {source}" for seed in x.starts if seed in y.starts}
        for (loss, other_loss), label in stars.items():
            panel.plot(loss, other_loss, color="black", marker="*", linestyle="", markersize=10, label=label)
        panel.set_xlabel(f"loss on {first}", fontsize=9)
        panel.set_ylabel(f"loss on {other}", fontsize=9)
        style_axes(panel, "both")
    add_legend(figure, panels)
    return figure
