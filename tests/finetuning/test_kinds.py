"""A kind of task is one file and one line: the one in docs/extending.md trains, predicts and is exported."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastbert.data.tokenizer import WordPiece
from fastbert.finetuning.batches import encode
from fastbert.finetuning.kinds import KINDS
from fastbert.finetuning.kinds.classes import Classes
from fastbert.finetuning.kinds.multi_label import MultiLabel
from fastbert.finetuning.kinds.number import Number
from fastbert.finetuning.model import TaskModel
from fastbert.finetuning.rows import Example
from fastbert.finetuning.saved import load_task_model
from fastbert.finetuning.scoring import encode_inputs, predict_scores
from fastbert.registry import Variant
from tests.finetuning.conftest import WORDS, finetune, results, sentence, tiny_config, write_rows
from tests.flags import main
from tests.test_extending import example


@pytest.fixture
def ordinal(tmp_path, monkeypatch) -> type[Classes]:
    """The kind of docs/extending.md, registered."""
    (tmp_path / "toy_ordinal.py").write_text(example("fastbert/finetuning/kinds/ordinal.py"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(KINDS.lines, "ordinal", Variant("toy_ordinal:Ordinal"))
    return KINDS["ordinal"]


def make_ratings(folder: Path) -> list[str]:
    """Flags of a task: which of three words is in a text?"""
    rng, flags = random.Random(0), ["--task", "ratings", "--custom.kind", "ordinal"]
    for split, count in (("train", 160), ("dev", 24)):
        stars = [rng.randint(0, 2) for _ in range(count)]
        texts = [sentence(rng, ("bad", "had", "good")[n], 3) for n in stars]
        write_rows(folder / f"{split}.jsonl", [{"text": t, "label": n} for t, n in zip(texts, stars, strict=True)])
        flags += [f"--custom.{split}", str(folder / f"{split}.jsonl")]
    return flags


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_new_kind_trains_predicts_and_is_exported(ordinal, bert, tmp_path, capsys) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    task = make_ratings(tmp_path)
    assert finetune(bert, task, tmp_path / "out", "--epochs", "4", "--worst", "2") == 0
    (seed,) = results(tmp_path / "out")["fractions"][0]["seeds"]
    assert seed["best"]["dev"]["dev"]["spearman"] > 0.7
    assert set(seed["best"]["dev"]["dev"]) == {"spearman", "accuracy", "loss"}
    worst = read_lines(tmp_path / "out" / "seed-0" / "errors.jsonl")
    assert len(worst) == 2 and all({row["expected"], row["label"]} <= {"0", "1", "2"} for row in worst)
    folder = tmp_path / "out" / "seed-0" / "model"
    facts = json.loads((folder / "task.json").read_text())
    assert (facts["kind"], facts["labels"]) == ("ordinal", ["0", "1", "2"])

    predict = ["predict", "--model", str(folder), *task, "--machine.precision", "fp32"]
    assert main([*predict, "--out", str(tmp_path / "answers.jsonl")]) == 0
    answers = [list(row["probabilities"].values()) for row in read_lines(tmp_path / "answers.jsonl")]
    texts = [row["text"] for row in read_lines(tmp_path / "dev.jsonl")]
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert theirs.config.id2label == {0: "> 0", 1: "> 1"}
    with torch.no_grad():
        logits = theirs(**AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")).logits
    above = logits.sigmoid().numpy()
    assert np.abs(np.array(answers)[:, 0] - (1 - above[:, 0])).max() < 1e-5
    assert np.array(answers).sum(1) == pytest.approx(np.ones(24))

    ours = load_task_model(folder)
    inputs = encode_inputs([Example(0, texts[0], None, None)], ours.vocabulary, ours.record)
    assert predict_scores(ours.model, "ratings", inputs, precision="fp32")[0] == pytest.approx(answers[0], abs=1e-6)
    capsys.readouterr()
    assert finetune(bert, [*task, "--custom.metrics", "pearson"], tmp_path / "wrong") == 2
    assert "pearson does not fit labels that are ordered labels; give one of: accuracy" in capsys.readouterr().err


def test_the_example_has_the_loss_of_its_thresholds_for_labels_and_soft_labels(ordinal) -> None:
    kind, logits = ordinal(("0", "1", "2")), torch.tensor([[0.3, -1.0], [2.0, 0.5]])
    sure = -torch.nn.functional.logsigmoid(torch.tensor([[0.3, 1.0], [2.0, 0.5]])).sum(-1)  # above 0 and not 1; above 1
    torch.testing.assert_close(kind.losses(logits, torch.tensor([1, 2])), sure)
    torch.testing.assert_close(kind.losses(logits, torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])), sure)


@pytest.mark.parametrize(
    ("kind", "labels", "outputs"),
    [
        (Classes(("a", "b", "c")), [2, 0, 1], 3),
        (Number(), [0.5, -2.0, 3.25], 1),
        (MultiLabel(("a", "b", "c", "d")), [(0, 2), (), (3,)], 4),
    ],
)
def test_the_loss_of_scores_equals_the_loss_of_logits(kind, labels, outputs) -> None:
    """On dev the loss is computed from averaged scores; a model that is always right has none."""
    logits = torch.randn(3, outputs, dtype=torch.float64)
    expected = kind.losses(logits, torch.from_numpy(kind.targets(labels)))
    scores = kind.scores(logits).numpy()
    assert scores.shape == (3, *kind.score_shape()) == kind.ideal_scores(labels).shape
    assert kind.score_losses(scores, labels) == pytest.approx(expected.numpy())
    assert kind.score_losses(kind.ideal_scores(labels), labels) == pytest.approx(np.zeros(3))


class Mean(nn.Module):
    """A head that reads all tokens."""

    reads = None

    def forward(self, hidden, row_keys):
        return hidden.mean(1)[:, :2]


class OfAllTokens(Classes):
    def new_head(self, width, dropout):
        return Mean()


def test_a_head_gets_the_hidden_states_that_it_reads() -> None:
    model = TaskModel(tiny_config(), {"whole": OfAllTokens(("a", "b"))})
    batch = encode([Example(0, "the good of it", None, 1)], WordPiece(WORDS), 30, model.kinds["whole"].targets).batch(
        np.zeros(1, int)
    )
    hidden = model.encoder(batch.input_ids, attention_mask=batch.attention_mask)
    assert hidden.shape == (1, 6, 32)
    torch.testing.assert_close(model(batch, ["whole"])[0], hidden.mean(1)[:, :2])
