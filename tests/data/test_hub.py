"""Hugging Face datasets as a source, streamed or not, from folders, since tests have no access to the hub."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastbert.data.sources import open_source
from fastbert.errors import UserError

TEXTS = {"train": [f"document {n}\nof é train" for n in range(300)], "test": ["one", "two"]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    splits = {name: datasets.Dataset.from_dict({"text": rows, "n": range(len(rows))}) for name, rows in TEXTS.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved", num_shards={"train": 2, "test": 1})
    return tmp_path / "saved"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of Parquet files for two splits, in the hub's layout."""
    for name, rows in TEXTS.items():
        for part in (0, 1):
            path = tmp_path / "files" / f"{name}-{part:05d}-of-00002.parquet"
            path.parent.mkdir(exist_ok=True)
            part_rows = rows[part * len(rows) // 2 : (part + 1) * len(rows) // 2]
            pq.write_table(pa.table({"text": part_rows, "n": range(len(part_rows))}), path, row_group_size=20)
    return tmp_path / "files"


def read(spec: str, column: str = "text", streamed: bool = False) -> list[str]:
    source = open_source(spec, column, streamed=streamed)
    documents = list(source.documents())
    assert source.position > 0 and (not source.size or source.position == source.size)
    return documents


def error_of(spec: str, column: str = "text", streamed: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        open_source(spec, column, streamed=streamed)
    return str(caught.value)


@pytest.mark.parametrize("streamed", [False, True])
def test_saved_folders(saved: Path, streamed: bool) -> None:
    assert read(f"hf:{saved}", streamed=streamed) == TEXTS["train"]
    assert read(f"hf:{saved}::test", streamed=streamed) == TEXTS["test"]
    assert read(f"hf:{saved}/test", streamed=streamed) == TEXTS["test"]
    assert "has no split 'validation'; known: test, train" in error_of(f"hf:{saved}::validation", streamed=streamed)
    assert "a saved folder has no configurations" in error_of(f"hf:{saved}:plain", streamed=streamed)
    assert f"give it as hf:{saved}" in error_of(str(saved))


@pytest.mark.parametrize("streamed", [False, True])
def test_folders_of_files(files: Path, streamed: bool) -> None:
    assert read(f"hf:{files}", streamed=streamed) == TEXTS["train"] == read(f"{files}/train*.parquet")
    assert read(f"hf:{files}::test", streamed=streamed) == TEXTS["test"]
    assert "has no split 'tests'; did you mean 'test'? known: test, train" in error_of(f"hf:{files}::tests")
    message = error_of(f"hf:{files}", "texts", streamed)
    assert f"'hf:{files}' has no column 'texts'; did you mean 'text'? known: n, text" in message
    assert "the column 'n' is int64, not text" in error_of(f"hf:{files}", "n", streamed)
    message = error_of(f"hf:{files}:nope", streamed=streamed)
    assert "'nope' not found. Available: ['default']; write hf:NAME[:CONFIG[:SPLIT]], or hf:NAME::SPLIT" in message


@pytest.mark.parametrize("streamed", [False, True])
def test_configurations(files: Path, streamed: bool) -> None:
    (files / "README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  data_files: train-00000-of-00002.parquet\n"
        "- config_name: second\n  data_files: train-00001-of-00002.parquet\n---\n"
    )
    assert read(f"hf:{files}:second", streamed=streamed) == TEXTS["train"][150:]
    assert "Please pick one among the available configs: ['first', 'second']" in error_of(f"hf:{files}")
    assert "'third' not found. Available: ['first', 'second']" in error_of(f"hf:{files}:third")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_folder_of_jsonl(tmp_path: Path, streamed: bool) -> None:
    (tmp_path / "f").mkdir()
    rows = [{"body": "a\r\nb", "n": 1}, {"body": None, "n": 2}, {"body": " c ", "n": 3}]
    (tmp_path / "f" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(f"hf:{tmp_path}/f", "body", streamed) == ["a\nb", "c"]
    assert "has no column 'text'; known: body, n" in error_of(f"hf:{tmp_path}/f", streamed=streamed)


@pytest.mark.parametrize("streamed", [False, True])
def test_text_is_cleaned_as_in_files(tmp_path: Path, streamed: bool) -> None:
    rows = ["\ufeffa\r\nb\rc\x85d", "", None, "NA", "null", "x"]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "saved")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_bytes('text,n\n"\ufeffa\r\nb\rc\x85d",1\n,2\nNA,3\nnull,4\nx,5\n'.encode())
    want = ["a\nb\nc\x85d", "NA", "null", "x"]
    assert read(f"hf:{tmp_path}/saved", streamed=streamed) == want
    assert read(f"hf:{tmp_path}/csv", streamed=streamed) == want == read(f"{tmp_path}/csv/train.csv")
    datasets.Dataset.from_dict({"text": ["a", "b\0"]}).save_to_disk(tmp_path / "zero")
    with pytest.raises(UserError, match=r"zero', row 2: a zero character \(NUL\) in the text"):
        read(f"hf:{tmp_path}/zero", streamed=streamed)


def test_a_folder_with_commas(saved: Path, tmp_path: Path) -> None:
    saved.rename(tmp_path / "a,b")
    (tmp_path / "c.txt").write_text("c")
    assert read(f"hf:{tmp_path}/a,b::test") == TEXTS["test"]
    assert read(f"hf:{tmp_path}/a,b::test, {tmp_path}/c.txt") == [*TEXTS["test"], "c"]


def test_streamed_data_is_the_same_and_identified_by_its_files(files: Path) -> None:
    identities = [open_source(f"hf:{files}", streamed=streamed).identity for streamed in (False, True)]
    assert identities[0] == identities[1]
    pq.write_table(pa.table({"text": ["other"], "n": [1]}), files / "train-00000-of-00002.parquet")
    assert open_source(f"hf:{files}", streamed=True).identity != identities[0]
    assert read(f"hf:{files}") == ["other", *TEXTS["train"][150:]]


def test_part_of_a_split(files: Path) -> None:
    assert read(f"hf:{files}::train[10:20]") == TEXTS["train"][10:20]
    assert "a part of a split cannot be streamed" in error_of(f"hf:{files}::train[10:20]", streamed=True)
    assert "cannot be read" in error_of(f"hf:{files}::train[x:y]")


def test_streaming_copies_nothing(files: Path, tmp_path: Path) -> None:
    read(f"hf:{files}", streamed=True)
    assert not list(tmp_path.glob("cache/**/*.arrow"))
    read(f"hf:{files}")
    assert list(tmp_path.glob("cache/**/*.arrow"))


@pytest.mark.parametrize("streamed", [False, True])
def test_files_of_another_encoding(tmp_path: Path, streamed: bool) -> None:
    (tmp_path / "a.txt").write_bytes("Die Mütter prüfen „Größe“\n".encode("cp1252"))
    with pytest.raises(UserError, match=r"not UTF-8 text: it is probably Windows-1252.*iconv -f WINDOWS-1252"):
        list(open_source(f"hf:{tmp_path}", streamed=streamed).documents())


def test_unreachable_datasets(tmp_path: Path) -> None:
    for streamed in (False, True):
        message = error_of("hf:no-such-owner/no-such-data", streamed=streamed)
        assert "Couldn't reach 'no-such-owner/no-such-data' on the Hub" in message
        assert (
            "give a local copy: a folder of its Parquet files, or one that save_to_disk wrote, as hf:FOLDER" in message
        )
    assert "does not exist, and a name on the hub is owner/name" in error_of(f"hf:{tmp_path}/none")
    assert "names no dataset; write hf:NAME[:CONFIG[:SPLIT]]" in error_of("hf:")
    (tmp_path / "empty").mkdir()
    assert "doesn't contain any data files" in error_of(f"hf:{tmp_path}/empty")


def test_code_of_a_dataset_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "cannot be read" in error_of(f"hf:{tmp_path}/script")
    assert not (tmp_path / "ran").exists()


def test_a_damaged_saved_folder(saved: Path) -> None:
    (saved / "train" / "state.json").write_text("{")
    assert f"source 'hf:{saved}' cannot be read" in error_of(f"hf:{saved}")
    (saved / "dataset_dict.json").write_text("[]")
    assert f"source 'hf:{saved}' cannot be read" in error_of(f"hf:{saved}")


@pytest.mark.parametrize("streamed", [False, True])
def test_the_cached_copy_of_a_name_on_the_hub_serves_offline(files: Path, tmp_path: Path, streamed: bool) -> None:
    read(f"hf:{files}")
    (tmp_path / "cache" / "files").rename(tmp_path / "cache" / "owner___files")
    assert read("hf:owner/files", streamed=streamed) == TEXTS["train"]
    found = open_source("hf:owner/files::test", streamed=streamed)
    assert list(found.documents()) == TEXTS["test"] and found.name == "files"
    assert found.identity["name"] == "owner/files" and found.identity["revision"]
    assert "Available configs in the cache: ['default']" in error_of("hf:owner/files:other", streamed=streamed)
