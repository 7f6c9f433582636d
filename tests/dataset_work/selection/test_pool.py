"""The pool of `fastbert select`: formats, excluded texts, samples, output and errors."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fastbert.data.tables import whole_rows
from fastbert.dataset_work.selection import pool
from fastbert.dataset_work.selection.pool import key, order_of
from fastbert.dataset_work.selection.reader import Reader
from tests.dataset_work.selection.conftest import CPU, select, sentences
from tests.finetuning.conftest import write_rows
from tests.flags import main

POOLS = {
    "empty": "",
    "column": '{"txt": "the"}\n',
    "score": '{"text": "the"}\n{"text": "a", "score": 1}\n',
    "twice": '{"text": "the", "id": 1, "id": 2}\n',
    "unread": '{"words": "the"}\n',
    "blank": '{"text": " "}\n',
}
MODEL = ("--model", "MODEL", "--query")


def test_a_sample_of_the_pool_is_uniform_and_part_of_every_larger_one(task) -> None:
    small, large = (
        {row["id"] for row in select("classes", None, "random", "--pool-size", str(size), count=size)}
        for size in (10, 30)
    )
    assert len(small) == 10 and small < large
    keys = np.array([key(text, None, False) for text in sentences(4000, 7)], np.uint64)
    order = order_of(np.unique(keys), 0, "pool")
    assert len(np.unique(order)) == len(np.unique(keys))
    counts = np.histogram(order / 2.0**64, 10, (0, 1))[0]
    assert np.abs(counts - len(order) / 10).max() < 5 * np.sqrt(len(order) / 10)
    assert abs(np.corrcoef(order / 2.0**64, order_of(np.unique(keys), 1, "pool") / 2.0**64)[0, 1]) < 0.1


def test_random_needs_no_model_and_reads_the_same_texts_from_any_format(task, capsys) -> None:
    found = select("classes", None, "random")
    assert found == sorted(found, key=lambda row: -row["score"]) and all(0 <= row["score"] < 1 for row in found)
    rows = [json.loads(line) for line in Path("pool.jsonl").read_text().splitlines()]
    with open("pool.csv", "w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows([["id", "text"], *([row["id"], row["text"]] for row in rows)])
    columns = {name: [row[name] for row in rows] for name in ("id", "text")}
    pyarrow.parquet.write_table(pyarrow.table(columns), "pool.parquet")
    Path("array.json").write_text(json.dumps(rows, indent=1))
    Path("pool.jsonl.gz").write_bytes(gzip.compress(Path("pool.jsonl").read_bytes()))
    Path("pool.tsv").write_text("id\ttext\n" + "".join(f"{row['id']}\t{row['text']}\n" for row in rows))
    for name in ("array.json", "pool.jsonl.gz", "pool.parquet", "pool.tsv"):
        again = select("classes", None, "random", "--pool", name)
        assert [int(row["id"]) for row in again] == [row["id"] for row in found]
        assert again[0].keys() - {"more"} == {"id", "text", "score", "reason"} and ("more" in again[0]) == (
            "json" in name
        )
    select("classes", None, "random", "--pool", "pool.csv", out="out.csv")
    with open("out.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [(int(row["id"]), row["text"], float(row["score"]), row["reason"]) for row in read] == [
        (row["id"], row["text"], row["score"], "random") for row in found
    ]


def test_pairs_are_labelled_in_either_order_if_the_task_is_symmetric(models, task) -> None:
    rows = [{"text": "the a", "pair": "of and", "label": "good"}]
    for split in ("train", "dev"):
        write_rows(task / f"p-{split}.jsonl", rows)
    texts = sentences(20, 4)
    rows = [
        {"text": "of and", "pair": "the a"},
        *({"text": a, "pair": b} for a, b in zip(texts, texts[::-1], strict=True)),
    ]
    write_rows(task / "pool.jsonl", rows)
    text = 'train: p-train.jsonl\ndev: p-dev.jsonl\npair: pair\nlabels: "bad,good,so-so"\n'
    (task / "one.yaml").write_text(text)
    (task / "both.yaml").write_text(text + "symmetric: true\n")
    assert len(select("one", models["pairs"], "margin", count=21)) == 21
    assert {row["text"] for row in select("both", models["pairs"], "margin", count=10)} <= set(texts)
    assert len(select("both", models["pairs"], "k-centre", count=10)) == 10


def test_columns_of_words_are_a_pool(models, task) -> None:
    """Texts that differ in white space alone are the same."""
    texts = sentences(9, 1)
    Path("words.conll").write_text("".join("\n".join(f"{word}\tO" for word in text.split()) + "\n\n" for text in texts))
    found = select("tokens", models["tokens"], "margin", "--pool", "words.conll", count=9)
    assert sorted(" ".join(row["tokens"]) for row in found) == sorted(texts)
    assert all(row["tags"] == ["O"] * len(row["tokens"]) for row in found)
    write_rows(
        task / "pool.jsonl", [{"text": "  " + text.replace(" ", "  ")} for text in sentences(4, 0)] + [{"text": "a"}]
    )
    (row,) = select("classes", None, "random", count=1)
    assert row["text"] == "a"


def test_labelled_texts_of_test_are_excluded(models, task, capsys) -> None:
    texts = sentences(60, 1)
    write_rows(task / "test.jsonl", [{"text": texts[5], "label": "bad"}, {"text": texts[6], "label": None}])
    with open("classes.yaml", "a") as file:
        file.write("test: test.jsonl\n")
    found = select("classes", models["classes"], "margin", count=59)
    assert {row["id"] for row in found} == {*range(60)} - {5}
    assert "1 labelled in test" in capsys.readouterr().out


def test_a_pool_that_changes_is_refused_and_the_earlier_output_remains(models, task, monkeypatch, capsys) -> None:
    first = select("classes", models["classes"], "margin")
    text = Path("pool.jsonl").read_text()
    for changed in (text + '{"text": "new"}\n', text.replace("the", "he", 1), "\n".join(text.splitlines()[:40])):
        Path("pool.jsonl").write_text(text)
        read = Reader.read

        def change(self, *given, changed=changed, read=read):
            Path("pool.jsonl").write_text(changed)
            return read(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(Reader, "read", change)
            words = ["--task", "classes.yaml", "--pool", "pool.jsonl", "--count", "8", "--out", "out.jsonl", *CPU]
            assert main(["select", *words, "--model", str(models["classes"])]) == 2
        assert "pool.jsonl was changed while it was read" in capsys.readouterr().err
    assert [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()] == first


def test_cells_of_any_type_are_written(task) -> None:
    columns = {
        "text": ["the a\rof", 'and "to"\rin; was'],
        "list": [["x", "ü"], None],
        "day": pyarrow.array([0, 1], pyarrow.date32()),
        "real": [0.5, float("nan")],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), task / "pool.parquet")
    found = select("classes", None, "random", "--pool", "pool.parquet", count=2)
    rest = [{name: row[name] for name in columns} for row in sorted(found, key=lambda row: row["day"])]
    assert rest == [
        {"text": "the a\rof", "list": ["x", "ü"], "day": "1970-01-01", "real": 0.5},
        {"text": 'and "to"\rin; was', "list": None, "day": "1970-01-02", "real": None},
    ]
    select("classes", None, "random", "--pool", "pool.parquet", out="out.csv", count=2)
    again = dict(sorted((cells["day"], cells) for _, cells in whole_rows(Path("out.csv"))))
    assert again["1970-01-01"]["list"] == '["x", "ü"]' and again["1970-01-02"]["list"] == ""
    assert [again[f"1970-01-0{day}"]["real"] for day in (1, 2)] == ["0.5", ""]
    assert [again[f"1970-01-0{day}"]["text"] for day in (1, 2)] == ["the a\nof", 'and "to"\nin; was']


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pool", "empty.jsonl"), "the pool empty.jsonl holds no text; give a file with rows"),
        (
            ("--pool", "column.jsonl"),
            "line 1 has no column 'text', in which the task has its texts; did you mean 'txt'?",
        ),
        (("--task", "tokens.yaml", "--pool", "unread.jsonl"), "line 1 has no column 'tokens', in which the task has"),
        (("--pool", "score.jsonl"), "line 2 has a column 'score', which select adds; rename it in the pool"),
        (("--pool", "twice.jsonl"), "line 1 has 'id' twice"),
        (("--pool", "blank.jsonl"), "line 1: the text 'text' is empty"),
        (("--pool", "missing.jsonl"), "missing.jsonl does not exist"),
        (("--pool", "classes-train.jsonl"), "no text of the pool classes-train.jsonl remains (3 labelled in train)"),
        (
            ("--count", "61"),
            "--count is 61, and 60 texts of pool.jsonl remain (3 labelled in train, 1 labelled in dev, 1",
        ),
        (("--count", "5", "--pool-size", "4"), "--count 5 is larger than --pool-size 4"),
        (("--out", "pool.jsonl"), "--out pool.jsonl is an input of this command"),
        (("--out", "./classes-dev.jsonl"), "classes-dev.jsonl is an input of this command"),
        (("--out", "out.txt"), "name it .jsonl or .csv"),
        (("--query", "margin"), "--model is missing: --query margin"),
        (("--previous", "."), "--previous is compared with --model"),
        ((*MODEL, "k-centre", "--pool-size", "20001"), "--pool-size 20,001 is too large for --query k-centre"),
        ((*MODEL, "entropy", "--task", "number.yaml"), "the kind number has no scores for it"),
        ((*MODEL, "facility-location", "--task", "number.yaml"), "the kind number has no scores for it"),
        (
            (*MODEL, "k-centre", "--task", "number.yaml", "--previous", "MODEL"),
            "the kind number has none; leave it out",
        ),
        ((*MODEL, "margin", "--task", "multi-label.yaml"), "does not fit the task multi-label, which predicts"),
    ],
)
def test_user_errors(arguments, message, models, task, capsys) -> None:
    for name, text in POOLS.items():
        (task / f"{name}.jsonl").write_text(text)
    before = sorted((path, path.read_bytes()) for path in task.iterdir())
    given = [
        "--task",
        "classes.yaml",
        "--pool",
        "pool.jsonl",
        "--count",
        "5",
        "--out",
        "new.jsonl",
        "--query",
        "random",
    ]
    words = [word.replace("MODEL", str(models["classes"])) for word in arguments]
    assert main(["select", *given, *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err.splitlines()[-1] and printed.out == ""
    assert sorted((path, path.read_bytes()) for path in task.iterdir()) == before


def test_a_sample_of_the_default_size_may_be_too_small(models, task, monkeypatch, capsys) -> None:
    from fastbert.dataset_work.selection import options

    monkeypatch.setattr(options, "POOL_SIZE", 10)
    words = [
        "--task",
        "classes.yaml",
        "--pool",
        "pool.jsonl",
        "--count",
        "11",
        "--out",
        "x.jsonl",
        "--query",
        "k-centre",
    ]
    assert main(["select", *words, "--model", str(models["classes"])]) == 2
    assert "--query k-centre uses a sample of 10 texts; give --pool-size 11 or more" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [64, 66])
def test_a_pool_that_another_program_writes_is_refused(rows, task, monkeypatch, capsys) -> None:
    """Its texts and its cells have two readers, of which one sees another number of rows."""
    cells = [{"text": "a"}] * rows
    monkeypatch.setattr(pool, "cells_of_rows", lambda *given: iter(cells))
    words = ["--task", "classes.yaml", "--pool", "pool.jsonl", "--count", "8", "--out", "x.jsonl", "--query", "random"]
    assert main(["select", *words]) == 2
    assert "pool.jsonl was changed while it was read" in capsys.readouterr().err
