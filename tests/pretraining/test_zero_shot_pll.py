"""`fastbert evaluate --pll`: figures recomputed with transformers, the sample, parts of long sentences, [UNK]."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import AutoModelForMaskedLM, AutoTokenizer

from fastbert.data.hashing import document_hash
from fastbert.pretraining.evaluate_options import EvaluateOptions
from fastbert.pretraining.zero_shot import pll, scoring
from fastbert.pretraining.zero_shot.scorer import open_scorer
from fastbert.pretraining.zero_shot.sentences import sample_sentences, split_sentences
from tests.flags import main
from tests.pretraining.test_zero_shot_pairs import FP32, new_model, plain_score

TEXT = "The cat sat. No dogsters sat on the mat!\nThe bird sat on Dr. mat. w1 w2 w3.\n\nthe the the cat."
SENTENCES = ["The cat sat.", "No dogsters sat on the mat!", "The bird sat on Dr. mat. w1 w2 w3.", "the the the cat."]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return new_model(tmp_path_factory.mktemp("bert"), "absolute")


def figures(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments), "--json", *FP32]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("form", ["salazar", "word-l2r"])
def test_figures_against_transformers(bert, form, capsys, tmp_path) -> None:
    texts = ["The cat sat.", "No dogsters sat on the mat.", "the the the cat."]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    out = tmp_path / "scores.jsonl"
    found = figures(capsys, "--model", bert, "--pll", tmp_path / "text.txt", "--pll-form", form, "--out", out)
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    nats = np.array([-plain_score(model, tokenizer, text, form) for text in texts])
    tokens = np.array([len(tokenizer(text)["input_ids"]) - 2 for text in texts])
    words, size = np.array([len(text.split()) for text in texts]), np.array([len(text) for text in texts])
    assert found["nats_per_token"] == pytest.approx(nats.sum() / tokens.sum(), rel=1e-5)
    assert found["nats_per_word"] == pytest.approx(nats.sum() / words.sum(), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / size.sum(), rel=1e-5)
    assert (found["tokens"], found["words"], found["bytes"]) == (tokens.sum(), words.sum(), size.sum())
    assert (found["sentences"], found["sentences_in_text"], found["score"], found["pll_form"]) == (3, 3, "pll", form)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["text"] for row in rows] == texts
    assert [-row["pll"] for row in rows] == pytest.approx(nats, rel=1e-5)


def test_unknown_words_cost_bits(bert, capsys, tmp_path) -> None:
    """They remain in the context, are not scored, and cost 8 bits a byte."""
    (tmp_path / "text.txt").write_text("the été sat")
    found = figures(capsys, "--model", bert, "--pll", tmp_path / "text.txt")
    assert (found["tokens"], found["unk_tokens"], found["unk_bytes"], found["bytes"]) == (2, 1, 5, 13)
    bits = found["nats_per_token"] * 2 / math.log(2) + 8 * 5
    assert found["bits_per_byte"] == pytest.approx(bits / 13)
    assert found["nats_per_word"] == pytest.approx(bits * math.log(2) / 3)
    assert found["bits_per_byte_error"] is None
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    whole = plain_score(model, tokenizer, "the été sat", "salazar")
    without = [-found["nats_per_token"] * 2]
    assert whole < without[0]  # with the score of [UNK]
    (tmp_path / "text.txt").write_text("été")
    assert main(["evaluate", "--model", str(bert), "--pll", str(tmp_path / "text.txt")]) == 2
    assert "has no token that can be scored" in capsys.readouterr().err


def test_long_sentences_are_cut_between_words(bert, capsys, tmp_path) -> None:
    text = "the cat sat on the dogsters mat the cats"  # tokens: 5, dog ##s ##ter ##s, 2, cat ##s
    (tmp_path / "text.txt").write_text(text)
    found = figures(capsys, "--model", bert, "--pll", tmp_path / "text.txt", "--length", 9)
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    parts = ["the cat sat on the", "dogsters mat the", "cats"]
    expected = -sum(plain_score(model, tokenizer, part, "salazar") for part in parts)
    assert found["nats_per_token"] == pytest.approx(expected / 13, rel=1e-5)
    assert (found["sentences"], found["sentences_cut"], found["length"], found["tokens"]) == (1, 1, 9, 13)
    whole = figures(capsys, "--model", bert, "--pll", tmp_path / "text.txt")
    assert (whole["sentences_cut"], whole["length"]) == (0, 16)
    assert whole["nats_per_token"] != found["nats_per_token"]
    short = figures(capsys, "--model", bert, "--pll", tmp_path / "text.txt", "--length", 4)  # words of more pieces
    assert short["tokens"] == 13
    scorer = open_scorer(EvaluateOptions(model=str(bert), pairs="-"))
    (encoding,) = scoring.encoded(scorer, ["dogsters"])
    ends = [part.ends.tolist() for part in pll.parts_of(encoding, 4, scorer.unk_id)]
    assert ends == [[3, 3], [3, 3]]  # of the part, not of the word: [SEP] is not masked
    assert main(["evaluate", "--model", str(bert), "--pll", str(tmp_path / "text.txt"), "--length", "17"]) == 2
    assert "length 17 is longer than the 16 positions" in capsys.readouterr().err


def test_default_length() -> None:
    lengths = {positions: pll.sequence_length(SimpleNamespace(positions=positions), None) for positions in (64, 8192)}
    assert lengths == {64: 64, 8192: 512}


def test_standard_error_of_a_ratio() -> None:
    """For equal sizes it is scipy's standard error of the mean; in general close to a bootstrap's."""
    rng = np.random.default_rng(0)
    y = rng.gamma(2, 3, 500)
    value, error = pll.ratio(y, np.full(500, 4.0))
    assert (value, error) == pytest.approx((y.mean() / 4, stats.sem(y) / 4))
    x = rng.integers(1, 40, 500).astype(float)
    y = 3 * x + rng.normal(0, 1, 500) * np.sqrt(x)
    picks = rng.integers(0, 500, (4000, 500))
    assert pll.ratio(y, x)[1] == pytest.approx((y[picks].sum(1) / x[picks].sum(1)).std(), rel=0.05)
    assert pll.ratio(y[:1], x[:1])[1] is None


def test_sentences() -> None:
    assert list(split_sentences(TEXT)) == [
        "The cat sat.",
        "No dogsters sat on the mat!",
        "The bird sat on Dr. mat. w1 w2 w3.",
        "the the the cat.",
    ]
    assert list(split_sentences('He cried "Go." Then A. B. Smith left (at 3.5 km). "Why?" he asked.  1 more')) == [
        'He cried "Go."',
        "Then A. B. Smith left (at 3.5 km).",
        '"Why?" he asked.',
        "1 more",
    ]
    assert list(split_sentences("“Dr. No was i. It ended. (Mr. X came.)")) == [
        "“Dr. No was i.",
        "It ended.",
        "(Mr. X came.)",
    ]
    assert list(split_sentences("これは文です。次の文！")) == ["これは文です。", "次の文！"]


@given(st.text(alphabet="aB. !?\"'\n\tü。", max_size=60))
def test_no_character_is_lost(text: str) -> None:
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


def test_the_sample_depends_on_the_text_alone_and_is_nested() -> None:
    documents = [f"Number {n} is here. Then comes {n}b.\nAnd {n}c." for n in range(3000)]
    every, count = sample_sentences(documents, 10**6)
    assert (len(every), count) == (9000, 9000)
    small, large = (sample_sentences(iter(documents), size)[0] for size in (50, 400))
    assert len(small) == 50
    assert set(small) < set(large) < set(every)
    assert small == [text for text in every if text in set(small)]  # in the order of the text
    assert [every.index(text) for text in large] == sorted(np.argsort(document_hash(0, 0, 9000))[:400])


def test_text_without_sentences(bert, capsys, tmp_path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    assert main(["evaluate", "--model", str(bert), "--pll", str(tmp_path / "empty.txt")]) == 2
    assert "has no text" in capsys.readouterr().err
