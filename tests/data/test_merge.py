"""Parts of a corpus, joined: the bytes of data that is prepared alone; how a source is divided; what is refused."""

import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastbert.cli import main
from fastbert.data.merge import MergeOptions, merge
from fastbert.data.parts import Part, part_of
from fastbert.data.prepare import PrepareOptions, prepare
from fastbert.data.shards import open_dataset
from fastbert.data.sources import open_source
from fastbert.data.sources.source import Chunk, Source
from fastbert.errors import UserError
from fastbert.records import seal_of
from tests.data.small_corpora import contents, options_of, write_corpus

TOKENS = 2048  # of a shard; a group has 4096 bytes or more


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of 1 to 40 kB, one of them without text, a table and a saved dataset; prepared alone and in two parts."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, documents in enumerate((30, 3, 70, 5, 40)):
        write_corpus(folder / f"{number}.txt", documents, seed=number)
    (folder / "5.txt").write_text("\n\n")
    shutil.copy(folder / "3.txt", folder / "6.txt")  # duplicates
    rows = write_corpus(folder / "rows", 40, seed=7)
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in rows))
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": write_corpus(folder / "rows", 40, seed=8)}).save_to_disk(folder / "saved")
    prepare(options(folder), table=io.StringIO())
    for number in (1, 2):
        prepare_part(folder, number, 2)
    return folder


def options(folder: Path, **changes: object) -> PrepareOptions:
    source = f"{folder}/?.txt,{folder}/rows.jsonl,hf:{folder}/saved"
    return replace(options_of(folder, source=source, out=str(folder / "alone"), shard_tokens=TOKENS), **changes)


def prepare_part(folder: Path, number: int, count: int, out: str | None = None, **changes: object) -> Path:
    out = str(folder / (out or f"{number}-of-{count}"))
    return prepare(options(folder, part=f"{number}/{count}", out=out, **changes), table=io.StringIO())


@pytest.mark.parametrize(("count", "rows"), [(2, 2**16), (6, 13)])
def test_joined_parts_have_the_bytes_of_data_prepared_alone(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, count: int, rows: int
) -> None:
    """Also with full tables of counts, with rows of a dataset in several parts, and with copies instead of links."""
    monkeypatch.setattr("fastbert.data.tally.MOST", 40 * count)
    monkeypatch.setattr("fastbert.data.sources.hub.CHUNK_ROWS", rows)
    parts = [prepare_part(corpus, number, count, f"{tmp_path}/{number}") for number in range(1, count + 1)]
    if count == 2:
        monkeypatch.setattr(os, "link", lambda *_: os.stat(tmp_path / "missing"))
    alone = corpus / "alone"
    if rows != 2**16:  # the rows are in other groups, so in other shards
        alone = prepare(options(corpus, out=str(tmp_path / "alone")), table=io.StringIO())
    out = tmp_path / "joined"
    assert main(["merge", *map(str, parts[::-1]), "--out", str(out), "--workers", "1"]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {out}\n")
    assert contents(out) == contents(alone)
    record = open_dataset(out).record
    assert record["duplicates"]["documents"] == 5 and len(record["splits"]["train"]["shards"]) > 6
    linked = os.stat(out / "train-00000.tokens.npy").st_nlink > 1
    assert linked == (count != 2)
    for part in parts:
        shutil.rmtree(part)
    open_dataset(out, verify=True)
    assert prepare(options(corpus, out=str(out)), table=io.StringIO()) == out  # nothing to do
    assert "already prepared" in capsys.readouterr().err


def test_runs_on_both_are_equal(corpus: Path, tmp_path: Path) -> None:
    """Three steps with notes, to the bit."""
    parts = (f"{corpus}/1-of-2", f"{corpus}/2-of-2")
    joined = merge(MergeOptions(parts, out=str(tmp_path / "joined"), workers=1), table=io.StringIO())
    network = ["--layers", "1", "--width", "16", "--heads", "1", "--length", "16", "--batch-size", "4", "--steps", "3"]
    notes = ["--notes.enabled", "--notes.min-count", "3", "--notes.max-count", "20", "--eval-sequences", "4"]
    models = []
    for data in (corpus / "alone", joined):
        out = tmp_path / f"run-{data.name}"
        machine = ["--machine.device", "cpu", "--machine.threads", "1", "--machine.precision", "fp32"]
        assert main(["pretrain", "--data", str(data), *network, *notes, *machine, "--out", str(out)]) == 0
        (checkpoint,) = (out / "checkpoints").glob("step-*3")
        models.append({path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")})
    assert models[0] == models[1] and len(models[0]) == 2


@settings(max_examples=50)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.integers(1, 12), st.integers(1, 30))
@example([1, 0], 1, 1)  # a last group without bytes
def test_parts_are_the_source_without_gaps(sizes: list[int], count: int, group: int) -> None:
    chunks = [Chunk(size, lambda n=n: iter([(1, f"{n}")])) for n, size in enumerate(sizes)]
    source = Source("a", "a", {}, sum(sizes), chunks)
    groups = source.groups(group)
    if len(groups) < count:
        with pytest.raises(UserError, match=f"into at most {len(groups)} part"):
            part_of(source, Part(1, count), group)
        return
    parts = [part_of(source, Part(number, count), group) for number in range(1, count + 1)]
    assert all(part.chunks for part in parts)
    assert [text for part in parts for text in part.documents()] == list(source.documents())
    assert [part.groups(group)[-1][1] for part in parts] == [len(part.chunks) for part in parts]
    largest = max(sum(chunk.size for chunk in chunks[a:b]) for a, b in groups)
    if all(sizes):
        assert max(part.size for part in parts) <= sum(sizes) / count + largest * count


def test_a_part_is_not_data(corpus: Path) -> None:
    with pytest.raises(UserError, match="is a part of prepared data; join all parts with fastbert merge"):
        open_dataset(corpus / "1-of-2")
    with pytest.raises(UserError, match="is part 1/2; choose another --out"):
        prepare_part(corpus, 2, 2, "1-of-2")


def test_a_part_that_was_written_is_not_written_again(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(corpus / "2-of-2")
    prepare_part(corpus, 2, 2)
    assert "is already prepared" in capsys.readouterr().err and contents(corpus / "2-of-2") == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0/16", "there are the parts 1/16 to 16/16"),
        ("17/16", "there are the parts 1/16 to 16/16"),
        ("1/0", "the number of parts must be from 1 to 65536"),
        ("3", "'3' is not of the form NUMBER/COUNT, such as 3/16"),
        ("-1/2", "'-1/2' is not of the form"),
        ("3/50", "can be divided into at most 5 parts, between files with 4.1 kB or more together"),
    ],
)
def test_refused_parts(corpus: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(options(corpus, part=text, out=str(corpus / "refused")), table=io.StringIO())
    assert not (corpus / "refused").exists()


def test_parts_of_which_the_rest_must_be_known_are_refused(corpus: Path) -> None:
    with pytest.raises(UserError, match="cannot be used with --drop-duplicates, because a copy may be in another part"):
        options(corpus, part="1/2", drop_duplicates=True)
    mixture = open_source(f"{corpus}/0.txt,{corpus}/2.txt", weights="0.5,0.5")
    with pytest.raises(UserError, match="--part 1/2 cannot be used with --weights"):
        part_of(mixture, Part(1, 2), 10)


def damaged(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def resealed(folder: Path, change: Callable[[dict], object]) -> None:
    record = json.loads((folder / "dataset.json").read_text())
    change(record)
    (folder / "dataset.json").write_text(json.dumps({**record, "seal": seal_of(record)}))


def touched(record: dict) -> None:
    record["source"]["sources"][0]["files"][2]["mtime_ns"] += 1


@pytest.mark.parametrize(
    ("parts", "change", "message"),
    [
        ("1", None, "1 of 2 parts are missing: 2/2; give the folders of all parts"),
        ("1 2 copy", None, "2-of-2 and .*copy are both part 2/2; give each part once"),
        ("1 1", None, "1-of-2 and .*1-of-2 are both part 1/2"),
        ("1 3", None, "1-of-2 is one of 2 parts, .*1-of-3 one of 3"),
        ("1 nowhere", None, "nowhere has no dataset.json: it is not a part"),
        ("1 alone", None, "alone is not a part of prepared data; write one with fastbert prepare --part"),
        ("1 seed", None, r"prepared with different options \(--seed\); prepare one of them again"),
        ("1 copy", lambda f: resealed(f, touched), "are of different sources, or 2.txt was changed in between"),
        ("1 copy", lambda f: resealed(f, lambda r: r.update(tokenizer="x")), "have different tokenizers"),
        ("1 copy", lambda f: resealed(f, lambda r: r.update(reading=0)), "another version of fastbert"),
        ("1 copy", lambda f: resealed(f, lambda r: r.update(part=[3, 2])), r"its number is \[3, 2\]"),
        (
            "1 copy",
            lambda f: resealed(f, lambda r: r["splits"].pop("train")),
            "dataset.json.*splits.*prepare this part",
        ),
        ("1 copy", lambda f: damaged(f, "dataset.json"), "dataset.json"),
        (
            "1 copy",
            lambda f: damaged(f, "train-00000.tokens.npy"),
            "train-00000.tokens.npy is damaged: .* copy the part",
        ),
        ("1 copy", lambda f: damaged(f, "words-00000.counts.npy"), "words-00000.counts.npy is damaged"),
        ("1 copy", lambda f: (f / "unigram-train.npy").unlink(), "unigram-train.npy is missing; copy the part again"),
    ],
)
def test_refused_merges(
    corpus: Path, tmp_path: Path, parts: str, change: Callable[[Path], object] | None, message: str
) -> None:
    """Before anything is written."""
    shutil.copytree(corpus / "2-of-2", tmp_path / "copy")
    if change is not None:
        change(tmp_path / "copy")
    names = {"1": corpus / "1-of-2", "2": corpus / "2-of-2", "alone": corpus / "alone", "3": corpus / "1-of-3"}
    if "3" in parts:
        prepare_part(corpus, 1, 3)
    if "seed" in parts:
        prepare_part(corpus, 2, 2, f"{tmp_path}/seed", seed=1)
    folders = [str(names.get(part, tmp_path / part)) for part in parts.split()]
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=message):
        merge(MergeOptions(tuple(folders), out=str(tmp_path / "out")), table=io.StringIO())
    assert sorted(os.listdir(tmp_path)) == before


def test_no_parts_and_an_occupied_folder(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--out", str(tmp_path / "out")]) == 2
    assert "give the folders of all parts: fastbert merge" in capsys.readouterr().err
    (tmp_path / "mine").write_text("keep")
    parts = [str(corpus / "1-of-2"), str(corpus / "2-of-2")]
    assert main(["merge", *parts, "--out", str(tmp_path)]) == 2
    assert "exists and is not a prepared folder" in capsys.readouterr().err
    other = prepare(options(corpus, seed=3, out=str(tmp_path / "other")), table=io.StringIO())
    assert main(["merge", *parts, "--out", str(other)]) == 2
    assert "was prepared with another option (seed)" in capsys.readouterr().err
