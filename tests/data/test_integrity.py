"""No damaged file of a prepared folder is used for training: hashes are compared when it is opened, and ranges are
checked in any case."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert.data import corpus as corpus_module
from fastbert.data import integrity
from fastbert.data import prepare as prepare_module
from fastbert.data.batches import PackedRows, TrainingBatches
from fastbert.data.integrity import HEADER_BYTES, file_record
from fastbert.data.prepare import PrepareOptions, prepare
from fastbert.data.shards import open_dataset, read_record
from fastbert.data.stages import BatchPlan
from fastbert.errors import UserError
from fastbert.records import seal_of
from tests.data.small_corpora import small_batches


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [f"Document {n} of many: " + " ".join(f"word{n * k % 97}" for k in range(n % 60)) for n in range(300)]
    path = tmp_path_factory.mktemp("source") / "a.txt"
    path.write_text("\n\n".join(texts))
    return path


def options_of(source: Path, out: Path) -> PrepareOptions:
    shape = {"vocab_size": 300, "validation_fraction": 0.3, "workers": 1, "shard_tokens": 2048, "rare_min": 2}
    return PrepareOptions(str(source), str(out), **shape)


@pytest.fixture(scope="module")
def prepared(source: Path) -> Path:
    return prepare(options_of(source, source.parent / "out"), table=io.StringIO())


@pytest.fixture
def copy(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, on a machine that has not seen it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards' files that are hashed."""
    names: list[str] = []
    real = integrity.hash_of

    def hash_of(path: Path, *rest: object) -> object:
        names.extend([path.name] if path.name.startswith(("train-", "validation-")) else [])
        return real(path, *rest)

    monkeypatch.setattr(integrity, "hash_of", hash_of)
    return names


def flip(path: Path, position: int, bit: int = 1, unnoticed: bool = False) -> None:
    """Flips a bit; if `unnoticed`, as by a disk failure, without changing the modification time."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)
    if unnoticed:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_flipped_bit_in_any_file_is_reported(copy: Path) -> None:
    open_dataset(copy)
    files = [path for path in sorted(copy.rglob("*")) if path.is_file()]
    assert len(files) > 20
    for path in files:
        for position in (0, HEADER_BYTES // 2, path.stat().st_size // 2, -2):
            flip(path, position)
            with pytest.raises(UserError) as caught:
                open_dataset(copy)
            assert path.name in str(caught.value)
            flip(path, position)
    open_dataset(copy)


def test_shards_are_hashed_once_per_machine(copy: Path, hashed: list[str]) -> None:
    shards = [path for path in copy.glob("*-*.npy") if path.name.startswith(("train-", "validation-"))]
    open_dataset(copy)
    assert sorted(hashed) == sorted(path.name for path in shards)
    hashed.clear()
    open_dataset(copy)
    assert hashed == []
    touched = copy / "train-00001.tokens.npy"
    os.utime(touched, ns=(1, 1))
    open_dataset(copy)
    assert hashed == [touched.name]
    # What a disk changes behind everyone's back is found when it is asked for.
    flip(touched, -1, unnoticed=True)
    open_dataset(copy)
    for forced in (lambda: open_dataset(copy, verify=True), open_dataset(copy).verify):
        with pytest.raises(
            UserError, match=r"train-00001\.tokens\.npy is damaged: its SHA-256 differs from that in dataset"
        ):
            forced()
    with pytest.raises(UserError, match=r"train-00001\.tokens\.npy is damaged"):  # it is not forgotten
        open_dataset(copy)
    flip(touched, -1, unnoticed=True)
    hashed.clear()
    shutil.copytree(copy, copy.with_name("another"))  # elsewhere it is not known
    open_dataset(copy.with_name("another"))
    assert len(hashed) == len(shards)


def test_a_cache_that_is_damaged_or_cannot_be_written(
    copy: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_dataset(copy)
    note = integrity.record_file(copy)
    for content in ("", "[]", '{"folder": 1}', json.dumps({"folder": str(copy), "files": []})):
        note.write_text(content)
        hashed.clear()
        open_dataset(copy)
        assert hashed and note.read_text() != content
    capsys.readouterr()
    monkeypatch.setenv("XDG_CACHE_HOME", str(copy / "dataset.json"))
    for _ in range(2):
        hashed.clear()
        open_dataset(copy)
        assert hashed
    assert capsys.readouterr().err.count("data is verified at every start") == 1


def test_hashes_match_the_written_files(prepared: Path) -> None:
    record = read_record(prepared)
    files = {**record["tokenizer_files"], "rare_words.json": record["rare_words"]["file"]}
    for split, content in record["splits"].items():
        files[f"unigram-{split}.npy"] = content["unigram_file"]
        for shard in content["shards"]:
            files |= shard["files"]
    on_disk = {str(path.relative_to(prepared)) for path in prepared.rglob("*") if path.is_file()} - {"dataset.json"}
    assert files.keys() == on_disk
    assert all(file_record(prepared / name) == one for name, one in files.items())


def rewritten(folder: Path, name: str, change) -> None:
    """Changes the numbers of a shard's file, hash and seal included."""
    array = np.load(folder / name)
    change(array)
    np.save(folder / name, array)
    record = json.loads((folder / "dataset.json").read_text())
    for shard in record["splits"][name.split("-")[0]]["shards"]:
        if name in shard["files"]:
            shard["files"][name] = file_record(folder / name)
    record["seal"] = seal_of(record)
    (folder / "dataset.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [
        ("train-00001.tokens.npy", 5, 183, r"contains the token id 183, beyond the vocabulary of 183"),
        ("validation-00000.tokens.npy", -1, 65535, r"contains the token id 65535"),
        ("train-00000.documents.npy", 0, -1, r"contains starts that do not ascend from 0 to below"),
        ("train-00000.documents.npy", 1, 0, r"contains starts that do not ascend"),
        ("train-00000.documents.npy", -1, 5000, r"contains starts that do not ascend"),
        ("train-00000.rare.positions.npy", 2, 2**40, r"contains positions that do not ascend"),
        ("train-00000.rare.lengths.npy", -1, 65535, r"contains a word that ends beyond the shard"),
        ("train-00000.rare.words.npy", 3, 10**6, r"contains a word beyond the list of"),
        ("train-00000.rare.words.npy", 3, -1, r"contains a word beyond the list of"),
    ],
)
def test_ranges_are_checked_whatever_the_hash(copy: Path, name: str, position: int, value: int, message: str) -> None:
    rewritten(copy, name, lambda array: array.__setitem__(position, value))
    with pytest.raises(UserError, match=f"{name} is damaged: it {message}"):
        open_dataset(copy)


def test_ranges_are_checked_where_numbers_are_used(copy: Path) -> None:
    """In files that changed after they were verified, unnoticed."""
    open_dataset(copy)
    for name in ("train-00000.tokens.npy", "train-00000.documents.npy", "train-00000.rare.positions.npy"):
        flip(copy / name, HEADER_BYTES + 8 * 7 + 1, bit=0x80, unnoticed=True)  # the high byte of a token
    dataset = open_dataset(copy)
    stream, cpu = dataset.split("train"), torch.device("cpu")
    rows = PackedRows(stream, 16, 2, 3)
    with pytest.raises(UserError, match=r"train-00000\.tokens\.npy is damaged: it contains the token id"):
        for step in range(len(rows) // 8):
            list(TrainingBatches({16: rows}, BatchPlan.constant(8, 16), 8, 0, cpu).at(step))
    with pytest.raises(UserError, match=r"train-00000\.documents\.npy is damaged"):
        _ = stream.documents
    with pytest.raises(UserError, match=r"train-00000\.rare\.positions\.npy is damaged"):
        stream.rare(0, len(stream))


@pytest.mark.parametrize(
    "change",
    [
        lambda rare: rare.pop("counts"),
        lambda rare: rare["counts"].__setitem__(0, "5"),
        lambda rare: rare["counts"].__setitem__(0, 2**63),
        lambda rare: rare["words"].__setitem__(0, None),
    ],
)
def test_rare_words_are_checked_whatever_the_hash(copy: Path, change) -> None:
    rare = json.loads((copy / "rare_words.json").read_text())
    change(rare)
    (copy / "rare_words.json").write_text(json.dumps(rare))
    record = json.loads((copy / "dataset.json").read_text())
    record["rare_words"]["file"] = file_record(copy / "rare_words.json")
    (copy / "dataset.json").write_text(json.dumps(record | {"seal": seal_of(record)}))
    with pytest.raises(UserError, match=r"rare_words\.json (does not match dataset\.json|is damaged)"):
        _ = open_dataset(copy).rare_words


def test_lengths_that_differ_from_dataset_json(copy: Path) -> None:
    record = json.loads((copy / "dataset.json").read_text())
    record["splits"]["train"]["shards"][0]["tokens"] -= 1
    record["splits"]["train"]["shards"][1]["tokens"] += 1
    (copy / "dataset.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"dataset\.json is damaged: its seal does not match its content"):
        open_dataset(copy)
    (copy / "dataset.json").write_text(json.dumps({**record, "seal": seal_of(record)}))
    with pytest.raises(UserError, match=r"train-00000\.tokens\.npy and the files next to it differ in length"):
        open_dataset(copy)


def test_files_of_an_interrupted_call_are_compared(
    source: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_batches(monkeypatch, BATCH_CHARACTERS=1_500, STATE_SECONDS=0)
    options, add = options_of(source, tmp_path / "out"), corpus_module.Corpus.add

    def interrupted(self: corpus_module.Corpus, *arguments: object) -> None:
        if self.batches == 20:
            raise KeyboardInterrupt
        add(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpus_module.Corpus, "add", interrupted)
        prepare(options, table=io.StringIO())
    partial = tmp_path / ".out.partial"
    open_shard = sorted(partial.glob("train-*.tokens.npy"))[-1]
    damaged = {
        partial / "train-00000.tokens.npy": -1,  # a finished shard
        partial / "train-00000.documents.npy": -1,
        open_shard: HEADER_BYTES + 1,
        partial / "tokenizer" / "tokenizer.json": -20,
    }
    for path, position in damaged.items():
        flip(path, position)
        with pytest.raises(
            UserError, match=rf"{path.name} is damaged.*remove .*\.out\.partial to start from the beginning"
        ):
            prepare(options, table=io.StringIO())
        flip(path, position)
    for path in (partial / "train-00000.tokens.npy", open_shard):  # cut off: not to be filled with zeros
        content = path.read_bytes()
        path.write_bytes(content[:HEADER_BYTES])
        with pytest.raises(UserError, match=f"{path.name} is damaged"):
            prepare(options, table=io.StringIO())
        path.write_bytes(content)
    state = (partial / ".state.npz").read_bytes()
    for position in range(0, len(state), len(state) // 40):
        flip(partial / ".state.npz", position, bit=1 << position % 8)
        try:
            loaded = prepare_module.Partial(partial).load()
        except UserError as error:
            assert ".state.npz is damaged" in str(error)
        else:
            (partial / ".state.npz").write_bytes(state)
            record, arrays = prepare_module.Partial(partial).load()
            assert loaded[0] == record and all(np.array_equal(loaded[1][name], arrays[name]) for name in arrays)
        (partial / ".state.npz").write_bytes(state)
    prepare(options, table=io.StringIO())
    assert (tmp_path / "out" / "dataset.json").read_bytes() == (prepared / "dataset.json").read_bytes()
