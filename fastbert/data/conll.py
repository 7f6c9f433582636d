"""CoNLL columns: each line has a word and its annotations; an empty line separates sentences.

Columns are separated by tabs or, in a line without one, by other white space. In a .conllu file (Universal
Dependencies), comments, ranges of words (1-2) and empty words (1.1) are skipped, and columns have names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastbert.data.formats import check_name, opened, suffixes
from fastbert.data.text import clean, lines
from fastbert.errors import UserError, brief, nearest

SUFFIXES = (".conll", ".conllu", ".bio", ".iob", ".iob2", ".tsv", ".txt")
NAMES = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
"""Columns of a .conllu file."""
DOCUMENT = "-DOCSTART-"


@dataclass(frozen=True)
class Sentence:
    lines: tuple[int, ...]
    """Line of each word, from 1."""
    words: tuple[str, ...]
    tags: tuple[str, ...] | None
    """None in a file that has only words."""


def read_conll(path: Path, word: str | None, tag: str | None, may_lack_tags: bool = False) -> Iterator[Sentence]:
    """The sentences of a file.

    Args:
        word, tag: columns by number, from 1, or in a .conllu file by name; None for the first and last (form and upos).
        may_lack_tags: a single column is allowed.

    Raises:
        UserError: a line has another number of columns than the first, a word or tag is empty, there is no such column,
            or the file is binary or not UTF-8; the message names file and line.
    """
    check_name(path)
    universal = suffixes(path)[0] == ".conllu"
    indices: tuple[int, int | None] | None = None
    count, first, first_line = 0, 0, ""
    rows: list[tuple[int, str, str | None]] = []
    with opened(path) as (_, stream):
        for number, line in lines(stream, path):
            if not line.strip() or line.startswith(DOCUMENT):
                if rows:
                    yield _sentence(rows)
                    rows = []
                continue
            if universal and line.startswith("#"):
                continue
            fields = [field.strip() for field in line.split("\t")] if "\t" in line else line.split()
            where = f"{path}, line {number}"
            if universal and not fields[0].isdecimal() and fields[0].replace("-", "").replace(".", "").isdecimal():
                continue
            if indices is None:
                count, first, first_line = len(fields), number, line
                indices = _indices(universal, word, tag, count, may_lack_tags, where)
            if len(fields) != count:
                text = "; text that is not in columns is read from .jsonl or .csv" if may_lack_tags else ""
                comment = first if first_line.startswith("#") else number if line.startswith("#") else None
                remedy = (
                    "give every line the same number, with tabs between columns if a word contains white space, and an "
                    "empty line between sentences"
                    if comment is None
                    else f"if line {comment} is a comment, drop it: comments are allowed only in .conllu files"
                )
                raise UserError(f"{where} has {_columns(len(fields))} and line {first} has {count}; {remedy}{text}")
            chosen = [clean(fields[index], where) for index in indices if index is not None]
            if not all(chosen):
                raise UserError(f"{where}: the {'tag' if chosen[0] else 'word'} is empty; fill it in or drop the line")
            rows.append((number, chosen[0], chosen[1] if len(chosen) > 1 else None))
    if rows:
        yield _sentence(rows)


def _columns(count: int) -> str:
    return f"{count} column{'s' * (count != 1)}"


def _sentence(rows: list[tuple[int, str, str | None]]) -> Sentence:
    numbers, words, tags = zip(*rows, strict=True)
    return Sentence(numbers, words, None if tags[0] is None else tags)


def _indices(
    universal: bool, word: str | None, tag: str | None, count: int, may_lack_tags: bool, where: str
) -> tuple[int, int | None]:
    """The columns of word and tag, from 0."""

    def index(column: str) -> int:
        if universal and column.lower() in NAMES:
            if (found := NAMES.index(column.lower())) >= count:
                raise UserError(f"{where} has {_columns(count)}, and a .conllu file has {len(NAMES)} with tabs between")
            return found
        if not column.isdecimal():
            known = f"{nearest(column, NAMES)}; or " if universal else ""
            raise UserError(f"{where}: no column {brief(column)}; {known}give the number of a column, from 1")
        if not 1 <= int(column) <= count:
            raise UserError(f"{where} has {_columns(count)}, not column {column}; fix text or label")
        return int(column) - 1

    words = index(word or ("form" if universal else "1"))
    if tag is None and not universal and count == 1:
        if may_lack_tags:
            return words, None
        raise UserError(f"{where} has one column; give a word and its tag on each line, with a tab between them")
    tags = index(tag or ("upos" if universal else str(count)))
    if words == tags:
        raise UserError(f"{where}: word and tag are both column {words + 1}; name two columns with text and label")
    return words, tags
