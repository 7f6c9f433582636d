"""`fastbert evaluate --pairs`: scores of transformers' own logits, exact values by enumeration, statistics of scipy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from fastbert.data.tokenizer import SPECIAL_TOKENS, WordPiece
from fastbert.hub.export import export_model
from fastbert.model.encoder import initialize
from fastbert.model.options import EncoderOptions
from fastbert.objectives.mlm import MLM
from fastbert.objectives.options import MLMOptions
from fastbert.pretraining.evaluate_options import EvaluateOptions
from fastbert.pretraining.zero_shot import pairs as zero_shot
from fastbert.pretraining.zero_shot import scoring
from fastbert.pretraining.zero_shot.pair_files import Pair
from fastbert.pretraining.zero_shot.scorer import open_scorer
from fastbert.training.options import MachineOptions
from tests.flags import main

WORDS = (
    *SPECIAL_TOKENS,
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "dog",
    "##s",
    "##ter",
    ".",
    "no",
    *(f"w{n}" for n in range(9)),
)
FP32 = ("--machine.precision", "fp32", "--machine.threads", "1")
PAIRS = [
    ("the cat sat on the mat.", "the cats sat on the mat."),
    ("No dogsters sat.", "no dogters sat."),
    ("w1 w2 w3 the dogs.", "w1 w2 w3 the dogs ."),  # equal tokens
    ("the cat", "cat the"),
    ("the cat sat on the mat.", "the cat sat on the dogs."),
]


def new_model(folder: Path, position: str, bias: torch.Tensor | None = None) -> Path:
    """A random model with 16 positions; with `bias` its logits are that in every context."""
    words = WordPiece(WORDS)
    words.save(folder / "tokenizer")
    config = EncoderOptions(layers=2, width=32, heads=2, position=position).resolve(len(WORDS), 16)
    objective = MLM(config, MLMOptions(), words)
    initialize(objective, 0, 0.3)
    if bias is not None:
        with torch.no_grad():
            objective.encoder.words.weight.zero_()
            objective.head.decoder.bias.copy_(bias)
    export_model(config, objective.state_dict(), folder / "tokenizer", folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return new_model(tmp_path_factory.mktemp("bert"), "absolute")


@pytest.fixture(scope="module")
def tupe(tmp_path_factory) -> Path:
    return new_model(tmp_path_factory.mktemp("tupe"), "tupe-r")


def write_pairs(path: Path, pairs: list[tuple[str, str]], **labels: str) -> Path:
    path.write_text("".join(json.dumps({"sentence_good": a, "sentence_bad": b, **labels}) + "\n" for a, b in pairs))
    return path


def measured(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments), "--json", *FP32]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


@torch.no_grad()
def plain_score(model, tokenizer, text: str, form: str) -> float:
    """The definition, one forward pass of transformers for each token."""
    encoding = tokenizer(text)
    ids, words, total = encoding["input_ids"], encoding.word_ids(), 0.0
    for index, word in enumerate(words):
        if word is None:
            continue
        masked = [
            tokenizer.mask_token_id
            if other == index or (form == "word-l2r" and words[other] == word and other > index)
            else token
            for other, token in enumerate(ids)
        ]
        logits = model(torch.tensor([masked])).logits[0, index]
        total += float(logits.double().log_softmax(-1)[ids[index]])
    return total


@pytest.mark.parametrize("form", ["salazar", "word-l2r"])
@pytest.mark.parametrize("name", ["bert", "tupe"])
def test_scores_are_those_of_transformers(name, form, request, capsys, tmp_path) -> None:
    folder = request.getfixturevalue(name)
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    file = write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    out = tmp_path / "scores.jsonl"
    result = measured(capsys, "--model", folder, "--pairs", file, "--pll-form", form, "--out", out)
    right = []
    for line, pair in zip(out.read_text().splitlines(), PAIRS, strict=True):
        found = json.loads(line)["scores"]["pll"]
        expected = [plain_score(model, tokenizer, text, form) for text in pair]
        assert [found["good"], found["bad"]] == pytest.approx(expected, rel=1e-5)
        right.append(0.5 if pair == PAIRS[2] else float(expected[0] > expected[1]))
    assert found["good"] != found["bad"]
    assert result["accuracy"] == pytest.approx(np.mean(right))
    assert (result["count"], result["ties"], result["score"], result["pll_form"]) == (5, 1, "pll", form)
    assert 0 < np.mean(right) < 1


def test_forms_differ_where_a_word_has_several_pieces(bert, tmp_path) -> None:
    texts = ["the cat sat", "the dogsters sat"]
    found = {form: scores(bert, texts, form) for form in ("salazar", "word-l2r")}
    assert found["salazar"][0] == pytest.approx(found["word-l2r"][0], abs=1e-5)
    ours, other = found["salazar"][1], found["word-l2r"][1]
    assert len(ours) == 6
    assert ours[[0, 4, 5]] == pytest.approx(other[[0, 4, 5]], abs=1e-5)  # the, the last piece, sat
    assert (abs(ours[1:4] - other[1:4]) > 1e-3).all()


def scores(model: Path, texts: list[str], form: str = "salazar") -> list[np.ndarray]:
    options = EvaluateOptions(model=str(model), pairs="-", machine=MachineOptions(threads=1, precision="fp32"))
    scorer = open_scorer(options)
    sentences = [scoring.sentence(encoding) for encoding in scoring.encoded(scorer, texts)]
    return scoring.log_probabilities(scorer, sentences, form)


def test_probabilities_of_all_words_in_one_position_sum_to_one(tupe) -> None:
    """Enumerates the vocabulary: one row, scored for every word."""
    options = EvaluateOptions(model=str(tupe), pairs="-", machine=MachineOptions(threads=1, precision="fp32"))
    scorer, rows = open_scorer(options), []
    real = scorer.word_logits

    def counted(ids, positions):
        rows.append(len(ids))
        return real(ids, positions)

    object.__setattr__(scorer, "word_logits", counted)
    row = np.array([2, 5, 6, 7, 3], dtype=np.int32)
    row[[0, -1]] = [scorer.tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]")]
    sentences = []
    for word in range(len(WORDS)):
        ids = row.copy()
        ids[2] = word
        sentences.append(scoring.Sentence(ids, np.array([2]), np.array([3])))
    found = scoring.log_probabilities(scorer, sentences, "salazar")
    assert np.exp(np.concatenate(found)).sum() == pytest.approx(1.0, abs=1e-5)
    assert rows == [1]


def test_a_model_without_context_scores_its_bias(tmp_path) -> None:
    """With constant hidden states the score is the sum of log softmax(bias), a closed form."""
    bias = torch.linspace(-2, 1, len(WORDS))
    (found,) = scores(new_model(tmp_path, "alibi", bias=bias), ["the cat sat on the dogs"])
    ids = [WORDS.index(word) for word in ("the", "cat", "sat", "on", "the", "dog", "##s")]
    assert found == pytest.approx(bias.log_softmax(0)[ids].numpy(), abs=1e-6)


def test_precision(bert, capsys, tmp_path) -> None:
    file, out = write_pairs(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "scores.jsonl"
    found = {}
    for precision in ("fp32", "bf16"):
        flags = ("--machine.precision", precision, "--machine.threads", "1")
        assert main(["evaluate", "--model", str(bert), "--pairs", str(file), "--out", str(out), *flags]) == 0
        rows = [json.loads(line)["scores"]["pll"] for line in out.read_text().splitlines()]
        found[precision] = [value for row in rows for value in row.values()]
    capsys.readouterr()
    assert found["bf16"] != found["fp32"]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.02)


def test_special_tokens_in_a_text_are_ordinary_text(bert) -> None:
    found = scores(bert, ["the [MASK] sat", "the cat sat"])
    assert [len(one) for one in found] == [5, 3]  # [ mask ]: unknown pieces


def test_equal_rows_are_scored_once_and_batches_do_not_matter(bert, monkeypatch) -> None:
    texts = ["the cat sat on the mat", "the dog sat on the mat", "the cat sat on the mat .", "no"]
    options = EvaluateOptions(model=str(bert), pairs="-", machine=MachineOptions(threads=1, precision="fp32"))
    scorer, rows = open_scorer(options), []
    real = scorer.word_logits
    object.__setattr__(scorer, "word_logits", lambda *inputs: (rows.append(len(inputs[0])), real(*inputs))[1])
    sentences = [scoring.sentence(encoding) for encoding in scoring.encoded(scorer, texts)]
    whole = scoring.log_probabilities(scorer, sentences, "salazar")
    assert sum(rows) == 6 + 5 + 7 + 1  # the two sentences are one row where cat and dog are masked
    # A piece of at most 48 tokens is one sentence: 6 rows of 8 tokens.
    for piece, batch, expected in ((scoring.PIECE, 1, 19), (49, 3, 19), (48, 3, 20), (1, 2, 20)):
        monkeypatch.setattr(scoring, "PIECE", piece)
        rows.clear()
        found = scoring.log_probabilities(scorer, sentences, "salazar", batch)
        assert sum(rows) == expected
        assert np.concatenate(found) == pytest.approx(np.concatenate(whole), abs=1e-5)


# --- statistics


def test_wilson_is_scipys() -> None:
    for right, count in ((0, 7), (3, 7), (7, 7), (512, 1000)):
        expected = binomtest(right, count).proportion_ci(method="wilson")
        values = np.array([1.0] * right + [0.0] * (count - right))
        found = zero_shot.summary([values])
        assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert found["accuracy"] == right / count


def test_means_are_over_paradigms_and_ties_count_half() -> None:
    sizes = {"a": (3, 1, 2), "b": (10, 0, 30), "c": (0, 0, 5)}  # right, ties, wrong
    pairs, values = [], []
    for name, (right, ties, wrong) in sizes.items():
        for value, count in ((1.0, right), (0.5, ties), (0.0, wrong)):
            pairs += [Pair("x", "y", name, "p" if name < "c" else "q", "")] * count
            values += [value] * count
    found = zero_shot.accuracies(pairs, np.array(values))
    assert found["paradigms"]["a"]["accuracy"] == pytest.approx(3.5 / 6)
    assert found["phenomena"]["p"]["accuracy"] == pytest.approx((3.5 / 6 + 0.25) / 2)
    assert found["accuracy"] == pytest.approx((3.5 / 6 + 0.25 + 0) / 3)
    assert (found["count"], found["ties"], found["phenomena"]["p"]["ties"]) == (51, 1, 1)
    # The half width of a large sample is 1.96 standard errors of a mean of independent paradigms.
    large = [np.repeat([1.0, 0.0], [7000, 3000]), np.repeat([1.0, 0.0], [500, 500])]
    error = np.sqrt(0.7 * 0.3 / 10_000 + 0.25 / 1000) / 2
    interval = zero_shot.summary(large)
    assert (interval["high"] - interval["low"]) / 2 == pytest.approx(1.96 * error, rel=1e-2)


def test_phenomena_are_those_of_the_paper(bert, capsys, tmp_path) -> None:
    write_pairs(tmp_path / "one.jsonl", PAIRS[:2], UID="x", linguistics_term="s-selection")
    write_pairs(tmp_path / "two.jsonl", PAIRS[3:], linguistics_term="argument_structure")
    write_pairs(tmp_path / "zero.jsonl", PAIRS[:1])
    result = measured(capsys, "--model", bert, "--pairs", tmp_path)
    assert {name: one["phenomenon"] for name, one in result["paradigms"].items()} == {
        "x": "argument_structure",
        "two": "argument_structure",
        "zero": None,
    }
    assert list(result["paradigms"]) == ["zero", "two", "x"]  # by phenomenon, then by name
    assert list(result["phenomena"]) == ["argument_structure"]
    assert result["phenomena"]["argument_structure"]["count"] == 4
    assert main(["evaluate", "--model", str(bert), "--pairs", str(tmp_path), *FP32]) == 0
    printed = capsys.readouterr().out
    assert "5 pairs in 3 paradigms\n" in printed and ", 0 ties; chance is 50 %\n" in printed
    assert f"accuracy by pll (salazar): {100 * result['accuracy']:.1f} %" in printed


# --- other models


def test_a_roberta_of_transformers(tmp_path, capsys) -> None:
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "the", "cat", "dog", "sat"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])
    special = {"mask_token": "<mask>", "unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path / "roberta")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=9, max_position_embeddings=12, initializer_range=0.5, **sizes)
    model = RobertaForMaskedLM(config).eval()
    model.save_pretrained(tmp_path / "roberta")
    file = write_pairs(tmp_path / "pairs.jsonl", [("the cat sat", "the sat dog"), ("the bird", "bird the")])
    out = tmp_path / "scores.jsonl"
    measured(capsys, "--model", tmp_path / "roberta", "--pairs", file, "--out", out)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "roberta")
    for line in out.read_text().splitlines():
        row = json.loads(line)
        expected = [plain_score(model, tokenizer, row[f"sentence_{key}"], "salazar") for key in ("good", "bad")]
        assert list(row["scores"]["pll"].values()) == pytest.approx(expected, rel=1e-4)
    long = write_pairs(tmp_path / "long.jsonl", [("the cat", "the " * 9)])
    assert "long.jsonl, line 1: sentence_bad (11 tokens) is longer than the 10 positions" in refused(
        capsys, "--model", tmp_path / "roberta", "--pairs", long
    )
    model.roberta.save_pretrained(tmp_path / "roberta")  # the encoder alone
    assert "has no masked head: its weights lack lm_head" in refused(
        capsys, "--model", tmp_path / "roberta", "--pairs", file
    )


def test_a_bert_with_another_activation(bert, tmp_path) -> None:
    """fastbert's encoder has GELU only, so transformers computes this one."""
    model = AutoModelForMaskedLM.from_pretrained(bert, hidden_act="relu").eval()
    tokenizer = AutoTokenizer.from_pretrained(bert)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "relu")
    (found,) = scores(tmp_path / "relu", ["the cat sat"])
    assert found.sum() == pytest.approx(plain_score(model, tokenizer, "the cat sat", "salazar"), rel=1e-5)


# --- refusals and warnings


def test_long_sentences(bert, tupe, capsys, tmp_path) -> None:
    file = write_pairs(tmp_path / "pairs.jsonl", [("the cat", "the dog"), ("the cat", "the " * 20)])
    message = refused(capsys, "--model", bert, "--pairs", file)
    assert "pairs.jsonl, line 2: sentence_bad (22 tokens) is longer than the 16 positions" in message
    assert "position encoding absolute defines none beyond" in message
    out = tmp_path / "scores.jsonl"
    capsys.readouterr()
    assert main(["evaluate", "--model", str(tupe), "--pairs", str(file), "--out", str(out), *FP32]) == 0
    printed = capsys.readouterr()
    assert "often with a higher loss; 1 of 3 sentences are longer\n" in printed.err
    assert "2 pairs in 1 paradigm\n" in printed.out
    assert main(["evaluate", "--model", str(bert), "--pairs", str(file), "--length", "21", *FP32]) == 0
    printed = capsys.readouterr()
    assert "1 of 2 pairs have a sentence of more than 21 tokens and are left out" in printed.err
    assert "1 pair in 1 paradigm\n" in printed.out
    assert measured(capsys, "--model", tupe, "--pairs", file, "--length", "22")["count"] == 2
    assert "all pairs have a sentence of more than 3 tokens" in refused(
        capsys, "--model", bert, "--pairs", file, "--length", "3"
    )
    model = AutoModelForMaskedLM.from_pretrained(tupe, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(tupe, trust_remote_code=True)
    expected = plain_score(model, tokenizer, "the " * 20, "salazar")
    assert json.loads(out.read_text().splitlines()[1])["scores"]["pll"]["bad"] == pytest.approx(expected, rel=1e-4)


def test_unknown_words_and_equal_pairs_are_reported(bert, capsys, tmp_path) -> None:
    file = write_pairs(tmp_path / "pairs.jsonl", [("the cat", "the bird"), ("the bird", "the fish")])
    result = measured(capsys, "--model", bert, "--pairs", file)
    assert (result["ties"], result["count"]) == (1, 2)
    capsys.readouterr()
    assert main(["evaluate", "--model", str(bert), "--pairs", str(file), *FP32]) == 0
    warnings = capsys.readouterr().err
    assert "2 of 3 sentences have words that the tokenizer" in warnings
    assert "1 of 2 pairs have equal tokens" in warnings


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"sentence_good": "the"}\n', "pairs.jsonl, line 1 has no key 'sentence_bad'; it has sentence_good"),
        ('{"sentence_good": "the", "sentence_bad": 3}\n', "line 1 has sentence_bad 3, which is not a text"),
        ('{"sentence_good": "the", "sentence_bad": " "}\n', "line 1 has an empty sentence_bad"),
        ('{"sentence_good": "a", "sentence_bad": "b"}\n[1]\n', "line 2 is a JSON list, not an object"),
        (
            '{"sentence_good": "a", "sentence_bad": "b", "UID": 7}\n',
            "line 1 has UID 7, which must be a name on one line",
        ),
        ('{"sentence_good": "a", "sentence_bad": "b"\n', "line 1 is not JSON"),
        ("", "has no minimal pairs: it is empty"),
        ('{"sentence_good": "\\u0301", "sentence_bad": "b"}\n', "sentence_good has no tokens for the tokenizer"),
    ],
)
def test_bad_files(bert, capsys, tmp_path, lines, message) -> None:
    (tmp_path / "pairs.jsonl").write_text(lines)
    assert message in refused(capsys, "--model", bert, "--pairs", tmp_path)


def test_scores_that_are_not_finite(bert, capsys, tmp_path, monkeypatch) -> None:
    file = write_pairs(tmp_path / "pairs.jsonl", PAIRS[:1])
    monkeypatch.setattr(MLM, "word_logits", lambda self, hidden: self.head(hidden) * float("nan"))
    assert "the pll scores of" in refused(capsys, "--model", bert, "--pairs", file)
    (tmp_path / "text.txt").write_text("the cat")
    assert "are not finite" in refused(capsys, "--model", bert, "--pll", tmp_path / "text.txt")
