"""Comparability of validation losses: a variant's loss is comparable with the baseline's if both validations are equal.

Data, vocabulary, the rows of the validation and their length are equal for all variants of an ablation (`options`
refuses changes of them), and masked positions are functions of a row. These may differ: the objective; the rate and
units of the masks; for objectives other than MLM all of their options, since their networks choose the words to judge;
and, with a `first_length`, the length of the sequences at a point. These do not matter: options that act in training
alone (replacements at masked positions, batches, schedule), and what a variant reads from the same rows (a note
dictionary, a document mask, position encodings). With `mode: data` the data differs, and the losses are those on fixed
splits, whose vocabularies matter as well (`fixed_splits`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fastbert.data.stages import NOMINAL_STEPS, make_plan
from fastbert.errors import LINE, UserError
from fastbert.objectives import OBJECTIVES, group_of
from fastbert.pretraining.options import PretrainOptions
from fastbert.studies.ablate.options import Ablation
from fastbert.studies.shared.pretrain_jobs import without_masked_head

ValidationOptions = Mapping[str, Any]
POINT_LENGTHS = "sequence length at the points"


def validation_options(options: PretrainOptions, lengths: Sequence[int]) -> ValidationOptions:
    """Options that define the validation of a training with `options`, by name.

    Args:
        lengths: tokens in a sequence of the validation, at each point.
    """
    config = options.encoder.resolve(vocab_size=1, length=options.length)
    chosen = asdict(options.of_objective.resolve(config))
    if OBJECTIVES[options.objective].loss_in_nats:
        chosen = {name: chosen[name] for name in ("mask_rate", "whole_word")}
    own = {f"{group_of(options.objective)}.{name}": value for name, value in chosen.items()}
    return {"objective": options.objective, **own, POINT_LENGTHS: tuple(lengths)}


def why_not(first: ValidationOptions, other: ValidationOptions) -> str:
    """The reason why losses cannot be compared, such as "objective: electra instead of mlm"; empty if they can."""
    if other["objective"] != first["objective"]:
        return f"objective: {other['objective']} instead of {first['objective']}"
    changed = [name for name in first if first[name] != other[name]]
    return "; ".join(f"{name}: {_shown(other[name])} instead of {_shown(first[name])}" for name in changed)


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def incomparable(variants: Iterable[tuple[str, ValidationOptions]]) -> dict[str, str]:
    """Variants whose losses cannot be compared with the first one's -> the reason."""
    (_, first), *others = variants
    return {name: reason for name, other in others if (reason := why_not(first, other))}


def check_measure(ablation: Ablation, reasons: Mapping[str, str]) -> None:
    """Refuses an ablation without a measure for variants that have incomparable losses (`reasons`, from `incomparable`
    or, with `mode: data`, `never_compared`).

    Raises:
        UserError: names these variants with the reasons.
    """
    if ablation.grid.tasks or "pairs" in ablation.grid.evaluate or not reasons:
        return
    if ablation.splits:
        _check_measure_of_data(ablation, reasons)
        return
    lines = "".join(f"{LINE}{name}: {reason}" for name, reason in reasons.items())
    lengths = any(reason.startswith(POINT_LENGTHS) for reason in reasons.values())
    raise UserError(
        f"{ablation.path}: variants: without tasks and minimal pairs the measure is the masked loss, and there are "
        f"losses that cannot be compared with the baseline's ({ablation.baseline}), because their validation differs:"
        f"{lines}{LINE}"
        "Give tasks: to compare them by fine-tuning, or evaluate: {pairs: ...}, or leave these variants out"
        + ("; lengths are equal with anneal:, or with checkpoints: [1.0]" if lengths else "")
    )


def _check_measure_of_data(ablation: Ablation, reasons: Mapping[str, str]) -> None:
    """Refuses variants that neither a loss nor the pseudo-log-likelihood compares with the baseline."""
    unscored = without_masked_head((variant.name, variant.options.objective) for variant in ablation.variants)
    left = {name: why for name, why in reasons.items() if "pll" not in ablation.grid.evaluate or name in unscored}
    if left:
        lines = "".join(f"{LINE}{name}: {reason}" for name, reason in left.items())
        raise UserError(
            f"{ablation.path}: variants: nothing compares these with the baseline ({ablation.baseline}), because the "
            f"losses on the validation splits need the same objective, masks and vocabulary:{lines}{LINE}"
            "Give evaluate: {pll: TEXT}, which compares vocabularies in bits per byte, evaluate: {pairs: ...} or "
            "tasks:, or leave these variants out"
        )


def check_pll(ablation: Ablation) -> None:
    """Refuses the pseudo-log-likelihood as a measure where the baseline has none.

    Raises:
        UserError: states the baseline and the reason.
    """
    reasons = without_masked_head((variant.name, variant.options.objective) for variant in ablation.variants)
    if "pll" in ablation.grid.evaluate and ablation.baseline in reasons:
        raise UserError(
            f"{ablation.path}: evaluate: pll compares variants with the baseline, and {ablation.baseline} has no "
            f"pseudo-log-likelihood: {reasons[ablation.baseline]}; leave pll out, or name another baseline"
        )


def planned_validations(ablation: Ablation) -> list[tuple[str, ValidationOptions]]:
    """Name and validation options of each variant, before its steps are known."""
    found = []
    for variant in ablation.variants:
        options = variant.options
        plan = make_plan(options.stages, options.batch_size, options.length, NOMINAL_STEPS)
        ends = [round(point * NOMINAL_STEPS) - 1 for point in ablation.points]
        lengths = [plan.at(end).length if ablation.anneal is None else options.length for end in ends]
        found.append((variant.name, validation_options(options, lengths)))
    return found
