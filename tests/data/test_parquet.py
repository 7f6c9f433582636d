"""Parquet as a source: rows are documents for any layout of the file, and memory does not grow with its size."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastbert.data.sources import open_source, source
from fastbert.errors import UserError

TEXT = st.characters(codec="utf-8", exclude_characters="\0")
ROWS = ["First line\nsecond line", "Zwölf Boxkämpfer 😀", "last"]


def write(path: Path, rows: list[str | None], kind: pa.DataType | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"id": list(range(len(rows))), "text": pa.array(rows, kind or pa.string())}), path, **options
    )
    return path


def read(spec: object, column: str = "text") -> list[str]:
    return list(open_source(str(spec), column).documents())


def error_of(spec: object, column: str = "text") -> str:
    with pytest.raises(UserError) as caught:
        read(spec, column)
    return str(caught.value)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_every_type_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    assert read(write(tmp_path / "a.parquet", ROWS, kind)) == ROWS


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30),
        min_size=1,
        max_size=200,
    ),
    st.integers(1, 50),
    st.booleans(),
)
def test_rows_are_documents_in_order(tmp_path: Path, rows: list[str | None], group: int, dictionary: bool) -> None:
    path = write(tmp_path / "a.parquet", rows, row_group_size=group, use_dictionary=dictionary)
    column = pq.read_table(path)["text"].to_pylist()
    ends = re.compile("\r\n?")
    want = [re.sub("^[\\s\ufeff]+", "", ends.sub("\n", text)).strip() for text in column if text is not None]
    want = [text for text in want if text]
    if want:
        found = open_source(str(path))
        assert list(found.documents()) == want
        assert 0 < found.position <= found.size == path.stat().st_size
    else:
        assert "has no text" in error_of(path)


def test_another_column_and_a_long_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": [1], "body": ["a bc " * 10]}), tmp_path / "a.parquet")
    monkeypatch.setattr(source, "LONGEST_DOCUMENT", 20)
    assert read(tmp_path / "a.parquet", "body") == ["a bc a bc a bc a bc", "a bc a bc a bc a bc", "a bc a bc"]


def test_globs_lists_and_folders(tmp_path: Path) -> None:
    for name in ("d/b.parquet", "d/a.PARQUET", "d/e/c.parquet", "d/_temporary/x.parquet", "d/.y.parquet"):
        write(tmp_path / name, [name])
    (tmp_path / "d" / "README.md").write_text("notes")
    folder = tmp_path / "d"
    assert read(folder) == ["d/a.PARQUET", "d/b.parquet", "d/e/c.parquet"]
    assert read(f"{folder}/*.parquet") == ["d/b.parquet"]
    assert read(f"{folder}/b.parquet, {folder}/a.PARQUET") == ["d/b.parquet", "d/a.PARQUET"]
    assert "names" in error_of(f"{folder},{folder}/b.parquet") and "twice" in error_of(f"{folder},{folder}/b.parquet")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    text = "x" * 10_000
    for name, rows, group in (("many groups", 4_000, 100), ("one group", 4_000, 4_000)):
        path = write(
            tmp_path / "a.parquet",
            [f"{n} {text}" for n in range(rows)],
            row_group_size=group,
            use_dictionary=False,
            compression="none",
        )
        assert path.stat().st_size > 40e6
        before, most = pa.total_allocated_bytes(), 0
        for _ in open_source(str(path)).documents():
            most = max(most, pa.total_allocated_bytes() - before)
        assert 0 < most < 16e6, name


def test_reading_is_lazy(tmp_path: Path) -> None:
    """Reading the beginning does not encounter damage at the end."""
    path = write(tmp_path / "a.parquet", [f"{n}" * 1000 for n in range(2_000)], row_group_size=100, compression="none")
    data = bytearray(path.read_bytes())
    middle = len(data) * 3 // 4
    data[middle : middle + 100_000] = b"\xff" * 100_000
    path.write_bytes(data)
    documents = open_source(str(path)).documents()
    assert next(documents) == "0" * 1000
    with pytest.raises(UserError, match=r"damaged|is not UTF-8"):
        list(documents)


def test_unsuitable_columns_are_refused_when_opened(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ROWS)
    path = write(tmp_path / "b.parquet", ROWS)
    for column, message in (
        ("texts", "has no column 'texts'; did you mean 'text'? known: id, text; choose with --column"),
        ("id", "the column 'id' is int64, not text; choose with --column; columns: id (int64), text (string)"),
    ):
        with pytest.raises(UserError) as caught:
            open_source(str(path), column)
        assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    pq.write_table(pa.table({"text": pa.array([["a"], ["b"]])}), path)
    with pytest.raises(UserError, match=r"b.parquet: the column 'text' is list<\w+: string>, not text"):
        open_source(str(tmp_path / "*.parquet"))
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), path)
    assert "2 columns are called 'text'" in error_of(path)
    pq.write_table(pa.table({"text": pa.array([b"a"], pa.binary())}), path)
    assert "the column 'text' is binary, not text" in error_of(path)


def test_damaged_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ROWS * 500)
    data = path.read_bytes()
    for content in (data[: len(data) // 2], b"", b"no such thing"):
        path.write_bytes(content)
        assert str(path) in error_of(path) and "is cut off, damaged or not a Parquet file" in error_of(path)
    path.write_bytes(data.replace(b"text", b"\x8eext"))
    assert "is cut off, damaged or not a Parquet file ('utf-8' codec can't decode" in error_of(path)
    (tmp_path / "a.txt").write_bytes(data)
    assert "is a Parquet file, not text" in error_of(tmp_path / "a.txt")
    (tmp_path / "b.parquet.gz").write_bytes(data)
    assert "Parquet cannot be read through .gz and is compressed inside; unpack it" in error_of(
        tmp_path / "b.parquet.gz"
    )


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    bad = pa.array([b"fine", b"d\xe9j\xe0"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    assert "a row between 1 and 2 is not UTF-8 text" in error_of(tmp_path / "a.parquet")
