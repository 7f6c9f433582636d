"""`fastbert weak-label`: labels from labelling functions.

out/train.jsonl     the training texts with a vote: text, pair, label, soft (probabilities of the labels), weight (1)
out/dev.jsonl       the labelled dev split
out/task.yaml       the custom task of both, for fastbert finetune
out/table.json      figures of the functions and of the label models; also table.md and table.png
out/manifest.json   options, label model, and hashes of the functions; written last
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastbert.config import to_dict
from fastbert.data.columns import Columns
from fastbert.data.tables import read_rows
from fastbert.errors import UserError, brief
from fastbert.files import atomic_file, contents
from fastbert.finetuning.custom import LABEL, TEXT, CustomSource, CustomTaskOptions
from fastbert.finetuning.kinds.classes import Classes
from fastbert.finetuning.rows import Example
from fastbert.finetuning.tasks import Task, custom_task, is_yaml, open_task
from fastbert.finetuning.weak import table as tables
from fastbert.finetuning.weak.functions import Function, Item, read_functions
from fastbert.finetuning.weak.label_models import ABSTAIN, MODELS, LabelModel, accuracy, fit, hard_labels
from fastbert.finetuning.weak.options import FROM_DEV, WeakLabelOptions
from fastbert.finetuning.weak.python_file import run_python_file
from fastbert.inputs import read_input
from fastbert.outputs import JOB, check_output_folder, output_folder, refuse_other_job, resolved
from fastbert.records import json_text, read_sealed, write_json, write_sealed
from fastbert.streams import echo

PAIR, SOFT, WEIGHT = "pair", "soft", "weight"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Texts:
    """The texts to label and the labelled dev split of a task."""

    task: Task
    labels: tuple[str, ...]
    source: CustomSource | None
    """Files of a custom task; None for GLUE."""
    train: list[Example]
    dev: list[Example]
    dev_split: str

    def items(self, split: str, columns: Sequence[str]) -> list[Item]:
        """Examples of train or dev with the cells of `columns`.

        Raises:
            UserError: a column is missing.
        """
        examples = self.train if split == "train" else self.dev
        if not columns:
            return [Item(f"{split} row {e.index + 1}", e.text, e.pair, {}) for e in examples]
        if self.source is None:
            raise UserError(
                f"the task {self.task.name} is a GLUE task, whose columns functions cannot read: {', '.join(columns)}; "
                "write it as a custom task"
            )
        wanted = Columns(
            (self.source.options.text or TEXT,), others=tuple(columns), remedy="fix the column of the function"
        )
        rows = read_rows(self.source.paths[split], wanted)
        return [
            Item(where, example.text, example.pair, dict(zip(columns, cells[1:], strict=True)))
            for example, (_, where, cells) in zip(examples, rows, strict=True)
        ]


def weak_label(options: WeakLabelOptions) -> None:
    """Labels the training texts and writes --out, or prints the worth of earlier results.

    Raises:
        UserError: any user error, before anything is written.
    """
    if options.worth:
        from fastbert.finetuning.weak.worth import print_worth  # imports torch, which labelling does not need

        print_worth(*map(Path, options.worth))
        return
    out = Path(options.out)
    check_output_folder(out)
    check_earlier(out)
    texts = open_texts(options)
    balance = balance_of(options, texts)
    functions = open_functions(options, texts.labels)
    columns = list(dict.fromkeys(function.column for function in functions if function.column is not None))
    votes = {}
    for split in ("train", "dev"):
        items = texts.items(split, columns)
        votes[split] = np.stack([function.votes(split, items) for function in functions], axis=1)
    for function, column in zip(functions, votes["train"].T, strict=True):
        if (column == ABSTAIN).all():
            raise UserError(
                f"{function.where}function {brief(function.name)} votes for none of the {len(column):,} training "
                "examples; fix or remove it"
            )
    gold = np.array([example.label for example in texts.dev])
    names = [function.name for function in functions]
    table = tables.describe(names, votes["train"], votes["dev"], gold)
    model, figures, messages = choose_model(options.combine, votes, gold, len(texts.labels), balance, names)
    table |= {"labels": list(texts.labels), "dev_split": texts.dev_split, "models": figures, "used": model.name}
    messages = [*tables.warnings(table, votes["train"], texts.labels), *messages]
    rows = labelled_rows(texts, model.probabilities(votes["train"]), (votes["train"] != ABSTAIN).any(axis=1))
    if not rows:
        raise UserError("no training example has a label: all votes are tied; add functions")
    for label in texts.labels:
        if all(row[LABEL] != label for row in rows):
            messages.append(f"no training example gets the label {label}, so a model cannot learn it; add functions")
    with output_folder(out, "train.jsonl", MANIFEST) as folder:
        write_rows(folder / "train.jsonl", rows)
        write_rows(folder / "dev.jsonl", [row_of(texts, example, example.label) for example in texts.dev])
        write_task(folder / "task.yaml", texts, resolved(out))
        write_json(folder / "table.json", table)
        with atomic_file(folder / "table.md", "w") as file:
            file.write(tables.markdown(table, messages))
        tables.plot(folder / "table.png", table)
        write_manifest(folder / MANIFEST, options, table, len(rows))
    print("\n".join([f"{texts.task.name}: {len(functions)} labelling functions", *tables.table_lines(table)]))
    if options.combine == "best":
        print(f"  {model.name} is used: no other label model is more accurate on the {len(gold):,} dev examples")
    print(f"  {out / 'train.jsonl'}: {len(rows):,} of {len(texts.train):,} examples have a label")
    print(f"  fastbert finetune --task {out / 'task.yaml'} ... trains on them")
    for message in messages:
        echo(message)


def check_earlier(out: Path) -> None:
    """Raises a UserError if `out` contains files that are not from an earlier call."""
    refuse_other_job(out, "weak-label")
    if not out.is_dir() or not contents(out):
        return
    if (out / MANIFEST).is_file():
        read_sealed(out / MANIFEST, "the manifest", {"weak_labels": dict}, "choose another --out")
    else:
        raise UserError(f"{out} is not empty and holds no weak labels; choose another --out")


def open_texts(options: WeakLabelOptions) -> Texts:
    """Opens the task. If the labels of a custom task are named, its train needs no column of labels.

    Raises:
        UserError: the task is not one of classes, lacks train or dev, or a row is invalid.
    """
    declared = custom_task(options.task, None)
    if declared is None:
        task, source, split = (
            open_task(options.task, glue_dir=options.glue_dir, glue_subset=options.glue_subset),
            None,
            "train",
        )
    else:
        custom, folder, _ = declared
        if custom.kind != Classes.name:
            raise UserError(f"the task {options.task} has kind {custom.kind}, and labelling functions vote for classes")
        source = CustomSource(custom, folder)
        if missing := {"train", "dev"} - source.paths.keys():
            raise UserError(f"the task {options.task} has no {min(missing)} file, and weak-label needs train and dev")
        files = {name: str(path) for name, path in source.paths.items() if name != "test"}
        name = custom.name or (Path(options.task).stem if is_yaml(options.task) else options.task)
        custom = replace(custom, name=name, test=None, soft=None, weight=None, **files)
        if custom.labels is not None:  # as in test, labels may be missing
            custom, split = replace(custom, train=None, test=files["train"]), "test"
        else:
            split = "train"
        task = open_task("weak-label", custom=custom)
    if not isinstance(task.kind, Classes):
        raise UserError(f"the task {task.name} has kind {task.kind.name}, and labelling functions vote for classes")
    if not task.dev_splits:
        raise UserError(f"the task {task.name} has no dev split, on which the functions are measured; choose another")
    dev_split = task.dev_splits[0]
    texts = Texts(task, task.kind.labels, source, task.examples(split), task.examples(dev_split), dev_split)
    for warning in task.warnings:
        echo(warning)
    return texts


def balance_of(options: WeakLabelOptions, texts: Texts) -> np.ndarray | None:
    """The fraction of each label [K]; None if it is to be estimated from the votes.

    Raises:
        UserError: --balance has another number of labels, or a label is missing in dev.
    """
    given = options.given_balance()
    if given is not None:
        if len(given) != len(texts.labels):
            raise UserError(
                f"--balance has {len(given)} numbers, and the task has {len(texts.labels)} labels: "
                f"{', '.join(texts.labels)}; give one for each"
            )
        return np.array(given)
    if options.balance != FROM_DEV:
        return None
    counts = np.bincount([example.label for example in texts.dev], minlength=len(texts.labels))
    if not counts.all():
        label = texts.labels[int(counts.argmin())]
        raise UserError(f"dev has no example of {label!r}; give --balance estimate, or the fraction of each label")
    return counts / counts.sum()


def open_functions(options: WeakLabelOptions, labels: Sequence[str]) -> list[Function]:
    """The functions of both files. Raises a UserError if two have the same name."""
    functions = read_functions(options.functions, labels) if options.functions is not None else []
    names = {function.name for function in functions}
    if options.run_python is not None:
        functions += run_python_file(options.run_python, labels)
        if twice := [function.name for function in functions[len(names) :] if function.name in names]:
            raise UserError(
                f"{options.functions} and {options.run_python} both have a function {twice[0]!r}; rename one of them"
            )
    return functions


def choose_model(
    combine: str,
    votes: dict[str, np.ndarray],
    gold: np.ndarray,
    labels: int,
    balance: np.ndarray | None,
    names: Sequence[str],
) -> tuple[LabelModel, list[dict[str, Any]], list[str]]:
    """The label model to use, the figures of all that can be fitted, and messages. For best, the models are compared on
    dev, the simplest one first; `names` are those of the functions."""
    fitted, figures, messages = {}, [], []
    for name in MODELS:
        try:
            model = fitted[name] = fit(name, votes["train"], labels, balance, names)
        except UserError as error:
            if name == combine:
                raise
            messages.append(f"not fitted: {error}")
            continue
        estimated = None if model.accuracies is None else model.accuracies.tolist()
        value = accuracy(model.probabilities(votes["dev"]), gold)
        figures.append(
            {"name": name, "dev_accuracy": value, "balance": model.balance.tolist(), "accuracies": estimated}
        )
    if combine != "best":
        return fitted[combine], figures, messages
    best = max(figures, key=lambda figure: figure["dev_accuracy"])  # the first of equal ones: majority
    return fitted[best["name"]], figures, messages


def labelled_rows(texts: Texts, probabilities: np.ndarray, voted: np.ndarray) -> list[dict[str, Any]]:
    """Rows of the training examples with a vote whose label is not tied."""
    return [
        row_of(texts, example, label) | {SOFT: [round(float(value), 6) for value in soft], WEIGHT: 1.0}
        for example, label, soft, has_vote in zip(
            texts.train, hard_labels(probabilities).tolist(), probabilities, voted, strict=True
        )
        if has_vote and label != ABSTAIN
    ]


def row_of(texts: Texts, example: Example, label: int) -> dict[str, Any]:
    pair = {} if example.pair is None else {PAIR: example.pair}
    return {TEXT: example.text, **pair, LABEL: texts.labels[label]}


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with atomic_file(path, "w") as file:
        for row in rows:
            file.write(json_text(row, ensure_ascii=False) + "\n")


def write_task(path: Path, texts: Texts, out: Path) -> None:
    """Writes the custom task of train.jsonl and dev.jsonl in `out`. Their paths are absolute, since a file of the same
    name in the working directory would be preferred."""
    task = texts.task
    options = CustomTaskOptions(
        name=f"{task.name}-weak",
        train=str(out / "train.jsonl"),
        dev=str(out / "dev.jsonl"),
        pair=PAIR if task.is_pair else None,
        soft=SOFT,
        weight=WEIGHT,
        labels=",".join(f'"{label}"' if "," in label else label for label in texts.labels),
        metrics=",".join(task.metrics),
        symmetric=task.symmetric,
    )
    given = {name: value for name, value in to_dict(options).items() if value not in (None, False)}
    with atomic_file(path, "w") as file:
        file.write(yaml.safe_dump(given, sort_keys=False, allow_unicode=True))


def write_manifest(path: Path, options: WeakLabelOptions, table: dict[str, Any], rows: int) -> None:
    files = [one for one in (options.functions, options.run_python) if one is not None]
    hashes = {one: hashlib.sha256(read_input(one)).hexdigest() for one in files}
    record = {"options": to_dict(options), "used": table["used"], "train_examples": rows, "sha256": hashes}
    write_sealed(path, {JOB: "weak-label", "weak_labels": record})
