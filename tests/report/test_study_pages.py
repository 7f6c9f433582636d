"""Pages of sweeps and ablations in a real browser: no table is cut, the verdict is visible, hostile names are text."""

import pytest

from fastbert.report.page import Table
from fastbert.report.report_page import ReportPage
from fastbert.studies.ablate.ablation_plots import plot_curves
from fastbert.studies.ablate.ablation_tables import finals_table, fractions_table
from fastbert.studies.ablate.analysis import Measure, Point, compare_variants
from fastbert.studies.shared.comparison import Comparison
from fastbert.studies.shared.evaluate_jobs import UNITS
from fastbert.studies.sweep.sweep_report import write_sweep_report
from fastbert.studies.sweep.zero_shot_report import ZeroShotResults
from tests.report.test_browser import resize
from tests.report.test_page import HOSTILE_NAME
from tests.studies.test_comparison import rows_of

NAMES = ("baseline", HOSTILE_NAME, "a variant with a long name, warm-up 0.1")
ACCURACY = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "count": 1000, "ties": 0}
PAIRS = {"score": "pll", "pll_form": "salazar", "other_scores": {"generator": 0.5}, **ACCURACY} | {
    "phenomena": {f"phenomenon with {NAMES[1]}": ACCURACY},
    "paradigms": {f"{name}": {**ACCURACY, "phenomenon": f"phenomenon with {NAMES[1]}"} for name in range(3)},
}
PLL = {"score": "pll", "pll_form": "salazar", "length": 64, "sentences": 9, "sentences_cut": 0}
PLL |= {name: 3.2 for unit in UNITS for name in (unit, f"{unit}_error")}


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """Name of a study -> address of its page."""
    scores = {1e-5: [0.1, 0.12, 0.11], 2e-5: [0.2, 0.3, 0.4]}
    rows = [row for name in NAMES for task in ("cola", "own") for row in rows_of(name, scores, task)]
    sweep = ReportPage("Sweep", tmp_path_factory.mktemp("sweep"))
    write_sweep_report(
        sweep,
        [Table(["checkpoint", "layers x width"], [[HOSTILE_NAME, "2 x 128"]])],
        Comparison(rows, NAMES, ["cola", "own"]),
        ZeroShotResults(dict.fromkeys(NAMES, PAIRS), dict.fromkeys(NAMES, PLL), dict.fromkeys(NAMES, "0")),
        [],
        36,
        {},
    )
    curves = {
        name: {
            seed: [
                Point(s / 200, s, 1e9 * s, s / 60, 9 - number - s / 100 + 0.01 * seed * number) for s in (50, 100, 200)
            ]
            for seed in range(3)
        }
        for number, name in enumerate(NAMES)
    }
    measure = Measure("validation loss", False, curves)
    ablation = ReportPage("Ablation", tmp_path_factory.mktemp("ablation"))
    ablation.table(fractions_table(measure, compare_variants(measure, False)))
    ablation.table(finals_table(measure, compare_variants(measure, False)))
    ablation.plot("curves.svg", "Curves.", plot_curves, measure, 6.0)
    for page in (sweep, ablation):
        page.write({"machine": "one"})
    return {page.title.lower(): (page.folder / "report.html").as_uri() for page in (sweep, ablation)}


@pytest.mark.parametrize("width", [1100, 400])
@pytest.mark.parametrize("study", ["sweep", "ablation"])
def test_nothing_is_cut(study: str, width: int, browser, pages) -> None:
    resize(browser, width)
    browser.get(pages[study])
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    outside = browser.execute_script(
        "return [...document.querySelectorAll('body *')].filter(one => !one.closest('.scroll')"
        " && one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML.slice(0, 80))"
    )
    assert outside == []
    scrolled = browser.execute_script(
        "return [...document.querySelectorAll('table, svg')].map(one => { const box = one.closest('.scroll');"
        " box.scrollLeft = 1e6; const [right, end] = [one, box].map(each => each.getBoundingClientRect().right);"
        " box.scrollLeft = 0; return right <= end + 1 && getComputedStyle(box).overflowX === 'auto' })"
    )
    assert len(scrolled) >= 3 and all(scrolled)  # the last column can be reached
    heads = browser.execute_script(
        "return [...document.querySelectorAll('th')].filter(one => one.textContent === 'verdict')"
        ".map(one => one.getBoundingClientRect().right)"
    )
    assert heads and (width < 1100 or max(heads) < width)
    names = browser.execute_script("return [...document.querySelectorAll('td')].map(one => one.textContent)")
    assert (
        HOSTILE_NAME in names and browser.execute_script("return document.scripts.length + document.images.length") == 0
    )
    assert not browser.get_log("browser")
