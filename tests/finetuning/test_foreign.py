"""Fine-tuning of encoders of other architectures: transformers' own classes and tokenizers are the oracle."""

import json
import random
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
)

from fastbert.data.foreign_tokenizer import load_foreign_tokenizer
from fastbert.errors import UserError
from fastbert.finetuning.batches import encode
from fastbert.finetuning.custom import CustomTaskOptions
from fastbert.finetuning.kinds.classes import Classes
from fastbert.finetuning.kinds.tokens import Tokens
from fastbert.finetuning.loop import block_of, build_scaled_optimizer, layer_scale
from fastbert.finetuning.model import new_task_model
from fastbert.finetuning.rows import Example
from fastbert.finetuning.saved import TaskRecord, load_encoder, load_task_model, save_task_model
from fastbert.finetuning.tasks import open_task
from fastbert.hub.foreign import load_any
from fastbert.hub.load import load_pretrained, tokenizer_of
from fastbert.randomness import row_keys
from fastbert.training.options import OptimizerOptions
from tests.finetuning.conftest import finetune, make_task, sentence, write_rows
from tests.finetuning.foreign_models import FAMILIES, LENGTH, tiny_foreign
from tests.finetuning.test_finetune import records
from tests.finetuning.transformers_epoch import losses_of_an_epoch
from tests.flags import main

pytestmark = pytest.mark.figures

TEXTS = ["the a of and to in is was", "good bad it is, with that: as on at by this had not!", "Größe, she he good."]
TRAINING = [*TEXTS, *(sentence(random.Random(seed), word) for seed in range(40) for word in ("good", "bad"))]
"""Texts for the tokenizers."""
KIND = Classes(("bad", "good", "other"))
EXACT = ("--dropout", "0", "--attention-dropout", "0", "--schedule.warmup", "0", "--eps", "1e-8")


@pytest.fixture(scope="module", params=FAMILIES)
def foreign(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / request.param
    mean = {"classifier_pooling": "mean", "classifier_bias": True} if request.param == "modernbert" else {}
    tiny_foreign(folder, request.param, TRAINING, **mean)
    return folder


@pytest.fixture(scope="module")
def small_pairs(tmp_path_factory) -> list[str]:
    return make_task(tmp_path_factory.mktemp("pairs"), "pairs", train=48, dev=16)


@pytest.fixture(scope="module")
def tuned(foreign, small_pairs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "out"
    more = ("--epochs", "1", "--learning-rate", "1e-2", "--log-every", "1", "--layer-decay", "1")
    assert finetune(foreign, small_pairs, out, *EXACT, *more) == 0
    return out


def test_losses_equal_transformers(foreign, tuned, small_pairs, tmp_path) -> None:
    """Same weights, same batches, no dropout: the architecture's own class with torch's AdamW."""
    ours = [row["loss"] for row in records(tuned / "seed-0", "train")]
    task = open_task("pairs", custom=CustomTaskOptions(train=small_pairs[3], dev=small_pairs[5], pair="pair"))
    pretrained = load_encoder(foreign)
    first = new_task_model(pretrained, {"pairs": task.kind}, 0, dropout=0.0, attention_dropout=0.0, kernels="auto")
    save_task_model(first, TaskRecord("pairs", task.kind, True, False, LENGTH, 0, {}), foreign, tmp_path / "first")
    model, found = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "first", attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    flat = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2]}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-8, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(ours))
    data = encode(task.examples("train"), tokenizer_of(pretrained), LENGTH, task.kind.targets)
    theirs = losses_of_an_epoch(model, optimizer, schedule, data)
    assert len(ours) == 3 and max(theirs) - min(theirs) > 1e-3
    assert ours == pytest.approx(theirs, abs=2e-5)


def test_predictions_equal_transformers_and_training_continues(tuned, small_pairs, tmp_path) -> None:
    """The saved folder is one of transformers, its tokenizer included."""
    folder, out = tuned / "seed-0" / "model", tmp_path / "out.jsonl"
    predict = ["predict", "--model", str(tuned), *small_pairs, "--machine.precision", "fp32"]
    assert main([*predict, "--split", "dev", "--with-text", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [row for row in rows if len(tokenizer(row["text"], row["pair"])["input_ids"]) <= LENGTH]
    assert len(rows) > 5
    batch = tokenizer([row["text"] for row in rows], [row["pair"] for row in rows], padding=True, return_tensors="pt")
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        theirs = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.softmax(-1).numpy()
    ours = np.array([[row["probabilities"][label] for label in model.config.id2label.values()] for row in rows])
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert np.ptp(ours[:, 0]) > 1e-3
    model.save_pretrained(tmp_path / "several", max_shard_size="10KB")
    assert len(list((tmp_path / "several").glob("model-*.safetensors"))) > 1
    for file in ("task.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / file, tmp_path / "several")
    predict[2] = str(tmp_path / "several")
    assert main([*predict, "--split", "dev", "--with-text", "--out", str(tmp_path / "again.jsonl")]) == 0
    assert (tmp_path / "again.jsonl").read_bytes() == out.read_bytes()
    again = ["finetune", "--init-from", str(tuned), *small_pairs, "--seeds", "1", "--epochs", "1", "--no-save-model"]
    assert main([*again, "--out", str(tmp_path / "again")]) == 0
    before, after = (load_any(path).weights for path in (folder, load_encoder(tuned / "seed-0").tokenizer))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_heads_for_tokens_equal_transformers(foreign, tmp_path) -> None:
    kind = Tokens(("O", "B-x", "I-x"))
    model = new_task_model(load_encoder(foreign), {"t": kind}, 0, dropout=0.0, attention_dropout=0.0, kernels="auto")
    save_task_model(model, TaskRecord("t", kind, False, False, 20, 0, {}), foreign, tmp_path / "model")
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "model").eval()
    ours = load_task_model(tmp_path / "model")
    words = ["the", "Größe", "good", ",", "she"]
    ranges = [(sum(map(len, words[:n])) + n, sum(map(len, words[: n + 1])) + n) for n in range(len(words))]
    example = Example(0, " ".join(words), None, None, tuple(ranges))
    data = kind.encode([example], ours.vocabulary, 20)
    batch = data.batch(np.array([0]))
    tokenizer = AutoTokenizer.from_pretrained(foreign)
    space = " " if foreign.name in ("roberta", "modernbert") else ""  # byte-level BPE
    pieces = [tokenizer(f"{space}{word}", add_special_tokens=False)["input_ids"] for word in words]
    assert batch.input_ids[0].tolist() == [tokenizer.cls_token_id, *chain(*pieces), tokenizer.sep_token_id]
    firsts = np.cumsum([1, *map(len, pieces[:-1])])
    assert batch.scored[0].nonzero()[:, 0].tolist() == firsts.tolist()
    with torch.no_grad():
        (found,) = ours.model(batch, ["t"])
        expected = theirs(batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.std() > 1e-3


def test_texts_and_pairs_are_read_as_by_transformers(foreign) -> None:
    vocabulary, tokenizer = load_foreign_tokenizer(foreign), AutoTokenizer.from_pretrained(foreign)
    assert vocabulary.tokens[vocabulary.ids["[CLS]"]] == tokenizer.cls_token
    assert len(vocabulary.tokens) == len(tokenizer)
    for pairs in (None, TEXTS[::-1]):
        examples = [
            Example(n, text, pair, None) for n, (text, pair) in enumerate(zip(TEXTS, pairs or [None] * 3, strict=True))
        ]
        data = encode(examples, vocabulary, 200, KIND.targets)
        rows = [data.tokens[start:end].tolist() for start, end in zip(data.starts, data.starts[1:], strict=False)]
        assert rows == tokenizer(TEXTS, pairs)["input_ids"]
        short = encode(examples, vocabulary, 7, KIND.targets)
        assert short.lengths.tolist() == [7] * 3 and short.truncated == 3
        assert short.tokens[short.starts[1:] - 1].tolist() == [tokenizer.sep_token_id] * 3


def test_layers_dropout_and_groups(foreign) -> None:
    pretrained = load_encoder(foreign)
    model = new_task_model(pretrained, {"t": KIND}, 0, dropout=0.3, attention_dropout=0.3, kernels="auto")
    config = model.encoder.config
    assert (config.layers, config.width, config.heads, config.ffn, config.max_positions) == (2, 32, 2, 48, LENGTH)
    depths = {}
    for name, _ in model.named_parameters():
        depths.setdefault(layer_scale(name, config.layers, 0.5), set()).add(block_of(name))
        assert (layer_scale(name, 2, 0.5) == 1.0) == name.startswith("heads.")
    assert depths[0.25] == {0} and depths[0.125] == {None} and depths[0.5] - {None} == {1} and depths[1.0] == {None}
    assert (None in depths[0.5]) == (foreign.name == "modernbert")  # its last norm
    optimizer = build_scaled_optimizer(model.named_parameters(), config, OptimizerOptions(), 0.5, torch.device("cpu"))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))

    data = encode([Example(n, text, None, None) for n, text in enumerate(TEXTS)], tokenizer_of(pretrained), 30, None)
    batch = data.batch(np.arange(3))
    keys = [row_keys(0, "dropout", step, torch.arange(3)) for step in (0, 1)]
    state = torch.random.get_rng_state()
    one, again, other, none = (model(batch, ["t"], row)[0] for row in (keys[0], keys[0], keys[1], None))
    assert torch.equal(one, again) and not torch.allclose(one, other) and not torch.allclose(one, none)
    assert torch.equal(none, model(batch, ["t"])[0]) and torch.equal(state, torch.random.get_rng_state())
    for word, attention in ((0.3, 0.0), (0.0, 0.3)):  # each has an effect on the encoder
        one = new_task_model(pretrained, {"t": KIND}, 0, dropout=word, attention_dropout=attention, kernels="auto")
        states = []
        for row in (keys[0], keys[1], None, keys[0]):
            torch.rand(1)  # the values do not depend on PyTorch's generator
            states.append(one.hidden(batch, slice(1), row))
        assert states[0].shape == (3, 1, 32) and torch.equal(states[0], states[3])
        assert not any(torch.allclose(states[0], other) for other in states[1:3])


# --- other commands, refusals


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("roberta") / "roberta"
    tiny_foreign(folder, "roberta", TRAINING)
    return folder


def test_other_commands_read_them(roberta, words, tmp_path, capsys) -> None:
    out = tmp_path / "tuned"
    assert finetune(roberta, words, out, "--epochs", "1", "--max-length", "16") == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"] == f"the RoBERTa in {roberta}"
    task = tmp_path / "task.yaml"
    task.write_text(f"name: words\ntrain: {words[3]}\ndev: {words[5]}\n")
    common = ["--machine.threads", "1", "--machine.precision", "fp32"]
    pool = tmp_path / "pool.jsonl"
    write_rows(pool, [{"text": f"a new text: {text}"} for text in TRAINING[:9]])
    select = ["select", "--task", str(task), "--pool", str(pool), "--model", str(out), "--count", "3", *common]
    for query in ("margin", "k-centre"):
        assert main([*select, "--query", query, "--out", str(tmp_path / f"{query}.jsonl")]) == 0
        assert len((tmp_path / f"{query}.jsonl").read_text().splitlines()) == 3
    audit = ["audit", "--task", str(task), "--model", str(roberta), "--folds", "2", "--epochs", "1", *common]
    assert main([*audit, "--max-length", "16", "--out", str(tmp_path / "audit")]) == 0


def test_what_needs_an_encoder_of_fastbert_is_refused(roberta, corpus, tmp_path, capsys) -> None:
    capsys.readouterr()
    for command in (
        f"pretrain --data {corpus} --init-from {roberta} --steps 1 --out {tmp_path / 'run'}",
        f"evaluate --model {roberta} --source {corpus}",
        f"export --run {roberta} --out {tmp_path / 'export'}",
    ):
        assert main(command.split()) == 2
        message = capsys.readouterr().err
        assert "holds a RoBERTa, whose architecture is not one of fastbert's encoders: it can be fine-tuned" in message
    assert not list(tmp_path.iterdir())


def changed(folder: Path, out: Path, settings: dict | None = None, change=None) -> Path:
    shutil.copytree(folder, out)
    if settings is not None:
        values = json.loads((out / "config.json").read_text()) | settings
        (out / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    if change is not None:
        path = out / "model.safetensors"
        save_file(change({name: tensor.clone() for name, tensor in load_file(path).items()}), path)
    return out


def halved(weights: dict) -> dict:
    return {name: tensor.half() for name, tensor in weights.items()}


def test_damaged_folders(roberta, tmp_path) -> None:
    name = "roberta.encoder.layer.0.output.dense.weight"
    for number, (message, settings, change) in enumerate(
        (
            ("encoder.layer.0.output.dense.weight is missing", None, lambda w: w.pop(name) is None or w),
            ("encoder.layer.1.* is unexpected", {"num_hidden_layers": 1}, None),
            ("encoder.layer.2.* is missing", {"num_hidden_layers": 3}, None),
            ("has 5000000 layers, and the weights lack them", {"num_hidden_layers": 5000000}, None),
            (r"has shape \(300, 32\) instead of \(310, 32\)", {"vocab_size": 310}, None),
            ("not finite in encoder.model.encoder.layer.0.output.dense", None, lambda w: w | {name: w[name] / 0}),
            ("holds int64 instead of floating", None, lambda w: w | {name: w[name].long()}),
            ("hidden_size is missing, and must be a whole number", {"hidden_size": ...}, None),
            ("num_attention_heads is 'x'", {"num_attention_heads": "x"}, None),
            ("pad_token_id is 90, which leaves no positions", {"pad_token_id": 90}, None),
            ("transformers cannot build this RoBERTa", {"num_attention_heads": 5}, None),
            ("has is_decoder True; fastbert reads encoders with False only", {"is_decoder": True}, None),
            ("fine-tuning, roberta, xlm-roberta, distilbert, modernbert", {"model_type": "deberta"}, None),
        )
    ):
        with pytest.raises(UserError, match=message):
            load_encoder(changed(roberta, tmp_path / str(number), settings, change))
    with pytest.raises(UserError, match=r"holds a RoBERTa"):
        load_pretrained(roberta)
    half = changed(roberta, tmp_path / "half", {"dtype": "float16", "return_dict": False}, halved)
    model = new_task_model(load_encoder(half), {"t": KIND}, 0, dropout=0.0, attention_dropout=0.0, kernels="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    data = encode([Example(0, TEXTS[0], None, None)], load_foreign_tokenizer(half), 30, None)
    assert model(data.batch(np.array([0])), ["t"])[0].dtype == torch.float32
    bare = changed(roberta, tmp_path / "bare")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bare / file).unlink()
    with pytest.raises(UserError, match=r"bare holds no tokenizer; copy the tokenizer.json"):
        tokenizer_of(load_encoder(bare))
    (bare / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"transformers cannot open the tokenizer in .*bare"):
        tokenizer_of(load_encoder(bare))


def test_heads_that_are_not_known_are_refused(tmp_path) -> None:
    tiny_foreign(tmp_path / "m", "modernbert", TEXTS, classifier_activation="relu")
    with pytest.raises(UserError, match="classifier_activation 'relu', and fastbert's heads know gelu only"):
        load_encoder(tmp_path / "m")
