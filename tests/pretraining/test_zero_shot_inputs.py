"""Zero-shot evaluation of models of other families, and of models, pairs and outputs that are refused."""

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from fastbert.errors import UserError
from fastbert.pretraining.evaluate_options import EvaluateOptions
from fastbert.pretraining.zero_shot import scoring
from fastbert.pretraining.zero_shot.pair_files import LONGEST, read_pairs
from fastbert.pretraining.zero_shot.scorer import open_scorer
from fastbert.training.options import MachineOptions
from tests.flags import main
from tests.pretraining.test_zero_shot_pairs import measured, new_model, plain_score, refused, write_pairs

WORDS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "the", "cat", "dog", "sat")
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
FAMILIES = {
    "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
    "modernbert": {**SIZES, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2},
    "deberta-v2": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "albert": {**SIZES, "embedding_size": 8},
    "electra": {**SIZES, "embedding_size": 8},  # the generator
    "mobilebert": {**SIZES, "embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8},
}


def new_foreign(folder: Path, family: str) -> Path:
    """A random model of transformers with 12 positions."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])
    backend.enable_truncation(6)
    backend.enable_padding(pad_id=1, pad_token="<pad>", length=20)
    special = {"mask_token": "<mask>", "unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"max_position_embeddings": 12, "initializer_range": 0.5, "pad_token_id": 1, **FAMILIES[family]}
    config = AutoConfig.for_model(family, vocab_size=len(WORDS), **sizes)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return new_model(tmp_path_factory.mktemp("bert"), "absolute")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    return new_foreign(tmp_path_factory.mktemp("models") / "distilbert", "distilbert")


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family, tmp_path, capsys) -> None:
    folder = new_foreign(tmp_path / "model", family)
    file = write_pairs(tmp_path / "pairs.jsonl", [("the cat sat", "the sat dog"), ("the " * 10, "bird the")])
    out = tmp_path / "scores.jsonl"
    measured(capsys, "--model", folder, "--pairs", file, "--out", out)
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for line in out.read_text().splitlines():
        row = json.loads(line)
        expected = [plain_score(model, tokenizer, row[f"sentence_{key}"], "salazar") for key in ("good", "bad")]
        assert list(row["scores"]["pll"].values()) == pytest.approx(expected, rel=1e-4)
    capsys.readouterr()
    fill = ["fill", str(folder), "the [MASK] sat [MASK]", "[MASK] dog", "--top", "3", "--json"]
    assert main([*fill, "--machine.precision", "fp32"]) == 0
    for line, text in zip(capsys.readouterr().out.splitlines(), ("the <mask> sat <mask>", "<mask> dog"), strict=True):
        ids = torch.tensor([tokenizer(text, padding=False)["input_ids"]])
        with torch.no_grad():
            probabilities = model(ids).logits.softmax(-1)[ids == 4]
        for found, row in zip(json.loads(line)["masks"], probabilities, strict=True):
            best, words = row.topk(3)
            assert [one["word"] for one in found] == [WORDS[word] for word in words]
            assert [one["probability"] for one in found] == pytest.approx(best.tolist(), rel=1e-4)
    long = write_pairs(tmp_path / "long.jsonl", [("the cat", "the " * 11)])
    assert "sentence_bad (13 tokens) is longer than the 12 positions" in refused(
        capsys, "--model", folder, "--pairs", long
    )


def test_the_vocabulary_is_multiplied_at_masked_positions_alone(foreign, monkeypatch) -> None:
    shapes = []
    real = torch.nn.functional.linear

    def linear(inputs, weight, bias=None):
        if len(weight) == len(WORDS):
            shapes.append(tuple(inputs.shape))
        return real(inputs, weight, bias)

    scorer = open_scorer(EvaluateOptions(model=str(foreign), pairs="-", machine=MachineOptions(threads=1)))
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    sentences = [scoring.sentence(encoding) for encoding in scoring.encoded(scorer, ["the cat sat", "the dog sat"])]
    scoring.log_probabilities(scorer, sentences, "salazar")
    assert shapes == [(5, 1, 16)]
    monkeypatch.setattr(scoring, "LOGITS", 2 * len(WORDS))
    scoring.log_probabilities(scorer, sentences, "salazar")
    monkeypatch.setattr(scoring, "LOGITS", 1)
    scoring.log_probabilities(scorer, sentences[:1], "salazar")
    assert [shape[0] for shape in shapes[1:]] == [2, 2, 1, 1, 1, 1]


def test_tokenization_is_bounded_by_characters(monkeypatch) -> None:
    parts = []
    tokenizer = SimpleNamespace(encode_batch=lambda texts: parts.append(list(texts)) or texts)
    monkeypatch.setattr(scoring, "ENCODED", 4)
    texts = ["ab", "c", "def", "g" * 9, "h", "i"]
    assert list(scoring.encoded(SimpleNamespace(tokenizer=tokenizer), texts)) == texts
    assert parts == [["ab", "c", "def"], ["g" * 9], ["h", "i"]]


def test_tokenizer_of_another_model(foreign, tmp_path, capsys) -> None:
    """It cuts and pads nothing, reads no special tokens in a text, and may limit the length."""
    scorer = open_scorer(EvaluateOptions(model=str(foreign), pairs="-"))
    (encoding,) = scoring.encoded(scorer, ["the <mask> " + "cat " * 9])
    assert encoding.ids == [0, 5, 3, 3, 3, *[6] * 9, 2]
    shutil.copytree(foreign, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 8}))
    assert open_scorer(EvaluateOptions(model=str(tmp_path / "model"), pairs="-")).positions == 8


# --- refused models


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def damage(folder: Path, name: str) -> None:
    """Damages a copy of a model in the way that `name` states."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if name in ("model_type", "dim"):
        config[name] = {"model_type": ["distilbert"], "dim": "x"}[name]
    elif name == "shapes":
        config["hidden_dim"] = 64
    elif name == "code":
        config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForMaskedLM": "code.Model"}
        config["model_type"] = "new"
        (folder / "code.py").write_text("from pathlib import Path\nPath('executed').touch()\n")
    elif name == "cut":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:3000])
    elif name == "pickle":
        (folder / "model.safetensors").unlink()
        torch.save({"a": Bomb()}, folder / "pytorch_model.bin", pickle_module=pickle)
    elif name == "tokenizer":
        (folder / "tokenizer.json").unlink()
    elif name == "vocabulary":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"] = {word: WORDS.index(word) for word in ("<s>", "<pad>", "<unk>", "<mask>")}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    elif name == "tokenizer.json":
        (folder / name).write_text("{}")
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model_type", "config.json: model_type must be a name, not ['distilbert']"),
        ("dim", "Validation error for field 'dim'"),
        ("shapes", "have other shapes than its config.json: distilbert.transformer.layer.0.ffn.lin1"),
        ("code", "contains custom code which must be executed"),
        ("cut", "as a masked language model: Error while deserializing header"),
        ("pickle", "as a masked language model: Weights only load failed\n"),
        ("tokenizer", "from one of; it has no tokenizer.json"),
        ("vocabulary", "has no tokenizer: its vocabulary has only special tokens"),
        ("tokenizer.json", "as a masked language model: it lacks 'added_tokens'"),
    ],
)
def test_damaged_models(foreign, name, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(foreign, "model")
    damage(Path("model"), name)
    write_pairs(Path("pairs.jsonl"), [("the cat", "the dog")])
    printed = refused(capsys, "--model", "model", "--pairs", "pairs.jsonl")
    assert message in printed
    assert printed.count("\n") == 1
    assert not Path("executed").exists()


def test_code_next_to_a_known_model_is_ignored(foreign, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(foreign, "model")
    config = json.loads(Path("model/config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForMaskedLM": "code.Model"}
    Path("model/config.json").write_text(json.dumps(config))
    Path("model/code.py").write_text("from pathlib import Path\nPath('executed').touch()\n")
    write_pairs(Path("pairs.jsonl"), [("the cat", "the dog")])
    assert measured(capsys, "--model", "model", "--pairs", "pairs.jsonl")["count"] == 1
    assert not Path("executed").exists()


# --- pairs


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence_good": "the \ud800"}, "line 1 has half of a surrogate pair in sentence_good"),
        ({"sentence_bad": "a" * (LONGEST + 1)}, "line 1 has a sentence_bad of 10,001 characters"),
        ({"UID": "a\nb"}, "line 1 has UID 'a\\nb', which must be a name on one line"),
        ({"linguistics_term": "\x1b[31m"}, "which must be a name on one line"),
    ],
)
def test_refused_rows(bert, row, message, capsys, tmp_path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"sentence_good": "the cat", "sentence_bad": "the dog", **row}))
    assert message in refused(capsys, "--model", bert, "--pairs", file)


def test_a_paradigm_is_in_one_phenomenon(bert, capsys, tmp_path) -> None:
    """Part of its pairs may name none."""
    row = {"sentence_good": "the cat", "sentence_bad": "the dog", "UID": "u"}
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({**row, **more}) + "\n" for more in ({}, {"linguistics_term": "p"}, {})))
    result = measured(capsys, "--model", bert, "--pairs", file)
    assert result["paradigms"]["u"]["phenomenon"] == "p"
    assert result["phenomena"]["p"]["count"] == 3
    file.write_text("".join(json.dumps({**row, "linguistics_term": name}) + "\n" for name in "pq"))
    with pytest.raises(UserError, match="line 2 puts paradigm 'u' in linguistics_term 'q', an earlier line in 'p'"):
        read_pairs(file)


def test_a_link_to_nothing(bert, capsys, tmp_path) -> None:
    (tmp_path / "pairs.jsonl").symlink_to("none")
    message = refused(capsys, "--model", bert, "--pairs", tmp_path / "pairs.jsonl")
    assert "; it is a link to a path that does not exist; give a file" in message


def test_files_of_a_folder(tmp_path) -> None:
    names = [f"{name}.ndjson" for name in "gbecafd"]
    for name in names:
        write_pairs(tmp_path / name, [("a", "b")])
    assert [pair.paradigm for pair in read_pairs(tmp_path)] == list("abcdefg")


# --- outputs


def test_out_is_no_input(bert, capsys, tmp_path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    file = write_pairs(folder / "a.jsonl", [("the cat", "the dog")])
    (tmp_path / "link.jsonl").symlink_to(file)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat")
    other = tmp_path / "other.txt"
    other.write_text("the dog")
    before = {path: path.read_bytes() for path in (file, text, other)}
    for flag, value, out in (
        ("--pairs", file, file),
        ("--pairs", folder, tmp_path / "link.jsonl"),
        ("--pll", text, text),
        ("--pll", f"{text},{other}", other),
        ("--pll", tmp_path / "*.txt", text),
    ):
        assert f"--out {out} is an input" in refused(capsys, "--model", bert, flag, value, "--out", out)
    message = refused(capsys, "--model", bert, "--pairs", folder, "--out", folder / "scores.jsonl")
    assert f"would be read as minimal pairs the next time; choose a file outside {folder}" in message
    measured(capsys, "--model", bert, "--pairs", folder, "--out", folder / "scores.txt")
    assert {path: path.read_bytes() for path in before} == before
