"""Runs that continue a checkpoint with another number of steps: lengthened in the same folder (--resume with more
--steps), or branched off into a folder of their own (--branch; the annealings of an ablation).

Both need a beginning that is the same in the two runs: learning rates and batches of all steps up to the checkpoint.
Then the result equals that of a run with the new options from its first step.
"""

import errno
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbert.config import differences, digest
from fastbert.data.stages import BatchPlan, make_plan
from fastbert.errors import LINE, UserError, abbreviated
from fastbert.inputs import read_or_problem
from fastbert.outputs import output_folder
from fastbert.pretraining.misplaced import usage_hint
from fastbert.pretraining.options import SINGLE_CALL_OPTIONS, PretrainOptions, science
from fastbert.pretraining.run import MANIFEST, RunFolder, Sealed, lengthenings, longer, read_sealed
from fastbert.records import read_json
from fastbert.training.checkpoints import checkpoint_paths, read_checkpoint
from fastbert.training.schedules import constant_phase, learning_rate_factor, resolved, warmup_steps

_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP)

# --- equal beginnings


def unequal_beginning(old: PretrainOptions, new: PretrainOptions, done: int) -> str | None:
    """Compares the learning rates and the batches of the first `done` steps of two runs that have all other science in
    common; both options have a number of steps.

    Returns:
        The first difference, as a clause; None if there is none.
    """
    for step in range(done):
        before, after = (learning_rate_factor(one.schedule, step, one.steps) for one in (old, new))
        if before != after:
            return f"the learning rate of step {step + 1} would be {after:.6g} of the peak instead of {before:.6g}"
    before, after = ([(stage.shape, count) for stage, count in _plan(one).spans(0, done)] for one in (old, new))
    if before != after:
        return "the batches of the steps done so far would differ: their lengths or sizes depend on the number of steps"
    return None


def _plan(options: PretrainOptions) -> BatchPlan:
    return make_plan(options.stages, options.batch_size, options.length, options.steps)


def with_mark(old: PretrainOptions, new: PretrainOptions, done: int) -> PretrainOptions:
    """`new` with `done` among its milestones if only the run with the options `old` logs, validates and saves there: a
    row more, and another average of the training loss after it."""
    here, there = ({one.steps, *one.marked_steps(one.steps)} for one in (new, old))
    if done not in there or done in here:
        return new
    return replace(new, milestones=_joined(new.milestone_steps() | {done}))


def _joined(steps: frozenset[int]) -> str | None:
    return ",".join(map(str, sorted(steps))) or None


# --- lengthening


def lengthened(options: PretrainOptions, steps: int, done: int) -> PretrainOptions:
    """Options of a run that is lengthened to `steps` steps after `done` of them."""
    return with_mark(options, replace(options, steps=steps, tokens=None, minutes=None), done)


def not_lengthened(run: RunFolder, options: PretrainOptions, steps: int, done: int) -> str | None:
    """Reason why a run with `options` cannot be lengthened to `steps` steps after `done` of them, with the way out;
    None if it can."""
    reason = unequal_beginning(options, replace(options, steps=steps), done)
    if reason is None:
        return None
    phase = constant_phase(options.schedule, options.steps)
    if phase is not None and done > phase[1]:
        reason = f"its learning rate has been annealing since step {phase[1]}"
    text = f"With {steps} steps instead of {options.steps} the {done} steps done so far would not be the same: {reason}"
    for step in reversed(checkpoint_steps(run)):
        same = step < done and phase is not None and step >= phase[0]
        if same and unequal_beginning(options, replace(options, steps=steps), step) is None:
            source = shlex.quote(f"{run.path}@{step}")
            return f"{text}. To train longer, continue from step {step}: --branch {source} --steps {steps} --out ..."
    return f"{text}. {longer(run)}"


def lengthening(
    run: RunFolder,
    manifest: dict[str, Any] | None,
    sealed: Sealed | None,
    stored: PretrainOptions,
    options: PretrainOptions,
) -> tuple[PretrainOptions, PretrainOptions, dict[str, Any] | None, str | None]:
    """Lengthens the run if its options have more steps than it, or completes a lengthening that was killed after the
    manifest was written and before config.yaml.

    Args:
        manifest, sealed: the run's manifest and the state of its newest checkpoint, if there are any.
        stored: the options in config.yaml.
        options: those with which the run is resumed.

    Returns:
        `stored` and `options`, both lengthened; the manifest with the number of steps and a record of the beginning
        under the former science; and the reason if it cannot be lengthened, with everything else as it was.
    """
    planned = manifest["science"].get("steps") if manifest else None
    planned = planned if isinstance(planned, int) else stored.steps
    untrained = sealed is None or sealed.state["science"] != (manifest or {}).get("science")
    behind = planned > stored.steps and bool(lengthenings(manifest)) and untrained
    steps = planned if behind and options.steps == stored.steps else options.steps
    if steps < planned or steps <= stored.steps:
        return stored, options, manifest, None
    done = sealed.step if sealed else 0
    if reason := not_lengthened(run, stored, steps, done):
        return stored, options, manifest, reason
    if manifest is not None:
        begun = sealed.state["science"] if sealed else manifest["science"]
        experiment = manifest["science"] | {"steps": steps}
        # All records: an older checkpoint is used if the newest is damaged.
        records = [*(one for one in lengthenings(manifest) if one.get("science") != begun)]
        records.append({"step": done, "science": begun})
        manifest = manifest | {"science": experiment, "experiment": digest(experiment), "lengthened": records}
    return lengthened(stored, steps, done), lengthened(options, steps, done), manifest, None


# --- branches


def annealed(options: PretrainOptions, step: int, further: int) -> PretrainOptions:
    """Options of a run that equals the one with `options` up to `step`, where its learning rate is constant, and then
    anneals to `schedule.final` within `further` steps: exponentially in the infinite schedule, linearly (wsd) in the
    others. Sequences of the first length, if the step has them, end with the constant rate.

    Raises:
        UserError: the rate is not constant after `step`.
    """
    end, steps = step + further, options.steps
    phase = constant_phase(options.schedule, steps)
    if phase is None or not phase[0] <= step <= phase[1]:
        where = "has no constant phase" if phase is None else f"is constant from step {phase[0]} to {phase[1]}"
        raise UserError(f"the learning rate of the {options.schedule.name} schedule {where}, not after step {step}")
    schedule = resolved(options.schedule, steps)
    if schedule.name == "infinite":
        schedule = replace(schedule, annealing=float(further))
    else:
        warmup = float(warmup_steps(schedule, steps))
        schedule = replace(schedule, name="wsd", warmup=warmup, decay=further / end)
    stages, plan = options.stages, _plan(options)
    if len(plan.lengths) > 1:
        first = next(stage.first for stage in plan.stages if stage.length == plan.lengths[-1])
        stages = replace(stages, first_fraction=min(first, step) / end)
    if stages.batch_warmup < 1 and (growth := round(stages.batch_warmup * steps)):
        stages = replace(stages, batch_warmup=float(growth)) if stages.initial_batch_size is not None else stages
    within = _joined(frozenset(one for one in options.milestone_steps() if one <= end))
    new = replace(options, milestones=within, tokens=None, minutes=None, steps=end, schedule=schedule, stages=stages)
    learning_rate_factor(new.schedule, 0, end)  # refuses phases that do not fit
    return new


def branch_options(given: PretrainOptions, source: Sealed) -> PretrainOptions:
    """Options of the run that --branch starts from the checkpoint `source`.

    Args:
        given: the options of its run, replaced by flags, with `branch` and `anneal` or `steps`.

    Raises:
        UserError: the new run would differ from that run before the checkpoint, or by a flag for science.
    """
    run = source.run
    before = source.options(str(run.path))
    milestones = before.milestones if given.milestones == before.milestones else None
    bare = replace(given, **SINGLE_CALL_OPTIONS, steps=before.steps, milestones=milestones)

    if problem := branch_problem(before, source.step, given.anneal, given.steps):
        raise UserError(f"{problem}; {_others(run)}")
    options = continued(bare, source.step, given.anneal, given.steps)
    wanted = science(continued(before, source.step, given.anneal, given.steps), "")
    found = science(options, "")
    if changed := differences(wanted, found):
        raise UserError(
            f"--branch continues the experiment of {run.path}, and these options would change it:{LINE}"
            f"{LINE.join(changed)}{LINE}Leave them out, or start a new run from its weights: --init-from {source.path}"
        )
    if given.milestones is not None and milestones is None:
        options = replace(options, milestones=given.milestones)
    return with_mark(before, options, source.step)


def branch_problem(before: PretrainOptions, step: int, anneal: float | None, steps: int | None) -> str | None:
    """A reason why a run with the options `before` cannot be continued after `step` by an annealing or to `steps`; None
    if it can."""
    if anneal is None and steps <= step:
        return f"--steps {steps} ends at or before step {step}, where the branch begins"
    phase = constant_phase(before.schedule, before.steps)
    if anneal is not None and (phase is None or not phase[0] <= step <= phase[1]):
        where = f"after step {step} of the {before.schedule.name} schedule"
        return f"--anneal needs a constant learning rate, which it is not {where}"
    options = continued(before, step, anneal, steps)
    reason = unequal_beginning(before, options, step)
    return reason and f"step {step} cannot be continued to {options.steps} steps: {reason}"


def continued(options: PretrainOptions, step: int, anneal: float | None, steps: int | None) -> PretrainOptions:
    """Options of a run that equals the one with `options` up to `step`, and then anneals, or continues to `steps`."""
    if anneal is not None:
        further = anneal if anneal >= 1 else max(1, round(anneal * step))
        return annealed(options, step, int(further))
    within = _joined(frozenset(one for one in options.milestone_steps() if one <= steps))
    return replace(options, steps=steps, milestones=within, tokens=None, minutes=None)


def _others(run: RunFolder) -> str:
    """The checkpoints of `run` that can be annealed, as advice."""
    if steps := constant_steps(run):
        return f"checkpoints of {run.path} that can be annealed: {abbreviated([f'@{step}' for step in steps[::-1]])}"
    return (
        f"{run.path} has no checkpoint that can be annealed (schedules infinite and wsd before their decay, or "
        f"constant). {longer(run)}"
    )


def find_branch(text: str) -> Sealed:
    """The checkpoint that --branch names: runs/x@9000, or the newest one of runs/x after which the rate is constant.

    Raises:
        UserError: there is no such run or checkpoint.
    """
    found = None if Path(text).is_dir() else re.fullmatch(r"(.+)@([0-9]{1,10})", text)
    run = RunFolder(Path(found[1] if found else text))
    if not run.checkpoints.is_dir():
        hint = usage_hint(run.path) or "it is no run of fastbert pretrain with checkpoints"
        raise UserError(f"--branch {text}: {hint}. Give a run and a step, such as --branch runs/x@9000")
    steps = checkpoint_steps(run) if found else constant_steps(run)
    if not found and not steps:
        raise UserError(f"--branch {text}: {_others(run)}")
    step = int(found[2]) if found else steps[-1]
    if step not in steps:
        shown = abbreviated([str(one) for one in steps[::-1]]) or "none"
        raise UserError(f"--branch {text}: {run.path} has no checkpoint of step {step}; the newest are {shown}")
    return read_sealed(checkpoint_path(run, step))


def branch_defaults(text: str) -> PretrainOptions:
    """The options of the run that --branch names, for flags to replace: without its folder, its budget, and its exports
    after numbers of words.

    Raises:
        UserError: see `find_branch`.
    """
    none = dict.fromkeys(("out", "steps", "tokens", "minutes", "checkpoint_words"))
    source = find_branch(text)
    return replace(source.options(str(source.run.path)), **none)


def verified(source: Sealed) -> Sealed:
    """The checkpoint to branch off from. Raises a UserError, before anything is written, if it is damaged."""
    read_checkpoint(source.path)
    return source


def branch(trunk: Path, step: int, options: PretrainOptions, out: Path) -> dict[str, Any]:
    """Creates the folder of a run that begins with the first steps of `trunk`, ready to be resumed.

    Args:
        trunk: folder of a run with a checkpoint at `step`.
        options: options of the new run, whose learning rates and batches up to `step` equal the trunk's.
        out: folder to write, whole or not at all.

    Returns:
        The manifest of the new run.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    source = RunFolder(trunk)
    checkpoint = checkpoint_path(source, step)
    if not checkpoint.is_dir():
        raise UserError(f"there is no checkpoint {checkpoint} to branch off from; remove {trunk}, and it runs again")
    # The checkpoint's state is sealed, unlike the manifest, and names the trunk's options: the branch records that it
    # was copied.
    sealed = read_sealed(checkpoint)
    begun = sealed.state["science"]
    described = science(options, begun.get("data"))
    manifest, _ = read_or_problem(read_json, source.manifest, "the run's manifest", MANIFEST)
    manifest = manifest or {"data": {"folder": "", "fingerprint": begun.get("data")}}
    begins = {"run": str(trunk), "step": step, "science": begun}
    manifest |= {"experiment": digest(described), "science": described, "branch": begins, "sessions": []}
    manifest["encoder"] = sealed.state["encoder"]
    manifest.pop("lengthened", None)
    with output_folder(out, first="config.yaml", last="manifest.json") as folder:
        inside = folder / "checkpoints" / checkpoint.name
        inside.mkdir(parents=True)
        try:
            for file in checkpoint.iterdir():
                link_or_copy(file, inside / file.name)
            shutil.copyfile(
                source.metrics, folder / source.metrics.name
            )  # later records are dropped when it is resumed
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename} is missing: {trunk} may be training and has removed this checkpoint; choose a newer "
                "one, or one of its --milestones"
            ) from None
        RunFolder(folder).write(options, manifest, source.tokenizer)
    return manifest


def link_or_copy(source: Path, target: Path) -> None:
    """Links a file, which is never rewritten, so both runs can have it; copies it to another file system."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)


# --- checkpoints of a run


def checkpoint_path(run: RunFolder, step: int) -> Path:
    return run.checkpoints / f"step-{step:08d}"


def checkpoint_steps(run: RunFolder) -> list[int]:
    """Steps of the checkpoints in a run's folder, ascending."""
    return [int(path.name.removeprefix("step-")) for path in checkpoint_paths(run.checkpoints)]


def constant_steps(run: RunFolder) -> list[int]:
    """Steps of the readable checkpoints after which the learning rate is constant, ascending."""
    sealed = (read_or_problem(read_sealed, path)[0] for path in checkpoint_paths(run.checkpoints))
    return [one.step for one in sealed if one is not None and _phase(one)[0] == "constant"]


def _phase(sealed: Sealed) -> tuple[str, str]:
    """Phase of the learning rate after a checkpoint (constant, annealed or other), and the name of the schedule."""
    options, problem = read_or_problem(sealed.options, str(sealed.run.path))
    if problem:
        return "other", ""
    phase, name = constant_phase(options.schedule, options.steps), options.schedule.name
    if phase is None:
        return "annealed" if sealed.step == options.steps else "other", name
    if phase[0] <= sealed.step <= phase[1]:
        return "constant", name
    return "annealed" if sealed.step > phase[1] else "other", name


def suggest_constant(path: str) -> str | None:
    """A suggestion if the weights of --init-from, a run, its export or a checkpoint of a run, have been annealed;
    otherwise None."""
    folder = Path(path)
    if (folder / "checkpoints").is_dir():
        run = RunFolder(folder)
    elif folder.name == "model" and (folder.parent / "checkpoints").is_dir():
        run = RunFolder(folder.parent)
    else:
        run = None
    path_of_checkpoint = folder.resolve()
    if run is None and path_of_checkpoint not in checkpoint_paths(path_of_checkpoint.parent):
        return None
    sealed = read_or_problem(read_sealed, path_of_checkpoint)[0] if run is None else run.sealed()
    if sealed is None:
        return None
    phase, name = _phase(sealed)
    if phase != "annealed":
        return None
    text = (
        f"the learning rate of {path} has been annealed ({name}); a checkpoint from before the annealing adapts better"
    )
    if earlier := constant_steps(sealed.run):
        return f"{text}: --init-from {checkpoint_path(sealed.run, earlier[-1])}"
    return f"{text}, and a run with --schedule.name infinite retains one"
