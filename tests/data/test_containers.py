"""The same text gives the same documents, and is accepted or refused alike, in every file format."""

import csv
import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastbert.data import json_rows, text
from fastbert.data.sources import open_source, source
from fastbert.errors import UserError


def text_file(path: Path, documents: list[str]) -> None:
    path.write_bytes("\n\n".join(documents).encode())


def text_file_of_windows(path: Path, documents: list[str]) -> None:
    content = "\n\n".join(documents).replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + content.encode() + b"\r\n")


def jsonl(path: Path, documents: list[str]) -> None:
    path.write_text("\n".join(json.dumps({"text": one, "n": 1}) for one in documents))


def jsonl_unescaped(path: Path, documents: list[str]) -> None:
    rows = (json.dumps({"text": one}, ensure_ascii=False) for one in documents)
    path.write_bytes("\r\n".join(rows).encode())


def json_array(path: Path, documents: list[str]) -> None:
    path.write_text(json.dumps([{"n": [{}], "text": one} for one in documents], indent=2))


def csv_file(path: Path, documents: list[str]) -> None:
    content = io.StringIO()
    csv.writer(content, quoting=csv.QUOTE_ALL).writerows([("text", ""), *((one, 1) for one in documents)])
    path.write_bytes(content.getvalue().encode())


def spreadsheet(path: Path, documents: list[str], delimiter: str = ";") -> None:
    content = io.StringIO()
    rows = [("number, of it", "text"), *((1, one) for one in documents)]
    csv.writer(content, delimiter=delimiter, lineterminator="\r\n").writerows(rows)
    path.write_bytes(b"\xef\xbb\xbf" + content.getvalue().encode())


def spreadsheet_of_tabs(path: Path, documents: list[str]) -> None:
    spreadsheet(path, documents, "\t")


def parquet(path: Path, documents: list[str]) -> None:
    pq.write_table(pa.table({"n": [1] * len(documents), "text": documents}), path, row_group_size=2)


def gzipped(write: Callable[[Path, list[str]], None]) -> Callable[[Path, list[str]], None]:
    def packed(path: Path, documents: list[str]) -> None:
        write(path, documents)
        path.write_bytes(gzip.compress(path.read_bytes(), 1, mtime=0))

    return packed


CONTAINERS: dict[str, Callable[[Path, list[str]], None]] = {
    "a.txt": text_file,
    "b": text_file_of_windows,
    "c.jsonl": jsonl,
    "d.NDJSON": jsonl_unescaped,
    "e.json": json_array,
    "f.json": jsonl,
    "g.csv": csv_file,
    "h.csv.GZ": gzipped(csv_file),
    "i.parquet": parquet,
    "j.csv": spreadsheet,
    "k.csv": spreadsheet_of_tabs,
}
ODD = [
    "\r\n",
    "\r",
    "\n",
    "\u2028",
    "\x85",
    "\x1c",
    "\ufeff",
    "\t",
    " ",
    '"',
    '""',
    ",",
    ";",
    "\\",
    "a",
    "é",
    "😀",
    "{",
    "#",
]
DOCUMENT = st.lists(st.sampled_from(ODD), max_size=9).map("".join)


def is_one_in_text(document: str) -> bool:
    """Whether a text file can hold it: no blank line in it, as that would end it."""
    lines = document.strip().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return all(line.strip() for line in lines)


def outcome(path: Path) -> list[str] | str:
    try:
        return list(open_source(str(path)).documents())
    except UserError as error:
        return "no text" if "has no text" in str(error) else "refused"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '\ufeff \n[{"text": "a"}]'),
        ("a.jsonl", '{"text": "a", "n": {"text": 1, "n": {"text": 2}}}'),  # "text" is in the row once
        ("a.csv", "n, text \n1,a\n"),
    ],
)
def test_tables_in_common_variants(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert outcome(tmp_path / name) == ["a"]


def test_a_cell_has_no_byte_order_mark() -> None:
    assert text.clean("\ufeff\ufeffa\r\nb\rc\ufeff", "x") == "a\nb\nc\ufeff"


@example(["\r\n\ufeff", " \ufeff a"])
@example(["a" * n + "\r\nb" for n in range(5)])
@example(["a" + " " * 14 + "b"])
@example(['"\n\u2028\ufeff\n\u2028\ufeff\n"', '"\n\u2028\u2028\u2028\u2028"\n"'])
@settings(max_examples=40)
@given(st.lists(DOCUMENT.filter(is_one_in_text) | st.sampled_from(["", " \t", "a\0b"]), min_size=1, max_size=6))
def test_every_container_gives_the_same_documents(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("same")
    ends = [re.sub("^[\\s\ufeff]+", "", one.replace("\r\n", "\n").replace("\r", "\n")).strip() for one in documents]
    want: list[str] | str = [one for one in ends if one] or "no text"
    if any("\0" in one for one in documents):
        want = "refused"
    for name, write in CONTAINERS.items():
        write(folder / name, documents)
    assert {name: outcome(folder / name) for name in CONTAINERS} == dict.fromkeys(CONTAINERS, want)
    # Documents, lines and rows that are longer than what is read or given at a time.
    with patch.multiple(text, PIECE=5), patch.multiple(source, LONGEST_DOCUMENT=6), patch.multiple(json_rows, WINDOW=3):
        found = {name: outcome(folder / name) for name in CONTAINERS}
    assert found == dict.fromkeys(CONTAINERS, found["i.parquet"])
    assert isinstance(want, str) or all(len(one) <= 6 for one in found["i.parquet"])
