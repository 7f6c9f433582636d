"""`import fastbert`: what its functions return, equal to the commands, with callbacks and in a notebook."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import fastbert
from fastbert.cli import main
from fastbert.finetuning.results import read_results
from fastbert.hub.load import load_pretrained, tokenizer_of
from fastbert.pretraining.held_out import trained_objective
from fastbert.training import trackers
from tests.finetuning.foreign_models import tiny_foreign
from tests.hub.cached import fill_cache
from tests.studies.conftest import make_task

ROOT = Path(__file__).parents[1]
CPU = {"device": "cpu", "threads": 1, "precision": "fp32"}
NETWORK = {"layers": 1, "width": 16, "heads": 1, "ffn": 32, "length": 16, "batch_size": 4, "eval_sequences": 4}
TOY = {**NETWORK, "vocab_size": 300, "machine": CPU}


class Events(fastbert.Callback):
    """All calls, in their order."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.seen: list[tuple] = []
        self.fails_at = fails_at

    def on_start(self, training: fastbert.TrainingStart) -> None:
        rows = [(step, split) for step, split, _ in training.logged]
        self.seen.append(("start", training.folder.name, training.step, training.steps, rows))

    def on_log(self, step, columns) -> None:
        self.seen.append(("log", step, columns["loss"]))

    def on_validation(self, step, split, columns) -> None:
        self.seen.append((split, step, columns["loss"]))
        if step == self.fails_at:
            raise RuntimeError("as asked")

    def on_checkpoint(self, step, folder) -> None:
        assert (folder / "manifest.json").is_file()
        self.seen.append(("checkpoint", step, folder.name))

    def on_end(self, step, finished) -> None:
        self.seen.append(("end", step, finished))


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory) -> tuple[fastbert.PretrainResult, Events]:
    """A run that an error of a callback stops, and that is resumed."""
    out, events = tmp_path_factory.mktemp("api") / "run", Events(fails_at=4)
    every = {"log_every": 2, "eval_every": 2, "checkpoint_every": 2}
    given = {**TOY, **every, "data": str(prepared), "steps": 6, "out": str(out)}
    with pytest.raises(RuntimeError, match="as asked"):
        fastbert.pretrain("tiny", callbacks=[events], **given)
    events.fails_at = None
    return fastbert.resume(out, callbacks=[events]), events


def test_a_run_with_callbacks_equals_that_of_the_command(run, prepared, tmp_path) -> None:
    result, events = run
    seen = [event[:2] for event in events.seen]
    before = [
        ("start", "run"),
        ("log", 2),
        ("validation", 2),
        ("checkpoint", 2),
        ("log", 4),
        ("validation", 4),
        ("end", 4),
    ]
    after = [("start", "run"), ("log", 4), ("validation", 4), ("checkpoint", 4), ("log", 6), ("validation", 6)]
    assert seen == [*before, *after, ("checkpoint", 6), ("end", 6)]
    assert events.seen[6] == ("end", 4, False) and events.seen[-1] == ("end", 6, True)
    assert events.seen[0][2:] == (0, 6, [])
    assert events.seen[7][2:] == (2, 6, [(2, "train"), (2, "validation")])
    assert events.seen[4] == events.seen[8]  # repeated to the bit
    assert result.finished and result.folder.name == "run" and result.validation["loss"] == events.seen[-3][2]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in NETWORK.items()]
    flags += [f"--machine.{name}={value}" for name, value in CPU.items()]
    flags += [f"--{name}-every=2" for name in ("log", "eval", "checkpoint")]
    out = tmp_path / "run"
    assert main(["pretrain", "tiny", *flags, "--data", str(prepared), "--steps", "6", "--out", str(out)]) == 0
    files = [folder / "model" / "model.safetensors" for folder in (out, result.folder)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_loaded_model(run, tmp_path) -> None:
    """Hidden states and logits of texts equal those of the objective that the run has trained."""
    folder = run[0].folder
    model = fastbert.load(folder)
    inputs = model.tokenizer(["the state of the [MASK]", "peace"], padding=True, return_tensors="pt")
    pretrained = load_pretrained(folder)
    vocabulary = tokenizer_of(pretrained)
    ids = vocabulary.build().encode("the state of the [MASK]").ids
    assert inputs["input_ids"][0].tolist() == ids and model.tokenizer.mask_token_id in ids
    objective = trained_objective(str(folder), pretrained, vocabulary, "auto", None).eval()
    with torch.no_grad():
        expected = objective.encoder(torch.tensor([ids]))
        logits = model.head(model.encoder(**inputs))
        assert torch.equal(model.head(model.encoder(torch.tensor([ids]))), objective.head(expected))
    torch.testing.assert_close(logits[:1, : len(ids)], objective.head(expected), rtol=1e-4, atol=1e-5)
    assert model.labels == () and not model.encoder.training
    checkpoint = fastbert.load(folder / "checkpoints" / "step-00000006")
    assert torch.equal(checkpoint.encoder.words.weight, model.encoder.words.weight)
    assert checkpoint.head.decoder.weight is checkpoint.encoder.words.weight
    with pytest.raises(fastbert.UserError, match="holds no model"):
        fastbert.load(tmp_path)


def test_a_fine_tuning_and_its_model(run, tmp_path) -> None:
    make_task(tmp_path, "words", train=24, dev=12)
    (tmp_path / "mood.yaml").write_text("train: train.jsonl\ndev: dev.jsonl\n")
    events, out = Events(), tmp_path / "out"
    given = {"model": str(run[0].folder), "task": str(tmp_path / "mood.yaml"), "out": str(out), "seeds": 2, "epochs": 1}
    options = fastbert.FinetuneOptions(batch_size=8, max_length=16)
    result = fastbert.finetune(options, callbacks=[events], **given, machine=CPU)
    assert result.finished and result.folder == out and result.results == {"mood": read_results(out)}
    assert [event[:2] for event in events.seen if event[0] in ("start", "dev", "checkpoint")] == [
        *(("start", "seed-0"), ("dev", 3), ("checkpoint", 3)),
        *(("start", "seed-1"), ("dev", 3), ("checkpoint", 3)),
    ]
    model = fastbert.load(out / "seed-0")
    assert model.labels == ("bad", "good")
    texts = [json.loads(line)["text"] for line in (tmp_path / "dev.jsonl").read_text().splitlines()]
    inputs = model.tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        logits = model.head(model.encoder(**inputs, only=model.head.reads))
    labels = [json.loads(line)["label"] for line in (tmp_path / "dev.jsonl").read_text().splitlines()]
    right = [model.labels[int(row.argmax())] == label for row, label in zip(logits, labels, strict=True)]
    assert (
        sum(right) / len(right) == result.results["mood"]["fractions"][0]["seeds"][0]["best"]["dev"]["dev"]["accuracy"]
    )
    encoder = load_pretrained(run[0].folder).weights
    assert model.encoder.words.weight.shape == encoder["encoder.words.weight"].shape


def test_names_on_the_hub_and_other_architectures(run, tmp_path, monkeypatch) -> None:
    """A run's export under a name on the hub, and a fine-tuned RoBERTa, whose logits are those of `predict`."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = fill_cache(tmp_path / "hub", "owner/name", run[0].folder / "model", "a" * 40)
    named, here = fastbert.load("owner/name"), fastbert.load(run[0].folder)
    assert torch.equal(named.encoder.words.weight, here.encoder.words.weight)
    make_task(tmp_path, "words", train=24, dev=12)
    (tmp_path / "mood.yaml").write_text("train: train.jsonl\ndev: dev.jsonl\n")
    few = {"task": str(tmp_path / "mood.yaml"), "seeds": 1, "epochs": 1, "max_length": 16, "machine": CPU}
    fastbert.finetune(**few, model="owner/name", out=str(tmp_path / "out"))
    assert f"model: {snapshot}\n" in (tmp_path / "out" / "config.yaml").read_text()
    texts = [json.loads(line)["text"] for line in (tmp_path / "dev.jsonl").read_text().splitlines()]
    other = tmp_path / "other"
    tiny_foreign(other, "roberta", texts)
    fastbert.finetune(**few, model=str(other), out=str(tmp_path / "tuned"))
    model, scores = fastbert.load(tmp_path / "tuned" / "seed-0"), tmp_path / "scores.jsonl"
    given = [
        "--model",
        str(tmp_path / "tuned" / "seed-0"),
        "--source",
        str(tmp_path / "dev.jsonl"),
        "--out",
        str(scores),
    ]
    assert main(["predict", *given, "--machine.precision", "fp32"]) == 0
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    inputs = model.tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        found = model.head(model.encoder(**inputs, only=model.head.reads)).softmax(-1)
    expected = [[row["probabilities"][label] for label in model.labels] for row in rows]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_a_tracker_is_a_callback_of_both(run, tmp_path, prepared, monkeypatch) -> None:
    """--track of a run and of a seed; steps replace the minutes of a file."""
    opened: list[Events] = []

    def tracker() -> Events:
        opened.append(Events())
        return opened[-1]

    monkeypatch.setitem(trackers._CLASSES, "wandb", tracker)
    monkeypatch.setenv("WANDB_MODE", "offline")
    make_task(tmp_path, "words", train=24, dev=12)
    (tmp_path / "mood.yaml").write_text("train: train.jsonl\ndev: dev.jsonl\n")
    fastbert.pretrain("wikipedia", **TOY, data=str(prepared), steps=1, out=str(tmp_path / "run"), track="wandb")
    given = {
        "model": str(run[0].folder),
        "task": str(tmp_path / "mood.yaml"),
        "out": str(tmp_path / "out"),
        "machine": CPU,
    }
    fastbert.finetune(**given, seeds=1, epochs=1, max_length=16, track="wandb")
    assert [events.seen[0][1] for events in opened] == ["run", "seed-0"]
    assert all(events.seen[-1][0] == "end" for events in opened)


def test_what_is_refused(tmp_path, monkeypatch) -> None:
    for call, message in (
        (lambda: fastbert.pretrain("tinny"), "did you mean tiny"),
        (lambda: fastbert.pretrain("tiny", stepps=3), "unknown option 'stepps'; did you mean 'steps'"),
        (lambda: fastbert.pretrain(3), "the options must be PretrainOptions or a YAML file, not 3"),
        (lambda: fastbert.pretrain(fastbert.FinetuneOptions()), "the options must be PretrainOptions"),
        (lambda: fastbert.pretrain("tiny", steps=None), "give one of --steps"),
        (lambda: fastbert.pretrain("tiny", callbacks=[Events()], launch="ray", processes=2), "give one of the two"),
        (lambda: fastbert.finetune(task="rte", out=str(tmp_path / "x")), "--model"),
        (lambda: fastbert.resume(tmp_path / "none"), "none"),
    ):
        with pytest.raises(fastbert.UserError, match=message):
            call()
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        fastbert.nothing  # noqa: B018 (the access is what is tested)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(fastbert.UserError, match="with several processes give out"):
        fastbert.pretrain("tiny")


def test_importing_it_is_fast() -> None:
    """It loads no torch; the stub for type checkers has all names."""
    code = "import sys, fastbert; print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert found.stdout == "[]\n"
    stub = (ROOT / "fastbert" / "__init__.pyi").read_text()
    for name in fastbert.__all__:
        assert getattr(fastbert, name) is not None and f"import {name} as {name}" in stub
    assert stub.count(" as ") == len(fastbert.__all__) and set(fastbert.__all__) <= set(dir(fastbert))


def test_the_notebook(tmp_path, monkeypatch, corpus) -> None:
    """Its cells run, at toy size; it was saved with their output."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "docs" / "python.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell["outputs"]) for cell in code) >= len(code) - 1
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    pretrain, finetune = fastbert.pretrain, fastbert.finetune
    small = {**TOY, "data": str(corpus), "steps": 2, "log_every": 1, "eval_every": 1}
    monkeypatch.setattr(fastbert, "pretrain", lambda *given, **more: pretrain(*given, **more | small))
    monkeypatch.setattr(fastbert, "finetune", lambda **more: finetune(**more | {"epochs": 1, "machine": CPU}))
    names: dict = {}
    for cell in code:
        exec("".join(cell["source"]), names)
    assert len(names["losses"].validation) == 2 and names["run"].finished
