"""A kind of task is one file and one line: a toy kind is trained, predicted with and exported."""

import json
import random

import numpy as np
import torch

from fastbert.finetuning.predict import encode_inputs, predict_scores
from fastbert.finetuning.saved import load_task_model
from fastbert.finetuning.tasks import Example
from tests.finetuning import toy_kind
from tests.finetuning.conftest import finetune, results, sentence, write_rows
from tests.flags import main


def test_a_toy_kind_trains_predicts_and_exports(bert, tmp_path, capsys) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    toy_kind.register()
    rng = random.Random(0)
    for split, count in (("train", 64), ("dev", 24)):
        labels = [rng.choice((1, 3)) for _ in range(count)]
        rows = [{"text": sentence(rng, {1: "bad", 3: "good"}[n], 5), "label": "*" * n} for n in labels]
        write_rows(tmp_path / f"{split}.jsonl", rows)
    files = ["--own.train", str(tmp_path / "train.jsonl"), "--own.dev", str(tmp_path / "dev.jsonl")]
    task = ["--task", "reviews", *files, "--own.kind", "stars"]
    assert finetune(bert, task, tmp_path / "out", "--epochs", "4", "--worst", "2") == 0
    (seed,) = results(tmp_path / "out")["fractions"][0]["seeds"]
    assert seed["best"]["dev"]["dev"]["spearman"] > 0.8 and set(seed["best"]["dev"]["dev"]) == {"spearman", "loss"}
    worst = [json.loads(line) for line in (tmp_path / "out" / "seed-0" / "errors.jsonl").read_text().splitlines()]
    assert len(worst) == 2 and {row["expected"] for row in worst} <= {"*", "***"} and set(worst[0]["stars"]) == {"*"}

    folder = tmp_path / "out" / "seed-0" / "model"
    facts = json.loads((folder / "task.json").read_text())
    assert facts["kind"] == "stars" and facts["labels"] == []
    predict = ["predict", "--model", str(folder), *task, "--machine.precision", "fp32"]
    assert main([*predict, "--out", str(tmp_path / "answers.jsonl")]) == 0
    answers = [json.loads(line)["stars"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    ours = load_task_model(folder)
    texts = [json.loads(line)["text"] for line in (tmp_path / "dev.jsonl").read_text().splitlines()]
    inputs = encode_inputs([Example(n, text, None, None) for n, text in enumerate(texts)], ours.vocabulary, ours.record)
    scores = predict_scores(ours.model, "reviews", inputs, precision="fp32")
    assert answers == [ours.record.kind.prediction(score) for score in scores]

    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert np.abs(scores - theirs(**batch).logits[:, 0].numpy()).max() < 1e-5

    capsys.readouterr()
    wrong = ["--task", "reviews", *files, "--own.kind", "stars", "--own.metrics", "accuracy"]
    assert finetune(bert, wrong, tmp_path / "wrong") == 2
    assert "accuracy does not fit labels that are stars; give one of: spearman" in capsys.readouterr().err
