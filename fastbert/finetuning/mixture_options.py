"""Options of `fastbert finetune` for several tasks in one encoder."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from fastbert.config import convert_text
from fastbert.errors import OptionError, UserError, brief, nearest
from fastbert.lists import words
from fastbert.ranges import Range, check_values

LARGEST_WEIGHT = 1e6  # of a task, so that its gradient is finite in float32


@dataclass(frozen=True)
class MixtureOptions:
    """Several tasks in one encoder, together or one after the other."""

    together: bool = False
    """Train the tasks in --task together: one encoder with a head for each, and each batch from one task. Each has a
    folder in --out as if it had been trained alone."""
    target: str | None = None
    """Name of the task that the others shall help, with --together: its best epoch on dev is that of all tasks, and
    learning rate and epochs are its defaults. Without it, each task has its own best epoch, and the smallest of the
    defaults are used."""
    weights: str | None = None
    """Weights of the tasks' mean losses with --together, such as rte=2,snli=0.5 (default: 1). A task of weight 0 is
    not trained, and its head stays as it was initialized."""
    temperature: Annotated[float, Range(1, 1000)] = 1.0
    """Temperature of the sampling of tasks with --together: 1 has every batch of every task once per epoch; above it, a
    task of n batches is sampled in proportion to n^(1 / temperature)."""
    then_single: bool = False
    """Fine-tune each task (or the target) alone after --together, from the shared encoder of the same seed, in
    then-single/ in --out."""
    stages: str | None = None
    """Tasks separated by commas, instead of --task, that are trained one after the other, each seed from the best epoch
    of the same seed on the task before, in --out/1-NAME, 2-NAME, ... (intermediate training)."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.together and self.stages is not None:
            raise OptionError(self, "stages", "trains one task after the other, --together all at once; choose one")
        if not self.together:
            for name in ("target", "weights", "temperature", "then_single"):
                if getattr(self, name) != getattr(MixtureOptions, name):
                    raise OptionError(self, name, "needs --together, which trains several tasks at once")
        self.given_weights()

    def given_weights(self) -> dict[str, float]:
        """Task -> weight, as given in `weights`.

        Raises:
            UserError: an entry has another form, or a task has two weights.
        """
        found: dict[str, float] = {}
        for entry in words(self.weights or ""):
            name, equals, value = entry.rpartition("=")
            try:
                number = convert_text(value.strip(), float)
            except ValueError:
                number = -1.0
            if not equals or not name.strip() or not 0.0 <= number <= LARGEST_WEIGHT:
                problem = (
                    f"must be task=weight with weights from 0 to {LARGEST_WEIGHT:g}, such as rte=2,snli=0.5, not "
                    f"{brief(entry)}"
                )
                raise OptionError(self, "weights", problem)
            if found.setdefault(name.strip(), number) != number:
                raise OptionError(self, "weights", f"has two weights for {name.strip()}; give one")
        return found

    def task_weights(self, tasks: Collection[str]) -> dict[str, float]:
        """Weight of each of the tasks.

        Raises:
            UserError: the target or a task with a weight is not among them, no weight is above 0, or that of the target
                is 0.
        """
        given = self.given_weights()
        for option, names in (("target", [self.target] if self.target is not None else []), ("weights", given)):
            for name in names:
                if name not in tasks:
                    raise UserError(
                        f"--{option} names {brief(name)}, which is not one of the tasks; {nearest(name, tasks)}"
                    )
        weights = {name: given.get(name, 1.0) for name in tasks}
        if not any(weights.values()):
            raise UserError("--weights are all 0, so nothing would be trained; give a task a weight above 0")
        if self.target is not None and not weights[self.target]:
            raise UserError(f"--weights has 0 for the target {self.target}; give it a weight above 0")
        return weights
