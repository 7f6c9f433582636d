"""`fastbert pretrain --dry-run`: what a run would take. Its first steps, a validation, a checkpoint and the export are
made for real in a temporary folder beside the run's, timed, and removed."""

import contextlib
import datetime
import io
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fastbert.errors import UserError
from fastbert.files import folder_errors, new_folder, remove_leftovers
from fastbert.objectives.objective import Objective
from fastbert.outputs import is_filled_within, resolved
from fastbert.pretraining.budget import Costs, shown_spans, shown_time
from fastbert.pretraining.finish import finish
from fastbert.pretraining.loop import Trainer
from fastbert.pretraining.run import RunFolder
from fastbert.pretraining.setup import PretrainSetup
from fastbert.progress import progress
from fastbert.streams import echo
from fastbert.training.checkpoints import existing, free_space
from fastbert.training.hardware import synchronize
from fastbert.training.interrupts import Interrupts
from fastbert.training.memory import PeakMemory
from fastbert.training.optimizer_state import flatten_optimizer
from fastbert.training.timing import Timed, time_in_groups, undisturbed

Result = TypeVar("Result")
Shape = tuple[int, int]  # sequences in a step, tokens in a sequence

WARM_UP, LEAST, MOST = 2, 4, 2000  # steps of each shape
SECONDS = 12.0  # of timed steps, of all shapes together

PARTS = {
    "embeddings": ("encoder.words.", "encoder.types.", "encoder.embedding_norm."),
    "positions": ("encoder.positions.",),
    "blocks": ("encoder.blocks.", "encoder.final_norm."),
}
"""Of the encoder's parameters, by how their names begin; the objective knows the others."""


@dataclass(frozen=True)
class Usage:
    """What a run costs: seconds and bytes."""

    costs: Costs
    steps: dict[Shape, Timed]
    weights: int
    """Bytes; the gradients take as many."""
    optimizer: int
    peak: int
    peak_kind: str
    checkpoint_bytes: int
    export_bytes: int


def dry_run(setup: PretrainSetup, run: RunFolder, done: int, build: Callable[[Path], Trainer]) -> int:
    """Prints what the steps after `done` would take; returns the exit code.

    Args:
        setup: with all intervals set.
        run: the folder that is not written.
        build: makes the trainer in a folder, at its first step.

    Raises:
        UserError: whatever stands in the way of the run itself.
    """
    with Interrupts() as interrupts, _scratch(run.path) as folder:
        taken, trainer = measure(setup, RunFolder(folder), done, build, interrupts)
    if taken is None or interrupts.caught is not None:
        return interrupts.exit_code
    print("\n".join(report(setup, run, done, taken, trainer)))
    return 0


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A folder on the disk of `path`, for as long as the context lasts. Errors name `path` in its stead."""
    path = resolved(path)
    # Next to a mount point is another disk.
    within = (path if is_filled_within(path) else existing(path.parent)) / path.name
    with folder_errors(path):
        remove_leftovers(within.parent, within.name)
        folder, handle = new_folder(within)
    try:
        yield folder
    except UserError as error:
        raise UserError(str(error).replace(str(folder), str(path))) from None
    finally:
        shutil.rmtree(folder)
        os.close(handle)


def measure(
    setup: PretrainSetup, run: RunFolder, done: int, build: Callable[[Path], Trainer], interrupts: Interrupts
) -> tuple[Usage | None, Trainer]:
    """A run from its start to its end, with few of the steps after `done` between; None if it is interrupted."""
    start, trainer = seconds(lambda: build(run.path), setup.device)
    weights, memory = _bytes(trainer.objective.parameters()), PeakMemory(setup.device)
    with trainer.logbook:
        echo("dry run: timing some steps, a validation, a checkpoint and the export")
        times = time_steps(trainer, done, setup.device, interrupts)
        if interrupts.caught is not None:
            return None, trainer
        peak = weights + memory.growth()
        trainer.progress.step = trainer.steps
        validation = undisturbed([seconds(trainer.run_validation, setup.device)[0] for _ in range(3)])
        checkpoint, _ = seconds(trainer.save_checkpoint, setup.device)
    with contextlib.redirect_stdout(io.StringIO()):
        ended, _ = seconds(lambda: finish(setup, trainer.objective, run, trainer.progress), setup.device)
    taken = Usage(
        costs=Costs(start, lambda *shape: times[shape].seconds, validation, checkpoint, ended),
        steps=times,
        weights=weights,
        optimizer=_bytes(flatten_optimizer(trainer.optimizer)[0].values()),
        peak=peak,
        peak_kind=memory.kind,
        checkpoint_bytes=_on_disk(run.checkpoints),
        export_bytes=_on_disk(run.model),
    )
    return taken, trainer


def seconds(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """How long `work` takes, and what it gives."""
    before = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - before, result


@progress("timing steps")
def time_steps(trainer: Trainer, done: int, device: torch.device, interrupts: Interrupts) -> dict[Shape, Timed]:
    """The steps after `done`, a few of each shape that they have."""
    plan, times = trainer.batches.plan, {}
    spans = list(plan.spans(done, trainer.steps)) or [(plan.stages[-1], 1)]
    shapes = {stage.shape: range(max(stage.first, done), max(stage.first, done) + count) for stage, count in spans}
    trainer.objective.train()
    for shape, steps in shapes.items():
        step = map(trainer.train_step, chain(steps, repeat(steps[-1]))).__next__  # there may be fewer than are timed
        for _ in range(WARM_UP):
            step()
        synchronize(device)
        times[shape] = time_in_groups(
            step,
            partial(synchronize, device),
            SECONDS / len(shapes),
            least=LEAST,
            most=MOST,
            stopped=lambda: interrupts.caught is not None,
        )
    return times


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def parameters_by_part(objective: Objective) -> dict[str, int]:
    """How many parameters each part has; a shared one counts where it comes first."""
    parts = {**PARTS, **objective.parts}
    counts = dict.fromkeys((*parts, "other"), 0)
    for name, parameter in objective.named_parameters():
        part = next((part for part, begins in parts.items() if name.startswith(begins)), "other")
        counts[part] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def report(setup: PretrainSetup, run: RunFolder, done: int, taken: Usage, trainer: Trainer) -> list[str]:
    """Lines for people."""
    options, objective = setup.options, trainer.objective
    plan, rows = trainer.batches.plan, trainer.batches.rows[options.length]
    left = options.steps - done
    tokens, flops = plan.tokens(done, options.steps), plan.total(objective.flops, done, options.steps)
    parts = parameters_by_part(objective)
    of_parts = ", ".join(f"{part} {shown_count(count)}" for part, count in parts.items())
    names = ("encoder", objective.second_network)
    networks = [
        f"{name}: {config.layers} layers of width {config.width}, {config.heads} heads, inner width {config.ffn}"
        for name, config in zip(names, options.of_objective.networks(setup.config), strict=False)
    ]
    shapes = plan.describe(options.steps)
    copies = options.keep_checkpoints + len(options.milestone_steps()) + 1
    needed = copies * taken.checkpoint_bytes + taken.export_bytes
    rest = max(0, taken.peak - 2 * taken.weights - taken.optimizer)
    spans = taken.costs.spans(plan, options, done, options.steps)
    total = sum(spans.values())
    end = datetime.datetime.now().astimezone() + datetime.timedelta(seconds=total)
    table = {
        "networks": "\n".join(networks),
        "parameters": f"{shown_count(sum(parts.values()))}: {of_parts}",
        "data": f"{setup.dataset.folder}: {len(rows):,} rows of {options.length} tokens",
        "steps": f"{f'the {left} left of ' if done else ''}{shapes}\n{shown_count(tokens)} tokens, "
        f"{tokens / len(rows) / options.length:.2g} epochs",
        "FLOPs": f"{flops / max(1, left):.3g} a step, {flops:.3g} in all",
        "memory": f"{shown_size(taken.peak)} at the peak ({taken.peak_kind})\nweights {shown_size(taken.weights)}, "
        f"gradients {shown_size(taken.weights)}, optimizer {shown_size(taken.optimizer)}, "
        f"activations and the rest {shown_size(rest)}",
        "disk": f"{copies} checkpoints of {shown_size(taken.checkpoint_bytes)} and a model of "
        f"{shown_size(taken.export_bytes)}: {shown_size(needed)}; free {shown_size(free_space(run.path))}",
        **speeds(setup, taken, trainer),
        "time": f"{shown_time(total)}, until {end:%Y-%m-%d %H:%M} if it starts now\n" + shown_spans(spans),
    }
    return [
        f"Dry run: nothing is written to {run.path}",
        *(f"  {name:<11} {text}".replace("\n", f"\n{'':14}") for name, text in table.items()),
    ]


def speeds(setup: PretrainSetup, taken: Usage, trainer: Trainer) -> dict[str, str]:
    """A line for each shape of a step."""
    found = {}
    for (batch_size, length), timed in taken.steps.items():
        name = "speed" if len(taken.steps) == 1 else f"{batch_size} x {length}"
        step = timed.seconds
        mfu = trainer.objective.flops(batch_size, length) / step / trainer.peak_flops
        busy = f"; disturbed by other work, {timed.mean:.3g} s on average" if timed.disturbed else ""
        found[name] = (
            f"{step:.3g} s a step, {batch_size * length / step:,.0f} tokens/s, MFU {100 * mfu:.0f} % "
            f"({timed.count} steps timed on {setup.device}, {setup.precision}{busy})"
        )
    return found


def shown_count(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.0f}"


def shown_size(value: float) -> str:
    for size, name in ((1e9, "GB"), (1e6, "MB")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value / 1e3:.3g} kB"
