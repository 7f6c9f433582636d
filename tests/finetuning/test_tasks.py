"""GLUE reads the same from the official files and from Parquet; errors in a file are reported with their line."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fastbert.errors import UserError
from fastbert.finetuning import glue
from fastbert.finetuning.rows import Example
from fastbert.finetuning.tasks import GLUE, CustomTaskOptions, Task, open_task

OFFICIAL_ROWS = {
    "cola": (8551, 1043, 1063),
    "sst2": (67349, 872, 1821),
    "mrpc": (3668, 408, 1725),
    "stsb": (5749, 1500, 1379),
    "qqp": (363846, 40430, 390965),
    "mnli": (392702, 9815, 9832, 9796, 9847),
    "qnli": (104743, 5463, 5463),
    "rte": (2490, 277, 3000),
    "wnli": (635, 71, 146),
    "ax": (1104,),
}
MNLI_HEAD = "index\tpromptID\tpairID\tgenre\ts1_binary_parse\ts2_binary_parse\ts1_parse\ts2_parse\tsentence1\tsentence2"
STSB_HEAD = "index genre filename year old_index source1 source2 sentence1 sentence2".replace(" ", "\t")
# task -> folder, {official file: its text}; A and B stand for texts; labels are those with the ids 0 and 1
FILES = {
    "cola": ("CoLA", {"train": "gj04\t0\t*\tA\ngj04\t1\t\tB\n", "test": "index\tsentence\n0\tA\n1\tB\n"}),
    "sst2": ("SST-2", {"train": "sentence\tlabel\nA\t0\nB\t1\n", "test": "index\tsentence\n0\tA\n1\tB\n"}),
    "mrpc": (
        "MRPC",
        {
            "train": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t11\t12\tA\tB\n1\t13\t14\tB\tA\n",
            "test": "\ufeffindex\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t11\t12\tA\tB\n1\t13\t14\tB\tA\n",
        },
    ),
    "stsb": (
        "STS-B",
        {
            "train": f"{STSB_HEAD}\tscore\n0{'	g' * 6}\tA\tB\t3.800\n1{'	g' * 6}\tB\tA\t0.000\n",
            "test": f"{STSB_HEAD}\n0{'	g' * 6}\tA\tB\n1{'	g' * 6}\tB\tA\n",
        },
    ),
    "qqp": (
        "QQP",
        {
            "train": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n7\t1\t2\tA\tB\t0\n9\t3\t4\tB\tA\t1\n",
            "test": "id\tquestion1\tquestion2\n0\tA\tB\n1\tB\tA\n",
        },
    ),
    "mnli": (
        "MNLI",
        {
            "train": f"{MNLI_HEAD}\tlabel1\tgold_label\n0{'	p' * 7}\tA\tB\tneutral\tentailment\n"
            f"1{'	p' * 7}\tB\tA\tentailment\tneutral\n",
            "dev_mismatched": f"{MNLI_HEAD}{''.join(f'	label{n}' for n in range(1, 6))}\tgold_label\n"
            f"0{'	p' * 7}\tA\tB{'	contradiction' * 5}\tentailment\n"
            f"1{'	p' * 7}\tB\tA{'	contradiction' * 5}\tneutral\n",
            "test_matched": f"{MNLI_HEAD}\n0{'	p' * 7}\tA\tB\n1{'	p' * 7}\tB\tA\n",
        },
    ),
    "qnli": (
        "QNLI",
        {
            "train": "index\tquestion\tsentence\tlabel\n0\tA\tB\tentailment\n1\tB\tA\tnot_entailment\n",
            "test": "index\tquestion\tsentence\n0\tA\tB\n1\tB\tA\n",
        },
    ),
    "rte": (
        "RTE",
        {
            "train": "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tentailment\n1\tB\tA\tnot_entailment\n",
            "test": "index\tsentence1\tsentence2\n0\tA\tB\n1\tB\tA\n",
        },
    ),
    "wnli": (
        "WNLI",
        {
            "train": "index\tsentence1\tsentence2\tlabel\n0\tA\tB\t0\n1\tB\tA\t1\n",
            "test": "index\tsentence1\tsentence2\n0\tA\tB\n1\tB\tA\n",
        },
    ),
    "ax": ("AX", {"test": "index\tsentence1\tsentence2\n0\tA\tB\n1\tB\tA\n"}),
}
A, B = 'He wrote " no', '"Zwölf 😀\u2028 boxers" , the second one .'


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def official(root: Path, name: str, split: str) -> Path:
    folder, files = FILES[name]
    file = "diagnostic.tsv" if name == "ax" else f"{split}.tsv"
    return write(root / folder / file, files[split].replace("A", "{0}").replace("B", "{1}").format(A, B))


def glue_task(name: str, root: Path | str | None) -> Task:
    return open_task(name, glue_dir=None if root is None else str(root), glue_subset=True)


def expected(name: str, split: str) -> list[Example]:
    labels = [3.8, 0.0] if name == "stsb" else [0, 1]
    labels = [None, None] if split.startswith("test") else labels
    pairs = [None, None] if name in ("cola", "sst2") else [B, A]
    return [Example(index, *row) for index, row in enumerate(zip([A, B], pairs, labels, strict=True))]


def test_the_official_row_counts() -> None:
    assert {name: tuple(task.rows.values()) for name, task in GLUE.items()} == OFFICIAL_ROWS
    assert list(GLUE["mnli"].rows) == ["train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched"]


@pytest.mark.parametrize("name", FILES)
def test_the_official_layout(tmp_path: Path, name: str) -> None:
    for split in FILES[name][1]:
        official(tmp_path, name, split)
        task = glue_task(name, tmp_path)
        assert task.examples(split) == expected(name, split)
        assert task.is_pair is (task.examples(split)[0].pair is not None)
        assert Path(task.splits[split]).is_file() and not task.warnings


def test_the_words_of_labels_and_metrics(tmp_path: Path) -> None:
    tasks = {
        name: glue_task(name, official(tmp_path, name, split).parents[1])
        for name in FILES
        for split in ["test"] * (name != "mnli") + ["train"] * (name == "mnli")
    }
    three, two, numbers = ("entailment", "neutral", "contradiction"), ("entailment", "not_entailment"), ("0", "1")
    words = {"mnli": three, "ax": three, "qnli": two, "rte": two, "stsb": ()}
    metrics = {
        "cola": ("matthews",),
        "ax": ("matthews",),
        "stsb": ("pearson", "spearman"),
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
    }
    for name, task in tasks.items():
        assert task.kind.labels == words.get(name, numbers) and task.metrics == metrics.get(name, ("accuracy",))
        assert task.symmetric is (name in ("mrpc", "qqp", "stsb"))
        assert task.kind.name == ("number" if name == "stsb" else "classes")
    assert tasks["mnli"].dev_splits == ("dev_matched", "dev_mismatched")
    assert [split for split in tasks["mnli"].splits if "test" in split] == ["test_matched", "test_mismatched"]
    assert tasks["ax"].dev_splits == () and tasks["rte"].dev_splits == ("dev",)


@pytest.mark.parametrize("folder", ["SST-2", "sst2", "SST", "sst_2"])
def test_names_of_folders_and_tasks(tmp_path: Path, folder: str) -> None:
    official(tmp_path, "sst2", "train").parent.rename(tmp_path / folder)
    assert glue_task(folder if folder != "SST" else "Sst-2", tmp_path).examples("train") == expected("sst2", "train")


def test_the_older_names_of_ax_and_qnli(tmp_path: Path) -> None:
    official(tmp_path, "ax", "test").parent.rename(tmp_path / "diagnostic")
    official(tmp_path, "qnli", "train").parent.rename(tmp_path / "QNLIv2")
    assert len(glue_task("ax", tmp_path).examples("test")) == len(glue_task("qnli", tmp_path).examples("train")) == 2


def test_line_ends_of_windows(tmp_path: Path) -> None:
    path = official(tmp_path, "rte", "train")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert glue_task("rte", tmp_path).examples("train") == expected("rte", "train")


def test_rows_of_qqp_that_lack_fields_are_skipped_and_counted(tmp_path: Path) -> None:
    path = official(tmp_path, "qqp", "train")
    head, *rows = path.read_text().strip().split("\n")
    broken = ['5\t1\t2\tWho\t"What', '"\tWas he real?\t0', "6\t1\t2\tWho\tWhat\t", "8\t5\t6\t\tWhat\t1"]
    broken.append("4\t1\t2\tWho\tWhat\rnow\t0")  # as Python reads text, a lone CR ends a line: two halves
    write(path, "\n".join([head, rows[0], *broken, rows[1]]))
    task = glue_task("qqp", tmp_path)
    examples = task.examples("train")
    assert [(e.index, e.text, e.label) for e in examples] == [(0, A, 0), (1, "", 1), (2, B, 1)]
    assert len(task.warnings) == 2
    assert "5 rows lack fields" in task.warnings[0] and "1 rows have an empty" in task.warnings[1]
    task.examples("train")
    assert len(task.warnings) == 2  # reported once
    write(path.with_name("test.tsv"), "id\tquestion1\tquestion2\n0\tA\tB\n1\tB\n")
    with pytest.raises(UserError, match=r"test\.tsv, line 3 lacks fields"):
        task.examples("test")


def test_row_counts_are_checked_against_the_official_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    official(tmp_path, "rte", "train")
    with pytest.raises(UserError, match=r"RTE.train\.tsv holds 2 usable rows, and RTE's train has 2,490"):
        open_task("rte", glue_dir=str(tmp_path)).examples("train")
    monkeypatch.setitem(GLUE, "rte", replace(GLUE["rte"], rows={"train": 2}))
    task = open_task("rte", glue_dir=str(tmp_path))
    assert len(task.examples("train")) == 2 and not task.warnings
    monkeypatch.setitem(GLUE, "rte", replace(GLUE["rte"], rows={"train": 1}))
    task = open_task("rte", glue_dir=str(tmp_path))
    assert len(task.examples("train")) == 2 and "2 rows, more than the official 1" in task.warnings[0]


def parquet_of(root: Path, name: str, split: str) -> list[dict[str, Any]]:
    """The rows of `expected` in the form of nyu-mll/glue."""
    texts = GLUE[name].hub_columns
    rows = []
    for e in expected(name, split):
        label = e.label if e.label is not None else -1.0 if name == "stsb" else -1
        rows.append({**dict(zip(texts, (e.text, e.pair), strict=False)), "label": label, "idx": e.index})
    write_parquet(root / name / f"{split.replace('dev', 'validation')}-00000-of-00001.parquet", rows)
    return rows


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The names of labels are in the files of nyu-mll/glue, whose order is that of `GLUE` anyway.
    names = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["one", "two"]}}}}
    table = pyarrow.Table.from_pylist(list(rows)).replace_schema_metadata({"huggingface": json.dumps(names)})
    pyarrow.parquet.write_table(table, path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_parquet_with_the_columns_of_datasets(tmp_path: Path, name: str) -> None:
    for split in GLUE[name].rows:
        parquet_of(tmp_path, name, split)
        assert glue_task(name, tmp_path).examples(split) == expected(name, split)


def test_shards_of_parquet_are_read_in_order(tmp_path: Path) -> None:
    rows = parquet_of(tmp_path, "rte", "train")
    (tmp_path / "rte/train-00000-of-00001.parquet").unlink()
    write_parquet(tmp_path / "rte/train-00001-of-00002.parquet", rows[1:])
    write_parquet(tmp_path / "rte/train-00000-of-00002.parquet", rows[:1])
    assert glue_task("rte", tmp_path).examples("train") == expected("rte", "train")


def read_from(monkeypatch: pytest.MonkeyPatch, hub: str, cache: Path) -> None:
    """GLUE's name on the Hugging Face hub, and the cache of datasets."""
    monkeypatch.setattr(glue, "HUB", hub)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)


def test_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet_of(tmp_path, "rte", "train")
    parquet_of(tmp_path, "rte", "dev")
    head = "configs:\n- config_name: rte\n  data_files:\n  - split: train\n    path: rte/train-*\n"
    write(tmp_path / "README.md", f"---\n{head}  - split: validation\n    path: rte/validation-*\n---\n")
    read_from(monkeypatch, str(tmp_path), tmp_path / "cache")
    for split in ("train", "dev"):
        assert glue_task("rte", None).examples(split) == expected("rte", split)


def test_datasets_without_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_from(monkeypatch, "nobody/has-this", tmp_path)  # offline: tests/conftest.py
    with pytest.raises(UserError, match=r"could not be read through datasets.*--glue-dir"):
        glue_task("rte", None).examples("train")


GLUE_HEAD = "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tentailment\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index\tsentence1\tsentense2\tlabel\n", r"no column 'sentence2'; did you mean 'sentense2'"),
        ("", r"is empty; its first line must name the columns"),
        (GLUE_HEAD.split("\n")[0], r"holds no example"),
        (GLUE_HEAD + "1\tA\tB\n", r"line 3 has 3 fields, not 4"),
        (GLUE_HEAD + "1\tA\tB\tC\tentailment\n", r"line 3 has 5 fields, not 4"),
        (GLUE_HEAD + "1\tA\tB\tentailed\n", r"line 3: unknown label 'entailed'; did you mean 'entailment'\?"),
        (GLUE_HEAD + "1\tA\tB\t\n", r"line 3 has no label; train needs one"),
        (GLUE_HEAD + "1\t \tB\tentailment\n", r"line 3: the text 'sentence1' is empty"),
        (GLUE_HEAD + "1\tA\0\tB\tentailment\n", r"is binary, not text: a zero byte in line 3"),
        ("PK\x03\x04abc", r"is a zip file, not text"),
    ],
)
def test_errors_in_a_glue_file(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "RTE" / "train.tsv", text)
    with pytest.raises(UserError, match=r"RTE.train\.tsv.*" + message):
        glue_task("rte", tmp_path).examples("train")


def test_scores_of_stsb_must_be_numbers_and_files_text(tmp_path: Path) -> None:
    path = official(tmp_path, "stsb", "train")
    path.write_bytes(path.read_bytes().replace(b"0.000", b"good"))
    with pytest.raises(UserError, match=r"train\.tsv, line 3: the label 'good' is not a number"):
        glue_task("stsb", tmp_path).examples("train")
    path.write_bytes(path.read_bytes().replace("😀".encode(), b"\xff"))
    with pytest.raises(UserError, match=r"train\.tsv is not UTF-8 text \(byte 0xff, line 2\)"):
        glue_task("stsb", tmp_path).examples("train")


def test_missing_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no GLUE folder .*nowhere"):
        glue_task("rte", tmp_path / "nowhere")
    official(tmp_path, "rte", "test")
    with pytest.raises(UserError, match=r"has no folder QNLI; it holds RTE"):
        glue_task("qnli", tmp_path)
    with pytest.raises(UserError, match=r"RTE.train\.tsv does not exist"):
        glue_task("rte", tmp_path).examples("train")
    with pytest.raises(UserError, match=r"unknown split of rte 'dev_matched'"):
        glue_task("rte", tmp_path).examples("dev_matched")
    with pytest.raises(UserError, match=r"unknown task 'mrcp'; did you mean 'mrpc'\?.*YAML"):
        glue_task("mrcp", tmp_path)
    with pytest.raises(UserError, match="rte is a GLUE task and takes no pair; rename the custom task"):
        open_task("rte", glue_dir=str(tmp_path), custom=CustomTaskOptions(pair="b"))


@pytest.mark.parametrize("label", [-1, 2, None, "entailment"])
def test_labels_of_parquet_must_be_label_ids(tmp_path: Path, label: Any) -> None:
    write_parquet(tmp_path / "rte/train.parquet", [{"sentence1": "a", "sentence2": "b", "label": label}])
    with pytest.raises(UserError, match=r"train\.parquet, row 1: the label .* not a whole number from 0 to 1"):
        glue_task("rte", tmp_path).examples("train")
