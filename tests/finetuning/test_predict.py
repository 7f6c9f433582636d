"""Predictions for new text: the same scores as on dev, as in transformers, and for either order of a pair."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert.data.tokenizer import SPECIAL_TOKENS, WordPiece
from fastbert.finetuning.kinds.classes import Classes
from fastbert.finetuning.model import TaskModel
from fastbert.finetuning.rows import Example
from fastbert.finetuning.saved import TaskRecord, load_task_model, save_task_model
from fastbert.finetuning.scoring import encode_inputs, predict_scores
from tests.finetuning.conftest import FAST, tiny_config, write_rows
from tests.flags import main
from tests.processes import reading

PRECISE = ("--machine.precision", "fp32", "--machine.threads", "1")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def tuned(request, bert, tupe, words, pairs, numbers, tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("tuned")
    for name, model, task in (("words", bert, words), ("pairs", tupe, pairs), ("numbers", bert, numbers)):
        more = ["--symmetric"] if name == "pairs" else []
        assert main(["finetune", "--model", str(model), *task, *FAST, *more, "--out", str(out / name)]) == 0
    return {name: out / name / "seed-0" for name in ("words", "pairs", "numbers")}


@pytest.mark.parametrize("name", ["words", "pairs", "numbers"])
def test_predictions_on_dev_equal_training(name, tuned, words, pairs, numbers, tmp_path, capsys) -> None:
    task = {"words": words, "pairs": pairs, "numbers": numbers}[name]
    capsys.readouterr()
    out = tmp_path / "dev.jsonl"
    assert main(["predict", "--model", str(tuned[name]), *task, "--out", str(out), *PRECISE]) == 0
    best = json.loads((tuned[name] / "result.json").read_text())["best"]["dev"]["dev"]
    printed = capsys.readouterr().out
    for metric, value in best.items():
        if metric != "loss":
            assert f"{metric} {value:.4f}" in printed
    rows, errors = lines(out), lines(tuned[name] / "errors.jsonl")
    assert [row["index"] for row in rows] == list(range(60))
    assert len(errors) == 50 and errors == sorted(errors, key=lambda row: -row["loss"])
    for error in errors:  # bit for bit
        row = rows[error["index"]]
        assert all(error[key] == row[key] for key in row)


@pytest.mark.parametrize("name", ["words", "numbers"])
def test_transformers_opens_a_native_model_and_agrees(name, tuned, tmp_path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tuned[name] / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert type(model).__name__ == "BertForSequenceClassification"
    texts = ["the good of", "he was bad at it", "not good, not bad"]
    inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    tuned_model = load_task_model(folder)
    examples = [Example(i, text, None, None) for i, text in enumerate(texts)]
    inputs = encode_inputs(examples, tuned_model.vocabulary, tuned_model.record)
    ours = predict_scores(tuned_model.model, name, inputs, precision="fp32")
    theirs = logits[:, 0] if name == "numbers" else logits.softmax(-1)
    assert np.abs(ours - theirs.numpy()).max() < 1e-5
    expected = {0: "score"} if name == "numbers" else {0: "bad", 1: "good"}
    assert model.config.id2label == expected
    assert model.config.problem_type == ("regression" if name == "numbers" else "single_label_classification")


def test_a_cased_model_predicts_the_same_in_transformers(tmp_path) -> None:
    """A BERT with only a cased tokenizer.json: 40 of 40 predictions on texts whose label depends on the case. A text
    that is longer than the training length is truncated."""
    from transformers import AutoTokenizer, pipeline

    words = (*SPECIAL_TOKENS, *(word for n in range(20) for word in (f"word{n}", f"Word{n}")))
    config = tiny_config(vocab_size=len(words))
    source = tmp_path / "in"
    cased = WordPiece(words, lowercase=False)
    cased.save(source)
    (source / "tokenizer_config.json").unlink()
    (source / "vocab.txt").unlink()
    record = TaskRecord("words", Classes(("bad", "good")), False, False, 12, 0, {})
    inputs = encode_inputs([Example(n, word, None, None) for n, word in enumerate(words[5:])], cased, record)
    model = TaskModel(config, {"words": record.kind})
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    scores = predict_scores(model, "words", inputs, precision="fp32")
    with torch.no_grad():  # each class is predicted for half of the words
        model.head("words").classifier.bias[1] -= float(np.median(np.log(scores[:, 1] / scores[:, 0])))
    ours = predict_scores(model, "words", inputs, precision="fp32").argmax(1)
    assert ours.sum() == 20 and (ours[::2] != ours[1::2]).sum() > 5
    save_task_model(model, record, source, tmp_path / "out")
    classify = pipeline("text-classification", model=str(tmp_path / "out"), device="cpu")
    theirs = [record.kind.labels.index(found["label"]) for found in classify(list(words[5:]))]
    assert len(theirs) == 40 and theirs == ours.tolist()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 12
    assert classify("word1 " * 60, truncation=True)[0]["label"] in record.kind.labels


def test_transformers_opens_an_export_with_code_without_fastbert(tuned, tmp_path) -> None:
    script = """
import sys, torch
sys.modules["fastbert"] = sys.modules["fastbert_kernels"] = None
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(["the good of"], ["bad she"], return_tensors="pt")
with torch.no_grad():
    print(model.config.id2label[0], *model(**inputs).logits.softmax(-1)[0].tolist())
"""
    folder = tuned["pairs"] / "model"
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    label, *probabilities = done.stdout.split()
    ours = load_task_model(folder)
    inputs = encode_inputs([Example(0, "the good of", "bad she", None)], ours.vocabulary, ours.record)
    inputs = type(inputs)(inputs.examples, inputs.orders[:1])
    values = predict_scores(ours.model, ours.record.task, inputs, precision="fp32")[0]
    assert label == ours.record.kind.labels[0] == "different"
    assert np.abs(values - np.array(probabilities, dtype=float)).max() < 1e-5


def test_both_orders_give_the_mean_and_do_not_depend_on_the_order(tuned) -> None:
    ours = load_task_model(tuned["pairs"])
    assert ours.record.both_orders
    there, back = (Example(0, "the good of", "bad she", None), Example(0, "bad she", "the good of", None))
    values = {}
    for name, example in (("there", there), ("back", back)):
        inputs = encode_inputs([example], ours.vocabulary, ours.record)
        assert len(inputs.orders) == 2
        values[name] = predict_scores(ours.model, ours.record.task, inputs, precision="fp32")
        single = [type(inputs)(inputs.examples, (order,)) for order in inputs.orders]
        each = [predict_scores(ours.model, ours.record.task, one, precision="fp32") for one in single]
        assert np.allclose(values[name], (each[0] + each[1]) / 2, atol=1e-12)
        assert np.abs(each[0] - each[1]).max() > 1e-4
    assert np.allclose(values["there"], values["back"], atol=1e-12)


def test_padding_and_batches_change_rounding_only(tuned, pairs) -> None:
    ours = load_task_model(tuned["words"])
    texts = ["good", "the " * 25 + "bad", "he was good at it", "bad bad", "a"]
    examples = [Example(i, text, None, None) for i, text in enumerate(texts)]
    inputs = encode_inputs(examples, ours.vocabulary, ours.record)
    together, alone = (
        predict_scores(ours.model, ours.record.task, inputs, precision="fp32", batch_size=size) for size in (5, 1)
    )
    assert np.abs(together - alone).max() < 1e-6
    assert together.sum(1) == pytest.approx(np.ones(5), abs=1e-12)


def test_new_text(tuned, tmp_path, capsys) -> None:
    source, out = tmp_path / "new.jsonl", tmp_path / "out.jsonl"
    write_rows(source, [{"text": "he was good\u2028at it"}, {"text": "the " * 40 + "bad"}])
    command = ["predict", "--model", str(tuned["words"] / "model"), "--source", str(source), "--out", str(out)]
    assert main([*command, *PRECISE]) == 0
    first, second = lines(out)
    assert first["label"] == "good" and sum(first["probabilities"].values()) == pytest.approx(1.0)
    assert set(second["probabilities"]) == {"bad", "good"}
    assert "1 inputs were cut to 30 tokens" in capsys.readouterr().err
    command[2] = str(tuned["numbers"])
    assert main([*command, *PRECISE]) == 0
    assert set(lines(out)[0]) == {"index", "value"}


def test_refusals(tuned, bert, words, pairs, tmp_path, capsys) -> None:
    source = tmp_path / "new.jsonl"
    write_rows(source, [{"text": "good"}])
    out = ["--out", str(tmp_path / "out.jsonl")]

    def refuses(arguments: list[str], message: str) -> None:
        assert main(["predict", *arguments, *out]) == 2
        printed = capsys.readouterr().err
        assert message in printed, printed

    refuses(["--model", str(bert), "--source", str(source)], "is not a fine-tuned model: there is no task.json")
    refuses(["--model", str(tuned["words"])], "give one of --task and --source")
    refuses(["--model", str(tuned["pairs"]), "--source", str(source)], "has no column 'pair'")
    refuses(["--model", str(tuned["words"]), "--source", str(tmp_path / "no.jsonl")], "does not exist")
    refuses(["--model", str(tuned["words"]), *pairs], "was trained on words and does not fit the task pairs")
    swapped_labels = [*words, "--custom.labels", "good,bad"]
    refuses(
        ["--model", str(tuned["words"]), *swapped_labels],
        "words, which has the labels ('good', 'bad'), the model ('bad',",
    )
    refuses(["--model", str(tuned["words"]), *words, "--split", "tets"], "unknown split 'tets'; known: dev, train")
    (tmp_path / "empty.jsonl").write_text("")
    refuses(["--model", str(tuned["words"]), "--source", str(tmp_path / "empty.jsonl")], "holds no text")
    words_model = ["--model", str(tuned["words"]), "--source", str(source)]
    assert main(["predict", *words_model, "--out", str(tmp_path)]) == 2
    assert "is a folder; give --out a file in it" in capsys.readouterr().err
    weights = next(Path(tuned["words"]).rglob("model.safetensors"))
    train = Path(words[words.index("--custom.train") + 1])
    for what, read in ((words_model[2:], source), (words, train), (words_model[2:], weights)):
        before = read.read_bytes()
        assert main(["predict", *words_model[:2], *what, "--out", str(read)]) == 2
        assert f"{read} is an input of this command" in capsys.readouterr().err
        assert read.read_bytes() == before
    for name in ("a.jsonl.gz", "a.parquet"):
        assert main(["predict", *words_model, "--out", str(tmp_path / name)]) == 2
        assert f"{name}: predictions are JSON lines or CoNLL columns, not compressed" in capsys.readouterr().err
    write_rows(tmp_path / "same.jsonl", [{"text": "good", "label": "good"}] * 3)
    same = [*words[:4], "--custom.dev", str(tmp_path / "same.jsonl"), "--custom.metrics", "auc"]
    refuses(["--model", str(tuned["words"]), *same], "AUC needs examples of both labels, and all 3 have the same")
    assert not (tmp_path / "out.jsonl").exists()


def swap_tokens(folder: Path) -> None:
    """The same size, other tokens."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    ids = content["model"]["vocab"]
    ids["good"], ids["bad"] = ids["bad"], ids["good"]
    path.write_text(json.dumps(content))


def test_another_tokenizer_and_damaged_records_are_refused(tuned, words, tmp_path, capsys) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(tuned["words"] / "model", tmp_path / name))

    def refuses(message: str, *arguments: object) -> None:
        assert main([*map(str, arguments), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    swapped = copy("swapped")
    swap_tokens(swapped)
    refuses(
        "has another tokenizer than the one with which its model was trained", "predict", "--model", swapped, *words
    )
    refuses(
        "has another tokenizer than the one with which its model was trained",
        "finetune",
        "--init-from",
        swapped,
        *words,
    )
    for content in ("[1]", "{}", '{"labels": 3}'):
        damaged = copy("damaged")
        (damaged / "task.json").write_text(content)
        refuses("task.json is damaged", "predict", "--model", damaged, *words)
        shutil.rmtree(damaged)
    for change, message in (
        ({"labels": ["bad"]}, "a task has at least 2 labels"),
        ({"kind": "clases"}, "task.json 'clases'; did you mean 'classes'"),
        ({"seed": 7}, "task.json was changed since it was written (seed: 0 -> 7)"),
    ):
        damaged = copy("damaged")
        facts = json.loads((damaged / "task.json").read_text()) | change
        (damaged / "task.json").write_text(json.dumps(facts))
        refuses(message, "predict", "--model", damaged, *words)
        shutil.rmtree(damaged)
    old = copy("old")  # models of before the tokenizer was recorded
    facts = json.loads((old / "task.json").read_text())
    del facts["tokenizer"]
    (old / "task.json").write_text(json.dumps(facts))
    assert load_task_model(old).record == load_task_model(tuned["words"]).record


def test_links_fifos_and_standard_output(tuned, words, tmp_path, capfd) -> None:
    """They remain what they are; standard output has only predictions."""

    def predicted(out: Path | str) -> str:
        capfd.readouterr()
        assert main(["predict", "--model", str(tuned["words"]), *words, "--out", str(out), *PRECISE]) == 0
        return capfd.readouterr().out

    printed = predicted(tmp_path / "file")
    assert "accuracy" in printed
    expected = (tmp_path / "file").read_text()
    link, target, fifo = tmp_path / "link", tmp_path / "target", tmp_path / "fifo"
    target.write_text("old")
    link.symlink_to(target)
    predicted(link)
    assert link.is_symlink() and target.read_text() == expected
    with reading(fifo) as got:
        predicted(fifo)
    assert got == [expected.encode()] and fifo.is_fifo()
    assert predicted("/dev/fd/1") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link", "target", "fifo"}


def test_an_impossible_output_is_refused_before_work(tuned, words, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("fastbert.finetuning.ensemble.load_task_model", None)
    (tmp_path / "file").touch()
    for out, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "x", "is a file"), ("x" * 300, "too long")):
        assert main(["predict", "--model", str(tuned["words"]), *words, "--out", str(out), *PRECISE]) == 2
        assert message in capsys.readouterr().err
