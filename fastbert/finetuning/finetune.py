"""`fastbert finetune`: one task, several seeds, perhaps several fractions of its training split; results that add up.

out/config.yaml         the options, complete
out/manifest.json       what the experiment is: options, model, data
out/results.json        every seed's metrics at its best and last epoch, and their summary
out/learning_curve.png  where several fractions are trained on
out/seed-0/             config.yaml, metrics.jsonl, events.out.tfevents.*, errors.jsonl, model/, result.json (written
                        last); until then checkpoints/, from which the same command continues
out/fraction-0.1/seed-0/    the same for a fraction below the whole
"""

from pathlib import Path
from typing import Any

from fastbert.files import disk_errors, locked_folder, remove
from fastbert.finetuning.folder import check_others, open_folder
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.results import finished, seed_folder, write_results
from fastbert.finetuning.seed import CHECKPOINTS, train_seed
from fastbert.finetuning.setup import prepare_finetuning
from fastbert.outputs import check_output_folder
from fastbert.streams import echo
from fastbert.training.interrupts import Interrupts


def finetune(asked: FinetuneOptions) -> int:
    """Trains every seed that is not finished yet, writes and prints the results; returns the exit code.

    Raises:
        UserError: anything the user can fix, before training starts if it can be seen then.
    """
    asked.check_inputs()
    check_output_folder(asked.out)
    check_others(Path(asked.out))
    setup = prepare_finetuning(asked)
    for warning in setup.warnings:
        echo(warning)
    out = Path(asked.out)
    results: dict[float, list[dict[str, Any]]] = {}
    with locked_folder(out), Interrupts() as interrupts:
        open_folder(out, setup)
        for fraction in setup.options.fractions():
            results[fraction] = []
            for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
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
