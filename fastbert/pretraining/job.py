"""`fastbert pretrain`: from options to a run folder with a trained encoder, its curves and its export."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbert import config as configuration
from fastbert.data.stages import NOMINAL_STEPS, Plan, make_plan, steps_within
from fastbert.errors import UserError
from fastbert.files import locked_folder, read_json, write_json
from fastbert.model.config import EncoderConfig
from fastbert.pretraining.dry_run import dry_run
from fastbert.pretraining.finish import finish
from fastbert.pretraining.loop import Trainer
from fastbert.pretraining.options import BUDGETS, OF_ONE_CALL, PretrainOptions, science
from fastbert.pretraining.profiling import check_room, profiled
from fastbert.pretraining.run import RunFolder, check_same_experiment, merge, new_folder, session, stored_options
from fastbert.pretraining.setup import Setup, data_fingerprint, prepare_setup
from fastbert.training.checkpoints import Checkpointer, check_space, read_newest
from fastbert.training.hardware import autocast, describe_machine, peak_flops
from fastbert.training.interrupts import Interrupts
from fastbert.training.kernels import fix_kernels
from fastbert.training.logbook import Logbook, say
from fastbert.training.optimizers import build_optimizer, clip_gradients, guarded_step
from fastbert.training.schedules import learning_rate_factor


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
    given = [budget for budget in BUDGETS if getattr(asked, budget) is not None]
    if len(given) != 1:
        raise UserError(f"give one of --steps, --tokens and --minutes, not {' and '.join(given) or 'none'}")
    run = new_folder(asked.out, name)
    check_steps(asked)
    setup = prepare_setup(replace(asked, **OF_ONE_CALL, out=str(run.path)))
    setup.options = resolve_steps(setup)
    setup.plan()  # refuses a batch that grows for longer than the run
    learning_rate_factor(setup.options.schedule, 0, setup.options.steps)  # refuses a warm-up longer than the run
    manifest = describe_experiment(setup, science(setup.options, data_fingerprint(setup.dataset)))
    if asked.dry_run:
        return rehearse(setup, run, manifest, resumed=False)
    return train(setup, run, manifest, resumed=False, profile=asked.profile)


def resume(asked: PretrainOptions) -> int:
    """Goes on with the run in `asked.out`, if `asked` is the same experiment."""
    stored = stored_options(asked.out)
    run = RunFolder(Path(asked.out))
    manifest = read_json(run.manifest, "the run's manifest")
    options, notes = merge(stored, asked)
    if options.data == stored.data and Path(manifest["data"]["folder"]).is_dir():
        options = replace(options, data=manifest["data"]["folder"])  # the source itself may be gone by now
    setup = prepare_setup(options, EncoderConfig.from_dict(manifest["encoder"]))
    check_same_experiment(run, manifest, science(setup.options, data_fingerprint(setup.dataset)))
    for line in notes:
        say(f"resumed with another {line}")
    if asked.dry_run:
        return rehearse(setup, run, manifest, resumed=True)
    return train(setup, run, manifest, resumed=True, profile=asked.profile)


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
    return replace(
        options,
        steps=steps,
        eval_every=options.eval_every or max(1, steps // 10),
        checkpoint_every=options.checkpoint_every or min(1000, max(1, steps // 5)),
        machine=replace(options.machine, micro_batch_size=micro),
    )


def steps_in(setup: Setup, seconds: float) -> int:
    """How many steps fit, by timing a few on networks that are then thrown away, ten validations included."""
    start = time.perf_counter()
    objective = setup.objective()
    timed = stage_timer(setup, objective, 0.03 * seconds)
    setup.plan(NOMINAL_STEPS).total(timed, 0, NOMINAL_STEPS)  # times what there is in any but the shortest runs
    before = time.perf_counter()
    setup.validate(objective)
    validation = time.perf_counter() - before
    left = seconds - 10 * validation - (time.perf_counter() - start)
    return steps_within(left, lambda steps: setup.plan(steps).total(timed, 0, steps), setup.options.stages.least_steps)


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
    """The median time of a training step on `objective`, over at least 3 and at most 29, in about `seconds`."""
    batches = setup.batches(plan)
    optimizer = build_optimizer(objective.named_parameters(), setup.options.optimizer, setup.device)
    objective.train()
    times = []
    start = time.perf_counter()
    while len(times) < 4 or (len(times) < 30 and time.perf_counter() - start < seconds):
        before = time.perf_counter()
        drawn = [objective.draw(batch, setup.options.seed, 0) for batch in batches.at(len(times))]
        for part in drawn:
            with autocast(setup.device, setup.precision):
                sums = objective(part)
            sum(sums[name] / part.counts[name] for name in objective.loss_weights).backward()
        norm = clip_gradients(objective.parameters(), setup.options.optimizer.clip_norm)
        guarded_step(optimizer, 0.0, norm.isfinite())
        objective.after_step(drawn, norm.isfinite())
        optimizer.zero_grad()
        if setup.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    return sorted(times[1:])[len(times[1:]) // 2]


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
        trainer = build_trainer(setup, run, manifest, resumed)
        start = time.perf_counter()
        profiling = profiled(trainer, run.profile) if profile else nullcontext()
        with trainer.logbook, Interrupts() as interrupts, profiling:
            trainer.run(interrupts)
        seconds = time.perf_counter() - start
        if trainer.progress.step < trainer.steps:
            say(
                f"stopped at step {trainer.progress.step} of {trainer.steps}; "
                f"go on with: fastbert pretrain --resume {run.path}"
            )
            return interrupts.exit_code
        finish(setup, trainer.objective, run, trainer.progress, seconds)
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
    objective = setup.objective(initial=checkpoint is None)
    state = sum(buffer.numel() * buffer.element_size() for buffer in objective.buffers())
    size = 12 * objective.parameter_count() + state  # weights and two moments, and what is no parameter
    check_space(run.path, (options.keep_checkpoints + len(milestones) + 3) * size)
    optimizer = build_optimizer(objective.named_parameters(), options.optimizer, setup.device)
    if checkpointer is None:  # nothing is refused any more
        run.write(options, manifest, setup.dataset.tokenizer)
        checkpointer = Checkpointer(run.checkpoints, *keep)
    step = checkpoint.step if checkpoint else 0
    peak, how = peak_flops(setup.device, setup.precision)
    speed = {
        "flops_per_step": batches.plan.total(objective.flops, 0, options.steps) / options.steps,
        "peak_flops": peak,
        "peak_from": how,
    }
    resolved = {"device": str(setup.device), "precision": setup.precision, "threads": torch.get_num_threads(), **speed}
    if kernels := fix_kernels(setup.device, manifest["sessions"]):
        resolved["kernels"] = kernels
    manifest["sessions"].append(session(step, describe_machine(), resolved))
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
    trainer = Trainer(
        objective=objective,
        optimizer=optimizer,
        batches=batches,
        steps=options.steps,
        seed=options.seed,
        optimizer_options=options.optimizer,
        schedule=options.schedule,
        precision=setup.precision,
        checkpointer=checkpointer,
        logbook=Logbook(run.path, options.steps, start_step=step, quiet=quiet),
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
        },
    )
    if checkpoint:
        trainer.restore(checkpoint)
    return trainer
