"""`fastbert finetune --together`: several tasks with one encoder in one training.

out/config.yaml            the options
out/seed-0/                metrics.jsonl, events.out.tfevents.*; until the seed is finished checkpoints/
out/<task>/                the output for each task as if it had been trained alone, see finetune.py
out/glue.md                the table
out/then-single/<task>/    with --then-single, a fine-tuning that starts from out/<task>
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastbert.config import digest
from fastbert.errors import UserError
from fastbert.files import locked_folder
from fastbert.finetuning.finetune import check_same_on_all_ranks, finetune, remove_checkpoints
from fastbert.finetuning.folder import check_other_files, check_results_folder, open_folder, write_options
from fastbert.finetuning.mixture_options import MixtureOptions
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.results import Company, finished, seed_folder, write_results
from fastbert.finetuning.seed import Part, Training, train_seed
from fastbert.finetuning.setup import (
    FinetuneSetup,
    check_schedule,
    describe_finetuning,
    open_encoder,
    prepare_finetuning,
)
from fastbert.finetuning.tasks import task_names
from fastbert.finetuning.tasks_folder import check_tasks_folder, each_task, write_table
from fastbert.outputs import check_output_folder
from fastbert.streams import echo
from fastbert.training.callbacks import Callback
from fastbert.training.interrupts import Interrupts
from fastbert.training.world import World

THEN_SINGLE = "then-single"


@dataclass(frozen=True)
class Together:
    """The tasks of a training, in alphabetical order, with common options but for texts and folders."""

    setups: Sequence[FinetuneSetup]
    weights: dict[str, float]
    requested: FinetuneOptions

    @property
    def target(self) -> str | None:
        return self.requested.mixture.target

    def describe(self, setup: FinetuneSetup) -> dict[str, Any]:
        """Everything that the results of one of the tasks depend on, by name."""
        mixture = self.requested.mixture
        return {
            **describe_finetuning(setup),
            "tasks": {other.task.name: digest(describe_finetuning(other)) for other in self.setups},
            "weights": self.weights,
            "temperature": mixture.temperature,
            "target": mixture.target,
        }

    def training(self, seed: int) -> Training:
        """The training of a seed."""
        parts = [
            Part(setup, seed_folder(Path(setup.options.out), 1.0, seed), weight=self.weights[setup.task.name])
            for setup in self.setups
        ]
        return Training(parts, self.requested.mixture.temperature, self.target)


def finetune_together(requested: FinetuneOptions, world: World, callbacks: Sequence[Callback] = ()) -> int:
    """Trains all seeds that are not finished, writes and prints the results of each task; returns the exit code.

    Raises:
        UserError: any user error, before training starts if possible.
    """
    out = Path(requested.out)
    world.first_decides(lambda: check_request(requested))
    tasks = world.first_before_others(lambda: prepare_together(requested, world))
    for warning in dict.fromkeys(warning for setup in tasks.setups for warning in setup.warnings):
        echo(warning)
    for name in (name for name, weight in tasks.weights.items() if not weight):
        echo(f"{name} has weight 0: it is not trained, and its results are those of a new head")
    described = [tasks.describe(setup) for setup in tasks.setups]
    check_same_on_all_ranks({"tasks": described}, world)
    world.connect(tasks.setups[0].device)
    results: list[list[dict[str, Any]]] = [[] for _ in tasks.setups]
    with locked_folder(out) if world.first else nullcontext(), Interrupts(world.size > 1) as interrupts:
        world.first_decides(lambda: open_folders(tasks, described))
        for seed in range(requested.first_seed, requested.first_seed + requested.seeds):
            training, folder = tasks.training(seed), seed_folder(out, 1.0, seed)
            found = world.first_decides(lambda training=training: stored_results(training))
            if found is None:
                found = train_seed(training, folder, seed, interrupts, callbacks)
            if found is None:
                echo(f"stopped; the same command continues with {folder}")
                return interrupts.exit_code
            world.first_decides(partial(remove_checkpoints, folder))
            for each, result in zip(results, found, strict=True):
                each.append(result)
        if world.first:
            for setup, each in zip(tasks.setups, results, strict=True):
                folder = Path(setup.options.out)
                others = [other.task.name for other in tasks.setups if other is not setup]
                found = ({1.0: each}, setup.labels, setup.slices, Company(others, tasks.target))
                write_results(setup.options, setup.task, setup.precision, folder, *found)
            write_table(requested, [setup.options for setup in tasks.setups])
    return train_alone(tasks, world) if requested.mixture.then_single else 0


def check_request(requested: FinetuneOptions) -> None:
    """Raises a UserError if model, tasks or --out cannot be used."""
    requested.check_inputs()
    check_tasks_folder(requested)


def prepare_together(requested: FinetuneOptions, world: World) -> Together:
    """Opens machine, model and all tasks, and checks everything that can be checked before training.

    Raises:
        UserError: lists every task that cannot be trained and why.
    """
    names = task_names(requested.task) or [requested.task]
    encoder = open_encoder(requested)
    setups: dict[str, FinetuneSetup] = {}

    def check(options: FinetuneOptions) -> None:
        setup = prepare_finetuning(options, world, encoder, alone=requested.mixture.then_single)
        if requested.mixture.then_single:
            single = Path(requested.out) / THEN_SINGLE / setup.task.name
            check_output_folder(single)
            check_other_files(single)
        setups[setup.task.name] = setup

    each_task(requested, names, check)
    for name in setups:
        if name == THEN_SINGLE or name.startswith("seed-"):
            raise UserError(f"a task is called {name}, which is the name of another folder in --out; rename it")
    setups = dict(sorted(setups.items()))
    weights = requested.mixture.task_weights(setups)
    target = requested.mixture.target
    counted = [setup.options for name, setup in setups.items() if name == (target or name)]
    common = {
        "learning_rate": min(options.learning_rate for options in counted),
        "epochs": min(options.epochs for options in counted),
        "mixture": requested.mixture,
    }
    setups = {name: replace(setup, options=replace(setup.options, **common)) for name, setup in setups.items()}
    check_schedule([setup for name, setup in setups.items() if weights[name]])
    tasks = Together(list(setups.values()), weights, requested)
    for setup in tasks.setups:
        if Path(setup.options.out).is_dir():
            check_results_folder(Path(setup.options.out), setup, tasks.describe(setup))
    return tasks


def open_folders(tasks: Together, described: Sequence[dict[str, Any]]) -> None:
    """Writes options and manifests."""
    write_options(Path(tasks.requested.out), tasks.requested)
    for setup, experiment in zip(tasks.setups, described, strict=True):
        folder = Path(setup.options.out)
        folder.mkdir(parents=True, exist_ok=True)
        open_folder(folder, setup, experiment)


def stored_results(training: Training) -> list[dict[str, Any]] | None:
    """The result of each task of a seed; None if one is missing."""
    found = [finished(part.folder, part.setup.task.metrics) for part in training.parts]
    return None if None in found else found


def train_alone(tasks: Together, world: World) -> int:
    """Fine-tunes each task, or the target, from the shared encoder of the same seed; returns the exit code."""
    requested = tasks.requested
    seeds = range(requested.first_seed, requested.first_seed + requested.seeds)
    for setup in tasks.setups:
        if setup.task.name != (tasks.target or setup.task.name):
            continue
        shared = Path(setup.options.out)
        given = {name: getattr(requested, name) for name in ("learning_rate", "epochs", "max_length")}
        options = replace(
            setup.options,
            **given,
            mixture=MixtureOptions(),
            out=str(Path(requested.out) / THEN_SINGLE / setup.task.name),
        )
        echo(f"{setup.task.name} alone, from the shared encoder")
        names = " and ".join(each.task.name for each in tasks.setups)
        after = [f"{names} together"] if len(tasks.setups) > 1 else [names]
        code = finetune(options, world, {seed: seed_folder(shared, 1.0, seed) for seed in seeds}, after)
        if code:
            return code
    return 0
