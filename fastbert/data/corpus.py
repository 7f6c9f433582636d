"""Tokenizes a source's documents into shards, with a saved state from which a killed process continues.

Batches, states and all counts depend only on the source, not on the number of workers or on when a process was killed.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data.duplicates import COUNTED, KeyFile, Seen
from fastbert.data.encoding import Encoded, encode_in_worker
from fastbert.data.hashing import text_hash
from fastbert.data.partial import Partial, leftover_errors
from fastbert.data.rare import WordCounter
from fastbert.data.shards import SPLITS
from fastbert.data.source_counts import SourceCounts, end_of_mixture
from fastbert.data.sources import Source
from fastbert.data.tokenizer import WordPiece
from fastbert.data.workers import in_order
from fastbert.data.writer import SplitWriter
from fastbert.progress import progress
from fastbert.streams import echo

BATCH_CHARACTERS = 2**21
BYTES_PER_WORKER = 2**23  # starting a process takes half a second, which does not pay off for less text
STATE_BATCHES = 128  # between two saved states: 270 MB of text, about ten seconds
COUNTS = ("batches", "position", "complete", "smallest", "largest", "duplicates")  # attributes saved as JSON
STATE_VERSION = 3  # raise it when the content of the state changes


class Corpus:
    """The part of a source that is already written, in both splits."""

    def __init__(self, folder: Path, wordpiece: WordPiece, shard_tokens: int, parts: int) -> None:
        self.writers = {split: SplitWriter(folder, split, wordpiece.continuing, shard_tokens) for split in SPLITS}
        self.counter, self.source_counts = WordCounter(), SourceCounts(parts)
        self.batches = 0
        self.position = 0
        """`Source.position` after these batches."""
        self.complete = False
        self.smallest, self.largest = 2**64, -1
        """The smallest and the largest document hash; documents are split by their hash."""
        self.duplicates = 0
        """Number of documents whose text occurred before; a lower bound unless `counted_all`."""
        self.keys = KeyFile(folder / ".keys")

    def add(
        self,
        keys: np.ndarray,
        training: np.ndarray,
        parts: np.ndarray,
        duplicates: int,
        new: np.ndarray,
        encoded: Encoded,
    ) -> None:
        """Writes and counts a batch of documents.

        Args:
            keys: uint64 [documents], hashes of the documents.
            training: bool [documents], True for training documents.
            parts: int64 [documents], the part of the source that each document came from.
            duplicates: number of documents of the batch that occurred before, including those already dropped.
            new: uint64, hashes that did not occur before.
        """
        self.duplicates += duplicates
        self.keys.write(new)
        if len(keys):
            self.smallest, self.largest = min(self.smallest, int(keys.min())), max(self.largest, int(keys.max()))
        self.source_counts.add(parts, training, encoded)
        of_tokens = np.repeat(training, encoded.lengths)
        for split, here, tokens in (("train", training, of_tokens), ("validation", ~training, ~of_tokens)):
            self.writers[split].write(encoded.tokens[tokens], encoded.lengths[here], int(encoded.sizes[here].sum()))
        self.counter.add(encoded.word_hashes, encoded.word_counts)
        self.batches += 1

    @property
    def counted_all(self) -> bool:
        """True if `duplicates` is exact although duplicates are not dropped."""
        return self.keys.count < COUNTED

    def close(self) -> None:
        """Finishes the last shards."""
        for writer in self.writers.values():
            writer.close()
        self.complete = True

    def save(self, partial: Partial, source: Source) -> None:
        """Saves everything that `restore` needs."""
        states = {split: writer.state() for split, writer in self.writers.items()}
        self.keys.sync()
        record: dict[str, Any] = {name: getattr(self, name) for name in COUNTS}
        record |= {
            "keys": self.keys.state(),
            "writers": {split: state[0] for split, state in states.items()},
            "ended_by": source.ended_by,
        }
        arrays = {f"{split}.{name}": array for split, state in states.items() for name, array in state[1].items()}
        arrays |= {f"counter.{name}": array for name, array in self.counter.state().items()}
        partial.save(record, {**arrays, "source_counts": self.source_counts.counts})

    def restore(self, partial: Partial, source: Source) -> None:
        """Resumes from the last saved state, if there is one.

        Raises:
            DamagedWorkError: state or files are damaged.
        """
        with leftover_errors(partial.folder):
            if (saved := partial.load()) is not None:
                self._restore(*saved, source)

    def _restore(self, record: dict[str, Any], arrays: dict[str, np.ndarray], source: Source) -> None:

        def group(name: str) -> dict[str, np.ndarray]:
            return {key.removeprefix(f"{name}."): a for key, a in arrays.items() if key.startswith(f"{name}.")}

        for name in COUNTS:
            setattr(self, name, record[name])
        self.keys.restore(record["keys"], needed=not self.complete)
        for split, writer in self.writers.items():
            writer.restore(record["writers"][split], group(split))
        self.counter.restore(group("counter"))
        self.source_counts.counts = arrays["source_counts"]
        source.ended_by = record["ended_by"]


def tokenize(
    corpus: Corpus,
    source: Source,
    fraction: float,
    seed: int,
    drop_duplicates: bool,
    moved: dict[int, bool],
    apart: bool,
    partial: Partial,
    submit: Callable[..., Future],
) -> None:
    """Writes the rest of the source into `corpus`.

    Args:
        fraction, seed: a hash of (seed, text) assigns this fraction of the documents to validation.
        drop_duplicates: leave out documents whose text occurred before.
        moved: hash -> True if documents with this hash are for validation, False if for training; overrides `fraction`.
        apart: put the first document into a different split than its copies.
        partial: stores the state every STATE_BATCHES batches, unless documents are moved.
        submit: runs a function with arguments in another process.
    """
    bound = np.uint64(int(fraction * 2**64))
    batches = _batches(source)
    if corpus.batches:
        with progress("skipping what is already tokenized", corpus.position) as work:
            for _ in range(corpus.batches):
                next(batches)
                work.update(source.position)
    seen = Seen(corpus.keys.read(), None if drop_duplicates else COUNTED)

    def jobs() -> Iterator[tuple[tuple[np.ndarray, np.ndarray, np.ndarray, int, np.ndarray], int, Future]]:
        for number, (texts, parts) in enumerate(batches, corpus.batches):
            keys = text_hash(seed, texts)
            repeated, new = seen.add(keys)
            if drop_duplicates and repeated.any():
                texts = [text for text, again in zip(texts, repeated, strict=True) if not again]
                parts, keys = parts[~repeated], keys[~repeated]
            training = keys >= bound
            for key, validation in moved.items():
                training[keys == np.uint64(key)] = not validation
            if apart and number == 0:
                training[0] = not training[0]
            batch = (keys, training, parts, int(repeated.sum()), new)
            yield batch, source.position, submit(encode_in_worker, texts, training)

    with progress("tokenizing", source.size, done=corpus.position) as work:
        for batch, corpus.position, encoded in in_order(jobs()):
            corpus.add(*batch, encoded)
            work.update(corpus.position)
            if corpus.batches % STATE_BATCHES == 0 and not moved and not apart:
                corpus.save(partial, source)
    corpus.close()
    if message := end_of_mixture(source):
        echo(message)


def workers_for(source: Source, requested: int) -> int:
    """Number of processes that tokenize: `requested`, or one for each core as long as there is work for it."""
    cores = os.cpu_count() or 1
    if requested or not source.size:
        return requested or cores
    return min(cores, 1 + source.size // BYTES_PER_WORKER)


def _batches(source: Source) -> Iterator[tuple[list[str], np.ndarray]]:
    """Batches of documents, and the part of the source that each document came from, int64."""
    batch: list[str] = []
    parts: list[int] = []
    held = 0
    for text in source.documents():
        batch.append(text)
        parts.append(source.part)
        held += len(text)
        if held >= BATCH_CHARACTERS:
            yield batch, np.array(parts)
            batch, parts, held = [], [], 0
    if batch:
        yield batch, np.array(parts)
