"""Builds the trainer of a run, from its start or its newest checkpoint, and the manifest of its experiment."""

from dataclasses import replace
from typing import Any

import torch

from fastbert import config as configuration
from fastbert.inputs import read_or_problem
from fastbert.pretraining.budget import checkpoint_size
from fastbert.pretraining.exports import check_exports, export_lines, export_steps, export_words
from fastbert.pretraining.finish import check_finish
from fastbert.pretraining.loop import STATE, Trainer
from fastbert.pretraining.run import (
    RunFolder,
    read_config,
    session,
)
from fastbert.pretraining.setup import PretrainSetup, data_fingerprint
from fastbert.records import check, write_json
from fastbert.streams import echo
from fastbert.training.checkpoints import Checkpointer, check_space
from fastbert.training.hardware import describe_machine, peak_flops
from fastbert.training.kernel_configurations import fix_kernels
from fastbert.training.logbook import Logbook
from fastbert.training.optimizers import implementation


def describe_experiment(setup: PretrainSetup, experiment: dict[str, Any]) -> dict[str, Any]:
    dataset = setup.dataset
    return {
        "experiment": configuration.digest(experiment),
        "science": experiment,
        "data": {"folder": str(dataset.folder), "fingerprint": data_fingerprint(dataset)},
        "encoder": setup.config.to_dict(),
        "sessions": [],
    }


def build_trainer(
    setup: PretrainSetup, run: RunFolder, manifest: dict[str, Any], resumed: bool, quiet: bool = False
) -> Trainer:
    """Builds the trainer, from the start or the newest checkpoint, and writes or updates the run's folder.

    Raises:
        UserError: too few sequences, too little space on the disk, or no complete checkpoint to resume from.
    """
    options = setup.options
    batches = setup.batches()
    milestones, exports = options.milestone_steps(), export_steps(setup)
    check_exports(run, exports)
    keep = (options.keep_checkpoints, echo, milestones)
    checkpointer = Checkpointer(run.checkpoints, *keep) if resumed else None
    checkpoint = checkpointer.load_latest() if checkpointer else None
    if checkpoint:
        check(checkpoint.state, STATE, f"the checkpoint's state {checkpoint.path / 'state.json'}")
    objective = setup.objective(initial=checkpoint is None)
    check_finish(setup, objective)
    models = len(options.word_counts()) * 4 * objective.parameter_count()
    check_space(run.path, (options.keep_checkpoints + len(milestones) + 3) * checkpoint_size(objective) + models)
    updater = setup.updater(objective)
    flops = batches.plan.total(objective.flops, 0, options.steps)
    if checkpointer is None:  # all checks have passed
        run.write(options, manifest, setup.dataset.tokenizer)
        checkpointer = Checkpointer(run.checkpoints, *keep)
    started = setup.started or options
    if resumed:
        if read_or_problem(read_config, run)[1]:  # reported before
            run.write_config(started)
        if problem := run.restore_tokenizer(setup.vocabulary):
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
    if kernels := fix_kernels(setup.device, manifest["sessions"]):
        resolved["kernels"] = kernels
    manifest["sessions"].append(session(step, before, describe_machine(), resolved))
    write_json(run.manifest, manifest)
    echo(
        f"{objective.parameter_count() / 1e6:.2f}M parameters ({options.objective}, {setup.config.position}), "
        f"{batches.plan.describe(options.steps)}, "
        f"{flops:.2e} FLOPs; {setup.device} {setup.precision}, peak {peak / 1e9:.0f} GFLOP/s ({how})"
    )
    sequences = batches.plan.tokens(0, options.steps) // options.length
    for line in setup.note_corpus.summary(sequences) if setup.note_corpus else ():
        echo(line)
    for line in () if quiet else export_lines(run, exports, step):
        echo(line)
    if resumed:
        echo(f"resuming {run.path} at step {step} of {options.steps}")
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
            quiet=quiet,
        ),
        validate=lambda length: setup.validate(objective, length),
        eval_every=options.eval_every,
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
        milestones=milestones,
        exports=frozenset(exports),
        export=lambda progress: export_words(setup, objective, run, progress, exports[progress.step]),
        peak_flops=peak,
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
