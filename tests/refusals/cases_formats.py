"""Files of formats that are not read, and tables with something wrong in them."""

import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def files(folder: Path) -> None:
    texts = {
        "page.html": "<p>text</p>",
        "book.epub": "PK",
        "letter.pdf": "%PDF-1.4",
        "letter.txt": "%PDF-1.4\n",
        "old.txt.bz2": "BZh",
        "files.tar.gz": "",
        "sheet.xlsx": "PK",
        "data.arrow": "ARROW1",
        "weights.safetensors": "",
        "fine.txt": "one\n\ntwo",
        "fine.md": "one\n\ntwo",
        "one.json": '{"rows": [{"text": "a"}]}',
        "pretty.json": '{\n  "rows": [\n    {"text": "a"}\n  ]\n}\n',
        "strings.json": '["a", "b"]',
        "number.json": "12",
        "cut.json": '[{"text": "a"}, {"text": "b',
        "end.json": '[{"text": "a"}',
        "more.json": '[{"text": "a"}] {"text": "b"}',
        "bad.json": '[{"text": "a"}, {"text": oops, "n": 1, "more": "words to read"}]',
        "array.jsonl": '[{"text": "a"}]',
        "null.ndjson": '{"text": "a"}\n{"text": 5}\n',
        "zero.jsonl": '{"text": "a\\u0000b"}',
        "twice.jsonl": '{"text": "a", "text": "b"}',
        "deep.jsonl": '{"text": ' + "[" * 100_000 + "}",
        "digits.jsonl": '{"text": "a", "n": ' + "1" * 5000 + "}",
        "semicolons.csv": "text;label\na;b\n",
        "ragged.csv": 'text,label\n"a\nb",c\nd,e,f\n',
        "open.csv": 'text,label\n"a,b\n',
        "twice.csv": "text,text\na,b\n",
        "empty.csv": "",
        "header.csv": "text,label\n",
        "columns.csv": "body,label\na,b\n",
        "tabs.tsv": "text,label\na,b\n",
        "ragged.tsv": "text\tlabel\na\tb\n\nc\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "inner.txt.gz").write_bytes(gzip.compress(gzip.compress(b"text")))
    (folder / "inner.jsonl.gz").write_bytes(gzip.compress(b"%PDF-1.4"))
    (folder / "packed.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    (folder / "cut.csv.gz").write_bytes(gzip.compress(b"text\na\n" * 1000)[:30])
    (folder / "tar.txt").write_bytes(b"name".ljust(257, b"\0") + b"ustar\0")
    pq.write_table(pa.table({"text": pa.array(["a\0b"])}), folder / "zero.parquet")
    pq.write_table(pa.table({"text": pa.array([b"a"])}), folder / "bytes.parquet")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "a,b.csv").write_text("body\na\n")


def prepare(source: str, *, more: str = "") -> str:
    return f"prepare --out new --source {source} {more}"


CASES = [
    (prepare("packed.parquet.gz"), "Parquet cannot be read through .gz and is compressed inside; unpack it"),
    (prepare("page.html"), "page.html is HTML by its suffix .html, which is not read; extract its text first"),
    (prepare("book.epub"), "book.epub is a formatted document by its suffix .epub"),
    (prepare("letter.pdf"), "convert it to text first, for example with pandoc or pdftotext"),
    (prepare("letter.txt"), "letter.txt is a PDF file, not text"),
    (prepare("old.txt.bz2"), "unpack it, or compress it with gzip, xz or zstd"),
    (prepare("files.tar.gz"), "files.tar.gz is an archive by its suffix .tar, which is not read; unpack it"),
    (prepare("sheet.xlsx"), "write its rows as .parquet, .jsonl or .csv first"),
    (prepare("data.arrow"), "a folder that datasets saved is given as hf:FOLDER"),
    (prepare("weights.safetensors"), "give text, or a table with a column of text"),
    (prepare("inner.txt.gz"), "inner.txt.gz is a gzip file inside .gz, not text"),
    (prepare("inner.jsonl.gz"), "inner.jsonl.gz is a PDF file inside .gz, not text"),
    (prepare("tar.txt"), "tar.txt is a tar file, not text"),
    (prepare("cut.csv.gz"), "cut.csv.gz is cut off, damaged or not a .gz file"),
    (prepare("-"), "- would be standard input, which can be read only once; write it into a file first"),
    (prepare("fine.txt,-"), "- would be standard input"),
    (prepare("/dev/zero"), "/dev/zero is a pipe or a device, not a file; write its content to a file first"),
    (prepare("pipe.jsonl"), "pipe.jsonl is a pipe or a device, not a file"),
    (prepare("fine.txt", more="--column body"), "is text without columns; leave out --column body"),
    (prepare("one.json"), "one.json, line 1 has no column 'text'; known: rows; choose with --column, or a .json file"),
    (prepare("pretty.json"), "pretty.json, line 1 is not JSON"),
    (prepare("pretty.json"), "a .json file must be an array of objects, or have an object on each line (jq -c"),
    (prepare("strings.json"), "strings.json, row 1 is a JSON string, not an object"),
    (prepare("number.json"), "number.json, line 1 is a JSON number, not an object; a .json file must be an array"),
    (prepare("cut.json"), "cut.json, row 2 is cut off"),
    (prepare("end.json"), "end.json ends after row 1, within the array; it is cut off: fetch it again"),
    (prepare("more.json"), "more.json is not JSON: '{' follows the end of its array"),
    (prepare("bad.json"), "bad.json, row 2 is not JSON (Expecting value)"),
    (
        prepare("array.jsonl"),
        "line 1 is a JSON list, not an object; write an object on each line; an array of objects is",
    ),
    (prepare("null.ndjson"), "null.ndjson, line 2: the column 'text' is of type int, not text; choose with --column"),
    (prepare("zero.jsonl"), "zero.jsonl, line 1: a zero character (NUL) in the text"),
    (prepare("zero.parquet"), "zero.parquet, row 1: a zero character (NUL) in the text"),
    (prepare("twice.jsonl"), "twice.jsonl, line 1 has 'text' twice; leave one of them out"),
    (prepare("deep.jsonl"), "deep.jsonl, line 1 is not JSON (nested too deeply)"),
    (prepare("digits.jsonl"), "digits.jsonl, line 1 is not JSON (Exceeds the limit"),
    (
        prepare("semicolons.csv", more="--column body"),
        "semicolons.csv, line 1 has no column 'body'; known: label, text",
    ),
    (prepare("ragged.csv"), "ragged.csv, line 4 has 3 fields, not 2; fix the row (double quotes go around"),
    (prepare("open.csv"), "open.csv, line 2 is not CSV: unexpected end of data"),
    (prepare("twice.csv"), "twice.csv, line 1: 2 columns are called 'text'; rename one"),
    (prepare("empty.csv"), "empty.csv is empty; its first line must name the columns"),
    (prepare("header.csv"), "source 'header.csv' has no text"),
    (prepare("columns.csv"), "columns.csv, line 1 has no column 'text'; known: body, label; choose with --column"),
    (prepare("a,b.csv"), "a,b.csv, line 1 has no column 'text'; known: body; choose with --column"),
    (prepare("tabs.tsv"), "its header has no tab; rename it to .csv, in which other delimiters"),
    (prepare("ragged.tsv"), "ragged.tsv, line 4 has 1 field, not 2; fix the row (a TSV is read without quoting"),
    (prepare("bytes.parquet"), "bytes.parquet: the column 'text' is binary, not text"),
    ("pretrain --data page.html --steps 2 --out new", "page.html is HTML by its suffix"),
    ("predict --model . --out new --source page.html", "page.html is HTML by its suffix"),
    ("evaluate --model . --source page.html", "page.html is HTML by its suffix"),
    ("evaluate --model . --source -", "- would be standard input"),
    (
        "finetune --model . --out new --task mine --custom.train fine.txt",
        "fine.txt: the suffix must be that of the file",
    ),
    ("finetune --model . --out new --task mine --custom.train -", "- would be standard input"),
    ("finetune --model . --out new --task mine --custom.dev pipe.jsonl", "pipe.jsonl is a pipe or a device"),
    ("predict --model . --out new --source fine.md", "fine.md: the suffix must be that of the file"),
    ("predict --model . --out new --source -", "- would be standard input"),
    ("predict --model . --out new --source pipe.jsonl", "pipe.jsonl is a pipe or a device, not a file"),
]
