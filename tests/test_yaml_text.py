"""Options in YAML: equal to `yaml.safe_load` where that is exact, refused by the line where it is not."""

from itertools import pairwise

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.config import from_dict
from fastbert.errors import UserError
from fastbert.pretraining.options import PretrainOptions
from fastbert.yaml_text import MOST_VALUES, parse_yaml

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60)
@given(VALUES, st.booleans())
def test_what_yaml_writes_is_read_equal(value, flow: bool) -> None:
    text = yaml.safe_dump(value, default_flow_style=flow)
    assert parse_yaml(text, "x.yaml") == yaml.safe_load(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "# nothing", "~", "a", "--- a", "a: !!str 5", "a: !!int 5", "a: yes", "a: .5", "a: '010'"),
        "a: &x {b: 1}\nc: {<<: *x, d: 2}\ne: [*x, *x]",
        "a: &x {b: 1, c: 2}\nd: {c: 3, <<: [{b: 4}, *x]}",
        "a: >\n  folded\n  text\nb: |\n  literal\n  lines\n",
    ],
)
def test_texts_that_mean_what_they_do_elsewhere(text: str) -> None:
    assert parse_yaml(text, "x.yaml") == yaml.safe_load(text)


def test_dates_are_text() -> None:
    assert parse_yaml("a: 2024-01-01\nb: =", "x.yaml") == {"a": "2024-01-01", "b": "="}


LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmno"))

CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: a is given twice, first in line 1"),
        ("a: {b: 1, b: 2}", "line 1: b is given twice"),
        ("a: 010", "line 1: '010' would be read as a binary, octal"),
        ("a: 0x10", "'0x10' would be read as"),
        ("a: 1_000", "line 1: '1_000' has an underscore; write 1000, or put text in quotes"),
        ("a: -1_0.5", "'-1_0.5' has an underscore; write -10.5"),
        ("a: 0x1_0", "'0x1_0' would be read as a binary"),
        ("a: 1:30", "'1:30' would be read as"),
        ("a: 1:30.5", "'1:30.5' would be read as minutes and seconds"),
        ("a: 1\n2024: 3", "line 2: the key 2024 is not text; put it in quotes"),
        ("no: 3", "the key no is not text; put it in quotes"),
        ("? [a]\n: 3", "line 1: a key is a list"),
        ("a: !!python/object/apply:os.system [x]", "the tag !!python/object/apply:os.system is not"),
        ("a: !!binary aGk=", "the tag !!binary is not allowed"),
        ("a: !!set {x}", "is not allowed in options"),
        ("a: !!int x", "'x' is not a number"),
        ("a: &x [*x]", "line 1: an alias is inside the value that it refers to"),
        ("a: *x", "line 1, column 4: found undefined alias"),
        ("<<: 3", "<< takes a mapping"),
        ("a: 1\n---\nb: 2", "line 2, column 1: but found another document"),
        ("a: " + "9" * 5000, r"the number 9{200}\.\.\. is too large"),
        (f"a: {2**64}", "is too large"),
        ("a: .\nb: " + "[" * 10_000, "line 2: more than 32 lists and mappings inside each other"),
        (CHAIN, "more than 32 lists and mappings inside each other"),
        (LAUGHS, f"more than {MOST_VALUES:,} values"),
        ("[" + "1," * MOST_VALUES + "]", f"more than {MOST_VALUES:,} values"),
        ("a: [1", "is not valid YAML: line 1, column 6: expected"),
        ("a:\n\tb: 1", "is not valid YAML: line 2, column 1: found character"),
        ('a: "\\UFFFFFFFF"', "is not valid YAML: line 1: no such character"),
        ("%YAML 1." + "9" * 5000 + "\n---\na: 1", "is not valid YAML: line 1: no such character or version"),
        ("a: 1\nb: \x07", r"is not valid YAML: line 2: the character U\+0007 is not allowed"),
        ('a: "\\0"', r"a text contains the character U\+0000"),
        ('a: "\\ud800"', r"a text contains the character U\+D800"),
    ],
)
def test_refused_by_its_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^x\.yaml.*{message}") as refused:
        parse_yaml(text, "x.yaml")
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


def test_an_option_with_a_hyphen_and_an_underscore_is_given_twice() -> None:
    with pytest.raises(UserError, match=r"x\.yaml: batch_size is given twice"):
        from_dict(PretrainOptions, {"batch-size": 8, "batch_size": 16}, "x.yaml")
