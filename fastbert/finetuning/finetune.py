"""`fastbert finetune` for one task: several seeds, optionally several fractions of its training split.

out/config.yaml         all options
out/manifest.json       definition of the experiment: options, model, data
out/results.json        metrics of every seed at its best and last epoch, and their summary
out/learning_curve.png  for several fractions
out/seed-0/             config.yaml, metrics.jsonl, events.out.tfevents.*, errors.jsonl, model/, result.json (written
                        last); until then checkpoints/, from which the same command continues
out/fraction-0.1/seed-0/    the same for a fraction below 1
"""

from pathlib import Path
from typing import Any

from fastbert.files import disk_errors, locked_folder, remove
from fastbert.finetuning.folder import check_other_files, open_folder
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.results import finished, seed_folder, write_results
from fastbert.finetuning.seed import CHECKPOINTS, train_seed
from fastbert.finetuning.setup import prepare_finetuning
from fastbert.outputs import check_output_folder
from fastbert.streams import echo
from fastbert.training.interrupts import Interrupts


def finetune(requested: FinetuneOptions) -> int:
    """Trains all seeds that are not finished, writes and prints the results; returns the exit code.

    Raises:
        UserError: any user error, before training starts if possible.
    """
    requested.check_inputs()
    check_output_folder(requested.out)
    check_other_files(Path(requested.out))
    setup = prepare_finetuning(requested)
    for warning in setup.warnings:
        echo(warning)
    out = Path(requested.out)
    results: dict[float, list[dict[str, Any]]] = {}
    with locked_folder(out), Interrupts() as interrupts:
        open_folder(out, setup)
        for fraction in setup.options.fractions():
            results[fraction] = []
            for seed in range(requested.first_seed, requested.first_seed + requested.seeds):
                folder = seed_folder(out, fraction, seed)
                result = finished(folder, setup.task.metrics)
                if result is None:
                    result = train_seed(setup, folder, fraction, seed, interrupts)
                if result is None:
                    echo(f"stopped; the same command continues with {folder}")
                    return interrupts.exit_code
                with disk_errors(folder):
                    remove(folder / CHECKPOINTS)
                results[fraction].append(result)
        write_results(setup.options, setup.task, setup.precision, out, results)
    return 0
