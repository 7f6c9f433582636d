"""`fastbert predict` for several models: the mean of transformers' probabilities, tags and numbers over the seeds of a
fine-tuning, and over models with other encoders, tokenizers and lengths; the metrics of each model."""

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastbert.finetuning.averages import mean_of_models
from fastbert.finetuning.custom import CustomTaskOptions
from fastbert.finetuning.ensemble import open_ensemble
from fastbert.finetuning.kinds.classes import Classes
from fastbert.finetuning.kinds.kind import TaskKind
from fastbert.finetuning.kinds.multi_label import MultiLabel
from fastbert.finetuning.kinds.number import Number
from fastbert.finetuning.kinds.tokens import Tokens
from fastbert.finetuning.model import TaskModel
from fastbert.finetuning.predict import write_predictions
from fastbert.finetuning.rows import Example
from fastbert.finetuning.saved import TaskRecord, save_task_model
from fastbert.finetuning.tasks import open_task
from fastbert.hub.load import load_pretrained
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


def test_a_seed_is_a_model_for_other_jobs(tuned, capsys) -> None:
    """The message for an --out with several seeds names one."""
    out = tuned / "classes"
    assert main(["fill", str(out), "[MASK]"]) == 2
    seed = capsys.readouterr().err.strip().rpartition("such as ")[2]
    assert main(["fill", seed, "[MASK]"]) == 2
    assert f"{seed} has no MLM head, so it cannot predict masked words" in capsys.readouterr().err
    assert load_pretrained(seed).weights.keys() == load_pretrained(f"{seed}/model").weights.keys()


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
    refuses(
        out,
        f"{out / 'seed-4' / 'model'} has the kind number, {out / 'seed-0' / 'model'} classes; give models of one task",
    )
    shutil.rmtree(out / "seed-4")
    shutil.copytree(tuned / "classes" / "seed-1", out / "seed-4")
    refuses(out, f"{out / 'seed-4' / 'model'} holds the model of seed 1; restore that of seed 4")
    out = copied("damaged")
    weights = out / "seed-4" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refuses(out, str(weights))


# --- models of several folders


def save_other(out: Path, kind: TaskKind, seed: int = 7, task: str = "mine", **choices) -> Path:
    """A random model of another size with another tokenizer, which reads 8 tokens at most."""
    words = (*WORDS[:5], *reversed(WORDS[5:]))
    WordPiece(words).save(out / "tokenizer")
    model = TaskModel(tiny_config(width=16, ffn=32, max_positions=8), {task: kind})
    initialize(model, seed, 0.3)
    record = TaskRecord(
        task, kind, **{"is_pair": False, "both_orders": False, "max_length": 8} | choices, seed=seed, dev={}
    )
    save_task_model(model, record, out / "tokenizer", out / "model")
    return out


def values_of(rows: list[dict]) -> np.ndarray:
    return np.array([list(row["probabilities"].values()) if "probabilities" in row else row["value"] for row in rows])


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def predict_lines(capfd, tuned: Path, models: str) -> tuple[str, str]:
    capfd.readouterr()
    assert main(["predict", "--model", models, "--source", str(tuned / "new.jsonl"), *PRECISE]) == 0
    return capfd.readouterr()


def test_each_model_reads_the_text_for_itself(tuned, tmp_path, capfd) -> None:
    """Another encoder, tokenizer and length; the order of the list changes no bit; an --out stands for its seeds."""
    other = save_other(tmp_path / "other", KINDS["classes"], max_length=7)
    seeds = tuned / "classes"
    whole, messages = predict_lines(capfd, tuned, f"{seeds},{other}")
    named = [f"{seeds / 'seed-0'}", f"{seeds / 'seed-1'}", f"{seeds / 'seed-4'}", f"{other}"]
    assert f"the mean over 4 models: {', '.join(named)}\n" in messages
    assert f"{len(TEXTS)} inputs were cut to 7 tokens for {other}\n" in messages and messages.count(" cut to ") == 1
    for order in ((3, 0, 2, 1), (1, 3, 2, 0)):
        assert predict_lines(capfd, tuned, ",".join(named[index] for index in order))[0] == whole
    each = [values_of([json.loads(line) for line in predict_lines(capfd, tuned, one)[0].splitlines()]) for one in named]
    found = [json.loads(line) for line in whole.splitlines()]
    assert np.abs(values_of(found) - np.mean(each, axis=0)).max() < 1e-15
    assert [row["label"] for row in found] == [LABELS[row.argmax()] for row in np.mean(each, axis=0)]
    assert np.abs(each[3] - each[0]).max() > 0.01


def test_words_of_models_with_other_windows(tuned, tmp_path, capfd) -> None:
    """The scores of a word are averaged, wherever the windows of a model begin."""
    other = save_other(tmp_path / "other", KINDS["tokens"])
    write_rows(tmp_path / "new.jsonl", [{"text": " ".join(FILLERS)}, {"text": "good bad"}])  # 20 words: 4 windows of 8
    seed = tuned / "tokens" / "seed-1"
    ensemble = open_ensemble([str(seed), str(other)])
    spans = [
        [(match.start(), match.end()) for match in re.finditer(r"\S+", text)]
        for text in (" ".join(FILLERS), "good bad")
    ]
    examples = [
        Example(0, " ".join(FILLERS), None, None, tuple(spans[0])),
        Example(1, "good bad", None, None, tuple(spans[1])),
    ]
    inputs = ensemble.encode(examples)
    assert [len(one.orders[0]) for one in inputs] == [2, 5]
    scores = ensemble.scores(inputs, torch.device("cpu"), "fp32", 64, "auto")
    tags = [LABELS[tag] for tag in mean_of_models(scores).argmax(-1)]
    printed, _ = predict_lines(capfd, tmp_path, f"{seed},{other}")
    assert [tag for line in printed.splitlines() for tag in json.loads(line)["tags"]] == tags
    assert len(tags) == 22 and any((one.argmax(-1) != mean_of_models(scores).argmax(-1)).any() for one in scores)


def test_the_metrics_of_each_model_their_mean_and_of_the_ensemble(tuned, tmp_path, capsys) -> None:
    """Of several labels each model has its own thresholds, and the ensemble their mean."""
    other = save_other(tmp_path / "other", MultiLabel(LABELS, (0.9, 0.2, 0.4)))
    seeds = tuned / "multi-label"
    labels = [
        [LABELS[number % 3]] + (["odd"] if number % 2 else []) * (number % 3 != 2) for number in range(len(TEXTS))
    ]
    write_rows(tmp_path / "dev.jsonl", [{"text": t, "label": one} for t, one in zip(TEXTS, labels, strict=True)])
    task = ["--task", "mine", "--custom.dev", str(tmp_path / "dev.jsonl"), "--custom.kind", "multi-label"]
    task += ["--custom.labels", ",".join(LABELS), "--custom.metrics", "subset_accuracy,micro_f1"]
    names = [str(seeds / "seed-0"), str(seeds / "seed-4"), str(other)]
    out = tmp_path / "found.jsonl"
    assert main(["predict", "--model", ",".join(names), *task, "--out", str(out), *PRECISE]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {" ".join(words[:-2]): words[-2:] for words in (line.split() for line in lines[1:])}
    expected = np.array([[label in one for label in LABELS] for one in labels])
    each, thresholds = [], [(0.1, 0.2, 0.5), (0.5, 0.6, 0.9), (0.9, 0.2, 0.4)]

    def measured(values: np.ndarray, limits: Sequence[float]) -> list[float]:
        decided = values >= np.array(limits)
        right = (decided & expected).sum()
        return [(decided == expected).all(1).mean(), 2 * right / (decided.sum() + expected.sum())]

    for name in names:
        assert main(["predict", "--model", name, *task, "--out", str(tmp_path / "one.jsonl"), *PRECISE]) == 0
        each.append(values_of(read_lines(tmp_path / "one.jsonl")))
    found = [measured(*one) for one in zip(each, thresholds, strict=True)]
    rows = {**dict(zip(names, found, strict=True)), "mean of the 3 models": np.mean(found, axis=0)}
    rows["ensemble"] = measured(np.mean(each, axis=0), np.mean(thresholds, axis=0))
    assert table == {"model": ["subset_accuracy", "micro_f1"]} | {
        name: [f"{value:.4f}" for value in its] for name, its in rows.items()
    }
    assert len({tuple(its) for its in table.values()}) == 6
    first = "  ".join(f"{name} {value}" for name, value in zip(table["model"], table["ensemble"], strict=True))
    assert lines[0].endswith(f"{len(TEXTS)} predictions for dev  {first}")


def test_files_with_text_can_be_trained_on(tuned, tmp_path) -> None:
    """Probabilities and numbers are the soft labels of the next training, exactly; new text is written alike."""
    rows = [{"text": text, "label": LABELS[number % 3]} for number, text in enumerate(TEXTS)]
    write_rows(tmp_path / "dev.jsonl", rows)
    out, task = tmp_path / "soft.jsonl", ["--task", "mine", "--custom.dev", str(tmp_path / "dev.jsonl")]
    command = ["predict", "--out", str(out), "--with-text", *PRECISE, "--model"]
    assert main([*command, str(tuned / "classes"), *task, "--custom.labels", ",".join(LABELS)]) == 0
    labelled = read_lines(out)
    assert [(row["text"], row["expected"]) for row in labelled] == [(row["text"], row["label"]) for row in rows]
    assert main([*command, str(tuned / "classes"), "--source", str(tuned / "new.jsonl")]) == 0
    for row, its in zip(read_lines(out), labelled, strict=True):
        assert row == {name: value for name, value in its.items() if name != "expected"}
    student = CustomTaskOptions(train=str(out), dev=str(out), soft="probabilities", labels=",".join(LABELS))
    examples = open_task("student", custom=student).examples("train")
    assert np.allclose([example.soft_label for example in examples], values_of(labelled), rtol=1e-15)
    assert main([*command, str(tuned / "number"), "--source", str(tuned / "new.jsonl")]) == 0
    write_rows(tmp_path / "dev.jsonl", [{"text": "the", "label": 0.5}])
    student = CustomTaskOptions(train=str(out), dev=str(tmp_path / "dev.jsonl"), soft="value", kind="number")
    examples = open_task("student", custom=student).examples("train")
    assert [example.soft_label for example in examples] == [row["value"] for row in read_lines(out)]


def test_both_texts_of_a_pair_are_written() -> None:
    file, example = io.StringIO(), Example(3, "one", "two", 1)
    inputs = SimpleNamespace(scored=lambda values: [(example, values[0])])
    write_predictions(file, inputs, np.array([[0.25, 0.75]]), Classes(("no", "yes")), True)
    texts = {"index": 3, "expected": "yes", "text": "one", "pair": "two"}
    assert json.loads(file.getvalue()) == texts | {"label": "yes", "probabilities": {"no": 0.25, "yes": 0.75}}


def test_models_that_cannot_be_averaged_are_refused(tuned, tmp_path, capsys) -> None:
    def refuses(models: Sequence[Path], message: str, *more: str) -> None:
        command = ["predict", "--model", ",".join(map(str, models)), "--source", str(tuned / "new.jsonl"), *PRECISE]
        assert main([*command, *more]) == 2
        printed = capsys.readouterr()
        assert message in printed.err and printed.out == ""

    seeds, kind = tuned / "classes", KINDS["classes"]
    other = save_other(tmp_path / "other", Classes(("good", "bad", "odd")))
    refuses(
        [seeds, other], f"{other / 'model'} has the labels ('good', 'bad', 'odd'), {seeds / 'seed-0' / 'model'} ('bad'"
    )
    pairs = save_other(tmp_path / "pairs", kind, is_pair=True)
    refuses([seeds, pairs], f"{pairs / 'model'} has pairs: True, ")
    refuses([seeds / "seed-0", tuned / "number"], "has the kind number")
    score = save_other(tmp_path / "score", KINDS["number"], task="stars")
    refuses(
        [tuned / "number", score], f"{score / 'model'} has the task stars, {tuned / 'number' / 'seed-0' / 'model'} mine"
    )
    twice = f"the model {seeds / 'seed-1' / 'model'} is given twice"
    refuses([seeds, seeds / "seed-1"], twice)
    (tmp_path / "link").symlink_to(seeds)
    refuses([tmp_path / "link" / "seed-1", seeds / "seed-0", seeds / "seed-1" / "model"], f"{twice}, a copy of")
    shutil.copytree(seeds / "seed-1", tmp_path / "copied")
    refuses(
        [seeds, tmp_path / "copied"], f"the model {tmp_path / 'copied' / 'model'} is given twice, a copy of {seeds}"
    )
    refuses([seeds, tmp_path / "nowhere"], f"{tmp_path / 'nowhere'}")
    refuses([seeds, ""], "has no name before or after one of its commas")
    refuses([tuned / "tokens"], "leave --with-text out", "--with-text", "--out", str(tmp_path / "found.conll"))


def test_other_tasks_with_the_same_labels_are_reported(tuned, tmp_path, capfd) -> None:
    other = save_other(tmp_path / "other", KINDS["classes"], task="theirs")
    _, messages = predict_lines(capfd, tuned, f"{tuned / 'classes' / 'seed-0'},{other}")
    assert f"were trained on different tasks:\n  mine: {tuned / 'classes' / 'seed-0'}\n  theirs: {other}\n" in messages


def test_the_seeds_of_the_largest_fraction(tuned, tmp_path, capfd) -> None:
    for fraction, seed in ((0.5, 0), (0.5, 1), (1.0, 4), (1.0, 0)):
        folder = tmp_path / "out" / ("" if fraction == 1.0 else f"fraction-{fraction}") / f"seed-{seed}"
        shutil.copytree(tuned / "classes" / f"seed-{seed}", folder)
    best = {"dev": {"dev": {"accuracy": 0.5}}}
    seeds = {0.5: (0, 1), 1.0: (4, 0)}
    parts = [{"fraction": f, "seeds": [{"seed": seed, "best": best} for seed in its]} for f, its in seeds.items()]
    write_sealed(tmp_path / "out" / "results.json", {"task": "mine", "metrics": ["accuracy"], "fractions": parts})
    _, messages = predict_lines(capfd, tuned, str(tmp_path / "out"))
    assert f"{tmp_path / 'out'}: the mean over the seeds 4, 0 of its largest fraction of train, 1\n" in messages
    part = tmp_path / "out" / "fraction-0.5"
    assert main(["predict", "--model", str(part), "--source", str(tuned / "new.jsonl")]) == 2
    given = f"{part / 'seed-0'},{part / 'seed-1'}"
    assert (
        f"holds the seeds of one fraction of the training split; give them one by one: --model {given}"
        in capfd.readouterr().err
    )
    _, messages = predict_lines(capfd, tuned, given)
    assert f"the mean over 2 models: {part / 'seed-0'}, {part / 'seed-1'}\n" in messages
