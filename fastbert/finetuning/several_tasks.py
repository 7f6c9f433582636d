"""`fastbert finetune` for one task, several tasks one after the other, each in its folder, or stages.

out/config.yaml   the options
out/<task>/       the output for one task, see finetune.py; with --stages out/<number>-<task>/
out/glue.md       the table; not with --stages

--together is in together.py.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastbert.config import from_dict, to_dict
from fastbert.finetuning.finetune import finetune
from fastbert.finetuning.folder import check_results_folder, write_options
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.results import seed_folder
from fastbert.finetuning.setup import describe_finetuning, open_encoder, prepare_finetuning
from fastbert.finetuning.tasks import task_names
from fastbert.finetuning.tasks_folder import check_tasks_folder, each_task, write_table
from fastbert.finetuning.together import finetune_together
from fastbert.streams import echo
from fastbert.training.callbacks import Callback
from fastbert.training.launch import join
from fastbert.training.trackers import check_tracker
from fastbert.training.world import World


def finetune_tasks(requested: FinetuneOptions, callbacks: Sequence[Callback] = ()) -> int:
    """Trains one task or several; returns the exit code. Under torchrun, every process calls this function.

    Another call with the same --out trains what is missing: interrupted seeds and additional tasks.

    Raises:
        UserError: any user error, before the first task is trained if possible.
    """
    check_tracker(requested.track)
    names, stages = task_names(requested.task), requested.stage_names()
    with join(requested.machine.timeout) as world:
        if requested.mixture.together:
            return finetune_together(requested, world, callbacks)
        if stages:
            return finetune_stages(requested, stages, world, callbacks)
        if names is None:
            return finetune(requested, world, callbacks=callbacks)
        parts = begin(requested, names, world)
        for number, options in enumerate(parts, 1):
            echo(f"task {number} of {len(parts)}: {options.task}")
            code = finetune(options, world, callbacks=callbacks)
            if code:
                return code
        if world.first:
            write_table(requested, parts)
    return 0


def finetune_stages(
    requested: FinetuneOptions, names: Sequence[str], world: World, callbacks: Sequence[Callback] = ()
) -> int:
    """Trains one task after the other, each seed from the best epoch of the same seed on the task before; returns the
    exit code."""
    parts = begin(requested, names, world, lambda number, task: f"{number}-{task}")
    seeds = range(requested.first_seed, requested.first_seed + requested.seeds)
    starts: dict[int, Path] | None = None
    trained: list[str] = []
    for number, options in enumerate(parts, 1):
        echo(f"stage {number} of {len(parts)}: {options.task}")
        code = finetune(options, world, starts, trained, callbacks)
        if code:
            return code
        starts = {seed: seed_folder(Path(options.out), 1.0, seed) for seed in seeds}
        trained.append(Path(options.out).name.partition("-")[2])
    return 0


def begin(requested: FinetuneOptions, names: Sequence[str], world: World, *folder_name: Any) -> list[FinetuneOptions]:
    """Checks everything, writes the options to --out, and returns those of each task."""
    begun = world.first_decides(partial(check_tasks, requested, names, *folder_name))
    return [from_dict(FinetuneOptions, part, "the options of a task") for part in begun]


def check_tasks(requested: FinetuneOptions, names: Sequence[str], *folder_name: Any) -> list[dict[str, Any]]:
    """Options of each task, for JSON. Reads all model and task files once, since the last task may start hours later.

    Args:
        folder_name: see `each_task`.

    Raises:
        UserError: lists every task that cannot be trained and why, and the others.
    """
    requested.check_inputs()
    out = Path(requested.out)
    check_tasks_folder(requested)
    open_encoder(requested)

    def check(options: FinetuneOptions) -> None:
        setup, folder = prepare_finetuning(options), Path(options.out)
        if folder.is_dir() and not (folder_name and parts):  # later stages start from models that are not there yet
            check_results_folder(folder, setup, describe_finetuning(setup))
        parts.append(options)

    parts: list[FinetuneOptions] = []
    found = each_task(requested, names, check, *folder_name)
    write_options(out, requested)
    return [to_dict(options) for options in found]
