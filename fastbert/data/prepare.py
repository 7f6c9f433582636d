"""`fastbert prepare`: converts a source of text to a folder of memory-mapped shards from which a run reads batches.

The source is read once (twice if a tokenizer is trained first). Worker processes tokenize; this process reads, splits,
writes and counts, always in the order of the source, so that the result is the same for any number of workers. A killed
call leaves its work next to the result, and the next call completes it to the same bytes.
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

from fastbert.data.corpus import STATE_VERSION, Corpus, tokenize, workers_for
from fastbert.data.encoding import token_dtype
from fastbert.data.integrity import FileRecord, compare, file_record, is_record, save_array
from fastbert.data.partial import STATE, TOKENIZER, Partial, is_free, leftover_errors, partial_folder, remove_traces
from fastbert.data.rare import write_rare
from fastbert.data.shards import FORMAT, FORMAT_VERSION, SPLITS, read_record, unigram_entropy
from fastbert.data.sources import Source, open_source
from fastbert.data.summary import summary, warnings
from fastbert.data.text import READING
from fastbert.data.tokenizer import WordPiece, read_sample, train_tokenizer
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.data.workers import pool
from fastbert.data.writer import SplitWriter
from fastbert.downloads import TOKENIZER_FROM_HUB, with_downloads
from fastbert.errors import OptionError, UserError
from fastbert.files import atomic_folder, disk_errors
from fastbert.outputs import check_output_folder
from fastbert.ranges import Count, Fraction, Range, Seed, Vocabulary, Workers, check_values
from fastbert.records import read_json, seal_of, write_json
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
        if self.rare_min > self.rare_max:
            raise OptionError(self, "rare_min", f"must not be above rare_max, {self.rare_max}, but is {self.rare_min}")

    def identity(self) -> dict[str, Any]:
        """The options that determine the result; a given tokenizer is represented by its fingerprint."""
        options = dataclasses.asdict(self)
        for name in ("source", "weights", "out", "workers", "streamed"):  # weights are part of the source's identity
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
    _check_out(out)
    source = _open(options)
    options = with_downloads(options)  # once all others are checked
    for warning in source.warnings:
        warn(warning)
    made_of = {"source": source.identity, "options": options.identity()}
    if _finished(out, made_of):
        with disk_errors(out):
            remove_traces(out)
        echo(f"{out} is already prepared from this source with these options")
    else:
        versions = {"format_version": FORMAT_VERSION, "reading": READING, "state_version": STATE_VERSION}
        with partial_folder(out, {**made_of, **versions}) as partial:
            if partial is None:
                _finished(out, made_of)
            elif not partial.complete:
                _write(partial, source, options, made_of)
    record = read_record(out)
    print(summary(record), file=table)
    for warning in warnings(record):
        warn(warning)
    print(f"wrote {out}", file=table)
    return out


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


def _check_out(out: Path) -> None:
    """Raises a UserError, before any work, if `out` is not a finished result and none can be written there."""
    with disk_errors(out):
        if (out / "dataset.json").is_file():
            return
        free = is_free(out)
    if not free:
        raise UserError(f"{out} exists and is not a prepared folder; choose another --out or remove it")
    check_output_folder(out)


def _finished(out: Path, made_of: dict[str, Any]) -> bool:
    """Returns True if `out` is already the finished result; raises a UserError if it is something else."""
    if not (out / "dataset.json").is_file():
        _check_out(out)
        return False
    found = read_record(out)
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


def _write(partial: Partial, source: Source, options: PrepareOptions, made_of: dict[str, Any]) -> None:
    """Writes what is missing in the folder."""
    folder = partial.folder
    wordpiece, tokenizer_files = _tokenizer(folder, source, options)
    with pool(workers_for(source, options.workers), wordpiece) as submit:
        corpus = _tokenize(partial, source, wordpiece, options, submit)
        hashes, counts = corpus.counter.between(options.rare_min, options.rare_max)
        shards = {split: corpus.writers[split].shards for split in SPLITS}
        rare, rare_files, rare_list = write_rare(folder, shards, wordpiece, hashes, counts, submit)
    corpus.keys.close()
    splits = {
        split: _record(folder, corpus.writers[split], wordpiece, rare[split], rare_files[split]) for split in SPLITS
    }
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **made_of,
        "tokenizer": wordpiece.fingerprint,
        "tokenizer_files": tokenizer_files,
        "vocab_size": len(wordpiece.tokens),
        "dtype": token_dtype(len(wordpiece.tokens)).name,
        "sources": corpus.source_counts.record(source),
        "duplicates": {
            "documents": corpus.duplicates,
            "counted_all": options.drop_duplicates or corpus.counted_all,
        },
        "splits": splits,
        "rare_words": {
            "words": len(hashes),
            "distinct_words": len(corpus.counter),
            "counts_may_lack": corpus.counter.lacking,
            "file": rare_list,
        },
    }
    write_json(folder / "dataset.json", {**record, "seal": seal_of(record)})


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
        corpus = Corpus(partial.folder, wordpiece, options.shard_tokens, len(source.parts))
        corpus.restore(partial, source)
        if not corpus.complete:
            how = (options.validation_fraction, options.seed, options.drop_duplicates)
            tokenize(corpus, source, *how, moved, apart, partial, submit)
        if all(writer.documents for writer in corpus.writers.values()):
            if not moved and not apart:
                corpus.save(partial, source)
            return corpus
        if corpus.smallest == corpus.largest and (options.drop_duplicates or not corpus.duplicates):
            copies = f" ({corpus.duplicates + 1:,} copies of it)" if corpus.duplicates else ""
            raise UserError(
                f"source {options.source!r} is a single document{copies}, but training and validation need one each; "
                "put a blank line between documents (if every line is one: sed G FILE > NEW)"
            )
        # There are so few documents that all are in one split: the document closest to the other split is moved there.
        if apart := corpus.smallest == corpus.largest:
            warn(
                f"the {corpus.duplicates + 1:,} documents of {options.source!r} are copies of one, so "
                "validation has the same text as training",
            )
        elif not corpus.writers["validation"].documents:
            moved = {corpus.smallest: True}
        else:
            moved = {corpus.largest: False}
        corpus.keys.close()
        (partial.folder / STATE).unlink(missing_ok=True)
        for file in partial.folder.glob("*.npy"):
            file.unlink()


def _record(
    folder: Path, writer: SplitWriter, wordpiece: WordPiece, rare: dict[str, int], files: list[dict[str, FileRecord]]
) -> dict[str, Any]:
    """Entry of dataset.json for a split; `files` are the records of the rare words' files."""
    words = writer.unigrams[~wordpiece.continuing].sum() - writer.unigrams[wordpiece.ids["[SEP]"]]
    return {
        "documents": writer.documents,
        "words": int(words),
        "tokens": sum(writer.shards),
        "bytes": writer.bytes,
        "unk_tokens": int(writer.unigrams[wordpiece.ids["[UNK]"]]),
        "unigram_entropy": unigram_entropy(writer.unigrams, wordpiece),
        "unigram_file": save_array(folder / f"unigram-{writer.split}.npy", writer.unigrams),
        "rare": rare,
        "shards": [
            {"tokens": size, "files": written | of_rare}
            for size, written, of_rare in zip(writer.shards, writer.files, files, strict=True)
        ],
    }
