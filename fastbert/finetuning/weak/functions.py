"""Labelling functions: each votes for a label, or abstains, for every example.

A file of functions is a mapping `functions` from names to one of these forms, where LABEL is a label of the task:

    keywords: {LABEL: [word, several words] or file.txt}     the label with the most matches; a tie abstains
    lexicon: words.tsv, score: sum or mean, above: {LABEL: number}, below: {LABEL: number}
    regex: {LABEL: pattern or [pattern, ...]}                 abstains if patterns of several labels are found
    column: name, values: {value: LABEL}                      other values abstain
    predictions: {train: a.jsonl, dev: b.jsonl}, confidence: 0.9, values: {their label: LABEL}

Words and patterns are searched in the text, and in the second text of a pair, without regard to case.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastbert.errors import UserError, brief, nearest
from fastbert.finetuning.patterns import compile_pattern
from fastbert.finetuning.rows import number_in
from fastbert.finetuning.weak.label_models import ABSTAIN
from fastbert.finetuning.weak.lexicons import best_label, matches, read_lexicon, read_words, vocabulary
from fastbert.finetuning.weak.predictions import Predictions, read_predictions
from fastbert.inheritance import read_yaml
from fastbert.inputs import read_text_input

FORMS = ("keywords", "lexicon", "regex", "column", "predictions")
KEYS = {
    "keywords": (),
    "lexicon": ("score", "above", "below"),
    "regex": (),
    "column": ("values",),
    "predictions": ("confidence", "values"),
}
"""Further keys of each form."""


class Item(NamedTuple):
    """One example."""

    where: str
    """File and line, or split and row, for errors."""
    text: str
    pair: str | None
    columns: dict[str, Any]
    """Cells of the columns that functions read."""

    @property
    def whole(self) -> str:
        """Both texts, on two lines."""
        return self.text if self.pair is None else f"{self.text}\n{self.pair}"


Vote = Callable[[Item], int]


@dataclass(frozen=True)
class Function:
    """A labelling function."""

    name: str
    vote: Vote | None = None
    """Label id of an example, or `ABSTAIN`."""
    column: str | None = None
    """Column that it reads."""
    predictions: Predictions | None = None
    """Votes that were read from files, instead of `vote`."""
    where: str = ""
    """File and line, and a colon, for errors."""

    def votes(self, split: str, items: Sequence[Item]) -> np.ndarray:
        """int64 [N]. Raises a UserError if predictions are not those of the items, or Python code fails."""
        if self.predictions is not None:
            try:
                return self.predictions.votes(split, len(items))
            except UserError as error:
                raise UserError(f"{self.where}{error}") from None
        return np.fromiter((self.vote(item) for item in items), np.int64, len(items))


def read_functions(path: str, labels: Sequence[str]) -> list[Function]:
    """The functions in a YAML file; paths in it are relative to the working directory, or else to the file.

    Raises:
        UserError: the file or a function is invalid; the message names the file, the function and its line.
    """
    values, where = read_yaml(path)
    if not isinstance(values, dict) or list(values) != ["functions"] or not isinstance(values["functions"], dict):
        raise UserError(f"{where}: expected a mapping `functions` from names to functions; see fastbert weak-label")
    if not values["functions"]:
        raise UserError(f"{where}: there are no functions; give one or more")
    text = read_text_input(path, "functions file")
    found = []
    for name, spec in values["functions"].items():
        line = _line_of(text, name)
        try:
            function = Reader(name, spec, labels, Path(path).parent).function()
            found.append(replace(function, where=f"{where}{line}: "))
        except UserError as error:
            raise UserError(f"{where}{line}: function {brief(name)}: {error}") from None
    return found


def _line_of(text: str, name: str) -> str:
    """The line that begins with the key `name`, for messages; empty if it is not in this file."""
    key = re.compile(rf"""\s*["']?{re.escape(name)}["']?\s*:""")
    numbers = [number for number, line in enumerate(text.split("\n"), 1) if key.match(line)]
    return f", line {numbers[0]}" if numbers else ""


class Reader:
    """Reads one function from its mapping `spec`."""

    def __init__(self, name: str, spec: Any, labels: Sequence[str], folder: Path) -> None:
        self.name, self.labels, self.folder = name, labels, folder
        if not isinstance(spec, dict) or len(forms := [form for form in FORMS if form in spec]) != 1:
            raise UserError(f"needs exactly one of {', '.join(FORMS)}")
        self.form, self.spec = forms[0], spec
        for key in spec:
            if key != self.form and key not in KEYS[self.form]:
                raise UserError(f"unknown key {brief(key)}; {nearest(key, (self.form, *KEYS[self.form]))}")

    def function(self) -> Function:
        return getattr(self, f"_{self.form}")()

    def _keywords(self) -> Function:
        lists = self.by_label(self.spec["keywords"], "keywords")
        tables: dict[str, set[int]] = {}
        for label, given in lists.items():
            if isinstance(given, str):
                given = read_words(self.path(given))
            for word in self.texts(given, "keywords"):
                tables.setdefault(" ".join(word.lower().split()), set()).add(label)
        table = vocabulary(tables)

        def vote(item: Item) -> int:
            counts = [0] * len(self.labels)
            for found in matches(item.whole, table):
                for label in found:
                    counts[label] += 1
            return best_label(counts)

        return Function(self.name, vote)

    def _lexicon(self) -> Function:
        table = vocabulary(read_lexicon(self.path(self.text("lexicon"))))
        score = self.spec.get("score", "sum")
        if score not in ("sum", "mean"):
            raise UserError(f"score must be sum or mean, not {brief(score)}")
        (above, most), (below, least) = self.threshold("above"), self.threshold("below")
        if above is below is None:
            raise UserError("needs above: {LABEL: number}, or below: {LABEL: number}")
        if above is not None and below is not None and least > most:
            raise UserError(f"below has {least:g}, which is larger than {most:g} in above; exchange the numbers")

        def vote(item: Item) -> int:
            scores = list(matches(item.whole, table))
            if not scores:
                return ABSTAIN
            value = sum(scores) / (len(scores) if score == "mean" else 1)
            if above is not None and value > most:
                return above
            return below if below is not None and value < least else ABSTAIN

        return Function(self.name, vote)

    def _regex(self) -> Function:
        patterns = []
        for label, given in self.by_label(self.spec["regex"], "regex").items():
            for pattern in self.texts([given] if isinstance(given, str) else given, "regex"):
                patterns.append((label, compile_pattern(pattern, re.IGNORECASE)))

        def vote(item: Item) -> int:
            found = {label for label, pattern in patterns if pattern.search(item.whole)}
            return found.pop() if len(found) == 1 else ABSTAIN

        return Function(self.name, vote)

    def _column(self) -> Function:
        column, values = self.text("column"), self.values()
        if not values:
            raise UserError("needs values: {value: LABEL}")

        def vote(item: Item) -> int:
            return values.get(cell_text(item.columns[column]), ABSTAIN)

        return Function(self.name, vote, column)

    def _predictions(self) -> Function:
        files, confidence = self.spec["predictions"], self.spec.get("confidence", 0.0)
        if not isinstance(files, dict) or set(files) != {"train", "dev"}:
            raise UserError("predictions needs train: FILE and dev: FILE, written by fastbert predict")
        number = number_in(confidence)
        if number is None or not 0 <= number <= 1:
            raise UserError(f"confidence must be a number from 0 to 1, not {brief(confidence)}")
        values = self.values() or {label: index for index, label in enumerate(self.labels)}
        votes = {
            split: read_predictions(self.path(str(file)), values, number, "values" in self.spec)
            for split, file in files.items()
        }
        return Function(self.name, predictions=Predictions(self.name, files, votes))

    # --- parts of the mapping

    def label(self, name: Any) -> int:
        """The id of a label of the task."""
        name = cell_text(name)
        if name not in self.labels:
            raise UserError(f"the task has no label {brief(name)}; {nearest(str(name), self.labels)}")
        return self.labels.index(name)

    def by_label(self, value: Any, key: str) -> dict[int, Any]:
        if not isinstance(value, dict) or not value:
            raise UserError(f"{key} must be a mapping from labels, such as {{{self.labels[0]}: [...]}}")
        return {self.label(name): item for name, item in value.items()}

    def values(self) -> dict[str, int]:
        """Text of a cell -> label id; empty if the mapping has no `values`."""
        given = self.spec.get("values", {})
        if not isinstance(given, dict):
            raise UserError("values must be a mapping from cells to labels")
        return {cell_text(cell): self.label(name) for cell, name in given.items()}

    def threshold(self, key: str) -> tuple[int | None, float]:
        if key not in self.spec:
            return None, 0.0
        given = self.by_label(self.spec[key], key)
        number = number_in(next(iter(given.values())))
        if len(given) != 1 or number is None or not np.isfinite(number):
            raise UserError(f"{key} must be one label with a number, such as {{{self.labels[0]}: 0.5}}")
        return next(iter(given)), number

    def text(self, key: str) -> str:
        if not isinstance(self.spec[key], str) or not self.spec[key].strip():
            raise UserError(f"{key} must be a text, not {brief(self.spec[key])}")
        return self.spec[key]

    def texts(self, given: Any, key: str) -> list[str]:
        """A list of words or patterns, which may be numbers in YAML."""
        if not isinstance(given, list) or not given:
            raise UserError(f"{key} needs a list for each label, not {brief(given)}")
        if bad := [one for one in given if _is_no_text(one)]:
            empty = isinstance(bad[0], str)
            problem = (
                "an empty text; leave it out" if empty else f"{brief(bad[0])}, which is not a text; put it in quotes"
            )
            raise UserError(f"{key} has {problem}")
        return [str(one) for one in given]

    def path(self, name: str) -> Path:
        inside = self.folder / name  # os.path.exists is false for a name that is too long, where Path.exists raises
        return inside if os.path.exists(inside) and not os.path.exists(name) else Path(name)


def _is_no_text(value: Any) -> bool:
    """True for what no word or pattern is meant by, such as false, as which YAML reads the words no and off."""
    return isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip()


def cell_text(value: Any) -> str | None:
    """The text of a cell: true, 3 and 3.0 as in files of labels."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None else str(value).strip()
