"""Builds the trainer of a run, from its start or its newest checkpoint, and the manifest of its experiment."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastbert import config as configuration
from fastbert.errors import UserError
from fastbert.inputs import read_or_problem
from fastbert.objectives.objective import Objective
from fastbert.pretraining.budget import checkpoint_size
from fastbert.pretraining.exports import check_exports, export_lines, export_steps, export_words
from fastbert.pretraining.finish import check_finish
from fastbert.pretraining.initial import keep_moments
from fastbert.pretraining.loop import STATE, Progress, Trainer, load_weights
from fastbert.pretraining.other_data import replay_lines
from fastbert.pretraining.run import (
    RunFolder,
    begins_with,
    read_config,
    session,
)
from fastbert.pretraining.setup import PretrainSetup
from fastbert.records import check, write_json
from fastbert.streams import echo
from fastbert.training.callbacks import Callback
from fastbert.training.checkpoints import Checkpointer, check_space, on_all_ranks
from fastbert.training.hardware import describe_machine, peak_flops
from fastbert.training.kernel_configurations import fix_kernels
from fastbert.training.logbook import Logbook, NoLogbook
from fastbert.training.optimizers import implementation
from fastbert.training.schedules import phase_lines
from fastbert.training.splits import OLD
from fastbert.training.world import ONE_PROCESS


def describe_experiment(setup: PretrainSetup, experiment: dict[str, Any]) -> dict[str, Any]:
    dataset = setup.dataset
    return {
        "experiment": configuration.digest(experiment),
        "science": experiment,
        "data": {"folder": str(dataset.folder), "fingerprint": setup.fingerprint},
        **({"replay": {"folder": str(setup.others[OLD].folder)}} if OLD in setup.others else {}),
        "encoder": setup.config.to_dict(),
        "sessions": [],
    }


def build_trainer(
    setup: PretrainSetup,
    run: RunFolder,
    manifest: dict[str, Any],
    resumed: bool,
    quiet: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Trainer:
    """Builds the trainer, from the start or the newest checkpoint, and writes or updates the run's folder. Of several
    ranks, only the first reads and writes files of the run.

    Raises:
        UserError: too few sequences, too little space on the disk, or no complete checkpoint to resume from.
    """
    options, world = setup.options, setup.world
    batches = setup.batches()
    milestones, exports = options.marked_steps(options.steps), export_steps(setup)
    if world.first:
        check_exports(run, exports)
    keep = (options.keep_checkpoints, echo, milestones)
    checkpointer = Checkpointer(run.checkpoints, *keep) if resumed and world.first else None
    checkpoint = checkpointer.load_latest() if checkpointer else None
    if checkpoint:
        check(checkpoint.state, STATE, f"the checkpoint's state {checkpoint.path / 'state.json'}")
        found = checkpoint.state["science"]
        if found != manifest["science"] and not begins_with(manifest, checkpoint.step, found):
            raise UserError(
                f"{checkpoint.path} is of another experiment than this command: another process has trained the run in "
                "the meantime, or newer checkpoints are damaged; give the command again, or restore them"
            )
    checkpoint = on_all_ranks(world, checkpoint)
    objective = setup.objective(initial=checkpoint is None)
    if world.first:
        check_finish(setup, objective)
        models = len(options.word_counts()) * 4 * objective.parameter_count()
        check_space(run.path, (options.keep_checkpoints + len(milestones) + 3) * checkpoint_size(objective) + models)
    if checkpoint:
        load_weights(objective, checkpoint)
    updater = setup.updater(objective)
    if checkpoint is None and options.init_from is not None and options.optimizer.keep:
        keep_moments(updater.optimizer, objective, options, setup.vocabulary, world)
    flops = batches.plan.total(objective.flops, 0, options.steps)
    if checkpointer is None and world.first:  # all checks have passed
        run.write(options, manifest, setup.dataset.tokenizer)
        checkpointer = Checkpointer(run.checkpoints, *keep)
    started = setup.started or options
    if resumed and world.first and (problem := run.restore_tokenizer(setup.vocabulary)):
        echo(problem)
    step = checkpoint.step if checkpoint else 0
    before = checkpoint.state["progress"]["seconds"] if checkpoint else 0.0
    peak, how = peak_flops(setup.device, setup.precision)
    speed = {
        "flops_per_step": flops / options.steps,
        "peak_flops": peak,
        "peak_from": how,
    }
    resolved = {"device": str(setup.device), "precision": setup.precision, "threads": torch.get_num_threads(), **speed}
    resolved["optimizer"] = implementation(type(updater.optimizer))
    if world.size > 1:
        resolved["processes"] = {"count": world.size, "shard": options.machine.shard}
    if kernels := fix_kernels(setup.device, manifest["sessions"]):
        resolved["kernels"] = kernels
    manifest["sessions"].append(session(step, before, describe_machine(), resolved))
    if world.first:
        write_json(run.manifest, manifest)
        # After the manifest, which records that a run is lengthened: see `lengthening`.
        if resumed and read_or_problem(read_config, run)[0] != started:  # a damaged file was reported before
            run.write_config(started)
    echo(
        f"{objective.parameter_count() / 1e6:.2f}M parameters ({options.objective}, {setup.config.position}), "
        f"{batches.plan.describe(options.steps)}, "
        f"{flops:.2e} FLOPs; {shown_devices(setup)} {setup.precision}, peak {peak / 1e9:.0f} GFLOP/s "
        f"{'each ' if world.size > 1 else ''}({how})"
    )
    for line in (*phase_lines(options.schedule, options.steps), *replay_lines(options, batches)):
        echo(line)
    sequences = batches.plan.tokens(0, options.steps) // options.length
    for line in setup.note_corpus.summary(sequences) if setup.note_corpus else ():
        echo(line)
    for line in () if quiet else export_lines(run, exports, step):
        echo(line)
    if resumed:
        echo(f"resuming {run.path} at step {step} of {options.steps}")

    def export(progress: Progress) -> None:
        whole = whole_on_first(setup, objective)
        world.first_decides(lambda: export_words(setup, whole, run, progress, exports[progress.step]))

    trainer = Trainer(
        updater=updater,
        batches=batches,
        steps=options.steps,
        seed=options.seed,
        learning_rate=options.optimizer.learning_rate,
        schedule=options.schedule,
        checkpointer=checkpointer,
        logbook=Logbook(
            run.path,
            options.steps,
            start_step=step,
            expected=checkpoint.state["metrics"] if checkpoint else None,
            options=manifest["science"],
            callbacks=callbacks,
            quiet=quiet,
        )
        if world.first
        else NoLogbook(),
        validate=lambda length: setup.validate(objective, length),
        best_by=options.best_by,
        validated_first=options.validated_first,
        eval_every=options.eval_every,
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
        milestones=milestones,
        exports=frozenset(exports),
        export=export,
        peak_flops=peak * world.size,
        state={
            "encoder": setup.config.to_dict(),
            "objective": options.objective,
            "tokenizer": setup.dataset.fingerprint,
            "science": manifest["science"],
            "options": configuration.to_dict(replace(started, out=None)),
        },
    )
    if checkpoint:
        trainer.restore(checkpoint)
    return trainer


def shown_devices(setup: PretrainSetup) -> str:
    """The devices, such as "cpu" or "4 x cuda, sharded"."""
    world = setup.world
    if world.size == 1:
        return str(setup.device)
    return f"{world.size} x {setup.device.type}{', sharded,' if world.sharded else ''}"


def whole_on_first(setup: PretrainSetup, objective: Objective) -> Objective | None:
    """The objective on the first rank, None on the others. If weights are sharded, it is a copy with whole weights, on
    the CPU."""
    world = setup.world
    if not world.sharded:
        return objective if world.first else None
    weights = world.full_on_first({"model": objective.state_dict(keep_vars=True)})
    if weights is None:
        return None
    whole = replace(setup, world=ONE_PROCESS, device=torch.device("cpu")).objective(initial=False)
    whole.load_state_dict(weights["model"])
    return whole
