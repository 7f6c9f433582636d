"""Parts of a corpus that several machines prepare: how a source is divided, and the folder of a part.

A source is divided between groups of its chunks (files, rows of a dataset), which depend on the source and
`--shard-tokens` alone. A part has consecutive groups, so that the parts, one after the other, are the source. Shards
end with their group, also in data that is prepared alone: joined parts have the same shards.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data.finish import unigram_file
from fastbert.data.integrity import FileRecord, is_record, save_array
from fastbert.data.shards import FORMAT_VERSION, PART_FORMAT
from fastbert.data.sources import Source
from fastbert.data.tally import DOCUMENTS, WORDS, Tally, files_of
from fastbert.data.text import READING
from fastbert.data.tokenizer import WordPiece
from fastbert.data.writer import SplitWriter, shard_file
from fastbert.errors import UserError, brief
from fastbert.progress import amount
from fastbert.records import COUNT, check, read_json, seal_of, write_json

MOST_PARTS = 2**16
_FILE = {"bytes": COUNT, "sha256": str}
_COUNTS = {"documents": COUNT, "bytes": COUNT, "tokens": COUNT, "whitespace_words": COUNT}
_SPLIT = {
    "documents": COUNT,
    "bytes": COUNT,
    "unigram_file": _FILE,
    "shards": [{"tokens": COUNT, "files": {str: _FILE}}],
}
_RECORD = {
    "source": dict,
    "options": dict,
    "part": [COUNT],
    "tokenizer": str,
    "tokenizer_files": {str: _FILE},
    "splits": {"train": _SPLIT, "validation": _SPLIT},
    "sources": [{"source": str, "train": _COUNTS, "validation": _COUNTS}],
    "tallies": {WORDS: list, DOCUMENTS: list},
}


@dataclass(frozen=True)
class Part:
    """Part `number` (from 1) of `count`."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_part(text: str) -> Part:
    """Parses a part such as 3/16. Raises a UserError if it is not one."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not found:
        raise UserError(f"part {brief(text)} is not of the form NUMBER/COUNT, such as 3/16")
    part = Part(int(found[1]), int(found[2]))
    if not 1 <= part.count <= MOST_PARTS:
        raise UserError(f"part {part}: the number of parts must be from 1 to {MOST_PARTS}")
    if not 1 <= part.number <= part.count:
        raise UserError(f"part {part}: there are the parts 1/{part.count} to {part.count}/{part.count}")
    return part


def part_of(source: Source, part: Part, group_bytes: int) -> Source:
    """The documents of a part of a source.

    Args:
        group_bytes: minimum size of a group, as for `Source.groups`.

    Raises:
        UserError: the source is a mixture or has fewer groups than there are parts.
    """
    if source.weights is not None:
        raise UserError(
            f"--part {part} cannot be used with --weights: the order of a mixture depends on all documents before; "
            "prepare without --part, or prepare each source on its own and mix them with --replay.data"
        )
    groups = source.groups(group_bytes)
    if len(groups) < part.count:
        raise UserError(
            f"--part {part}: {source.spec} can be divided into at most {len(groups)} part{'s' * (len(groups) > 1)}, "
            f"between files with {amount(group_bytes, 'B')} or more together; use fewer parts, or more files and a "
            "smaller --shard-tokens"
        )
    first, last = (_border(source, groups, number, part.count) for number in (part.number - 1, part.number))
    return source.slice(groups[first][0], groups[last - 1][1])


def _border(source: Source, groups: list[tuple[int, int]], number: int, count: int) -> int:
    """The group at which part `number` (from 0) of `count` begins: the parts have nearly equal sizes, and at least one
    group each."""
    starts = np.cumsum([0, *(sum(chunk.size for chunk in source.chunks[a:b]) for a, b in groups)])
    nearest = np.array([np.abs(starts - starts[-1] * n / count).argmin() for n in range(count + 1)])
    nearest[-1] = len(groups)  # the last groups may have no bytes
    # At least one group more than the part before, and one group left for each part after it.
    least = np.maximum.accumulate(nearest - np.arange(count + 1)) + np.arange(count + 1)
    return int(min(least[number], len(groups) - (count - number)))


def write_part(
    folder: Path,
    made_of: dict[str, Any],
    part: Part,
    wordpiece: WordPiece,
    tokenizer_files: dict[str, FileRecord],
    writers: dict[str, SplitWriter],
    sources: list[dict[str, Any]],
    tallies: dict[str, Tally],
) -> None:
    """Writes dataset.json of a part, for `fastbert merge`."""
    record = {
        "format": PART_FORMAT,
        "format_version": FORMAT_VERSION,
        "reading": READING,
        **made_of,
        "part": [part.number, part.count],
        "tokenizer": wordpiece.fingerprint,
        "tokenizer_files": tokenizer_files,
        "splits": {
            split: {
                "documents": writer.documents,
                "bytes": writer.bytes,
                "unigram_file": save_array(folder / unigram_file(split), writer.unigrams),
                "shards": [
                    {"tokens": size, "files": files} for size, files in zip(writer.shards, writer.files, strict=True)
                ],
            }
            for split, writer in writers.items()
        },
        "sources": sources,
        "tallies": {name: tally.runs for name, tally in tallies.items()},
    }
    write_json(folder / "dataset.json", {**record, "seal": seal_of(record)})


def read_part(folder: Path) -> dict[str, Any]:
    """Reads dataset.json of a part and checks its seal.

    Raises:
        UserError: the folder is missing, is not a part, is of another version, or dataset.json is damaged.
    """
    path = folder / "dataset.json"
    if not path.is_file():
        raise UserError(f"{folder} has no dataset.json: it is not a part; write one with fastbert prepare --part")
    record = read_json(path, "part")
    if not isinstance(record, dict) or record.get("format") != PART_FORMAT:
        raise UserError(f"{folder} is not a part of prepared data; write one with fastbert prepare --part")
    version = (record.get("format_version"), record.get("reading"))
    if version != (FORMAT_VERSION, READING):
        raise UserError(f"{folder} was written by another version of fastbert; prepare this part again with this one")
    again = "prepare this part again after removing the folder"
    if record.get("seal") != seal_of(record):
        raise UserError(f"{path} is damaged: its seal does not match its content; {again}")
    try:
        check(record, _RECORD, f"part {path}")
        for split, content in record["splits"].items():
            for number, shard in enumerate(content["shards"]):
                names = {shard_file(split, number, part): _FILE for part in ("tokens", "documents")}
                check(shard["files"], names, f"part {path}", f"splits.{split}.shards[{number}].files")
        for name, runs in record["tallies"].items():
            files_of(runs, name)
        for name in record["tokenizer_files"]:
            if not re.fullmatch(r"tokenizer/[\w.-]+", name) or not is_record(record["tokenizer_files"][name]):
                raise UserError(f"part {path} is damaged: {brief(name)} is not a file of its tokenizer")
        if len(record["part"]) != 2 or not 1 <= record["part"][0] <= record["part"][1]:
            raise UserError(f"part {path} is damaged: its number is {record['part']}")
    except UserError as error:
        raise UserError(f"{error}; {again}") from None
    return record


def part_files(record: dict[str, Any]) -> dict[str, FileRecord]:
    """Name -> record of all files of a part."""
    files = dict(record["tokenizer_files"])
    for split, content in record["splits"].items():
        files[unigram_file(split)] = content["unigram_file"]
        for shard in content["shards"]:
            files |= shard["files"]
    for name, runs in record["tallies"].items():
        files |= files_of(runs, name)
    return files
