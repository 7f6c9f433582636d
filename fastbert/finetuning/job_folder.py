"""The --out of a job that trains and continues where it stopped: options, manifest, and refusals of other folders."""

from pathlib import Path
from typing import Any

from fastbert import config as configuration
from fastbert.errors import LINE, UserError
from fastbert.files import LOCK, atomic_file, contents
from fastbert.outputs import JOB, refuse_other_job
from fastbert.records import read_sealed, write_sealed
from fastbert.training.hardware import describe_machine

MANIFEST = "manifest.json"


def check_other_files(out: Path, job: str) -> None:
    """Raises a UserError if `out` contains files that are not from `fastbert JOB`. A process that is killed before it
    writes the manifest leaves config.yaml and the lock."""
    refuse_other_job(out, job)
    if not out.is_dir() or (out / MANIFEST).is_file():
        return
    if contents(out) - ({"config.yaml"} if (out / LOCK).is_file() else set()):
        raise UserError(f"{out} is not empty and holds no results of fastbert {job}; choose another --out")


def open_job_folder(out: Path, job: str, options: Any, experiment: dict[str, Any], model: str) -> None:
    """Writes options and manifest to `out`.

    Args:
        experiment: everything on which the results depend, by name.
        model: the source of the weights.

    Raises:
        UserError: `out` contains another experiment.
    """
    check_other_files(out, job)
    if (out / MANIFEST).is_file():
        fix = "restore it, or choose another --out"
        manifest = read_sealed(out / MANIFEST, "the manifest", {"science": dict}, fix)
        if changed := configuration.differences(manifest["science"], experiment):
            differences = LINE.join(changed)
            raise UserError(
                f"{out} holds the results of another experiment. Differences:{LINE}{differences}{LINE}"
                "Give the same options to continue it, or choose another --out"
            )
    with atomic_file(out / "config.yaml", "w") as file:
        file.write(configuration.to_yaml(options))
    write_sealed(out / MANIFEST, {JOB: job, "science": experiment, "model": model, "machine": describe_machine()})
