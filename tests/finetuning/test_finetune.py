"""`fastbert finetune`: the losses of transformers, tasks that are learned, equal bits, interrupted seeds, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.finetuning import task_heads
from fastbert.finetuning.batches import TaskBatch, encode, sample_orders, training_order
from fastbert.finetuning.custom import CustomTaskOptions
from fastbert.finetuning.kinds.classes import Classes
from fastbert.finetuning.loop import build_scaled_optimizer
from fastbert.finetuning.model import TaskModel, new_task_model
from fastbert.finetuning.saved import TaskRecord, load_encoder, save_task_model
from fastbert.finetuning.scoring import encode_inputs
from fastbert.finetuning.tasks import open_task
from fastbert.randomness import row_keys
from fastbert.training.optimizers import guarded_step
from fastbert.training.options import OptimizerOptions
from tests.finetuning.conftest import FAST, finetune, make_task, results, tiny_config, tiny_model, write_rows
from tests.flags import last_given, main

pytestmark = pytest.mark.figures

CPU = torch.device("cpu")
KIND = {"words": Classes(("bad", "good"))}


def records(folder: Path, split: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


@pytest.mark.parametrize("kind", ["pairs", "numbers"])
def test_losses_equal_transformers(kind, bert, pairs, numbers, tmp_path) -> None:
    """Same weights, same batches, no dropout: BertForSequenceClassification, torch's AdamW and a linear schedule."""
    from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup

    task_flags = pairs if kind == "pairs" else numbers
    exact = ("--dropout", "0", "--attention-dropout", "0", "--schedule.warmup", "0", "--eps", "1e-8")
    more = ("--epochs", "2", "--learning-rate", "1e-3", "--log-every", "1")
    out = tmp_path / "out"
    assert finetune(bert, task_flags, out, *exact, *more) == 0
    logged = records(out / "seed-0", "train")
    ours = [row["loss"] for row in logged]
    assert len(ours) == 20

    pair = "pair" if kind == "pairs" else None
    own = CustomTaskOptions(train=task_flags[3], dev=task_flags[5], pair=pair, kind="classes" if pair else "number")
    task = open_task(kind, custom=own)
    pretrained = load_encoder(bert)
    first = new_task_model(pretrained, {kind: task.kind}, 0, dropout=0.0, attention_dropout=0.0, kernels="auto")
    record = TaskRecord(kind, task.kind, task.is_pair, False, 30, 0, {})
    save_task_model(first, record, pretrained.tokenizer, tmp_path / "first")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first").train()
    norms = [p for name, p in model.named_parameters() if name.endswith("bias") or "LayerNorm" in name]
    others = [p for p in model.parameters() if not any(p is norm for norm in norms)]
    groups = [{"params": others, "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-8, fused=False)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 20)
    data = encode(task.examples("train"), load_tokenizer(pretrained.tokenizer), 30, task.kind.targets)
    theirs, rates = [], []
    for epoch in range(2):
        for rows in training_order(data.lengths, 16, 0, epoch):
            batch = data.batch(rows)
            inputs = {"attention_mask": batch.attention_mask.long(), "labels": batch.labels}
            if batch.token_type_ids is not None:
                inputs["token_type_ids"] = batch.token_type_ids
            loss = model(batch.input_ids, **inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rates += schedule.get_last_lr()[:1]
            schedule.step()
            optimizer.zero_grad()
            theirs.append(loss.item())
    assert np.abs(np.array(ours) - np.array(theirs)).max() < 1e-5
    assert max(theirs) - min(theirs) > 0.05
    assert [row["lr"] for row in logged] == pytest.approx(rates)


def test_learns_words_with_several_seeds(bert, words, tmp_path, capsys, works) -> None:
    out = tmp_path / "out"
    assert finetune(bert, words, out, "--seeds", "3") == 0
    found = results(out)
    (whole,) = found["fractions"]
    assert [seed["seed"] for seed in whole["seeds"]] == [0, 1, 2]
    best = [seed["best"]["dev"]["dev"]["accuracy"] for seed in whole["seeds"]]
    assert min(best) > 0.9
    summary = whole["summary"]["best"]["dev"]["accuracy"]
    assert summary == {
        "median": pytest.approx(np.median(best)),
        "mean": pytest.approx(np.mean(best)),
        "std": pytest.approx(np.std(best, ddof=1)),
        "max": pytest.approx(max(best)),
    }
    assert set(whole["summary"]["last"]["dev"]) == {"accuracy", "loss"}
    assert f"{np.median(best):.4f}" in capsys.readouterr().out
    assert works["scoring"].total == works["scoring"].done > 1 and "tokenizing" in works
    heads = [load_file(out / f"seed-{seed}" / "model" / "model.safetensors")["classifier.weight"] for seed in range(3)]
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])
    seed = out / "seed-1"
    dev = records(seed, "dev")
    assert [row["epoch"] for row in dev] == [1, 2, 3, 4]
    result = json.loads((seed / "result.json").read_text())
    accuracies = [row["accuracy"] for row in dev]
    assert result["best"]["epoch"] == 1 + accuracies.index(max(accuracies))  # the earliest of equals
    assert result["last"]["dev"]["dev"]["accuracy"] == accuracies[-1]


def test_learns_numbers(bert, numbers, tmp_path) -> None:
    assert finetune(bert, numbers, tmp_path / "out", "--epochs", "8") == 0
    (seed,) = results(tmp_path / "out")["fractions"][0]["seeds"]
    assert seed["best"]["dev"]["dev"]["pearson"] > 0.9
    assert set(seed["best"]["dev"]["dev"]) == {"pearson", "spearman", "loss"}


def test_equal_options_give_equal_bits_and_micro_batches_equal_results(tupe, pairs, tmp_path) -> None:
    short = ("--epochs", "2", "--log-every", "1")
    runs = {"a": [], "b": [], "micro": ["--machine.micro-batch-size", "5"], "seed": ["--first-seed", "1"]}
    for name, more in runs.items():
        assert finetune(tupe, pairs, tmp_path / name, *short, *more) == 0
    folders = {name: tmp_path / name / ("seed-1" if name == "seed" else "seed-0") for name in runs}
    weights = {name: load_file(folder / "model" / "model.safetensors") for name, folder in folders.items()}
    assert all(torch.equal(weights["a"][name], weights["b"][name]) for name in weights["a"])
    losses = {name: np.array([row["loss"] for row in records(folder, "train")]) for name, folder in folders.items()}
    assert (losses["a"] == losses["b"]).all()
    assert np.abs(losses["a"] - losses["micro"]).max() < 1e-4
    assert np.abs(losses["a"] - losses["seed"]).max() > 1e-2


def test_another_seed_is_another_head_on_the_same_encoder(bert) -> None:
    settings = {"dropout": 0, "attention_dropout": 0, "kernels": "auto"}
    models = [new_task_model(load_encoder(bert), KIND, seed, **settings) for seed in (0, 1)]
    (first, second) = (dict(model.named_parameters()) for model in models)
    differing = {name for name in first if not torch.equal(first[name], second[name])}
    assert differing == {"heads.task_words.pooler.weight", "heads.task_words.classifier.weight"}


def test_dropout_is_new_in_every_step_row_and_site(bert, words, tmp_path, monkeypatch) -> None:
    """Each row of each micro-batch has a separate key, which does not depend on the micro-batch size; the head uses
    none of the encoder's sites."""
    given: dict[int, list[torch.Tensor]] = {5: [], 16: []}
    real = TaskModel.forward
    for micro, keys in given.items():

        def forward(self, batch, heads, row_keys=None, keys=keys):
            keys += [] if row_keys is None else [row_keys]
            return real(self, batch, heads, row_keys)

        monkeypatch.setattr(TaskModel, "forward", forward)
        more = ("--first-seed", "3", "--epochs", "2", "--machine.micro-batch-size", str(micro), "--no-save-model")
        assert finetune(bert, words, tmp_path / str(micro), *more) == 0
    expected = torch.cat([row_keys(3, "dropout", step, torch.arange(16)) for step in range(20)])
    assert [torch.cat(keys).equal(expected) for keys in given.values()] == [True, True]
    assert expected.unique().numel() == 320

    model = TaskModel(tiny_config(dropout=0.5), KIND)
    encoder = {int(module.site) for module in model.encoder.modules() if hasattr(module, "site")}
    sites = []
    monkeypatch.setattr(task_heads, "combine", lambda keys, site: sites.append(site) or keys)
    rows = TaskBatch(torch.zeros(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.bool), None, None)
    model(rows, ["words"], torch.arange(2, dtype=torch.int32))
    assert len(sites) == 1 and not encoder & {*sites}


def test_options_change_the_training(bert, words, tmp_path) -> None:
    base = ("--epochs", "1", "--log-every", "1", "--no-save-model")
    changes = {
        "base": [],
        "dropout": ["--dropout", "0.3"],
        "attention": ["--attention-dropout", "0.3"],
        "rate": ["--learning-rate", "1e-3"],
        "decay": ["--layer-decay", "0.5"],
        "weight": ["--weight-decay", "0.5"],
        "beta": ["--beta2", "0.9"],
        "eps": ["--eps", "1e-2"],
        "clip": ["--clip-norm", "0.01"],
        "warmup": ["--schedule.warmup", "0.5"],
        "batch": ["--batch-size", "8"],
        "length": ["--max-length", "8"],
    }
    curves = {}
    for name, more in changes.items():
        assert finetune(bert, words, tmp_path / name, *base, *more) == 0
        curves[name] = [row["loss"] for row in records(tmp_path / name / "seed-0", "train")]
        assert not (tmp_path / name / "seed-0" / "model").exists()
    assert all(curves[name] != curves["base"] for name in curves if name != "base")
    cut = results(tmp_path / "length")["fractions"][0]["seeds"][0]["truncated"]
    assert 0 < cut["train"] < 160 and 0 < cut["dev"] < 60


def test_each_layer_has_its_rate() -> None:
    """Half for each layer below the head, and with plain gradients Adam's first step is the rate itself."""
    config = tiny_config(layers=3, norm="pre", position="tupe-a", type_vocab_size=0)
    model = TaskModel(config, KIND)
    options = OptimizerOptions(weight_decay=0.0, eps=1e-12)
    optimizer = build_scaled_optimizer(model.named_parameters(), config, options, 0.5, CPU)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for step in (1, 2):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        guarded_step(optimizer, 0.1 / step, torch.tensor(True))
        for name, parameter in model.named_parameters():
            exponent = {"words": 4, "positions": 4, "embedding_norm": 4, "final_norm": 1}.get(name.split(".")[1], 0)
            if name.startswith("encoder.blocks."):
                exponent = 3 - int(name.split(".")[2])
            moved = before[name] - parameter.detach()
            assert torch.allclose(moved, torch.full_like(moved, 0.1 / step * 0.5**exponent), rtol=1e-3), name


def test_without_decay_there_is_one_rate() -> None:
    model = TaskModel(tiny_config(), KIND)
    optimizer = build_scaled_optimizer(model.named_parameters(), tiny_config(), OptimizerOptions(), 1.0, CPU)
    assert len(optimizer.param_groups) == 2
    assert all(parameter.ndim < 2 for parameter in optimizer.param_groups[1]["params"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


def test_a_bad_update_is_skipped_and_too_many_end_the_training(bert, words, tmp_path, capsys, monkeypatch) -> None:
    real, calls, bad, steep = Classes.losses, [], {3}, {6}

    def poisoned(kind, logits, targets):
        calls.append(1)
        found = real(kind, logits, targets) * (float("inf") if len(calls) - 1 in bad else 1.0)
        if len(calls) - 1 in steep:  # the loss is finite, its gradient is not
            found.register_hook(lambda gradient: gradient * float("inf"))
        return found

    monkeypatch.setattr(Classes, "losses", poisoned)
    assert finetune(bert, words, tmp_path / "a", "--epochs", "1") == 0
    printed = capsys.readouterr().err
    assert "step 4: loss inf" in printed and "step 7: loss 0." in printed and printed.count("update skipped") == 2
    assert results(tmp_path / "a")["fractions"][0]["seeds"][0]["skipped_updates"] == 2
    calls.clear()
    bad |= set(range(3, 9))
    assert finetune(bert, words, tmp_path / "b", "--epochs", "1") == 2
    printed = capsys.readouterr().err
    assert "not finite in 5 steps in a row, up to step 8" in printed and "--learning-rate" in printed


def test_fractions_are_nested_and_plotted(bert, words, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    more = ("--epochs", "1", "--seeds", "2", "--no-save-model")
    assert finetune(bert, words, out, *more, "--train-fraction", "0.25,1.0") == 0
    sizes = [(part["fraction"], part["train_examples"]) for part in results(out)["fractions"]]
    assert sizes == [(0.25, 40), (1.0, 160)]
    assert (out / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "fraction-0.25" / "seed-1" / "metrics.jsonl").is_file() and (out / "seed-1").is_dir()
    assert "learning_curve.png" in capsys.readouterr().out
    whole = tmp_path / "whole"
    assert finetune(bert, words, whole, *more) == 0
    last = [results(folder)["fractions"][-1]["seeds"][1]["last"] for folder in (out, whole)]
    assert last[0] == last[1]  # other fractions next to it change nothing


def test_continues_with_the_missing_seeds(bert, words, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert finetune(bert, words, out, "--epochs", "1") == 0
    stamp = (out / "seed-0" / "result.json").stat().st_mtime_ns
    assert finetune(bert, words, out, "--epochs", "1", "--seeds", "2") == 0
    assert (out / "seed-0" / "result.json").stat().st_mtime_ns == stamp
    assert len(results(out)["fractions"][0]["seeds"]) == 2
    (out / "seed-1" / "result.json").unlink()  # as if killed before its end
    (out / "seed-1" / "stale").write_text("left over")
    before = results(out)
    assert finetune(bert, words, out, "--epochs", "1", "--seeds", "2") == 0
    seeds = [
        [{**seed, "examples_per_second": 0} for seed in r["fractions"][0]["seeds"]] for r in (before, results(out))
    ]
    assert seeds[0] == seeds[1]
    assert not (out / "seed-1" / "stale").exists()
    capsys.readouterr()
    assert finetune(bert, words, out, "--epochs", "2", "--layer-decay", "0.9") == 2
    printed = capsys.readouterr().err
    assert "another experiment" in printed and "epochs: 1 -> 2" in printed and "layer_decay: 1.0 -> 0.9" in printed
    assert results(out)["epochs"] == 1


def test_another_model_or_data_is_another_experiment(bert, words, tmp_path, capsys) -> None:
    out, other = tmp_path / "out", tiny_model(tmp_path / "other", width=16)
    assert finetune(bert, words, out, "--epochs", "1", "--no-save-model") == 0
    assert finetune(other, words, out, "--epochs", "1", "--no-save-model") == 2
    assert "model: '" in capsys.readouterr().err
    (tmp_path / "data").mkdir()
    changed = make_task(tmp_path / "data", "words", train=150)
    assert finetune(bert, changed, out, "--epochs", "1", "--no-save-model") == 2
    assert "data: '" in capsys.readouterr().err


def test_errors_are_reported_before_training(words, tmp_path, capsys) -> None:
    model, out = tiny_model(tmp_path, vocab_size=40), tmp_path / "out"
    write_rows(tmp_path / "same.jsonl", [{"text": "good", "label": "good"}] * 3)
    same = ("--custom.dev", str(tmp_path / "same.jsonl"), "--epochs", "1", "--train-fraction", "0.1")
    assert finetune(model, words, out, *same, "--custom.metrics", "auc") == 2
    assert "AUC needs examples of both labels, and all 3 have the same" in capsys.readouterr().err and not out.exists()
    assert finetune(model, words, out, *same) == 0
    assert "40: is it the one the model was trained with?" in capsys.readouterr().err


def test_interrupted_and_continued_equals_uninterrupted(bert, words, tmp_path, capsys) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ("--seeds", "2", "--epochs", "5", "--log-every", "1")
    assert finetune(bert, words, whole, *more) == 0
    command = last_given(["finetune", "--model", str(bert), *words, *FAST, *more, "--out", str(broken)])
    process = subprocess.Popen([sys.executable, "-m", "fastbert", *command], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    metrics = broken / "seed-1" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGSTOP)  # so that it is still there
    assert main(command) == 2
    assert "another process is training" in capsys.readouterr().err
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "the same command continues" in printed
    assert not (broken / "results.json").exists()
    assert main(command) == 0
    for seed in ("seed-0", "seed-1"):
        a, b = (load_file(run / seed / "model" / "model.safetensors") for run in (whole, broken))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_symmetric_pairs_are_trained_in_both_orders(bert, pairs, tmp_path) -> None:
    """The loss of the first step, whose weights are known, is the loss of the batch in the sampled orders."""
    out, flags = tmp_path / "out", ("--dropout", "0", "--attention-dropout", "0", "--log-every", "1", "--epochs", "2")
    assert finetune(bert, pairs, out, *flags, "--symmetric") == 0
    assert finetune(bert, pairs, tmp_path / "one", *flags) == 0
    task = open_task("pairs", custom=CustomTaskOptions(train=pairs[3], dev=pairs[5], pair="pair", symmetric=True))
    pretrained = load_encoder(bert)
    model = new_task_model(pretrained, {"pairs": task.kind}, 0, dropout=0.0, attention_dropout=0.0, kernels="auto")
    vocabulary = load_tokenizer(pretrained.tokenizer)
    record = TaskRecord("pairs", task.kind, True, True, 30, 0, {})
    orders = encode_inputs(task.examples("train"), vocabulary, record).orders
    rows = training_order(orders[0].lengths, 16, 0, 0)[0]
    first = {}
    for name, data in (("sampled", sample_orders(orders, 0, 0)), ("straight", orders[0])):
        batch = data.batch(rows)
        first[name] = torch.nn.functional.cross_entropy(model(batch, ["pairs"])[0], batch.labels).item()
    logged = {name: records(tmp_path / name / "seed-0", "train") for name in ("out", "one")}
    assert logged["out"][0]["loss"] == pytest.approx(first["sampled"], abs=1e-5)
    assert logged["one"][0]["loss"] == pytest.approx(first["straight"], abs=1e-5)
    assert abs(first["sampled"] - first["straight"]) > 1e-4
    assert len(logged["out"]) == len(logged["one"])  # no more steps: each pair once an epoch


def test_bf16(bert, words, tmp_path) -> None:
    curves = {}
    for precision in ("fp32", "bf16"):
        more = ("--machine.precision", precision, "--log-every", "1", "--epochs", "4")
        assert finetune(bert, words, tmp_path / precision, *more) == 0
        assert results(tmp_path / precision)["precision"] == precision
        curves[precision] = np.array([row["loss"] for row in records(tmp_path / precision / "seed-0", "train")])
    apart = np.abs(curves["bf16"] - curves["fp32"])
    assert 1e-5 < apart[0] < 0.02 and apart.max() < 0.3
    weights = load_file(tmp_path / "bf16" / "seed-0" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    (seed,) = results(tmp_path / "bf16")["fractions"][0]["seeds"]
    assert seed["best"]["dev"]["dev"]["accuracy"] > 0.8
