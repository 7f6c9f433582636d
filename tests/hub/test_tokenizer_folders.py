"""fastbert and transformers read every tokenizer folder alike, before and after an export, or it is refused."""

import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from fastbert.data.encoding import TextEncoder
from fastbert.data.tokenizer import WordPiece
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.errors import UserError
from fastbert.hub.export import export_model
from fastbert.hub.load import load_pretrained
from fastbert.model.config import EncoderConfig
from tests.data.tokenizer_folders import (
    BERT,
    CLASS,
    READABLE,
    REFUSED,
    WORDS,
    put,
    texts,
    tokenizer_json,
    vocabulary,
)
from tests.hub.conftest import named, random_models, small_config

TEXTS = texts()


def ids(tokenizer: Any) -> list[list[int]]:
    """What a tokenizer of transformers or of the library makes of the texts, alone and in pairs."""
    if isinstance(tokenizer, Tokenizer):
        found = [*tokenizer.encode_batch(TEXTS), *tokenizer.encode_batch(list(itertools.pairwise(TEXTS)))]
        return [encoding.ids + encoding.type_ids for encoding in found]
    found = [tokenizer(TEXTS, return_token_type_ids=True), tokenizer(TEXTS[:-1], TEXTS[1:], return_token_type_ids=True)]
    return [a + b for part in found for a, b in zip(part["input_ids"], part["token_type_ids"], strict=True)]


@functools.cache
def model(position: str) -> tuple[EncoderConfig, dict[str, torch.Tensor]]:
    config = small_config(vocab_size=256, layers=1, position=position)
    return config, named(*random_models(config))


def exported(tokenizer: Path, out: Path, position: str = "absolute") -> Path:
    export_model(*model(position), tokenizer, out)
    return out


@pytest.mark.parametrize("name", READABLE)
def test_both_read_a_folder_alike_and_its_export_too(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = put(tmp_path / "in", **READABLE[name])
    ours = load_tokenizer(folder)
    expected = ids(ours.build())
    assert ids(AutoTokenizer.from_pretrained(folder, trust_remote_code=False)) == expected
    position = "tupe-r" if len(name) % 2 else "absolute"  # an export with code, or one that transformers knows
    out = exported(folder, tmp_path / "out", position=position)
    opened = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert ids(opened) == expected and opened.model_max_length == 30
    assert load_tokenizer(out).fingerprint == ours.fingerprint
    assert "hostile" not in (out / "tokenizer_config.json").read_text()
    assert not (out / "hostile.py").exists() and not (tmp_path / "ran").exists()
    # "[MASK]" in a corpus is text; split_special_tokens is transformers' name for that.
    split, encoder = (
        AutoTokenizer.from_pretrained(out, trust_remote_code=True, split_special_tokens=True),
        TextEncoder(ours),
    )
    encoded = encoder.encode(TEXTS, [True] * len(TEXTS))
    theirs = split(TEXTS, add_special_tokens=False)["input_ids"]
    assert encoded.tokens.tolist() == [token for text in theirs for token in (*text, ours.ids["[SEP]"])]


VALID = ["ab\n", "ab", "\n", "ab \ncd\t\n", " ab\n", "ab cd\n", "ab\u2028cd\n", "ab\u2028\ncd", "ab\x85cd\nef\x85\n"]
VALID += ["\nab\n", "ab\xa0\n", "ab\u3000\n", "\x0c\nab\x0b\n", "ab\x1ccd\nef\x1d\n", "ab\u200b\n", "ab\ufeff\n"]
VALID += ["\u180e\n", "ab\u205f\ncd\u2060\n", "ab\r\r\ncd\n", "ab\r"]
UNCLEAR = ["ab\rcd\n", "hello\n", "hello \n", "ab\n\n\ncd\n", "[PAD]\n", "ab\0cd\n"]


@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_a_vocabulary_is_split_as_transformers_splits_it(line: str, tmp_path: Path) -> None:
    """Its own reader is the oracle: equal ids, but for an empty token at the end, or a refusal."""
    for number, end in enumerate(VALID):
        text = vocabulary(end=line) + end
        folder = put(tmp_path / str(number), vocab__txt=text, tokenizer_config__json=CLASS)
        theirs = AutoTokenizer.from_pretrained(folder).get_vocab()
        if theirs.get("") == len(theirs) - 1:
            del theirs[""]
        assert load_tokenizer(folder).ids == theirs, repr(end)
    refused = [vocabulary(end=line) + end for end in UNCLEAR]
    refused += ["\ufeff" + vocabulary(end=line), vocabulary(end="\r"), vocabulary(end=line).replace(line, "\r", 1)]
    for number, text in enumerate(refused):
        folder = put(tmp_path / f"refused {number}", vocab__txt=text, tokenizer_config__json=CLASS)
        with pytest.raises(UserError, match=r"vocab\.txt"):
            load_tokenizer(folder)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_two_read_differently_is_refused(name: str, tmp_path: Path) -> None:
    message, files = REFUSED[name]
    folder = put(tmp_path / "in", **files)
    with pytest.raises(UserError, match=f"(?s){message}"):
        load_tokenizer(folder)
    with pytest.raises(UserError, match=f"(?s){message}"):
        exported(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cased_tokenizer_json_alone_is_used_unchanged(tmp_path: Path, capsys) -> None:
    """transformers lower-cases it next to a BERT's config.json; fastbert reads what is in it, and so is its export."""
    folder = put(tmp_path / "in", tokenizer__json=tokenizer_json(lowercase=False), config__json=BERT)
    assert not load_tokenizer(folder).lowercase
    printed = capsys.readouterr().err
    assert "do_lower_case is False in fastbert and True in transformers" in printed
    assert "no tokenizer_config.json" in printed
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert ids(AutoTokenizer.from_pretrained(exported(folder, tmp_path / "out"))) == ids(library)


def test_an_export_that_transformers_would_read_differently_is_not_written(tmp_path: Path, monkeypatch) -> None:
    folder = put(tmp_path / "in", tokenizer__json=tokenizer_json(lowercase=False))
    monkeypatch.setattr(WordPiece, "config", lambda words: {"tokenizer_class": "BertTokenizer"})
    with pytest.raises(UserError, match="do_lower_case is False in fastbert and True in transformers"):
        exported(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_refusal_names_a_fix_that_works(tmp_path: Path) -> None:
    for name in ("another case", "BERT's case by default", "other accents", "control characters", "longest word"):
        folder = put(tmp_path / name, **REFUSED[name][1])
        with pytest.raises(UserError, match=r"put (\{.*\}) into tokenizer_config\.json") as caught:
            load_tokenizer(folder)
        fix = json.loads(re.search(r"put (\{.*\}) into", str(caught.value))[1])
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fix))
        assert ids(AutoTokenizer.from_pretrained(folder)) == ids(load_tokenizer(folder).build())


@pytest.mark.parametrize(
    "change", [{"do_lower_case": True}, {"additional_special_tokens": ["[E1]"]}, {"strip_accents": 1}]
)
def test_an_export_whose_tokenizer_was_changed_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    folder = put(tmp_path / "in", tokenizer__json=tokenizer_json(lowercase=False))
    out = exported(folder, tmp_path / "out")
    load_pretrained(out)
    path = out / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=f"{next(iter(change))}|E1"):
        load_pretrained(out)


@pytest.mark.parametrize("position", ["absolute", "tupe-r"])
def test_an_export_states_its_positions_so_truncation_works(position: str, tmp_path: Path) -> None:
    WordPiece(WORDS).save(tmp_path / "in")
    assert AutoTokenizer.from_pretrained(tmp_path / "in").model_max_length > 1e20  # no model, no limit
    out = exported(tmp_path / "in", tmp_path / "out", position)
    trust = {"trust_remote_code": position != "absolute"}
    tokenizer, text = AutoTokenizer.from_pretrained(out, **trust), "a [MASK] " * 50
    batch = tokenizer(text, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape == (1, 30)
    with torch.no_grad():
        assert AutoModelForMaskedLM.from_pretrained(out, **trust)(**batch).logits.shape == (1, 30, 256)
    fill = pipeline("fill-mask", model=str(out), tokenizer=tokenizer, device="cpu", **trust)
    assert fill("a [MASK] " + "a " * 100, tokenizer_kwargs={"truncation": True})


def test_vocabularies_that_vocab_txt_cannot_hold_are_exported_without_it(tmp_path: Path) -> None:
    for end in ("a\rb", "c\u2028", ""):
        WordPiece((*WORDS, end)).save(tmp_path / "other")
        assert not (tmp_path / "other" / "vocab.txt").exists()
    odd = WordPiece((*WORDS, "a\nb", "c "))
    odd.save(tmp_path / "in")
    assert not (tmp_path / "in" / "vocab.txt").exists()
    opened = AutoTokenizer.from_pretrained(exported(tmp_path / "in", tmp_path / "out"))
    assert ids(opened) == ids(odd.build()) and opened.get_vocab() == odd.ids


def test_files_that_are_damaged_are_named(tmp_path: Path) -> None:
    for number, (files, message) in enumerate(
        (
            ({"tokenizer__json": []}, r"tokenizer .*tokenizer\.json is damaged: it holds no JSON object"),
            ({"tokenizer__json": tokenizer_json(lambda c: c["normalizer"].pop("lowercase"))}, "it lacks lowercase"),
            (
                {"tokenizer__json": tokenizer_json(lambda c: c["model"]["vocab"].update(a="5"))},
                "a is '5', which is not allowed",
            ),
            ({"tokenizer__json": tokenizer_json(lambda c: c.update(added_tokens=[3]))}, "3 is not a token"),
            (
                {"tokenizer__json": tokenizer_json(lambda c: c["model"]["vocab"].update({"\ud800": 999}))},
                "not Unicode text",
            ),
            (
                {"tokenizer__json": tokenizer_json(lambda c: c["model"].update(max_input_chars_per_word=-1))},
                "is -1, which",
            ),
            (
                {"tokenizer__json": tokenizer_json(lambda c: c["added_tokens"][0].update(id=7))},
                "has the id 7 and another",
            ),
            (
                {"tokenizer__json": tokenizer_json(), "tokenizer_config__json": "{"},
                r"tokenizer_config\.json is damaged",
            ),
            ({"tokenizer__json": tokenizer_json(), "tokenizer_config__json": {"vocab": {"a": 0}}}, "has vocab, which"),
            ({"tokenizer__json": tokenizer_json(), "added_tokens__json": {"a": "b"}}, "a is 'b', which is not allowed"),
            ({"tokenizer__json": tokenizer_json(), "special_tokens_map__json": {"cls_token": {}}}, "{} is not a token"),
            ({"vocab__txt": "[PAD]", "tokenizer_config__json": {"tokenizer_class": "TokenizersBackend"}}, "needs"),
        )
    ):
        with pytest.raises(UserError, match=message):
            load_tokenizer(put(tmp_path / str(number), **files))
