"""`fastbert merge`: joins the parts that `fastbert prepare --part` wrote. The result is, to the byte, the folder that
`prepare` writes without parts: the shards of the parts, one after the other, and counts over all of them."""

import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastbert.config import POSITIONAL
from fastbert.data.corpus import workers_for
from fastbert.data.finish import unigram_file, write_dataset
from fastbert.data.integrity import FileRecord, compare
from fastbert.data.parts import part_files, read_part
from fastbert.data.prepare import check_out, finished, show_prepared
from fastbert.data.shards import SPLITS
from fastbert.data.source_counts import FIGURES
from fastbert.data.tally import DOCUMENTS, WORDS, distinct, paths_of
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.data.workers import pool
from fastbert.data.writer import WrittenSplit, shard_file
from fastbert.errors import UserError
from fastbert.outputs import output_folder
from fastbert.progress import progress
from fastbert.ranges import Workers, check_values
from fastbert.streams import echo


@dataclass(frozen=True)
class MergeOptions:
    """Join the parts of a corpus that fastbert prepare --part wrote.

    The result equals the folder that prepare writes without --part. Shards are hard links where the file system has
    them, otherwise copies; the parts can then be removed."""

    parts: tuple[str, ...] = field(default=(), metadata=POSITIONAL)
    """Folders of all parts, in any order."""
    out: str = field(kw_only=True)
    """Folder to write."""
    workers: Workers = 0
    """Number of processes that find rare words; 0: one per core. The result does not depend on it."""

    def __post_init__(self) -> None:
        check_values(self)

    def check_inputs(self) -> None:
        """Raises a UserError if there are no parts."""
        if not self.parts:
            raise UserError("give the folders of all parts: fastbert merge parts/1 parts/2 --out data/wiki")


def merge(options: MergeOptions, table: IO[str] | None = None) -> Path:
    """Writes the folder `options.out`, whole or not at all, and prints the table of `prepare` to `table` (by default
    standard output).

    Raises:
        UserError: a part is missing, given twice or damaged, or parts differ in source, options or tokenizer; or `out`
            contains something else.
    """
    table, out = table or sys.stdout, Path(options.out)
    folders = [Path(part) for part in options.parts]
    check_out(out)
    parts = _complete({folder: read_part(folder) for folder in folders}, folders)
    record = next(iter(parts.values()))
    made_of = {"source": record["source"], "options": record["options"]}
    if finished(out, made_of):
        echo(f"{out} already has these parts")
    else:
        for folder, one in parts.items():
            _check_files(folder, part_files(one))
        _write(out, parts, made_of, options.workers)
    show_prepared(out, table)
    return out


def _complete(records: dict[Path, dict[str, Any]], folders: list[Path]) -> dict[Path, dict[str, Any]]:
    """The parts in order. Raises a UserError if they are not all parts of one source."""
    first, *others = folders
    for folder in others:
        _check_same(first, records[first], folder, records[folder])
    count = records[first]["part"][1]
    by_number: dict[int, Path] = {}
    for folder in folders:
        number = records[folder]["part"][0]
        if number in by_number:
            raise UserError(f"{by_number[number]} and {folder} are both part {number}/{count}; give each part once")
        by_number[number] = folder
    missing = [number for number in range(1, count + 1) if number not in by_number]
    if missing:
        listed = ", ".join(f"{number}/{count}" for number in missing[:10]) + (", ..." if missing[10:] else "")
        raise UserError(f"{len(missing)} of {count} parts are missing: {listed}; give the folders of all parts")
    parts = {by_number[number]: records[by_number[number]] for number in range(1, count + 1)}
    for split in SPLITS:
        if not any(record["splits"][split]["documents"] for record in parts.values()):
            raise UserError(
                f"the parts have no document for {split}; prepare this source without --part, which then moves a "
                "document there, or with another --validation-fraction"
            )
    return parts


def _check_same(first: Path, one: dict[str, Any], folder: Path, other: dict[str, Any]) -> None:
    """Raises a UserError if two parts cannot be of the same corpus."""
    if one["part"][1] != other["part"][1]:
        raise UserError(
            f"{first} is one of {one['part'][1]} parts, {folder} one of {other['part'][1]}; give the parts of one "
            "division"
        )
    names = [name for name in {**one["options"], **other["options"]} if _differ(one["options"], other["options"], name)]
    if names:
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise UserError(
            f"{first} and {folder} were prepared with different options ({listed}); prepare one of them again"
        )
    if one["source"] != other["source"]:
        raise UserError(
            f"{first} and {folder} are of different sources{_changed(one['source'], other['source'])}; all parts need "
            "the same files, with the same modification times (rsync --times, cp --preserve=timestamps)"
        )
    if one["tokenizer"] != other["tokenizer"]:
        raise UserError(
            f"{first} and {folder} have different tokenizers, most likely trained with different versions of the "
            f"tokenizers library; prepare one of them again with --tokenizer and the other"
        )


def _differ(one: dict[str, Any], other: dict[str, Any], name: str) -> bool:
    return name not in one or name not in other or one[name] != other[name]


def _changed(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Description of the first file that differs; empty if the sources consist of other files."""
    files, others = (_files_of(source) for source in (one, other))
    if [file.get("name") for file in files] == [file.get("name") for file in others]:
        for file, another in zip(files, others, strict=True):
            if file != another:
                return f", or {file.get('name')} was changed in between"
    return ""


def _files_of(source: dict[str, Any]) -> list[dict[str, Any]]:
    return [*source.get("files", ()), *(file for part in source.get("sources", ()) for file in _files_of(part))]


def _check_files(folder: Path, files: dict[str, FileRecord]) -> None:
    """Raises a UserError if a file of a part is missing or damaged."""
    for name in files:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; copy the part again, or prepare it again")
    compare(folder, files, "it is not what fastbert prepare wrote; copy the part again, or prepare it again")


def _write(out: Path, parts: dict[Path, dict[str, Any]], made_of: dict[str, Any], workers: int) -> None:
    first, record = next(iter(parts.items()))
    wordpiece = load_tokenizer(first / "tokenizer")
    if wordpiece.fingerprint != record["tokenizer"]:
        raise UserError(f"{first / 'tokenizer'} is not the tokenizer of the part {first}; prepare it again")
    with output_folder(out, first="rare_words.json", last="dataset.json") as folder:
        shutil.copytree(first / "tokenizer", folder / "tokenizer")
        written = {split: _link(folder, split, parts) for split in SPLITS}
        documents = sum(one.documents for one in written.values())
        duplicates = documents - distinct(_runs(parts, DOCUMENTS))
        words = _runs(parts, WORDS)
        with pool(workers_for(sum(one.bytes for one in written.values()), workers), wordpiece) as submit:
            write_dataset(
                folder,
                made_of,
                wordpiece,
                record["tokenizer_files"],
                written,
                _sources([one["sources"] for one in parts.values()]),
                duplicates,
                words,
                submit,
            )


def _runs(parts: dict[Path, dict[str, Any]], name: str) -> list[Path]:
    return [path for part, record in parts.items() for path in paths_of(part, record["tallies"][name])]


def _link(folder: Path, split: str, parts: dict[Path, dict[str, Any]]) -> WrittenSplit:
    """Links the shards of a split into `folder`, numbered one after the other, and adds up its counts."""
    shards: list[int] = []
    files: list[dict[str, FileRecord]] = []
    with progress(
        f"linking {split}", sum(len(record["splits"][split]["shards"]) for record in parts.values()), "shards"
    ) as work:
        for part, record in parts.items():
            for number, shard in enumerate(record["splits"][split]["shards"]):
                names = {kind: shard_file(split, len(shards), kind) for kind in ("tokens", "documents")}
                for kind, name in names.items():
                    _link_or_copy(part / shard_file(split, number, kind), folder / name)
                files.append({name: shard["files"][shard_file(split, number, kind)] for kind, name in names.items()})
                shards.append(shard["tokens"])
                work.update(len(shards))
    contents = [record["splits"][split] for record in parts.values()]
    documents, size = (sum(content[name] for content in contents) for name in ("documents", "bytes"))
    unigrams = sum(np.load(part / unigram_file(split), allow_pickle=False) for part in parts)
    return WrittenSplit(documents, size, unigrams, shards, files)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target)


def _sources(counts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Sums of the counts of each source over the parts."""
    return [
        {**same[0], **{split: {name: sum(one[split][name] for one in same) for name in FIGURES} for split in SPLITS}}
        for same in zip(*counts, strict=True)
    ]
