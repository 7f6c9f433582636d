"""Writes the shards of one split: plain .npy files that numpy maps into memory."""

import hashlib
import io
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastbert.data.encoding import token_dtype

PARTS = ("tokens", "documents", "rare.positions", "rare.lengths", "rare.words")
HEADER_BYTES = 128  # of a one-dimensional .npy file, whatever its length


def shard_file(split: str, number: int, part: str) -> str:
    """The name of a shard's file, for example train-00000.tokens.npy."""
    return f"{split}-{number:05d}.{part}.npy"


def file_record(path: Path) -> dict[str, Any]:
    """What dataset.json notes of a file: its bytes and sha256."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


class SplitWriter:
    """Takes a split's documents in order and writes token files of at most `shard_tokens` tokens.

    A document is cut, before a word, only if it alone exceeds a shard.
    """

    def __init__(self, folder: Path, split: str, continuing: np.ndarray, shard_tokens: int) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.continuing = continuing
        self.dtype = token_dtype(len(continuing))
        self.unigrams = np.zeros(len(continuing), np.int64)
        self.documents = self.bytes = 0
        self.shards: list[int] = []
        """Tokens of each finished shard."""
        self._file: IO[bytes] | None = None
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
        """Finishes the last shard."""
        if self._file is not None:
            self._finish_shard()

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """JSON and arrays from which `restore` goes on; what was written so far is on the disk when this returns."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        record = {"documents": self.documents, "bytes": self.bytes, "shards": self.shards, "tokens": self._tokens}
        starts = np.concatenate([np.zeros(0, np.int64), *self._starts])
        return record, {"unigrams": self.unigrams, "starts": starts}

    def restore(self, record: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Goes on from `state()`; what was written after it is cut off or, in later shards, written over."""
        self.documents, self.bytes, self.shards = record["documents"], record["bytes"], list(record["shards"])
        self.unigrams, self._starts, self._tokens = arrays["unigrams"], [arrays["starts"]], record["tokens"]
        if self._tokens:
            self._file = (self.folder / shard_file(self.split, len(self.shards), "tokens")).open("r+b")
            self._file.truncate(HEADER_BYTES + self._tokens * self.dtype.itemsize)
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
        self._file.write(np.ascontiguousarray(tokens, self.dtype).data)
        self._tokens += len(tokens)

    def _finish_shard(self) -> None:
        assert self._file is not None
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": self.dtype.str, "fortran_order": False, "shape": (self._tokens,)}
        )
        assert len(header.getvalue()) == HEADER_BYTES
        self._file.seek(0)
        self._file.write(header.getvalue())
        self._file.close()
        name = shard_file(self.split, len(self.shards), "documents")
        np.save(self.folder / name, np.concatenate(self._starts).astype(np.int64), allow_pickle=False)
        self.shards.append(self._tokens)
        self._file, self._tokens, self._starts = None, 0, []
