"""Exact counts by 64-bit hash in bounded memory: full tables are written to the disk as sorted runs, and added up at
the end, a range of hashes at a time.

The counts are sums, so they do not depend on the order of the corpus, on when a table was full, or on the number of
parts that a corpus was prepared in.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data.encoding import sum_by_key
from fastbert.data.integrity import FileRecord, compare, is_record, save_array, sync_file
from fastbert.errors import UserError

MOST = 2**20  # entries of a table in memory: 16 MB, and a few times as much while two are added
RANGE = 2**20  # entries added up at a time at the end
KINDS = ("hashes", "counts")
WORDS, DOCUMENTS = "words", "documents"  # the tallies of a corpus


def tally_name(what: str, alone: bool) -> str:
    """Name of the tally of WORDS or DOCUMENTS in a folder. That of a corpus prepared alone is hidden, since it is
    removed with the other working files."""
    return f".{what}" if alone else what


class Tally:
    """Counts of the entries that were added, by hash.

    The files of run N are NAME-0000N.hashes.npy (uint64, ascending) and NAME-0000N.counts.npy (int64).
    """

    def __init__(self, folder: Path, name: str, most: int | None = None) -> None:
        self.folder, self.name, self.most = folder, name, most or MOST
        self.runs: list[dict[str, FileRecord]] = []
        self._hashes, self._counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._held = 0

    def add(self, hashes: np.ndarray, counts: np.ndarray) -> None:
        """Adds `counts` (int64) to the entries with these `hashes` (uint64)."""
        self._pending.append((hashes, counts))
        self._held += len(hashes)
        if self._held >= self.most // 2:
            self._merge()

    def flush(self) -> None:
        """Writes the table in memory as a run."""
        self._merge()
        if not len(self._hashes):
            return
        run = {}
        for kind, array in zip(KINDS, (self._hashes, self._counts), strict=True):
            name = f"{self.name}-{len(self.runs):05d}.{kind}.npy"
            run[name] = save_array(self.folder / name, array)
            sync_file(self.folder / name)
        self.runs.append(run)
        self._hashes, self._counts = self._hashes[:0], self._counts[:0]

    def state(self) -> tuple[list[dict[str, FileRecord]], dict[str, np.ndarray]]:
        """JSON and arrays for `restore`."""
        self._merge()
        return list(self.runs), {"hashes": self._hashes, "counts": self._counts}

    def restore(self, runs: list[dict[str, FileRecord]], arrays: dict[str, np.ndarray]) -> None:
        """Resumes from `state()`; later runs are removed.

        Raises:
            UserError: a run is damaged.
        """
        files = files_of(runs, self.name)
        compare(self.folder, files, "it is not what the interrupted call wrote")
        self.runs, self._hashes, self._counts = list(runs), arrays["hashes"], arrays["counts"]
        for path in self.folder.glob(f"{self.name}-*.npy"):
            if path.name not in files:
                path.unlink()

    @property
    def paths(self) -> list[Path]:
        """Files of hashes of the runs, for `sums`."""
        return paths_of(self.folder, self.runs)

    def _merge(self) -> None:
        if self._pending:
            hashes, counts = zip((self._hashes, self._counts), *self._pending, strict=True)
            self._pending, self._held = [], 0
            self._hashes, self._counts = sum_by_key(np.concatenate(hashes), np.concatenate(counts))
            if len(self._hashes) > self.most:
                self.flush()


def files_of(runs: Any, name: str) -> dict[str, FileRecord]:
    """The records of all files of runs, from a JSON file.

    Raises:
        UserError: they are not those of a tally called `name`.
    """
    files: dict[str, FileRecord] = {}
    for number, run in enumerate(runs if isinstance(runs, list) else [None]):
        names = {f"{name}-{number:05d}.{kind}.npy" for kind in KINDS}
        if not isinstance(run, dict) or set(run) != names or not all(map(is_record, run.values())):
            raise UserError(f"the record of the files {name}-*.npy is damaged")
        files |= run
    return files


def paths_of(folder: Path, runs: list[dict[str, FileRecord]]) -> list[Path]:
    """Files of hashes of runs in `folder`, for `sums`."""
    return [folder / name for run in runs for name in run if name.endswith(f".{KINDS[0]}.npy")]


def sums(runs: Iterable[Path]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (hashes, counts) of the distinct entries of `runs` (their files of hashes), of one or several tallies, in
    ranges of ascending hashes."""
    arrays = [
        tuple(np.load(path.with_name(path.name.replace(KINDS[0], kind)), mmap_mode="r") for kind in KINDS)
        for path in runs
    ]
    ranges = max(1, -(-sum(len(hashes) for hashes, _ in arrays) // RANGE))
    borders = [0] * len(arrays)
    for number in range(1, ranges + 1 if arrays else 1):
        stop, here = 2**64 * number // ranges, []
        for index, (hashes, counts) in enumerate(arrays):
            end = len(hashes) if number == ranges else int(np.searchsorted(hashes, np.uint64(stop)))
            here.append((np.array(hashes[borders[index] : end]), np.array(counts[borders[index] : end])))
            borders[index] = end
        yield sum_by_key(*map(np.concatenate, zip(*here, strict=True)))


def distinct(runs: Iterable[Path]) -> int:
    """Number of distinct entries of `runs`, as for `sums`."""
    return sum(len(hashes) for hashes, _ in sums(runs))
