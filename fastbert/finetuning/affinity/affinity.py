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

from fastbert.files import disk_errors, locked_folder, remove
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
from fastbert.finetuning.job_folder import check_other_files, open_job_folder
from fastbert.outputs import check_output_folder
from fastbert.streams import echo
from fastbert.training.interrupts import Interrupts

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
    check_other_files(out, "affinity")
    setup = prepare_affinity(requested)
    for warning in setup.warnings:
        echo(warning)
    with locked_folder(out), Interrupts() as interrupts:
        open_job_folder(out, "affinity", setup.options, describe_affinity(setup), setup.pretrained.source)
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
