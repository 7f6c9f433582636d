"""Words with notes: the choice of words, their positions in a batch, and messages."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data import note_words
from fastbert.data.batches import PackedRows, ReplayedRows, TrainingBatches
from fastbert.data.encoding import word_starts
from fastbert.data.note_words import NoteWords, Occurrences, choose_words, segment_tokens
from fastbert.data.prepare import PrepareOptions, prepare
from fastbert.data.rare import RareWords
from fastbert.data.shards import open_dataset
from fastbert.data.stages import BatchPlan
from fastbert.errors import UserError

CPU = torch.device("cpu")
CLS, SEP = 2, 3


class Words:
    """A stream of documents given as lists of words, a word a tuple of ids; every word is listed as rare."""

    def __init__(self, documents: list[list[tuple[int, ...]]]) -> None:
        tokens, starts, positions, lengths, words = [], [], [], [], []
        self.known = sorted({word for document in documents for word in document})
        for document in documents:
            starts.append(len(tokens))
            for word in document:
                positions.append(len(tokens))
                lengths.append(len(word))
                words.append(self.known.index(word))
                tokens += word
            tokens.append(SEP)
        self.tokens = np.array(tokens, np.uint16)
        self.documents = np.array(starts, np.int64)
        self.occurrences = RareWords(
            np.array(positions, np.int64), np.array(lengths, np.uint16), np.array(words, np.int32)
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def document_borders(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        borders = np.append(self.documents, len(self.tokens))
        after = np.searchsorted(borders, positions, side="right")
        return borders[after - 1], borders[after]

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]

    def rare(self, start: int, stop: int) -> RareWords:
        here = (self.occurrences.positions >= start) & (self.occurrences.positions < stop)
        return RareWords(self.occurrences.positions[here], self.occurrences.lengths[here], self.occurrences.words[here])


def by_hand(ids: list[list[int]], noted: list[tuple[int, ...]], half_window: int, cut: list[bool]) -> list[tuple]:
    """(row, first, pieces, window's first, window's end, word) from the ids of the rows alone: ids from 100 continue a
    word. `cut` is true for a row whose last word continues in the next."""
    found = []
    for number, row in enumerate(ids):
        position = 1
        while position < len(row):
            stop = position + 1
            while stop < len(row) and row[stop] >= 100:
                stop += 1
            word = tuple(row[position:stop])
            if word in noted and not (stop == len(row) and cut[number]):
                left, right = position, stop
                while left > 1 and row[left - 1] != SEP and position - left < half_window:
                    left -= 1
                while right < len(row) and row[right] != SEP and right - stop < half_window:
                    right += 1
                found.append((number, position, stop - position, left, right, noted.index(word)))
            position = stop
    return found


WORD = st.builds(lambda a, rest: (a, *rest), st.integers(5, 9), st.lists(st.integers(100, 102), max_size=8))
DOCUMENTS = st.lists(st.lists(WORD, max_size=12), min_size=1, max_size=6)


@settings(max_examples=150)
@given(DOCUMENTS, st.integers(2, 14), st.integers(0, 5), st.integers(0, 2**32), st.integers(1, 5))
def test_occurrences_equal_a_search_by_hand(documents, length, half_window, coin, micro) -> None:
    stream = Words(documents)
    row_of_word = np.full(len(stream.known), -1, np.int32)
    noted = [word for number, word in enumerate(stream.known) if coin >> number % 32 & 1]
    for number, word in enumerate(noted):
        row_of_word[stream.known.index(word)] = number
    index = NoteWords(stream, row_of_word, length, half_window)
    rows = PackedRows(stream, length, CLS, SEP, noted=index)
    if not len(rows):
        return
    indices = np.random.default_rng(coin).integers(0, len(rows), 5)
    step = index.step_words(indices)
    width, seen = length - 1, []
    for start in range(0, 5, micro):
        part = indices[start : start + micro]
        batch = rows.read(part, part, CPU, step)
        ends = [(int(row) + 1) * width for row in part]
        cut = [end < len(stream) and stream.tokens[end] >= 100 for end in ends]
        expected = by_hand(batch.input_ids.tolist(), noted, half_window, cut)
        seen += [word for *_, word in expected]
        here = batch.noted
        real = len(expected)
        assert len(here.lengths) % 64 == len(here.tokens) % 64 == len(here.words) % 64 == 0
        assert (here.lengths[real:] == 0).all() and len(here.lengths) > real
        found = zip(
            *(
                part[:real].tolist()
                for part in (
                    here.firsts // length,
                    here.firsts % length,
                    here.lengths,
                    here.words[here.slots],
                )
            ),
            strict=True,
        )
        assert list(found) == [(*word, number) for *word, _, _, number in expected]
        check_windows(here, expected, length)
        pieces = [
            (row * length + first + i, n) for n, (row, first, size, *_) in enumerate(expected) for i in range(size)
        ]
        assert list(zip(here.tokens.tolist(), here.owners.tolist(), strict=True))[: len(pieces)] == pieces
        assert (here.lengths[here.owners[len(pieces) :]] == 0).all()
        assert (here.counts[here.slots[real:]] == 0).all()
    words, counts = np.unique(seen, return_counts=True) if seen else ([], [])
    assert here.words[: len(words)].tolist() == list(words) and here.counts[: len(words)].tolist() == list(counts)
    assert not here.counts[len(words) :].any() and len(here.counts) > len(words)


@settings(max_examples=100)
@given(DOCUMENTS, DOCUMENTS, st.integers(2, 14), st.integers(0, 5), st.integers(0, 2**32))
def test_occurrences_in_old_and_new_rows_equal_a_search_by_hand(first, second, length, half_window, coin) -> None:
    """Each stream has its own list of rare words; a word has one note."""
    streams = [Words(first), Words(second)]
    known = sorted({word for stream in streams for word in stream.known})
    noted = [word for number, word in enumerate(known) if coin >> number % 32 & 1]
    parts = []
    for stream in streams:
        row_of_word = np.array([noted.index(word) if word in noted else -1 for word in stream.known], np.int32)
        index = NoteWords(stream, row_of_word, length, half_window)
        parts.append(PackedRows(stream, length, CLS, SEP, noted=index))
    if not all(map(len, parts)):
        return
    rows = ReplayedRows(*parts, 0.25)
    rng = np.random.default_rng(coin)
    old, chosen = rng.random(6) < 0.5, [rng.integers(0, len(part), 6) for part in parts]
    indices = np.where(old, rows.first_old + chosen[1], chosen[0])
    batch = rows.read(indices, np.arange(6), CPU)
    cut = []
    for is_old, row in zip(old, np.where(old, chosen[1], chosen[0]), strict=True):
        tokens, end = streams[int(is_old)].tokens, (int(row) + 1) * (length - 1)
        cut.append(end < len(tokens) and tokens[end] >= 100)
    expected = by_hand(batch.input_ids.tolist(), noted, half_window, cut)
    here, real = batch.noted, len(expected)
    found = (here.firsts // length, here.firsts % length, here.lengths, here.words[here.slots])
    found = zip(*(part[:real].tolist() for part in found), strict=True)
    assert list(found) == [(*word, number) for *word, _, _, number in expected]
    assert (here.lengths[real:] == 0).all()
    check_windows(here, expected, length)


def test_frequencies_of_rows_with_replay_are_those_of_the_mixture() -> None:
    """A quarter of the rows from the old data, by counting the words in them."""
    documents = [[[(5,), (6,), (5,), (5,)] * 3, [(6,)] * 9], [[(5,), (6, 100)] * 9, [(6,)] * 5, [(5,)] * 6]]
    parts = []
    for stream in map(Words, documents):
        row_of_word = np.array([0 if word[0] == 5 else -1 for word in stream.known], np.int32)
        parts.append(PackedRows(stream, 6, CLS, SEP, noted=NoteWords(stream, row_of_word, 6, 2)))
    every = [np.arange(len(part)) for part in parts]
    ids = [part.read(rows, rows, CPU).input_ids for part, rows in zip(parts, every, strict=True)]
    counts = [(rows == 5).sum(1).numpy() for rows in ids]
    mean = 0.75 * counts[0].mean() + 0.25 * counts[1].mean()
    square = 0.75 * (counts[0] ** 2).mean() + 0.25 * (counts[1] ** 2).mean()
    found = ReplayedRows(*parts, 0.25).noted.frequencies
    assert found.occurrences == pytest.approx(mean / 6) and found.pieces == pytest.approx(mean / 6)
    assert found.variance == pytest.approx((square - mean**2) / 6)


def check_windows(here: Occurrences, expected: list[tuple], length: int) -> None:
    """Windows of one word after another are its context, in order; the padding has other slots."""
    windows, found = here.windows, []
    assert windows.size < length
    given = (part.tolist() for part in (windows.slots, windows.firsts, windows.lengths, windows.totals))
    for slot, first, size, total in zip(*given, strict=True):
        assert size <= windows.size and total >= max(size, 1) and size + (slot == len(here.words) - 1) > 0
        if size and found and found[-1][1] < found[-1][2]:  # the next part of the same context
            assert (slot, total) == found[-1][::3] and first == found[-1][1]
            found[-1] = (slot, first + size, *found[-1][2:])
        elif size:
            found.append((slot, first + size, first + total, total))
    contexts = [(int(here.words[slot]), stop, total) for slot, stop, _, total in found]
    assert contexts == [(word, row * length + stop, stop - start) for row, _, _, start, stop, word in expected]
    assert not here.counts[windows.slots[windows.lengths == 0]].any()


def test_every_whole_occurrence_is_read_in_an_epoch() -> None:
    """Through the shuffled micro-batches of steps; the global batch's words are in each of them."""
    stream = Words([[(5,), (6, 100)] * 40, [(7,)] * 33, [(5,), (8, 100, 100)] * 21])
    index = NoteWords(stream, np.arange(4, dtype=np.int32), 12, 2)
    batches = TrainingBatches({12: PackedRows(stream, 12, CLS, SEP, noted=index)}, BatchPlan.constant(4, 12), 3, 0, CPU)
    met = 0
    for step in range(index.rows // 4):
        first, second = batches.at(step)
        assert torch.equal(first.noted.words, second.noted.words)
        assert torch.equal(first.noted.counts, second.noted.counts)
        here = sum(int((part.noted.lengths > 0).sum()) for part in (first, second))
        assert here == first.noted.counts.sum()
        met += here
    left = index.step_words(batches.order(np.arange(index.rows // 4 * 4, index.rows), 12)).counts.sum()
    assert met + left == len(index.index.positions)


def test_without_notes_a_batch_has_no_occurrences(prepared: Path) -> None:
    rows = PackedRows(open_dataset(prepared).split("train"), 32, CLS, SEP)
    assert rows.read(np.arange(2), np.arange(2), CPU).noted is None


def touched(dataset, chosen: np.ndarray) -> set[int]:
    """Segments of 25 words in which a chosen word begins, found one occurrence at a time."""
    stream = dataset.split("train")
    rare = stream.rare(0, len(stream))
    width = segment_tokens(dataset)
    return {int(at) // width for at, word in zip(rare.positions, rare.words, strict=True) if chosen[word]}


@pytest.mark.parametrize(("fraction", "most"), [(0.01, 500), (0.2, 500), (0.6, 500), (0.2, 60)])
def test_words_are_selected_until_the_fraction_is_reached(
    prepared: Path, monkeypatch, fraction: float, most: int
) -> None:
    """Also if words of the range are in less than half of the text: the fraction is that of the whole text."""
    dataset = open_dataset(prepared)
    stream = dataset.split("train")
    segments = -(-len(stream) // segment_tokens(dataset))
    words = len(word_starts(stream.read(0, len(stream)), dataset.wordpiece.continuing))
    assert words / segments == pytest.approx(25, rel=0.05)
    row_of_word = choose_words(dataset, 50, most, fraction)
    chosen = row_of_word >= 0
    assert row_of_word[chosen].tolist() == list(range(chosen.sum()))
    assert len(touched(dataset, chosen)) >= fraction * segments
    # The set is minimal in the order of the hashes: without its last word the fraction is not reached.
    last = max(np.flatnonzero(chosen), key=lambda word: hashlib.sha256(dataset.rare_words[word].encode()).digest())
    without = chosen.copy()
    without[last] = False
    assert len(touched(dataset, without)) < fraction * segments
    exactly = (len(touched(dataset, chosen)) - 1e-6) / segments
    monkeypatch.setattr(note_words, "BLOCK_TOKENS", 1000)
    for same in (fraction, exactly):
        assert np.array_equal(row_of_word, choose_words(open_dataset(prepared), 50, most, same))
    more = choose_words(dataset, 50, most, min(1.0, 2 * fraction)) >= 0
    assert (more | ~chosen).all() and more.sum() >= chosen.sum() + (fraction == 0.2)


def test_the_fraction_of_tokens_with_notes_does_not_depend_on_the_length(prepared: Path) -> None:
    """But for the words that the ends of rows cut."""
    dataset = open_dataset(prepared)
    row_of_word = choose_words(dataset, 50, 500, 0.2)
    fractions, rows = [], []
    for length in (32, 64, 128, 512):
        index = NoteWords(dataset.split("train"), row_of_word, length, 4)
        fractions.append(index.index.tokens / (index.rows * index.width))
        rows.append(len(np.unique(index.index.positions // index.width)) / index.rows)
    assert fractions == pytest.approx([fractions[-1]] * 4, rel=0.08)
    assert rows[0] < 0.3 and rows[-1] > 0.75  # of the sequences


def test_only_words_of_the_range_are_selected(prepared: Path) -> None:
    dataset = open_dataset(prepared)
    everything = choose_words(dataset, 50, 500, 1.0) >= 0
    assert everything.all()
    selected = choose_words(dataset, 60, 100, 1.0) >= 0
    assert np.array_equal(selected, (dataset.rare_counts >= 60) & (dataset.rare_counts <= 100)) and selected.any()


def test_a_range_that_was_not_prepared(prepared: Path) -> None:
    with pytest.raises(UserError, match=r"20 to 600 times.*50 to 500 times.*--rare-min 20 --rare-max 600"):
        choose_words(open_dataset(prepared), 20, 600, 0.2)


def test_a_range_without_words_suggests_one_with_words(prepared: Path) -> None:
    dataset = open_dataset(prepared)
    dataset.rare_counts = dataset.rare_counts.copy()
    dataset.rare_counts[:] = 120
    with pytest.raises(
        UserError, match=rf"{len(dataset.rare_words)} words occur 53 to 160 times: --notes.min-count 53"
    ) as error:
        choose_words(dataset, 53, 80, 0.2)
    assert "--rare-min" not in str(error.value)


def test_a_corpus_without_rare_words_suggests_a_range(tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("\n\n".join(" ".join(["north", "south"] * 6) for _ in range(3)))
    options = PrepareOptions(str(source), str(tmp_path / "data"), vocab_size=256, validation_fraction=0.3, workers=1)
    dataset = open_dataset(prepare(options))
    count = 6 * dataset.record["splits"]["train"]["documents"]
    with pytest.raises(UserError) as error:
        choose_words(dataset, 50, 500, 0.2)
    low, high = (int(word) for word in str(error.value).split("--notes.min-count ")[1].split(" --notes.max-count "))
    assert low <= count <= high and "2 words occur" in str(error.value)
    again = replace(options, out=str(tmp_path / "again"), rare_min=low, rare_max=high)
    assert (choose_words(open_dataset(prepare(again)), low, high, 0.2) >= 0).any()  # its advice helps
