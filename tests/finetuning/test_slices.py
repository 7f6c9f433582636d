"""Slices: their conditions, and the metrics on them from the scores of the seeds."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from fastbert.errors import UserError
from fastbert.finetuning.dev_ensemble import write_dev_scores
from fastbert.finetuning.kinds.classes import Classes
from fastbert.finetuning.loop import Tuner
from fastbert.finetuning.rows import Example
from fastbert.finetuning.slice_figures import ALL, slice_figures, wilson
from fastbert.finetuning.slices import Slice, load_slices, masks
from fastbert.finetuning.tasks import Task, open_task
from tests.finetuning.conftest import finetune, make_glue, make_task, results, write_rows
from tests.finetuning.test_resume import Killed, bytes_of, killed
from tests.finetuning.test_tokens import make_sentences
from tests.flags import main

SHORT = ("--epochs", "1", "--seeds", "2")


def example(text: str, pair: str | None = None, **cells) -> Example:
    return Example(0, text, pair, 0, cells=cells)


@pytest.mark.parametrize(
    ("one", "inside", "outside"),
    [
        (Slice("s", min_words=3), example("a b c"), example("a b")),
        (Slice("s", min_words=3), example("a b", "c"), example("a", "b")),
        (Slice("s", min_words=1, max_words=2), example("a b"), example("a b c")),
        (Slice("s", max_words=0, pattern="x*"), example(" "), example("a")),
        (Slice("s", pattern=r"\bnot\b"), example("do not"), example("knot")),
        (Slice("s", pattern="b$"), example("a", "b"), example("b a", "a")),
        (Slice("s", column="n", equals="3"), example("a", n=3.0), example("a", n="4")),
        (Slice("s", column="n", equals="true"), example("a", n=True), example("a", n=None)),
        (Slice("s", min_shared=0.5), example("A b, c", "c B d"), example("a b c", "c d")),  # 2 of 4, 1 of 4
        (Slice("s", min_shared=0.6), example("a b", "a b c"), example("a b", "a b c d")),  # 2 of 3, 2 of 4
        (Slice("s", max_shared=0.0), example("a", "b"), example("a b", "b")),
        (Slice("s", min_words=2, pattern="a"), example("a b"), example("a")),
    ],
)
def test_conditions(one: Slice, inside: Example, outside: Example) -> None:
    assert one.contains(inside) and not one.contains(outside)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("slices: [{name: a}]", "the slice a has no condition; give one or more of min_words"),
        (
            "slices: [{name: a, pattern: '(b'}]",
            "is not a regular expression: missing ), unterminated subpattern at",
        ),
        ("slices: [{name: a, pattern: 'b{9999999999}'}]", "the slice a: the pattern 'b{9999999999}' is not a regular"),
        ("slices: [{name: all examples, min_words: 3}]", "name is all examples, which tables have without a slice"),
        ("slices: [{name: a, column: x}]", "column and equals belong together"),
        ("slices: [{name: a, min_words: 3, max_words: 2}]", "the minimum 3 is above the maximum 2"),
        ("slices: [{name: a, min_words: 1}, {name: a, max_words: 2}]", "two slices are called a"),
        ("slices: [{name: a, words: 1}]", "number 1: unknown option 'words'"),
        ("slices: [{min_words: 1}]", "number 1: the option 'name' is missing"),
        ("slices: long", "slices must be a list of slices"),
        ("slices: []", "slices must be a list of slices"),
        ("slice: [{name: a, min_words: 1}]", "expected the key slices"),
        ("slices: [{name: a, min_shared: 2}]", "min_shared"),
    ],
)
def test_invalid_slices_are_refused(tmp_path: Path, yaml: str, message: str) -> None:
    (tmp_path / "s.yaml").write_text(yaml)
    with pytest.raises(UserError) as error:
        load_slices(str(tmp_path / "s.yaml"))
    assert message in str(error.value) and "s.yaml" in str(error.value)


def test_slices_without_examples_or_column_or_for_pairs_only_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="the slice long has none of the 1 examples of dev"):
        masks([Slice("long", min_words=9)], [example("a b")], "dev")
    write_rows(tmp_path / "t.jsonl", [{"text": "a", "label": "x"}, {"text": "a", "label": "y"}])
    (tmp_path / "t.yaml").write_text("train: t.jsonl\nslices: [{name: a, column: source, equals: news}]")
    with pytest.raises(UserError, match=r"has no column 'source'; known: label, text; .* and those of the slices"):
        open_task(str(tmp_path / "t.yaml"))
    with pytest.raises(UserError, match="the slice alike compares the two texts of a pair, and dev has single texts"):
        masks([Slice("alike", min_shared=0.5)], [example("a b")], "dev")


def test_the_interval_of_accuracy_is_that_of_scipy() -> None:
    for right, count in ((0, 5), (3, 5), (50, 61), (61, 61)):
        expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
        assert wilson(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_metrics_are_those_of_the_predictions(bert, tmp_path, capsys) -> None:
    """On pairs, by hand from the predictions of each seed's model; the slices do not change the training."""
    make_task(tmp_path, "pairs", train=48, dev=40)
    rows = [json.loads(line) for line in (tmp_path / "dev.jsonl").read_text().splitlines()]
    for split in ("train", "dev"):
        table = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        lines = [json.dumps(row | {"source": index % 3}) for index, row in enumerate(table)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    task = "name: pairs\npair: pair\nmetrics: accuracy,f1\n" + "".join(
        f"{split}: {tmp_path / split}.jsonl\n" for split in ("train", "dev")
    )
    conditions = "slices:\n- {name: long, min_words: 12}\n- {name: news, column: source, equals: '1'}\n"
    (tmp_path / "with.yaml").write_text(task + conditions)
    (tmp_path / "without.yaml").write_text(task)
    for name in ("with", "without"):
        assert finetune(bert, ["--task", str(tmp_path / f"{name}.yaml")], tmp_path / name, *SHORT) == 0
    printed = capsys.readouterr().out
    (part,) = results(tmp_path / "with")["fractions"]
    assert "slices" not in results(tmp_path / "without")["fractions"][0]
    assert [(tmp_path / name / "seed-1" / "dev_scores.safetensors").read_bytes() for name in ("with", "without")] == [
        (tmp_path / "with" / "seed-1" / "dev_scores.safetensors").read_bytes()
    ] * 2
    inside = {
        ALL: [True] * 40,
        "long": [len((row["text"] + " " + row["pair"]).split()) >= 12 for row in rows],
        "news": [index % 3 == 1 for index in range(40)],
    }
    for seed in range(2):
        out = tmp_path / f"{seed}.jsonl"
        model = str(tmp_path / "with" / f"seed-{seed}")
        exact = ["--machine.precision", "fp32"]
        capsys.readouterr()
        assert main(["predict", "--model", model, "--source", str(tmp_path / "dev.jsonl"), "--out", str(out), *exact,
                     "--custom.pair", "pair"]) == 0  # fmt: skip
        predicted = [json.loads(line)["label"] for line in out.read_text().splitlines()]
        right = np.array([label == row["label"] for label, row in zip(predicted, rows, strict=True)])
        for name, mask in inside.items():
            figures = part["slices"]["dev"][name]
            assert figures["examples"] == sum(mask)
            assert figures["metrics"]["accuracy"]["seeds"][seed] == pytest.approx(right[mask].mean())
    whole = part["slices"]["dev"][ALL]["metrics"]
    assert whole["accuracy"]["mean"] == pytest.approx(part["summary"]["best"]["dev"]["accuracy"]["mean"])
    assert whole["f1"]["low"] < whole["f1"]["mean"] < whole["f1"]["high"]
    long = part["slices"]["dev"]["long"]["metrics"]["accuracy"]
    assert (long["low"], long["high"]) == pytest.approx(wilson(long["mean"], sum(inside["long"])))
    assert f"  news           {sum(inside['news']):>8}" in printed
    page = (tmp_path / "with" / "report.html").read_text()
    assert "Slices of dev, means over the seeds" in page and "<td>news</td>" in page


def test_each_score_is_compared_with_the_label_of_its_example(tmp_path) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 30).tolist()
    mask = np.arange(30) % 3 == 0
    scores = [random.dirichlet([1, 1], 30) for _ in range(2)]
    for seed, values in enumerate(scores):
        (tmp_path / str(seed)).mkdir()
        write_dev_scores(tmp_path / str(seed), {"dev": values})
    task = Task("t", Classes(("a", "b")), False, ("accuracy", "f1"), False, {}, None)
    folders = [tmp_path / "0", tmp_path / "1"]
    figures = slice_figures(task, {"dev": {"third": mask}}, {"dev": labels}, folders)["dev"]["third"]
    predicted = [values.argmax(1)[mask] for values in scores]
    expected = np.array(labels)[mask]
    metrics = figures["metrics"]
    assert metrics["accuracy"]["seeds"] == pytest.approx([(each == expected).mean() for each in predicted])
    assert metrics["f1"]["seeds"] == pytest.approx([f1_score(expected, each) for each in predicted])
    assert 0 < metrics["f1"]["low"] < metrics["f1"]["mean"] < metrics["f1"]["high"] < 1


def test_slices_of_glue_and_of_words(bert, tmp_path, capsys) -> None:
    """A metric that is undefined on a slice is null; a column is refused where there is none."""
    glue = make_glue(tmp_path / "glue", ("rte",))
    (tmp_path / "s.yaml").write_text("slices: [{name: short, max_words: 8}, {name: 'it', pattern: '^'}]")
    flags = ["--task", "rte", "--glue-dir", str(glue), "--glue-subset", "--slices", str(tmp_path / "s.yaml")]
    assert finetune(bert, flags, tmp_path / "rte", *SHORT) == 0
    slices = results(tmp_path / "rte")["fractions"][0]["slices"]["dev"]
    assert 0 < slices["short"]["examples"] < slices["it"]["examples"] == slices[ALL]["examples"] == 24
    (tmp_path / "c.yaml").write_text("slices: [{name: a, column: x, equals: y}]")
    assert finetune(bert, [*flags[:-1], str(tmp_path / "c.yaml")], tmp_path / "no") == 2
    assert "GLUE tasks have no further columns" in capsys.readouterr().err
    assert finetune(bert, ["--task", "rte,mrpc", *flags[2:]], tmp_path / "no") == 2
    assert "--slices is for one task" in capsys.readouterr().err
    (tmp_path / "e.yaml").write_text("slices: [{name: endless, min_words: 1000}]")
    assert finetune(bert, [*flags[:-1], str(tmp_path / "e.yaml")], tmp_path / "no") == 2
    assert "the slice endless has none of the 24 examples of dev" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()

    import random

    for split, count in (("train", 20), ("dev", 12)):
        (tmp_path / f"{split}.conll").write_text(make_sentences(random.Random(split), count, 20))
    (tmp_path / "t.yaml").write_text(
        f"kind: tokens\nmetrics: entity_f1,accuracy\ntrain: {tmp_path}/train.conll\ndev: {tmp_path}/dev.conll\n"
        "slices: [{name: most, min_words: 2}]\n"
    )
    assert finetune(bert, ["--task", str(tmp_path / "t.yaml")], tmp_path / "tokens", *SHORT) == 0
    (part,) = results(tmp_path / "tokens")["fractions"]
    whole = part["slices"]["dev"][ALL]["metrics"]["entity_f1"]
    assert whole["mean"] == pytest.approx(part["summary"]["best"]["dev"]["entity_f1"]["mean"])


def test_heads_of_slices_train_with_the_task_and_are_not_saved(bert, tmp_path, capsys, monkeypatch) -> None:
    """The encoder learns from them; a killed training continues exactly; the model has the task's head alone."""
    flags = make_task(tmp_path, "pairs", train=48, dev=20)
    (tmp_path / "s.yaml").write_text("slices: [{name: short, max_words: 9}, {name: long, min_words: 20}]")
    with_heads = [*flags, "--slices", str(tmp_path / "s.yaml"), "--slice-heads"]
    more = ("--epochs", "2", "--custom.metrics", "auc")
    assert finetune(bert, with_heads, tmp_path / "whole", *more) == 0
    assert finetune(bert, flags, tmp_path / "without", *more) == 0
    models = {}
    for name in ("whole", "without"):
        models[name] = load_file(tmp_path / name / "seed-0" / "model" / "model.safetensors")
    assert models["whole"].keys() == models["without"].keys()
    assert any(not np.array_equal(models["whole"][key], models["without"][key]) for key in models["whole"])
    with monkeypatch.context() as patch:
        killed(patch, Tuner, "train_step", 4)
        with pytest.raises(Killed):
            finetune(bert, with_heads, tmp_path / "out", *more)
    assert finetune(bert, with_heads, tmp_path / "out", *more) == 0
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    capsys.readouterr()
    assert finetune(bert, [*flags, "--slice-heads"], tmp_path / "no") == 2
    assert "the task pairs has no slices for --slice-heads" in capsys.readouterr().err
    (tmp_path / "s.yaml").write_text("slices: [{name: short, max_words: 10}]")
    assert finetune(bert, with_heads, tmp_path / "whole", *more) == 2
    assert "holds the results of another experiment" in capsys.readouterr().err
