"""Rows of texts in which words have labels: CoNLL columns; tables with lists of tokens and tags; texts with spans.

A row has a text, the character range of each word, and a tag for each word; tags from spans are IOB2.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

from fastbert.data import conll
from fastbert.data.columns import Columns
from fastbert.data.formats import TABLES, suffixes
from fastbert.data.parquet import column_names
from fastbert.data.tables import first_keys, read_rows
from fastbert.data.text import clean
from fastbert.errors import UserError, brief
from fastbert.finetuning.rows import Row

OUTSIDE = "O"
COLUMNS = {"tokens": "tags", "text": "spans"}
"""Default names of columns: the column of words -> that of labels."""
# Characters that are separate words in BERT's tokenizer.
_IDEOGRAPH = re.compile(
    "[\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f\U0002b820-\U0002ceaf"
    "\uf900-\ufaff\U0002f800-\U0002fa1f]"
)


def is_conll(path: Path) -> bool:
    return suffixes(path)[0] in conll.SUFFIXES


def check_word_file(path: Path, may_lack_labels: bool) -> None:
    """Raises a UserError if the suffix is not that of a file with labeled words. CSV can only have text."""
    kind = suffixes(path)[0]
    if (kind == ".csv" and not may_lack_labels) or kind not in (*TABLES, *conll.SUFFIXES):
        tables = [suffix for suffix in TABLES if suffix not in (".csv", ".tsv")]
        raise UserError(
            f"{path}: words and their tags are read from CoNLL columns ({', '.join(conll.SUFFIXES)}) or from tables "
            f"with lists ({', '.join(tables)})"
        )


def word_rows(path: Path, text: str | None, label: str | None, may_lack_labels: bool) -> Iterator[Row]:
    """Rows of a file; `Row.label` is a list of tags or None.

    Args:
        text, label: columns; None for the defaults.
        may_lack_labels: rows without labels are allowed.

    Raises:
        UserError: with file, line and remedy.
    """
    check_word_file(path, may_lack_labels)
    if suffixes(path)[0] == ".csv":
        columns = Columns((text or "text",), remedy="choose the column with text (--custom.text)")
        for _, where, (words,) in read_rows(path, columns):
            yield _from_spans(where, words, None, columns)
        return
    if is_conll(path):
        for sentence in conll.read_conll(path, text, label, may_lack_labels):
            where = f"{path}, line {sentence.lines[0]}"
            tags = None if sentence.tags is None else list(sentence.tags)
            yield _from_tokens(where, sentence.words, tags, sentence.lines)
        return
    columns = word_columns(path, text, label, may_lack_labels)
    for _, where, (words, labels) in read_rows(path, columns):
        if isinstance(words, str):
            yield _from_spans(where, words, labels, columns)
        else:
            tokens = _strings(where, words, columns.texts[0], "tokens")
            tags = None if labels is None else _strings(where, labels, columns.label, "tags")
            yield _from_tokens(where, tokens, tags, None)


def word_columns(path: Path, text: str | None, label: str | None, may_lack_labels: bool = False) -> Columns:
    """Columns of a table: those given, otherwise tokens and tags, or text and spans, depending on the first row."""
    there = column_names(path) if suffixes(path)[0] == ".parquet" else first_keys(path)
    if text is None:
        text = next((name for name in COLUMNS if name in there), "tokens")
    label = label or COLUMNS.get(text) or next((name for name in COLUMNS.values() if name in there), "tags")
    return Columns(
        (text,),
        label,
        label_may_lack=may_lack_labels,
        remedy="choose the columns with text and label (--custom.text, --custom.label)",
        class_names=True,
        lists=True,
    )


def where_of(row: Row, index: int) -> str:
    """File and line of the tag of a word, for errors."""
    if row.lines is None:
        return f"{row.where}, tag {index + 1}"
    return f"{row.where.rpartition(', line ')[0]}, line {row.lines[index]}"


def _strings(where: str, values: Any, column: str, what: str) -> list[str]:
    """A cell that is a list of words."""
    if not isinstance(values, list):
        kind = "missing" if values is None else f"{brief(values)}"
        raise UserError(f"{where}: {column!r} is {kind}, no list of {what}; fix the row or name another column")
    for index, value in enumerate(values):
        if not isinstance(value, str):
            hint = "" if what == "tokens" else "; write tags as words, or as Parquet with the names of a ClassLabel"
            raise UserError(f"{where}: {what[:-1]} {index + 1} of {column!r} is {brief(value)}, no text{hint}")
        if what == "tags" and not value.strip():
            raise UserError(f"{where}: tag {index + 1} of {column!r} is empty; write O outside of entities")
    cleaned = [clean(value, where) for value in values]
    return [tag.strip() for tag in cleaned] if what == "tags" else cleaned


def _from_tokens(where: str, tokens: Sequence[str], tags: list[str] | None, lines: tuple[int, ...] | None) -> Row:
    if not tokens:
        raise UserError(f"{where}: the sentence is empty; drop the row")
    if tags is not None and len(tokens) != len(tags):
        raise UserError(f"{where}: {len(tokens)} tokens and {len(tags)} tags; give a tag for every token")
    for index, token in enumerate(tokens):
        if not token.strip():
            raise UserError(f"{where}: token {index + 1} is empty; drop it and its tag")
        if "\t" in token or "\n" in token:
            raise UserError(f"{where}: token {index + 1} holds a tab or a line break; write a space instead")
    ranges, end = [], -1
    for token in tokens:
        ranges.append((end + 1, end + 1 + len(token)))
        end = ranges[-1][1]
    return Row(where, " ".join(tokens), None, tags, tuple(ranges), lines)


# --- text with spans


def split_words(text: str) -> list[tuple[int, int]]:
    """Character ranges of the words in a text, split as in BERT's tokenizer: at white space, punctuation and
    ideographs."""
    from tokenizers.pre_tokenizers import BertPreTokenizer

    ranges = []
    for _, (start, end) in BertPreTokenizer().pre_tokenize_str(text):
        cuts = {start, end}
        for found in _IDEOGRAPH.finditer(text, start, end):
            cuts |= {found.start(), found.end()}
        ranges += pairwise(sorted(cuts))
    return ranges


def _from_spans(where: str, given: str, spans: Any, columns: Columns) -> Row:
    text = clean(given, where)
    if not text.strip():
        raise UserError(f"{where}: the text {columns.texts[0]!r} is empty; fill it in or drop the row")
    ranges = split_words(text)
    tags = None if spans is None else _tags(where, given, text, ranges, spans, columns.label)
    return Row(where, text, None, tags, tuple(ranges))


def _tags(where: str, given: str, text: str, ranges: list[tuple[int, int]], spans: Any, column: str) -> list[str]:
    """A tag for each word, B-label or I-label within a span, O outside.

    Args:
        given: the text in which the spans count characters; in `text` line ends are one character, and there is no byte
            order mark at the beginning.
    """
    marks = len(given) - len(given.lstrip("\ufeff"))
    line_ends = [found.end() for found in re.finditer("\r\n", given)]
    if not isinstance(spans, list) or any(isinstance(span, str) for span in spans):
        raise UserError(
            f"{where}: {column!r} is {brief(spans)}; the labels of a text are a list of spans, and tags go with a list "
            "of tokens; fix the row or name other columns with text and label"
        )
    tags = [OUTSIDE] * len(ranges)
    for number, span in enumerate(spans, 1):
        here = f"{where}, span {number}"
        start, end, label = _span(here, span, given)
        start, end = (at - bisect_right(line_ends, at) - min(at, marks) for at in (start, end))
        inside = range(bisect_right(ranges, start, key=itemgetter(1)), bisect_left(ranges, end, key=itemgetter(0)))
        if not inside:
            raise UserError(f"{here} contains only white space; drop it")
        first, last = ranges[inside[0]][0], ranges[inside[-1]][1]
        if (first, last) != (start, end):
            raise UserError(
                f"{here}: {brief(text[start:end])} begins or ends within a word of {brief(text[first:last])}; "
                f"move it to characters {first} to {last}"
            )
        for index in inside:
            if tags[index] != OUTSIDE:
                raise UserError(f"{here}: {brief(text[start:end])} overlaps another span; a word has one label")
            tags[index] = f"{'B' if index == inside[0] else 'I'}-{label}"
    return tags


def _span(where: str, span: Any, text: str) -> tuple[int, int, str]:
    """(start, end, label) of a span, without white space at its ends."""
    if isinstance(span, dict) and {"start", "end", "label"} <= span.keys():
        start, end, label = span["start"], span["end"], span["label"]
    elif isinstance(span, list) and len(span) == 3:
        start, end, label = span
    else:
        raise UserError(f'{where}: {brief(span)} is not a span; write {{"start": 0, "end": 5, "label": "person"}}')
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in (start, end)):
        raise UserError(
            f"{where}: start and end must be whole numbers of characters, not {brief(start)} and {brief(end)}"
        )
    if not 0 <= start < end <= len(text):
        raise UserError(
            f"{where}: characters {start} to {end} are not within the {len(text)} characters of the text (the end is "
            "the character after the last)"
        )
    if not isinstance(label, str) or not label.strip():
        raise UserError(f"{where}: the label is {brief(label)}; give a word")
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip()), label.strip()
