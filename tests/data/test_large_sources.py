"""What makes large sources quick to read: excerpts for the tokenizer's sample, and decompression in a thread."""

import gzip
import lzma
import threading
from contextlib import closing
from pathlib import Path

import pyarrow
import pytest

from fastbert.data import read_ahead
from fastbert.data.read_ahead import BLOCKS, ReadAhead
from fastbert.data.sources import open_source
from fastbert.data.sources.combined import List, Mixture
from fastbert.data.sources.source import EXCERPT_CHUNKS, Chunk, Source
from fastbert.data.tokenizer import EXCERPT_BYTES, read_sample
from fastbert.errors import UserError

DOCUMENT = 10  # bytes


def counted(name: str, sizes: list[int], read: dict[str, int], known: bool = True) -> Source:
    """A source with a chunk of `sizes` documents each; `read` counts those that are read."""

    def chunk(number: int, size: int) -> Chunk:
        def documents():
            for n in range(size):
                read[f"{name}{number}"] = n + 1
                yield (n + 1) * DOCUMENT, f"{name}{number:04d} {n:04d}"

        return Chunk(size * DOCUMENT * known, documents)

    chunks = [chunk(number, size) for number, size in enumerate(sizes)]
    return Source(name, name, {}, sum(sizes) * DOCUMENT * known, chunks)


def excerpt(source: Source, limit: int) -> list[str]:
    found = list(source.excerpt(limit))
    fractions = [fraction for fraction, _ in found]
    assert fractions == sorted(fractions) and 0 < fractions[0] <= fractions[-1] <= 1
    return [text for _, text in found]


def test_an_excerpt_reads_the_beginnings_of_files_spread_over_the_source() -> None:
    read: dict[str, int] = {}
    source = counted("a", [1000] * 500, read)
    texts = excerpt(source, 64_000)
    assert texts == sorted(texts) == excerpt(source, 64_000) and len(texts) == 6_400
    assert set(read.values()) == {100} and len(read) == EXCERPT_CHUNKS
    fifths = [sum(number // 100 == fifth for number in (int(name[1:]) for name in read)) for fifth in range(5)]
    assert min(fifths) > 5
    # Many small files: enough of them for the text.
    read.clear()
    assert len(excerpt(counted("a", [3] * 5000, read), 60_000)) == 6_000 and len(read) == 2_000
    # One file: its beginning. Little text: all of it.
    assert excerpt(counted("a", [1000], read), 500) == [f"a0000 {n:04d}" for n in range(50)]
    assert excerpt(counted("a", [1000], read, known=False), 500) == [f"a0000 {n:04d}" for n in range(50)]
    assert len(excerpt(counted("a", [7, 0, 9], read), 10**6)) == 16


def test_an_excerpt_is_in_proportion_to_size_and_weights() -> None:
    read: dict[str, int] = {}
    parts = [counted("a", [9000], read), counted("b", [500, 500], read)]
    texts = excerpt(List("both", parts), 10_000)
    assert [sum(text.startswith(name) for text in texts) for name in "ab"] == [900, 100]
    texts = excerpt(Mixture("mix", parts, [0.25, 0.75]), 10_000)
    assert [sum(text.startswith(name) for text in texts) for name in "ab"] == pytest.approx([250, 750], abs=2)
    assert parts[0].ended_by is None and sum(text.startswith("b0001") for text in texts) == 375


def test_a_sample_reads_a_limited_part_of_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[str, int] = {}
    assert EXCERPT_BYTES == 2**30
    monkeypatch.setattr("fastbert.data.tokenizer.EXCERPT_BYTES", 5_000)
    assert len(read_sample(counted("a", [10_000], read), "reading")) == 500 and read == {"a0": 500}
    with pytest.raises(UserError, match="source 'a' has no text"):
        read_sample(counted("a", [0], read), "reading")


TEXT = "".join(f"document {n}\n\n" for n in range(20_000)).encode()


def compressed(kind: str, text: bytes) -> bytes:
    half = len(text) // 2
    if kind == ".gz":
        return gzip.compress(text[:half]) + gzip.compress(text[half:])
    if kind == ".xz":  # several streams with padding, as xz and pixz write them
        return lzma.compress(text[:half], preset=0) + lzma.compress(text[half:], preset=0) + bytes(8)
    return pyarrow.Codec("zstd").compress(text, asbytes=True)


@pytest.mark.parametrize("kind", BLOCKS)
def test_decompressed_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(read_ahead, "BLOCK", 2**16)
    path = tmp_path / f"a.txt{kind}"
    content = compressed(kind, TEXT)
    path.write_bytes(content)
    with open(path, "rb") as raw, closing(ReadAhead(raw, BLOCKS[kind](raw))) as ahead:
        assert ahead.read() == TEXT and ahead.position == len(content) and ahead.read() == b""
    source = open_source(str(path))
    positions = [source.position for _ in source.documents()]
    assert len(positions) == 20_000 and positions == sorted(positions) and positions[-1] == source.size
    # A reader that stops early ends the thread.
    before = threading.active_count()
    documents = source.documents()
    next(documents)
    assert threading.active_count() == before + 1
    documents.close()
    assert threading.active_count() == before


def test_damage_is_reported_by_the_reader(tmp_path: Path) -> None:
    """In a later stream, where it must not be mistaken for padding."""
    content = bytearray(lzma.compress(TEXT, preset=0) + lzma.compress(TEXT, preset=0))
    content[-len(content) // 4] ^= 1
    (tmp_path / "a.txt.xz").write_bytes(content)
    with pytest.raises(UserError, match=r"a.txt.xz is cut off, damaged or not a .xz file .*; fetch it again"):
        list(open_source(str(tmp_path / "a.txt.xz")).documents())
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(TEXT, preset=0)[:-20])
    with pytest.raises(UserError, match=r"b.txt.xz is cut off, .*it ends before its end-of-stream marker"):
        list(open_source(str(tmp_path / "b.txt.xz")).documents())
