"""`--init-from` with data of another tokenizer is refused before anything is prepared or trained."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastbert.data.tokenizer import SPECIAL_TOKENS, WordPiece
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.hub.export import export_model
from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import Encoder
from fastbert.model.options import EncoderOptions
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.setup import prepare_setup
from tests.flags import main


def exported(vocabulary: WordPiece, folder: Path) -> Path:
    """An export of a random encoder for `vocabulary`."""
    config = EncoderConfig(vocab_size=len(vocabulary.tokens), layers=1, width=16, heads=2, ffn=16, max_positions=32)
    torch.manual_seed(0)
    weights = {f"encoder.{name}": tensor for name, tensor in Encoder(config).state_dict().items()}
    vocabulary.save(folder / "tokenizer")
    export_model(config, weights, folder / "tokenizer", folder / "model")
    return folder / "model"


def refused(capsys, tmp_path: Path, data: Path, model: Path, *more: str) -> str:
    capsys.readouterr()
    flags = ["pretrain", "--data", str(data), "--steps", "1", "--batch-size", "2", "--length", "16", *more]
    assert main([*flags, "--init-from", str(model), "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()
    return capsys.readouterr().err


def other(words: WordPiece, how: str) -> WordPiece:
    rest = list(words.tokens[len(SPECIAL_TOKENS) :])
    if how == "order":
        random.Random(0).shuffle(rest)
        return WordPiece((*SPECIAL_TOKENS, *rest))
    if how == "larger":
        return WordPiece((*words.tokens, *(f"new{n}" for n in range(9))))
    return replace(words, **{"case": {"lowercase": False}, "longest": {"longest_word": 50}}[how])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("order", r"id 5 is '"),
        ("larger", "id 600 is None in .* and 'new0' in .*; 6 more ids differ"),
        ("case", "do_lower_case is True in .* and False in .*; strip_accents is True in .* and False in "),
        ("longest", "max_input_chars_per_word is 100 in .* and 50 in "),
    ],
)
def test_data_of_another_tokenizer_is_refused(how, message, prepared, tmp_path, capsys) -> None:
    model = exported(other(load_tokenizer(prepared), how), tmp_path)
    printed = refused(capsys, tmp_path, prepared, model)
    assert re.search(message, printed), printed
    assert f"`fastbert prepare --tokenizer {model}`" in printed
    assert f"`fastbert extend-vocab --tokenizer {model}`" in printed


def test_another_tokenizer_is_refused_before_text_is_prepared_with_it(
    prepared, corpus, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = load_tokenizer(prepared)
    model = exported(other(words, "order"), tmp_path)
    printed = refused(capsys, tmp_path, corpus, model, "--tokenizer", str(prepared))
    assert f"the tokenizer of {prepared} differs from that of" in printed
    assert not (tmp_path / "data").exists()


def test_weights_without_a_tokenizer_are_refused(prepared, tmp_path, capsys) -> None:
    model = exported(load_tokenizer(prepared), tmp_path)
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        (model / name).unlink()
    printed = refused(capsys, tmp_path, prepared, model)
    assert f"{model} holds no tokenizer" in printed and "copy the tokenizer.json or vocab.txt" in printed


def test_dropout_is_set_by_the_new_run(prepared, tmp_path) -> None:
    encoder = EncoderOptions(dropout=0.3, attention_dropout=0.2)
    given = {"data": str(prepared), "init_from": str(exported(load_tokenizer(prepared), tmp_path)), "length": 16}
    config = prepare_setup(PretrainOptions(**given, steps=1, batch_size=2, encoder=encoder)).config
    assert (config.width, config.dropout, config.attention_dropout) == (16, 0.3, 0.2)


def test_data_can_be_prepared_with_the_tokenizer_of_a_run(prepared, tmp_path) -> None:
    (tmp_path / "checkpoints").mkdir()
    load_tokenizer(prepared).save(tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path) == load_tokenizer(prepared)
