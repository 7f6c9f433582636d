"""`fastbert predict`: labels and probabilities from a fine-tuned model, or from the mean over its seeds."""

from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastbert.data.formats import COMPRESSIONS
from fastbert.errors import UserError, choose
from fastbert.finetuning.custom import CustomSource
from fastbert.finetuning.ensemble import open_ensemble
from fastbert.finetuning.options import PredictOptions
from fastbert.finetuning.rows import Example
from fastbert.finetuning.saved import TaskRecord
from fastbert.finetuning.scoring import BATCH, Inputs, encode_inputs
from fastbert.finetuning.tasks import Task, open_task
from fastbert.outputs import check_output_file, is_standard_output, output_file, refuse_input, standard_output
from fastbert.records import json_text
from fastbert.streams import echo
from fastbert.training.hardware import resolve_device, resolve_precision, setup_machine

STANDARD_OUTPUT = "-"
CONLL = (".conll", ".bio", ".iob", ".iob2")
CONLL_OF_WORDS = (*CONLL, ".tsv", ".txt")
"""Suffixes of files with CoNLL columns where words have labels, the same for input and output."""


def predict(options: PredictOptions) -> dict[str, Any]:
    """Writes one line for each example; prints and returns the number of examples and, if the split has labels, the
    metrics.

    Raises:
        UserError: no such model, task or text; a task with other labels than the model; a missing pair; scores that are
            not finite; seeds that cannot be averaged.
    """
    machine = options.machine
    device = resolve_device(machine.device)
    precision, warning = resolve_precision(machine.precision, device)
    if warning:
        echo(warning)
    setup_machine(machine, device)
    check_predictions_file(options.out)
    ensemble = open_ensemble(options.model)
    record = ensemble.record
    if is_conll(Path(options.out)) and not record.kind.labels_words:
        raise UserError(f"{options.out} would be CoNLL columns, and {options.model} does not label words; write .jsonl")
    if ensemble.seeds:
        averaged = "the mean over the seeds" if len(ensemble.seeds) > 1 else "the model of seed"
        echo(f"{options.model}: {averaged} {', '.join(map(str, ensemble.seeds))}")
    split, examples, task = read_examples(options, record)
    refuse_input(options.out, [options.source] if task is None else [options.task, *task.splits.values()])
    inputs = encode_inputs(examples, ensemble.vocabulary, record)
    labelled = task is not None and None not in inputs.labels
    if labelled:
        task.check_scorable(inputs.labels)
    values = ensemble.scores(inputs, device, precision, machine.micro_batch_size or BATCH, machine.kernels)
    with standard_output("w") if options.out == STANDARD_OUTPUT else output_file(options.out, "w") as file:
        write_predictions(file, inputs, values, record, Path(options.out).suffix.lower() in CONLL_OF_WORDS)
    metrics = task.measure(values, inputs.labels) if labelled else {}
    to_standard_output = options.out == STANDARD_OUTPUT or is_standard_output(options.out)
    figures = "".join(f"  {name} {value:.4f}" for name, value in metrics.items())
    where = "standard output" if options.out == STANDARD_OUTPUT else options.out
    write = echo if to_standard_output else print  # standard output has nothing but the predictions
    write(f"{where}: {len(examples)} predictions for {split}{figures}")
    if inputs.truncated:
        echo(
            f"{inputs.truncated} {'inputs with words' if record.kind.labels_words else 'inputs'} were cut to "
            f"{record.max_length} tokens"
        )
    return {"out": options.out, "examples": len(examples), "truncated": inputs.truncated} | metrics


def check_predictions_file(out: str) -> None:
    """Raises a UserError if predictions cannot be written to `out`."""
    if out != STANDARD_OUTPUT:
        check_output_file(out)
    if Path(out).suffix.lower() in (*COMPRESSIONS, ".parquet"):
        raise UserError(f"{out}: predictions are JSON lines or CoNLL columns, not compressed; write .jsonl")


def is_conll(path: Path) -> bool:
    """True if a file of this name can only contain CoNLL columns."""
    return path.suffix.lower() in CONLL


def read_examples(options: PredictOptions, record: TaskRecord) -> tuple[str, list[Example], Task | None]:
    """Name of the split or the file, its examples, and the task if --task is given."""
    if options.source is not None:
        return options.source, read_source(options, record), None
    task = open_task(options.task, glue_dir=options.glue_dir, custom=options.custom, glue_subset=options.glue_subset)
    check_fits(task, record, options.model)
    task = replace(task, kind=record.kind)  # with the settings fitted to dev
    split = choose("split", options.split, task.splits) if options.split else (*task.dev_splits, *task.splits)[0]
    examples = task.examples(split)
    for warning in task.warnings:
        echo(warning)
    return split, examples, task


def check_fits(task: Task, record: TaskRecord, model: str) -> None:
    """Raises a UserError if the labels of the model differ from those of the task."""
    for what, theirs, ours in (
        ("predicts", task.kind.name, record.kind.name),
        ("has the labels", task.kind.labels, record.kind.labels),
        ("reads pairs:", task.is_pair, record.is_pair),
    ):
        if theirs != ours:
            raise UserError(
                f"{model} was trained on {record.task} and does not fit the task {task.name}, which {what} {theirs}, "
                f"the model {ours}"
            )


def read_source(options: PredictOptions, record: TaskRecord) -> list[Example]:
    """The texts in the file --source; labels in it are ignored.

    Raises:
        UserError: a line is invalid.
    """
    pair = (options.custom.pair or "pair") if record.is_pair else None
    custom = replace(options.custom, test=options.source, pair=pair, kind=record.kind.name)
    rows = CustomSource(custom).rows("test", [])
    examples = [Example(index, row.text, row.pair, None, row.words) for index, row in enumerate(rows)]
    if not examples:
        raise UserError(f"{options.source} holds no text")
    return examples


def write_predictions(file: IO[str], inputs: Inputs, values: np.ndarray, record: TaskRecord, columns: bool) -> None:
    """Writes the index and the prediction of each example as JSON, or, where words have labels, `columns` of CoNLL."""
    for example, scores in inputs.scored(values):
        if columns and record.kind.labels_words:
            words = (example.text[start:end] for start, end in example.words)
            pairs = zip(words, record.kind.prediction(scores), strict=True)
            file.write("".join(f"{word}\t{tag}\n" for word, tag in pairs) + "\n")
        else:
            row = {"index": example.index, **record.kind.prediction_row(example, scores)}
            file.write(json_text(row, ensure_ascii=False) + "\n")
