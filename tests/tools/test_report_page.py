"""A report in a real browser: it draws, answers to keys, asks for nothing and runs nothing of what it was given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ckptstore
from ckptstore.policy.text import parse_keep
from ckptstore.tools.report import page
from ckptstore.tools.reportdata import document
from ckptstore.tools.survey import survey
from tests.tools.fabricated import HOSTILE, Fake, fabricate, run, surveyed

webdriver = pytest.importorskip("selenium.webdriver")
if not shutil.which("chromium") or not shutil.which("chromedriver"):
    pytest.skip("there is no chromium with a chromedriver on the PATH", allow_module_level=True)

from selenium.webdriver import ActionChains, Chrome, ChromeOptions, Keys  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

WAIT_S = 60
MANY = 10_000
READY = "return document.documentElement.dataset.ready === 'yes' && !waiting.size"
RESET = """
byId('filter').value = ''; byId('status').value = 'there'; table.sortBy = 0; table.down = true;
byId('filter').dispatchEvent(new Event('input'));
document.querySelector('#timeline-axis input[value=time]').click();
localStorage.clear();
if (document.documentElement.dataset.theme) { delete document.documentElement.dataset.theme; setTheme(null); }
document.documentElement.style.scrollBehavior = 'auto'; scrollTo(0, 0);
document.activeElement.blur(); getSelection().removeAllRanges(); select(placeOf.get(report.summary.latest));
"""
"""As it was when it was opened, but for what is drawn by now: to read Plotly anew takes a second."""


class Page:
    """One page in the browser."""

    def __init__(self, browser: Chrome) -> None:
        self.browser = browser

    def js(self, code: str, *args: object) -> Any:
        return self.browser.execute_script(code, *args)

    def until(self, code: str) -> None:
        WebDriverWait(self.browser, WAIT_S, 0.02).until(lambda _: self.js(code))

    def open(self, path: Path) -> None:
        """Open a page, or bring back the one that is open to where it began."""
        if self.browser.current_url == path.as_uri():
            self.js(RESET)
        else:
            self.browser.get(path.as_uri())
        self.until(READY + " && (charts.length === 0 || charts[0].drawn)")

    def draw(self) -> None:
        """Also what isn't in view."""
        self.js("for (const chart of charts) if (!chart.drawn) soon(chart)")
        self.until(READY)

    def keys(self, *keys: str) -> None:
        ActionChains(self.browser).send_keys(*keys).perform()

    def focused(self) -> str:
        """What has the focus: its id, the number of a row, or its text."""
        return str(
            self.js("const e = document.activeElement; return e.id || e.dataset.at || e.textContent.slice(0, 40)")
        )

    def texts(self, css: str) -> list[str]:
        return list(self.js("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", css))

    def steps(self) -> list[str]:
        """In the rows of the table that are there."""
        return self.texts("#table tbody tr[data-at] td:nth-child(2)")

    def sort(self, column: int, table: str = "table") -> None:
        self.js("document.querySelectorAll(`#${arguments[0]} thead button`)[arguments[1]].click()", table, column)

    def filter(self, text: str, status: str = "there") -> None:
        self.js(
            "byId('filter').value = arguments[0]; byId('status').value = arguments[1];"
            "byId('filter').dispatchEvent(new Event('input'))",
            text,
            status,
        )

    def trace(self, chart: str, number: int, what: str) -> Any:
        return self.js(f"return byId(arguments[0]).data[arguments[1]].{what}", chart, number)


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1280,900",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    started.set_page_load_timeout(WAIT_S)
    yield started
    started.quit()


@pytest.fixture
def shown(browser: Chrome) -> Iterator[Page]:
    """The browser; afterwards it has complained about nothing, and asked for nothing but pages of ours."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    yield Page(browser)
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [it["params"]["request"]["url"] for it in messages if it["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith("file:///") and url.endswith("/report.html") for url in sent)


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a page of a store that is fabricated."""

    def made(fakes: list[Fake], keep: str | None = None, **more: Any) -> Path:
        folder = tmp_path_factory.mktemp("page")
        fabricate(folder / "store", fakes, **more)
        with ckptstore.open(folder / "store", read_only=True) as store:
            content = page(document(survey(store, keep=parse_keep(keep) if keep else None)))
        (folder / "report.html").write_bytes(content)
        return folder / "report.html"

    return made


@pytest.fixture(scope="module")
def usual(write: Callable[..., Path]) -> Path:
    """60 saves by three writers, three of them deleted; twice it went back."""
    fakes = run(60)
    for place in (3, 4, 7):
        fakes[place].deleted = "not kept by last(50)"
    return write(fakes, keep="last(10) | epochs()", holds={"paper": 30}, files=True)


def test_all_charts_are_drawn(shown: Page, usual: Path) -> None:
    shown.open(usual)
    shown.draw()

    count = "c => [c.id, c.querySelectorAll('path.point, .js-line').length]"
    drawn = shown.js(f"return Object.fromEntries([...document.querySelectorAll('.chart')].map({count}))")
    assert drawn.keys() == {"timeline", "history", "metric-0", "metric-1", "sizes", "total", "speed", "stalls"}
    assert all(number > 0 for number in drawn.values())
    # One dot for each save in each of its rows, deleted ones faint.
    assert drawn["timeline"] == shown.js("return report.lanes.reduce((sum, lane) => sum + lane.saves.length, 0)")
    assert len(shown.trace("timeline", 0, "x")) == 6
    assert shown.trace("timeline", 0, "marker.opacity") < 0.5
    # What was left behind is dashed, and where a run went back there are marks.
    assert shown.js("return byId('history').data.slice(0, 3).map(t => t.line.dash)") == ["dot", "dash", None]
    forks = "return byId('history').data.find(t => t.marker && t.marker.symbol === 'diamond').x"
    assert shown.js(forks) == [21, 41]
    texts = shown.js("return [...document.querySelectorAll('[role=img].chart')].map(c => c.getAttribute('aria-label'))")
    assert "60 saves, 2 roll-backs: back to step 3,500 before save 21" in texts[0]
    assert texts[1].startswith("val_loss: 60 values from ")


def test_it_fits_a_phone(shown: Page, usual: Path) -> None:
    """360 pixels wide, and nothing makes the page wider."""
    shown.open(usual)
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    shown.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        shown.draw()
        shown.until(
            "return innerWidth === 360 && byId('history').querySelector('svg').clientWidth < 360 && !waiting.size"
        )
        wide = shown.js(
            "const clipped = e => e && (getComputedStyle(e).overflowX !== 'visible' || clipped(e.parentElement));"
            "const over = e => e.getBoundingClientRect().right > 360.5 && !clipped(e.parentElement);"
            "return [...document.body.querySelectorAll('*')].filter(over).map(e => e.outerHTML.slice(0, 80))"
        )
        assert wide == []
        assert shown.js("return document.documentElement.scrollWidth") == 360
        assert shown.steps()
    finally:
        shown.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    shown.until("return innerWidth > 1000")


def test_light_and_dark(shown: Page, usual: Path) -> None:
    """As the system wants it, and by the button; charts follow."""
    shown.open(usual)
    body = "return getComputedStyle(document.body).backgroundColor"
    grid = "byId('timeline').layout.xaxis.gridcolor"
    system = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    shown.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", system)
    try:
        shown.until(f"return {grid} === '#222932'")
        assert shown.js(body) == "rgb(14, 17, 22)"
        shown.js("byId('theme').click()")
        shown.until(f"return {grid} === '#eceff2'")
        assert shown.js(body) == "rgb(246, 247, 249)"
    finally:
        shown.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert shown.js("return [byId('theme').textContent, remembered()]") == ["Dark", "light"]


def test_the_keyboard_reaches_all(shown: Page, usual: Path) -> None:
    shown.open(usual)
    shown.keys(Keys.TAB)
    assert shown.focused() == "Skip to the table of checkpoints"
    assert shown.js("return document.activeElement.getBoundingClientRect().top") >= 0
    assert shown.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    shown.keys(Keys.ENTER, Keys.TAB)
    assert shown.focused() == "filter"
    shown.keys(Keys.TAB, Keys.TAB)
    assert shown.js("return document.activeElement.closest('.list-table').id") == "table"
    shown.js("document.querySelector('#table tr[tabindex=\"0\"]').focus()")
    shown.keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert shown.focused() == "2"
    shown.keys(Keys.END)
    assert shown.focused() == "56"
    shown.keys(Keys.PAGE_UP, Keys.HOME, Keys.ARROW_DOWN, Keys.ENTER)
    assert shown.js("return saves[selection.place].label") == "0003-000059-step11750"
    assert shown.texts("#table tr[aria-selected=true] td:nth-child(2)") == ["11,750"]
    assert "0003-000059-step11750" in shown.texts("#details")[0]


def test_the_timeline_is_walked_by_keys(shown: Page, usual: Path) -> None:
    shown.open(usual)
    shown.js("timeline.lane = 0; byId('timeline').focus({preventScroll: true})")
    shown.keys(Keys.ARROW_DOWN)
    assert shown.texts("#said")[0].startswith("row best by val_loss: step ")
    assert "best val_loss" in shown.js("return saves[selection.place].roles")
    shown.js("timeline.lane = report.lanes.findIndex(lane => lane.name === 'every 250 steps'); select(10)")
    shown.keys(Keys.ARROW_RIGHT)
    assert shown.js("return selection.place") == 11
    assert shown.texts("#said")[0].startswith("step 3,000, every 250 steps")
    shown.keys(Keys.HOME)
    assert shown.js("return selection.place") == 0
    shown.keys(Keys.END, Keys.ARROW_LEFT)
    assert shown.js("return selection.place") == 58
    assert shown.js("return byId('timeline').layout.shapes.filter(s => s.name === 'selected').length") > 0
    shown.js("document.querySelector('#timeline-axis input[value=step]').click()")
    assert shown.js("return byId('timeline').layout.xaxis.type") == "linear"


def test_the_table_is_sorted_and_filtered(shown: Page, usual: Path) -> None:
    shown.open(usual)
    assert shown.steps()[:3] == ["12,000", "11,750", "11,500"]
    shown.sort(1)
    assert shown.js("return document.querySelectorAll('#table thead th')[1].ariaSort") == "descending"
    shown.sort(1)
    assert shown.js("return document.querySelectorAll('#table thead th')[1].ariaSort") == "ascending"
    assert shown.steps()[:3] == ["250", "500", "750"]
    shown.filter("paper")
    assert (shown.steps(), shown.texts("#count")) == (["6,250"], ["1 of 60"])
    shown.filter("SIGterm  step")
    assert len(shown.steps()) == 2
    shown.filter("no such thing")
    assert shown.steps() == []
    assert shown.js("return document.querySelector('#table .empty').hidden") is False
    shown.filter("", "deleted")
    assert shown.steps() == ["1,000", "1,250", "2,000"]


def test_an_id_is_copied(shown: Page, usual: Path) -> None:
    shown.open(usual)
    id = shown.js("document.querySelector('#table .copy').click(); return report.summary.latest")
    shown.until("return byId('said').textContent.startsWith('copied')")
    assert shown.texts("#said") == [f"copied {id}"]


def test_what_rules_do_stands_in_a_table(shown: Page, usual: Path) -> None:
    shown.open(usual)
    assert shown.texts("#retention tbody tr[data-at] td:first-child")[0] == "goes"
    shown.sort(0, "retention")
    assert shown.texts("#retention tbody tr[data-at] td:first-child")[0] == "stays"


def test_it_can_be_printed(shown: Page, usual: Path) -> None:
    """All rows, and all charts, also those that nobody has scrolled to; in light colours."""
    shown.open(usual)
    shown.js("setTheme('dark'); dispatchEvent(new Event('beforeprint'))")
    assert len(shown.steps()) == 57
    assert shown.js("return charts.every(chart => chart.drawn)")
    assert shown.js("return [isDark(), byId('speed').layout.xaxis.gridcolor]") == [False, "#eceff2"]
    shown.js("dispatchEvent(new Event('afterprint'))")
    assert shown.js("return isDark()")


def test_even_what_got_in_could_neither_run_nor_send(browser: Chrome, usual: Path) -> None:
    """The second line: the page's own policy."""
    at = Page(browser)
    at.open(usual)
    at.js(
        "window.refused = [];"
        "document.addEventListener('securitypolicyviolation', e => refused.push(e.effectiveDirective));"
        "const script = document.createElement('script'); script.textContent = 'window.hacked = 1';"
        "const box = document.createElement('div');"
        'box.innerHTML = \'<img src="http://127.0.0.1:9/x.png" onerror="window.hacked = 2">\';'
        "document.body.append(script, box); fetch('http://127.0.0.1:9/').catch(() => 0)"
    )
    wanted = ["script-src-elem", "script-src-attr", "img-src", "connect-src"]
    at.until(f"return {wanted}.every(it => refused.includes(it))")
    assert at.js("return typeof hacked") == "undefined"
    browser.get_log("browser")
    browser.get_log("performance")


@pytest.fixture(scope="module")
def odd(write: Callable[..., Path]) -> Path:
    """Names that are hostile wherever there can be one, and metrics that are no usual numbers."""
    name = HOSTILE[:100]
    odd = {"nan": float("nan"), "same": 5.0, "__proto__": 1.0, name: 2.0}
    fakes = [
        Fake(n, 1 + n // 4, n, None, {"wide": 10.0 ** (n % 7 - 3), "some": float("inf") if n % 2 else -1.0, **odd})
        for n in range(12)
    ]
    for fake in fakes:
        fake.reasons = (HOSTILE,)
    fakes[1].deleted = HOSTILE
    return write(fakes, keep="last(1)", hosts={1: name}, files=True)


def test_hostile_names_run_nothing(shown: Page, odd: Path) -> None:
    """They are shown as they are written, wherever they stand."""
    name = HOSTILE[:100]
    shown.open(odd)
    shown.draw()
    for place in range(4):
        shown.js("select(arguments[0])", place)
    shown.js("Plotly.Fx.hover(byId('timeline'), [{curveNumber: 1, pointNumber: 0}])")
    shown.until("return byId('timeline').querySelector('.hovertext') !== null")
    assert name in shown.texts("#details")[0]
    assert "<script>window.hacked" in shown.texts("#timeline")[0]
    assert name in shown.texts("#metrics h3")
    assert shown.texts("#writers td")[0] == name
    assert shown.js("return typeof hacked") == "undefined"
    assert len(shown.texts("script")) == 3
    assert shown.texts("img, iframe, a[href^=http], [onerror]") == []
    assert shown.js("return Object.keys(Object.prototype)") == []


def looks_right(shown: Page) -> None:
    """No word of a language of programs, nothing beside the page, and a timeline that is no longer than a screen."""
    shown.draw()
    words = set(shown.js("return document.body.innerText").replace(",", " ").split())
    assert words.isdisjoint({"NaN", "undefined", "null", "Infinity", "Invalid", "[object"})
    assert shown.js("return document.documentElement.scrollWidth <= innerWidth")
    assert shown.js("return byId('timeline').querySelectorAll('.ytick').length") <= 15


def test_metrics_that_are_no_usual_numbers(shown: Page, odd: Path) -> None:
    shown.open(odd)
    looks_right(shown)
    assert shown.texts("#metrics h3")[:4] == ["wide", "some", "nan", "same"]
    assert shown.js("return [0, 1, 3].map(n => byId(`metric-${n}`).layout.yaxis.type)") == ["log", "linear", "linear"]
    assert "6 values not finite" in shown.texts("#metric-1-text")[0]
    assert shown.texts("#stalls") == ["Not recorded by these saves."]
    assert shown.texts("#metric-2") == ["No finite value. 12 values not finite."]
    shown.js("document.querySelector('#metric-0-figure button').click()")
    assert shown.js("return byId('metric-0').layout.yaxis.type") == "linear"


def test_an_empty_store_looks_right(shown: Page, write: Callable[..., Path]) -> None:
    shown.open(write([]))
    looks_right(shown)
    assert shown.texts("#timeline, #history, #sizes") == ["Nothing has been saved yet."] * 3


@pytest.mark.full
@pytest.mark.parametrize(
    "fakes",
    [[Fake(100)], [Fake(n, n + 1, n, reasons=(f"reason {n}",)) for n in range(300)]],
    ids=["one checkpoint", "many writers and reasons"],
)
def test_unusual_stores_look_right(shown: Page, write: Callable[..., Path], fakes: list[Fake]) -> None:
    shown.open(write(fakes))
    looks_right(shown)


def test_ten_thousand_checkpoints(shown: Page, tmp_path: Path, full: bool) -> None:
    """However many there are, what the browser holds is bounded: rows in view, and points that can be told apart."""
    path = tmp_path / "report.html"
    path.write_bytes(page(document(surveyed(run(MANY, rollbacks=12, writers=20)))))
    shown.open(path)
    if full:
        shown.draw()
    assert shown.js("return saves.length") == MANY
    assert len(shown.texts("#table tr")) < 60
    assert shown.js("return document.querySelectorAll('*').length") < 6000
    assert shown.js("return charts.length") == 8
    assert max(shown.js("return charts.map(chart => Number(chart.element.dataset.points ?? 0))")) < 12_500
    shown.js("document.querySelector('#table .view').scrollTop = 5000 * ROW")
    shown.until("return document.querySelector('#table tr[data-at=\"5000\"]') !== null")
    assert len(shown.steps()) < 60
    shown.filter("sigterm")
    assert len(shown.steps()) == 12
    shown.filter("")
    shown.sort(1)
    assert shown.steps()[0] == f"{max(shown.js('return saves.map(save => save.step)')):,}"
    # A closer look at a part of them shows all of that part.
    shown.js(
        "const [low, high] = extent(charts[0].points()); const middle = (low + high) / 2;"
        "Plotly.relayout(byId('timeline'), {'xaxis.range[0]': middle, 'xaxis.range[1]': middle + (high - low) / 100})"
    )
    assert len(set(shown.trace("timeline", 1, "customdata"))) > 80
    shown.js("Plotly.relayout(byId('timeline'), {'xaxis.autorange': true})")
    assert len(set(shown.trace("timeline", 1, "customdata"))) > 250
