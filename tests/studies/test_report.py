"""The report: figures that are those of the rows, Markdown and a page that needs no network."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastbert.report.page import Table
from fastbert.studies.shared.comparison import Comparison
from fastbert.studies.shared.report import ReportPage
from fastbert.studies.sweep.sweep_report import printed_scores, write_sweep_report
from tests.studies.test_comparison import row, rows_of

PNG = b"\x89PNG\r\n"


class Page(HTMLParser):
    """Tags that are open and never closed, addresses, and the texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.texts.append(data)


def test_a_report_of_blocks(tmp_path) -> None:
    (tmp_path / "drawing.png").write_bytes(PNG + b"and so on")
    report = ReportPage("A < B & C")
    report.heading("First")
    report.text("Between `code <x>` and <b>text</b>.")
    report.points(["one", "two"])
    report.table(Table(["name", "value", "verdict"], [["a|b", "1.50", "undecided"], ["c", "-10", "–"]]))
    report.code("x < y")
    report.image("drawing.png", 'a "drawing"')
    report.write(tmp_path, {"commit": "abc"})
    markdown = (tmp_path / "report.md").read_text()
    assert markdown.startswith("# A < B & C\n\n## First\n\nBetween `code <x>`")
    assert "| name | value | verdict   |\n| ---- | ----: | --------- |\n| a\\|b |  1.50 | undecided |" in markdown
    assert '![a "drawing"](drawing.png)' in markdown and "- one\n- two" in markdown
    page = Page((tmp_path / "report.html").read_text())
    assert not page.open
    (address,) = page.addresses
    assert address == "data:image/png;base64,iVBORw0KYW5kIHNvIG9u"  # no network, no file beside
    assert "Between " in page.texts and "code <x>" in page.texts and "a|b" in page.texts
    assert "<b>text</b>." in " ".join(page.texts)  # text, not markup


@pytest.fixture
def comparison() -> Comparison:
    """Two settings, three seeds; Matthews below zero on cola; a custom task with one setting."""
    rows = rows_of("first", {1e-5: [-0.10, -0.12, -0.11], 2e-5: [-0.2, -0.3, -0.4]})
    rows += rows_of("other", {1e-5: [0.2, 0.3, 0.41], 2e-5: [0.5, 0.51, 0.52]})
    rows += rows_of("first", {1e-5: [0.6, 0.61, 0.62]}, "own") + rows_of("other", {1e-5: [0.6, 0.62, 0.61]}, "own")
    return Comparison(rows, ["first", "other"], ["cola", "own"])


def test_the_figures_of_a_sweep(comparison, tmp_path) -> None:
    write_sweep_report(tmp_path, "glue", comparison, [], 18, {"machine": "one"})
    lines = (tmp_path / "report.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    scores = {(c[0], c[2]): c[3:] for c in cells if len(c) == 12}
    #                                  train  setting      tried seeds median   mean      std     max      last
    assert scores["cola", "first"] == ["100", "1e-05, 16, 3", "2", "3", "-11.00", "-11.00", "1.00", "-10.00", "-21.00"]
    assert scores["cola", "other"] == ["100", "2e-05, 16, 3", "2", "3", "51.00", "51.00", "1.00", "52.00", "41.00"]
    compared = {c[0]: c[1:] for c in cells if len(c) == 10}
    # At 1e-5 the medians are -0.11 and 0.3, at 2e-5 -0.3 and 0.51: the second is higher together.
    assert compared["cola"][:4] == ["2e-05, 16, 3", "3", "+81.00", "[+53.67, +108.33]"]
    assert compared["cola"][6:] == ["0.250", "0.500", "other higher, by the t-test alone"]
    assert compared["own"][-1] == "undecided"
    text = " ".join(lines)
    limit = "with 3 seeds it cannot be less than 0.25 (0.5 adjusted over 2)"
    assert limit in text and limit in printed_scores(comparison).replace("\n", " ") and "Trials are equal" in text
    assert "18 of 18 jobs have finished" in text
    tried = [c for c in cells if c[0] == "2e-05, 16, 3" and len(c) == 3]
    assert tried == [["2e-05, 16, 3", "-30.00 ± 10.00", "51.00 ± 1.00, best"]]
    images = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert images == ["scores.png", "differences.png", "settings.png"]
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in images)
    page = Page((tmp_path / "report.html").read_text())
    assert not page.open and [a[:22] for a in page.addresses] == ["data:image/png;base64,"] * 3
    shown = printed_scores(comparison)
    assert "51.00" in shown and "other higher, by the t-test alone" in shown and max(map(len, shown.splitlines())) < 110


def test_every_seed_is_drawn(comparison, tmp_path, monkeypatch) -> None:
    drawn = {}
    for name in ("draw_scores", "draw_settings"):
        monkeypatch.setattr(
            f"fastbert.studies.shared.plots.{name}",
            lambda path, panels, _, name=name: (drawn.update({name: panels}), path.write_bytes(PNG)),
        )
    write_sweep_report(tmp_path, "glue", comparison, [], 18, {})
    assert drawn["draw_scores"]["cola"]["other"] == pytest.approx([50.0, 51.0, 52.0])
    assert drawn["draw_scores"]["cola"]["first"] == pytest.approx([-10.0, -12.0, -11.0])
    assert drawn["draw_settings"]["cola"]["1e-05, 16, 3"]["other"] == pytest.approx([20.0, 30.0, 41.0])


def test_what_is_missing_is_said(comparison, tmp_path) -> None:
    rows = [r for one in comparison.trials.values() for found in one.settings.values() for r in found]
    failed = row("other", 0, 0.0, rate=2e-5) | {"status": "failed", "reason": "it ran out of memory"}
    rows = [r for r in rows if r["id"] != failed["id"]]
    write_sweep_report(tmp_path, "glue", Comparison(rows, ["first", "other"], ["cola", "own"]), [failed], 18, {})
    text = (tmp_path / "report.md").read_text()
    assert "17 of 18 jobs have finished, 1 failed" in text and "it ran out of memory" in text
    assert "NOT" in text and "Trials are equal" not in text and "Not compared" not in text
    rows = [r for r in rows if (r["model"], r["task"]) != ("other", "own")]
    partly = Comparison(rows, ["first", "other"], ["cola", "own"])
    write_sweep_report(tmp_path, "glue", partly, [failed], 18, {})
    line = "Not compared, without a common seed and setting: own."
    assert line in (tmp_path / "report.md").read_text() and line in printed_scores(partly)


def test_nothing_finished(tmp_path) -> None:
    failed = row("a", 0, 0.0) | {"status": "failed", "reason": "no"}
    write_sweep_report(tmp_path, "glue", Comparison([], ["a", "b"], ["cola"]), [failed], 1, {})
    assert "0 of 1 jobs have finished, 1 failed" in Path(tmp_path / "report.md").read_text()


def test_one_checkpoint_is_compared_with_none(tmp_path) -> None:
    comparison = Comparison(rows_of("a", {1e-5: [0.5]}), ["a"], ["cola"])
    write_sweep_report(tmp_path, "glue", comparison, [], 1, {})
    text = (tmp_path / "report.md").read_text()
    assert "against" not in text and "differences.png" not in text and "| 50.00 |   – | 50.00 |" in text
