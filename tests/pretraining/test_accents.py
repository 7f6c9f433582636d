"""`pretrain --strip-accents` where --data is a source: it reaches the tokenizer and changes the data's hash."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fastbert.config import load_yaml
from fastbert.flags import parse
from fastbert.pretraining.options import PretrainOptions, science
from fastbert.pretraining.setup import data_folder


@pytest.mark.parametrize(("written", "apart"), [("false", True), ("False", True), ("true", False), (None, False)])
def test_accents_from_a_flag_or_a_file(written: str | None, apart: bool, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    Path("de.txt").write_text("Die Mütter und die Mutter\n\nschön ist schon schön\n", encoding="utf-8")
    setting = [] if written is None else ["--strip-accents", written]
    options = parse(PretrainOptions, ["--data", "de.txt", "--vocab-size", "300", *setting], "pretrain")
    Path("run.yaml").write_text(
        "data: de.txt\nvocab_size: 300\n" + (f"strip_accents: {written}\n" if written else ""), encoding="utf-8"
    )
    assert load_yaml(PretrainOptions, "run.yaml") == options
    folder = data_folder(options, None)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert (tokenizer.tokenize("MÜTTER") != tokenizer.tokenize("Mutter")) == apart
    assert "strip_accents" not in science(options, "hash")
    assert (folder == data_folder(PretrainOptions(data="de.txt", vocab_size=300), None)) == (written is None)
