"""The report: figures that are those of the rows, Markdown and a page that needs no network."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastbert.report.page import Table
from fastbert.report.report_page import ReportPage, write_plot
from fastbert.studies.shared.comparison import Comparison
from fastbert.studies.shared.plots import plot_differences
from fastbert.studies.shared.tuning_report import Ensembles, printed_scores
from fastbert.studies.sweep import sweep_report
from fastbert.studies.sweep.sweep_report import write_sweep_report
from fastbert.studies.sweep.zero_shot_report import ZeroShotResults
from tests.studies.test_comparison import row, rows_of

EVIL = "<script>alert(1)</script> $x^{$"


class Page(HTMLParser):
    """Tags that are open and never closed, addresses, and the texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.texts.append(data.strip("\n"))


def write(
    folder: Path,
    comparison: Comparison,
    failed: list,
    total: int,
    zero_shot: ZeroShotResults | None = None,
    ensembles: Ensembles | None = None,
) -> str:
    """report.md of a sweep."""
    report = ReportPage("Sweep glue", folder)
    zero_shot = zero_shot or ZeroShotResults({}, {}, {})
    write_sweep_report(report, [], comparison, zero_shot, failed, total, ensembles or {})
    report.write({"machine": "one"})
    return (folder / "report.md").read_text()


def test_a_report_of_blocks(tmp_path) -> None:
    report = ReportPage("A < B & C", tmp_path)
    report.heading("First")
    report.text("Between `code <x>` and <b>text</b>.")
    report.points(["one", "two"])
    report.table(Table(["name", "value", "verdict"], [["a|b", "1.50", "undecided"], ["c", "-10", "–"]]))
    report.plot("plot.svg", 'a "plot"', plot_differences, [(EVIL, 1.0, 0.5, 2.0)], "x < y")
    report.write({"commit": "abc"})
    markdown = (tmp_path / "report.md").read_text()
    assert markdown.startswith("# A < B & C\n\n## First\n\nBetween `code <x>`")
    assert "| name | value | verdict   |\n| ---- | ----: | --------- |\n| a\\|b |  1.50 | undecided |" in markdown
    assert '![a "plot"](plot.svg)' in markdown and "- one\n- two" in markdown
    page = Page((tmp_path / "report.html").read_text())
    assert not page.open and "script" not in page.tags
    assert all(address.startswith("#") for address in page.addresses)  # no network, no further file
    assert "Between " in page.texts and "code <x>" in page.texts and "a|b" in page.texts
    assert "<b>text</b>." in " ".join(page.texts)  # text, not markup
    assert EVIL in page.texts and "x < y" in page.texts  # of the plot
    # A later report without that plot removes its file, and no other.
    (tmp_path / "mine.svg").touch()
    later = ReportPage("A", tmp_path)
    later.text("![no plot](mine.svg) in a sentence")
    later.write({})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.svg", "report.html", "report.md"]
    assert "plot.svg" not in (tmp_path / "report.md").read_text()


@pytest.fixture
def comparison() -> Comparison:
    """Two settings, three seeds; Matthews below zero on cola; a custom task with one setting."""
    rows = rows_of("first", {1e-5: [-0.10, -0.12, -0.11], 2e-5: [-0.2, -0.3, -0.4]})
    rows += rows_of("other", {1e-5: [0.2, 0.3, 0.41], 2e-5: [0.5, 0.51, 0.52]})
    rows += rows_of("first", {1e-5: [0.6, 0.61, 0.62]}, "own") + rows_of("other", {1e-5: [0.6, 0.62, 0.61]}, "own")
    return Comparison(rows, ["first", "other"], ["cola", "own"])


def test_the_figures_of_a_sweep(comparison, tmp_path) -> None:
    ensembles = {("first", "cola"): None, ("other", "cola"): {"dev": {"matthews": 0.535}}}
    lines = write(tmp_path, comparison, [], 18, ensembles=ensembles).splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    scores = {(c[0], c[2]): c[3:] for c in cells if len(c) == 13}
    #                                         train  setting       tried seeds
    assert scores["cola", "first"][:4] == ["100", "1e-05, 16, 3", "2", "3"]
    #                                          median    mean      std     max      ensemble last
    assert scores["cola", "first"][4:] == ["-11.00", "-11.00", "1.00", "-10.00", "–", "-21.00"]
    assert scores["cola", "other"][4:] == ["51.00", "51.00", "1.00", "52.00", "53.50", "41.00"]
    assert ["other, ensemble of the seeds", "53.5", "53.5"] in cells and "first, ensemble of the seeds" not in cells
    head = next(c for c in cells if "verdict" in c)
    compared = {c[0]: c[1:] for c in cells if len(c) == 10}
    assert compared["own"][head.index("verdict") - 1] == "undecided"
    # At 1e-5 the medians are -0.11 and 0.3, at 2e-5 -0.3 and 0.51: the second is higher together.
    assert compared["cola"][0] == "other higher, by the t-test alone"
    assert compared["cola"][1:5] == ["2e-05, 16, 3", "3", "+81.00", "[+53.67, +108.33]"]
    assert compared["cola"][7:] == ["0.250", "0.500"]
    text = " ".join(lines)
    limit = "with 3 seeds it cannot be less than 0.25 (0.5 adjusted over 2)"
    assert limit in text and limit in printed_scores(comparison, {}).replace("\n", " ") and "Trials are equal" in text
    assert "18 of 18 jobs have finished" in text
    tried = [c for c in cells if c[0] == "2e-05, 16, 3" and len(c) == 3]
    assert tried == [["2e-05, 16, 3", "-30.00 ± 10.00", "51.00 ± 1.00, best"]]
    images = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert images == ["scores.svg", "differences.svg", "settings.svg"]
    page = Page((tmp_path / "report.html").read_text())
    assert not page.open and {"svg", "table"} <= page.tags and page.texts.count("cola") > 3
    assert "51.0 ± 1.0" in page.texts and "Mean of 1" in page.texts  # GLUE's table, in HTML
    shown = printed_scores(comparison, {})
    assert "51.00" in shown and "other higher, by the t-test alone" in shown and max(map(len, shown.splitlines())) < 110


def test_the_ensemble_is_that_of_the_best_setting(comparison, monkeypatch) -> None:
    def remember(rows: list, task: str, labels: str) -> tuple:
        return {row["learning_rate"] for row in rows}, [row["seed"] for row in rows], task, labels

    monkeypatch.setattr(sweep_report, "ensemble_of", remember)
    opened = {name: SimpleNamespace(task=f"task {name}", labels=f"labels {name}") for name in ("cola", "own")}
    found = sweep_report.dev_ensembles(comparison, SimpleNamespace(opened=opened))
    assert found["first", "cola"] == ({1e-5}, [0, 1, 2], "task cola", "labels cola")
    assert found["other", "cola"][0] == {2e-5} and found["other", "own"][2:] == ("task own", "labels own")


def test_every_seed_is_plotted(comparison, tmp_path, monkeypatch) -> None:
    plotted = {}

    def remember(path: Path, plot: Callable, panels: dict, *labels) -> None:
        plotted[plot.__name__] = panels
        write_plot(path, plot, panels, *labels)

    monkeypatch.setattr("fastbert.report.report_page.write_plot", remember)
    write(tmp_path, comparison, [], 18)
    assert plotted["plot_scores"]["cola"]["other"] == pytest.approx([50.0, 51.0, 52.0])
    assert plotted["plot_scores"]["cola"]["first"] == pytest.approx([-10.0, -12.0, -11.0])
    assert plotted["plot_settings"]["cola"]["1e-05, 16, 3"]["other"] == pytest.approx([20.0, 30.0, 41.0])


def test_what_is_missing_is_reported(comparison, tmp_path) -> None:
    rows = [r for one in comparison.trials.values() for found in one.settings.values() for r in found]
    failed = row("other", 0, 0.0, rate=2e-5) | {"status": "failed", "reason": "it ran out of memory"}
    rows = [r for r in rows if r["id"] != failed["id"]]
    text = write(tmp_path, Comparison(rows, ["first", "other"], ["cola", "own"]), [failed], 18)
    assert "17 of 18 jobs have finished, 1 failed" in text and "it ran out of memory" in text
    assert "NOT" in text and "Trials are equal" not in text and "Not compared" not in text
    rows = [r for r in rows if (r["model"], r["task"]) != ("other", "own")]
    partly = Comparison(rows, ["first", "other"], ["cola", "own"])
    line = "Not compared, without a common seed and setting: own."
    assert line in write(tmp_path, partly, [failed], 18) and line in printed_scores(partly, {})


def test_nothing_finished(tmp_path) -> None:
    failed = row("a", 0, 0.0) | {"status": "failed", "reason": "no"}
    text = write(tmp_path, Comparison([], ["a", "b"], ["cola"]), [failed], 1)
    assert "0 of 1 jobs have finished, 1 failed" in text


def test_one_checkpoint_is_compared_with_none(tmp_path) -> None:
    comparison = Comparison(rows_of("a", {1e-5: [0.5]}), ["a"], ["cola"])
    text = write(tmp_path, comparison, [], 1)
    assert (
        "compared with" not in text.partition("All figures")[0]
        and "differences.svg" not in text
        and "| 50.00 |   – | 50.00 |" in text
    )
