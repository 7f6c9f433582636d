"""`fastbert pretrain --dry-run`: the cost of a run. Its first steps, a validation, a checkpoint and the export are run
and timed in a temporary folder next to the run's folder, which is then removed."""

import contextlib
import datetime
import io
import os
import shutil
import textwrap
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
from fastbert.pretraining.exports import export, export_steps, shown_exports, words_seen
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
SECONDS = 12.0  # for timing steps, all shapes together

PARTS = {
    "embeddings": ("encoder.words.", "encoder.types.", "encoder.embedding_norm."),
    "positions": ("encoder.positions.",),
    "blocks": ("encoder.blocks.", "encoder.final_norm."),
}
"""Parts of the encoder and the prefixes of their parameters' names; the objective has the others."""


@dataclass(frozen=True)
class Usage:
    """Cost of a run in seconds and bytes."""

    costs: Costs
    steps: dict[Shape, Timed]
    weights: int
    """Bytes; the gradients take the same."""
    optimizer: int
    peak: int
    peak_kind: str
    checkpoint_bytes: int
    export_bytes: int


def dry_run(setup: PretrainSetup, run: RunFolder, done: int, build: Callable[[Path], Trainer]) -> int:
    """Prints the cost of the steps after `done`; returns the exit code.

    Args:
        setup: with all intervals set.
        run: folder of the run, which is not written.
        build: builds a trainer at its first step that writes to the given folder.

    Raises:
        UserError: any error that the run itself would raise.
    """
    with Interrupts() as interrupts, _scratch(run.path) as folder:
        usage, trainer = measure(setup, RunFolder(folder), done, build, interrupts)
    if usage is None or interrupts.caught is not None:
        return interrupts.exit_code
    print("\n".join(report(setup, run, done, usage, trainer)))
    return 0


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """Temporary folder on the disk of `path`. Error messages name `path` instead."""
    path = resolved(path)
    # The folder around a mount point is on another disk.
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
    """Runs all parts of a run, with a few of the steps after `done`. The usage is None after an interruption."""
    start, trainer = seconds(lambda: build(run.path), setup.device)
    weights, memory = _bytes(trainer.objective.parameters()), PeakMemory(setup.device)
    with trainer.logbook:
        echo("dry run: timing steps, a validation, a checkpoint and the export")
        times = time_steps(trainer, done, setup.device, interrupts)
        if interrupts.caught is not None:
            return None, trainer
        peak = weights + memory.growth()
        trainer.progress.step = trainer.steps
        validation = undisturbed([seconds(trainer.run_validation, setup.device)[0] for _ in range(3)])
        checkpoint, _ = seconds(trainer.save_checkpoint, setup.device)
    with contextlib.redirect_stdout(io.StringIO()):
        ended, _ = seconds(lambda: finish(setup, trainer.objective, run, trainer.progress), setup.device)
    exported, _ = seconds(lambda: export(setup, trainer.objective, run, trainer.progress, run.model), setup.device)
    usage = Usage(
        costs=Costs(start, lambda *shape: times[shape].seconds, validation, checkpoint, exported, ended),
        steps=times,
        weights=weights,
        optimizer=_bytes(flatten_optimizer(trainer.optimizer)[0].values()),
        peak=peak,
        peak_kind=memory.kind,
        checkpoint_bytes=_on_disk(run.checkpoints),
        export_bytes=_on_disk(run.model),
    )
    return usage, trainer


def seconds(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Seconds that `work` takes, and its result."""
    before = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - before, result


@progress("timing steps")
def time_steps(trainer: Trainer, done: int, device: torch.device, interrupts: Interrupts) -> dict[Shape, Timed]:
    """Times a few of the steps after `done`, for each of their shapes."""
    plan, times = trainer.batches.plan, {}
    spans = list(plan.spans(done, trainer.steps)) or [(plan.stages[-1], 1)]
    shapes = {stage.shape: range(max(stage.first, done), max(stage.first, done) + count) for stage, count in spans}
    trainer.objective.train()
    for shape, steps in shapes.items():
        step = map(trainer.train_step, chain(steps, repeat(steps[-1]))).__next__  # a short run repeats its last step
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
    """Number of parameters of each part; a shared parameter counts for the first part that contains it."""
    parts = {**PARTS, **objective.parts}
    counts = dict.fromkeys((*parts, "other"), 0)
    for name, parameter in objective.named_parameters():
        part = next((part for part, begins in parts.items() if name.startswith(begins)), "other")
        counts[part] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def report(setup: PretrainSetup, run: RunFolder, done: int, usage: Usage, trainer: Trainer) -> list[str]:
    """Lines of the printed report."""
    options, objective = setup.options, trainer.objective
    plan, rows = trainer.batches.plan, trainer.batches.rows[options.length]
    left, new = options.steps - done, 1 - options.replay.fraction if options.replay.active else 1
    count = rows.new_rows if options.replay.active else len(rows)
    tokens, flops = plan.tokens(done, options.steps), plan.total(objective.flops, done, options.steps)
    parts = parameters_by_part(objective)
    of_parts = ", ".join(f"{part} {shown_count(count)}" for part, count in parts.items())
    names = ("encoder", objective.second_network)
    networks = [
        f"{name}: layers {config.layers}, width {config.width}, heads {config.heads}, inner width {config.ffn}"
        for name, config in zip(names, options.of_objective.networks(setup.config), strict=False)
    ]
    shapes = plan.describe(options.steps)
    copies = options.keep_checkpoints + len(options.marked_steps(options.steps)) + 1
    exports = export_steps(setup)
    models = 1 + sum(map(len, exports.values()))
    needed = copies * usage.checkpoint_bytes + models * usage.export_bytes
    rest = max(0, usage.peak - 2 * usage.weights - usage.optimizer)
    ahead = {step: names for step, names in exports.items() if step > done}
    spans = usage.costs.spans(plan, options, done, options.steps, sum(map(len, ahead.values())))
    total = sum(spans.values())
    seen = words_seen(setup, options.steps)
    words = "" if seen is None else f", {shown_count(seen - words_seen(setup, done))} words"
    end = datetime.datetime.now().astimezone() + datetime.timedelta(seconds=total)
    table = {
        "networks": "\n".join(networks),
        "parameters": f"{shown_count(sum(parts.values()))}: {of_parts}",
        "data": f"{setup.dataset.folder}: {count:,} rows of {options.length} tokens",
        "steps": f"{f'{left} remaining of ' if done else ''}{shapes}\n{shown_count(tokens)} tokens, "
        f"{new * tokens / count / options.length:.2g} epochs{words}",
        **({"exports": "\n".join(textwrap.wrap(shown_exports(ahead), 100))} if ahead else {}),
        "FLOPs": f"{flops / max(1, left):.3g} a step, {flops:.3g} in all",
        "memory": f"{shown_size(usage.peak)} at the peak ({usage.peak_kind})\nweights {shown_size(usage.weights)}, "
        f"gradients {shown_size(usage.weights)}, optimizer {shown_size(usage.optimizer)}, "
        f"activations and the rest {shown_size(rest)}",
        "disk": f"{copies} checkpoints of {shown_size(usage.checkpoint_bytes)} and "
        f"{'a model' if models == 1 else f'{models} models'} of {shown_size(usage.export_bytes)}: "
        f"{shown_size(needed)}; free {shown_size(free_space(run.path))}",
        **speeds(setup, usage, trainer),
        "time": f"{shown_time(total)}, until {end:%Y-%m-%d %H:%M} if started now\n" + shown_spans(spans),
    }
    return [
        f"Dry run: nothing is written to {run.path}",
        *(f"  {name:<11} {text}".replace("\n", f"\n{'':14}") for name, text in table.items()),
    ]


def speeds(setup: PretrainSetup, usage: Usage, trainer: Trainer) -> dict[str, str]:
    """A line for each shape of a step: name -> speed."""
    found = {}
    for (batch_size, length), timed in usage.steps.items():
        name = "speed" if len(usage.steps) == 1 else f"{batch_size} x {length}"
        step = timed.seconds
        mfu = trainer.objective.flops(batch_size, length) / step / trainer.peak_flops
        busy = f"; disturbed by other processes, {timed.mean:.3g} s on average" if timed.disturbed else ""
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
