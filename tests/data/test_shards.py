"""A prepared folder with any damage is refused with the name of the file; reading across shards works like in one
file."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data.note_words import NoteWords
from fastbert.data.prepare import PrepareOptions, prepare
from fastbert.data.shards import Dataset, open_dataset
from fastbert.data.tokenizer import WordPiece
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.errors import UserError
from tests.data.test_array_files import limit_of_files


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    texts = [f"Document {n} of many: " + " ".join(f"word{n * k % 97}" for k in range(n % 60)) for n in range(300)]
    texts.insert(150, " ".join(f"long{n % 6}" for n in range(3000)))  # over several shards, in which no document begins
    (folder / "a.txt").write_text("\n\n".join(texts))
    options = PrepareOptions(
        str(folder / "a.txt"), str(folder / "out"), vocab_size=300, validation_fraction=0.3, workers=1,
        shard_tokens=1024, rare_min=2,
    )  # fmt: skip
    return prepare(options, table=io.StringIO())


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def test_reading_across_shards(prepared: Path) -> None:
    dataset = open_dataset(prepared)
    stream = dataset.split("train")
    files = sorted(prepared.glob("train-*.tokens.npy"))
    whole = np.concatenate([np.load(path) for path in files])
    all_rare = stream.rare(0, len(stream))
    assert len(files) > 2 and len(stream) == len(whole)
    assert np.all(np.diff(all_rare.positions) > 0) and np.all(np.diff(stream.documents) > 0)

    @settings(max_examples=200)
    @given(st.integers(0, len(whole)), st.one_of(st.integers(0, 200), st.integers(0, len(whole))))
    def check(start: int, length: int) -> None:
        stop = min(start + length, len(whole))
        part = stream.read(start, stop)
        assert part.dtype == whole.dtype and np.array_equal(part, whole[start:stop])
        rare = stream.rare(start, stop)
        here = (all_rare.positions >= start) & (all_rare.positions < stop)
        for name in ("positions", "lengths", "words"):
            assert np.array_equal(getattr(rare, name), getattr(all_rare, name)[here])

    check()
    for start, stop in ((-1, 3), (5, 4), (0, len(whole) + 1)):
        with pytest.raises(IndexError):
            stream.read(start, stop)
    with pytest.raises(UserError, match="did you mean 'train'"):
        dataset.split("training")
    dataset.verify()


def test_borders_of_documents_across_shards(prepared: Path) -> None:
    stream = open_dataset(prepared).split("train")
    borders, every = [*stream.documents.tolist(), len(stream)], np.arange(len(stream))
    begin = np.load(sorted(prepared.glob("train-*.documents.npy"))[0])
    assert begin[0] == 0 and 0 in map(len, map(np.load, prepared.glob("train-*.documents.npy")))
    after = np.searchsorted(borders, every, side="right")
    for step in (1, 777):
        first, end = stream.document_borders(every[::step])
        assert np.array_equal(first, np.take(borders, after[::step] - 1))
        assert np.array_equal(end, np.take(borders, after[::step]))


def test_many_shards_at_a_low_limit_of_open_files(prepared: Path) -> None:
    """Verification, all rows and all words with notes of five files for each shard."""
    with limit_of_files(20):
        dataset = open_dataset(prepared, verify=True)
        stream = dataset.split("train")
        assert len(stream._borders) > 10
        every = np.concatenate([stream.read(start, start + 100) for start in range(0, len(stream) - 100, 100)])
        notes = NoteWords(stream, np.arange(len(dataset.rare_words), dtype=np.int32), 32, 4)
    files = sorted(prepared.glob("train-*.tokens.npy"))
    assert np.array_equal(every, np.concatenate([np.load(path) for path in files])[: len(every)])
    assert len(notes.index.positions) > 1000


def error_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(folder)
    return str(caught.value)


def test_missing_and_unfinished_folders(copy: Path, tmp_path: Path) -> None:
    assert "does not exist; write it with fastbert prepare" in error_of(tmp_path / "none")
    (copy / "dataset.json").unlink()
    assert "has no dataset.json" in error_of(copy)
    (copy / "dataset.json").write_text('{"half": ')
    assert "is damaged" in error_of(copy)
    (copy / "dataset.json").write_text("[]")
    assert "does not describe a prepared folder" in error_of(copy)


@pytest.mark.parametrize(
    "name",
    [
        "train-00001.tokens.npy",
        "validation-00000.documents.npy",
        "train-00000.rare.words.npy",
        "unigram-train.npy",
        "rare_words.json",
    ],
)
def test_cut_off_flipped_and_missing_files_are_named(copy: Path, name: str) -> None:
    path = copy / name
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-2])
    assert f"{name} has {len(data) - 2:,} bytes, not {len(data):,}" in error_of(copy)
    if name != "rare_words.json" and name != "unigram-train.npy":
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"{name} is damaged"):
            open_dataset(copy).verify()
    path.unlink()
    assert f"{name} is missing" in error_of(copy)


def edit(folder: Path, **changes: object) -> None:
    record = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(record | changes))


def test_other_formats_types_and_tokenizers(copy: Path) -> None:
    path = copy / "train-00000.tokens.npy"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"'<u2'", b"'<i2'", 1))
    assert "train-00000.tokens.npy contains int16" in error_of(copy)
    path.write_bytes(b"x" * len(data))
    assert "damaged .npy file" in error_of(copy)
    path.write_bytes(data)
    unigrams = np.load(copy / "unigram-train.npy")
    np.save(copy / "unigram-train.npy", unigrams + 1)
    assert "unigram-train.npy does not match the tokens" in error_of(copy)
    np.save(copy / "unigram-train.npy", unigrams)
    assert isinstance(open_dataset(copy), Dataset)

    tokenizer = load_tokenizer(copy)
    WordPiece(tokenizer.tokens, lowercase=False).save(copy / "tokenizer")
    assert "contains shards of another tokenizer" in error_of(copy)
    edit(copy, format_version=1)
    assert "is of format 1, this version reads 2" in error_of(copy)
