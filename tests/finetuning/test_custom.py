"""Custom files give the same examples in every format; errors in a file or a declaration are reported."""

import csv
import gzip
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.errors import UserError
from fastbert.finetuning.rows import Example
from fastbert.finetuning.tasks import CustomTaskOptions, check_task, open_task
from fastbert.flags import parse


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def write_own(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix in (".jsonl", ".ndjson"):
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows), indent=1))
    elif ".csv" in path.suffixes:
        with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join("\t".join(map(str, row)) for row in [list(rows[0]), *(r.values() for r in rows)]))
    return str(path)


FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".csv.gz", ".tsv", ".parquet")
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n\t"), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=40)
@given(st.lists(st.tuples(TEXT, TEXT, st.sampled_from(["no", "yes", "Zwölf, 12"])), min_size=1, max_size=5))
def test_every_format_gives_the_same_examples(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    folder = tmp_path_factory.mktemp("own")
    rows = [*rows, ("a", "b", "no"), ("c", "d", "yes")]
    table = [{"id": str(row), "one": a, "two": b, "gold": c} for row, (a, b, c) in enumerate(rows)]
    words = sorted({word for _, _, word in rows})
    for suffix in FORMATS:
        own = CustomTaskOptions(train=write_own(folder / f"t{suffix}", table), text="one", pair="two", label="gold")
        task = open_task("mine", custom=own)
        assert task.kind.labels == tuple(words) and task.name == "mine" and task.metrics == ("accuracy",)
        assert task.examples("train") == [Example(n, a, b, words.index(c)) for n, (a, b, c) in enumerate(rows)]


@pytest.mark.parametrize("suffix", FORMATS)
def test_numbers_in_every_format(tmp_path: Path, suffix: str) -> None:
    path = write_own(tmp_path / f"t{suffix}", [{"text": "a", "label": 0.5}, {"text": "b", "label": -2.0}])
    task = open_task("mine", custom=CustomTaskOptions(train=path, kind="number"))
    assert task.examples("train") == [Example(0, "a", None, 0.5), Example(1, "b", None, -2.0)]
    assert task.kind.name == "number" and task.kind.labels == () and task.metrics == ("pearson", "spearman")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_test_file_may_lack_labels_and_others_may_not(tmp_path: Path, suffix: str) -> None:
    path = write_own(tmp_path / f"t{suffix}", [{"text": "a"}, {"text": "b"}])
    task = open_task("mine", custom=CustomTaskOptions(test=path, labels="x, y"))
    assert task.examples("test") == [Example(0, "a", None, None), Example(1, "b", None, None)]
    with pytest.raises(UserError, match="has no column 'label'"):
        open_task("mine", custom=CustomTaskOptions(dev=path, labels="x, y")).examples("dev")


def test_a_csv_holds_quotes_commas_and_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", '\ufefftext,label\r\n"a, ""b""\r\nc",1\r\n\r\nd,2\r\nd,word\r\n')
    task = open_task("mine", custom=CustomTaskOptions(dev=str(path), labels="1,2"))
    with pytest.raises(UserError, match=r"t\.csv, line 6: unknown label 'word'"):
        task.examples("dev")
    path.write_bytes(path.read_bytes().replace(b"d,word\r\n", b""))
    assert task.examples("dev") == [Example(0, 'a, "b"\nc', None, 0), Example(1, "d", None, 1)]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (["10", "9", "-1"], ("-1", "9", "10")),
        ([10, 9, 10], ("9", "10")),
        ([1.0, 0.0], ("0", "1")),
        ([True, False], ("false", "true")),
        (["b", "a", "1"], ("1", "a", "b")),
    ],
)
def test_labels_are_learned_in_order(tmp_path: Path, found: list, words: tuple) -> None:
    path = write_own(tmp_path / "t.jsonl", [{"text": "a", "label": label} for label in found])
    task = open_task("mine", custom=CustomTaskOptions(train=path))
    assert task.kind.labels == words
    assert [words[e.label] for e in task.examples("train")] == [
        str(label).lower().removesuffix(".0") for label in found
    ]


@pytest.mark.parametrize("label", ["a\x1b[2Jb", "a\nb", "x" * 300])
def test_labels_that_could_not_be_named(tmp_path: Path, label: str) -> None:
    path = write_own(tmp_path / "t.jsonl", [{"text": "a", "label": label}, {"text": "b", "label": "c"}])
    with pytest.raises(UserError, match=r"t\.jsonl, line 1: the label contains .*: '"):
        open_task("mine", custom=CustomTaskOptions(train=path))


@pytest.mark.parametrize("label", ["1_000", "٣"])
def test_numbers_that_python_alone_reads(tmp_path: Path, label: str) -> None:
    path = write_own(tmp_path / "t.csv", [{"text": "a", "label": label}, {"text": "b", "label": " 2 "}])
    with pytest.raises(UserError, match=r"line 2: the label .* is not a number"):
        open_task("mine", custom=CustomTaskOptions(train=path, kind="number")).examples("train")


def test_yaml_and_flags_declare_a_task(tmp_path: Path) -> None:
    write_own(tmp_path / "data/t.jsonl", [{"one": "a", "two": "b", "gold": "x"}, {"one": "c", "two": "d", "gold": "y"}])
    text = "train: data/t.jsonl\ndev: data/t.jsonl\ntext: one\npair: two\nlabel: gold\nlabels: y, x\n"
    path = write(tmp_path / "pairs.yaml", text + "metrics: f1, auc\nsymmetric: true\n")
    task = open_task(str(path))
    assert (task.name, task.kind.labels, task.metrics, task.symmetric) == ("pairs", ("y", "x"), ("f1", "auc"), True)
    assert list(task.splits) == ["train", "dev"] and task.dev_splits == ("dev",)
    assert task.examples("train") == [Example(0, "a", "b", 1), Example(1, "c", "d", 0)]
    flags = ["--metrics", "accuracy", "--name", "other", "--symmetric"]
    over = open_task(str(path), custom=parse(CustomTaskOptions, flags, "finetune"))
    assert (over.name, over.metrics, over.kind.labels) == ("other", ("accuracy",), ("y", "x"))
    with pytest.raises(UserError, match=r"pairs\.yaml: unknown option 'metric'; did you mean 'metrics'\?"):
        open_task(str(write(path, "metric: f1\n")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a custom task needs files"),
        ({"train": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        (
            {"train": "t.txt"},
            r"t\.txt: the suffix must be that of the file's format, one of .jsonl, .ndjson, .json, .csv, .tsv, .pa",
        ),
        ({"train": "folder.csv"}, "folder.csv is a folder; give a file"),
        ({"text": "x", "label": "x"}, "text and label are both the column 'x'"),
        ({"pair": "text"}, "text and pair are both the column 'text'"),
        ({"pair": "label"}, "pair and label are both the column 'label'"),
        ({"symmetric": True}, "symmetric is for pairs"),
        ({"kind": "numbers"}, "unknown kind of labels 'numbers'; did you mean 'number'"),
        ({"kind": "number", "labels": "a,b"}, "labels are given, but kind is number"),
        ({"test": "t.jsonl"}, "without a train file, give the labels"),
        ({"test": "t.jsonl", "labels": "a,b,a"}, "give two or more different names"),
        ({"test": "t.jsonl", "labels": "a,b", "metrics": "f2"}, "unknown metric 'f2'; did you mean 'f1'"),
        ({"test": "t.jsonl", "labels": "a,b", "metrics": "f1,auc,f1"}, "the metric f1 is given twice"),
    ],
)
def test_inconsistent_declarations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=message):
        open_task(str(write(tmp_path / "t.yaml", json.dumps(options))))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", '{"text": "a", "label": "x"}\n{"text": "a"}\n', r"line 2 has no column 'label'"),
        ("t.jsonl", '{"text": "a", "label": "x"}\n\n{"text": "a", "label": null}\n', r"line 3 has no label"),
        ("t.jsonl", '{"text": 5, "label": "x"}\n', r"line 1: 'text' is of type int, not text"),
        ("t.jsonl", '{"text": null, "label": "x"}\n', r"line 1: 'text' is missing"),
        ("t.jsonl", '{"text": "\\n", "label": "x"}\n', r"line 1: the text 'text' is empty"),
        ("t.jsonl", '{"text": "a", "label": ["x"]}\n', r"line 1: the label \['x'\] is not a class"),
        ("t.jsonl", '{"text": "a", "label": 0.5}\n', r"line 1: the label 0.5 is not a class; set kind: number"),
        ("t.jsonl", '{"text": "a", "label": "x"}\n', r"holds 1 label\(s\) \(x\); a task needs two"),
        ("t.jsonl", '["a"]\n', r"line 1 is a JSON list, not an object"),
        ("t.jsonl", '{"text": "a",\n', r"line 1 is not JSON"),
        ("t.jsonl", '{"text": "a \\ud83d", "label": "x"}', r"line 1: 'text' contains half of a surrogate pair"),
        ("t.csv", "text,label\na,2\na,0.5\n", r"line 3: the label '0.5' is a number, no class; set kind: number"),
        ("t.csv", "text,label\na,b,c\n", r"line 2 has 3 fields, not 2; fix the row"),
        ("t.csv", 'text,label\na,b\n"a"b,c\n', r"line 3 is not CSV"),
        ("t.csv", 'text,label\na,b\n"a,c\n', r"line 3 is not CSV"),
        ("t.csv", "text,text,label\na,b,c\n", r"line 1: 2 columns are called 'text'; rename one"),
        ("t.csv", "Text,label\na,b\n", r"has no column 'text'; did you mean 'Text'\?"),
        ("t.tsv", "text\tlabel\na\tb\tc\n", r"line 2 has 3 fields, not 2.*read without quoting"),
        ("t.tsv", "PAR1", r"is a Parquet file, not text"),
        ("t.parquet", "text", r"damaged or not a Parquet file"),
    ],
)
def test_errors_in_a_custom_file(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(UserError, match=message):
        open_task("mine", custom=CustomTaskOptions(train=str(path))).examples("train")


@pytest.mark.parametrize("word", ["good", "nan", "inf", 10**400, True, ["1"]])
def test_a_label_must_be_a_number(tmp_path: Path, word: Any) -> None:
    rows = [{"text": "a", "label": "1.5"}, {"text": "b", "label": word}]
    path = write_own(tmp_path / "t.jsonl", rows)
    problem = "is not a number" if word in ("good", True, ["1"]) else "is neither a finite number nor a class"
    with pytest.raises(UserError, match=rf"t\.jsonl, line 2: the label .* {problem}"):
        open_task("mine", custom=CustomTaskOptions(dev=path, kind="number")).examples("dev")


@pytest.mark.parametrize("column", ["label", "soft"])
def test_a_number_that_float32_cannot_square(tmp_path: Path, column: str) -> None:
    """The loss is its square, and the norm of the gradient the square of about its size."""
    for size, refused in ((1e15, False), (-1e15, False), (1.01e15, True), (-1e39, True)):
        path = write_own(tmp_path / "t.jsonl", [{"text": "a", column: 1}, {"text": "b", column: size}])
        options = CustomTaskOptions(train=path, kind="number", soft="soft" if column == "soft" else None)
        with pytest.raises(UserError, match=r"line 2: .* is not from -1e\+15 to") if refused else nullcontext():
            found = open_task("mine", custom=options).examples("train")[1].label
            assert np.isfinite(np.float32(found) ** 2 * 2**20)


def test_a_label_that_train_does_not_have(tmp_path: Path) -> None:
    train = write_own(tmp_path / "train.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    dev = write_own(tmp_path / "dev.parquet", [{"text": "a", "label": "x"}, {"text": "b", "label": "z"}])
    with pytest.raises(UserError, match=r"dev\.parquet, row 2: unknown label 'z'; .*known: x, y"):
        open_task("mine", custom=CustomTaskOptions(train=train, dev=dev)).examples("dev")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("t.jsonl", "a\0b", r"line 1: a zero character \(NUL\) in the text"),
        ("t.json", "a\0b", r"row 1: a zero character \(NUL\) in the text"),
        ("t.parquet", "a\0b", r"row 1: a zero character \(NUL\) in the text"),
        ("t.csv", "a\0b", r"is binary, not text: a zero byte in line 2"),
        ("t.json", None, r"row 1: 'text' is missing"),
        ("t.json", " ", r"row 1: the text 'text' is empty"),
        ("t.csv", "", r"line 2: the text 'text' is empty"),
        (
            "t.parquet",
            5,
            r"t\.parquet: the column 'text' is int64, not text; choose the columns with text,",
        ),
    ],
)
def test_text_that_no_format_may_contain(tmp_path: Path, name: str, value: Any, message: str) -> None:
    path = write_own(tmp_path / name, [{"text": value, "label": "x"}])
    with pytest.raises(UserError, match=message):
        open_task("mine", custom=CustomTaskOptions(dev=path, labels="x,y")).examples("dev")


@pytest.mark.parametrize("suffix", [suffix for suffix in FORMATS if suffix != ".tsv"])
def test_line_ends_are_the_same_in_every_format(tmp_path: Path, suffix: str) -> None:
    path = write_own(tmp_path / f"t{suffix}", [{"text": "\ufeffa\r\nb\rc\u2028\x85d", "label": "x"}])
    task = open_task("mine", custom=CustomTaskOptions(dev=path, labels="x,y"))
    assert task.examples("dev") == [Example(0, "a\nb\nc\u2028\x85d", None, 0)]


def test_labels_may_have_commas(tmp_path: Path) -> None:
    path = write_own(tmp_path / "t.jsonl", [{"text": "a", "label": "Zwölf, 12"}])
    task = open_task("mine", custom=CustomTaskOptions(dev=path, labels='no, "Zwölf, 12"'))
    assert task.kind.labels == ("no", "Zwölf, 12") and task.examples("dev") == [Example(0, "a", None, 1)]


def with_class_names(folder: Path, labels: list[int | None], names: list[str]) -> str:
    """A Parquet file as `datasets` writes it."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    path = folder / f"{len(labels)}.parquet"
    table = {"text": [f"text {n}" for n in range(len(labels))], "label": labels}
    datasets.Dataset.from_dict(table, features).to_parquet(path)
    return str(path)


def test_class_names_of_datasets_are_the_labels(tmp_path: Path) -> None:
    names = ["positive", "negative", "mixed"]
    train = with_class_names(tmp_path, [1, 0, 1, 0], names)
    test = with_class_names(tmp_path, [2, -1, None], names)
    task = open_task("mine", custom=CustomTaskOptions(train=train, test=test))
    assert task.kind.labels == tuple(names)  # in their order, whether they occur or not
    assert [example.label for example in task.examples("train")] == [1, 0, 1, 0]
    assert [example.label for example in task.examples("test")] == [2, None, None]
    words = write_own(tmp_path / "dev.csv", [{"text": "a", "label": "mixed"}])
    mixed = open_task("mine", custom=CustomTaskOptions(train=train, dev=words, labels="negative,positive,mixed"))
    assert [example.label for example in mixed.examples("train")] == [0, 1, 0, 1]
    assert [example.label for example in mixed.examples("dev")] == [2]
    with pytest.raises(UserError, match=r"4\.parquet, row 1 has no label; dev needs one in every row"):
        missing = with_class_names(tmp_path, [-1, 0, 0, 0], names)
        open_task("mine", custom=CustomTaskOptions(dev=missing, labels="positive,negative")).examples("dev")


VALUE = '{"info": {"features": {"label": {"_type": "Value", "dtype": "int64"}}}}'


@pytest.mark.parametrize("noted", ["{", "[]", '{"info": []}', '{"info": {"features": {"label": []}}}', VALUE])
def test_damaged_features_of_datasets_are_refused(tmp_path: Path, noted: str) -> None:
    table = pyarrow.table({"text": ["a"], "label": [0]}).replace_schema_metadata({"huggingface": noted})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    options = CustomTaskOptions(dev=str(tmp_path / "t.parquet"), labels="0,1")
    if "label" in noted:  # not a ClassLabel: the numbers are the labels
        assert open_task("mine", custom=options).examples("dev")[0].label == 0
    else:
        with pytest.raises(UserError, match="the features that datasets stored in it are damaged"):
            open_task("mine", custom=options)


def test_class_names_and_numbers_that_do_not_fit(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "b"], "label": [0, 2]})
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["no", "yes"]}}}}
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    with pytest.raises(
        UserError, match=r"row 2: the label 2 is none of the 2 labels that datasets defines in the file"
    ):
        open_task("mine", custom=CustomTaskOptions(dev=str(path), labels="no,yes")).examples("dev")


@pytest.mark.parametrize("empty", ["train", "dev", "test"])
@pytest.mark.parametrize(("suffix", "nothing"), [(".csv", "text,label\n"), (".jsonl", "\n"), (".json", "[]")])
def test_a_table_without_rows_is_refused(tmp_path: Path, empty: str, suffix: str, nothing: str) -> None:
    files = {}
    for split in ("train", "dev", "test"):
        files[split] = write_own(tmp_path / f"{split}{suffix}", [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    Path(files[empty]).write_text(nothing)
    with pytest.raises(UserError, match=f"{empty}{suffix} has no rows; give a file with rows"):
        open_task("mine", custom=CustomTaskOptions(**files))


def test_every_file_is_checked_before_work(tmp_path: Path) -> None:
    train = write_own(tmp_path / "t.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    os.mkfifo(tmp_path / "pipe.csv")
    for test, message in (
        (tmp_path / "none.csv", "none.csv does not exist"),
        (tmp_path / "pipe.csv", "pipe.csv is a pipe or a device"),
        ("-", "- would be standard input"),
        (tmp_path / "t.html", "t.html is HTML by its suffix"),
    ):
        with pytest.raises(UserError, match=message):
            check_task("mine", CustomTaskOptions(train=train, test=str(test)))


@pytest.mark.parametrize("label", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("kind", ["classes", "number"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_label_that_is_not_finite_is_never_sent_to_the_other_kind(tmp_path, label, kind, suffix) -> None:
    path = tmp_path / f"t.{suffix}"
    line = '{{"text": "a", "label": {}}}\n' if suffix == "jsonl" else "a,{}\n"
    path.write_text("text,label\n" * (suffix == "csv") + "".join(map(line.format, ("1", "0", label))))
    options = CustomTaskOptions(train=str(path), dev=str(path), kind=kind)
    with pytest.raises(UserError, match=rf"t\.{suffix}, line \d: the label .* is neither a finite number nor a class"):
        open_task("t", custom=options).examples("train")
