"""Measures of an ablation, from its plan and the rows of results.jsonl: scores of fine-tuning on each task and their
mean, accuracy on minimal pairs, and pseudo-log-likelihood and validation loss where they are comparable. With `mode:
data` the losses are those on each fixed split, and their mean.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from fastbert.objectives import OBJECTIVES
from fastbert.objectives.objective import Objective
from fastbert.studies.ablate.ablation_plan import AblationPlan
from fastbert.studies.ablate.analysis import LEARNED, Curve, Measure, Point
from fastbert.studies.ablate.costs import MeasuredPoint, PlannedVariant
from fastbert.studies.engine.store import ResultRow, is_done
from fastbert.studies.shared.comparison import Setting, Trials, score, setting_of
from fastbert.studies.shared.evaluate_jobs import EVALUATE
from fastbert.studies.shared.finetune_jobs import FINETUNE

ZERO_SHOT = {
    "pairs": ("minimal pairs, accuracy x 100", "accuracy", 100, True),
    "pll": ("pseudo-log-likelihood, nats per token", "nats_per_token", 1, False),
}
"""Evaluation -> name of its measure, figure, factor of the figure, and whether higher values are better."""
PLL_PER_BYTE = ("pseudo-log-likelihood, bits per byte", "bits_per_byte", 1, False)
"""The same for the pseudo-log-likelihood if variants have different tokenizers: their tokens are not the same."""
MEAN_LOSS = "mean loss"


@dataclass(frozen=True)
class AblationResults:
    """Results of the finished jobs of an ablation."""

    plan: AblationPlan
    rows: Mapping[str, ResultRow]
    """All rows by the ids of their jobs."""

    @property
    def baseline(self) -> PlannedVariant:
        return self.plan.variants[0]

    @cached_property
    def done(self) -> dict[str, ResultRow]:
        return {job.id: self.rows[job.id] for job in self.plan.jobs if is_done(self.rows.get(job.id))}

    @property
    def failed(self) -> list[ResultRow]:
        rows = (self.rows.get(job.id) for job in self.plan.jobs)
        return [row for row in rows if row is not None and not is_done(row)]

    @cached_property
    def tunings(self) -> dict[tuple[str, float], list[ResultRow]]:
        """(Id of a pretraining, fraction of the budget) -> rows of its fine-tunings."""
        found: dict[tuple[str, float], list[ResultRow]] = {}
        for job in self.plan.jobs:
            if job.kind == FINETUNE and job.id in self.done:
                (training,) = job.after
                found.setdefault((training, job.setting["at"]), []).append(self.done[job.id])
        return found

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(job.task for job in self.plan.jobs if job.kind == FINETUNE))

    @cached_property
    def evaluations(self) -> dict[tuple[str, str, float], dict[str, Any]]:
        """(pairs or pll, id of a pretraining, fraction of the budget) -> figures of its evaluation."""
        found = {}
        for job in self.plan.jobs:
            if job.kind == EVALUATE and job.id in self.done:
                key = job.identity["evaluation"]
                (training,) = job.after
                found[key, training, job.setting["at"]] = self.done[job.id][key]
        return found

    # --- validation

    def validation(self, point: MeasuredPoint) -> dict[str, Any] | None:
        """Losses at a point; None if the training has not reached it."""
        found = self.done.get(point.job, {"validations": []})["validations"]
        return next((row for row in found if row["step"] == point.steps), None)

    def curves(self, variant: PlannedVariant, value: Callable[[MeasuredPoint], float | None]) -> dict[int, Curve]:
        """Curves of `value` by seed; seeds without a value at the last point are left out."""
        curves: dict[int, list[Point]] = {}
        for point in self.plan.points[variant.name]:
            at, measured = self.validation(point), value(point)
            if at is not None and measured is not None:
                cost = (point.steps, variant.flops_to(point), variant.minutes_to(point))
                curves.setdefault(point.seed, []).append(Point(point.fraction, *cost, measured))
        last = {point.seed: point.steps for point in self.plan.points[variant.name]}
        return {seed: curve for seed, curve in curves.items() if curve[-1].steps == last[seed]}

    def own_losses(self, variant: PlannedVariant) -> dict[int, Curve]:
        """Curves of the loss on a variant's own held-out documents."""
        return self.curves(variant, lambda point: (self.validation(point) or {}).get("loss"))

    @cached_property
    def validation_loss(self) -> Measure | None:
        """Measure over the variants whose loss is comparable with the baseline's; None if there is no such variant, or
        with `mode: data`, where each variant has a validation text of its own."""
        if self.plan.splits:
            return None
        same = [variant for variant in self.plan.variants if variant.name not in self.plan.incomparable]
        if len(same) < 2:
            return None
        return Measure("validation loss", False, {variant.name: self.own_losses(variant) for variant in same})

    def split_loss(self, point: MeasuredPoint, split: str) -> float | None:
        """Loss on a fixed split at a point; None if the training has not reached it."""
        found = self.validation(point)
        return None if found is None else found["splits"][split]["loss"]

    def start_loss(self, point: MeasuredPoint, split: str) -> float | None:
        """Loss on a fixed split before the first step of the training of a point; None if it starts from random
        weights, or has not finished."""
        row = self.done.get(point.job)
        if row is None or point.options.init_from is None:
            return None
        return next(found["splits"][split]["loss"] for found in row["validations"] if found["step"] == 0)

    @cached_property
    def split_losses(self) -> list[Measure]:
        """Loss on each fixed split over the variants that are comparable there, and the mean of the splits over those
        that are comparable on all of them; only measures that compare two variants."""
        compared: dict[str, list[PlannedVariant]] = {}
        for name, left_out in self.plan.incomparable_on.items():
            if self.baseline.name not in left_out:
                compared[name] = [variant for variant in self.plan.variants if variant.name not in left_out]
        found = []
        for name, variants in compared.items():
            value = partial(self.split_loss, split=name)
            curves = {variant.name: self.curves(variant, value) for variant in variants}
            found.append(Measure(f"loss on {name}", False, curves))
        if len(found) == len(self.plan.splits) > 1:
            names = [name for name in found[0].curves if all(name in other.curves for other in found)]
            curves = {name: mean_curves([measure.curves[name] for measure in found]) for name in names}
            found.append(Measure(MEAN_LOSS, False, curves))
        return [measure for measure in found if len(measure.curves) > 1]

    @cached_property
    def losses(self) -> dict[str, float | None]:
        """Name of each measure that is a loss -> unigram entropy of its text in nats; None for a mean of texts, or if
        the loss is not in nats."""
        entropies = {f"loss on {split.name}": split.unigram_entropy for split in self.plan.splits}
        measures = [self.validation_loss] if self.validation_loss else self.split_losses
        if self.validation_loss:
            entropies[self.validation_loss.name] = self.plan.unigram_entropy
        nats = self.objective.loss_in_nats
        return {measure.name: entropies.get(measure.name) if nats else None for measure in measures}

    @property
    def objective(self) -> type[Objective]:
        """Objective of the baseline."""
        return OBJECTIVES[self.baseline.setup.options.objective]

    def masked_loss(self, at: float = 1) -> float | None:
        """Masked-word loss of the baseline in nats at the fraction `at` of the budget, the median over the seeds. If
        the objective has two networks, it is the loss of the second one, which fills the masks; None if no network
        predicts masked words."""
        if not (self.objective.loss_in_nats or self.objective.second_network):
            return None
        name = "mlm_loss" if self.objective.second_network else "loss"
        points = [point for point in self.plan.points[self.baseline.name] if point.fraction == at]
        found = [losses for point in points if (losses := self.validation(point)) is not None]
        return statistics.median(losses[name] for losses in found) if found else None

    def hardly_learned(self, at: float = 1) -> bool:
        """True if the baseline's masked loss at the fraction `at` of the budget is too high for a verdict."""
        loss = self.masked_loss(at)
        return loss is not None and self.plan.unigram_entropy - loss < LEARNED

    # --- fine-tuning

    def best_setting(self, variant: PlannedVariant, task: str) -> Setting | None:
        """The setting with the highest median over seeds and trials at the end of the budget; it is used at all
        points."""
        ends = [point for point in self.plan.points[variant.name] if point.fraction == 1]
        rows = [row for point in ends for row in self.tunings.get((point.job, 1), ()) if row["task"] == task]
        settings: dict[Setting, list[ResultRow]] = {}
        for row in rows:
            settings.setdefault(setting_of(row), []).append(row)
        return Trials(variant.name, task, settings).best if settings else None

    def task_curves(self, variant: PlannedVariant, task: str) -> dict[int, Curve]:
        """Curves of a task's score, the mean of the trials x 100."""
        setting = self.best_setting(variant, task)

        def value(point: MeasuredPoint) -> float | None:
            rows = self.tunings.get((point.job, point.fraction), ())
            scores = [score(row) for row in rows if row["task"] == task and setting_of(row) == setting]
            return 100 * statistics.fmean(scores) if scores else None

        return self.curves(variant, value)

    @cached_property
    def task_measures(self) -> list[Measure]:
        """The mean of the tasks first, if there are several, then each."""
        found = []
        for task in self.tasks:
            curves = {variant.name: self.task_curves(variant, task) for variant in self.plan.variants}
            found.append(Measure(f"{task}, {self.metric(task)} x 100", True, curves))
        if len(found) > 1:
            names = [variant.name for variant in self.plan.variants]
            curves = {name: mean_curves([measure.curves[name] for measure in found]) for name in names}
            found.insert(0, Measure(f"mean of {len(self.tasks)} tasks, x 100", True, curves))
        return found

    def metric(self, task: str) -> str:
        """The first metric of a task, which is its score."""
        rows = (row for rows in self.tunings.values() for row in rows if row["task"] == task)
        return next((row["metrics"][0] for row in rows), "score")

    # --- evaluation

    def figures(self, key: str, point: MeasuredPoint) -> dict[str, Any] | None:
        """Figures of the evaluation `key` of a point, pairs or pll."""
        return self.evaluations.get((key, point.job, point.fraction))

    def zero_shot_measure(self, key: str) -> Measure:
        """Measure of the evaluation `key`, over the variants that have it."""
        per_byte = key == "pll" and not self.plan.one_tokenizer
        name, figure, scale, higher = PLL_PER_BYTE if per_byte else ZERO_SHOT[key]

        def value(point: MeasuredPoint) -> float | None:
            figures = self.figures(key, point)
            return None if figures is None else scale * figures[figure]

        variants = self.plan.evaluated_by(key)
        return Measure(name, higher, {variant.name: self.curves(variant, value) for variant in variants})

    @cached_property
    def all_measures(self) -> list[Measure]:
        """All measures, scores of tasks first."""
        losses = [self.validation_loss] if self.validation_loss else self.split_losses
        zero_shot = [self.zero_shot_measure(evaluation.key) for evaluation in self.plan.evaluations]
        return [*self.task_measures, *zero_shot, *losses]

    @cached_property
    def measures(self) -> list[Measure]:
        """The measures for which the baseline has a final value."""
        return [measure for measure in self.all_measures if measure.curves[self.baseline.name]]

    @property
    def left_out(self) -> list[str]:
        """Reasons why variants and measures are not compared, a line each."""
        if self.plan.splits:
            lines = self._left_out_of_splits
        else:
            lines = [
                f"{name} is not compared by validation loss, because its validation differs: {reason}"
                for name, reason in self.plan.incomparable.items()
            ]
        if any(evaluation.key == "pll" for evaluation in self.plan.evaluations):
            lines += [
                f"{name} is not compared by pseudo-log-likelihood: {reason}"
                for name, reason in self.plan.without_pll.items()
            ]
        for measure in self.all_measures:
            if not measure.curves[self.baseline.name]:
                lines.append(f"no variant is compared by {measure.name}: {self.baseline.name} has no final value")
        return lines

    @property
    def _left_out_of_splits(self) -> list[str]:
        """Reasons why variants are not compared by the losses on fixed splits, a line each."""
        found: dict[tuple[str, str], list[str]] = {}
        for split, left_out in self.plan.incomparable_on.items():
            for name, reason in left_out.items():
                found.setdefault((name, reason), []).append(split)
        lines = []
        for (name, reason), splits in found.items():
            on = f"by the loss on {' and '.join(splits)}"
            if name == self.baseline.name:
                lines.append(f"no variant is compared {on}, because of the baseline, {name}: {reason}")
            else:
                lines.append(f"{name} is not compared {on}: {reason}")
        return lines

    def trial_noise(self, measure_task: str) -> float | None:
        """Standard deviation over trials of one checkpoint at one setting, pooled, x 100; None without repetitions."""
        groups: dict[tuple[Any, ...], list[float]] = {}
        for key, rows in self.tunings.items():
            for row in rows:
                if row["task"] == measure_task:
                    groups.setdefault((*key, setting_of(row)), []).append(100 * score(row))
        variances = [statistics.variance(values) for values in groups.values() if len(values) > 1]
        return statistics.fmean(variances) ** 0.5 if variances else None


def mean_curves(curves: Sequence[Mapping[int, Curve]]) -> dict[int, Curve]:
    """The mean of several tasks' curves, at the seeds and points that all of them have."""
    found: dict[int, Curve] = {}
    for seed in curves[0]:
        if all(seed in other for other in curves):
            by_steps = [{point.steps: point for point in other[seed]} for other in curves]
            found[seed] = [
                replace(point, value=statistics.fmean(points[steps].value for points in by_steps))
                for steps, point in by_steps[0].items()
                if all(steps in points for points in by_steps)
            ]
    return found
