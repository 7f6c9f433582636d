"""Labelling functions, their table, and `fastbert weak-label`."""

import json
import random

import numpy as np
import pytest
import yaml

from fastbert.errors import UserError
from fastbert.finetuning.weak.functions import Item, read_functions
from fastbert.finetuning.weak.label_models import ABSTAIN
from fastbert.finetuning.weak.python_file import run_python_file
from fastbert.finetuning.weak.table import describe, warnings
from fastbert.finetuning.weak.weak_label import choose_model
from fastbert.finetuning.weak.worth import described, print_worth, worth
from fastbert.records import write_sealed
from tests.finetuning.conftest import finetune, results, sentence, write_rows
from tests.flags import main

pytestmark = pytest.mark.figures

LABELS = ("bad", "good")


def votes(folder, text: str, *items: Item) -> list[int]:
    (folder / "f.yaml").write_text(f"functions:\n  one:\n{text}")
    (function,) = read_functions(str(folder / "f.yaml"), LABELS)
    return function.votes("train", items).tolist()


def item(text: str, pair: str | None = None, **columns) -> Item:
    return Item("here", text, pair, columns)


def test_keywords_vote_for_the_label_with_the_most_matches(tmp_path) -> None:
    (tmp_path / "bad.txt").write_text("awful\nnot good\n")
    texts = ("So GOOD, (great)", "not good", "good awful", "goods", "fine", "great good awful")
    found = votes(tmp_path, "    keywords: {good: [good, great], bad: bad.txt}", *map(item, texts), item("x", "great"))
    assert found == [1, 0, ABSTAIN, ABSTAIN, ABSTAIN, 1, 1]


def test_a_lexicon_votes_by_the_sum_or_the_mean_of_its_scores(tmp_path) -> None:
    """A phrase on two lines has the mean score; fields after the score are ignored, as in vaderSentiment's file."""
    (tmp_path / "l.tsv").write_text("good\t2\t0.5\t[1]\nGood\t0\nbad\t-1\ncan't stand\t-3\n:)\t2\n")
    texts = ("good", "good good", "bad", "i can't stand it", "fine", "good bad", "well :)")
    rest = "above: {good: 1.5}, below: {bad: 0}"
    found = votes(tmp_path, f"    {{lexicon: l.tsv, {rest}}}", *map(item, texts))
    assert found == [ABSTAIN, 1, 0, 0, ABSTAIN, ABSTAIN, 1]
    found = votes(tmp_path, f"    {{lexicon: l.tsv, score: mean, {rest}}}", *map(item, texts))
    assert found == [ABSTAIN, ABSTAIN, 0, 0, ABSTAIN, ABSTAIN, 1]


def test_regular_expressions_and_columns(tmp_path) -> None:
    texts = ("Very Good", "good bad", "fine")
    assert votes(tmp_path, "    regex: {good: '\\bgood', bad: ['bad$', worse]}", *map(item, texts)) == [1, -1, -1]
    cells = (5, 5.0, "1", True, None, 3)
    found = votes(
        tmp_path, "    {column: c, values: {'5': good, '1': bad, 'true': bad}}", *(item("", c=c) for c in cells)
    )
    assert found == [1, 1, 0, 0, ABSTAIN, ABSTAIN]


def test_predictions_vote_if_they_are_sure(tmp_path) -> None:
    rows = [{"index": n, "label": "neg", "probabilities": {"neg": p, "pos": 1 - p}} for n, p in enumerate((0.9, 0.6))]
    write_rows(tmp_path / "p.jsonl", rows)
    text = "    predictions: {train: p.jsonl, dev: p.jsonl}\n    confidence: 0.8\n"
    mapped = text + "    values: {neg: bad, pos: good}\n"
    assert votes(tmp_path, mapped, item("a"), item("b")) == [0, ABSTAIN]
    with pytest.raises(UserError, match="2 predictions, and train has 1"):
        votes(tmp_path, mapped, item("a"))
    with pytest.raises(UserError, match=r"line 2: function 'one': .*p.jsonl, line 1: unknown label 'neg'"):
        votes(tmp_path, text, item("a"), item("b"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keywords: {fine: [x]}", r"line 2: function 'one': the task has no label 'fine'"),
        ("keywords: {good: []}", "needs a list"),
        ("keywords: {bad: [no, not]}", "keywords has False, which is not a text; put it in quotes"),
        (f"keywords: {{bad: {'x' * 300}}}", "word list x+.* too long"),
        ("keywords: [good]", "mapping from labels"),
        ("regex: {good: '('}", "pattern '\\(' is not a regular expression: missing \\), .* at character 1"),
        ("regex: {good: 'a{9999999999}'}", "is not a regular expression: the repetition number is too large"),
        ("regex: {good: ''}", "regex has an empty text; leave it out"),
        ("{regex: {good: x}, column: c}", "exactly one of"),
        ("{regex: {good: x}, score: sum}", "unknown key 'score'"),
        ("lexicon: l.tsv", "needs above"),
        ("{lexicon: l.tsv, above: {good: 1}, below: {bad: 2}}", "larger than 1 in above"),
        ("{lexicon: l.tsv, above: {good: high}}", "one label with a number"),
        ("{lexicon: wrong.tsv, above: {good: 1}}", "wrong.tsv, line 2: 'good' is not a word, a tab and a number"),
        ("{column: c}", "needs values"),
        ("{predictions: {train: x.jsonl}}", "train: FILE and dev: FILE"),
        ("{predictions: {train: x, dev: x}, confidence: 2}", "from 0 to 1"),
        ("{keywords: {good: [x]}}\n  one: {regex: {good: y}}", "line 3"),
    ],
)
def test_invalid_functions_are_reported_with_their_line(tmp_path, text, words) -> None:
    (tmp_path / "l.tsv").write_text("good\t2\n")
    (tmp_path / "wrong.tsv").write_text("good\t2\ngood\n")
    (tmp_path / "f.yaml").write_text(
        f"functions:\n  one: {'' if text[0] == '{' else '{'}{text}{'' if text[0] == '{' else '}'}\n"
    )
    with pytest.raises(UserError, match=words):
        read_functions(str(tmp_path / "f.yaml"), LABELS)


def test_a_python_file_is_executed_with_a_message(tmp_path, capsys) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from re import search\ndef _inner(row):\n    return 'good'\n"
        "def short(row):\n    return 'bad' if len(row['text']) < 3 else None\n"
        "def fails(row):\n    return {}['x']\ndef other(row):\n    return 'fine'\n"
    )
    short, fails, other = run_python_file(str(path), LABELS)
    assert f"executing {path}" in capsys.readouterr().err
    assert short.votes("train", [item("ab"), item("abc")]).tolist() == [0, ABSTAIN]
    with pytest.raises(UserError, match=r"mine\.py, line 7: function fails, at here: KeyError: 'x'"):
        fails.votes("train", [item("a")])
    with pytest.raises(UserError, match="function other, at here, returns 'fine', which is not a label"):
        other.votes("train", [item("a")])
    path.write_text("import re\nx = 1 / 0\n")
    with pytest.raises(UserError, match=r"mine\.py, line 2: ZeroDivisionError"):
        run_python_file(str(path), LABELS)


def test_the_table_counts_votes_conflicts_and_copies() -> None:
    train = np.array([[0, 0, -1, 1], [1, 1, 0, 1], [-1, -1, -1, 1], [0, 0, 0, 1]])
    dev, gold = np.array([[0, 0, -1, 1], [1, 1, 0, 1]]), np.array([0, 0])
    table = describe(["a", "b", "c", "d"], train, dev, gold)
    assert [row["coverage"] for row in table["functions"]] == [0.75, 0.75, 0.5, 1.0]
    assert [row["overlaps"] for row in table["functions"]] == [0.75, 0.75, 0.5, 0.75]
    assert [row["conflicts"] for row in table["functions"]] == [0.75, 0.75, 0.5, 0.75]
    assert [(row["dev_correct"], row["dev_votes"]) for row in table["functions"]] == [(1, 2), (1, 2), (1, 1), (0, 2)]
    assert table["copies"] == [["a", "b"]] and table["in_conflict"] == 0.75
    messages = " ".join(warnings(table, train, LABELS))
    assert "a, b are copies" in messages and "d votes good for every example" in messages
    without = describe(["a", "b"], train[:, :2], dev[:, :2], gold)["without_vote"]
    assert without == {"train": 0.25, "dev": 0.0}


def test_correlated_errors_are_reported() -> None:
    """The third function errs with the first one in nine of ten cases."""
    rng = np.random.default_rng(0)
    gold, wrong = rng.integers(0, 2, 400), rng.random((400, 3)) < 0.3
    wrong[:, 2] = np.where(rng.random(400) < 0.9, wrong[:, 0], wrong[:, 2])
    dev = np.where(wrong, 1 - gold[:, None], gold[:, None])
    table = describe(["a", "b", "c"], dev, dev, gold)
    (pair,) = table["correlated_errors"]
    assert pair["functions"] == ["a", "c"] and 0.8 < pair["correlation"] < 1 and pair["examples"] == 400
    assert "errors of a and c are correlated" in " ".join(warnings(table, dev, LABELS))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task whose train has no labels, and four functions for it, with a path relative to their file."""
    folder, rng = tmp_path_factory.mktemp("weak"), random.Random(0)
    for split in ("train", "dev"):
        rows = [
            {"body": sentence(rng, word), "stars": 5 if word == "good" else 1} for word in ("good", "bad", "the") * 20
        ]
        if split == "train":
            rows.append({"body": "of and to", "stars": 3})
        if split == "dev":
            rows = [row | {"label": "good" if row["stars"] == 5 else "bad"} for row in rows]
        write_rows(folder / f"{split}.jsonl", rows)
    (folder / "mine.yaml").write_text("{train: train.jsonl, dev: dev.jsonl, text: body, labels: 'bad,good'}\n")
    (folder / "f.yaml").write_text(
        "functions:\n  words: {keywords: {good: [good], bad: [bad]}}\n  the: {regex: {bad: '\\bthe\\b'}}\n"
        "  stars: {column: stars, values: {'5': good}}\n"
    )
    return folder


def weak_label(task, out, *more: str) -> int:
    files = ("--task", str(task / "mine.yaml"), "--functions", str(task / "f.yaml"))
    return main(["weak-label", *files, "--out", str(out), *more])


def test_weak_labels_train_a_model(task, tmp_path, bert, capsys, monkeypatch) -> None:
    monkeypatch.chdir(task)  # which has a train.jsonl as well
    out = tmp_path / "weak"
    assert weak_label(task, out) == 0
    printed = capsys.readouterr()
    assert "majority  accuracy on dev" in printed.out and "is used" in printed.out
    table = json.loads((out / "table.json").read_text())
    assert max(table["models"], key=lambda model: model["dev_accuracy"])["name"] == table["used"]
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert rows and all(row["label"] == LABELS[int(np.argmax(row["soft"]))] and row["weight"] == 1.0 for row in rows)
    assert len(rows) == 60 and {*yaml.safe_load((out / "task.yaml").read_text())} >= {"train", "dev", "soft", "weight"}
    assert json.loads((out / "manifest.json").read_text())["job"] == "weak-label"
    assert (out / "table.png").stat().st_size > 1000 and "| words |" in (out / "table.md").read_text()
    assert weak_label(task, out, "--combine", "majority", "--balance", "0.5,0.5") == 0  # replaces the folder
    assert json.loads((out / "table.json").read_text())["used"] == "majority"
    assert "gets the label" not in capsys.readouterr().err
    (tmp_path / "one.yaml").write_text("functions: {words: {keywords: {good: [good]}}}")
    assert weak_label(task, tmp_path / "one", "--functions", str(tmp_path / "one.yaml")) == 0
    assert "no training example gets the label bad" in capsys.readouterr().err
    tuned = tmp_path / "tuned"
    assert finetune(bert, ["--task", str(out / "task.yaml")], tuned, "--epochs", "1") == 0
    assert results(tuned)["task"] == "mine-weak"


def test_majority_is_used_if_no_model_is_more_accurate() -> None:
    votes, balance = np.array([[0, 0, 0], [1, 1, 1]] * 10), np.array([0.5, 0.5])
    model, figures, _ = choose_model("best", {"train": votes, "dev": votes}, votes[:, 0], 2, balance, "abc")
    assert model.name == "majority" and [figure["dev_accuracy"] for figure in figures] == [1.0, 1.0, 1.0]
    votes[::2, 0] = votes[1::2, 1] = ABSTAIN
    messages = choose_model("best", {"train": votes, "dev": votes}, votes[:, 2], 2, balance, "abc")[2]
    assert messages[0].startswith("not fitted: triplets: function a votes together with no two others")


def test_user_errors_are_found_before_anything_is_written(task, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    (tmp_path / "never.py").write_text("def never(row):\n    return None\n")
    (tmp_path / "never.yaml").write_text("functions:\n  a: {regex: {bad: a}}\n  mine: {regex: {good: zz}}\n")
    one = {"index": 0, "label": "good", "probabilities": {"good": 1}}
    write_rows(tmp_path / "p.jsonl", [one])
    (tmp_path / "short.yaml").write_text("functions:\n  other: {predictions: {train: p.jsonl, dev: p.jsonl}}\n")
    (tmp_path / "twice.py").write_text("def words(row):\n    return 'good'\n")
    (tmp_path / "number.yaml").write_text("{train: t.jsonl, dev: t.jsonl, kind: number}\n")
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": 1}\n')
    for more, words in (
        (("--run-python", str(tmp_path / "never.py")), "never.py: function 'never' votes for none of the 61 training"),
        (("--functions", str(tmp_path / "never.yaml")), "never.yaml, line 3: function 'mine' votes for none of the 61"),
        (("--functions", str(tmp_path / "short.yaml")), "short.yaml, line 2: function 'other': "),
        (("--run-python", str(tmp_path / "twice.py")), "both have a function 'words'"),
        (("--balance", "0.2,0.3,0.5"), "has 3 numbers, and the task has 2 labels"),
        (("--balance", "0.2,0.2"), "--balance must be dev, estimate, or positive numbers that sum to 1"),
        (("--task", str(tmp_path / "number.yaml")), "has kind number"),
        (("--worth", "a"), "--worth takes two folders"),
    ):
        assert weak_label(task, out, *more) == 2, words
        assert words in capsys.readouterr().err
    assert not out.exists()
    assert weak_label(task, tmp_path) == 2 and "is not empty and holds no weak labels" in capsys.readouterr().err


def test_the_worth_is_interpolated_on_the_logarithm(tmp_path, capsys) -> None:
    curve = [(10, 0.5), (1000, 0.7), (10_000, 0.9)]
    assert (
        worth(curve, 0.6) == pytest.approx(100) and worth(curve, 0.5) == 10 and worth(curve, 0.9) == pytest.approx(1e4)
    )
    sizes = [size for size, _ in curve]
    assert (
        described(worth(curve, 0.4), sizes) == "less than 10"
        and described(worth(curve, 0.95), sizes) == "more than 10,000"
    )

    def write(name: str, *parts) -> None:
        (tmp_path / name).mkdir()
        fractions = [
            {
                "fraction": size / 1000,
                "train_examples": size,
                "seeds": [
                    {"seed": n, "best": {"epoch": 1, "dev": {"dev": {"accuracy": v}}}} for n, v in enumerate(values)
                ],
            }
            for size, values in parts
        ]
        write_sealed(tmp_path / name / "results.json", {"task": name, "metrics": ["accuracy"], "fractions": fractions})

    write("gold", (10, (0.4, 0.6)), (1000, (0.6, 0.8)))
    write("weak", (500, (0.55, 0.65)))
    print_worth(tmp_path / "gold", tmp_path / "weak")
    printed = capsys.readouterr().out
    assert "these functions are worth 100 gold labels" in printed
    assert "from less than 10 to more than 1,000" in printed
    with pytest.raises(UserError, match="has one fraction"):
        print_worth(tmp_path / "weak", tmp_path / "weak")
