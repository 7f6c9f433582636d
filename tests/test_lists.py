"""Commas between names, and in them."""

import csv
import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert.errors import UserError
from fastbert.lists import paths, words

NAME = st.text("a ,\"'.", min_size=1).map(str.strip).filter(bool)


def test_words_are_separated_by_commas() -> None:
    assert words(" a,b ,c d") == ["a", "b", "c d"]
    assert words('"Zwölf, 12", no') == ["Zwölf, 12", "no"]
    assert words(" ") == []
    for text in ('"a', '"a"b,c'):
        with pytest.raises(UserError, match="put double quotes around a name with a comma"):
            words(text)


@given(st.lists(NAME))
def test_words_are_read_as_csv_writes_them(names: list[str]) -> None:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(names)
    assert words(line.getvalue()) == names


def test_paths_that_exist_may_have_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "a,b", "c, d", ",e", " f", "1,2,3,4,5,6,7,8,9,10,11"):
        Path(name).touch()
    assert paths("a,x", os.path.exists) == ["a", "x"]
    assert paths("a,b", os.path.exists) == ["a,b"]
    assert paths("b,a,b, a,b,c, d", os.path.exists) == ["b", "a,b", "a,b", "c, d"]
    assert paths("a, f", os.path.exists) == ["a", " f"]
    assert paths("a,,e,b", os.path.exists) == ["a", ",e", "b"]
    assert paths("1,2,3,4,5,6,7,8,9,10,11", os.path.exists) == ["1,2,3,4,5,6,7,8,9,10,11"]
    assert paths(" , ", os.path.exists) == []


@pytest.mark.parametrize("text", ["a,", ",a", "a,,b", "a, ,b"])
def test_a_comma_without_a_name_is_refused(text: str) -> None:
    for read in (words, lambda text: paths(text, lambda _: False)):
        with pytest.raises(UserError, match="has no name before or after one of its commas; leave out that comma"):
            read(text)


def test_a_list_of_paths_asks_for_few_of_them() -> None:
    asked: list[str] = []
    assert len(paths("a" + ",a" * 999, lambda name: bool(asked.append(name)))) == 1000
    assert len(asked) < 25_000
