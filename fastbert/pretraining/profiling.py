"""`fastbert pretrain --profile`: the time of a step by parts (data, attention, optimizer, ...) and by operators.

The loop marks its parts with `record_function`, which costs next to nothing without a profiler. During the profiled
steps, hooks on the modules mark the parts of the forward pass. The parts of the backward pass follow from autograd's
sequence numbers: each node has that of the forward operator that created it.
"""

import gzip
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from fastbert.files import atomic_folder
from fastbert.model.encoder import Attention, Block, Encoder, FeedForward
from fastbert.pretraining.loop import Trainer
from fastbert.pretraining.setup import PretrainSetup
from fastbert.pretraining.spans import Span, operators, parts
from fastbert.streams import echo
from fastbert.training.checkpoints import check_space
from fastbert.training.hardware import synchronize

FIRST, COUNT = 10, 5  # number of steps before the profiled ones; number of profiled steps
SHOWN = 15  # operators in the table
SPACE, SPACE_OF_BLOCK = 50_000_000, 1_000_000  # bytes of a profile, and of each block of each micro-batch in it

MODULES = {Encoder: "embedding", Block: "norms, dropout, sums", Attention: "attention", FeedForward: "feed-forward"}
"""Marks of the forward pass: the time of a module without that of the marked modules inside it."""


def check_room(folder: Path, setup: PretrainSetup) -> None:
    """Raises a UserError if the disk of `folder` has no space for a profile."""
    options = setup.options
    passes = -(-options.batch_size // options.micro_batch_size)
    blocks = sum(network.layers for network in options.of_objective.networks(setup.config))
    space = SPACE + passes * blocks * SPACE_OF_BLOCK
    check_space(folder, space, "--profile needs", "leave --profile out")


@dataclass(frozen=True)
class Profile:
    """Time of a few steps by parts and by operators."""

    steps: int
    seconds: float
    """Time of a step under the profiler."""
    device: torch.device
    parts: list[dict[str, Any]]
    """`part`, `ms` per step, and `fraction` of the step's time; on a GPU, of the GPU's time."""
    operators: list[dict[str, Any]]
    """`operator`, `calls` per step, `ms` without the operators that it calls, and `fraction`; largest first."""

    def table(self) -> str:
        """The parts, as Markdown."""
        clock = "the GPU's time" if self.device.type == "cuda" else "the processor's time"
        return "\n".join(
            [
                f"A step of {1000 * self.seconds:.1f} ms, the mean of {self.steps} under the profiler; {clock}.",
                "",
                _markdown(self.parts),
            ]
        )

    def document(self, title: str) -> str:
        """The whole profile, as Markdown."""
        operators = _markdown(self.operators[:SHOWN])
        return f"# Time of a step\n\n{title}\n\n{self.table()}\n\n## The largest operators\n\n{operators}\n"


def _markdown(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0]) if rows else []
    lines = [f"| {' | '.join(names)} |", "|---" + "|--:" * (len(names) - 1) + "|"]
    for row in rows:
        cells = [f"{100 * row[name]:.1f} %" if name == "fraction" else str(row[name]) for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


class StepProfiler:
    """Profiles steps of a trainer: call `start`, run each step in `step`, then call `stop` and `found`."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.count = trainer, 0
        # This level suppresses Kineto's messages, which would break the progress bar.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self.device = next(trainer.objective.parameters()).device
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profile = profile(activities=activities)
        self._hooks: list[Any] = []

    def start(self) -> None:
        self._hooks = mark_modules(self.trainer.objective)
        self.profile.start()

    @contextmanager
    def step(self) -> Iterator[None]:
        """A context for one step; it waits for the device."""
        with record_function("step"):
            yield
            synchronize(self.device)
        self.count += 1

    def stop(self) -> None:
        """Stops profiling; a second call does nothing."""
        if self._hooks:
            self.profile.stop()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def found(self) -> Profile:
        """The profile of the steps between `start` and `stop`."""
        spans = spans_of(self.profile.profiler.kineto_results.events())
        cuda = self.device.type == "cuda"
        seconds = sum(span.end - span.start for span in spans if span.name == "step") / 1e6 / self.count
        return Profile(
            self.count, seconds, self.device, parts(spans, self.count, cuda), operators(spans, self.count, cuda)
        )


def spans_of(events: Iterable[Any]) -> list[Span]:
    """Spans of the host from kineto's events, each with the time of the kernels that it launched.

    `torch.profiler`'s own list is equivalent, but takes seconds to build. A mark of the host also appears on the
    device, as an event that spans its kernels and is not a kernel itself.
    """
    events = list(events)
    host = [event for event in events if event.device_type() == DeviceType.CPU and not _hidden(event)]
    marks = {event.name() for event in host if event.is_user_annotation()}
    kernels: Counter[int] = Counter()
    for event in events:
        if event.device_type() != DeviceType.CPU and event.name() not in marks:
            kernels[event.linked_correlation_id()] += event.end_ns() - event.start_ns()
    return [
        Span(
            event.name(),
            event.start_thread_id(),
            event.start_ns() / 1000,
            event.end_ns() / 1000,
            event.sequence_nr(),
            kernels[event.correlation_id()] / 1000,
            event.is_async() or event.start_thread_id() != event.end_thread_id(),
        )
        for event in host
    ]


def _hidden(event: Any) -> bool:
    """Returns whether an event is a call of the driver, or hidden in newer versions of torch."""
    return event.linked_correlation_id() > 0 or getattr(event, "is_hidden_event", lambda: False)()


def mark_modules(objective: nn.Module) -> list[Any]:
    """Adds hooks that mark the parts of the forward pass, and returns them for `remove`.

    A second network is one part, including modules that it has in common with the first. Compiled blocks get no hooks,
    which would recompile them.
    """
    hooks = []
    compiled = any(isinstance(module, Encoder) and module.compiled for module in objective.modules())
    for name, module in objective.named_modules():
        mark = MODULES.get(type(module))
        if compiled and isinstance(module, Block | Attention | FeedForward):
            continue
        if name == "small":
            mark = "second network"
        elif name.startswith("small."):
            continue
        elif name.endswith("final_norm"):
            mark = MODULES[Block]
        if mark is not None:
            hooks += _mark(module, mark)
    return hooks


def _mark(module: nn.Module, name: str) -> list[Any]:
    opened: list[record_function] = []

    def before(*_: object) -> None:
        opened.append(record_function(name))
        opened[-1].__enter__()

    def after(*_: object) -> None:
        opened.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]


def profile_steps(trainer: Trainer, steps: int = COUNT, warm_up: int = 2) -> Profile:
    """Profiles the next steps of `trainer`, which change its weights, but not its progress."""
    trainer.objective.train()
    first = trainer.progress.step
    for step in range(first, first + warm_up):
        trainer.train_step(step)
    profiler = StepProfiler(trainer)
    profiler.start()
    try:
        for step in range(first + warm_up, first + warm_up + steps):
            with profiler.step():
                trainer.train_step(step)
    finally:
        profiler.stop()
    return profiler.found()


@contextmanager
def profiled(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Context manager: profiles a few steps of the trainer that runs inside it and writes `folder`."""
    start, pauses = trainer.progress.step, (trainer.eval_every, trainer.checkpoint_every)
    chosen = choose_steps(start, trainer.steps, pauses, trainer.milestones | trainer.exports)
    if not chosen:
        echo("--profile: there is no step left to profile")
        yield
        return
    if chosen.start - start < FIRST:
        echo(
            f"--profile: with {trainer.steps - start} steps left, only {chosen.start - start} warm-up steps come "
            f"before the {len(chosen)} profiled ones"
        )
    profiler = StepProfiler(trainer)
    trainer.around = _around(profiler, chosen, folder)
    try:
        yield
    finally:
        with suppress(RuntimeError):  # interrupted while profiling
            profiler.stop()


def choose_steps(start: int, stop: int, intervals: tuple[int, ...], marked: frozenset[int]) -> range:
    """Chooses the steps to profile among start ... stop - 1: the first COUNT consecutive steps after FIRST others,
    without a validation, checkpoint or export between them. If that is impossible, fewer steps are chosen, or steps
    after fewer others."""
    firsts = sorted(
        range(start, min(stop, start + FIRST + 1000)), key=lambda first: (-min(first, start + FIRST), first)
    )
    for count in range(COUNT, 0, -1):
        for first in firsts:
            between = range(first + 1, first + count)  # steps done before each of the others
            paused = any(done in marked or any(done % every == 0 for every in intervals) for done in between)
            if first + count <= stop and not paused:
                return range(first, first + count)
    return range(0)


def _around(profiler: StepProfiler, chosen: range, folder: Path) -> Callable[[int], Any]:
    """Function for `Trainer.around` that profiles the `chosen` steps and then writes `folder`."""
    trainer = profiler.trainer

    @contextmanager
    def around(step: int) -> Iterator[None]:
        if step not in chosen:
            yield
            return
        if step == chosen[0]:
            with trainer.paused():
                profiler.start()
        with profiler.step():
            yield
        if step == chosen[-1]:
            with trainer.paused():
                profiler.stop()
                _write(profiler, folder, f"Steps {chosen.start + 1} to {chosen.stop} of the run.")

    return around


def _write(profiler: StepProfiler, folder: Path, title: str) -> None:
    found = profiler.found()
    with atomic_folder(folder) as inside:
        (inside / "profile.md").write_text(found.document(title), encoding="utf-8")
        profiler.profile.export_chrome_trace(str(inside / "trace.json"))
        with open(inside / "trace.json", "rb") as plain, gzip.open(inside / "trace.json.gz", "wb", 5) as packed:
            shutil.copyfileobj(plain, packed, 2**20)
        (inside / "trace.json").unlink()
    echo(f"{title} {found.table()}\n\nwrote {folder}: trace.json.gz opens in https://ui.perfetto.dev")
