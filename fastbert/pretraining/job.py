"""`fastbert pretrain`: from options to a run folder with a trained encoder, its curves and its export."""

import itertools
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbert import config as configuration
from fastbert.data.stages import NOMINAL_STEPS, Plan, make_plan, steps_within
from fastbert.errors import UserError
from fastbert.files import locked_folder, refuse_link
from fastbert.inputs import UnreadableError
from fastbert.model.config import EncoderConfig
from fastbert.pretraining.budget import Costs, intervals, shown_spans, shown_time, timing_window
from fastbert.pretraining.dry_run import dry_run
from fastbert.pretraining.finish import finish
from fastbert.pretraining.loop import STATE, Trainer
from fastbert.pretraining.options import OF_ONE_CALL, PretrainOptions, science
from fastbert.pretraining.profiling import check_room, profiled
from fastbert.pretraining.run import (
    RunFolder,
    check_against_checkpoint,
    check_same_experiment,
    merge,
    new_folder,
    read_config,
    session,
    stored_options,
)
from fastbert.pretraining.setup import Setup, data_fingerprint, prepare_setup
from fastbert.records import check, write_json
from fastbert.streams import say
from fastbert.training.checkpoints import Checkpointer, check_space, existing, read_newest
from fastbert.training.hardware import describe_machine, peak_flops
from fastbert.training.interrupts import Interrupts
from fastbert.training.kernels import fix_kernels
from fastbert.training.lagged import LaggedScalars
from fastbert.training.logbook import Logbook
from fastbert.training.optimizers import implementation
from fastbert.training.schedules import learning_rate_factor
from fastbert.training.step import objective_step
from fastbert.training.timing import Timed, repeat_in, time_in_groups, writing_seconds

LEAST_TIMED, MOST_TIMED = 4, 2000  # steps


def pretrain(asked: PretrainOptions, name: str) -> int:
    """Runs or resumes a pretraining; returns the exit code.

    Args:
        asked: the options.
        name: of the run, where --out is not given.

    Raises:
        UserError: anything the user can mend, before training starts if it can be seen then.
    """
    if asked.resume:
        return resume(asked)
    asked.check_inputs()
    run = new_folder(asked.out, name)
    check_steps(asked)
    setup = prepare_setup(replace(asked, **OF_ONE_CALL, out=str(run.path)), verify_data=asked.verify_data)
    setup.options = resolve_steps(setup)
    setup.plan()  # refuses a batch that grows for longer than the run
    learning_rate_factor(setup.options.schedule, 0, setup.options.steps)  # refuses a warm-up longer than the run
    manifest = describe_experiment(setup, science(setup.options, data_fingerprint(setup.dataset)))
    if asked.dry_run:
        return rehearse(setup, run, manifest, resumed=False)
    return train(setup, run, manifest, resumed=False, profile=asked.profile)


def resume(asked: PretrainOptions) -> int:
    """Resumes the run in `asked.out`, if `asked` is the same experiment. What the run is, its newest checkpoint says;
    its other files are compared with that."""
    stored = stored_options(asked.out)
    run = RunFolder(Path(asked.out))
    sealed = run.sealed()
    manifest, remarks = check_against_checkpoint(run, stored, sealed)
    options, notes = merge(stored, asked)
    folder = manifest["data"]["folder"] if manifest else ""
    if options.data == stored.data and folder and Path(folder).is_dir():
        options = replace(options, data=folder)  # the source itself may be gone by now
    # Without a checkpoint the encoder is what it was at the start: it follows from the options and the data.
    config = EncoderConfig.from_dict(sealed.state["encoder"]) if sealed else None
    setup = prepare_setup(options, config, asked.verify_data)
    setup.started = stored
    fingerprint = data_fingerprint(setup.dataset)
    found = describe_experiment(setup, science(setup.options, fingerprint))
    if manifest is not None:
        check_same_experiment(run, manifest["science"], found["science"], science(stored, fingerprint))
        if changed := configuration.differences(found["encoder"], manifest["encoder"]):
            remarks.append(f"the encoder in {run.manifest} is not that of the run's options: {'; '.join(changed)}")
        found = manifest | {name: found[name] for name in ("data", "encoder")}
    for line in (*remarks, *(f"resumed with another {line}" for line in notes)):
        say(line)
    if asked.dry_run:
        return rehearse(setup, run, found, resumed=True)
    return train(setup, run, found, resumed=True, profile=asked.profile)


def check_steps(options: PretrainOptions) -> None:
    """Refuses, before data is prepared, stages and a schedule that do not fit the number of steps."""
    steps = steps_of(options)
    if steps is not None:
        replace(options, steps=steps).milestone_steps()
        make_plan(options.stages, options.batch_size, options.length, steps)
        learning_rate_factor(options.schedule, 0, steps)


def steps_of(options: PretrainOptions) -> int | None:
    """The number of steps; None for a budget in minutes."""
    if options.tokens is None:
        return options.steps

    def tokens(steps: int) -> int:
        return make_plan(options.stages, options.batch_size, options.length, steps).tokens(0, steps)

    return steps_within(options.tokens, tokens, options.stages.least_steps)


def resolve_steps(setup: Setup) -> PretrainOptions:
    """The options with a budget in tokens or minutes turned into steps, and with all intervals set."""
    options = setup.options
    micro = options.machine.micro_batch_size or options.batch_size
    steps = steps_in(setup, options.minutes * 60.0) if options.minutes is not None else steps_of(options)
    eval_every, checkpoint_every = intervals(options, steps)
    return replace(
        options,
        steps=steps,
        eval_every=eval_every,
        checkpoint_every=checkpoint_every,
        machine=replace(options.machine, micro_batch_size=micro),
    )


def steps_in(setup: Setup, seconds: float) -> int:
    """The steps of a run that takes about `seconds`, planned by timing a few on networks that are then thrown away, and
    its other parts. Prints the plan."""
    begin = time.perf_counter()
    objective = setup.objective()
    built = time.perf_counter() - begin
    writing = writing_seconds(existing(setup.options.out or "runs"), checkpoint_size(objective))
    window = timing_window(seconds)
    timed = stage_timer(setup, objective, window)
    setup.plan(NOMINAL_STEPS).total(timed, 0, NOMINAL_STEPS)  # times what there is in any but the shortest runs
    costs = Costs(
        start=built,  # the networks are built again
        step=timed,
        validation=repeat_in(window / 2, lambda: setup.validate(objective)),
        checkpoint=writing,
        finish=writing / 3,  # the export: weights without moments
    )
    spent = time.perf_counter() - begin
    steps = costs.steps_in(seconds - spent, setup.plan, setup.options)
    plan = setup.plan(steps)
    spans = {"timing": spent, **costs.spans(plan, setup.options, 0, steps)}
    total = sum(spans.values())
    say(
        f"planned for {seconds / 60:g} minutes: {plan.describe(steps)}, "
        f"{plan.total(timed, 0, steps) / steps:.3g} s a step; expected {shown_time(total)}: {shown_spans(spans)}"
    )
    return steps


def seconds_per_step(setup: Setup, objective: nn.Module, seconds: float) -> float:
    """The time of a training step on `objective`, measured in about `seconds`; where stages differ, their mean over a
    run."""
    steps = setup.options.steps or NOMINAL_STEPS
    return setup.plan(steps).total(stage_timer(setup, objective, seconds), 0, steps) / steps


def stage_timer(setup: Setup, objective: nn.Module, seconds: float) -> Callable[[int, int], float]:
    """(batch_size, length) -> the time of a step, measured when it is first asked for; about `seconds` for all."""
    each = seconds / len(setup.plan(NOMINAL_STEPS).stages)
    return cache(lambda batch_size, length: timed_step(setup, objective, each, Plan.constant(batch_size, length)))


def timed_step(setup: Setup, objective: nn.Module, seconds: float, plan: Plan) -> float:
    """The time of a training step on `objective` while nothing else runs, measured in about `seconds`."""
    found = time_training(setup, objective, seconds, plan, MOST_TIMED)
    if found.disturbed:
        say(
            f"other work disturbed the timing of steps: they took {found.mean:.3g} s on average and "
            f"{found.seconds:.3g} s at the 10th percentile, which is used"
        )
    return found.seconds


def time_training(setup: Setup, objective: nn.Module, seconds: float, plan: Plan, most: int) -> Timed:
    """Times training steps on `objective` in about `seconds`, `most` of them at most."""
    batches = setup.batches(plan)
    updater = setup.updater(objective, setup.optimizer(objective))
    objective.train()
    lagged, numbers = LaggedScalars(), itertools.count()

    def step() -> None:
        number = next(numbers)
        scalars = objective_step(updater, batches.at(number), setup.options.seed, number, learning_rate=0.0)
        lagged.push(number, scalars)  # as in training, the host is one step ahead of the device

    wait = partial(torch.cuda.synchronize, setup.device) if setup.device.type == "cuda" else torch.cpu.synchronize
    step()  # to warm up
    wait()
    return time_in_groups(step, wait, seconds, least=LEAST_TIMED, most=most)


def checkpoint_size(objective: nn.Module) -> int:
    """Bytes: weights and two moments, and what is no parameter."""
    state = sum(buffer.numel() * buffer.element_size() for buffer in objective.buffers())
    return 12 * objective.parameter_count() + state


def describe_experiment(setup: Setup, experiment: dict[str, Any]) -> dict[str, Any]:
    dataset = setup.dataset
    return {
        "experiment": configuration.digest(experiment),
        "science": experiment,
        "data": {"folder": str(dataset.folder), "fingerprint": data_fingerprint(dataset)},
        "encoder": setup.config.to_dict(),
        "sessions": [],
    }


def rehearse(setup: Setup, run: RunFolder, manifest: dict[str, Any], resumed: bool) -> int:
    """What `train` would take, from the newest checkpoint if the run is `resumed`; returns the exit code."""
    newest = read_newest(run.checkpoints, say) if resumed else None
    if newest is not None:
        setup.options = replace(setup.options, init_from=None)  # speed does not depend on the weights
    return dry_run(
        setup,
        run,
        newest.step if newest else 0,
        lambda folder: build_trainer(setup, RunFolder(folder), manifest, resumed=False, quiet=True),
    )


def train(setup: Setup, run: RunFolder, manifest: dict[str, Any], resumed: bool, profile: bool) -> int:
    """Builds the trainer, trains, and writes what the run leaves behind; returns the exit code."""
    if profile:
        check_room(run.profile, setup)
    with locked_folder(run.path):
        if not resumed and run.exists():
            raise UserError(f"another process began a run in {run.path} meanwhile; choose another --out")
        for written_last in (run.model, run.report):
            refuse_link(written_last)
        trainer = build_trainer(setup, run, manifest, resumed)
        profiling = profiled(trainer, run.profile) if profile else nullcontext()
        with trainer.logbook, Interrupts() as interrupts, profiling:
            trainer.run(interrupts)
        if trainer.progress.step < trainer.steps:
            say(
                f"stopped at step {trainer.progress.step} of {trainer.steps}; "
                f"resume with: fastbert pretrain --resume {run.path}"
            )
            return interrupts.exit_code
        finish(setup, trainer.objective, run, trainer.progress)
    return 0


def build_trainer(
    setup: Setup, run: RunFolder, manifest: dict[str, Any], resumed: bool, quiet: bool = False
) -> Trainer:
    """The trainer, at its start or at the newest checkpoint; the run's folder is written or brought up to date.

    Raises:
        UserError: too few sequences, too little space on the disk, no checkpoint that is whole.
    """
    options = setup.options
    batches = setup.batches()
    milestones = options.milestone_steps()
    keep = (options.keep_checkpoints, say, milestones)
    checkpointer = Checkpointer(run.checkpoints, *keep) if resumed else None
    checkpoint = checkpointer.load_latest() if checkpointer else None
    if checkpoint:
        check(checkpoint.state, STATE, f"the checkpoint's state {checkpoint.path / 'state.json'}")
    objective = setup.objective(initial=checkpoint is None)
    check_space(run.path, (options.keep_checkpoints + len(milestones) + 3) * checkpoint_size(objective))
    optimizer = setup.optimizer(objective)
    if checkpointer is None:  # nothing is refused any more
        run.write(options, manifest, setup.dataset.tokenizer)
        checkpointer = Checkpointer(run.checkpoints, *keep)
    started = setup.started or options
    if resumed:
        try:
            read_config(run)
        except UnreadableError:
            raise
        except UserError:  # reported before
            run.write_config(started)
        if problem := run.restore_tokenizer(setup.vocabulary):
            say(problem)
    step = checkpoint.step if checkpoint else 0
    before = checkpoint.state["progress"].get("seconds") if checkpoint else 0.0
    peak, how = peak_flops(setup.device, setup.precision)
    speed = {
        "flops_per_step": batches.plan.total(objective.flops, 0, options.steps) / options.steps,
        "peak_flops": peak,
        "peak_from": how,
    }
    resolved = {"device": str(setup.device), "precision": setup.precision, "threads": torch.get_num_threads(), **speed}
    resolved["optimizer"] = implementation(type(optimizer))
    if kernels := fix_kernels(setup.device, manifest["sessions"]):
        resolved["kernels"] = kernels
    manifest["sessions"].append(session(step, before or 0.0, describe_machine(), resolved))
    write_json(run.manifest, manifest)
    say(
        f"{objective.parameter_count() / 1e6:.2f}M parameters ({options.objective}, {setup.config.position}), "
        f"{batches.plan.describe(options.steps)}, "
        f"{speed['flops_per_step'] * options.steps:.2e} FLOPs; "
        f"{setup.device} {setup.precision}, peak {peak / 1e9:.0f} GFLOP/s ({how})"
    )
    sequences = batches.plan.tokens(0, options.steps) // options.length
    for line in setup.noted.summary(sequences) if setup.noted else ():
        say(line)
    if resumed:
        say(f"resuming {run.path} at step {step} of {options.steps}")
        if before is None:
            say("its earlier sessions did not keep their time: the minutes reported at the end are those from here on")
    trainer = Trainer(
        updater=setup.updater(objective, optimizer),
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
            expected=checkpoint.state.get("metrics") if checkpoint else None,
            quiet=quiet,
        ),
        validate=lambda length: setup.validate(objective, length),
        eval_every=options.eval_every,
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
        milestones=milestones,
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
