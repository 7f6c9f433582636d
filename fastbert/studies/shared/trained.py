"""Tables of the encoders, tasks and fine-tuning options of a study, so that its page is self-contained."""

from collections.abc import Mapping, Sequence

from fastbert.finetuning.setup import FinetuneSetup
from fastbert.hub.load import Pretrained
from fastbert.model.config import EncoderConfig
from fastbert.report.page import Table
from fastbert.studies.engine.jobs import Job
from fastbert.studies.shared.report import short_count

Columns = Mapping[str, str]
"""Column header -> cell."""

_TUNING = {
    "learning rate": "learning_rate",
    "batch size": "batch_size",
    "epochs": "epochs",
    "schedule": "schedule.name",
    "warm-up": "schedule.warmup",
    "weight decay": "weight_decay",
    "layer-wise learning rate decay": "layer_decay",
    "dropout": "dropout",
    "gradient clipping norm": "clip_norm",
    "maximum input length in tokens": "max_length",
    "CPU threads of a job": "threads",
}


def shown_size(config: EncoderConfig) -> str:
    return f"{config.layers} x {config.width}"


def encoder_columns(pretrained: Pretrained) -> Columns:
    """Columns of a table of encoders."""
    weights = {tensor.data_ptr(): tensor for name, tensor in pretrained.weights.items() if name.startswith("encoder.")}
    facts = pretrained.facts
    pretraining = [str(facts["objective"])] if "objective" in facts else []
    pretraining += [f"{short_count(facts[name])} {name}" for name in ("steps", "tokens") if name in facts]
    return {
        "layers x width": shown_size(pretrained.config),
        "heads": f"{pretrained.config.heads}",
        "positions": pretrained.config.position,
        "parameters": short_count(sum(tensor.numel() for tensor in weights.values())),
        "pretraining": ", ".join(pretraining) or f"unknown: {pretrained.source}",
    }


def task_columns(setup: FinetuneSetup) -> Columns:
    """Columns of a table of tasks."""
    return {
        "kind": setup.task.kind.name,
        "metric": setup.task.metrics[0],
        "training examples": f"{len(setup.train):,}",
        "dev examples": " + ".join(f"{len(inputs.examples):,}" for inputs in setup.dev.values()),
    }


def columns_table(first: str, rows: Mapping[str, Columns]) -> Table:
    """A table with one line for each entry of `rows`, whose names are in the column `first`."""
    head = next(iter(rows.values()))
    return Table([first, *head], [[name, *(columns[column] for column in head)] for name, columns in rows.items()])


def tuning_table(jobs: Sequence[Job]) -> Table:
    """The options of fine-tunings; an option that differs between them has several values."""
    rows = [["optimizer", "AdamW"]]
    for name, option in _TUNING.items():
        values = {job.identity[option]: None for job in jobs if option in job.identity}
        if values:
            rows.append([name, ", ".join(f"{value:g}" if isinstance(value, float) else f"{value}" for value in values)])
    seeds = sorted({job.identity["seed"] for job in jobs})
    return Table(["fine-tuning", "value"], [*rows, ["seeds", ", ".join(map(str, seeds))]])
