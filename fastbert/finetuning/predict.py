"""`fastbert predict`: labels and probabilities from a fine-tuned model, or from the mean over several."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastbert.data.formats import COMPRESSIONS
from fastbert.errors import UserError, choose
from fastbert.finetuning.averages import mean_of_models
from fastbert.finetuning.custom import TEXT, CustomSource
from fastbert.finetuning.ensemble import Ensemble, open_ensemble
from fastbert.finetuning.kinds.kind import TaskKind
from fastbert.finetuning.options import PredictOptions
from fastbert.finetuning.rows import Example
from fastbert.finetuning.saved import TaskRecord
from fastbert.finetuning.scoring import BATCH, Inputs
from fastbert.finetuning.tasks import Task, open_task
from fastbert.outputs import check_output_file, is_standard_output, output_file, refuse_input, standard_output
from fastbert.records import json_text
from fastbert.report.page import Table
from fastbert.streams import echo
from fastbert.training.hardware import resolve_device, resolve_precision, setup_machine

STANDARD_OUTPUT = "-"
PAIR = "pair"
"""Column of the second text of a pair in files that are written."""
CONLL = (".conll", ".bio", ".iob", ".iob2")
CONLL_OF_WORDS = (*CONLL, ".tsv", ".txt")
"""Suffixes of files with CoNLL columns where words have labels, the same for input and output."""


def predict(options: PredictOptions) -> dict[str, Any]:
    """Writes one line for each example; prints and returns the number of examples and, if the split has labels, the
    metrics; of several models those of each, their mean, and those of the averaged scores.

    Raises:
        UserError: no such model, task or text; a task with other labels than the model; a missing pair; scores that are
            not finite; models that cannot be averaged.
    """
    machine = options.machine
    device = resolve_device(machine.device)
    precision, warning = resolve_precision(machine.precision, device)
    if warning:
        echo(warning)
    setup_machine(machine, device)
    check_predictions_file(options.out)
    ensemble = open_ensemble(options.models())
    columns = ensemble.kind.labels_words and Path(options.out).suffix.lower() in CONLL_OF_WORDS
    if is_conll(Path(options.out)) and not columns:
        raise UserError(f"{options.out} would be CoNLL columns, and {options.model} does not label words; write .jsonl")
    if columns and options.with_text:
        raise UserError(f"{options.out} has CoNLL columns, which contain the words: leave --with-text out")
    if ensemble.title:
        echo(ensemble.title)
    split, examples, task = read_examples(options, ensemble)
    read = [options.source] if task is None else [options.task, *task.splits.values()]
    refuse_input(options.out, [*read, *(file for member in ensemble.members for file in member.folder.iterdir())])
    each = ensemble.encode(examples)
    inputs = each[0]
    labelled = task is not None and None not in inputs.labels
    if labelled:
        task.check_scorable(inputs.labels)
    scores = ensemble.scores(each, device, precision, machine.micro_batch_size or BATCH, machine.kernels)
    values = mean_of_models(scores)
    with standard_output("w") if options.out == STANDARD_OUTPUT else output_file(options.out, "w") as file:
        if columns:
            write_columns(file, inputs, values, ensemble.kind)
        else:
            write_predictions(file, inputs, values, ensemble.kind, options.with_text)
    metrics = task.measure(values, inputs.labels) if labelled else {}
    to_standard_output = options.out == STANDARD_OUTPUT or is_standard_output(options.out)
    figures = "".join(f"  {name} {value:.4f}" for name, value in metrics.items())
    where = "standard output" if options.out == STANDARD_OUTPUT else options.out
    write = echo if to_standard_output else print  # standard output has nothing but the predictions
    write(f"{where}: {len(examples)} predictions for {split}{figures}")
    summary = {"out": options.out, "examples": len(examples), "truncated": max(one.truncated for one in each)} | metrics
    if labelled and len(scores) > 1:
        summary["members"] = members_metrics(ensemble, task, scores, inputs.labels)
        write(members_table(summary["members"], metrics).plain())
    for line in ensemble.cut(each):
        echo(line)
    return summary


def members_metrics(
    ensemble: Ensemble, task: Task, scores: Sequence[np.ndarray], labels: Sequence[Any]
) -> dict[str, dict[str, float]]:
    """Name of each model -> its metrics, with its own settings, such as its thresholds.

    Args:
        scores: of each model, [U, ...].
        labels: the labels of N examples.
    """
    return {
        member.name: replace(task, kind=member.record.kind).measure(values, labels)
        for member, values in zip(ensemble.members, scores, strict=True)
    }


def members_table(members: Mapping[str, Mapping[str, float]], metrics: Mapping[str, float]) -> Table:
    """The metrics of each model, their mean, and those of the ensemble."""
    mean = {name: statistics.fmean(its[name] for its in members.values()) for name in metrics}
    rows = {**members, f"mean of the {len(members)} models": mean, "ensemble": metrics}
    return Table(["model", *metrics], [[name, *(f"{its[key]:.4f}" for key in metrics)] for name, its in rows.items()])


def check_predictions_file(out: str) -> None:
    """Raises a UserError if predictions cannot be written to `out`."""
    if out != STANDARD_OUTPUT:
        check_output_file(out)
    if Path(out).suffix.lower() in (*COMPRESSIONS, ".parquet"):
        raise UserError(f"{out}: predictions are JSON lines or CoNLL columns, not compressed; write .jsonl")


def is_conll(path: Path) -> bool:
    """True if a file of this name can only contain CoNLL columns."""
    return path.suffix.lower() in CONLL


def read_examples(options: PredictOptions, ensemble: Ensemble) -> tuple[str, list[Example], Task | None]:
    """Name of the split or the file, its examples, and the task if --task is given."""
    if options.source is not None:
        return options.source, read_source(options, ensemble), None
    task = open_task(options.task, glue_dir=options.glue_dir, custom=options.custom, glue_subset=options.glue_subset)
    check_fits(task, ensemble, options.model)
    task = replace(task, kind=ensemble.kind)  # with the settings fitted to dev
    split = choose("split", options.split, task.splits) if options.split else (*task.dev_splits, *task.splits)[0]
    examples = task.examples(split)
    for warning in task.warnings:
        echo(warning)
    return split, examples, task


def check_fits(task: Task, trained: TaskRecord | Ensemble, model: str) -> None:
    """Raises a UserError if the labels of the model differ from those of the task."""
    for what, theirs, ours in (
        ("predicts", task.kind.name, trained.kind.name),
        ("has the labels", task.kind.labels, trained.kind.labels),
        ("reads pairs:", task.is_pair, trained.is_pair),
    ):
        if theirs != ours:
            raise UserError(
                f"{model} was trained on {trained.task} and does not fit the task {task.name}, which {what} {theirs}, "
                f"the model {ours}"
            )


def read_source(options: PredictOptions, ensemble: Ensemble) -> list[Example]:
    """The texts in the file --source; labels in it are ignored.

    Raises:
        UserError: a line is invalid.
    """
    pair = (options.custom.pair or PAIR) if ensemble.is_pair else None
    custom = replace(options.custom, test=options.source, pair=pair, kind=ensemble.kind.name)
    rows = CustomSource(custom).rows("test", [])
    examples = [Example(index, row.text, row.pair, None, row.words) for index, row in enumerate(rows)]
    if not examples:
        raise UserError(f"{options.source} holds no text")
    return examples


def write_predictions(file: IO[str], inputs: Inputs, values: np.ndarray, kind: TaskKind, with_text: bool) -> None:
    """Writes the index and the prediction of each example as JSON, and its label and texts if they are requested."""
    for example, scores in inputs.scored(values):
        row = {"index": example.index}
        if with_text:
            row |= {} if example.label is None else {"expected": kind.file_label(example)}
            row |= {TEXT: example.text} | ({} if example.pair is None else {PAIR: example.pair})
        file.write(json_text(row | kind.prediction_row(example, scores), ensure_ascii=False) + "\n")


def write_columns(file: IO[str], inputs: Inputs, values: np.ndarray, kind: TaskKind) -> None:
    """Writes words and tags as CoNLL columns."""
    for example, scores in inputs.scored(values):
        words = (example.text[start:end] for start, end in example.words)
        pairs = zip(words, kind.prediction(scores), strict=True)
        file.write("".join(f"{word}\t{tag}\n" for word, tag in pairs) + "\n")
