"""`fastbert finetune` for one task: several seeds, optionally several fractions of its training split.

out/config.yaml         all options
out/manifest.json       definition of the experiment: options, model, data
out/results.json        metrics of every seed at its best and last epoch, and their summary
out/learning_curve.png  for several fractions
out/seed-0/             config.yaml, metrics.jsonl, events.out.tfevents.*, errors.jsonl, dev_scores.safetensors, model/,
                        result.json (written last); until then checkpoints/, from which the same command continues
out/fraction-0.1/seed-0/    the same for a fraction below 1
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastbert import config as configuration
from fastbert.errors import UserError
from fastbert.files import disk_errors, locked_folder, remove
from fastbert.finetuning.folder import check_other_files, open_folder
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.results import Company, finished, seed_folder, write_results
from fastbert.finetuning.saved import load_encoder
from fastbert.finetuning.seed import CHECKPOINTS, Part, Training, train_seed
from fastbert.finetuning.setup import describe_finetuning, fingerprint_of_weights, prepare_finetuning
from fastbert.outputs import check_output_folder
from fastbert.streams import echo
from fastbert.training.callbacks import Callback
from fastbert.training.interrupts import Interrupts
from fastbert.training.world import ONE_PROCESS, World


def finetune(
    requested: FinetuneOptions,
    world: World = ONE_PROCESS,
    starts: Mapping[int, Path] | None = None,
    after: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
) -> int:
    """Trains all seeds that are not finished, writes and prints the results; returns the exit code.

    Args:
        starts: the fine-tuned model from whose encoder each seed starts, instead of that of the options.
        world: the processes that train each seed together, all of which call this function. The first one reads and
            writes the files in --out.
        after: the trainings of these models, each described by its tasks, for the results.
        callbacks: called by each seed.

    Raises:
        UserError: any user error, before training starts if possible.
    """
    out = Path(requested.out)
    world.first_decides(lambda: check_request(requested, out))
    setup = world.first_before_others(lambda: prepare_finetuning(requested, world))
    for warning in setup.warnings:
        echo(warning)
    experiment = describe_finetuning(setup)
    encoders = {} if starts is None else {seed: load_encoder(folder) for seed, folder in starts.items()}
    if encoders:
        experiment["model"] = {str(seed): fingerprint_of_weights(encoder) for seed, encoder in encoders.items()}
    check_same_on_all_ranks(experiment, world)
    world.connect(setup.device)
    results: dict[float, list[dict[str, Any]]] = {}
    with locked_folder(out) if world.first else nullcontext(), Interrupts(world.size > 1) as interrupts:
        world.first_decides(lambda: open_folder(out, setup, experiment))
        for fraction in setup.options.fractions():
            results[fraction] = []
            for seed in range(requested.first_seed, requested.first_seed + requested.seeds):
                folder = seed_folder(out, fraction, seed)
                result = world.first_decides(partial(finished, folder, setup.task.metrics))
                if result is None:
                    its = replace(setup, pretrained=encoders.get(seed, setup.pretrained))
                    trained = train_seed(Training([Part(its, folder, fraction)]), folder, seed, interrupts, callbacks)
                    result = None if trained is None else trained[0]
                if result is None:
                    echo(f"stopped; the same command continues with {folder}")
                    return interrupts.exit_code
                world.first_decides(partial(remove_checkpoints, folder))
                results[fraction].append(result)
        if world.first:
            found = (results, setup.labels, setup.slices, Company(after=after))
            write_results(setup.options, setup.task, setup.precision, out, *found)
    return 0


def check_request(requested: FinetuneOptions, out: Path) -> None:
    """Raises a UserError if model, task or --out cannot be used."""
    requested.check_inputs()
    check_output_folder(out)
    check_other_files(out)


def check_same_on_all_ranks(experiment: dict[str, Any], world: World) -> None:
    """Raises a UserError if options, model or data of this rank differ from those of the first one."""
    if changed := configuration.differences(world.first_decides(lambda: experiment), experiment):
        raise UserError(
            f"the fine-tuning differs from that of the first process: {'; '.join(changed)}. Start all processes with "
            "the same options, on the same model and data"
        )


def remove_checkpoints(folder: Path) -> None:
    with disk_errors(folder):
        remove(folder / CHECKPOINTS)
