"""Options of `fastbert sweep`: a YAML file of axes, read strictly, and flags for where and how to run."""

from dataclasses import dataclass, fields
from pathlib import Path

from fastbert.config import from_dict
from fastbert.finetuning.options import FinetuneOptions
from fastbert.inheritance import read_yaml
from fastbert.studies.engine.options import EngineOptions
from fastbert.studies.shared.grid import (
    AXES,
    RESERVED,
    FinetuneGrid,
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
    """Fine-tune checkpoints on tasks, over settings and seeds: `fastbert sweep configs/sweep/x.yaml [options]`.

    The YAML file has models (the others are compared with the first) and tasks. It may have learning_rates,
    batch_sizes, epochs (lists, or one value), seeds (their number, or a list), threads (of each job; 1), under finetune
    any option of `fastbert finetune`, and the flags below. An entry of tasks may be a mapping with its own axes and
    options: {task: sst2, train_fraction: 0.1, epochs: 3}. The same command resumes a stopped sweep, and runs failed
    jobs again.
    """


def load_sweep(path: str | Path) -> tuple[FinetuneGrid, SweepOptions]:
    """Reads a YAML file: the grid, and the values of flags that the file sets.

    Raises:
        UserError: states the file, the key, and the expected value.
    """
    values, where = read_yaml(path)
    values = read_mapping(values, where, "models and tasks")
    flags = {f.name for f in fields(SweepOptions)}
    known = {"models", "tasks", "seeds", "threads", "finetune", *AXES, *flags}
    check_keys(values, known, where, "finetune", {f.name for f in fields(FinetuneOptions)}, RESERVED)
    options = from_dict(SweepOptions, {key: value for key, value in values.items() if key in flags}, where)
    read_list(values, "tasks", where)
    models = tuple(read_model(entry, where) for entry in read_list(values, "models", where))
    grid = read_grid(values, str(path), where, models=models, seeds=read_seeds(values.get("seeds", 1), where))
    settings = sum(len(task.settings) for task in grid.tasks)
    refuse_too_many(len(models) * settings * len(grid.seeds), where)
    refuse_duplicates([model.name for model in models], f"{where}: models", "; give one of them a different name")
    refuse_duplicates([str(Path(model.path).resolve()) for model in models], f"{where}: models", "")
    return grid, options
