"""Tokenizes a source's documents into shards, with a saved state from which a killed process continues.

Batches and all counts depend only on the source, not on the number of workers or on when states were saved.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data.duplicates import KeyFile, Seen
from fastbert.data.encoding import Encoded, encode_in_worker
from fastbert.data.hashing import text_hash
from fastbert.data.partial import Partial, leftover_errors
from fastbert.data.shards import SPLITS
from fastbert.data.source_counts import SourceCounts, end_of_mixture
from fastbert.data.sources import Source
from fastbert.data.tally import DOCUMENTS, WORDS, Tally, tally_name
from fastbert.data.tokenizer import WordPiece
from fastbert.data.workers import in_order
from fastbert.data.writer import SplitWriter
from fastbert.progress import progress
from fastbert.streams import echo

BATCH_CHARACTERS = 2**21
BYTES_PER_WORKER = 2**23  # starting a process takes half a second, which does not pay off for less text
GROUP_BYTES = 2  # stored bytes of a group of chunks, per token of a shard
STATE_SECONDS = 60.0  # between two saved states
COUNTS = ("group", "batches", "position", "complete", "smallest", "largest", "dropped")  # attributes saved as JSON
STATE_VERSION = 4  # raise it when the content of the state changes


class Corpus:
    """The part of a source that is already written, in both splits. A shard has documents of a single group of the
    source's chunks, so that the shards of a group do not depend on other groups."""

    def __init__(self, folder: Path, wordpiece: WordPiece, shard_tokens: int, parts: int, alone: bool) -> None:
        """
        Args:
            parts: number of `Source.parts`.
            alone: False for a part of a corpus, whose counts are needed after it is finished.
        """
        self.writers = {split: SplitWriter(folder, split, wordpiece.continuing, shard_tokens) for split in SPLITS}
        self.source_counts = SourceCounts(parts)
        self.tallies = {name: Tally(folder, tally_name(name, alone)) for name in (WORDS, DOCUMENTS)}
        """Occurrences of the words in training documents, and of documents, by hash."""
        self.group = self.batches = 0
        """Group of the last batch, and number of its batches that are written."""
        self.position = 0
        """`Source.position` after these batches."""
        self.complete = False
        self.smallest, self.largest = 2**64, -1
        """The smallest and the largest document hash; documents are split by their hash."""
        self.dropped = 0
        """Number of documents left out because their text occurred before."""
        self.keys = KeyFile(folder / ".keys")
        """Hashes of the documents, if duplicates are dropped."""

    @property
    def documents(self) -> int:
        """Number of documents written."""
        return sum(writer.documents for writer in self.writers.values())

    def add(
        self,
        group: int,
        keys: np.ndarray,
        training: np.ndarray,
        parts: np.ndarray,
        dropped: int,
        encoded: Encoded,
        drop_duplicates: bool,
    ) -> None:
        """Writes and counts a batch of documents.

        Args:
            group: number of the group that the batch belongs to.
            keys: uint64 [documents], hashes of the documents.
            training: bool [documents], True for training documents.
            parts: int64 [documents], the part of the source that each document came from.
            dropped: number of documents of the batch that were left out.
            drop_duplicates: `keys` are distinct and remembered for a later call.
        """
        if group != self.group:
            for writer in self.writers.values():
                writer.close()
            self.group, self.batches = group, 0
        self.dropped += dropped
        if drop_duplicates:
            self.keys.write(keys)
        else:
            self.tallies[DOCUMENTS].add(keys, np.ones(len(keys), np.int64))
        if len(keys):
            self.smallest, self.largest = min(self.smallest, int(keys.min())), max(self.largest, int(keys.max()))
        self.source_counts.add(parts, training, encoded)
        of_tokens = np.repeat(training, encoded.lengths)
        for split, here, tokens in (("train", training, of_tokens), ("validation", ~training, ~of_tokens)):
            self.writers[split].write(encoded.tokens[tokens], encoded.lengths[here], int(encoded.sizes[here].sum()))
        self.tallies[WORDS].add(encoded.word_hashes, encoded.word_counts)
        self.batches += 1

    def close(self) -> None:
        """Finishes the last shards and counts."""
        for writer in self.writers.values():
            writer.close()
        for tally in self.tallies.values():
            tally.flush()
        self.complete = True

    def save(self, partial: Partial, source: Source) -> None:
        """Saves everything that `restore` needs."""
        states = {split: writer.state() for split, writer in self.writers.items()}
        states |= {name: tally.state() for name, tally in self.tallies.items()}
        self.keys.sync()
        record: dict[str, Any] = {name: getattr(self, name) for name in COUNTS}
        record |= {
            "keys": self.keys.state(),
            "states": {name: state[0] for name, state in states.items()},
            "ended_by": source.ended_by,
        }
        arrays = {f"{name}/{key}": array for name, state in states.items() for key, array in state[1].items()}
        partial.save(record, {**arrays, "source_counts": self.source_counts.counts})

    def restore(self, partial: Partial, source: Source) -> None:
        """Resumes from the last saved state, if there is one.

        Raises:
            DamagedWorkError: state or files are damaged.
        """
        with leftover_errors(partial.folder):
            if (saved := partial.load()) is not None:
                self._restore(*saved, source)
            else:
                for tally in self.tallies.values():
                    tally.restore([], tally.state()[1])  # removes the runs of a call without a state

    def _restore(self, record: dict[str, Any], arrays: dict[str, np.ndarray], source: Source) -> None:

        def state(name: str) -> tuple[Any, dict[str, np.ndarray]]:
            of_name = {key.removeprefix(f"{name}/"): a for key, a in arrays.items() if key.startswith(f"{name}/")}
            return record["states"][name], of_name

        for name in COUNTS:
            setattr(self, name, record[name])
        self.keys.restore(record["keys"], needed=not self.complete)
        for name, one in {**self.writers, **self.tallies}.items():
            one.restore(*state(name))
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
        partial: stores the state every STATE_SECONDS seconds, unless documents are moved.
        submit: runs a function with arguments in another process.
    """
    bound = np.uint64(int(fraction * 2**64))
    groups = source.groups(GROUP_BYTES * corpus.writers["train"].shard_tokens)
    batches = _batches(source, groups, corpus.group)
    if corpus.batches:
        before = sum(chunk.size for chunk in source.chunks[: groups[corpus.group][0]])
        with progress("skipping what is already tokenized", corpus.position, done=before) as work:
            for _ in range(corpus.batches):
                next(batches)
                work.update(source.position)
    seen = Seen(corpus.keys.read()) if drop_duplicates else None

    def jobs() -> Iterator[tuple[tuple[int, np.ndarray, np.ndarray, np.ndarray, int], int, Future]]:
        first = apart
        for group, texts, parts in batches:
            keys, dropped = text_hash(seed, texts), 0
            if seen is not None:
                repeated, new = seen.add(keys)
                dropped = int(repeated.sum())
                texts = [text for text, again in zip(texts, repeated, strict=True) if not again]
                parts, keys = parts[~repeated], new
            training = keys >= bound
            for key, validation in moved.items():
                training[keys == np.uint64(key)] = not validation
            if first:
                training[0], first = not training[0], False
            yield (group, keys, training, parts, dropped), source.position, submit(encode_in_worker, texts, training)

    saved = time.monotonic()
    with progress("tokenizing", source.size, done=corpus.position) as work:
        for batch, corpus.position, encoded in in_order(jobs()):
            corpus.add(*batch, encoded, drop_duplicates)
            work.update(corpus.position)
            if time.monotonic() - saved >= STATE_SECONDS and not moved and not apart:
                corpus.save(partial, source)
                saved = time.monotonic()
    corpus.close()
    if message := end_of_mixture(source):
        echo(message)


def workers_for(size: int, requested: int) -> int:
    """Number of processes that tokenize a source of `size` bytes (0: unknown): `requested`, or one for each core if
    there is work for it."""
    cores = os.cpu_count() or 1
    if requested or not size:
        return requested or cores
    return min(cores, 1 + size // BYTES_PER_WORKER)


def _batches(source: Source, groups: list[tuple[int, int]], first: int) -> Iterator[tuple[int, list[str], np.ndarray]]:
    """Batches of documents from group `first` on: the number of the group, the documents, and the part of the source
    that each document came from, int64."""
    for group, (start, stop) in enumerate(groups[first:], first):
        batch: list[str] = []
        parts: list[int] = []
        held = 0
        for text in source.documents(start, stop):
            batch.append(text)
            parts.append(source.part)
            held += len(text)
            if held >= BATCH_CHARACTERS:
                yield group, batch, np.array(parts)
                batch, parts, held = [], [], 0
        if batch:
            yield group, batch, np.array(parts)
