"""Soft labels and weights in the files of custom tasks."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastbert.data.tokenizer import WordPiece
from fastbert.errors import UserError
from fastbert.finetuning.batches import encode
from fastbert.finetuning.custom import CustomTaskOptions
from fastbert.finetuning.kinds.classes import Classes
from fastbert.finetuning.model import TaskModel
from fastbert.finetuning.setup import identity
from fastbert.finetuning.stream import batch_of
from fastbert.finetuning.tasks import open_task
from fastbert.model.encoder import initialize
from tests.finetuning.conftest import WORDS, finetune, tiny_config, write_rows


def examples(path, rows, **options):
    write_rows(path / "train.jsonl", rows)
    settings = {"labels": "bad,good", "soft": "p", "kind": "classes"} | options
    return open_task("mine", custom=CustomTaskOptions(train=str(path / "train.jsonl"), **settings)).examples("train")


def test_a_list_has_the_order_of_the_labels_and_an_object_names_them(tmp_path) -> None:
    cells = [[0.25, 0.75], {"good": 0.75, "bad": 0.25}, {"good": 1}, [0.6003, 0.4]]
    rows = [{"text": "a", "p": cell, "w": weight} for cell, weight in zip(cells, (1, 0, 2.5, 1), strict=True)]
    found = examples(tmp_path, rows, weight="w")
    assert [e.soft_label for e in found[:3]] == [(0.25, 0.75), (0.25, 0.75), (0.0, 1.0)]
    assert sum(found[3].soft_label) == pytest.approx(1.0, abs=1e-12)
    assert [e.label for e in found] == [1, 1, 1, 0] and [e.weight for e in found] == [1.0, 0.0, 2.5, 1.0]


def test_a_csv_has_soft_labels_as_json_and_labels_remain_where_there_are_any(tmp_path) -> None:
    (tmp_path / "t.csv").write_text('text,label,p,w\na,bad,"[0.25, 0.75]",2\nb,,"{""bad"": 1.0}",1\n')
    options = CustomTaskOptions(train=str(tmp_path / "t.csv"), labels="bad,good", soft="p", weight="w")
    found = open_task("mine", custom=options).examples("train")
    assert [(e.label, e.soft_label, e.weight) for e in found] == [(0, (0.25, 0.75), 2.0), (0, (1.0, 0.0), 1.0)]


def test_a_soft_label_of_a_number_is_a_number(tmp_path) -> None:
    found = examples(tmp_path, [{"text": "a", "p": 1.5}, {"text": "b", "p": "2"}], kind="number", labels=None)
    assert [(e.label, e.soft_label) for e in found] == [(1.5, 1.5), (2.0, 2.0)]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"p": [0.5, 0.25, 0.25]}, "has 3 probabilities; give 2"),
        ({"p": [0.5, 0.502]}, "sums to 1.002"),
        ({"p": [1.5, -0.5]}, "0 or more"),
        ({"p": [0.5, "inf"]}, "finite"),
        ({"p": [True, 0]}, "finite"),
        ({"p": {"good": 0.5, "fine": 0.5}}, "unknown label 'fine'"),
        ({"p": 0.5}, "neither a list"),
        ({"p": "[0.5"}, "damaged"),
        ({"p": None}, "is missing"),
        ({}, "no column 'p'"),
        ({"p": [0, 1], "w": -1}, "number from 0 to"),
        ({"p": [0, 1], "w": None}, "number from 0 to 1e\\+30"),
        ({"p": [0, 1], "w": 1e308}, "number from 0 to 1e\\+30"),  # two of them have an infinite sum
        ({"p": [1e308, 1e308]}, "sums to inf"),
    ],
)
def test_invalid_soft_labels_and_weights_are_reported_with_their_line(tmp_path, row, words) -> None:
    good = {"text": "a", "p": [0, 1], "w": 1}
    with pytest.raises(UserError, match=f"train.jsonl, line 2.*{words}"):
        examples(tmp_path, [good, {"text": "b", "w": 1} | row], weight="w")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"soft": "p"}, "soft needs labels"),
        ({"soft": "text", "labels": "a,b"}, "soft and text are both"),
        ({"soft": "p", "weight": "p", "labels": "a,b"}, "weight and soft are both"),
        ({"soft": "p", "kind": "multi-label", "labels": "a,b"}, "does not fit kind multi-label"),
        ({"weight": "p", "kind": "tokens"}, "does not fit kind tokens"),
    ],
)
def test_columns_that_cannot_be_soft_labels_are_refused(options, words) -> None:
    with pytest.raises(UserError, match=words):
        CustomTaskOptions(**options).check()


def test_soft_labels_and_weights_define_the_experiment(tmp_path) -> None:
    example = examples(tmp_path, [{"text": "a", "p": [0.25, 0.75]}])[0]
    others = (replace(example, soft_label=(0.2, 0.8)), replace(example, weight=2.0), replace(example, soft_label=None))
    assert len({json.dumps(identity(one)) for one in (example, *others)}) == 4


def test_weights_and_soft_labels_in_closed_form(tmp_path) -> None:
    """The loss of a batch: the mean of w_i * -sum_c p_ic log q_ic, with weights of mean 1."""
    texts, soft, weights = ("the good", "bad", "a"), ([0.2, 0.8], [1, 0], [0.5, 0.5]), (3, 0, 6)
    rows = [{"text": t, "p": p, "w": w} for t, p, w in zip(texts, soft, weights, strict=True)]
    found = examples(tmp_path, rows, weight="w")
    kind = Classes(("bad", "good"))
    data = encode(found, WordPiece(WORDS), 30, kind.targets)
    batch = batch_of(data, np.arange(3), "mine")
    assert batch.row_weights.tolist() == [1.0, 0.0, 2.0]
    model = TaskModel(tiny_config(dropout=0.0, attention_dropout=0.0), {"mine": kind})
    initialize(model, 0, 0.1)
    logits = model(data.batch(batch.rows), ["mine"])[0].detach()
    losses = kind.losses(logits, torch.from_numpy(batch.soft_labels)) * torch.from_numpy(batch.row_weights)
    logs = logits.log_softmax(-1)
    first, last = -(0.2 * logs[0, 0] + 0.8 * logs[0, 1]), -(0.5 * logs[2]).sum()
    assert losses.mean().item() == pytest.approx(((first + 2 * last) / 3).item(), rel=1e-5)


def test_hard_labels_as_soft_labels_train_the_same_weights(tmp_path, bert, words) -> None:
    """Without a column of labels, and with equal weights other than 1."""
    train, dev = words[words.index("--custom.train") + 1], words[words.index("--custom.dev") + 1]
    rows = [json.loads(line) for line in Path(train).read_text().splitlines()][:48]
    write_rows(tmp_path / "hard.jsonl", rows)
    soft = [{"text": row["text"], "p": {row["label"]: 1.0}, "w": 3} for row in rows]
    write_rows(tmp_path / "soft.jsonl", soft)
    weights = {}
    for name, more in (("hard", []), ("soft", ["--custom.soft", "p", "--custom.weight", "w"])):
        task = ["--task", "words", "--custom.train", str(tmp_path / f"{name}.jsonl"), "--custom.dev", dev]
        out = tmp_path / name
        assert finetune(bert, [*task, "--custom.labels", "bad,good"], out, "--epochs", "1", *more) == 0
        weights[name] = load_file(out / "seed-0" / "model" / "model.safetensors")
    for key, value in weights["hard"].items():
        torch.testing.assert_close(weights["soft"][key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_weights_that_are_all_zero_are_refused(tmp_path, bert, words, capsys) -> None:
    write_rows(tmp_path / "t.jsonl", [{"text": "a", "label": label, "w": 0} for label in ("bad", "good")])
    dev = words[words.index("--custom.dev") + 1]
    task = ["--task", "words", "--custom.train", str(tmp_path / "t.jsonl"), "--custom.dev", dev]
    assert finetune(bert, [*task, "--custom.weight", "w"], tmp_path / "out") == 2
    assert "all weights of the 2 training examples are 0" in capsys.readouterr().err
