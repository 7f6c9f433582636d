"""A source's documents through the tokenizer into shards, with a state from which a killed process goes on.

Batches, states and all counts are functions of the source alone, so neither the number of workers nor where a process
was killed shows in the result.
"""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data.encoding import Encoded, encode_in_worker
from fastbert.data.hashing import document_hash
from fastbert.data.partial import Partial
from fastbert.data.progress import Report
from fastbert.data.rare import WordCounter
from fastbert.data.shards import SPLITS
from fastbert.data.shares import Shares, told_end
from fastbert.data.sources import Source
from fastbert.data.tokenizer import WordPiece
from fastbert.data.workers import in_order
from fastbert.data.writer import SplitWriter

BATCH_CHARACTERS = 2**21
BYTES_PER_WORKER = 2**23  # a process takes half a second to start: less text than this is not worth one
STATE_BATCHES = 128  # between two states that are kept: 270 MB of text, some ten seconds


class Corpus:
    """Both splits of a source, as far as they are written."""

    def __init__(self, folder: Path, wordpiece: WordPiece, shard_tokens: int, parts: int) -> None:
        self.writers = {split: SplitWriter(folder, split, wordpiece.continuing, shard_tokens) for split in SPLITS}
        self.counter, self.shares = WordCounter(), Shares(parts)
        self.batches = 0
        self.complete = False
        self.smallest, self.largest = (2**64, -1), (-1, -1)
        """(hash, index) of the documents at either end of the order that splits them."""

    def add(self, first: int, keys: np.ndarray, training: np.ndarray, parts: np.ndarray, encoded: Encoded) -> None:
        """Writes and counts a batch of documents.

        Args:
            first: the index of the first in the source.
            keys: uint64 [documents], their hashes.
            training: bool [documents], whether each is for training.
            parts: int64 [documents], the part of the source each came from.
        """
        low, high = int(keys.argmin()), int(keys.argmax())
        self.smallest = min(self.smallest, (int(keys[low]), first + low))
        self.largest = max(self.largest, (int(keys[high]), first + high))
        self.shares.add(parts, training, encoded.sizes, encoded.lengths)
        of_tokens = np.repeat(training, encoded.lengths)
        for split, here, tokens in (("train", training, of_tokens), ("validation", ~training, ~of_tokens)):
            self.writers[split].write(encoded.tokens[tokens], encoded.lengths[here], int(encoded.sizes[here].sum()))
        self.counter.add(encoded.word_hashes, encoded.word_counts)
        self.batches += 1

    def close(self) -> None:
        """Finishes the last shards."""
        for writer in self.writers.values():
            writer.close()
        self.complete = True

    def save(self, partial: Partial, source: Source) -> None:
        """Keeps all that `restore` needs."""
        states = {split: writer.state() for split, writer in self.writers.items()}
        record: dict[str, Any] = {name: getattr(self, name) for name in ("batches", "complete", "smallest", "largest")}
        record |= {"writers": {split: state[0] for split, state in states.items()}, "ended_by": source.ended_by}
        arrays = {f"{split}.{name}": array for split, state in states.items() for name, array in state[1].items()}
        arrays |= {f"counter.{name}": array for name, array in self.counter.state().items()}
        partial.save(record, {**arrays, "shares": self.shares.counts})

    def restore(self, partial: Partial, source: Source) -> None:
        """Goes on from the state that was kept last, if there is one."""
        if (kept := partial.load()) is None:
            return
        record, arrays = kept

        def group(name: str) -> dict[str, np.ndarray]:
            return {key.removeprefix(f"{name}."): a for key, a in arrays.items() if key.startswith(f"{name}.")}

        self.batches, self.complete = record["batches"], record["complete"]
        self.smallest, self.largest = tuple(record["smallest"]), tuple(record["largest"])
        for split, writer in self.writers.items():
            writer.restore(record["writers"][split], group(split))
        self.counter.restore(group("counter"))
        self.shares.counts = arrays["shares"]
        source.ended_by = record["ended_by"]


def tokenize(
    corpus: Corpus,
    source: Source,
    share: float,
    seed: int,
    moved: dict[int, bool],
    partial: Partial,
    submit: Callable[..., Future],
    report: Report,
) -> None:
    """Writes the source into `corpus`, from where that stands to the end.

    Args:
        share, seed: of the documents, this share goes to validation, by a hash of (seed, index).
        moved: documents that go to validation (True) or training whatever their hash is.
        partial: keeps the state now and then, unless documents are moved.
        submit: runs a function with arguments elsewhere.
    """
    bound = np.uint64(int(share * 2**64))
    known = corpus.batches

    def jobs() -> Iterator[tuple[tuple[int, np.ndarray, np.ndarray, np.ndarray], int, Future]]:
        index = 0
        for number, (texts, parts) in enumerate(_batches(source)):
            first, index = index, index + len(texts)
            if number < known:
                continue
            keys = document_hash(seed, first, len(texts))
            training = keys >= bound
            for document, validation in moved.items():
                if first <= document < index:
                    training[document - first] = not validation
            yield (first, keys, training, parts), source.position, submit(encode_in_worker, texts, training)

    for batch, position, encoded in in_order(jobs()):
        corpus.add(*batch, encoded)
        report(position)
        if corpus.batches % STATE_BATCHES == 0 and not moved:
            corpus.save(partial, source)
    corpus.close()
    if told := told_end(source):
        print(told, file=sys.stderr)


def workers_for(source: Source, asked: int) -> int:
    """Processes that tokenize: as many as `asked` for, or one for each core where there is work for it."""
    cores = os.cpu_count() or 1
    if asked or not source.size:
        return asked or cores
    return min(cores, 1 + source.size // BYTES_PER_WORKER)


def _batches(source: Source) -> Iterator[tuple[list[str], np.ndarray]]:
    """Documents in batches, and which part of the source each came from, int64."""
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
