"""The folder of a run: what is written there before training, and what a resumed run is held against.

config.yaml      all options, complete
manifest.json    the experiment's name and science, data, model, and each session's machine
tokenizer/       the tokenizer of its data
metrics.jsonl, tensorboard/, checkpoints/, model/, report/, with --profile profile/
"""

import datetime
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastbert import config as configuration
from fastbert.errors import UserError
from fastbert.files import LOCK, atomic_file, atomic_folder, contents, disk_errors, write_json
from fastbert.model.config import EncoderOptions
from fastbert.outputs import check_output_folder
from fastbert.pretraining.options import OF_ONE_CALL, PretrainOptions


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def exists(self) -> bool:
        """Whether something is there that a new run must not touch."""
        if not self.path.is_dir():
            return self.path.exists()
        return bool(contents(self.path)) and not self.is_half_made()

    def is_half_made(self) -> bool:
        """Whether a call was killed, or ran out of space, while it wrote what the run is: a folder that fastbert has
        locked, without the manifest, which is written last."""
        there = contents(self.path)
        return bool(there) and there <= {self.config.name, self.tokenizer.name} and (self.path / LOCK).is_file()

    def write(self, options: PretrainOptions, manifest: dict[str, Any], tokenizer: Path) -> None:
        """Writes what the run is, the manifest last: see `is_half_made`.

        Raises:
            UserError: the folder cannot be written.
        """
        with atomic_folder(self.tokenizer) as folder:
            shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
        with atomic_file(self.config, "w") as file:
            file.write(configuration.to_yaml(options))
        write_json(self.manifest, manifest)


def new_folder(out: str | None, name: str) -> RunFolder:
    """The folder for a new run: `out`, or runs/`name`, numbered if that is taken.

    Raises:
        UserError: `out` holds something already, or cannot be written.
    """
    if out is not None:
        run = RunFolder(Path(out))
        with disk_errors(out):
            taken = run.exists()
        if taken:
            what = "a run" if run.config.exists() else "other files"
            raise UserError(f"{out} already holds {what}; go on with --resume {out}, or choose another --out")
    else:
        number, run = 1, RunFolder(Path("runs") / name)
        while run.exists():
            number += 1
            run = RunFolder(Path("runs") / f"{name}-{number}")
    check_output_folder(run.path)
    return run


def stored_options(out: str | None) -> PretrainOptions:
    """The options of the run to resume.

    Raises:
        UserError: there is no such run.
    """
    if out is None:
        raise UserError("--resume needs the run's folder: --resume runs/x, or --out runs/x --resume")
    run = RunFolder(Path(out))
    if run.path.is_dir() and run.is_half_made():
        raise UserError(
            f"the run in {out} was stopped while its folder was being made, before its first step; start it again with "
            "the same command and --out, without --resume"
        )
    if not run.config.exists():
        raise UserError(f"there is no run to resume in {out} (no {run.config}); leave --resume out to start one")
    return configuration.load_yaml(PretrainOptions, run.config)


def merge(stored: PretrainOptions, asked: PretrainOptions) -> tuple[PretrainOptions, list[str]]:
    """The options to go on with: those asked for, with what the stored run had worked out for itself filled in.

    Returns:
        options, and a line for each machine or bookkeeping option that differs.
    """
    for name in ("tokens", "minutes"):
        value = getattr(asked, name)
        if value is not None and value != getattr(stored, name):
            raise UserError(
                f"{name} is fixed when a run starts: this one has {stored.steps} steps; resume without --{name}, "
                "or start a new run with another --out"
            )
    filled = {}
    for name in ("steps", "eval_every", "checkpoint_every"):
        if getattr(asked, name) is None:
            filled[name] = getattr(stored, name)
    machine = asked.machine
    if machine.micro_batch_size is None:
        machine = replace(machine, micro_batch_size=stored.machine.micro_batch_size)
    if stored.init_from is not None:  # the encoder's shape came with the weights
        untouched = [f.name for f in fields(EncoderOptions) if getattr(asked.encoder, f.name) == f.default]
        filled["encoder"] = replace(asked.encoder, **{name: getattr(stored.encoder, name) for name in untouched})
    merged = replace(
        asked,
        **filled,
        **OF_ONE_CALL,
        machine=machine,
        out=stored.out,
        tokens=stored.tokens,
        minutes=stored.minutes,
    )
    roles = {leaf.name: leaf.role for leaf in configuration.leaves(merged)}
    old = {leaf.name: leaf.value for leaf in configuration.leaves(stored)}
    new = {leaf.name: leaf.value for leaf in configuration.leaves(merged)}
    changed = [name for name in new if roles[name] != "science" and new[name] != old[name]]
    return merged, configuration.differences({n: old[n] for n in changed}, {n: new[n] for n in changed})


def check_same_experiment(run: RunFolder, manifest: dict[str, Any], science: dict[str, Any]) -> None:
    """Sees to it that the science of the stored manifest is `science`.

    Raises:
        UserError: shows what differs.
    """
    changed = configuration.differences(manifest["science"], science)
    if changed:
        lines = "\n  ".join(changed)
        raise UserError(
            f"the run in {run.path} is another experiment; resuming would mix the two. What differs:\n  {lines}\n"
            "Resume with the run's own options (--resume alone takes them), or start a new run with another --out"
        )


def session(step: int, machine: dict[str, Any], resolved: dict[str, Any]) -> dict[str, Any]:
    """A manifest's entry for one start of the run."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"started": started, "from_step": step, "machine": machine, "resolved": resolved}
