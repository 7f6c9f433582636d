"""`fastbert affinity`: trains all tasks together, probes their affinities, and chooses groups.

out/config.yaml     the options
out/manifest.json   definition of the experiment: options, model, tasks, data
out/affinity.json   matrix with standard errors, groups, cost
out/affinity.png    the matrix as a picture
out/probes.jsonl    every probe
out/metrics.jsonl   losses of the training, also as events.out.tfevents.*
out/checkpoints/    until the training is finished
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastbert import config as configuration
from fastbert.errors import LINE, UserError
from fastbert.files import LOCK, atomic_file, contents, disk_errors, locked_folder, remove
from fastbert.finetuning.affinity.options import AffinityOptions
from fastbert.finetuning.affinity.picture import PICTURE, plot_affinity
from fastbert.finetuning.affinity.results import (
    PROBES,
    RESULTS,
    lines,
    measured,
    read_measured,
    write_probes,
    write_results,
)
from fastbert.finetuning.affinity.run import CHECKPOINTS, train_and_probe
from fastbert.finetuning.affinity.setup import AffinitySetup, describe_affinity, prepare_affinity
from fastbert.outputs import JOB, check_output_folder, refuse_other_job
from fastbert.records import read_sealed, write_sealed
from fastbert.streams import echo
from fastbert.training.hardware import describe_machine
from fastbert.training.interrupts import Interrupts

MANIFEST = "manifest.json"
Next = Callable[[AffinitySetup, dict[str, Any], Interrupts], int]


def affinity(requested: AffinityOptions, after: Next | None = None) -> int:
    """Measures the affinities, unless they are in --out, and chooses the groups; returns the exit code.

    Args:
        after: called with the results, while --out is locked; its exit code is returned.

    Raises:
        UserError: any user error, before training starts if possible.
    """
    out = Path(requested.out)
    check_output_folder(out)
    check_other_files(out)
    setup = prepare_affinity(requested)
    for warning in setup.warnings:
        echo(warning)
    with locked_folder(out), Interrupts() as interrupts:
        open_folder(out, setup)
        if not (out / RESULTS).is_file():
            tuner = train_and_probe(setup, out, interrupts)
            if tuner is None:
                echo(f"stopped; the same command continues with {out}")
                return interrupts.exit_code
            write_probes(out / PROBES, setup, tuner)
            results = measured(setup, tuner)
        else:
            results = read_measured(out / RESULTS)
        content = write_results(out / RESULTS, results, requested)
        with disk_errors(out):
            remove(out / CHECKPOINTS)
        picture = plot_affinity(out / PICTURE, content)
        print("\n".join([*lines(content, out), *([f"  {picture}"] if picture else [])]), flush=True)
        return 0 if after is None else after(setup, content, interrupts)


def check_other_files(out: Path) -> None:
    """Raises a UserError if `out` contains files that are not from this job. A process that is killed before it writes
    the manifest leaves config.yaml and the lock."""
    refuse_other_job(out, "affinity")
    if not out.is_dir() or (out / MANIFEST).is_file():
        return
    if contents(out) - ({"config.yaml"} if (out / LOCK).is_file() else set()):
        raise UserError(f"{out} is not empty and holds no results of fastbert affinity; choose another --out")


def open_folder(out: Path, setup: AffinitySetup) -> None:
    """Writes options and manifest to `out`.

    Raises:
        UserError: `out` contains another experiment.
    """
    check_other_files(out)
    experiment, fix = describe_affinity(setup), "restore it, or choose another --out"
    if (out / MANIFEST).is_file():
        manifest = read_sealed(out / MANIFEST, "the manifest", {"science": dict}, fix)
        if changed := configuration.differences(manifest["science"], experiment):
            differences = LINE.join(changed)
            raise UserError(
                f"{out} holds the results of another experiment. Differences:{LINE}{differences}{LINE}"
                "Give the same options to continue it, or choose another --out"
            )
    with atomic_file(out / "config.yaml", "w") as file:
        file.write(configuration.to_yaml(setup.options))
    record = {JOB: "affinity", "science": experiment, "model": setup.pretrained.source, "machine": describe_machine()}
    write_sealed(out / MANIFEST, record)
