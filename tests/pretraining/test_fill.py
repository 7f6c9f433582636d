"""`fastbert fill`: the words and probabilities of transformers' fill-mask pipeline, and of a generator."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import pipeline

from fastbert.data.batches import Batch
from fastbert.data.tokenizer import SPECIAL_TOKENS, WordPiece
from fastbert.hub.export import export_model
from fastbert.model.encoder import initialize
from fastbert.model.options import EncoderOptions
from fastbert.objectives import OBJECTIVES
from fastbert.objectives.mlm import MLM
from fastbert.objectives.options import MLMOptions
from fastbert.pretraining.fill import word_logits
from fastbert.pretraining.options import PretrainOptions
from tests.flags import main

WORDS = (*SPECIAL_TOKENS, "the", "cat", "sat", "on", "mat", "dog", "##s", ".", "été", *(f"w{n}" for n in range(20)))
FP32 = ("--machine.precision", "fp32", "--machine.threads", "1")


def new_model(folder: Path, position: str) -> Path:
    """A random model with 16 positions and an MLM head whose answers depend on the text."""
    words = WordPiece(WORDS, strip_accents=False)
    words.save(folder / "tokenizer")
    config = EncoderOptions(layers=2, width=32, heads=2, position=position).resolve(len(WORDS), 16)
    objective = MLM(config, MLMOptions(), words)
    initialize(objective, 0, 0.3)
    export_model(config, objective.state_dict(), folder / "tokenizer", folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return new_model(tmp_path_factory.mktemp("bert"), "absolute")


def filled(capsys, *arguments: object) -> list[dict]:
    capsys.readouterr()
    assert main(["fill", *map(str, arguments), "--json", *FP32]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main(["fill", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def give_input(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


TEXTS = ("the [MASK] sat on the mat .", "[MASK] [MASK]s, a été[MASK]", "The [MASK]", "the [MASK] \u2603 ice")


def with_transformers(model: Path, texts: tuple[str, ...]) -> list[list[list[dict]]]:
    """The 7 most likely words for each mask of each text."""
    found = map(pipeline("fill-mask", str(model), trust_remote_code=True, device="cpu", top_k=7), texts)
    return [masks if isinstance(masks[0], list) else [masks] for masks in found]


def check_equal(found: list[dict], expected: list[list[list[dict]]]) -> None:
    for row, masks in zip(found, expected, strict=True):
        assert [[one["word"] for one in words] for words in row["masks"]] == [
            [one["token_str"] for one in words] for words in masks
        ]
        ours, theirs = (
            torch.tensor([[one[key] for one in words] for words in part])
            for part, key in ((row["masks"], "probability"), (masks, "score"))
        )
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


def test_words_and_probabilities_equal_transformers(bert, capsys, monkeypatch) -> None:
    expected = with_transformers(bert, TEXTS)
    give_input(monkeypatch, "\n\n".join(TEXTS).encode())
    for given in (TEXTS, ("--machine.micro-batch-size", 3, "--texts", *TEXTS), ("-",), ()):
        found = filled(capsys, bert, "--top", 7, *given)
        assert [row["text"] for row in found] == list(TEXTS)
        check_equal(found, expected)
        give_input(monkeypatch, "\r\n".join(TEXTS).encode("utf-8-sig"))


def test_a_text_beyond_the_positions_is_read_with_one_warning(tmp_path, capsys) -> None:
    model = new_model(tmp_path, "tupe-r")
    texts = ("the [MASK]", f"the [MASK] {'cat sat ' * 9}[MASK]", f"{'mat ' * 30}[MASK] .")
    expected = with_transformers(model, texts)
    capsys.readouterr()
    assert main(["fill", str(model), *texts, "--json", "--top", "7", *FP32]) == 0
    printed = capsys.readouterr()
    check_equal([json.loads(line) for line in printed.out.splitlines()], expected)
    warning = "text 2 (23 tokens with [CLS] and [SEP]) is longer than the 16 positions of the model; position encoding "
    assert printed.err.count("longer than") == printed.err.count(warning) == 1


@pytest.mark.parametrize("name", ["electra", "multiple-choice"])
def test_a_second_network_answers_as_in_training(name) -> None:
    words = WordPiece(WORDS)
    config = EncoderOptions(layers=1, width=16, heads=2).resolve(len(WORDS), 16)
    options = PretrainOptions(data="x", steps=1, objective=name).of_objective
    objective = OBJECTIVES[name](config, options, words).eval()
    initialize(objective, 0, 0.3)
    rows = torch.randint(5, len(WORDS), (3, 12), generator=torch.Generator().manual_seed(0))
    batch = objective.sample(Batch(rows, torch.arange(3)), 0, 0, "validation-mask")
    masked = batch.input_ids == words.ids["[MASK]"]
    expected = objective.masked_log_probabilities(batch, objective.generator_hidden(batch))
    expected = expected.new_zeros(3, 12, len(WORDS)).scatter(
        1, batch.positions[..., None].expand(-1, -1, len(WORDS)), expected.view(3, -1, len(WORDS))
    )
    assert masked.sum() > 3
    found = word_logits(objective, batch.input_ids, torch.ones_like(rows), masked)
    assert torch.allclose(found.log_softmax(-1), expected[masked], atol=1e-6)


def test_a_run_of_electra_answers_by_its_generator_and_its_export_does_not(prepared, tmp_path, capsys) -> None:
    sizes = ("--layers", "1", "--width", "16", "--heads", "2", "--length", "16", "--batch-size", "4", "--steps", "2")
    run = tmp_path / "run"
    flags = ("--objective", "electra", "--eval-sequences", "4", "--machine.threads", "1", "--out", str(run))
    assert main(["pretrain", "--data", str(prepared), *sizes, *flags]) == 0
    of_run = filled(capsys, run, "the [MASK]", "--top", 3)
    assert len(of_run[0]["masks"][0]) == 3
    assert filled(capsys, run / "checkpoints" / "step-00000002", "the [MASK]", "--top", 3) == of_run
    assert main(["fill", str(run), "[MASK]"]) == 0
    assert "the words are predicted by the generator of" in capsys.readouterr().err
    assert "has no MLM head" in refused(capsys, run / "model", "the [MASK]")


def test_the_table_has_a_column_for_each_mask(bert, capsys, monkeypatch) -> None:
    give_input(monkeypatch, b"the [MASK] sat on [MASK]\na \x1b[MASK]")
    assert main(["fill", str(bert), "--top", "34", *FP32]) == 0
    first, head, *rows, second = capsys.readouterr().out.splitlines()[:37]
    assert first == "the [MASK] sat on [MASK]" and second == "a \\x1b[MASK]"
    assert head.split() == ["[MASK]", "1", "[MASK]", "2"] and len(rows) == 34
    assert len({row.index("%") for row in rows}) == len({row.rindex("%") for row in rows}) == 1
    assert head.rindex("[") == min(row.rindex(row.split()[3]) for row in rows)


def test_unknown_words_are_reported(bert, capsys) -> None:
    assert main(["fill", str(bert), "the [MASK] \u2603 [UNK] .", *FP32]) == 0
    assert "warning: text 1: the tokenizer of" in (printed := capsys.readouterr().err)
    assert "reads \u2603 as [UNK]" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["the [Mask]"], "text 1 has no [MASK]; write [MASK], in capital letters, instead of [Mask]"),
        (["a [MASK]", "the ___ sat"], "text 2 has no [MASK]; write [MASK], in capital letters, instead of ___"),
        (
            ["the", "[MASK]", "sat"],
            "text 1 ('the') has no [MASK]; write it for each word to fill in, and put the whole",
        ),
        ([" "], "text 1 (' ') has no [MASK]"),
        (
            ["the [MASK]" + "\ncat" * 2000],
            "text 1 (2004 tokens with [CLS] and [SEP]) is longer",
        ),  # no name of a file: any length
        (["the [MASK]" + " cat" * 13], "is longer than the 16 positions of the model, and position encoding absolute"),
        (["a [MASK]", "--top", "35"], "--top 35 is more than the 34 tokens of"),
    ],
)
def test_refused_texts(bert, capsys, arguments, message) -> None:
    assert message in refused(capsys, bert, *arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "standard input has no text; give lines that contain [MASK]"),
        (b"\n \n", "standard input has no text"),
        (b"\na\n", "standard input, line 2 ('a') has no [MASK]"),
        ("gr\u00fc\u00dfe [MASK]".encode("latin-1"), "standard input, line 1 is not UTF-8 text: it is probably"),
        (b"a [MASK]\0", "standard input, line 1: a zero character"),
    ],
)
def test_refused_input(bert, capsys, monkeypatch, content, message) -> None:
    give_input(monkeypatch, content)
    assert message in refused(capsys, bert)
