"""Tagging end to end: transformers' losses and predictions, entities that are learned, long texts, and the files."""

import json
import math
import random
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert.errors import UserError
from fastbert.finetuning.custom import CustomTaskOptions
from fastbert.finetuning.entities import entity_errors
from fastbert.finetuning.kinds.tokens import Tokens
from fastbert.finetuning.mixture_options import MixtureOptions
from fastbert.finetuning.model import TaskModel, new_task_model
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.saved import TaskRecord, load_encoder, load_task_model, save_task_model
from fastbert.finetuning.scoring import encode_inputs, predict_scores
from fastbert.finetuning.setup import describe_finetuning, prepare_finetuning
from fastbert.finetuning.task_heads import TokenHead
from fastbert.finetuning.tasks import open_task
from fastbert.finetuning.together import prepare_together
from fastbert.training.logbook import read_metrics
from fastbert.training.options import ScheduleOptions
from fastbert.training.world import ONE_PROCESS
from tests.finetuning.conftest import finetune, results, tiny_config
from tests.finetuning.transformers_epoch import losses_of_an_epoch
from tests.flags import main


def make_sentences(rng: random.Random, count: int, longest: int = 12) -> str:
    """`good` begins an entity of type x, which one `of` may continue, and `bads` one of type y, which one `to` may."""
    blocks = []
    for _ in range(count):
        lines = []
        for _ in range(rng.randint(2, longest)):
            word = rng.choice(["the", "a", "and", "in", "is", "good", "bads"])
            kind, inside = {"good": ("x", "of"), "bads": ("y", "to")}.get(word, (None, ""))
            lines.append(f"{word}\tB-{kind}" if kind else f"{word}\tO")
            lines += [f"{inside}\tI-{kind}"] * (rng.randint(0, 1) if kind else 0)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


@pytest.fixture(scope="module")
def tagging(tmp_path_factory) -> list[str]:
    folder, rng = tmp_path_factory.mktemp("tagging"), random.Random(0)
    flags = ["--task", "tagging", "--custom.kind", "tokens"]
    for split, count in (("train", 120), ("dev", 30)):
        (folder / f"{split}.conll").write_text(make_sentences(rng, count))
        flags += [f"--custom.{split}", str(folder / f"{split}.conll")]
    return flags


@pytest.fixture(scope="module")
def tuned(bert, tagging, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "out"
    assert finetune(bert, tagging, out, "--epochs", "8", "--seeds", "2") == 0
    return out


def test_losses_and_predictions_equal_transformers(bert, tagging, tmp_path) -> None:
    """Same weights and batches, no dropout: BertForTokenClassification with labels at first pieces."""
    from transformers import AutoModelForTokenClassification, get_linear_schedule_with_warmup

    exact = ("--dropout", "0", "--attention-dropout", "0", "--schedule.warmup", "0", "--weight-decay", "0")
    out = tmp_path / "out"
    assert finetune(bert, tagging, out, *exact, "--epochs", "1", "--log-every", "1") == 0
    rows = [json.loads(line) for line in (out / "seed-0" / "metrics.jsonl").read_text().splitlines()]
    ours = [row["loss"] for row in rows if row["split"] == "train"]

    task = open_task("tagging", custom=CustomTaskOptions(train=tagging[5], dev=tagging[7], kind="tokens"))
    first = new_task_model(
        load_encoder(bert), {"tagging": task.kind}, 0, dropout=0.0, attention_dropout=0.0, kernels="auto"
    )
    record = TaskRecord("tagging", task.kind, False, False, 30, 0, {})
    save_task_model(first, record, bert, tmp_path / "first")
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "first").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-6, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(ours))
    vocabulary = load_task_model(tmp_path / "first").vocabulary
    data = task.kind.encode(task.examples("train"), vocabulary, 30)
    theirs = losses_of_an_epoch(model, optimizer, schedule, data)
    assert len(ours) == 8 and max(theirs) - min(theirs) > 0.3
    assert ours == pytest.approx(theirs, abs=1e-5)

    tuned = AutoModelForTokenClassification.from_pretrained(out / "seed-0" / "model").eval()
    assert tuned.config.id2label == {0: "O", 1: "B-x", 2: "I-x", 3: "B-y", 4: "I-y"}
    ours = load_task_model(out / "seed-0")
    inputs = encode_inputs(task.examples("dev"), ours.vocabulary, ours.record)
    scores = predict_scores(ours.model, "tagging", inputs, precision="fp32", batch_size=7)
    batch = inputs.orders[0].batch(np.arange(30))
    with torch.no_grad():
        logits = tuned(batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    assert scores == pytest.approx(logits[batch.scored].softmax(-1).numpy(), abs=2e-6)


def test_entities_are_learned_by_every_seed_with_a_table_of_types(tuned, capsys) -> None:
    (part,) = results(tuned)["fractions"]
    for seed in part["seeds"]:
        assert seed["best"]["dev"]["dev"]["entity_f1"] > 0.9
        assert list(seed["by_label"]["dev"]) == ["x", "y"]
        assert min(row["f1"] for row in seed["by_label"]["dev"].values()) > 0.8
    assert set(part["summary"]["best"]["dev"]) == {
        *("entity_f1", "entity_precision", "entity_recall", "accuracy", "loss")
    }


def test_predictions_can_be_read_as_training_data(tuned, tagging, tmp_path) -> None:
    predict = ["predict", "--model", str(tuned), *tagging, "--machine.precision", "fp32"]
    predict[2] = str(tuned / "seed-0")
    for name in ("found.conll", "found.jsonl", "found.tsv"):
        assert main([*predict, "--out", str(tmp_path / name)]) == 0
    read = [
        open_task("again", custom=CustomTaskOptions(train=str(tmp_path / name), kind="tokens", **more)).examples(
            "train"
        )
        for name, more in (
            ("found.conll", {}),
            ("found.tsv", {}),
            ("found.jsonl", {}),
            ("found.jsonl", {"text": "text", "label": "spans"}),
        )
    ]
    assert read[0] == read[1] == read[2] == read[3]
    gold = open_task("gold", custom=CustomTaskOptions(train=tagging[7], kind="tokens")).examples("train")
    assert [e.text for e in read[0]] == [e.text for e in gold]
    assert np.mean([a.label == b.label for a, b in zip(read[0], gold, strict=True)]) > 0.7
    rows = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    spans = [(row, span) for row in rows for span in row["spans"]]
    assert len(spans) > 20 and all(row["text"][s["start"] : s["end"]] == s["text"] for row, s in spans)
    assert all(0.2 <= span["score"] <= 1 for _, span in spans)


def test_new_text_with_no_tags_as_text_tokens_or_columns(tuned, tmp_path, capsys) -> None:
    model = ["predict", "--model", str(tuned / "seed-0"), "--machine.precision", "fp32"]
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "the good of  and bads"}) + "\n")
    (tmp_path / "tokens.jsonl").write_text(json.dumps({"tokens": ["the", "good", "of", "and", "bads"]}) + "\n")
    (tmp_path / "words.conll").write_text("the\ngood\nof\nand\nbads\n")
    (tmp_path / "table.csv").write_text("id,text\n1,the good of  and bads\n")
    found = {}
    for name in ("text.jsonl", "tokens.jsonl", "words.conll", "table.csv"):
        assert main([*model, "--source", str(tmp_path / name), "--out", str(tmp_path / "o.jsonl")]) == 0
        (found[name],) = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    tags = [row["tags"] for row in found.values()]
    assert tags[0] == tags[1] == tags[2] == tags[3] == ["O", "B-x", "I-x", "O", "B-y"]
    assert found["text.jsonl"]["spans"][0]["text"] == "good of"
    assert found["text.jsonl"]["text"] == "the good of  and bads"


def test_a_long_text_is_read_in_windows_and_none_of_its_words_is_lost(tuned, tmp_path) -> None:
    ours = load_task_model(tuned / "seed-0")
    lines = [line for line in make_sentences(random.Random(3), 30).splitlines() if line]
    path = tmp_path / "x.conll"
    path.write_text("\n".join(lines))
    task = open_task("x", custom=CustomTaskOptions(train=str(path), kind="tokens", labels="O,B-x,I-x,B-y,I-y"))
    examples = task.examples("train")
    record = TaskRecord("tagging", ours.record.kind, False, False, 16, 0, {})
    inputs = encode_inputs(examples, ours.vocabulary, record)
    assert len(inputs.orders[0]) > 10 and len(examples) == 1
    scores = predict_scores(ours.model, "tagging", inputs, precision="fp32", batch_size=4)
    assert len(scores) == len(lines)
    assert task.measure(scores, inputs.labels)["entity_f1"] > 0.8


def test_errors_are_listed(tuned) -> None:
    rows = [json.loads(line) for line in (tuned / "seed-0" / "errors.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == sorted((row["loss"] for row in rows), reverse=True)
    for row in rows:
        right = [{k: v for k, v in span.items() if k != "score"} for span in row["spans"]] == row["expected"]
        assert right == (not row["errors"])


def test_classes_of_errors() -> None:
    def span(start: int, end: int, label: str = "x") -> dict:
        return {"start": start, "end": end, "label": label, "text": "-"}

    expected = [span(0, 2), span(5, 9), span(10, 12), span(20, 25), span(30, 31)]
    found = [span(0, 2), span(6, 9), span(10, 12, "y"), span(21, 25, "y"), span(40, 41)]
    errors = entity_errors(found, expected)
    assert [error["error"] for error in errors] == ["boundary", "type", "type and boundary", "missed", "spurious"]
    assert errors[0] == {"error": "boundary", "expected": expected[1], "found": found[1]}
    assert errors[3] == {"error": "missed", "expected": expected[4]}


def test_micro_batches_do_not_change_the_loss(bert, tagging, tmp_path) -> None:
    """The mean is over the words of the batch, not of the micro-batches, which hold different numbers of them."""
    losses = []
    for name, more in (("whole", ()), ("parts", ("--machine.micro-batch-size", "5"))):
        out = tmp_path / name
        assert finetune(bert, tagging, out, "--epochs", "1", "--log-every", "1", "--no-save-model", *more) == 0
        rows = [json.loads(line) for line in (out / "seed-0" / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if row["split"] == "train"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_windows_are_the_rows_that_are_trained_on(bert, tagging, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert finetune(bert, tagging, out, "--epochs", "2", "--no-save-model", "--max-length", "10") == 0
    printed = re.search(r"120 examples in (\d+) windows, (\d+) steps", capsys.readouterr().err)
    windows, steps = map(int, printed.groups())
    assert windows > 130 and steps == 2 * math.ceil(windows / 16)
    assert read_metrics(out / "seed-0" / "metrics.jsonl")[-1]["step"] == steps


def test_an_experiment_is_its_tokens_and_not_only_their_text(bert, tmp_path) -> None:
    found = set()
    for name, tokens in (("one", ["a b", "good"]), ("two", ["a", "b good"])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({"tokens": tokens, "tags": ["O", "B-x"]}) + "\n")
        own = CustomTaskOptions(train=str(path), dev=str(path), kind="tokens")
        options = FinetuneOptions(model=str(bert), task="t", out=str(tmp_path / "out"), custom=own)
        found.add(describe_finetuning(prepare_finetuning(options))["data"])
    assert len(found) == 2


def test_dropout_of_the_head_is_a_function_of_row_and_token() -> None:
    head, hidden = TokenHead(32, 5, 0.5), torch.randn(2, 6, 32)
    keys = torch.tensor([1, 2], dtype=torch.int32)
    there, again = head(hidden, keys), head(hidden, keys)
    assert torch.equal(there, again) and not torch.equal(there, head(hidden, None))
    assert torch.equal(there[1:, :3], head(hidden[1:, :3], keys[1:]))
    ones = head(torch.ones(2, 6, 32), keys)
    assert not torch.equal(ones[0, 0], ones[0, 1]) and not torch.equal(ones[0, 0], ones[1, 0])
    assert TaskModel(tiny_config(), {"t": Tokens(("O", "B-x", "I-x"))}).head("t").reads is None


def test_a_model_of_texts_writes_no_columns(bert, words, tmp_path, capsys) -> None:
    assert finetune(bert, words, tmp_path / "out", "--epochs", "1") == 0
    model = str(tmp_path / "out" / "seed-0")
    assert main(["predict", "--model", model, "--source", words[5], "--out", str(tmp_path / "a.conll")]) == 2
    assert "does not label words; write .jsonl" in capsys.readouterr().err


def test_the_warm_up_is_compared_with_the_steps_on_windows(bert, tmp_path) -> None:
    """Two texts of three windows each are two batches of three."""
    long = "\n".join(f"{'good' if number % 7 else 'bads'}\tB-x" for number in range(60))
    (tmp_path / "train.conll").write_text(f"{long}\n\n{long}\n")
    (tmp_path / "task.yaml").write_text(f"kind: tokens\ntrain: {tmp_path}/train.conll\ndev: {tmp_path}/train.conll\n")
    given = {"model": str(bert), "epochs": 1, "batch_size": 3, "task": str(tmp_path / "task.yaml")}
    given["out"] = str(tmp_path / "out")
    for warmup, expected in ((2.0, nullcontext()), (3.0, pytest.raises(UserError, match="does not fit a run of 2;"))):
        options = FinetuneOptions(**given, schedule=ScheduleOptions(warmup=warmup))
        with expected:
            prepare_finetuning(options)
        with expected:
            prepare_together(replace(options, mixture=MixtureOptions(together=True)), ONE_PROCESS)
