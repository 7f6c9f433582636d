"""The training and validation splits of prepared text, and exact duplicates in it."""

import io
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data.duplicates import Seen
from fastbert.data.hashing import document_hash, text_hash
from fastbert.data.prepare import prepare
from fastbert.data.shards import open_dataset
from fastbert.data.sources import open_source
from fastbert.errors import UserError
from tests.data.small_corpora import contents, options_of, small_batches, write_corpus


def documents_of(out: Path, split: str) -> list[tuple[int, ...]]:
    stream = open_dataset(out).split(split)
    return [tuple(stream.read(a, b).tolist()) for a, b in itertools.pairwise([*stream.documents.tolist(), len(stream)])]


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A corpus in which every third document occurs two to four times, far apart."""
    folder = tmp_path_factory.mktemp("repeated")
    texts = write_corpus(folder / "corpus.txt", 120)
    copies = [text for n, text in enumerate(texts[::3]) for _ in range(1 + n % 3)]
    (folder / "corpus.txt").write_text("\n\n".join(texts + copies), encoding="utf-8")
    return folder, texts


def test_copies_of_a_document_are_in_one_split(repeated: tuple[Path, list[str]], capsys) -> None:
    folder, texts = repeated
    out = prepare(options_of(folder))
    train, validation = (documents_of(out, split) for split in ("train", "validation"))
    assert len(set(train)) < len(train) and len(set(validation)) < len(validation)
    assert not set(train) & set(validation)
    assert len(set(train)) + len(set(validation)) == len(texts) and len(train) + len(validation) == 120 + 79
    assert open_dataset(out).record["duplicates"] == {"documents": 79}
    assert "79 exact duplicates of earlier documents, which --drop-duplicates leaves out" in capsys.readouterr().out


def test_the_split_does_not_depend_on_the_order(repeated: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, texts = repeated
    (tmp_path / "corpus.txt").write_text("\n\n".join(reversed(texts)), encoding="utf-8")
    given = {"tokenizer": str(prepare(options_of(folder), table=io.StringIO()))}
    out = prepare(options_of(tmp_path, **given), table=io.StringIO())
    for split in ("train", "validation"):
        assert set(documents_of(out, split)) == set(documents_of(folder / "out", split))


def test_dropped_duplicates(
    repeated: tuple[Path, list[str]], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly the corpus without the copies, for any batches; a batch may consist of copies only."""
    folder, texts = repeated
    (tmp_path / "corpus.txt").write_text("\n\n".join(texts), encoding="utf-8")
    plain = prepare(options_of(tmp_path, tokenizer=str(prepare(options_of(folder)))), table=io.StringIO())
    capsys.readouterr()
    for batch in (2**21, 3_000):
        small_batches(monkeypatch, BATCH_CHARACTERS=batch)
        options = options_of(folder, drop_duplicates=True, tokenizer=str(plain), out=str(tmp_path / str(batch)))
        dropped = prepare(options)
        assert "79 exact duplicates of earlier documents, which were dropped" in capsys.readouterr().out
        same = {name: data for name, data in contents(plain).items() if name != "dataset.json"}
        assert {name: data for name, data in contents(dropped).items() if name != "dataset.json"} == same


def test_duplicates_are_counted_on_the_disk(
    repeated: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_batches(monkeypatch, BATCH_CHARACTERS=3_000)
    monkeypatch.setattr("fastbert.data.tally.MOST", 30)
    for drop in (False, True):
        options = options_of(repeated[0], out=str(tmp_path / f"{drop}"), drop_duplicates=drop)
        out = prepare(options, table=io.StringIO())
        assert open_dataset(out).record["duplicates"] == {"documents": 79}


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=12), st.integers(0, 12))
def test_seen_is_a_set(batches: list[list[int]], first: int) -> None:
    known = set(range(0, 2 * first, 2))
    seen = Seen(np.array(sorted(known), np.uint64))
    for batch in batches:
        repeated, new = seen.add(np.array(batch, np.uint64))
        want = [key in known or key in batch[:n] for n, key in enumerate(batch)]
        assert repeated.tolist() == want
        assert new.tolist() == [key for key, again in zip(batch, want, strict=True) if not again]
        known |= set(batch)
    sizes = [len(keys) for keys in seen._sorted]
    assert all(a >= 2 * b for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize(
    ("lengths", "fraction", "far"),
    [([50] * 99 + [4500], 0.01, True), ([50] * 400, 0.1, False), ([50] * 3, 0.01, True), ([50] * 400, 0.9, False)],
)
def test_a_validation_split_far_from_its_fraction(
    tmp_path: Path, capsys, lengths: list[int], fraction: float, far: bool
) -> None:
    """99 short documents and a long one, which is in validation for a suitable seed."""
    texts = [f"{n} " + "word " * length for n, length in enumerate(lengths)]
    (tmp_path / "corpus.txt").write_text("\n\n".join(texts))
    seeds = range(300) if max(lengths) > 1000 else [0]
    seed = next(s for s in seeds if max(lengths) < 1000 or text_hash(s, [texts[-1].strip()])[0] < fraction * 2**64)
    record = open_dataset(prepare(options_of(tmp_path, validation_fraction=fraction, seed=seed, vocab_size=256))).record
    tokens = [split["tokens"] for split in record["splits"].values()]
    shown = capsys.readouterr()
    assert ("warning: validation has" in shown.err) == far
    if far:
        assert f"validation has {tokens[1] / sum(tokens):.2%} of the tokens" in shown.err
        assert f"instead of {fraction:.2%}:" in shown.err
    assert "[UNK]" not in shown.err and "0.000%" in shown.out


def test_text_hash() -> None:
    texts = [f"document {n}" for n in range(20_000)]
    many = text_hash(3, texts)
    assert np.array_equal(text_hash(3, texts[500:510]), many[500:510]) and len(np.unique(many)) == len(many)
    assert (many < 0.1 * 2**64).mean() == pytest.approx(0.1, abs=0.01)
    assert abs(np.corrcoef(many / 2**64, text_hash(4, texts) / 2**64)[0, 1]) < 0.03


def test_document_hash() -> None:
    many = document_hash(3, 0, 100_000)
    assert np.array_equal(document_hash(3, 500, 10), many[500:510]) and len(np.unique(many)) == len(many)
    for fraction in (0.01, 0.3):
        assert (many < fraction * 2**64).mean() == pytest.approx(fraction, abs=4 * (fraction / len(many)) ** 0.5)
    assert abs(np.corrcoef(many / 2**64, document_hash(4, 0, 100_000) / 2**64)[0, 1]) < 0.02


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_tiny_corpora_get_both_splits(tmp_path: Path, fraction: float) -> None:
    write_corpus(tmp_path / "corpus.txt", documents=3)
    dataset = open_dataset(prepare(options_of(tmp_path, validation_fraction=fraction, rare_min=1), table=io.StringIO()))
    texts = list(open_source(str(tmp_path / "corpus.txt")).documents())
    keys = text_hash(0, texts)
    assert sorted(dataset.record["splits"][s]["documents"] for s in ("train", "validation")) == [1, 2]
    alone = "validation" if fraction < 0.5 else "train"
    assert dataset.record["splits"][alone]["documents"] == 1
    text = texts[int(keys.argmin() if fraction < 0.5 else keys.argmax())]
    assert dataset.record["splits"][alone]["bytes"] == len(text.encode())


def test_a_single_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("one document\nof two lines")
    with pytest.raises(UserError, match=r"is a single document, but.*put a blank line between documents"):
        prepare(options_of(tmp_path))
    (tmp_path / "corpus.txt").write_text("one document\n\n" * 30)
    with pytest.raises(UserError, match=r"is a single document \(30 copies of it\), but"):
        prepare(options_of(tmp_path, drop_duplicates=True))
    assert os.listdir(tmp_path) == ["corpus.txt"]


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_copies_of_a_single_document_get_both_splits(tmp_path: Path, capsys, fraction: float) -> None:
    (tmp_path / "corpus.txt").write_text("one document\n\n" * 30)
    record = open_dataset(prepare(options_of(tmp_path, validation_fraction=fraction))).record
    assert sorted(split["documents"] for split in record["splits"].values()) == [1, 29]
    assert "are copies of one, so validation has the same text as training" in capsys.readouterr().err
