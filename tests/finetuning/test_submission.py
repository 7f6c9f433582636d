"""The archive has what GLUE's server requires, and the validator finds every error, by file and line."""

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.errors import UserError
from fastbert.finetuning.glue import GLUE
from fastbert.finetuning.submission import FILES, validate, write_submission

SERVER = {  # file -> official test rows, label words
    "CoLA.tsv": (1063, ["0", "1"]),
    "SST-2.tsv": (1821, ["0", "1"]),
    "MRPC.tsv": (1725, ["0", "1"]),
    "STS-B.tsv": (1379, []),
    "MNLI-m.tsv": (9796, ["entailment", "neutral", "contradiction"]),
    "MNLI-mm.tsv": (9847, ["entailment", "neutral", "contradiction"]),
    "QNLI.tsv": (5463, ["entailment", "not_entailment"]),
    "QQP.tsv": (390965, ["0", "1"]),
    "RTE.tsv": (3000, ["entailment", "not_entailment"]),
    "WNLI.tsv": (146, ["0", "1"]),
    "AX.tsv": (1104, ["entailment", "neutral", "contradiction"]),
}
ROWS = 4


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """GLUE with four rows in every test split."""
    for name, task in GLUE.items():
        monkeypatch.setitem(GLUE, name, replace(task, rows={split: ROWS for split in task.rows}))


def official(rows: Callable[[str], int] = lambda file: ROWS) -> dict[str, dict[str, list]]:
    """Predictions that cycle through all labels, and for STS-B numbers in and around the range of the scores."""
    predictions: dict[str, dict[str, list]] = {}
    for file, (name, split) in FILES.items():
        words = SERVER[file][1] or [-0.5, 0.12345, 4.99951, 7]
        predictions.setdefault(name, {})[split] = [words[row % len(words)] for row in range(rows(file))]
    return predictions


def read(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def spoil(path: Path, file: str, change: Callable[[str], str | bytes | None]) -> Path:
    """A copy of the archive with one file changed, or removed."""
    contents: dict[str, str | bytes | None] = {**read(path)}
    contents[file] = change(contents.get(file, ""))
    with zipfile.ZipFile(path.with_name("spoilt.zip"), "w") as archive:
        for name, text in contents.items():
            if text is not None:
                archive.writestr(name, text)
    return path.with_name("spoilt.zip")


def made(path: Path, *predictions: dict, **more: bool) -> Path:
    """`path`, written."""
    write_submission(path, *predictions, **more)
    return path


def test_the_whole_archive_with_the_official_rows(tmp_path: Path) -> None:
    path, expected = tmp_path / "glue.zip", {file: rows for file, (rows, _) in SERVER.items()}
    assert write_submission(path, official(lambda file: SERVER[file][0])) == expected == validate(path)
    contents = read(path)
    assert list(contents) == list(SERVER)
    for file, (rows, words) in SERVER.items():
        head, *lines = contents[file].removesuffix("\n").split("\n")
        assert head == "index\tprediction" and len(lines) == rows
        assert lines[0].startswith("0\t") and lines[-1].startswith(f"{rows - 1}\t")
        if words:
            assert [line.split("\t")[1] for line in lines[: len(words)]] == words


def test_scores_are_clipped_and_rounded_and_bytes_repeat(tmp_path: Path, short: None) -> None:
    path = made(tmp_path / "glue.zip", official())
    assert read(path)["STS-B.tsv"] == "index\tprediction\n0\t0.000\n1\t0.123\n2\t5.000\n3\t5.000\n"
    assert validate(path) == dict.fromkeys(SERVER, ROWS)
    assert made(tmp_path / "again.zip", official()).read_bytes() == path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        assert {(entry.date_time, entry.external_attr >> 16) for entry in entries} == {((1980, 1, 1, 0, 0, 0), 0o644)}
        archive.extractall(tmp_path / "unpacked")
    assert validate(tmp_path / "unpacked") == validate(path)


@settings(max_examples=50)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_score_passes(tmp_path_factory: pytest.TempPathFactory, score: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, task in GLUE.items():
            patch.setitem(GLUE, name, replace(task, rows={split: 1 for split in task.rows}))
        folder = tmp_path_factory.mktemp("archive")
        path = made(folder / "glue.zip", {"stsb": {"test": [score]}}, fill_missing=True)
        validate(path)
        written = float(read(path)["STS-B.tsv"].split()[-1])
        assert abs(written - min(max(score, 0), 5)) <= 0.0005001


def test_missing_tasks_are_filled_in_only_on_request(tmp_path: Path, short: None) -> None:
    predictions = official()
    del predictions["rte"], predictions["mnli"]["test_mismatched"], predictions["stsb"]
    with pytest.raises(UserError, match=r"no predictions for STS-B\.tsv, MNLI-mm\.tsv, RTE\.tsv, .* majority label"):
        write_submission(tmp_path / "glue.zip", predictions)
    assert not (tmp_path / "glue.zip").exists()
    path = tmp_path / "glue.zip"
    assert write_submission(path, predictions, fill_missing=True) == dict.fromkeys(SERVER, ROWS) == validate(path)
    assert read(path)["RTE.tsv"].count("\tentailment\n") == ROWS
    assert read(path)["STS-B.tsv"].count("\t2.701\n") == ROWS
    assert read(path)["MNLI-m.tsv"].count("\tneutral\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rte": {"test": ["entailment"] * 3}}, r"RTE\.tsv: 3 predictions, and rte's test has 4 rows"),
        (
            {"rte": {"test": ["entailment"] * 3 + ["1"]}},
            r"RTE\.tsv, prediction 3: '1' is not a label; .*known: entailment",
        ),
        ({"cola": {"test": [0, 1, 2, 0]}}, r"CoLA\.tsv, prediction 2: 2 is not a label"),
        ({"stsb": {"test": [1, 2, 3, float("nan")]}}, r"STS-B\.tsv, prediction 3: nan is not a finite number"),
        ({"stsb": {"test": [1, "good", 3, 4]}}, r"STS-B\.tsv, prediction 1: 'good' is not a finite number"),
        ({"mnli": {"test": ["neutral"] * 4}}, r"unknown test split of mnli 'test'; .*test_matched"),
        ({"snli": {"test": ["neutral"] * 4}}, r"unknown GLUE task 'snli'; did you mean"),
    ],
)
def test_invalid_predictions(tmp_path: Path, short: None, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_submission(tmp_path / "glue.zip", official() | change)
    assert not (tmp_path / "glue.zip").exists()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("RTE.tsv", lambda text: None, r"spoilt\.zip/RTE\.tsv is missing"),
        ("Rte.tsv", lambda text: "x", r"spoilt\.zip/Rte\.tsv does not belong in a submission"),
        ("RTE.tsv", lambda text: text.replace("index", "id"), r"RTE\.tsv, line 1: the header must be .* not 'id.t"),
        ("RTE.tsv", lambda text: text.split("\n", 1)[1], r"RTE\.tsv, line 1: the header must be"),
        ("RTE.tsv", lambda text: "", r"RTE\.tsv, line 1: the header must be .* not ''"),
        ("RTE.tsv", lambda text: text.replace("2\t", "3\t"), r"RTE\.tsv, line 4: the index must be 2, not '3'"),
        (
            "RTE.tsv",
            lambda text: text.replace("1\tnot_", "1\tNot_"),
            r"RTE\.tsv, line 3: 'Not_entailment' is not a label",
        ),
        ("CoLA.tsv", lambda text: text.replace("3\t1", "3\t1.0"), r"CoLA\.tsv, line 5: '1\.0' is not a label"),
        ("CoLA.tsv", lambda text: text.replace("3\t1", "3 1"), r"CoLA\.tsv, line 5: 1 fields, not index and"),
        ("QQP.tsv", lambda text: text[:-4], r"QQP\.tsv, line 5: the file ends after 3 of 4 rows"),
        ("QQP.tsv", lambda text: text + "4\t0\n", r"QQP\.tsv, line 6: more than the 4 official rows"),
        (
            "STS-B.tsv",
            lambda text: text.replace("0.123", "5.1"),
            r"STS-B\.tsv, line 3: '5\.1' is not a number from 0 to 5",
        ),
        ("STS-B.tsv", lambda text: text.replace("0.123", "nan"), r"STS-B\.tsv, line 3: 'nan' is not a number"),
        ("STS-B.tsv", lambda text: text.replace("0.123", "high"), r"STS-B\.tsv, line 3: 'high' is not a number"),
        ("AX.tsv", lambda text: text.encode("utf-16"), r"AX\.tsv is not UTF-8 text: it is UTF-16"),
        ("AX.tsv", lambda text: b"\xff\xd8\x01\x02", r"AX\.tsv is not UTF-8 text: it is binary"),
    ],
)
def test_the_validator_names_file_and_line(
    tmp_path: Path, short: None, file: str, change: Callable, message: str
) -> None:
    path = spoil(made(tmp_path / "glue.zip", official()), file, change)
    with pytest.raises(UserError, match=message) as caught:
        validate(path)
    assert len(str(caught.value).split("\n")) == 1


def test_the_validator_names_every_file_that_is_wrong(tmp_path: Path, short: None) -> None:
    path = spoil(made(tmp_path / "glue.zip", official()), "RTE.tsv", lambda text: None)
    path = spoil(path.rename(tmp_path / "other.zip"), "folder/RTE.tsv", lambda text: "index\tprediction\n")
    with pytest.raises(UserError, match=r"folder/RTE\.tsv does not belong.*\n.*RTE\.tsv is missing"):
        validate(path)


def test_archives_that_cannot_be_read(tmp_path: Path, short: None) -> None:
    with pytest.raises(UserError, match=r"no submission .*nothing\.zip; give a zip"):
        validate(tmp_path / "nothing.zip")
    (tmp_path / "text.zip").write_text("index\tprediction\n")
    with pytest.raises(UserError, match=r"text\.zip is damaged or not a zip file"):
        validate(tmp_path / "text.zip")
    path = made(tmp_path / "glue.zip", official())
    data = bytearray(path.read_bytes())
    data[data.index(b"CoLA.tsv") + 12] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"glue\.zip is damaged or not a zip file"):
        validate(path)
