"""`fastbert predict`: labels and probabilities of a fine-tuned model, for a task's split or for new text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.data.formats import COMPRESSIONS
from fastbert.data.tokenizer import WordPiece
from fastbert.errors import UserError, choose
from fastbert.finetuning.batches import EncodedSplit, reading_order
from fastbert.finetuning.custom import CustomSource
from fastbert.finetuning.model import TaskModel
from fastbert.finetuning.options import PredictOptions
from fastbert.finetuning.rows import Example
from fastbert.finetuning.saved import TaskRecord, load_task_model
from fastbert.finetuning.tasks import Task, open_task
from fastbert.outputs import check_output_file, is_standard_output, output_file
from fastbert.progress import progress
from fastbert.records import json_text
from fastbert.streams import echo
from fastbert.training.hardware import autocast, resolve_device, resolve_precision, setup_machine

BATCH = 64  # examples in one forward pass, unless machine.micro_batch_size says otherwise

COLUMNS = (".conll", ".bio", ".iob", ".iob2")
COLUMNS_OF_WORDS = (*COLUMNS, ".tsv", ".txt")
"""Where words have labels: what is read as columns is written as columns."""


@dataclass(frozen=True)
class Inputs:
    """A split as a model reads it: once, or in both orders of its pairs."""

    examples: Sequence[Example]
    orders: tuple[EncodedSplit, ...]

    @property
    def truncated(self) -> int:
        return self.orders[0].truncated

    @property
    def labels(self) -> list[Any]:
        """Of the examples."""
        return [example.label for example in self.examples]

    def scored(self, scores: np.ndarray) -> Iterator[tuple[Example, np.ndarray]]:
        """Each example with its part of the scores, [U, ...]."""
        return zip(self.examples, self.orders[0].of_examples(scores), strict=True)


@progress("tokenizing")
def encode_inputs(examples: Sequence[Example], vocabulary: WordPiece, record: TaskRecord) -> Inputs:
    settings = (vocabulary, record.max_length)
    orders = [record.kind.encode(examples, *settings)]
    if record.both_orders:
        orders.append(record.kind.encode([replace(e, text=e.pair, pair=e.text) for e in examples], *settings))
    return Inputs(examples, tuple(orders))


@torch.no_grad()
def predict_scores(
    model: TaskModel, head: str, inputs: Inputs, *, precision: str, batch_size: int = BATCH
) -> np.ndarray:
    """The scores that a head gives, float64 [U, ...]: the mean over the orders that are read."""
    kind, device = model.kinds[head], next(model.parameters()).device
    out = np.zeros((len(inputs.orders[0].units_in(np.arange(len(inputs.orders[0])))), *kind.score_shape()))
    with progress("scoring", sum(map(len, inputs.orders)), "inputs") as shown:
        for encoded in inputs.orders:
            for rows in reading_order(encoded.lengths, batch_size):
                batch = encoded.batch(rows, device)
                with autocast(device, precision):
                    logits = model(batch, head)
                scores = kind.scores(logits if batch.scored is None else logits[batch.scored])
                out[encoded.units_in(rows)] += scores.cpu().numpy() / len(inputs.orders)
                shown.update(shown.done + len(rows))
    return out


def predict(options: PredictOptions) -> dict[str, Any]:
    """Writes a line for each example; prints, and returns, where and, if the split has labels, how good they are.

    Raises:
        UserError: no such model, task or text; a task with other labels than the model's; a pair that is missing;
            scores that are not finite.
    """
    device = resolve_device(options.machine.device)
    precision, warning = resolve_precision(options.machine.precision, device)
    if warning:
        echo(warning)
    setup_machine(options.machine, device)
    check_output_file(options.out)
    if Path(options.out).suffix.lower() in (*COMPRESSIONS, ".parquet"):
        raise UserError(f"{options.out}: predictions are JSON lines or CoNLL columns, not compressed; write .jsonl")
    tuned = load_task_model(options.model, options.machine.kernels)
    record = tuned.record
    if is_columns(Path(options.out)) and not record.kind.of_words:
        raise UserError(f"{options.out} would be CoNLL columns, and {options.model} does not label words; write .jsonl")
    task = None
    if options.source is not None:
        split, examples = options.source, read_source(options, record)
    else:
        task = open_task(
            options.task, glue_dir=options.glue_dir, custom=options.custom, glue_subset=options.glue_subset
        )
        check_fits(task, record, options.model)
        task = replace(task, kind=record.kind)  # with what dev has decided
        split = choose("split", options.split, task.splits) if options.split else (*task.dev_splits, *task.splits)[0]
        examples = task.examples(split)
        for warning in task.warnings:
            echo(warning)
    inputs = encode_inputs(examples, tuned.vocabulary, record)
    labelled = task is not None and None not in inputs.labels
    if labelled:
        task.check_scorable(inputs.labels)
    batch_size = options.machine.micro_batch_size or BATCH
    model = tuned.model.to(device)
    values = predict_scores(model, record.task, inputs, precision=precision, batch_size=batch_size)
    check_finite(values, options.model, precision)
    write_predictions(Path(options.out), inputs, values, record)
    result = {"out": options.out, "examples": len(examples), "truncated": inputs.truncated}
    if labelled:
        result |= task.measure(values, inputs.labels)
    figures = "  ".join(f"{k} {v:.4f}" for k, v in result.items() if k not in ("out", "examples", "truncated"))
    write = echo if is_standard_output(options.out) else print  # nothing else among the predictions
    write(f"{options.out}: {len(examples)} predictions for {split}" + (f"  {figures}" if figures else ""))
    if inputs.truncated:
        echo(
            f"{inputs.truncated} {'inputs with words' if record.kind.of_words else 'inputs'} were cut to "
            f"{record.max_length} tokens"
        )
    return result


def is_columns(path: Path) -> bool:
    """Whether predictions in a file of this name are CoNLL columns."""
    return path.suffix.lower() in COLUMNS


def check_finite(values: np.ndarray, model: str | Path, precision: str) -> None:
    """Raises a UserError if not all scores, [U, ...], are finite: they would be neither labels nor numbers."""
    bad = int((~np.isfinite(values)).any(axis=tuple(range(1, values.ndim))).sum())
    if bad:
        remedy = "use another model" if precision == "fp32" else "try --machine.precision fp32"
        raise UserError(f"{bad} of {len(values)} scores of {model} are not finite; {remedy}")


def check_fits(task: Task, record: TaskRecord, model: str) -> None:
    """Raises a UserError if the model's answers are not those of the task."""
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
    """The texts in the file --source; labels in it are passed over.

    Raises:
        UserError: names the line and what is wrong with it.
    """
    pair = (options.custom.pair or "pair") if record.is_pair else None
    custom = replace(options.custom, test=options.source, pair=pair, kind=record.kind.name)
    rows = CustomSource(custom).rows("test", [])
    examples = [Example(index, row.text, row.pair, None, row.words) for index, row in enumerate(rows)]
    if not examples:
        raise UserError(f"{options.source} holds no text")
    return examples


def write_predictions(path: Path, inputs: Inputs, values: np.ndarray, record: TaskRecord) -> None:
    """A line for each example: its index, and what its kind answers; CoNLL columns if the file is called so."""
    columns = record.kind.of_words and path.suffix.lower() in COLUMNS_OF_WORDS
    with output_file(path, "w") as file:
        for example, scores in inputs.scored(values):
            if columns:
                words = (example.text[start:end] for start, end in example.words)
                pairs = zip(words, record.kind.prediction(scores), strict=True)
                file.write("".join(f"{word}\t{tag}\n" for word, tag in pairs) + "\n")
            else:
                row = {"index": example.index, **record.kind.answer(example, scores)}
                file.write(json_text(row, ensure_ascii=False) + "\n")
