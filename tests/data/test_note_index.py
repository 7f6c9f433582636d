"""The index of words with notes is found once, mapped by all processes, and never trusted if it is damaged."""

import os
from pathlib import Path

import numpy as np
import pytest

from fastbert.data import note_index
from fastbert.data.note_index import OCCURRENCES, RECORD, distinct, index_folder
from fastbert.data.note_words import NoteWords, choose_words
from fastbert.data.shards import Dataset, TokenStream, open_dataset
from fastbert.model.options import NoteDictionaryOptions
from fastbert.pretraining.note_corpus import find_note_words


@pytest.fixture
def dataset(prepared: Path, tmp_path: Path) -> Dataset:
    """`prepared` in a folder of its own, in which no index was written."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in prepared.iterdir():
        if path.name != note_index.FOLDER:
            (folder / path.name).symlink_to(path)
    return open_dataset(folder)


def index_of(dataset: Dataset, length: int = 32, fraction: float = 0.2) -> tuple[NoteWords, Path]:
    words = choose_words(dataset, 50, 500, fraction)
    shards = dataset.record["splits"]["train"]["shards"]
    folder = index_folder(dataset.folder, "train", shards, words, length - 1)
    return NoteWords(dataset.split("train"), words, length, 4, folder), folder


def values(words: NoteWords) -> list:
    names = ("positions", "words", "lefts", "rights", "lengths")
    return [getattr(words.index, name).tolist() for name in names] + [words.index.tokens, words.index.squares]


def test_an_index_is_found_once_and_then_mapped(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process has a copy of it, however many blocks it was found in."""
    first, folder = index_of(dataset)
    plain = NoteWords(dataset.split("train"), choose_words(dataset, 50, 500, 0.2), 32, 4)
    assert values(first) == values(plain) and len(first.index.positions) > 100
    others = [index_of(dataset, 64)[1], index_of(dataset, 32, 0.5)[1], folder]
    assert len(set(others)) == 3 and {path.name for path in folder.iterdir()} == {OCCURRENCES, RECORD}
    assert os.path.getsize(folder / OCCURRENCES) == 18 * len(first.index.positions)

    def read(*arguments: object) -> None:
        pytest.fail("read again")

    with monkeypatch.context() as patch:
        patch.setattr(TokenStream, "document_borders", read)
        again, _ = index_of(dataset)
        options = NoteDictionaryOptions(enabled=True)
        with pytest.raises(pytest.fail.Exception):  # the validation split has none yet
            find_note_words(options, dataset, 32, [32])
    assert values(again) == values(first) and not again.index.positions.flags.writeable
    assert Path("/proc/self/maps").read_text().count(str(folder / OCCURRENCES)) == 2  # `first` and `again`
    monkeypatch.setattr(note_index, "BLOCK_TOKENS", 1000)
    (folder / RECORD).unlink()
    assert values(index_of(dataset)[0]) == values(first)
    corpus = find_note_words(options, dataset, 32, [32])
    assert values(corpus.train) == values(first)


@pytest.mark.parametrize("name", [OCCURRENCES, RECORD])
def test_a_damaged_index_is_written_again(dataset: Dataset, name: str) -> None:
    first, folder = index_of(dataset)
    path, expected = folder / name, values(first)
    whole = path.read_bytes()
    for damaged in (whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:], whole[:50], b""):
        path.unlink()  # the old file stays mapped
        path.write_bytes(damaged)
        assert values(index_of(dataset)[0]) == expected and path.read_bytes() == whole
    path.unlink()
    assert values(index_of(dataset)[0]) == expected and path.read_bytes() == whole


def test_a_folder_that_cannot_be_written(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    """The index is a temporary file then."""
    (dataset.folder / note_index.FOLDER).write_text("")
    found, _ = index_of(dataset)
    assert "finds the words of the note dictionary at every start: cannot write" in capsys.readouterr().err
    (dataset.folder / note_index.FOLDER).unlink()
    assert values(found) == values(index_of(dataset)[0])


def test_segments_that_contain_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = np.array([0, 3, 9, 10, 25, 26, 99])
    for block in (1, 2, 3, 100):
        monkeypatch.setattr(note_index, "BLOCK_POSITIONS", block)
        assert [distinct(positions, size) for size in (1, 10, 1000)] == [7, 4, 1]
    assert distinct(positions[:0], 10) == 0
