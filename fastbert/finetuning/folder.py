"""The --out of a fine-tuning: a check of its content, and the files that define the experiment."""

from pathlib import Path
from typing import Any

import torch

from fastbert import config as configuration
from fastbert.errors import LINE, UserError
from fastbert.files import LOCK, atomic_file, contents
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.results import finished, seed_folder
from fastbert.finetuning.setup import FinetuneSetup
from fastbert.outputs import JOB, refuse_other_job
from fastbert.records import read_sealed, write_sealed
from fastbert.training.apex import fused_adam
from fastbert.training.hardware import describe_machine
from fastbert.training.optimizers import implementation


def check_results_folder(out: Path, setup: FinetuneSetup, experiment: dict[str, Any]) -> None:
    """Checks that results of `experiment`, described by `setup`, may be written to the existing folder `out`.

    Raises:
        UserError: `out` contains another experiment or other files, or the result of a finished seed is damaged.
    """
    manifest_path = out / "manifest.json"
    if manifest_path.is_file():
        manifest = read_sealed(manifest_path, "the manifest", {"science": dict}, "restore it, or choose another --out")
        changed = configuration.differences(manifest["science"], experiment)
        if changed:
            lines = LINE.join(changed)
            raise UserError(
                f"{out} holds the results of another experiment. Differences:{LINE}{lines}{LINE}"
                "Give the same options to continue it, or choose another --out"
            )
    check_other_files(out)
    options = setup.options
    for fraction in options.fractions():
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            finished(seed_folder(out, fraction, seed), setup.task.metrics)


def check_other_files(out: Path) -> None:
    """Raises a UserError if `out` contains files that are not from a fine-tuning. A process that is killed before it
    writes the manifest leaves config.yaml and the lock, so call this before locking as well."""
    refuse_other_job(out, "finetune")
    if not out.is_dir() or (out / "manifest.json").is_file():
        return
    if contents(out) - ({"config.yaml"} if (out / LOCK).is_file() else set()):
        raise UserError(f"{out} is not empty and holds no results of fastbert finetune; choose another --out")


def open_folder(out: Path, setup: FinetuneSetup, experiment: dict[str, Any]) -> None:
    """Writes options and manifest to `out` after `check_results_folder`."""
    check_results_folder(out, setup, experiment)
    write_options(out, setup.options)
    manifest = {
        JOB: "finetune",
        "experiment": configuration.digest(experiment),
        "science": experiment,
        "model": setup.pretrained.source,
        "machine": describe_machine(),
        "resolved": {
            "device": str(setup.device),
            "precision": setup.precision,
            "threads": torch.get_num_threads(),
            "optimizer": implementation(fused_adam() if setup.options.machine.apex else torch.optim.AdamW),
            **({"processes": setup.world.size} if setup.world.size > 1 else {}),
        },
    }
    write_sealed(out / "manifest.json", manifest)


def write_options(folder: Path, options: FinetuneOptions) -> None:
    with atomic_file(folder / "config.yaml", "w") as file:
        file.write(configuration.to_yaml(options))
