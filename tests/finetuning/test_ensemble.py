"""`fastbert predict` for all seeds of a fine-tuning: the mean of transformers' probabilities, tags and numbers."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert.finetuning.kinds.classes import Classes
from fastbert.finetuning.kinds.kind import TaskKind
from fastbert.finetuning.kinds.multi_label import MultiLabel
from fastbert.finetuning.kinds.number import Number
from fastbert.finetuning.kinds.tokens import Tokens
from fastbert.finetuning.model import TaskModel
from fastbert.finetuning.saved import TaskRecord, save_task_model
from fastbert.model.encoder import initialize
from fastbert.outputs import standard_output
from fastbert.records import write_sealed
from tests.finetuning.conftest import FILLERS, WORDS, WordPiece, tiny_config, write_rows
from tests.flags import main

PRECISE = ("--machine.precision", "fp32", "--machine.threads", "1")
SEEDS = (0, 1, 4)
LABELS = ("bad", "good", "odd")
KINDS = {
    "classes": Classes(LABELS),
    "number": Number(),
    "multi-label": MultiLabel(LABELS),
    "tokens": Tokens(LABELS),
}
TEXTS = [" ".join(FILLERS[n : n + 6]) for n in range(12)]


def save_seeds(out: Path, kind: TaskKind, thresholds: bool = False) -> Path:
    """Random models in the layout of `fastbert finetune`."""
    WordPiece(WORDS).save(out / "tokenizer")
    for seed in SEEDS:
        if thresholds:
            kind = MultiLabel(LABELS, tuple(0.1 * (seed + one) for one in (1, 2, 5)))
        model = TaskModel(tiny_config(), {"mine": kind})
        initialize(model, seed, 0.3)
        record = TaskRecord("mine", kind, False, False, 30, seed, {})
        save_task_model(model, record, out / "tokenizer", out / f"seed-{seed}" / "model")
    shutil.rmtree(out / "tokenizer")
    write_results(out, SEEDS)
    return out


def write_results(out: Path, seeds: Sequence[int]) -> None:
    best = {"dev": {"dev": {"accuracy": 0.5}}}
    fractions = [{"fraction": 1.0, "seeds": [{"seed": seed, "best": best} for seed in seeds]}]
    write_sealed(out / "results.json", {"task": "mine", "metrics": ["accuracy"], "fractions": fractions})


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    for name, kind in KINDS.items():
        save_seeds(folder / name, kind, thresholds=name == "multi-label")
    write_rows(folder / "new.jsonl", [{"text": text, "tokens": text.split()} for text in TEXTS])
    return folder


def predicted(capfd, model: Path, *more: object) -> tuple[list[dict], str]:
    source = model.parents[model.name.startswith("seed")] / "new.jsonl"
    capfd.readouterr()
    assert main(["predict", "--model", str(model), "--source", str(source), *map(str, more), *PRECISE]) == 0
    printed = capfd.readouterr()
    return [json.loads(line) for line in printed.out.splitlines()], printed.err


def transformers_mean(out: Path, kind: TaskKind) -> np.ndarray:
    """[N, L], or for words [N, T, L]: the mean over the seeds of what transformers computes in float64."""
    import transformers

    means = []
    for seed in SEEDS:
        folder = out / f"seed-{seed}" / "model"
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = getattr(transformers, f"AutoModel{kind.architecture}").from_pretrained(folder).double().eval()
        with torch.no_grad():
            logits = model(**tokenizer(TEXTS, return_tensors="pt")).logits
        function = {"number": lambda x: x, "multi-label": torch.sigmoid}.get(kind.name, lambda x: x.softmax(-1))
        means.append(function(logits).numpy())
    return np.mean(means, axis=0)


@pytest.mark.parametrize("name", KINDS)
def test_the_mean_over_seeds_equals_transformers(name, tuned, capfd) -> None:
    found, messages = predicted(capfd, tuned / name)
    expected = transformers_mean(tuned / name, KINDS[name])
    assert f"{tuned / name}: the mean over the seeds 0, 1, 4" in messages
    assert f"standard output: {len(TEXTS)} predictions for" in messages
    if name == "number":
        assert np.allclose([row["value"] for row in found], expected[:, 0], atol=1e-5)
        return
    if name == "tokens":
        tags = expected[:, 1:-1].argmax(-1)  # each word is one token
        assert [row["tags"] for row in found] == [[LABELS[tag] for tag in row] for row in tags]
        return
    values = np.array([[row["probabilities"][label] for label in LABELS] for row in found])
    assert np.allclose(values, expected, atol=1e-5)
    if name == "classes":
        assert [row["label"] for row in found] == [LABELS[row.argmax()] for row in expected]
        return
    thresholds = 0.1 * (np.mean(SEEDS) + np.array([1, 2, 5]))
    chosen = [[label for label, one in zip(LABELS, row >= thresholds, strict=True) if one] for row in expected]
    assert [row["labels"] for row in found] == chosen and len({tuple(row) for row in chosen}) > 1


def test_thresholds_of_models_without_them_are_a_half() -> None:
    plain, fitted = MultiLabel(LABELS), MultiLabel(LABELS, (0.1, 0.9, 0.3))
    assert plain.ensemble([plain, plain]) == plain
    assert fitted.ensemble([fitted]) == fitted
    assert plain.ensemble([plain, fitted]).thresholds == pytest.approx((0.3, 0.7, 0.4))


def test_one_seed_and_standard_output(tuned, tmp_path, capfd) -> None:
    seed = tuned / "classes" / "seed-1"
    of_seed, messages = predicted(capfd, seed, "--out", "-")
    assert "mean over" not in messages and of_seed != predicted(capfd, tuned / "classes")[0]
    command = ["predict", "--model", str(seed), "--source", str(tuned / "new.jsonl"), *PRECISE]
    assert main([*command, "--out", str(tmp_path / "found.jsonl")]) == 0
    assert [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()] == of_seed
    shutil.copytree(seed, tmp_path / "alone" / "seed-1")
    shutil.copy(tuned / "new.jsonl", tmp_path)
    write_results(tmp_path / "alone", [1])
    of_folder, messages = predicted(capfd, tmp_path / "alone")
    assert of_folder == of_seed and f"{tmp_path / 'alone'}: the model of seed 1\n" in messages


def test_a_closed_pipe_is_not_a_user_error(monkeypatch) -> None:
    """The command ends like others in a pipe to `head`."""
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError), open(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with standard_output("w") as file:
            file.write("x")


def test_seeds_that_cannot_be_averaged_are_refused(tuned, tmp_path, capsys) -> None:
    def refuses(out: Path, message: str) -> None:
        capsys.readouterr()
        assert main(["predict", "--model", str(out), "--source", str(tuned / "new.jsonl"), *PRECISE]) == 2
        printed = capsys.readouterr()
        assert message in printed.err and printed.out == ""

    def copied(name: str) -> Path:
        return Path(shutil.copytree(tuned / "classes", tmp_path / name))

    out = copied("missing")
    shutil.rmtree(out / "seed-1" / "model")
    refuses(out, f"{out / 'seed-1'} has no model, so the seeds of {out} cannot be averaged; restore it, train it again")
    (out / "results.json").unlink()
    refuses(out, f"{out} has no results.json, so not all of its seeds are trained; run fastbert finetune again")
    shutil.rmtree(out)
    refuses(tmp_path, f"{tmp_path} is not a fine-tuned model")
    refuses(tuned, f"{tuned} holds the results of several tasks; give the folder of one, such as {tuned / 'classes'}")
    out = copied("other")
    shutil.rmtree(out / "seed-4")
    shutil.copytree(tuned / "number" / "seed-4", out / "seed-4")
    refuses(out, f"{out / 'seed-4' / 'model'} has the kind number, {out / 'seed-0' / 'model'} classes; give one seed")
    shutil.rmtree(out / "seed-4")
    shutil.copytree(tuned / "classes" / "seed-1", out / "seed-4")
    refuses(out, f"{out / 'seed-4' / 'model'} holds the model of seed 1; restore that of seed 4")
    out = copied("damaged")
    weights = out / "seed-4" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refuses(out, str(weights))
