"""Resources of reading 10^7 to 10^10 tokens at a limit of 256 open files: python scripts/large_text/measure.py
BASE OUT, where BASE is any prepared folder of at most 2^16 words and OUT a new folder on a disk with 5 GB.

Measured in a process of its own for each size: open files, memory, and the bytes of the tokens' files that 256 cold
rows bring into memory, compared with a memory map. Then `fastbert pretrain` makes two steps without and with notes.
"""

import ctypes
import mmap
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from corpus import SHARDS, write

from fastbert.data.batches import PackedRows, TrainingBatches
from fastbert.data.note_index import index_folder
from fastbert.data.note_words import NoteWords, choose_words
from fastbert.data.shards import TokenStream, open_dataset, read_record
from fastbert.data.stages import BatchPlan
from fastbert.records import json_text, parse_json
from fastbert.training.read_ahead import ReadAhead

SIZES = (10**7, 10**8, 10**9, 10**10)
LIMIT, ROWS, LENGTH = 256, 256, 512
CPU = torch.device("cpu")


def cached(paths: list[Path]) -> int:
    """Bytes of the files that are in the page cache."""
    mincore, total = ctypes.CDLL(None, use_errno=True).mincore, 0
    for path in paths:
        with open(path, "rb") as file:
            pages = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        found = (ctypes.c_ubyte * -(-len(pages) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(pages)
        if mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(pages)), found):
            raise OSError(ctypes.get_errno(), "mincore")
        total += mmap.PAGESIZE * int((np.frombuffer(found, np.uint8) & 1).sum())
        del first
        pages.close()
    return total


def evict(paths: list[Path]) -> None:
    """Removes the files from the page cache."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def memory(kind: str, process: int | str = "self") -> int:
    """Bytes of a process's resident memory by the name in /proc/PID/status."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def mapped_rows(stream: TokenStream, starts: list[int], files: list[Path]) -> None:
    """Reads rows from memory maps, as before."""
    size, maps = len(stream) // SHARDS, {}
    for start in starts:
        number, first = divmod(start, size)
        if number not in maps:
            maps = {number: np.memmap(files[number], np.uint16, "r", 128)}  # one at a time: the limit
        int(maps[number][first : first + LENGTH - 1].max())


def measure(folder: Path) -> dict[str, float]:
    """Figures of one size."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, LIMIT))
    before, anonymous = len(os.listdir("/proc/self/fd")), memory("RssAnon")
    start = time.perf_counter()
    dataset = open_dataset(folder)
    stream, opened = dataset.split("train"), time.perf_counter()
    files = sorted(folder.glob("train-*.tokens.npy"))
    rows = PackedRows(stream, LENGTH, 2, 3)
    batches = TrainingBatches({LENGTH: rows}, BatchPlan.constant(ROWS, LENGTH), ROWS, 0, CPU)
    starts = (batches.order(np.arange(ROWS), LENGTH) * (LENGTH - 1)).tolist()
    evict(files)
    mapped_rows(stream, starts, files)
    by_map = cached(files)
    evict(files)
    begin = time.perf_counter()
    list(batches.at(0))
    cold_seconds, cold = time.perf_counter() - begin, cached(files)
    with ReadAhead(batches, 40, threaded=True) as ahead:
        for step in range(1, 40):
            list(ahead.at(step))
    found = {
        "open files": len(os.listdir("/proc/self/fd")) - before,
        "seconds to open": opened - start,
        "memory of 40 steps": memory("RssAnon") - anonymous,
        "cold bytes": cold,
        "cold bytes by a map": by_map,
        "cold seconds": cold_seconds,
    }
    begin = time.perf_counter()
    options = dataset.record["options"]
    words = choose_words(dataset, options["rare_min"], options["rare_max"], 0.2)
    index = index_folder(folder, "train", dataset.record["splits"]["train"]["shards"], words, LENGTH - 1)
    for name in ("index", "index again"):
        begin = time.perf_counter()
        notes = NoteWords(stream, words, LENGTH, 8, index)
        found[f"seconds of the {name}"] = time.perf_counter() - begin
    mapped = sum(getattr(notes.index, name).nbytes for name in ("positions", "words", "lefts", "rights", "lengths"))
    return found | {"occurrences": len(notes.index.positions), "bytes of the index": mapped}


def pretrain(folder: Path, notes: bool) -> dict[str, float]:
    """Peak memory of two steps of `fastbert pretrain` at the limit, in bytes: all of it, and without mapped files."""
    options = read_record(folder)["options"]
    band = ["--notes.min-count", str(options["rare_min"]), "--notes.max-count", str(options["rare_max"])]
    shape = ["--layers", "2", "--width", "32", "--heads", "2", "--length", "128", "--batch-size", "64", "--steps", "2"]
    command = [sys.executable, "-m", "fastbert", "pretrain", "--data", str(folder), "--out", f"{folder}-run", *shape]
    command += ["--eval-sequences", "16", *(["--notes.enabled", *band] if notes else [])]
    limited = ["bash", "-c", f'ulimit -n {LIMIT}; exec "$@"', "bash", *command]
    process = subprocess.Popen(limited, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    printed: list[str] = []
    reader = threading.Thread(target=lambda: printed.append(process.stderr.read()))
    reader.start()
    whole = own = 0
    while process.poll() is None:  # not `ru_maxrss`, which begins with the memory of this process
        with suppress(OSError, StopIteration):
            whole, own = max(whole, memory("VmHWM", process.pid)), max(own, memory("RssAnon", process.pid))
        time.sleep(0.05)
    reader.join()
    shutil.rmtree(f"{folder}-run", ignore_errors=True)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{printed[0]}")
    name = "with notes" if notes else "without notes"
    return {f"peak {name}": whole, f"own peak {name}": own}


def main(base: Path, out: Path) -> None:
    """Prints a row of JSON for each size; removes what it has written."""
    out.mkdir()
    try:
        for tokens in SIZES:
            folder = out / str(tokens)
            write(base, folder, tokens)
            blocks = sum(512 * path.stat().st_blocks for path in folder.rglob("*"))
            own = subprocess.run([sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, check=True)
            row = {"tokens": tokens, "blocks": blocks, **parse_json(own.stdout, "the measurement")}
            print(json_text({**row, **pretrain(folder, False), **pretrain(folder, True)}), flush=True)
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(out)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json_text(measure(Path(sys.argv[1]))))
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
