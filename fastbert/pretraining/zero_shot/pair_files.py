"""Minimal pairs from JSONL files, as published with BLiMP (Warstadt et al. 2020, arXiv 1912.00582). Imports no torch.

Each line is an object with the keys

    sentence_good, sentence_bad    two sentences, of which only the first is acceptable
    UID                            optional: the paradigm; by default the name of the file
    linguistics_term               optional: the phenomenon, a group of paradigms
"""

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.data.formats import check_name, opened, suffixes
from fastbert.data.json_rows import json_lines
from fastbert.data.text import clean, is_unicode
from fastbert.errors import UserError, abbreviated, brief
from fastbert.inputs import input_errors, near_name, refuse_slash
from fastbert.progress import progress

GOOD, BAD, PARADIGM, PHENOMENON = "sentence_good", "sentence_bad", "UID", "linguistics_term"
JSONL = (".jsonl", ".ndjson")
LONGEST = 10_000  # characters of a sentence; the memory to score one grows with its square
ARCHIVES = (".zip", ".tar", ".tgz", ".txz")
HINT = f"write an object with {GOOD} and {BAD} on each line"
# The paper's twelve phenomena include these two paradigms in argument structure.
RENAMED = {"s-selection": "argument_structure"}


class Pair(NamedTuple):
    """A minimal pair."""

    good: str
    bad: str
    paradigm: str
    phenomenon: str | None
    where: str
    """File and line, for errors."""


def is_pair_file(path: str | Path) -> bool:
    """True if the name is that of a file of minimal pairs, perhaps compressed."""
    return suffixes(Path(path))[0] in JSONL


def pair_files(path: str | Path) -> list[Path]:
    """The JSONL files that `path` names: itself, or those in the folder, sorted.

    Raises:
        UserError: there is none.
    """
    folder = Path(path)
    with input_errors(folder, "minimal pairs"):
        if folder.is_dir():
            found = [file for file in sorted(folder.iterdir()) if is_pair_file(file) and file.is_file()]
            if found:
                return found
            raise UserError(f"folder {folder} has no minimal pairs: no file in it ends in .jsonl; {_advice(folder)}")
        if not folder.exists():
            raise _missing(str(path))
    if not is_pair_file(folder):
        check_name(folder)
        raise UserError(f"minimal pairs {folder} must be a folder or a file that ends in .jsonl; {HINT}")
    return [folder]


def _advice(folder: Path) -> str:
    """Remedy for a folder without JSONL files."""
    for depth in ("*", "*/*"):
        if inner := sorted({file.parent for file in folder.glob(f"{depth}/*.jsonl*")}):
            return f"give {inner[0]}" if len(inner) == 1 else f"give one of the folders in it, such as {inner[0]}"
    archive = next((file for file in sorted(folder.iterdir()) if suffixes(file)[0] in ARCHIVES), None)
    return f"unpack {archive} and give the new folder" if archive else HINT


def _missing(path: str) -> UserError:
    if path.startswith("hf:"):
        return UserError(
            f"minimal pairs {path} are not read from the hub; give a folder of JSONL files, such as data/ of "
            "https://github.com/alexwarstadt/blimp"
        )
    if glob.has_magic(path):
        return UserError(f"minimal pairs {path} are a pattern; give the folder, of which all .jsonl files are read")
    refuse_slash(path)
    return UserError(f"there are no minimal pairs at {path}{near_name(Path(path))}; give a file or a folder")


def read_pairs(path: str | Path) -> list[Pair]:
    """Reads all minimal pairs.

    Raises:
        UserError: there are none; a line is not an object, lacks one of the sentences, or has an empty one or one that
            is too long; a paradigm is in two phenomena. The message names file and line.
    """
    files = pair_files(path)
    found: list[Pair] = []
    with progress("reading pairs", len(files), "files") as shown:
        for number, file in enumerate(files, 1):
            found += _read(file)
            shown.update(number)
    phenomena(found)
    if not found:
        raise UserError(f"{path} has no minimal pairs: {'its files are' if len(files) > 1 else 'it is'} empty; {HINT}")
    return found


def _read(file: Path) -> Iterator[Pair]:
    name = file.name.partition(".jsonl")[0].partition(".ndjson")[0]
    with opened(file) as (_, stream):
        for where, _, row in json_lines(stream, file, HINT):
            good, bad = (_sentence(row, key, where) for key in (GOOD, BAD))
            paradigm, phenomenon = (_label(row, key, where) for key in (PARADIGM, PHENOMENON))
            yield Pair(good, bad, paradigm or name, RENAMED.get(phenomenon, phenomenon), where)


def phenomena(pairs: Iterable[Pair]) -> dict[str, str | None]:
    """Paradigm -> its phenomenon, which not every pair needs to name.

    Raises:
        UserError: a paradigm is in two phenomena.
    """
    found: dict[str, str | None] = {}
    for pair in pairs:
        known = found.get(pair.paradigm)
        if known and pair.phenomenon and known != pair.phenomenon:
            raise UserError(
                f"{pair.where} puts paradigm {brief(pair.paradigm)} in {PHENOMENON} {brief(pair.phenomenon)}, an "
                f"earlier line in {brief(known)}; give it one, or two names in {PARADIGM}"
            )
        found[pair.paradigm] = known or pair.phenomenon
    return found


def _sentence(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise UserError(f"{where} has no key {brief(key)}; it has {abbreviated(list(row)) or 'none'}; {HINT}")
    if not isinstance(row[key], str):
        raise UserError(f"{where} has {key} {brief(row[key])}, which is not a text; {HINT}")
    if len(row[key]) > LONGEST:
        raise UserError(f"{where} has a {key} of {len(row[key]):,} characters; give sentences of at most {LONGEST:,}")
    if not is_unicode(row[key]):
        raise UserError(f"{where} has half of a surrogate pair in {key}, which is no character; remove it")
    text = clean(row[key], where)
    if not text.strip():
        raise UserError(f"{where} has an empty {key}; {HINT}")
    return text


def _label(row: dict[str, Any], key: str, where: str) -> str | None:
    value = row.get(key)
    if value is not None and (not isinstance(value, str) or not value or not value.isprintable()):
        raise UserError(
            f"{where} has {key} {brief(value)}, which must be a name on one line; leave it out if there is none"
        )
    return value
