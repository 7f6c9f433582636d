"""Data that `fastbert pretrain` prepares itself: the same options lead to the same folder as in `fastbert prepare`."""

import json
from pathlib import Path

import pytest

from fastbert.cli import main
from fastbert.data import prepare
from fastbert.data.prepare import PrepareOptions, prepared_folder
from fastbert.data.shards import open_dataset
from fastbert.errors import UserError
from fastbert.pretraining.options import PretrainOptions, science
from fastbert.pretraining.setup import data_folder, prepare_setup


@pytest.fixture
def source(corpus: Path, tmp_path, monkeypatch) -> str:
    """A JSONL file with another name for the text column."""
    monkeypatch.chdir(tmp_path)
    documents = corpus.read_text().split("\n\n")
    Path("text.jsonl").write_text("".join(json.dumps({"body": document}) + "\n" for document in documents))
    return "text.jsonl"


def test_another_column(source: str, capsys) -> None:
    assert main(["pretrain", "--data", source, "--steps", "1"]) == 2
    assert "'text'; known: body; choose with --column" in capsys.readouterr().err
    options = PretrainOptions(data=source, column="body", vocab_size=600, steps=1)
    folder = data_folder(options, None)
    assert open_dataset(folder).vocab_size == 600
    same = PrepareOptions(source=source, out="x", column="body", vocab_size=600, workers=1)
    assert prepared_folder(source, same) == folder
    assert science(options, "data") == science(PretrainOptions(steps=1), "data")  # the data's hash speaks for it


def test_a_streamed_dataset(source: str, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(prepare, "open_source", lambda *asked: seen.append(asked) or 1 / 0)
    for streamed in (False, True):
        with pytest.raises(ZeroDivisionError):
            data_folder(PretrainOptions(data="hf:a/dataset", column="body", streamed=streamed, steps=1), None)
    assert seen == [("hf:a/dataset", "body", None, False), ("hf:a/dataset", "body", None, True)]


def test_a_tokenizer_that_prepared_data_does_not_have(prepared: Path, tmp_path) -> None:
    """It would have no effect."""
    options = PretrainOptions(data=str(prepared), tokenizer=str(prepared / "tokenizer"), length=32, steps=1)
    assert prepare_setup(options).vocabulary.fingerprint
    other = tmp_path / "other"
    lines = (prepared / "tokenizer" / "vocab.txt").read_text().splitlines()
    other.mkdir()
    (other / "vocab.txt").write_text("\n".join([*lines[:-2], lines[-1], lines[-2]]) + "\n")
    with pytest.raises(UserError, match=f"{other} differs from that of {prepared}, which is prepared: .*id 598"):
        prepare_setup(PretrainOptions(data=str(prepared), tokenizer=str(other), length=32, steps=1))


def test_flags_of_a_source_have_no_effect_on_prepared_data(flags: list[str], tmp_path, monkeypatch, capsys) -> None:
    """They are allowed in a YAML file, which may also be used for a source."""
    monkeypatch.setattr("fastbert.pretraining.pretrain.pretrain", lambda options, name: 0)
    typed = ["--column=body", "--streamed", "--vocab_size", "600", "--no-lowercase", "--strip-accents", "true"]
    typed += ["--validation-fraction", "0.2", "--tokenizer", f"{flags[1]}/tokenizer"]
    assert main(["pretrain", *flags, *typed]) == 0
    names = "--column, --streamed, --vocab-size, --no-lowercase, --strip-accents, --validation-fraction, --tokenizer"
    assert f"warning: {names} have no effect, because {flags[1]} is already prepared\n" in capsys.readouterr().err
    assert main(["pretrain", *flags, "--no-streamed"]) == 0
    assert f"warning: --no-streamed has no effect, because {flags[1]} is" in capsys.readouterr().err
    (tmp_path / "x.yaml").write_text("column: body\nvocab_size: 600\nlowercase: false\n")
    assert main(["pretrain", str(tmp_path / "x.yaml"), *flags]) == 0
    assert "warning" not in capsys.readouterr().err
