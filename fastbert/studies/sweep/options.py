"""Options of `fastbert sweep`: a YAML file of axes, read strictly, and flags for where and how to run."""

from dataclasses import dataclass, fields
from pathlib import Path

from fastbert.config import from_dict
from fastbert.errors import UserError
from fastbert.finetuning.options import FinetuneOptions
from fastbert.inheritance import read_yaml
from fastbert.studies.engine.options import EngineOptions
from fastbert.studies.shared.grid import (
    AXES,
    RESERVED,
    StudyGrid,
    check_keys,
    read_grid,
    read_list,
    read_mapping,
    read_model,
    read_seeds,
    refuse_duplicates,
    refuse_too_many,
)


@dataclass(frozen=True)
class SweepOptions(EngineOptions):
    """Compare checkpoints by fine-tuning on tasks, over settings and seeds, and zero-shot: `fastbert sweep
    configs/sweep/x.yaml [options]`.

    The YAML file has models (the others are compared with the first), and tasks, evaluate (pairs: minimal pairs, pll: a
    text for the pseudo-log-likelihood; options of `fastbert evaluate`) or both. It may have learning_rates,
    batch_sizes, epochs (lists, or one value), seeds (their number, or a list), threads (of each job; 1), under finetune
    any option of `fastbert finetune`, and the flags below. An entry of tasks may be a mapping with its own axes and
    options: {task: sst2, train_fraction: 0.1, epochs: 3}. The same command resumes a stopped sweep, and runs failed
    jobs again.
    """


def load_sweep(path: str | Path) -> tuple[StudyGrid, SweepOptions]:
    """Reads a YAML file: the grid, and the values of flags that the file sets.

    Raises:
        UserError: states the file, the key, and the expected value.
    """
    values, where = read_yaml(path)
    values = read_mapping(values, where, "models, and tasks or evaluate")
    flags = {f.name for f in fields(SweepOptions)}
    known = {"models", "tasks", "seeds", "threads", "finetune", "evaluate", *AXES, *flags}
    check_keys(values, known, where, "finetune", {f.name for f in fields(FinetuneOptions)}, RESERVED)
    options = from_dict(SweepOptions, {key: value for key, value in values.items() if key in flags}, where)
    if "evaluate" not in values:
        read_list(values, "tasks", where)
    models = tuple(read_model(entry, where) for entry in read_list(values, "models", where))
    grid = read_grid(values, str(path), where, models=models, seeds=read_seeds(values.get("seeds", 1), where))
    if not grid.tasks and "seeds" in values:
        raise UserError(f"{where}: seeds needs fine-tuning, but there are no tasks; add tasks, or leave it out")
    settings = sum(len(task.settings) for task in grid.tasks)
    refuse_too_many(len(models) * (settings * len(grid.seeds) + len(grid.evaluate)), where)
    refuse_duplicates([model.name for model in models], f"{where}: models", "; give one of them a different name")
    refuse_duplicates([str(Path(model.path).resolve()) for model in models], f"{where}: models", "")
    return grid, options
