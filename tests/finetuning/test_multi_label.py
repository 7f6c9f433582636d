"""Several labels for each example: files, the losses of transformers, scikit-learn's metrics, thresholds, commands."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from fastbert.errors import UserError
from fastbert.finetuning.custom import CustomTaskOptions
from fastbert.finetuning.kinds.multi_label import MultiLabel, best_threshold
from fastbert.finetuning.saved import load_task_model, read_task_record
from fastbert.finetuning.tasks import Task, open_task
from tests.finetuning.conftest import finetune, results, sentence, write_rows
from tests.flags import main

NAMES = ("bad", "good", "had")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def opened(path: Path, text: str, **options):
    path.write_text(text)
    return open_task("mine", custom=CustomTaskOptions(train=str(path), kind="multi-label", **options))


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> list[str]:
    """Which of three words are in a text."""
    folder, rng = tmp_path_factory.mktemp("task"), random.Random(0)
    flags = ["--task", "found", "--custom.kind", "multi-label"]
    for split, count in (("train", 160), ("dev", 40)):
        rows = []
        for _ in range(count):
            labels = [name for name in NAMES if rng.random() < 0.4]
            text = sentence(rng, " ".join(labels) or "the", 4).replace("had", "had" if "had" in labels else "not")
            rows.append({"text": text, "label": labels})
        write_rows(folder / f"{split}.jsonl", rows)
        flags += [f"--custom.{split}", str(folder / f"{split}.jsonl")]
    return flags


@pytest.fixture(scope="module")
def tuned(bert, task, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "out"
    assert finetune(bert, task, out, "--epochs", "6", "--worst", "5") == 0
    return out


# --- files


def test_lists_cells_and_class_names_are_the_same_labels(tmp_path) -> None:
    rows = [("a", ["y", "x"]), ("b", []), ("c", ["z"]), ("d", ["x"])]
    lists = "".join(json.dumps({"text": text, "label": labels}) + "\n" for text, labels in rows)
    cells = "text,label\n" + "".join(f"{text},{' ; '.join(labels)}\n" for text, labels in rows)
    named = datasets.Dataset.from_dict(
        {"text": [text for text, _ in rows], "label": [["yxz".index(one) for one in labels] for _, labels in rows]},
        features=datasets.Features(
            text=datasets.Value("string"), label=datasets.Sequence(datasets.ClassLabel(names=["y", "x", "z"]))
        ),
    )
    named.to_parquet(tmp_path / "t.parquet")
    by_list, by_cell = opened(tmp_path / "t.jsonl", lists), opened(tmp_path / "t.csv", cells)
    assert by_list.kind.labels == ("x", "y", "z")
    expected = [(0, 1), (), (2,), (0,)]
    assert [example.label for example in by_list.examples("train")] == expected
    assert by_list.kind.file_label(by_list.examples("train")[0]) == ["x", "y"]
    assert by_cell.kind == by_list.kind and by_cell.examples("train") == by_list.examples("train")
    parquet = open_task("mine", custom=CustomTaskOptions(train=str(tmp_path / "t.parquet"), kind="multi-label"))
    assert parquet.kind.labels == ("y", "x", "z")
    assert [example.label for example in parquet.examples("train")] == [(0, 1), (), (2,), (1,)]


@pytest.mark.parametrize(
    ("name", "label", "message"),
    [
        (
            "t.jsonl",
            "null",
            "line 2 has no label; train needs one in every row; an empty list, or an empty cell, means",
        ),
        ("t.jsonl", "3", "line 2: the label 3 is not a list of words; write a list"),
        ("t.jsonl", '["x", 1]', "line 2: 1 in the list of labels is not a word"),
        ("t.jsonl", '["x", null]', "line 2: None in the list of labels is not a word"),
        ("t.jsonl", '[["x"]]', r"line 2: \['x'\] in the list of labels is not a word"),
        ("t.jsonl", '["x", " "]', "line 2: a label in .* is empty; drop it"),
        ("t.jsonl", '["x", "x "]', "line 2: the label 'x' is repeated"),
        ("t.jsonl", '["x", "why"]', "line 2: unknown label 'why'; did you mean 'y'[?] known: x, y"),
        ("t.csv", "x;y;x", "line 3: the label 'x' is repeated"),
        ("t.csv", "x;", "line 3: a label in 'x;' is empty"),
        ("t.csv", "x|y", r"line 3: unknown label 'x\|y'; write ';', not '\|', between the labels in a cell"),
        ("t.csv", "\"['x', 'y']\"", "line 3: the cell .* holds a list as text; write the labels with ';' between"),
    ],
)
def test_only_lists_of_known_words_are_accepted(tmp_path, name, label, message) -> None:
    lists = f'{{"text": "a", "label": ["x", "y"]}}\n{{"text": "b", "label": {label}}}\n'
    task = opened(tmp_path / name, lists if name == "t.jsonl" else f"text,label\na,x;y\nb,{label}\n", labels="x,y")
    with pytest.raises(UserError, match=message):
        task.examples("train")


def test_labels_that_cannot_be_learned_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"line 2: the label 'x,y' looks like several; write ';', not ','"):
        opened(tmp_path / "t.csv", 'text,label\na,"x,y"\nb,z\n')
    with pytest.raises(UserError, match=r"holds 1 label\(s\) \(x\); .* two or more"):
        opened(tmp_path / "t.csv", "text,label\na,x\nb,\n")
    with pytest.raises(UserError, match="line 2 has no label; train needs one in every row; an empty list"):
        opened(tmp_path / "t.jsonl", '{"text": "a", "label": ["x"]}\n{"text": "b", "label": null}\n')
    with pytest.raises(UserError, match="two or more different names"):
        opened(tmp_path / "t.csv", "text,label\na,x\n", labels="x,x")
    write_rows(tmp_path / "t.jsonl", [{"text": "a", "label": ["x", "y"]}])
    with pytest.raises(UserError, match=r"line 1: the label \['x', 'y'\] is not a class; set kind: multi-label"):
        open_task("mine", custom=CustomTaskOptions(train=str(tmp_path / "t.jsonl")))


def test_cells_with_several_labels_are_not_classes(tmp_path) -> None:
    path = tmp_path / "t.csv"
    for separator in ",;|":
        path.write_text(f'text,label\na,x\nb,"x{separator} y"\nc,y\n')
        with pytest.raises(UserError, match=r"line 3: the label .* is several labels .*; set kind: multi-label"):
            open_task("mine", custom=CustomTaskOptions(train=str(path)))
    path.write_text('text,label\na,x\nb,"x, no y"\n')
    assert open_task("mine", custom=CustomTaskOptions(train=str(path))).kind.labels == ("x", "x, no y")
    write_rows(tmp_path / "t.jsonl", [{"text": "a", "label": ["x"]}])
    with pytest.raises(UserError, match="set kind: multi-label"):
        open_task("mine", custom=CustomTaskOptions(train=str(tmp_path / "t.jsonl"), kind="number")).examples("train")


def test_whole_numbers_are_ordered_as_numbers(tmp_path) -> None:
    assert opened(tmp_path / "t.csv", "text,label\na,10;9\n").kind.labels == ("9", "10")


def test_a_label_that_train_lacks_is_refused_with_its_line(tmp_path) -> None:
    write_rows(tmp_path / "dev.jsonl", [{"text": "a", "label": []}, {"text": "b", "label": ["z"]}])
    lists = opened(tmp_path / "t.jsonl", '{"text": "a", "label": ["x", "y"]}\n', dev=str(tmp_path / "dev.jsonl"))
    with pytest.raises(UserError, match=r"dev.jsonl, line 2: unknown label 'z'; known: x, y .*those of the training"):
        lists.examples("dev")
    for metric in ("micro_f1", "macro_f1"):
        with pytest.raises(UserError, match="all 2 examples have an empty list; give more examples"):
            replace(lists, metrics=(metric,)).check_scorable([(), ()])


# --- scores


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.3, 0.5, 0.7, 1.0]), st.booleans()), min_size=1, max_size=8))
def test_thresholds_have_the_best_f1_of_all(pairs) -> None:
    scores, expected = np.array([score for score, _ in pairs]), np.array([one for _, one in pairs])
    found = best_threshold(scores, expected)

    def f1(threshold):
        return f1_score(expected, scores >= threshold, zero_division=0)

    candidates = np.unique(
        [*(np.array([0.0, 0.2, 0.3, 0.5, 0.7]) + np.array([0.2, 0.3, 0.5, 0.7, 1.0])) / 2, 0, 1, 0.5]
    )
    best = max(map(f1, candidates))
    assert f1(found) == best
    if f1(0.5) == best:
        assert found == 0.5


def test_the_loss_of_saturated_scores_is_near_that_of_logits() -> None:
    kind, logits = MultiLabel(("a", "b")), torch.tensor([[40.0, -40.0]], dtype=torch.float64)
    scores = kind.scores(logits).numpy()
    assert kind.score_losses(scores, [(1,)]) == pytest.approx(40.0, rel=0.05)


def test_thresholds_of_neighbors_in_float64_ties_and_labels_that_do_not_occur() -> None:
    below, above = 0.75, np.nextafter(0.75, 1)
    for pair in ([below, above], [np.nextafter(0.75, 0), below]):
        assert (np.array(pair) >= best_threshold(np.array(pair), np.array([False, True]))).tolist() == [False, True]
    assert best_threshold(np.array([0.9, 0.8]), np.array([False, False])) == 0.5
    assert best_threshold(np.array([0.25, 0.75]), np.array([True, False])) == 0.125
    scores, expected = np.repeat([0.25, 0.375, 0.625, 0.75], [1, 2, 4, 2]), np.repeat([0, 1, 0, 1], [1, 2, 4, 2])
    assert best_threshold(scores, expected == 1) == 0.3125  # 0.6875 is as good and as near to 0.5, which is worse


@settings(max_examples=30)
@given(st.lists(st.tuples(*[st.tuples(st.floats(0, 1), st.booleans())] * 3), min_size=1, max_size=6))
def test_metrics_equal_scikit_learn(rows) -> None:
    kind, expected = MultiLabel(NAMES), np.array([[one for _, one in row] for row in rows])
    if not expected.any():
        return
    labels = [tuple(np.flatnonzero(row).tolist()) for row in expected]
    scores = np.array([[score for score, _ in row] for row in rows])
    task = Task("t", kind, False, kind.metrics, False, {}, None)
    found = scores >= 0.5
    assert task.measure(scores, labels) == pytest.approx(
        {
            "micro_f1": f1_score(expected, found, average="micro", zero_division=0),
            "macro_f1": f1_score(expected, found, average="macro", zero_division=0),
            "subset_accuracy": accuracy_score(expected, found),
        }
    )


# --- commands


def test_training_learns_and_reports_what_thresholds_change(tuned) -> None:
    (seed,) = results(tuned)["fractions"][0]["seeds"]
    figures, fitted = seed["best"]["dev"]["dev"], seed["fitted_to_dev"]["dev"]
    assert set(figures) == {"micro_f1", "macro_f1", "subset_accuracy", "loss"} and set(fitted) == set(figures) - {
        "loss"
    }
    assert figures["micro_f1"] > 0.7 and fitted["macro_f1"] > figures["macro_f1"]
    by_label = seed["by_label"]["dev"]
    assert tuple(by_label) == NAMES
    assert fitted["macro_f1"] == pytest.approx(np.mean([row["f1"] for row in by_label.values()]))
    record, _ = read_task_record(tuned / "seed-0" / "model")
    assert len(record.kind.thresholds) == 3 and set(record.kind.thresholds) != {0.5}
    assert [row["threshold"] for row in by_label.values()] == list(record.kind.thresholds)
    card = (tuned / "seed-0" / "model" / "README.md").read_text()
    assert f"- bad: {record.kind.thresholds[0]:.4g}\n" in card
    for row in read_lines(tuned / "seed-0" / "errors.jsonl"):
        probabilities = zip(record.kind.thresholds, row["probabilities"].items(), strict=True)
        assert row["labels"] == [name for threshold, (name, value) in probabilities if value >= threshold]
        missed, spurious = (
            {one["label"] for one in row["errors"] if one["error"] == error} for error in ("missed", "spurious")
        )
        assert missed == set(row["expected"]) - set(row["labels"])
        assert spurious == set(row["labels"]) - set(row["expected"])


@pytest.mark.parametrize("settings_now", [{}, {"settings": {"thresholds": dict.fromkeys(NAMES, 0.5)}}])
def test_thresholds_that_are_removed_or_changed_are_refused(tuned, tmp_path, settings_now) -> None:
    copy = Path(shutil.copytree(tuned / "seed-0" / "model", tmp_path / "copy"))
    facts = json.loads((copy / "task.json").read_text())
    del facts["settings"]
    facts |= settings_now
    (copy / "task.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"task\.json was changed since it was written \(settings: .*restore it"):
        read_task_record(copy)


def test_predictions_use_the_thresholds_and_the_export_has_the_same_loss(tuned, task, tmp_path, capsys) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tuned / "seed-0" / "model"
    predict = ["predict", "--model", str(folder), *task, "--machine.precision", "fp32", "--split", "dev"]
    assert main([*predict, "--out", str(tmp_path / "answers.jsonl")]) == 0
    (seed,) = results(tuned)["fractions"][0]["seeds"]
    assert f"macro_f1 {seed['fitted_to_dev']['dev']['macro_f1']:.4f}" in capsys.readouterr().out
    answers, rows = read_lines(tmp_path / "answers.jsonl"), read_lines(Path(task[-1]))
    probabilities = np.array([list(row["probabilities"].values()) for row in answers])
    kind = load_task_model(folder).record.kind
    assert [row["labels"] for row in answers] == [
        [name for name, one in zip(NAMES, above, strict=True) if one] for above in probabilities >= kind.thresholds
    ]
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert theirs.config.problem_type == "multi_label_classification"
    assert theirs.config.id2label == dict(enumerate(NAMES))
    expected = np.array([[name in row["label"] for name in NAMES] for row in rows], np.float32)
    inputs = AutoTokenizer.from_pretrained(folder)([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = theirs(**inputs, labels=torch.from_numpy(expected))
    assert probabilities == pytest.approx(output.logits.sigmoid().numpy(), abs=1e-5)
    ours = kind.losses(output.logits, torch.from_numpy(expected)).mean()
    torch.testing.assert_close(ours, output.loss)
    assert seed["best"]["dev"]["dev"]["loss"] == pytest.approx(float(ours), 1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"thresholds": {"bad": 0.5}}, {"thresholds": dict.fromkeys(NAMES, 1.5)}, {"cut": 0.5}, {"thresholds": []}],
)
def test_damaged_thresholds_are_refused(settings) -> None:
    with pytest.raises(UserError, match=r"task.json is damaged: .*threshold"):
        MultiLabel.restored(NAMES, settings, "task.json")
    kind = MultiLabel(NAMES, (0.25, 0.5, 0.75))
    assert MultiLabel.restored(NAMES, kind.settings(), "task.json") == kind
