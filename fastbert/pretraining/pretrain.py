"""`fastbert pretrain`: from options to a run folder with a trained encoder, its curves and its export."""

import shlex
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbert import config as configuration
from fastbert.errors import UserError
from fastbert.files import locked_folder, refuse_link
from fastbert.model.config import EncoderConfig
from fastbert.pretraining.budget import check_steps, resolve_steps
from fastbert.pretraining.build import build_trainer, describe_experiment
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
from fastbert.pretraining.setup import PretrainSetup, data_fingerprint, prepare_setup
from fastbert.streams import echo
from fastbert.training.checkpoints import read_newest
from fastbert.training.interrupts import Interrupts
from fastbert.training.schedules import learning_rate_factor


def pretrain(given: PretrainOptions, name: str) -> int:
    """Starts or resumes a run, named `name` if --out is not given; returns the exit code.

    Raises:
        UserError: any user error, if possible before training starts.
    """
    if given.resume:
        return resume(given)
    given.check_inputs()
    run = new_folder(given.out, name)
    check_steps(given)
    setup = prepare_setup(replace(given, **SINGLE_CALL_OPTIONS, out=str(run.path)), verify_data=given.verify_data)
    setup.options = resolve_steps(setup)
    setup.plan()  # refuses a batch that grows for longer than the run
    learning_rate_factor(setup.options.schedule, 0, setup.options.steps)  # refuses a warm-up longer than the run
    manifest = describe_experiment(setup, science(setup.options, data_fingerprint(setup.dataset)))
    if given.dry_run:
        return show_dry_run(setup, run, manifest, resumed=False)
    return train(setup, run, manifest, resumed=False, profile=given.profile)


def resume(given: PretrainOptions) -> int:
    """Resumes the run in `given.out`, if `given` is the same experiment. The newest checkpoint defines the run; the
    other files are compared with it."""
    stored = stored_options(given.out)
    run = RunFolder(Path(given.out))
    sealed = run.sealed()
    manifest, remarks = check_against_checkpoint(run, stored, sealed)
    options, changed_options = merge(stored, given)
    folder = manifest["data"]["folder"] if manifest else ""
    if options.data == stored.data and folder and Path(folder).is_dir():
        options = replace(options, data=folder)  # the source itself may be gone by now
    # Without a checkpoint the encoder is what it was at the start: it follows from the options and the data.
    config = EncoderConfig.from_dict(sealed.state["encoder"]) if sealed else None
    setup = prepare_setup(options, config, given.verify_data)
    setup.started = stored
    fingerprint = data_fingerprint(setup.dataset)
    found = describe_experiment(setup, science(setup.options, fingerprint))
    if manifest is not None:
        check_same_experiment(run, manifest["science"], found["science"], science(stored, fingerprint))
        if changed := configuration.differences(found["encoder"], manifest["encoder"]):
            remarks.append(
                f"the encoder in {run.manifest} differs from that of the run's options: {'; '.join(changed)}"
            )
        found = manifest | {name: found[name] for name in ("data", "encoder")}
    for line in (*remarks, *(f"resumed with another {line}" for line in changed_options)):
        echo(line)
    if given.dry_run:
        return show_dry_run(setup, run, found, resumed=True)
    return train(setup, run, found, resumed=True, profile=given.profile)


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
    if profile:
        check_room(run.profile, setup)
    with locked_folder(run.path):
        if not resumed and run.exists():
            raise UserError(f"another process has started a run in {run.path}; choose another --out")
        for written_last in (run.model, run.report):
            refuse_link(written_last)
        trainer = build_trainer(setup, run, manifest, resumed)
        profiling = profiled(trainer, run.profile) if profile else nullcontext()
        with trainer.logbook, Interrupts() as interrupts, profiling:
            trainer.run(interrupts)
        if trainer.progress.step < trainer.steps:
            echo(
                f"stopped at step {trainer.progress.step} of {trainer.steps}; "
                f"resume with: fastbert pretrain --resume {shlex.quote(str(run.path))}"
            )
            return interrupts.exit_code
        finish(setup, trainer.objective, run, trainer.progress)
    return 0
