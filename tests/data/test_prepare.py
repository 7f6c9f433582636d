"""Output of `prepare`, compared with the source text, and the same for any number of workers."""

import csv
import dataclasses
import io
import itertools
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from transformers import AutoTokenizer

from fastbert.data import corpus as corpus_module
from fastbert.data import prepare as job
from fastbert.data.corpus import BYTES_PER_WORKER, workers_for
from fastbert.data.hashing import text_hash
from fastbert.data.prepare import prepare, prepared_folder
from fastbert.data.shards import open_dataset
from fastbert.data.sources import open_source
from fastbert.data.tally import Tally, sums
from fastbert.data.tokenizer import WordPiece
from fastbert.data.writer import SplitWriter
from fastbert.errors import UserError
from tests.data.small_corpora import contents, options_of, small_batches, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "corpus.txt")
    prepare(options_of(folder), table=io.StringIO())
    return folder


def expected(folder: Path, split: str) -> list[list[int]]:
    """Ids of the documents of a split, [SEP] included, by way of transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "tokenizer", split_special_tokens=True)
    documents = list(open_source(str(folder / "corpus.txt")).documents())
    validation = text_hash(0, documents) < 0.2 * 2**64
    return [
        [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]
        for text, here in zip(documents, validation == (split == "validation"), strict=True)
        if here
    ]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_tokens_and_document_borders(corpus: Path, split: str) -> None:
    stream = open_dataset(corpus / "out").split(split)
    documents = expected(corpus, split)
    assert stream.read(0, len(stream)).tolist() == list(itertools.chain(*documents))
    borders = [*stream.documents.tolist(), len(stream)]
    assert [stream.read(a, b).tolist() for a, b in itertools.pairwise(borders)] == documents


@pytest.mark.parametrize("split", ["train", "validation"])
def test_rare_words_against_a_count_in_plain_python(corpus: Path, split: str) -> None:
    dataset = open_dataset(corpus / "out")
    tokens = dataset.wordpiece.tokens

    def words(ids: list[int]) -> list[tuple[int, int, str]]:
        """(position, pieces, word)"""
        found: list[tuple[int, int, str]] = []
        for position, index in enumerate(ids):
            piece = tokens[index]
            if piece.startswith("##"):
                first, length, word = found.pop()
                found.append((first, length + 1, word + piece[2:]))
            else:
                found.append((position, 1, piece))
        return [item for item in found if item[2] not in ("[UNK]", "[SEP]")]

    counts = Counter(word for _, _, word in words(list(itertools.chain(*expected(corpus, "train")))))
    rare = sorted(((word, n) for word, n in counts.items() if 3 <= n <= 20), key=lambda item: (-item[1], item[0]))
    assert len(rare) > 50 and max(map(len, dict(rare))) > 6
    assert list(zip(dataset.rare_words, dataset.rare_counts.tolist(), strict=True)) == rare
    number = {word: n for n, (word, _) in enumerate(rare)}
    stream = dataset.split(split)
    want = [(p, n, number[w]) for p, n, w in words(stream.read(0, len(stream)).tolist()) if w in number]
    got = stream.rare(0, len(stream))
    assert list(zip(got.positions.tolist(), got.lengths.tolist(), got.words.tolist(), strict=True)) == want
    assert max(got.lengths) > 1
    figures = dataset.record["splits"][split]["rare"]
    touched = {row for p, n, _ in want for row in range(p // 127, (p + n - 1) // 127 + 1)}  # also across shards
    sequences = -(-len(stream) // 127)
    assert figures == {"occurrences": len(want), "sequences": sequences, "sequences_touched": len(touched)}


def test_a_word_across_two_sequences_touches_both(tmp_path: Path) -> None:
    """Documents of twice 127 tokens: with [CLS], two sequences of 128. A word of three pieces begins at the last of the
    first."""
    words = WordPiece(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ab", "x", "##y", *"cdefghijklmnopqrstuv"))
    (tmp_path / "tokenizer").mkdir()
    words.save(tmp_path / "tokenizer", 128)
    texts = [f"{letter} {125 * 'ab '}xyy{124 * ' ab'}" for letter in "cdefghijklmnopqrstuv"]
    (tmp_path / "corpus.txt").write_text("\n\n".join(texts))
    options = options_of(tmp_path, tokenizer=str(tmp_path / "tokenizer"), rare_min=2, rare_max=100)
    record = open_dataset(prepare(options, table=io.StringIO())).record
    for split in record["splits"].values():
        count = split["documents"]
        expected = {"occurrences": count, "sequences": 2 * count, "sequences_touched": 2 * count}
        assert split["tokens"] == 254 * count > 0 and split["rare"] == expected


def test_no_word_is_rare(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.txt", documents=20)
    options = options_of(tmp_path, rare_min=10**6, rare_max=10**7)
    dataset = open_dataset(prepare(options, table=io.StringIO()))
    stream = dataset.split("train")
    assert dataset.rare_words == [] and len(stream.rare(0, len(stream)).words) == 0


def test_unigrams_and_figures(corpus: Path) -> None:
    dataset = open_dataset(corpus / "out")
    for split in ("train", "validation"):
        stream, record = dataset.split(split), dataset.record["splits"][split]
        counts = np.bincount(stream.read(0, len(stream)), minlength=dataset.vocab_size)
        assert np.array_equal(stream.unigrams, counts)
        counts[:5] = 0
        assert stream.unigram_entropy == pytest.approx(entropy(counts), rel=1e-12)
        assert record["documents"] == len(stream.documents) and record["tokens"] == len(stream)
    texts = list(open_source(str(corpus / "corpus.txt")).documents())
    assert sum(s["bytes"] for s in dataset.record["splits"].values()) == sum(len(text.encode()) for text in texts)


def test_any_number_of_workers_writes_the_same_bytes(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_batches(monkeypatch, BATCH_CHARACTERS=3_000)
    monkeypatch.setattr("fastbert.data.rare.BLOCK_TOKENS", 700)
    usual = contents(corpus / "out")
    assert len(open_dataset(corpus / "out").record["splits"]["train"]["shards"]) > 1
    for workers in (1, 2, 3):
        out = prepare(options_of(corpus, workers=workers, out=str(corpus / f"w{workers}")), table=io.StringIO())
        assert contents(out) == usual


def test_the_seed_moves_documents_and_nothing_else(corpus: Path) -> None:
    out = prepare(options_of(corpus, seed=1, out=str(corpus / "seed")), table=io.StringIO())
    assert contents(out / "tokenizer") == contents(corpus / "out" / "tokenizer")
    assert contents(out)["validation-00000.tokens.npy"] != contents(corpus / "out")["validation-00000.tokens.npy"]


@pytest.mark.parametrize("given", [False, True])
def test_unknown_words_are_shown(corpus: Path, tmp_path: Path, capsys, given: bool) -> None:
    """More characters than a vocabulary of 256 entries can have."""
    text = "\n\n".join(f"ab {chr(0x4E00 + n)} ab ab" for n in range(400))
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8")
    more = {"tokenizer": str(corpus / "out")} if given else {"vocab_size": 256}
    out = prepare(options_of(tmp_path, **more))
    shown = capsys.readouterr()
    record, tokenizer = open_dataset(out).record, AutoTokenizer.from_pretrained(out / "tokenizer")
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    assert sum(split["unk_tokens"] for split in record["splits"].values()) == ids.count(tokenizer.unk_token_id) > 100
    train = record["splits"]["train"]
    fraction = train["unk_tokens"] / (train["tokens"] - train["documents"])
    (row,) = [line for line in shown.out.splitlines() if line.startswith("[UNK] tokens")]
    assert row.split()[2] == f"{fraction:.3%}"
    fix = "give another --tokenizer" if given else "raise --vocab-size"
    assert "of the train tokens are [UNK]" in shown.err or "of the validation tokens are [UNK]" in shown.err
    assert fix in shown.err


def test_a_table_gives_the_tokens_of_its_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_corpus(tmp_path / "corpus.txt", documents=5)
    with open(tmp_path / "corpus.csv", "w", newline="") as file:
        csv.writer(file).writerows([("n", "text"), *enumerate(texts)])
    for kind in ("txt", "csv"):
        prepare(options_of(tmp_path, source=f"{tmp_path}/corpus.{kind}", out=f"{tmp_path}/{kind}", rare_min=1))
    assert "warning" not in capsys.readouterr().err
    arrays = {path.name: path.read_bytes() for path in (tmp_path / "txt").glob("*.npy")}
    assert arrays == {path.name: path.read_bytes() for path in (tmp_path / "csv").glob("*.npy")} != {}


@pytest.mark.parametrize("other", [False, True])
def test_work_with_other_reading_rules_is_not_continued(tmp_path: Path, monkeypatch, capsys, other: bool) -> None:
    (tmp_path / "page").write_text("<html>\n\n" + "one\n\ntwo words\n\n" * 30)
    options = options_of(tmp_path, source=str(tmp_path / "page"))
    with monkeypatch.context() as patch:
        patch.setattr(job, "_tokenize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(options)
    if other:
        monkeypatch.setattr(job, "READING", job.READING + 1)
    capsys.readouterr()
    prepare(options)
    printed = capsys.readouterr().err
    assert ("starting from the beginning" in printed) == other and (
        "continuing the unfinished work" in printed
    ) != other
    assert printed.count("page looks like HTML or XML, but is read as plain text because of its name") == 1


def interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_finished_folders_are_reused_and_others_refused(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (corpus / "out" / "dataset.json").stat().st_mtime_ns
    prepare(options_of(corpus, workers=2))
    shown = capsys.readouterr()
    assert "already prepared" in shown.err and "tokens per word" in shown.out and str(corpus / "out") in shown.out
    assert (corpus / "out" / "dataset.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"was prepared with another option \(rare_max, seed\)|\(seed, rare_max\)"):
        prepare(options_of(corpus, seed=9, rare_max=7))
    (corpus / "other.txt").write_text("a\n\nb")
    with pytest.raises(UserError, match=r"was prepared with another source \(files\); choose another --out"):
        prepare(options_of(corpus, source=str(corpus / "other.txt")))
    (corpus / "notes").mkdir()
    (corpus / "notes" / "mine").write_text("keep")
    with pytest.raises(UserError, match="exists and is not a prepared folder"):
        prepare(options_of(corpus, out=str(corpus / "notes")))
    with pytest.raises(UserError, match="exists and is not a prepared folder"):
        prepare(options_of(corpus, out=str(corpus / "other.txt")))


@pytest.mark.parametrize(
    "change",
    [
        {"validation_fraction": 0.0},
        {"validation_fraction": 1.0},
        {"rare_min": 9, "rare_max": 8},
        {"workers": -1},
        {"shard_tokens": 100},
    ],
)
def test_options_out_of_range(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        options_of(tmp_path, **change)


def test_a_given_tokenizer_is_used(corpus: Path) -> None:
    out = prepare(options_of(corpus, tokenizer=str(corpus / "out"), out=str(corpus / "given")), table=io.StringIO())
    same = contents(corpus / "out")
    assert {name: data for name, data in contents(out).items() if name != "dataset.json"} == {
        name: data for name, data in same.items() if name != "dataset.json"
    }


GERMAN = """Die Mütter sehen die Mutter; schon ist es schön. Äpfel und Apfel, über und Ober.

Es war schön, und die Mütter aßen Äpfel über Äpfel. Die Mutter ißt schon den Apfel.

MÜTTER, MUTTER, SCHÖN, SCHON: die Tochter und die Töchter, der Bruder und die Brüder."""


@pytest.mark.parametrize("strip_accents", [False, True, None])
def test_accents_with_lower_case(tmp_path: Path, capsys, strip_accents: bool | None) -> None:
    """Oracle: transformers, on the text and on its words."""
    (tmp_path / "corpus.txt").write_text(GERMAN, encoding="utf-8")
    options = options_of(tmp_path, strip_accents=strip_accents)
    dataset = open_dataset(prepare(options, table=io.StringIO()))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    streams = [dataset.split(split) for split in ("train", "validation")]
    found = sorted(token for stream in streams for token in stream.read(0, len(stream)).tolist())
    texts = GERMAN.split("\n\n")
    ids = [id for text in texts for id in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert found == sorted([*ids, *[tokenizer.sep_token_id] * len(texts)])
    apart = strip_accents is False
    for one, other in (("Mütter", "Mutter"), ("SCHÖN", "schon"), ("Töchter", "Tochter")):
        assert (tokenizer(one)["input_ids"] != tokenizer(other)["input_ids"]) == apart
        assert tokenizer(one)["input_ids"] == tokenizer(one.lower())["input_ids"]
    # Another value is another corpus; none leaves the record as it was before there was the option.
    assert ("strip_accents" in options.identity()) == (strip_accents is not None)
    prepare(options)
    assert "already prepared" in capsys.readouterr().err
    for value in {False, True, None} - {strip_accents}:
        with pytest.raises(UserError, match=r"prepared with another option \(strip_accents\)"):
            prepare(options_of(tmp_path, strip_accents=value))


def test_accents_of_a_given_tokenizer(corpus: Path) -> None:
    given = [options_of(corpus, tokenizer=str(corpus / "out"), strip_accents=value) for value in (None, False)]
    assert given[0].identity() == given[1].identity()


def test_a_smaller_vocabulary_than_requested_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "corpus.txt", documents=20)
    dataset = open_dataset(prepare(options_of(tmp_path, vocab_size=70_000)))
    assert f"{dataset.vocab_size:,} entries instead of 70,000" in capsys.readouterr().err
    assert dataset.record["splits"]["train"]["unk_tokens"] == dataset.record["splits"]["validation"]["unk_tokens"] == 0
    assert dataset.vocab_size < 5_000 and dataset.split("train").read(0, 1).dtype == np.uint16


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "corpus.txt", documents=20)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SplitWriter, "close", full)
    with pytest.raises(UserError, match="the disk is full"):
        prepare(options_of(tmp_path))
    assert os.listdir(tmp_path) == ["corpus.txt"]


def test_prepared_folder(corpus: Path, tmp_path: Path) -> None:
    options = options_of(corpus)
    assert prepared_folder(str(corpus / "out"), options) == corpus / "out"
    first = prepared_folder(options.source, options, root=tmp_path)
    assert first.parent == tmp_path and first.name.startswith("corpus-") and len(first.name) == len("corpus-") + 8
    before = (first / "dataset.json").stat().st_mtime_ns
    assert prepared_folder(options.source, dataclasses.replace(options, workers=2, out="x"), root=tmp_path) == first
    assert (first / "dataset.json").stat().st_mtime_ns == before
    assert prepared_folder(options.source, dataclasses.replace(options, seed=5), root=tmp_path) != first
    with pytest.raises(UserError, match="is a folder"):
        prepared_folder(str(corpus), options, root=tmp_path)


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 30), max_size=30), max_size=8), st.integers(1, 40), st.integers(1, 40))
def test_tallies_are_exact_for_any_size_of_their_tables(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[int]], most: int, ranges: int
) -> None:
    """Of two parts, one of which continues from a saved state; tables are written to the disk when they are full."""
    folder = tmp_path_factory.mktemp("tallies")
    parts = [Tally(folder, "a", most), Tally(folder, "b", most)]
    for number, batch in enumerate(batches):
        keys, counts = np.unique(np.array(batch, np.uint64) << np.uint64(58), return_counts=True)
        parts[number % 2].add(keys, counts)
        if number == 4:
            state = parts[0].state()
            parts[0].add(keys, counts)  # lost in a kill
            parts[0].flush()
            parts[0] = Tally(folder, "a", most)
            parts[0].restore(*state)
    for part in parts:
        part.flush()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastbert.data.tally.RANGE", ranges)
        found = list(sums([*parts[0].paths, *parts[1].paths]))
    hashes = [h for hashes, _ in found for h in hashes.tolist()]
    counts = [n for _, counts in found for n in counts.tolist()]
    want = Counter(key << 58 & 2**64 - 1 for key in itertools.chain(*batches))
    assert hashes == sorted(want) and dict(zip(hashes, counts, strict=True)) == want


@settings(max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 7))
def test_shards_hold_whole_documents(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], group: int) -> None:
    folder = tmp_path_factory.mktemp("shards")
    continuing = np.array([False, True])
    writer = SplitWriter(folder, "train", continuing, shard_tokens=16)
    documents = [np.arange(n) % 3 == 1 for n in lengths]  # a word of one piece, then words of two
    for first in range(0, len(lengths), group):
        group_documents = documents[first : first + group]
        writer.write(np.concatenate(group_documents).astype(np.uint16), np.array([len(d) for d in group_documents]), 0)
    writer.close()
    shards = [np.load(folder / f"train-{n:05d}.tokens.npy") for n in range(len(writer.shards))]
    starts = [np.load(folder / f"train-{n:05d}.documents.npy") for n in range(len(writer.shards))]
    assert np.array_equal(np.concatenate(shards), np.concatenate(documents)) and writer.documents == len(lengths)
    assert [len(shard) for shard in shards] == writer.shards and 0 < min(writer.shards) <= max(writer.shards) <= 16
    borders = np.cumsum([0, *writer.shards])
    positions = np.concatenate([s + b for s, b in zip(starts, borders[:-1], strict=True)])
    ends = np.cumsum(lengths)
    assert positions.tolist() == [0, *ends[:-1].tolist()]
    for border in borders[1:-1]:
        assert not continuing[np.concatenate(documents).astype(int)[border]]
        within = np.searchsorted(ends, border, side="right")
        assert border in (ends - lengths) or lengths[within] > 16


def test_a_killed_worker_is_reported(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "encode_in_worker", _die)
    with pytest.raises(UserError, match="was killed, most likely because memory ran out"):
        prepare(options_of(corpus, workers=2, out=str(corpus / "killed")))
    assert not (corpus / "killed").exists()


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_follow_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)

    sizes = (1, BYTES_PER_WORKER, 100 * BYTES_PER_WORKER)
    assert [workers_for(size, 0) for size in sizes] == [1, 2, 4]
    assert workers_for(0, 0) == 4, "of unknown size"
    assert workers_for(1, 3) == 3
