"""Detection of duplicate documents by a 64-bit hash of their text, for `--drop-duplicates`.

Among n distinct documents, the probability that two have the same hash is n^2 / 2^65: 3e-4 for 100 million. A hash
takes 8 bytes of memory and, while the corpus is prepared, 8 bytes on the disk.
"""

import hashlib
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastbert.data.integrity import hash_of
from fastbert.errors import UserError


class Seen:
    """A growing set of uint64 keys: sorted arrays, each at least twice as long as the next."""

    def __init__(self, keys: np.ndarray) -> None:
        """
        Args:
            keys: the initial, distinct keys.
        """
        self._sorted = [np.sort(keys)]

    def add(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Adds `keys`.

        Returns:
            repeated, bool [keys]: True for a key that occurred before, in an earlier call or earlier in this one;
            new, uint64: the keys added to the set, in their order.
        """
        repeated = np.ones(len(keys), dtype=bool)
        repeated[np.unique(keys, return_index=True)[1]] = False
        for known in self._sorted:
            index = np.minimum(np.searchsorted(known, keys), max(len(known) - 1, 0))
            repeated |= known[index] == keys if len(known) else False
        new = keys[~repeated]
        self._sorted.append(np.sort(new))
        while len(self._sorted) > 1 and len(self._sorted[-2]) < 2 * len(self._sorted[-1]):
            last = self._sorted.pop()
            self._sorted[-1] = np.sort(np.concatenate([self._sorted[-1], last]), kind="stable")
        return repeated, new


class KeyFile:
    """The keys on the disk, with which an interrupted call is resumed."""

    def __init__(self, path: Path) -> None:
        self.path, self.count, self._sha = path, 0, hashlib.sha256()
        self._file: IO[bytes] | None = None

    def write(self, keys: np.ndarray) -> None:
        if self._file is None:
            self._file = self.path.open("wb")
        content = keys.astype("<u8").tobytes()
        self._file.write(content)
        self._sha.update(content)
        self.count += len(keys)

    def sync(self) -> None:
        """Flushes all written keys to the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def state(self) -> dict[str, Any]:
        """JSON for `restore`."""
        return {"count": self.count, "sha256": self._sha.hexdigest()}

    def restore(self, state: dict[str, Any], needed: bool) -> None:
        """Resumes after the keys of `state`; later keys are cut off.

        Args:
            needed: True if keys are read or written again; otherwise only their number is used.

        Raises:
            UserError: the file does not begin with these keys.
        """
        self.count = state["count"]
        if needed and self.count:
            self._sha = hash_of(self.path, stop=8 * self.count)
            if self._sha.hexdigest() != state["sha256"]:
                raise UserError(f"{self.path} is damaged: it is not what the interrupted call wrote")
            self._file = self.path.open("r+b")
            self._file.truncate(8 * self.count)
            self._file.seek(0, os.SEEK_END)

    def read(self) -> np.ndarray:
        """All keys, uint64."""
        self.sync()
        return np.fromfile(self.path, "<u8").astype(np.uint64) if self.count else np.zeros(0, np.uint64)

    def close(self) -> None:
        """Removes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self.path.unlink(missing_ok=True)
