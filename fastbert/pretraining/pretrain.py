"""`fastbert pretrain`: from options to a run folder with a trained encoder, its curves and its export."""

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastbert import config as configuration
from fastbert.errors import UserError
from fastbert.files import locked_folder, refuse_link
from fastbert.model.config import EncoderConfig
from fastbert.pretraining.budget import check_steps, resolve_steps
from fastbert.pretraining.build import build_trainer, describe_experiment, whole_on_first
from fastbert.pretraining.dry_run import dry_run
from fastbert.pretraining.finish import finish
from fastbert.pretraining.options import SINGLE_CALL_OPTIONS, PretrainOptions, science
from fastbert.pretraining.profiling import check_room, profiled
from fastbert.pretraining.run import (
    RunFolder,
    check_against_checkpoint,
    check_same_experiment,
    merge,
    new_folder,
    stored_options,
)
from fastbert.pretraining.setup import PretrainSetup, prepare_setup
from fastbert.streams import echo, warn
from fastbert.training.checkpoints import read_newest
from fastbert.training.interrupts import Interrupts
from fastbert.training.launch import join, restarts, resume_command
from fastbert.training.schedules import learning_rate_factor
from fastbert.training.world import World


def pretrain(given: PretrainOptions, name: str) -> int:
    """Starts or resumes a run, named `name` if --out is not given; returns the exit code.

    Under torchrun, every process calls this function.

    Raises:
        UserError: any user error, if possible before training starts.
    """
    with join(given.machine.timeout, given.machine.shard) as world:
        if world.size == 1:
            check_one_process(given)
        elif given.dry_run:
            raise UserError("--dry-run measures one process; start it without torchrun")
        if world.first_decides(lambda: given.resume or continues(given, world)):
            return resume(given, world)
        return start_run(given, name, world)


def check_one_process(given: PretrainOptions) -> None:
    """Refuses options that need several processes; prints how to use all GPUs if there are several."""
    if given.machine.shard != "none":
        raise UserError(
            "--machine.shard divides the weights between several processes; start them with torchrun or --launch ray, "
            "or give --machine.shard none"
        )
    if given.machine.device == "auto" and (gpus := torch.cuda.device_count()) > 1:
        echo(f"uses one of {gpus} GPUs; all of them: torchrun --nproc-per-node {gpus} -m fastbert pretrain ...")


def continues(given: PretrainOptions, world: World) -> bool:
    """Returns whether the processes were restarted after a failure (torchrun --max-restarts) in which the run had
    started.

    Raises:
        UserError: they may be restarted, and would not find their run.
    """
    if given.out is None and restarts(os.environ):
        raise UserError("torchrun --max-restarts needs --out, so that restarted processes find their run")
    return world.restarted and RunFolder(Path(given.out)).exists()


def start_run(given: PretrainOptions, name: str, world: World) -> int:
    """Starts a run."""

    def new_path() -> str:
        given.check_inputs()
        run = new_folder(given.out, name)
        check_steps(given)
        return str(run.path)

    run = RunFolder(Path(world.first_decides(new_path)))
    options = replace(given, **SINGLE_CALL_OPTIONS, out=str(run.path))
    setup = world.first_before_others(lambda: prepare_setup(options, verify_data=given.verify_data, world=world))
    connect(setup)
    setup.options = resolve_steps(setup)
    setup.plan()  # refuses a batch that grows for longer than the run
    learning_rate_factor(setup.options.schedule, 0, setup.options.steps)  # refuses a warm-up longer than the run
    manifest = describe_experiment(setup, science(setup.options, setup.fingerprint))
    if given.dry_run:
        return show_dry_run(setup, run, manifest, resumed=False)
    return train(setup, run, manifest, resumed=False, profile=given.profile)


def connect(setup: PretrainSetup) -> None:
    """Connects the ranks, once the data is prepared.

    Raises:
        UserError: the data of this rank differs from that of the first one.
    """
    fingerprint = setup.fingerprint
    if fingerprint != setup.world.first_decides(lambda: fingerprint):
        raise UserError(
            f"the data in {setup.dataset.folder} differs from that of the first process; prepare it once, in a folder "
            "common to all machines"
        )
    if setup.options.batch_size < setup.world.size:
        warn(
            f"a batch of {setup.options.batch_size} is divided between {setup.world.size} processes, which leaves "
            "processes idle; give a larger --batch-size, or start fewer processes"
        )
    setup.world.connect(setup.device)


def resume(given: PretrainOptions, world: World) -> int:
    """Resumes the run in `given.out`, if `given` is the same experiment. The newest checkpoint defines the run; the
    other files are compared with it."""
    setup, run, manifest = world.first_before_others(lambda: resumed_setup(given, world))
    connect(setup)
    manifest = world.first_decides(lambda: manifest)
    if given.dry_run:
        return show_dry_run(setup, run, manifest, resumed=True)
    return train(setup, run, manifest, resumed=True, profile=given.profile)


def resumed_setup(given: PretrainOptions, world: World) -> tuple[PretrainSetup, RunFolder, dict[str, Any]]:
    """Setup, folder and manifest of the run to resume."""
    stored = stored_options(given.out)
    run = RunFolder(Path(given.out))
    sealed = run.sealed()
    manifest, remarks = check_against_checkpoint(run, stored, sealed)
    options, changed_options = merge(stored, given)
    folder = manifest["data"]["folder"] if manifest else ""
    if options.data == stored.data and folder and Path(folder).is_dir():
        options = replace(options, data=folder)  # the source itself may be gone by now
    folder = manifest["replay"]["folder"] if manifest and "replay" in manifest else ""
    if options.replay.data == stored.replay.data and folder and Path(folder).is_dir():
        options = replace(options, replay=replace(options.replay, data=folder))
    # Without a checkpoint the encoder is what it was at the start: it follows from the options and the data.
    config = EncoderConfig.from_dict(sealed.state["encoder"]) if sealed else None
    setup = prepare_setup(options, config, given.verify_data, world)
    setup.started = stored
    fingerprint = setup.fingerprint
    found = describe_experiment(setup, science(setup.options, fingerprint))
    if manifest is not None:
        check_same_experiment(run, manifest["science"], found["science"], science(stored, fingerprint))
        if changed := configuration.differences(found["encoder"], manifest["encoder"]):
            remarks.append(
                f"the encoder in {run.manifest} differs from that of the run's options: {'; '.join(changed)}"
            )
        found = manifest | {name: found[name] for name in ("data", "replay", "encoder") if name in found}
    for line in (*remarks, *(f"resumed with another {line}" for line in changed_options)):
        echo(line)
    return setup, run, found


def show_dry_run(setup: PretrainSetup, run: RunFolder, manifest: dict[str, Any], resumed: bool) -> int:
    """Prints the cost of `train`, from the newest checkpoint if the run is `resumed`; returns the exit code."""
    newest = read_newest(run.checkpoints, echo) if resumed else None
    if newest is not None:
        setup.options = replace(setup.options, init_from=None)  # speed does not depend on the weights
    return dry_run(
        setup,
        run,
        newest.step if newest else 0,
        lambda folder: build_trainer(setup, RunFolder(folder), manifest, resumed=False, quiet=True),
    )


def train(setup: PretrainSetup, run: RunFolder, manifest: dict[str, Any], resumed: bool, profile: bool) -> int:
    """Builds the trainer, trains, and writes export, curves and summary; returns the exit code."""
    first = setup.world.first
    if profile and first:
        check_room(run.profile, setup)
    with locked_folder(run.path) if first else nullcontext():
        if first:
            if not resumed and run.exists():
                raise UserError(f"another process has started a run in {run.path}; choose another --out")
            for written_last in (run.model, run.report):
                refuse_link(written_last)
        trainer = build_trainer(setup, run, manifest, resumed)
        profiling = profiled(trainer, run.profile) if profile and first else nullcontext()
        with Interrupts(setup.world.size > 1) as interrupts, trainer.logbook, profiling:
            trainer.run(interrupts)
        if trainer.progress.step < trainer.steps:
            echo(
                f"stopped at step {trainer.progress.step} of {trainer.steps}; "
                f"resume with: {resume_command(os.environ, str(run.path))}"
            )
            return interrupts.exit_code
        whole = whole_on_first(setup, trainer.objective)
        if first:
            finish(setup, whole, run, trainer.progress)
    return 0
