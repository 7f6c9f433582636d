"""Files of shards: few stay open, cold rows cost their own pages, and any number of shards works at a low limit."""

import ctypes
import gc
import mmap
import os
import resource
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from fastbert.data import array_files
from fastbert.data.array_files import OPEN, ArrayFile, most_open
from fastbert.errors import UserError

PAGE = mmap.PAGESIZE


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def in_use(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


@contextmanager
def limit_of_files(more: int) -> Iterator[None]:
    """Lets this process open at most `more` files than it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [number for number in range(soft if soft > 0 else 4096) if not in_use(number)][: more + 1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], hard))  # numbers from it on are not given
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def written(folder: Path, count: int, length: int = 1000) -> list[ArrayFile]:
    for number in range(count):
        np.save(folder / f"{number}.npy", np.arange(length, dtype=np.uint16) + number)
    return [ArrayFile(folder / f"{number}.npy", np.dtype(np.uint16)) for number in range(count)]


def fill(highest: int, held: ExitStack) -> None:
    """Takes all free descriptors up to `highest`, until `held` is closed."""
    number = -1
    while number < highest:
        held.callback(os.close, number := os.dup(0))


def test_files_are_closed_where_the_process_has_no_descriptor_left(tmp_path: Path) -> None:
    """The limit covers what else the process has open, of which these files know nothing."""
    files = written(tmp_path, 8)
    with ExitStack() as held:
        for file in files[:4]:
            file.read(0, 1)
        highest = OPEN.of(files[3]).number
        fill(highest, held)
        with limit_of_files(0):
            assert list(files[4].read(0, 2)) == [4, 5]
            assert len(files[5].map()) == 1000 and list(files[0].read(1, 2)) == [1]
        for file in files:
            OPEN.forget(file)
        fill(highest, held)
        with limit_of_files(0), pytest.raises(UserError, match="too many files are open"):
            files[6].read(0, 1)


def test_few_files_stay_open_and_all_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_files, "most_open", lambda: 3)
    gc.collect()
    before, files = descriptors(), written(tmp_path, 10)
    assert descriptors() == before  # nothing is opened before it is read
    held = OPEN.of(files[0])
    for number in np.random.default_rng(0).integers(0, 10, 60):  # a third of these files are open already
        assert np.array_equal(files[number].read(5, 900), np.arange(5, 900) + number)
        assert descriptors() <= before + 3 + 1
    assert len(OPEN) == 3 and os.pread(held.number, 6, 1) == b"NUMPY\x01"  # a reader's file is not closed
    del held, files
    gc.collect()
    assert descriptors() == before


def test_the_number_of_open_files_follows_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, most in ((1024, 256), (256, 64), (16, 8), (10**6, 1024), (resource.RLIM_INFINITY, 1024)):
        monkeypatch.setattr(resource, "getrlimit", lambda which, limit=limit: (limit, limit))
        assert most_open() == most


def test_threads_read_what_is_in_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While each closes the files of the others."""
    monkeypatch.setattr(array_files, "most_open", lambda: 1)
    files, wrong = written(tmp_path, 7), []

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 7, 300):
            if not np.array_equal(files[number].read(10, 40), np.arange(10, 40) + number):
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_file_that_is_cut_off_meanwhile(tmp_path: Path) -> None:
    (file,) = written(tmp_path, 1)
    os.truncate(file.path, 500)
    assert len(file.read(0, 100)) == 100
    with pytest.raises(UserError, match=r"0\.npy was cut off while it was in use; prepare it again"):
        file.read(100, 300)


def test_a_limit_that_is_too_low_is_a_user_error(tmp_path: Path) -> None:
    (file,) = written(tmp_path, 1)
    with limit_of_files(0), pytest.raises(UserError, match=r"0\.npy cannot be read: too many files.*ulimit -n"):
        file.read(0, 1)


class Residency:
    """Pages of a file that are in memory, of a folder on a disk: files in memory have no cold pages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mincore = ctypes.CDLL(None, use_errno=True).mincore

    def evict(self) -> None:
        handle = os.open(self.path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)

    def bytes(self) -> int:
        with open(self.path, "rb") as file:
            pages = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        first = ctypes.c_char.from_buffer(pages)
        count = -(-len(pages) // PAGE)
        found = (ctypes.c_ubyte * count)()
        failed = self.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(pages)), found)
        del first
        pages.close()
        assert not failed, os.strerror(ctypes.get_errno())
        return PAGE * sum(page & 1 for page in found)


@pytest.fixture
def on_disk() -> Iterator[Path]:
    """A folder whose files leave memory when they are asked to, unlike those of the other tests."""
    for parent in ("/var/tmp", Path.home(), Path(__file__).parent, "."):
        if not os.access(parent, os.W_OK):
            continue
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            probe = Residency(Path(folder) / "probe")
            probe.path.write_bytes(bytes(64 * PAGE))
            probe.evict()
            if probe.bytes() == 0:
                yield Path(folder)
                return
    pytest.fail("none of these folders is on a disk: /var/tmp, the home folder, that of the tests")


def test_cold_rows_cost_their_own_pages(on_disk: Path) -> None:
    """256 rows of 1 KB at random positions of a file of 48 MB: at most two pages each, also where one follows another.
    Without the advice to the system there are more, and a map reads 16 MB and more."""
    np.save(on_disk / "tokens.npy", np.zeros(24 * 2**20, np.uint16))
    file, state = ArrayFile(on_disk / "tokens.npy", np.dtype(np.uint16)), Residency(on_disk / "tokens.npy")
    starts = np.random.default_rng(0).integers(0, len(file) - 3072, 128)
    starts = np.stack([starts, starts + 2048], axis=1).flatten().tolist()  # on the next page or two
    state.evict()
    for start in starts:
        file.read(start, start + 512)
    assert 256 * PAGE <= state.bytes() <= 256 * 2 * PAGE
    state.evict()
    tokens = file.map()
    assert int(tokens[: 2**20].max()) == 0  # in order, with read-ahead
    assert state.bytes() >= 2 * 2**20
