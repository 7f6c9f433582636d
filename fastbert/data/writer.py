"""Writer of the shards of a split: plain .npy files that numpy maps into memory."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastbert.data.encoding import token_dtype
from fastbert.data.integrity import HEADER_BYTES, FileRecord, compare, hash_of, npy_header, save_array, sync_file
from fastbert.errors import UserError

PARTS = ("tokens", "documents", "rare.positions", "rare.lengths", "rare.words")


def shard_file(split: str, number: int, part: str) -> str:
    """Name of a file of a shard, for example train-00000.tokens.npy."""
    return f"{split}-{number:05d}.{part}.npy"


@dataclass(frozen=True)
class WrittenSplit:
    """Shards and totals of a split when all its documents are written."""

    documents: int
    bytes: int
    """UTF-8 bytes of text."""
    unigrams: np.ndarray
    """int64 [V]: number of occurrences of each id."""
    shards: list[int]
    """Number of tokens of each shard."""
    files: list[dict[str, FileRecord]]
    """Name -> record of the files of each shard."""


class SplitWriter:
    """Writes a split's documents in order to files of at most `shard_tokens` tokens and hashes them.

    Only a document that is longer than a shard is split, before a word.
    """

    def __init__(self, folder: Path, split: str, continuing: np.ndarray, shard_tokens: int) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.continuing = continuing
        self.dtype = token_dtype(len(continuing))
        self.unigrams = np.zeros(len(continuing), np.int64)
        self.documents = self.bytes = 0
        self.shards: list[int] = []
        """Number of tokens of each finished shard."""
        self.files: list[dict[str, FileRecord]] = []
        """Name -> record of the files of each finished shard."""
        self._file: IO[bytes] | None = None
        self._sha = hashlib.sha256()
        self._durable = 0  # number of shards flushed to the disk
        self._tokens = 0
        self._starts: list[np.ndarray] = []

    def write(self, tokens: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        """Adds documents: `tokens` [sum of lengths] with `lengths` [documents] tokens each."""
        if not len(lengths):
            return
        self.unigrams += np.bincount(tokens, minlength=len(self.unigrams))
        self.documents += len(lengths)
        self.bytes += text_bytes
        ends = np.cumsum(lengths)
        first = done = 0
        while first < len(lengths):
            room = self.shard_tokens - self._tokens
            fit = int(np.searchsorted(ends, done + room, side="right")) - first
            if fit:
                stop = int(ends[first + fit - 1])
                self._append(tokens[done:stop], ends[first : first + fit] - lengths[first : first + fit] - done)
                first, done = first + fit, stop
            elif self._tokens:
                self._finish_shard()
            else:
                self._write_long(tokens[done : ends[first]])
                done = int(ends[first])
                first += 1
        if self._tokens == self.shard_tokens:
            self._finish_shard()

    def close(self) -> None:
        """Ends the last shard; further documents begin another one."""
        if self._file is not None:
            self._finish_shard()

    def written(self) -> WrittenSplit:
        """All documents written so far, after `close`."""
        return WrittenSplit(self.documents, self.bytes, self.unigrams, self.shards, self.files)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """JSON and arrays for `restore`. Flushes everything written so far to the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        for name in (name for files in self.files[self._durable :] for name in files):
            sync_file(self.folder / name)
        self._durable = len(self.files)
        record = {"documents": self.documents, "bytes": self.bytes, "shards": self.shards, "files": self.files}
        record |= {"tokens": self._tokens, "sha256": self._sha.hexdigest()}
        starts = np.concatenate([np.zeros(0, np.int64), *self._starts])
        return record, {"unigrams": self.unigrams, "starts": starts}

    def restore(self, record: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Resumes from `state()`; later tokens are cut off or, in later shards, overwritten.

        Raises:
            UserError: the files differ from those written up to that state.
        """
        why = "it is not what the interrupted call wrote"
        self.documents, self.bytes, self.shards = record["documents"], record["bytes"], list(record["shards"])
        self.unigrams, self._starts, self._tokens = arrays["unigrams"], [arrays["starts"]], record["tokens"]
        self.files = list(record["files"])
        self._durable = len(self.files)
        compare(self.folder, {name: one for files in self.files for name, one in files.items()}, why)
        if self._tokens:
            path = self.folder / shard_file(self.split, len(self.shards), "tokens")
            end = HEADER_BYTES + self._tokens * self.dtype.itemsize
            self._sha = hash_of(path, stop=end)
            if self._sha.hexdigest() != record["sha256"]:
                raise UserError(f"{path} is damaged: {why}")
            self._file = path.open("r+b")
            self._file.truncate(end)
            self._file.seek(0, os.SEEK_END)

    def _write_long(self, tokens: np.ndarray) -> None:
        starts = np.zeros(1, np.int64)
        while len(tokens):
            stop = min(self.shard_tokens, len(tokens))
            while stop < len(tokens) and self.continuing[tokens[stop]]:
                stop -= 1
            self._append(tokens[:stop], starts)
            tokens, starts = tokens[stop:], starts[:0]
            if len(tokens):
                self._finish_shard()

    def _append(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        if self._file is None:
            self._file = (self.folder / shard_file(self.split, len(self.shards), "tokens")).open("wb")
            self._file.write(bytes(HEADER_BYTES))
        self._starts.append(starts + self._tokens)
        data = np.ascontiguousarray(tokens, self.dtype)
        self._file.write(data.data)
        self._sha.update(data)
        self._tokens += len(tokens)

    def _finish_shard(self) -> None:
        assert self._file is not None
        tokens, documents = (shard_file(self.split, len(self.shards), part) for part in ("tokens", "documents"))
        header = npy_header(self.dtype, self._tokens)
        self._file.seek(0)
        self._file.write(header)
        self._file.close()
        self._sha.update(header)
        size = HEADER_BYTES + self._tokens * self.dtype.itemsize
        starts = save_array(self.folder / documents, np.concatenate(self._starts).astype(np.int64))
        self.files.append({tokens: {"bytes": size, "sha256": self._sha.hexdigest()}, documents: starts})
        self.shards.append(self._tokens)
        self._file, self._sha, self._tokens, self._starts = None, hashlib.sha256(), 0, []
