"""`fastbert pretrain`: from options to a run folder with a trained encoder, its curves and its export."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastbert import config as configuration
from fastbert.errors import UserError
from fastbert.files import locked_folder, refuse_link
from fastbert.inputs import read_or_problem
from fastbert.model.config import EncoderConfig
from fastbert.pretraining.branch import branch, branch_options, find_branch, lengthening, verified
from fastbert.pretraining.budget import check_steps, resolve_steps
from fastbert.pretraining.build import build_trainer, describe_experiment, whole_on_first
from fastbert.pretraining.dry_run import dry_run
from fastbert.pretraining.finish import finish
from fastbert.pretraining.options import BRANCH, SINGLE_CALL_OPTIONS, PretrainOptions, science
from fastbert.pretraining.profiling import check_room, profiled
from fastbert.pretraining.run import (
    MANIFEST,
    RunFolder,
    Sealed,
    check_against_checkpoint,
    check_same_experiment,
    merge,
    new_folder,
    read_sealed,
    stored_options,
)
from fastbert.pretraining.setup import PretrainSetup, prepare_setup
from fastbert.records import read_json
from fastbert.streams import echo, warn
from fastbert.training.callbacks import Callback
from fastbert.training.checkpoints import read_newest
from fastbert.training.interrupts import Interrupts
from fastbert.training.launch import join, restarts, resume_command
from fastbert.training.schedules import learning_rate_factor
from fastbert.training.trackers import check_tracker, trackers
from fastbert.training.world import World


def pretrain(given: PretrainOptions, name: str, callbacks: Sequence[Callback] = ()) -> int:
    """Starts or resumes a run, named `name` if --out is not given; returns the exit code.

    Under torchrun, every process calls this function.

    Raises:
        UserError: any user error, if possible before training starts.
    """
    check_tracker(given.track)
    with join(given.machine.timeout, given.machine.shard) as world:
        if world.size == 1:
            check_one_process(given)
        elif given.dry_run:
            raise UserError("--dry-run measures one process; start it without torchrun")
        if world.first_decides(lambda: given.resume or continues(given, world)):
            return resume(given, world, callbacks)
        if given.branch is not None:
            return start_branch(given, name, world, callbacks)
        return start_run(given, name, world, callbacks)


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


def start_run(given: PretrainOptions, name: str, world: World, callbacks: Sequence[Callback]) -> int:
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
        return show_dry_run(setup, run, manifest)
    return train(setup, run, manifest, resumed=False, profile=given.profile, callbacks=callbacks)


def start_branch(given: PretrainOptions, name: str, world: World, callbacks: Sequence[Callback]) -> int:
    """Starts a run that begins with a checkpoint of another run (--branch)."""

    def choose() -> dict[str, Any]:
        source = verified(find_branch(given.branch))
        branch_options(given, source)
        return {"out": str(new_folder(given.out, name).path), "path": str(source.path)}

    chosen = world.first_decides(choose)
    run, source = RunFolder(Path(chosen["out"])), read_sealed(Path(chosen["path"]))
    written = replace(branch_options(given, source), out=str(run.path))
    setup = world.first_before_others(lambda: branched_setup(written, source, given.verify_data, world))
    connect(setup)
    manifest = describe_experiment(setup, science(setup.options, setup.fingerprint))
    if given.dry_run:
        return show_dry_run(setup, run, manifest, source.step)
    found = world.first_decides(lambda: branch(source.run.path, source.step, written, run.path))
    manifest = found | {name: manifest[name] for name in ("data", "replay", "encoder") if name in manifest}
    return train(setup, run, manifest, resumed=True, profile=given.profile, callbacks=callbacks)


def branched_setup(options: PretrainOptions, source: Sealed, verify_data: bool, world: World) -> PretrainSetup:
    """Setup of a run with `options` that begins with the checkpoint `source`."""
    manifest, _ = read_or_problem(read_json, source.run.manifest, "the run's manifest", MANIFEST)
    config = EncoderConfig.from_dict(source.state["encoder"])
    prepared = with_prepared(options, manifest, source.options(str(source.run.path)))
    setup = prepare_setup(prepared, config, verify_data, world)
    setup.started = options
    if setup.fingerprint != source.state["science"].get("data"):
        raise UserError(
            f"the data in {setup.dataset.folder} differs from that of {source.run.path}; leave --data out, or, if its "
            "folder was moved, give the new path"
        )
    return setup


def with_prepared(
    options: PretrainOptions, manifest: dict[str, Any] | None, stored: PretrainOptions
) -> PretrainOptions:
    """`options` with the prepared folders of the run where data and old data are those in `stored`: the sources
    themselves may be gone by now."""

    def folder(entry: str, given: str | None, before: str | None) -> str | None:
        found = (manifest or {}).get(entry, {}).get("folder", "")
        return found if given is not None and given == before and found and Path(found).is_dir() else given

    old = folder("replay", options.replay.data, stored.replay.data)
    data = folder("data", options.data, stored.data)
    return replace(options, data=data, replay=replace(options.replay, data=old))


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


def resume(given: PretrainOptions, world: World, callbacks: Sequence[Callback]) -> int:
    """Resumes the run in `given.out`, if `given` is the same experiment. The newest checkpoint defines the run; the
    other files are compared with it."""
    setup, run, manifest = world.first_before_others(lambda: resumed_setup(given, world))
    connect(setup)
    manifest = world.first_decides(lambda: manifest)
    if given.dry_run:
        newest = read_newest(run.checkpoints, echo)
        return show_dry_run(setup, run, manifest, newest.step if newest else 0)
    return train(setup, run, manifest, resumed=True, profile=given.profile, callbacks=callbacks)


def resumed_setup(given: PretrainOptions, world: World) -> tuple[PretrainSetup, RunFolder, dict[str, Any]]:
    """Setup, folder and manifest of the run to resume."""
    stored = stored_options(given.out)
    run = RunFolder(Path(given.out))
    sealed = run.sealed()
    manifest, remarks = check_against_checkpoint(run, stored, sealed)
    if given.branch is not None:  # a branch whose processes were restarted
        names = ("steps", "schedule", "stages", "milestones", "tokens", "minutes")
        given = replace(given, **BRANCH, **{name: getattr(stored, name) for name in names})
    options, changed_options = merge(stored, given)
    before = stored.steps
    stored, options, manifest, not_lengthened = lengthening(run, manifest, sealed, stored, options)
    if stored.steps > before:
        remarks.append(f"lengthened from {before} to {stored.steps} steps")
    options = with_prepared(options, manifest, stored)
    # Without a checkpoint the encoder is what it was at the start: it follows from the options and the data.
    config = EncoderConfig.from_dict(sealed.state["encoder"]) if sealed else None
    setup = prepare_setup(options, config, given.verify_data, world)
    setup.started = stored
    fingerprint = setup.fingerprint
    found = describe_experiment(setup, science(setup.options, fingerprint))
    if manifest is not None:
        expected = manifest["science"], found["science"], science(stored, fingerprint)
        check_same_experiment(run, *expected, not_lengthened)
        if changed := configuration.differences(found["encoder"], manifest["encoder"]):
            remarks.append(
                f"the encoder in {run.manifest} differs from that of the run's options: {'; '.join(changed)}"
            )
        found = manifest | {name: found[name] for name in ("data", "replay", "encoder") if name in found}
    for line in (*remarks, *(f"resumed with another {line}" for line in changed_options)):
        echo(line)
    return setup, run, found


def show_dry_run(setup: PretrainSetup, run: RunFolder, manifest: dict[str, Any], done: int = 0) -> int:
    """Prints the cost of `train` after `done` steps; returns the exit code."""
    if done:
        setup.options = replace(setup.options, init_from=None)  # speed does not depend on the weights
    return dry_run(
        setup, run, done, lambda folder: build_trainer(setup, RunFolder(folder), manifest, resumed=False, quiet=True)
    )


def train(
    setup: PretrainSetup,
    run: RunFolder,
    manifest: dict[str, Any],
    resumed: bool,
    profile: bool,
    callbacks: Sequence[Callback],
) -> int:
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
        followers = [*trackers(setup.options.track), *callbacks]
        trainer = build_trainer(setup, run, manifest, resumed, callbacks=followers)
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
