"""The folder of a run: the files that are written before training, and the checks of a run that is resumed.

config.yaml      all options
manifest.json    the experiment's name and science, data, model, and each session's machine
tokenizer/       the tokenizer of its data
metrics.jsonl, events.out.tfevents.*, checkpoints/, model/, report/, with --checkpoint-words exports/, with --profile
profile/
"""

import datetime
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastbert import config as configuration
from fastbert.data.tokenizer import WordPiece
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.errors import LINE, UserError
from fastbert.files import LOCK, atomic_file, atomic_folder, contents, disk_errors
from fastbert.inputs import read_or_problem
from fastbert.model.options import EncoderOptions
from fastbert.outputs import check_output_folder, refuse_other_job
from fastbert.pretraining.misplaced import usage_hint
from fastbert.pretraining.options import SINGLE_CALL_OPTIONS, PretrainOptions
from fastbert.ranges import text_problem
from fastbert.records import check, read_json, write_json
from fastbert.streams import echo
from fastbert.training.checkpoints import checkpoint_paths, read_state
from fastbert.training.options import PretrainScheduleOptions
from fastbert.training.schedules import PHASES, resolved


class RunFolder:
    """The files of a run in the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.manifest = path / "manifest.json"
        self.tokenizer = path / "tokenizer"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.model = path / "model"
        self.exports = path / "exports"
        self.profile = path / "profile"
        self.report = path / "report"

    def exists(self) -> bool:
        """Returns whether the folder has files that a new run must not touch."""
        if not self.path.is_dir():
            return self.path.exists()
        return bool(contents(self.path)) and not self.is_incomplete()

    def is_incomplete(self) -> bool:
        """Returns whether a call was killed, or ran out of space, before the first step: fastbert has locked the
        folder, but the manifest, which is written last, is missing."""
        found = contents(self.path)
        return bool(found) and found <= {self.config.name, self.tokenizer.name} and (self.path / LOCK).is_file()

    def write(self, options: PretrainOptions, manifest: dict[str, Any], tokenizer: Path) -> None:
        """Writes tokenizer, options and, last, the manifest: see `is_incomplete`.

        Raises:
            UserError: the folder cannot be written.
        """
        with atomic_folder(self.tokenizer) as folder:
            load_tokenizer(tokenizer).save(folder)
        self.write_config(options)
        write_json(self.manifest, manifest)

    def restore_tokenizer(self, vocabulary: WordPiece) -> str | None:
        """Writes the tokenizer again unless it equals `vocabulary`, with which the checkpoints were trained; returns
        the problem, if any."""
        found, problem = read_or_problem(load_tokenizer, self.tokenizer)
        if found and found.fingerprint == vocabulary.fingerprint:
            return None
        problem = problem or f"{self.tokenizer} differs from the tokenizer of the data"
        with atomic_folder(self.tokenizer) as folder:
            vocabulary.save(folder)
        return f"{problem}; it is written again"

    def write_config(self, options: PretrainOptions) -> None:
        with atomic_file(self.config, "w") as file:
            file.write(configuration.to_yaml(options))

    def sealed(self) -> "Sealed | None":
        """State of the newest checkpoint that is complete; None if there is none."""
        for path in reversed(checkpoint_paths(self.checkpoints)) if self.checkpoints.is_dir() else ():
            found, _ = read_or_problem(read_state, path)  # a problem is reported when the checkpoint is loaded
            if found:
                return read_sealed(path)
        return None


_SESSION = {"resolved?": {"kernels?": ({"device": str, "configurations": dict}, type(None))}}
MANIFEST = {
    **{"science": dict, "encoder": dict, "data": {"folder": str, "fingerprint?": str}, "sessions": [_SESSION]},
    "replay?": {"folder": str},
}
"""Schema of a run's manifest, for `check`."""


@dataclass(frozen=True)
class Sealed:
    """Definition of a run in the state of a checkpoint, which is protected by hashes, unlike config.yaml and
    manifest.json."""

    path: Path
    step: int
    state: dict[str, Any]

    @property
    def run(self) -> RunFolder:
        """Folder of the run whose checkpoint it is."""
        return RunFolder(self.path.parent.parent)

    def options(self, out: str) -> PretrainOptions:
        """Options with which the run was started, for its folder `out`."""
        options, where = self.state["options"] | {"out": out}, f"{self.path}/state.json"
        try:
            return configuration.from_dict(PretrainOptions, options, where)
        except UserError as error:  # the file matches its hash, so it is not damaged
            raise UserError(
                f"{where} was written by an older version of fastbert, whose options had other names; resume with that "
                f"version, or start a new run from its export: --init-from {out}/model ({error})"
            ) from None


def read_sealed(path: Path) -> Sealed:
    """The state of the checkpoint in `path`. Raises a UserError if it is damaged."""
    step, state = read_state(path)
    check(state, {"encoder": dict, "science": dict, "options": dict}, f"the state in {path}")
    return Sealed(path, step, state)


def begins_with(manifest: dict[str, Any], step: int, science: Any) -> bool:
    """Returns whether the manifest records that its run began with the first `step` steps of a run with other science:
    that of a branch, or its own before it was lengthened."""
    records = [manifest.get("branch"), *lengthenings(manifest)]
    begun = [record for record in records if isinstance(record, dict) and record.get("science") == science]
    return any(isinstance(record.get("step"), int) and step <= record["step"] for record in begun)


def lengthenings(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The manifest's records of lengthenings, oldest first: step, and the science before it."""
    records = manifest.get("lengthened")
    return [one for one in records if isinstance(one, dict)] if isinstance(records, list) else []


def new_folder(out: str | None, name: str) -> RunFolder:
    """The folder for a new run: `out`, or runs/`name`, with a number if that exists.

    Raises:
        UserError: `out` is not empty, or cannot be written.
    """
    if out is not None:
        run = RunFolder(Path(out))
        with disk_errors(out):
            exists = run.exists()
        if exists:
            refuse_other_job(out, "pretrain")
            what = "a run" if run.config.exists() else "other files"
            raise UserError(f"{out} already contains {what}; resume it with --resume {out}, or choose another --out")
    else:
        number, run = 1, RunFolder(Path("runs") / name)
        while run.exists():
            number += 1
            run = RunFolder(Path("runs") / f"{name}-{number}")
    check_output_folder(run.path)
    return run


def stored_options(out: str | None) -> PretrainOptions:
    """Options of the run to resume, from config.yaml or, if that is missing or damaged, from a checkpoint.

    Raises:
        UserError: there is no such run, or both are missing or damaged.
    """
    if out is None:
        raise UserError("--resume needs the folder of the run: --resume runs/x, or --out runs/x --resume")
    if problem := text_problem(out):
        raise UserError(f"--out {problem}")
    run = RunFolder(Path(out))
    if run.path.is_dir() and run.is_incomplete():
        raise UserError(
            f"the run in {out} was stopped before its first step, while its folder was written; start it again with "
            "the same command and --out, without --resume"
        )
    options, problem = read_or_problem(read_config, run)
    if problem:
        sealed = run.sealed()
        if sealed is None:
            raise UserError(problem)
        options = sealed.options(out)
    return options


def read_config(run: RunFolder) -> PretrainOptions:
    """The options in config.yaml.

    Raises:
        UserError: it is missing or damaged, or lacks a value that was computed when the run started.
    """
    if not run.config.exists():
        hint = usage_hint(run.path) or f"no {run.config}; leave --resume out to start one"
        raise UserError(f"there is no run to resume in {run.path}: {hint}")
    options = configuration.load_yaml(PretrainOptions, run.config)
    if missing := [name for name in ("steps", "eval_every", "checkpoint_every") if getattr(options, name) is None]:
        raise UserError(
            f"{run.config} has lost {', '.join(missing)}, which {'has' if len(missing) == 1 else 'have'} a value "
            "since the run was started; restore the file"
        )
    return options


def check_against_checkpoint(
    run: RunFolder, stored: PretrainOptions, sealed: Sealed | None
) -> tuple[dict[str, Any] | None, list[str]]:
    """The manifest with the encoder and science of the checkpoint, which are protected by hashes and fit its weights.

    Args:
        stored: the options in the folder of the run.
        sealed: the state of its newest checkpoint, if it has one.

    Returns:
        The manifest, None if there is neither manifest nor checkpoint to make it from; and a line for each difference.
    """
    manifest, problem = read_or_problem(read_json, run.manifest, "the run's manifest", MANIFEST)
    if sealed is None:
        return manifest, [f"{problem}; it is written again"] if problem else []
    remarks = []
    if manifest is None:
        remarks.append(f"{problem}; it is written again from {sealed.path}, but without records of earlier sessions")
        manifest = {"data": {"folder": "", "fingerprint": sealed.state["science"].get("data")}, "sessions": []}
    true = {name: sealed.state[name] for name in ("encoder", "science")}
    branched = begins_with(manifest, sealed.step, true["science"])
    if branched and isinstance(manifest.get("science"), dict):
        true["science"] = manifest["science"]
    for name, value in true.items():
        if name in manifest and (changed := configuration.differences(value, manifest[name])):
            remarks.append(
                f"the {name} in {run.manifest} differs from that in {sealed.path}, which is used: {'; '.join(changed)}"
            )
    manifest |= {**true, "experiment": configuration.digest(true["science"])}
    if not branched:
        remarks += _config_differences(run, stored, sealed)
    return manifest, remarks


def _config_differences(run: RunFolder, stored: PretrainOptions, sealed: Sealed) -> list[str]:
    """Differences of config.yaml from the options with which the run was started, except science, which is checked
    elsewhere."""
    started = sealed.options(str(run.path))
    if problem := read_or_problem(read_config, run)[1]:
        return [f"{problem}; the options are those in {sealed.path}, and {run.config} is written again"]
    changed = configuration.differences(
        *(non_science_options(options) | {"out": None} for options in (started, stored))
    )
    return [f"{run.config} was changed after the run was started: {'; '.join(changed)}"] if changed else []


def merge(stored: PretrainOptions, given: PretrainOptions) -> tuple[PretrainOptions, list[str]]:
    """Merges the given options with those that the stored run has computed.

    Returns:
        The options, and a line for each machine or bookkeeping option that differs.
    """
    for name in ("tokens", "minutes"):
        value = getattr(given, name)
        if value is not None and value != getattr(stored, name):
            raise UserError(
                f"{name} is fixed when a run starts: this one has {stored.steps} steps; resume without --{name}. "
                f"{longer(RunFolder(Path(stored.out)))}"
            )
    filled = {}
    for name in ("steps", "eval_every", "checkpoint_every"):
        if getattr(given, name) is None:
            filled[name] = getattr(stored, name)
    machine = given.machine
    if machine.micro_batch_size is None:
        machine = replace(machine, micro_batch_size=stored.machine.micro_batch_size)
    if stored.init_from is not None:  # the encoder's shape came with the weights
        untouched = [f.name for f in fields(EncoderOptions) if getattr(given.encoder, f.name) == f.default]
        filled["encoder"] = replace(given.encoder, **{name: getattr(stored.encoder, name) for name in untouched})
    merged = replace(
        given,
        **filled,
        schedule=_same_phases(stored, given.schedule),
        **SINGLE_CALL_OPTIONS,
        machine=machine,
        out=stored.out,
        tokens=stored.tokens,
        minutes=stored.minutes,
    )
    return merged, configuration.differences(non_science_options(stored), non_science_options(merged))


def _same_phases(stored: PretrainOptions, given: PretrainScheduleOptions) -> PretrainScheduleOptions:
    """The `given` schedule with defaults set. Phases of the infinite schedule that are given as fractions, as in the
    YAML file of the start, are those of the run: they became numbers of steps when it started."""
    if given.name == stored.schedule.name == "infinite":
        fractions = [name for name in PHASES if getattr(given, name) < 1]
        before = {name: getattr(stored.schedule, name) for name in fractions}
        for name in fractions:
            if getattr(resolved(given, stored.steps), name) != before[name]:
                echo(f"schedule.{name} is fixed when a run starts: this one has {before[name]:g} steps")
        given = replace(given, **before)
    return resolved(given, stored.steps)


def non_science_options(options: PretrainOptions) -> dict[str, Any]:
    """Values of the machine and bookkeeping options by name."""
    return {leaf.name: leaf.value for leaf in configuration.leaves(options) if leaf.role != "science"}


def check_same_experiment(
    run: RunFolder,
    expected: dict[str, Any],
    science: dict[str, Any],
    stored: dict[str, Any],
    not_lengthened: str | None = None,
) -> None:
    """Checks that `science` equals that of the run.

    Args:
        expected: science of the run.
        stored: science of the options in config.yaml.
        not_lengthened: reason why the run cannot have more steps, with the way out.

    Raises:
        UserError: they differ; the message lists the differences.
    """
    changed = configuration.differences(expected, science)
    if not changed:
        return
    lines = LINE.join(changed)
    edited = [name for name in science if name != "data" and science[name] == stored.get(name) != expected.get(name)]
    if edited and expected.items() <= science.items():
        fix = (
            f"The run has no {', '.join(edited)}: it was started by an older version of fastbert, which can finish it, "
            f"or {run.config} was changed after the start"
        )
    elif edited:
        fix = f"{run.config} was changed after the run was started: restore {', '.join(edited)}"
    elif expected.get("data") != science.get("data") and len(changed) == 1:
        fix = (
            "The data differs from that of the run: resume with --data (and --replay.data, if it was given) and the "
            "folder with which the run was started"
        )
    elif expected | {"steps": 0} == science | {"steps": 0}:
        fix = not_lengthened or f"A run is not shortened: resume without --steps. {longer(run)}"
    else:
        fix = "Resume with the options of the run (--resume alone uses them)"
    end = "" if fix.endswith(longer(run)) or fix == not_lengthened else ", or start a new run with another --out"
    raise UserError(
        f"the run in {run.path} is another experiment; resuming would mix the two. Differences:{LINE}{lines}{LINE}"
        f"{fix}{end}"
    )


def longer(run: RunFolder) -> str:
    """Advice for training longer than a run that cannot be lengthened."""
    return f"To train longer, start a new run from its weights: --init-from {run.path} with another --out"


def session(step: int, seconds: float, machine: dict[str, Any], resolved: dict[str, Any]) -> dict[str, Any]:
    """Entry of the manifest for a session that starts at `step`, after `seconds` of training in earlier ones."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"started": started, "from_step": step, "from_seconds": seconds, "machine": machine, "resolved": resolved}
