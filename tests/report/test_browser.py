"""The page of several runs in a real browser: lines, controls, narrow windows, hostile names, no network."""

import pytest

from tests.flags import main
from tests.report.conftest import make_run
from tests.report.test_page import HOSTILE_NAME

LONG_NAME = f"a-run-with-a-name-like-plotly's-%{{y}}-and-without-a-space-{200 * 'x'}"[:200]


@pytest.fixture(scope="module")
def page(tmp_path_factory, browser) -> str:
    """The address of the page of three runs; it is open when a test begins."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / HOSTILE_NAME), make_run(folder / LONG_NAME, **{"optimizer.learning_rate": 0.01})]
    runs.append(make_run(folder / "three", [], finished=False, objective="electra"))
    out = folder / "page.html"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    return out.as_uri()


@pytest.fixture
def opened(browser, page):
    """The browser with the page, 1,100 wide; there must be no message on its console at the end."""
    resize(browser, 1100)
    browser.get(page)
    assert lines(browser) == 8
    yield browser
    assert not browser.get_log("browser")


def resize(browser, width: int, dark: bool = False) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def lines(browser) -> int:
    """Lines with a path, over all panels."""
    return browser.execute_script(
        "return [...document.querySelectorAll('#curves .scatterlayer .trace path.js-line')]"
        ".filter(path => path.getAttribute('d').length > 20).length"
    )


def set_control(browser, name: str, value: object) -> None:
    browser.execute_script(
        "const [name, value] = arguments, control = document.getElementById(name);"
        "if (control.type === 'checkbox') control.checked = value; else control.value = value;"
        "control.dispatchEvent(new Event('input'))",
        name,
        value,
    )


def graph(browser, expression: str) -> object:
    return browser.execute_script(f"const graph = document.getElementById('curves'); return {expression}")


def click_legend(browser, row: int) -> None:
    """Clicks the name of a run, and waits as long as plotly does for a second click."""
    browser.execute_async_script(
        "const [row, done] = arguments, item = document.querySelectorAll('#curves .legendtoggle')[row];"
        "for (const type of ['mousedown', 'mouseup', 'click'])"
        "  item.dispatchEvent(new MouseEvent(type, {bubbles: true, view: window}));"
        "setTimeout(done, 500)",
        row,
    )


def test_every_line_is_plotted_and_nothing_is_loaded(opened) -> None:
    # Two runs with records, three panels; the training losses as logged and smoothed.
    assert graph(opened, "graph.data.length") == 8
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0
    widths = graph(opened, "graph.data.filter(line => line.meta.panel === 1).map(line => line.line.width)")
    assert widths[0] > widths[1]  # of equal curves both are seen
    buttons = graph(opened, "[...graph.querySelectorAll('.modebar-btn')].map(button => button.dataset.title)")
    assert buttons[:2] == ["Download plot", "Zoom"]  # none that sends the data anywhere


def test_names_are_text(opened) -> None:
    names = graph(opened, "[...graph.querySelectorAll('.legendtext')].map(text => text.textContent)")
    assert names == [HOSTILE_NAME, LONG_NAME]
    cells = opened.execute_script("return [...document.querySelectorAll('td:first-child')].map(td => td.textContent)")
    assert cells[:3] == [HOSTILE_NAME, LONG_NAME, "three"]
    assert opened.execute_script("return document.scripts.length") == 3
    assert opened.execute_script("return document.querySelectorAll('img').length") == 0


def test_a_click_in_the_legend_hides_a_run_in_all_panels(opened) -> None:
    click_legend(opened, 0)
    assert lines(opened) == 4
    set_control(opened, "axis", "tokens")
    assert lines(opened) == 4  # still hidden
    opened.find_element("id", "none").click()
    assert lines(opened) == 0
    opened.find_element("id", "all").click()
    assert lines(opened) == 8


def test_axes(opened) -> None:
    for axis, last in {"steps": 40, "tokens": 10240, "flops": 8e10, "minutes": 1 / 3}.items():
        set_control(opened, "axis", axis)
        for number in range(8):
            assert graph(opened, f"graph.data[{number}].x.at(-1)") == pytest.approx(last)
        assert graph(opened, "graph._fullLayout.xaxis.range[1]") >= last
    titles = graph(opened, "[...graph.querySelectorAll('.infolayer [class$=title]')].map(title => title.textContent)")
    assert "minutes of training" in titles
    set_control(opened, "logx", True)
    set_control(opened, "logy", True)
    types = graph(opened, "['xaxis', 'xaxis3', 'yaxis', 'yaxis2', 'yaxis3'].map(a => graph._fullLayout[a].type)")
    assert types == ["log", "log", "log", "log", "linear"]
    assert lines(opened) == 8


def test_smoothing(opened) -> None:
    logged = graph(opened, "graph.data[0].y")
    set_control(opened, "smoothing", 0)
    assert lines(opened) == 6 and graph(opened, "graph.data[0].y") == logged
    set_control(opened, "smoothing", 100)
    smoothed = graph(opened, "graph.data[1].y")
    # A third of 20 points: 3 on each side, fewer at the ends.
    reach = [min(3, index, 19 - index) for index in range(20)]
    means = [sum(logged[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reach)]
    assert smoothed == pytest.approx(means)


def test_zoom_is_that_of_all_panels_until_the_axis_changes(opened) -> None:
    from selenium.webdriver import ActionChains

    panel = opened.find_elements("css selector", "#curves .nsewdrag")[1]
    ActionChains(opened).move_to_element(panel).click_and_hold().move_by_offset(150, 0).release().perform()
    ranges = graph(opened, "['xaxis', 'xaxis2', 'xaxis3'].map(a => graph._fullLayout[a].range)")
    assert ranges[0] == ranges[1] == ranges[2] and 15 < ranges[0][0] < ranges[0][1] < 35
    set_control(opened, "smoothing", 50)
    assert graph(opened, "graph._fullLayout.xaxis.range") == ranges[0]
    set_control(opened, "axis", "tokens")
    assert graph(opened, "graph._fullLayout.xaxis.range[1]") > 10000


@pytest.mark.parametrize("width", [1100, 400])
def test_nothing_is_cut(opened, width: int) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    resize(opened, width, dark=width == 1100)
    page, window = opened.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert page <= window
    cut = opened.execute_script(
        "return [...document.querySelectorAll('table, svg.main-svg')].map(one => {"
        "  const box = one.closest('.scroll') ?? one.parentElement;"
        "  return [one.tagName, box.scrollWidth, one.getBoundingClientRect().width,"
        "    ['auto', 'scroll'].includes(getComputedStyle(box).overflowX), box.getBoundingClientRect().right] })"
    )
    assert {row[0] for row in cut} == {"TABLE", "svg"}
    for tag, reachable, needed, scrolls, right in cut:
        assert right <= window and (reachable >= int(needed) if tag == "TABLE" else needed <= window)
        assert scrolls or tag == "svg"
    beyond = (
        "return [...document.querySelectorAll('th, td')].filter(cell => cell.scrollWidth > cell.clientWidth).length +"
        "  [...document.querySelectorAll('.legendtext')]"
        "    .filter(name => name.getBoundingClientRect().right > window.innerWidth).length"
    )
    WebDriverWait(opened, 5).until(
        lambda browser: browser.execute_script(beyond) == 0
    )  # plotly follows a window a moment later
    if width == 400:
        assert any(reachable > window for tag, reachable, *_ in cut if tag == "TABLE")  # else nothing was tested
    background = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(13, 17, 23)" if width == 1100 else "rgb(255, 255, 255)")


def test_no_two_of_many_runs_look_alike(browser, tmp_path) -> None:
    records = [{"step": 1, "split": "validation", "loss": 1.0}]
    runs = [make_run(tmp_path / f"run-{number}-with-a-name-of-its-settings", records) for number in range(21)]
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "page")]) == 0
    resize(browser, 400)
    browser.get((tmp_path / "page.html").as_uri())
    looks = graph(browser, "graph.data.map(line => `${line.line.color} ${line.line.dash}`)")
    assert len(set(looks)) == 21
    names, panel = graph(
        browser,
        "[graph.querySelector('.legend .bg'), graph.querySelector('.nsewdrag')].map(one => one.getBoundingClientRect())"
        ".map(box => [box.top, box.bottom])",
    )
    assert names[1] <= panel[0]  # a long legend scrolls instead of covering the curves
    assert not browser.get_log("browser")
