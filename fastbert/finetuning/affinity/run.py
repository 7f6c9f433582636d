"""The run of all tasks together that is probed at intervals. Its checkpoints hold the probes so far, so a resumed run
has the same ones."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastbert.errors import UserError
from fastbert.files import remove_leftovers
from fastbert.finetuning.affinity.probe import Probe, probe
from fastbert.finetuning.affinity.setup import AffinitySetup
from fastbert.finetuning.build import build_updater
from fastbert.finetuning.loop import STATE, Tuner
from fastbert.finetuning.stream import StreamBatch
from fastbert.finetuning.tasks import Task
from fastbert.randomness import row_keys
from fastbert.records import COUNT, check
from fastbert.streams import echo
from fastbert.training.checkpoints import Checkpoint, Checkpointer, check_space, read_newest
from fastbert.training.interrupts import Interrupts
from fastbert.training.logbook import Logbook
from fastbert.training.step import Updater

CHECKPOINTS = "checkpoints"
ADVICE = ". Try a lower --learning-rate, or --machine.precision fp32"
PARTS = 10  # of a run, each of which ends with a checkpoint
_ARRAYS = ("losses", "affinity", "first_order")  # of a `Probe`


@dataclass
class Cost:
    """Work so far, over all sessions."""

    trained: int = 0
    """Gradients of examples in the steps."""
    probed: int = 0
    """Gradients of examples in the probes."""
    forwards: int = 0
    """Forward passes of examples in the probes, in addition to those of the gradients."""
    probe_seconds: float = 0.0


_STATE = STATE | {"cost": {"trained": COUNT, "probed": COUNT, "forwards": COUNT, "probe_seconds": float}}


@dataclass
class SteppedTuner(Tuner):
    """A training run of a number of steps, in `PARTS` parts that need not be epochs."""

    advice: ClassVar[str] = ADVICE

    total: int = 1
    """Number of steps."""

    @property
    def steps(self) -> int:
        return self.total

    def run(self, interrupts: Interrupts, after_part: Callable[[], object]) -> bool:
        """Trains the remaining steps; returns false if a signal stopped it early.

        Args:
            after_part: called after each part of the run, and before it stops early.
        """
        self.interrupts, progress = interrupts, self.progress
        length = -(-self.steps // PARTS)
        while progress.step < self.steps and interrupts.caught is None:
            start, first = time.perf_counter(), progress.step
            for step in range(first, min(self.steps, (first // length + 1) * length)):
                self.train_step(self.stream.at(*divmod(step, self.stream.batches)))
                self.logbook.advance(progress.step, loss=self._mean_loss())
                if interrupts.caught is not None:
                    break
            self._log(self._lagged.pop())
            progress.seconds += time.perf_counter() - start
            after_part()
        return interrupts.caught is None


@dataclass
class ProbedTuner(SteppedTuner):
    """A training run with a probe before every n-th step.

    Args:
        setup: with the batches of the probes.
    """

    setup: AffinitySetup | None = None
    rates: list[float] = field(default_factory=list)
    """Learning rate of each probe."""
    probes: list[Probe] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)

    def train_step(self, batch: StreamBatch) -> None:
        if self.progress.step % self.setup.options.every == 0:
            self.measure()
        self.cost.trained += len(batch.rows) if batch.units else 0
        super().train_step(batch)

    def measure(self) -> None:
        """Makes a probe with the dropout masks and the learning rate of the step that follows.

        Raises:
            UserError: a loss is not finite, or zero.
        """
        start, step, rate = time.perf_counter(), self.progress.step, self._rate(self.progress.step)
        batches = self.setup.probe_batches(step // self.setup.options.every)
        rows = [len(batch.rows) for batch in batches]
        keys = [row_keys(self.seed, "dropout", step, torch.arange(count)).to(self.setup.device) for count in rows]
        found = probe(self.updater.module, batches, rate, keys, self.options.machine.micro_batch_size)
        for task, loss, changes in zip(self.setup.names, found.losses, found.affinity.T, strict=True):
            if not (loss > 0.0 and np.isfinite(changes).all()):
                raise UserError(f"the loss of {task} is {loss:.4g} in the probe before step {step + 1}{ADVICE}")
        self.rates.append(rate)
        self.probes.append(found)
        self.cost.probed += sum(rows)
        self.cost.forwards += len(rows) * sum(rows)
        self.cost.probe_seconds += time.perf_counter() - start

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        arrays = {name: np.stack([getattr(one, name) for one in self.probes]) for name in _ARRAYS}
        probes = {"rates": np.array(self.rates), **arrays}
        return super().tensors() | {"probes": {name: torch.from_numpy(value) for name, value in probes.items()}}

    def state(self) -> dict[str, Any]:
        return super().state() | {"cost": asdict(self.cost)}

    def restore(self, checkpoint: Checkpoint) -> None:
        super().restore(checkpoint)
        probes = {name: tensor.numpy() for name, tensor in checkpoint.tensors["probes"].items()}
        self.rates = probes["rates"].tolist()
        self.probes = [Probe(*arrays) for arrays in zip(*(probes[name] for name in _ARRAYS), strict=True)]
        self.cost = Cost(**checkpoint.state["cost"])


def train_and_probe(setup: AffinitySetup, folder: Path, interrupts: Interrupts) -> ProbedTuner | None:
    """Trains all tasks together in `folder`, from its newest checkpoint if there is one.

    Returns:
        The finished run; None if a signal ended it.

    Raises:
        UserError: training diverged; the disk is full; the checkpoints are damaged.
    """
    options = setup.options
    remove_leftovers(folder)
    checkpoint = checkpoint_of(folder, setup)
    updater = updater_of(setup, setup.tasks, options.seed)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in updater.module.parameters())
    needed = 3 * weights * (1 if checkpoint else 2)  # with AdamW's two moments
    check_space(folder, needed, "the checkpoints need", "use a smaller encoder")
    examples = ", ".join(f"{task} {len(rows):,}" for task, rows in zip(setup.names, setup.train, strict=True))
    echo(
        f"examples: {examples}; {options.steps} steps, a probe every {options.every}; {setup.device} {setup.precision}"
    )
    resumed = {"start_step": checkpoint.step, "expected": checkpoint.state["metrics"]} if checkpoint else {}
    with Logbook(folder, options.steps, **resumed) as logbook:
        run = (updater, setup.stream, setup.tuning, options.seed, logbook)
        tuner = ProbedTuner(*run, total=options.steps, setup=setup)
        checkpointer = Checkpointer(folder / CHECKPOINTS, 1, echo)
        if checkpoint is not None:
            tuner.restore(checkpoint)
            echo(f"continues after step {tuner.progress.step} of {options.steps}")
        done = tuner.run(interrupts, lambda: checkpointer.save(tuner.progress.step, tuner.tensors(), tuner.state()))
    return tuner if done else None


def checkpoint_of(folder: Path, setup: AffinitySetup) -> Checkpoint | None:
    """The checkpoint from which the run continues; None if there is none.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    checkpoint = read_newest(folder / CHECKPOINTS, echo)
    if checkpoint is None:
        return None
    state = check(checkpoint.state, _STATE, f"the checkpoint's state {checkpoint.path / 'state.json'}")
    count, tasks = -(-state["progress"]["step"] // setup.options.every), len(setup.tasks)
    shapes = {"rates": (count,), "losses": (count, tasks), **dict.fromkeys(_ARRAYS[1:], (count, tasks, tasks))}
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.get("probes", {}).items()}
    if {"model", "optimizer"} - checkpoint.tensors.keys() or found != shapes:
        raise UserError(f"the checkpoint {checkpoint.path} is damaged: it does not hold the {count} probes; remove it")
    return checkpoint


def updater_of(setup: AffinitySetup, tasks: Sequence[Task], seed: int) -> Updater:
    """The model with a new head for each of `tasks`, and its optimizer."""
    kinds = {task.name: task.kind for task in tasks}
    return build_updater(setup.tuning, setup.pretrained, kinds, seed, setup.device, setup.precision)
