"""The pretraining loop over a stream of batches, with an objective, an optimizer, a schedule, a checkpointer and a
logbook. It has no code that is specific to a variant.

The host never waits for the step it has queued: losses are read one step later, and an update whose loss or gradient is
not finite is skipped on the device. Everything random is a function of the step, so a run resumed from a checkpoint
repeats the uninterrupted one bit for bit.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastbert.data.batches import TrainingBatches
from fastbert.errors import UserError
from fastbert.records import COUNT, finite_or_none
from fastbert.streams import echo
from fastbert.training.checkpoints import Checkpoint, Checkpointer
from fastbert.training.divergence import guard
from fastbert.training.finite import NotFiniteError, all_finite, require_finite
from fastbert.training.interrupts import Interrupts
from fastbert.training.lagged import LaggedScalars
from fastbert.training.launch import resume_command
from fastbert.training.logbook import Logbook, NoLogbook
from fastbert.training.optimizer_state import flatten_optimizer, restore_optimizer
from fastbert.training.options import ScheduleOptions
from fastbert.training.read_ahead import ReadAhead
from fastbert.training.schedules import learning_rate_factor
from fastbert.training.splits import MEAN, NEW, best_loss, record_split
from fastbert.training.step import Updater, objective_step, settle
from fastbert.training.world import World

_NOT_LOGGED = frozenset({"loss", "norm", "finite", "state_finite"})
REMEDIES = "a lower --optimizer.learning-rate, a longer --schedule.warmup, --machine.precision fp32, or --norm pre"


@dataclass
class Progress:
    """Counters of a training run, saved in its checkpoints."""

    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Tokens seen."""
    seconds: float = 0.0
    """Time of training, validations and checkpoints in all sessions; steps of a killed session after its last
    checkpoint are repeated and do not count."""
    sessions: int = 0
    """Sessions that have trained at least one step."""
    skipped: int = 0
    """Updates skipped so far."""
    skipped_in_row: int = 0
    window_loss: float = 0.0
    """Sum of the losses since the last logged row."""
    window_steps: int = 0
    window_measured: dict[str, float | None] = field(default_factory=dict)
    """Sums of the objective's other metrics; None where a summand was not finite."""
    best: float | None = None
    """Lowest validation loss (of the split of --best-by)."""
    best_of: str | None = None
    """Validation splits whose loss `best` and `last_metric` are; None before the first validation."""
    last_eval: dict[str, Any] = field(default_factory=dict)
    """The step of the last validation and its values; None for those that are not finite."""
    last_metric: float | None = None
    """The loss of that validation that `best` is the lowest of; None if it is not finite."""


_NUMBER = (float, type(None))
_PROGRESS = {
    **{f.name: COUNT for f in fields(Progress) if f.name != "best_of"},
    **{
        "seconds": float,
        "window_loss": float,
        "window_measured": {str: _NUMBER},
        "best": _NUMBER,
        "last_metric": _NUMBER,
        "best_of?": (str, type(None)),
    },
    "last_eval": {"step?": COUNT, "loss?": _NUMBER},
}
STATE = {"progress": _PROGRESS, "optimizer": dict, "metrics": {"records": COUNT, "sha256": str}}
"""Schema of the state from which a run resumes, for `check`."""


@dataclass
class Trainer:
    """A training run: its components and the loop over its steps.

    Args:
        updater: objective, optimizer and clipping, used by all steps.
        batches: batches of each step, and the plan of their sizes.
        learning_rate: peak of the schedule.
        validate: length of a sequence -> validation split -> name -> value, with at least `loss`; the run's own split
            is the first.
        best_by: the validation split whose loss decides which checkpoint is the best, or the mean of all.
        validated_first: validate before the first step too.
        checkpointer: None on all ranks but the first, which also have no logbook.
        milestones: steps that are followed by a logged row, a validation and a checkpoint, like the last step.
        exports: steps that are followed by `export`, which writes the model for other programs.
        state: further values for checkpoints, as JSON.
        around: step -> a context manager around it, such as a profiler's.
        peak_flops: peak FLOP/s of the machine, for MFU.
    """

    updater: Updater
    batches: TrainingBatches
    steps: int
    seed: int
    learning_rate: float
    schedule: ScheduleOptions
    checkpointer: Checkpointer | None
    logbook: Logbook | NoLogbook
    validate: Callable[[int], dict[str, dict[str, float]]]
    eval_every: int
    checkpoint_every: int
    log_every: int
    peak_flops: float
    state: dict[str, Any]
    best_by: str = NEW
    validated_first: bool = False
    milestones: frozenset[int] = frozenset()
    exports: frozenset[int] = frozenset()
    export: Callable[[Progress], None] = lambda progress: None
    around: Callable[[int], AbstractContextManager] = lambda step: nullcontext()
    progress: Progress = field(default_factory=Progress)
    interrupts: Interrupts = field(default_factory=Interrupts)
    _rows: ReadAhead | TrainingBatches = field(init=False)
    """The batches, read ahead while `run` is active."""
    _lagged: LaggedScalars = field(default_factory=LaggedScalars)
    _clock: float = 0.0
    _clock_step: int = 0
    _origin: float = field(default_factory=time.perf_counter)
    """Start time of the run, as if all its sessions had been one without breaks."""

    def __post_init__(self) -> None:
        self._rows = self.batches

    @property
    def objective(self) -> nn.Module:
        return self.updater.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.updater.optimizer

    @property
    def world(self) -> World:
        return self.updater.world

    def run(self, interrupts: Interrupts) -> None:
        """Trains until the last step or until a signal is caught; in both cases the last state is saved in a
        checkpoint.

        Raises:
            UserError: too many updates in a row were skipped, or weights or moments are not finite. The message names
                the newest checkpoint, which is finite.
        """
        self.interrupts = interrupts
        try:
            with ReadAhead(self.batches, self.steps) as self._rows:
                self._run(interrupts)
        except NotFiniteError as error:
            raise UserError(f"{error}; it is not saved, and training stops{self._advice()}") from None
        finally:
            self._rows = self.batches

    def _run(self, interrupts: Interrupts) -> None:
        progress = self.progress
        self.objective.train()
        if progress.step < self.steps:
            settle(self.updater, self._rows.at(progress.step), self.seed, progress.step)
        self._start_clock()
        progress.sessions += progress.step < self.steps
        if self.validated_first and progress.step == 0:
            self.run_validation()
        while progress.step < self.steps and interrupts.caught is None:
            with self.around(progress.step):
                self.train_step(progress.step)
            progress.step += 1
            progress.tokens += self.batches.plan.tokens(progress.step - 1, progress.step)
            self.logbook.advance(progress.step, loss=self._mean_loss())
            marked = progress.step == self.steps or progress.step in self.milestones
            best = False
            if marked or progress.step % self.eval_every == 0:
                best = self.run_validation()
            if progress.step in self.exports:  # before the checkpoint: a run that resumes there has its exports
                self.save_export()
            if marked or best or progress.step % self.checkpoint_every == 0:
                self.save_checkpoint()
        if interrupts.caught is not None and progress.step < self.steps:
            self.save_checkpoint()
        if progress.skipped == self.steps:  # too few to stop a longer run early
            raise UserError(f"loss or gradient was not finite in any of the {self.steps} steps{self._advice()}")
        progress.seconds = time.perf_counter() - self._origin

    def train_step(self, step: int) -> None:
        """Performs one optimizer step: the gradient of the mean loss over the global batch, for any micro-batch
        size."""
        rate, signals = self._learning_rate(step), self.interrupts.flags
        scalars = objective_step(self.updater, self._rows.at(step), self.seed, step, rate, signals)
        with record_function("logging"):
            if self._has_row(step + 1):
                scalars["state_finite"] = self._all_finite()
            self._record(self._lagged.push(step, scalars))

    def _learning_rate(self, step: int) -> float:
        return self.learning_rate * learning_rate_factor(self.schedule, step, self.steps)

    def _has_row(self, done: int) -> bool:
        """Returns whether a row is logged after `done` steps."""
        return done % self.log_every == 0 or done == self.steps or done in self.milestones

    def _all_finite(self) -> Tensor:
        """Bool scalar on the device: whether weights, buffers and moments are finite, on all ranks."""
        groups = self._tensors().values()
        finite = all_finite(self.world.local(tensor) for group in groups for tensor in group.values())
        if not self.world.sharded:  # the same on all ranks
            return finite
        return self.world.sums({"infinite": finite.logical_not().long()})["infinite"] == 0

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of a checkpoint: weights and buffers of the objective, moments and counters of the optimizer."""
        # keep_vars: a tied weight is one object with several names.
        return {"model": self.objective.state_dict(keep_vars=True), "optimizer": flatten_optimizer(self.optimizer)[0]}

    def _require_finite(self) -> None:
        """Checks the tensors of a checkpoint; waits for the device.

        Raises:
            NotFiniteError: one of them is not finite.
        """
        if not self.world.sharded:
            require_finite(self._tensors(), f"the state after step {self.progress.step}")
        elif not self._all_finite():
            raise NotFiniteError(f"the state after step {self.progress.step} holds numbers that are not finite")

    def _record(self, scalars: tuple[int, dict[str, float]] | None) -> None:
        """Adds the scalars of a step to the running mean and the log, and checks for divergence."""
        if scalars is None:
            return
        step, values = scalars
        progress = self.progress
        self.interrupts.agree(values)
        if guard(progress, step, values, echo, self._advice_after_skips):
            progress.window_loss += values["loss"]
            progress.window_steps += 1
            for name in sorted(values.keys() - _NOT_LOGGED - self.interrupts.flags.keys()):
                total = progress.window_measured.get(name, 0.0)
                total = None if total is None else finite_or_none(total + values[name])
                progress.window_measured[name] = total
        if not values.get("state_finite", True):
            self._require_finite()  # raises an error with the name of the tensor
        done = step + 1
        if self._has_row(done):
            now, plan = self._lagged.time, self.batches.plan
            seconds, first = now - self._clock, min(self._clock_step, step)
            row = {
                "loss": self._mean_loss(),
                "lr": self._learning_rate(step),
                "grad_norm": values["norm"],
                "tokens": plan.tokens(0, done),
                "flops": plan.total(self.objective.flops, 0, done),
                "skipped": progress.skipped,
                **{
                    name: None if total is None else total / progress.window_steps
                    for name, total in progress.window_measured.items()
                },
                **self._length_of(step),
                "tokens_per_second": round(plan.tokens(first, done) / seconds, 1),
                "mfu": round(plan.total(self.objective.flops, first, done) / seconds / self.peak_flops, 4),
            }
            self.logbook.log(done, "train", row)
            progress.window_loss, progress.window_steps, progress.window_measured = 0.0, 0, {}
            self._clock, self._clock_step = now, done

    def _mean_loss(self) -> float | None:
        """The mean over the updates since the last logged row; None if there was none."""
        return self.progress.window_loss / self.progress.window_steps if self.progress.window_steps else None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager: the time inside does not count in the logged rate."""
        before = time.perf_counter()
        yield
        seconds = time.perf_counter() - before
        self._clock += seconds
        self._lagged.shift(seconds)

    def _of_last_length(self, step: int) -> bool:
        plan = self.batches.plan
        return plan.at(step).length == plan.lengths[-1]

    def _length_of(self, step: int) -> dict[str, int]:
        """Sequence length for the log, if it changes during the run."""
        plan = self.batches.plan
        return {"length": plan.at(step).length} if len(plan.lengths) > 1 else {}

    def _start_clock(self) -> None:
        self._clock, self._clock_step = time.perf_counter(), self.progress.step
        self._origin = self._clock - self.progress.seconds

    def run_validation(self) -> bool:
        """Logs the held-out losses on sequences as long as those of the last step; returns whether the loss is the
        lowest so far. A loss on sequences shorter than those at the end of the run is not comparable and never counts
        as the lowest; neither does a loss that is not finite."""
        self._record(self._lagged.pop())
        paused = time.perf_counter()
        self._require_finite()
        progress, last = self.progress, max(0, self.progress.step - 1)
        measured = self.validate(self.batches.plan.at(last).length)
        for name, values in measured.items():
            row = {**values, "tokens": progress.tokens, **self._length_of(last)}
            self.logbook.log(progress.step, record_split(name), row)
        progress.last_eval = finite_or_none({"step": progress.step, **measured[NEW]})
        losses = {name: finite_or_none(values["loss"]) for name, values in measured.items()}
        self._compare_by(f"mean of {', '.join(sorted(losses))}" if self.best_by == MEAN else self.best_by)
        progress.last_metric = loss = best_loss(losses, self.best_by)
        if loss is None:
            echo(
                f"step {progress.step}: the validation loss is not finite, though all weights are: it does not count "
                "as best"
            )
        comparable = progress.step > 0 and self._of_last_length(last)
        best = comparable and loss is not None and (progress.best is None or loss < progress.best)
        if best:
            progress.best = loss
        self._clock += time.perf_counter() - paused
        return best

    def _compare_by(self, splits: str) -> None:
        """Forgets the lowest loss if it is that of other validation splits than `splits`, as in a run that is resumed
        with another --best-by: the two cannot be compared."""
        progress = self.progress
        if progress.best is not None and progress.best_of not in (None, splits):
            echo(f"the best checkpoint is now that with the lowest loss of {splits}, no longer of {progress.best_of}")
            progress.best = None
        progress.best_of = splits

    def save_export(self) -> None:
        self._record(self._lagged.pop())
        with self.paused():
            self._require_finite()
            self.progress.seconds = time.perf_counter() - self._origin
            self.export(self.progress)

    def save_checkpoint(self) -> None:
        self._record(self._lagged.pop())
        paused = time.perf_counter()
        self.progress.seconds = paused - self._origin
        tensors = self.world.full_on_first(self._tensors())
        self.world.first_decides(lambda: self._write_checkpoint(tensors))
        self._clock += time.perf_counter() - paused

    def _write_checkpoint(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        progress = self.progress
        self.logbook.sync()
        _, optimizer_state = flatten_optimizer(self.optimizer)
        measured = 0 < progress.step == progress.last_eval.get("step") and self._of_last_length(progress.step - 1)
        saved = self.checkpointer.save(
            progress.step,
            tensors,
            {**self.state, "progress": asdict(progress), "metrics": self.logbook.tally(), "optimizer": optimizer_state},
            metric=progress.last_metric if measured else None,
            metric_of=progress.best_of,
            # While updates are skipped, finite weights may be useless: older checkpoints stay until an update succeeds.
            prune=progress.skipped_in_row == 0,
        )
        self.logbook.saved(progress.step, saved)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restores optimizer and counters from a checkpoint that matches the schema `STATE`; `load_weights` has
        restored the networks.

        Raises:
            UserError: its tensors do not fit the optimizer.
        """
        if "optimizer" not in checkpoint.tensors:
            raise UserError(f"the checkpoint {checkpoint.path} is damaged: it has no optimizer.safetensors")
        restore_optimizer(
            self.optimizer, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"], self.world.like
        )
        saved = checkpoint.state["progress"]
        self.progress = Progress(**{f.name: saved[f.name] for f in fields(Progress) if f.name in saved})
        # Completes the save, which may have been killed before this.
        if self.checkpointer is not None and self.progress.skipped_in_row == 0:
            self.checkpointer.prune(checkpoint.step, self.progress.best_of)

    def _advice(self) -> str:
        """Advice after a divergence."""
        if self.checkpointer is None:
            return ""
        newest, run = self.checkpointer.newest_whole(), str(self.checkpointer.folder.parent)
        if newest is None:
            return f"; there is no checkpoint before it. Start a new run with {REMEDIES}"
        return (
            f"; the newest finite checkpoint is {newest}; continue from it with: {resume_command(os.environ, run)}. If "
            "training stops there again, delete that checkpoint to resume from the one before, or start a new run with "
            f"{REMEDIES}"
        )

    def _advice_after_skips(self) -> str:
        """The same advice, preceded by the name of a weight or moment that is not finite, if any."""
        try:
            self._require_finite()
        except NotFiniteError as error:
            return f"; {error}{self._advice()}"
        return self._advice()


def load_weights(objective: nn.Module, checkpoint: Checkpoint) -> None:
    """Restores weights and buffers of the networks, before they are sharded.

    Raises:
        UserError: they do not fit.
    """
    try:
        objective.load_state_dict(checkpoint.tensors["model"])
    except RuntimeError as error:
        raise UserError(f"checkpoint {checkpoint.path} does not fit this run: {error}") from None
