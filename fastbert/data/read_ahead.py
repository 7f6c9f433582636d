"""Decompression in a thread of its own, a few blocks ahead of the reader.

The libraries release Python's global lock while they decompress a block, so this takes no time from the thread that
reads lines. Blocks are large because a thread waits for the lock after each of them.
"""

import gzip
import io
import lzma
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import IO

BLOCK = 2**22  # bytes of text
COMPRESSED = 2**18  # bytes of an .xz file read at a time
AHEAD = 2  # blocks
XZ = b"\xfd7zXZ\x00"  # beginning of a stream


def sizes() -> Iterator[int]:
    """Sizes of successive blocks in bytes, up to BLOCK. The first ones are small, because often only the beginning of a
    file is read."""
    size = 2**16
    while True:
        yield size
        size = min(2 * size, BLOCK)


def xz_blocks(raw: IO[bytes]) -> Iterator[bytes]:
    """The content of an .xz file. `lzma.LZMAFile` would take the lock for every 8 KB of the file.

    Raises:
        EOFError: the file is cut off.
    """
    decompressor, compressed = lzma.LZMADecompressor(), b""
    for size in sizes():
        if decompressor.needs_input and not compressed:
            compressed = raw.read(COMPRESSED)
            if not compressed:
                raise EOFError("it ends before its end-of-stream marker")
        block, compressed = decompressor.decompress(compressed, size), b""
        if block:
            yield block
        if decompressor.eof:  # a file may consist of several streams, with zero bytes between them
            compressed = decompressor.unused_data.lstrip(b"\0")
            while len(compressed) < len(XZ) and (more := raw.read(COMPRESSED)):
                compressed = (compressed + more).lstrip(b"\0")
            if not compressed.startswith(XZ):  # other bytes behind the last stream are ignored, as by LZMAFile
                return
            decompressor = lzma.LZMADecompressor()


def gzip_blocks(raw: IO[bytes]) -> Iterator[bytes]:
    """The content of a .gz file."""
    with gzip.GzipFile(fileobj=raw) as stream:
        for size in sizes():
            if not (block := stream.read(size)):
                return
            yield block


def zstd_blocks(raw: IO[bytes]) -> Iterator[bytes]:
    """The content of a .zst file."""
    import pyarrow

    with open(os.dup(raw.fileno()), "rb") as own:  # the stream closes its file at the end
        stream = pyarrow.CompressedInputStream(own, "zstd")
        for size in sizes():
            if not (block := stream.read(size)):
                return
            yield block


BLOCKS: dict[str, Callable[[IO[bytes]], Iterator[bytes]]] = {".gz": gzip_blocks, ".xz": xz_blocks, ".zst": zstd_blocks}
"""Suffix -> function that yields the decompressed content of a file."""


class ReadAhead(io.RawIOBase):
    """A readable stream of blocks that a thread makes. An exception of the thread is raised where it occurred."""

    def __init__(self, raw: IO[bytes], blocks: Iterator[bytes]) -> None:
        self.position = 0
        """Position in `raw` after the block that is being read."""
        self._raw, self._blocks = raw, blocks
        self._queue: queue.Queue[tuple[bytes | BaseException, int]] = queue.Queue(AHEAD)
        self._closing = False
        self._rest: memoryview | BaseException = memoryview(b"")
        self._thread = threading.Thread(target=self._fill, daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        try:
            for block in self._blocks:
                self._queue.put((block, self._raw.tell()))
                if self._closing:
                    return
            self._queue.put((b"", self._raw.tell()))
        except BaseException as error:  # any: the reader decides
            self._queue.put((error, self.position))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        if isinstance(self._rest, memoryview) and not self._rest and self._thread is not None:
            found, self.position = self._queue.get()
            self._rest = found if isinstance(found, BaseException) else memoryview(found)
            if not self._rest:  # the end
                self._thread = None
        if isinstance(self._rest, BaseException):
            raise self._rest
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        """Stops the thread, which may wait for room or decompress a last block."""
        self._closing = True
        while self._thread is not None and self._thread.is_alive():
            try:
                self._queue.get(timeout=0.01)
            except queue.Empty:
                continue
        super().close()
