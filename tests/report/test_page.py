"""HTML that shows any text as text, and tables that are never cut."""

import html
import json
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from fastbert.errors import printable
from fastbert.report.page import (
    Table,
    bullets,
    code,
    excerpt,
    fold,
    heading,
    html_page,
    paragraph,
    script_json,
    warning,
)

HOSTILE = "<script>alert(1)</script>\"'&amp;\u202egnp.exe\x1b[31m</td></title>"


HOSTILE_NAME = "<script>alert(1)<script>\"'&amp;<img src=x onerror=alert(2)>"
"""A name that a folder can have."""


class Texts(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text().filter(lambda text: "`" not in text))
def test_any_text_is_shown_as_text(text: str) -> None:
    shown = "\n".join(map(printable, text.split("\n")))
    for build in (heading, paragraph, warning, excerpt, lambda text: bullets([text])):
        page = Texts(build(text))
        assert page.text.strip("\n") == shown.strip("\n") and "script" not in page.tags
    table = Texts(Table([text], [[text]]).html())
    assert table.text.count(shown) >= 2 or not shown.strip()


def test_a_hostile_name_changes_nothing_of_the_page() -> None:
    body = heading(HOSTILE) + fold(HOSTILE, Table([HOSTILE, "n"], [[HOSTILE, "1.5"]]).html())
    hostile, harmless = (Texts(html_page(name, body.replace("1.5", name[:0] + "1.5"))) for name in (HOSTILE, "a name"))
    assert hostile.tags == harmless.tags and "script" not in hostile.tags
    assert "\\u202egnp.exe\\x1b[31m" in hostile.text and "<script>alert(1)</script>" in hostile.text


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_data_in_a_script_is_json_that_cannot_end_it(value: object) -> None:
    text = script_json(value)
    assert json.loads(text) == value and not set("<>&") & set(text)


def test_what_is_not_finite_is_null_in_a_script() -> None:
    assert script_json([float("nan"), float("inf"), 1.0, "</script><!--"]) == (
        '[null,null,1.0,"\\u003c/script\\u003e\\u003c!--"]'
    )


def test_a_page_may_load_nothing() -> None:
    static, scripted = html_page("a", ""), html_page("a", "", ["1;"], "fastbert report")
    assert "default-src 'none'" in static and "script-src" not in static
    assert "script-src 'unsafe-inline'" in scripted and '<meta name="generator" content="fastbert report">' in scripted


def test_numbers_are_aligned_and_long_texts_wrapped_in_a_container_that_scrolls() -> None:
    html = Table(["name", "loss"], [["a", "1.50"], ["b" * 41, "-3.1e-05"]]).html()
    assert html.startswith('<div class="scroll"') and html.count("class=number") == 3 and html.count("class=long") == 1


def test_headings_of_a_wide_table_are_broken_in_a_terminal() -> None:
    head = ["variant", "steps before annealing", "x" * 60, "self-paced part"]
    assert Table(head[:2], [["a", "12"]]).plain() == "variant  steps before annealing\na                            12"
    lines = Table(head, [["multiple-choice", "12", "y", "10.0 of 20.0 %"], ["b", "7", "y", "–"]]).plain().splitlines()
    assert lines == [
        "                     steps",
        f"                    before  {' ' * 60}  self-paced",
        f"variant          annealing  {'x' * 60}  part",
        f"multiple-choice         12  y{' ' * 59}  10.0 of 20.0 %",
        f"b                        7  y{' ' * 59}  –",
    ]


def test_code_with_backticks() -> None:
    for line in ("a `b` <i> | c", "`", "x``y", "echo `date`", "plain", "``` ``"):
        assert (
            paragraph(f"see {code(line)} and `d`") == f"<p>see <code>{html.escape(line)}</code> and <code>d</code></p>"
        )
    assert code("") == "" and paragraph("a ` b") == "<p>a ` b</p>"
