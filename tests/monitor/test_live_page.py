"""The page in a real browser; skipped where there is none (`tests.browser`)."""

import contextlib
import socket
import time

import numpy as np
import pytest

from jmoe.config import MonitorConfig
from jmoe.monitor import server
from jmoe.monitor.decisions import Decision
from jmoe.monitor.report_page import PALETTE
from tests import browser as browsers
from tests.monitor.test_training import log
from tests.monitor.test_training import make_meter as make_training_meter
from tests.monitor.watched import make_meter, step

DESK, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}
SAYS = "document.getElementById('said').innerText.startsWith('{}')"
IS_DRAWN = "document.querySelectorAll('#figures div').length > 0"
# The colours in the middle of these cells of the heat map's first row.
CELLS = """(() => {{
  const heat = document.getElementById("heat"), width = heat.width;
  const row = heat.getContext("2d").getImageData(0, 5 + 12, width, 1).data;
  const cell = (width - 30 - 150 - 12) / {experts};
  return {cells}.map((at) => Math.round(30 + (at + 0.5) * cell) * 4)
    .map((at) => [...row.slice(at, at + 3)]);
}})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsers.opened(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(autouse=True)
def without_complaint(browser):
    """What the page does wrong, or its policy refuses, fails the test."""
    browser.complaints.clear()
    yield
    assert not browser.complaints


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def busy_meter():
    meter = make_meter(clock=time.time)
    count_LE = np.array([[2, 1, 1, 1, 1, 1, 1, 0], [1] * 8])
    step(meter, count_LE=count_LE, drafted=4, accepted=3)
    meter.decided(Decision(1.5e9, "placement", "MaxVio was 0.6", "3 experts moved"))
    return meter


@contextlib.contextmanager
def shown(browser, port, meter, size=DESK, scheme="light"):
    """Has the browser show what a meter measures, until the block ends."""
    with server.opened(MonitorConfig(port=port), meter) as address:
        browser.show(address, **size, scheme=scheme)
        browser.wait(IS_DRAWN)
        yield
        browser.call("Page.navigate", url="about:blank")


def text(browser, selector):
    return browser.value(f"document.querySelector({selector!r}).innerText")


def rgb(hexadecimal):
    return [int(hexadecimal[at : at + 2], 16) for at in (1, 3, 5)]


@pytest.mark.parametrize(("column", "scheme"), [(0, "light"), (1, "dark")])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_the_page_fits_and_has_the_readers_colours(
    browser, port, tmp_path, size, column, scheme
):
    with shown(browser, port, busy_meter(), size, scheme):
        width = browser.value("document.documentElement.scrollWidth")
        assert width <= size["width"]
        found = browser.value("getComputedStyle(document.body).backgroundColor")
        assert found == "rgb({}, {}, {})".format(*rgb(PALETTE["paper"][column]))
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000


def test_what_is_measured_is_read_on_the_page(browser, port):
    with shown(browser, port, busy_meter()):
        assert text(browser, "h1") == "tiny" and text(browser, "#kind") == "serving"
        assert text(browser, "#state") == "2 running, 0 waiting"
        figures = text(browser, "#figures")
        assert "drafts accepted\n75%" in figures and "MaxVio\n0.5" in figures
        assert "3 experts moved\nMaxVio was 0.6" in text(browser, "#decided")
        said = text(browser, "#devices-said")
        assert "1.25 times the mean, and 1.50 times in layer 0" in said


def test_the_heat_map_is_red_above_the_even_share_and_blue_below(browser, port):
    with shown(browser, port, busy_meter()):
        found = browser.value(CELLS.format(cells=[0, 3, 7], experts=8))
    assert found == [rgb("#67001f"), rgb("#f4f4f4"), rgb("#053061")]


def test_what_changes_is_shown_without_a_reload(browser, port):
    meter = busy_meter()
    with shown(browser, port, meter):
        step(meter, live=7, waiting=5)
        browser.wait(
            "document.getElementById('said').innerText.startsWith('7 running')"
        )
        assert browser.value("document.title") == "tiny · 7 running, 5 waiting"


def test_a_server_that_goes_is_said_and_found_again_when_it_is_back(browser, port):
    cfg = MonitorConfig(port=port)
    with server.opened(cfg, busy_meter()) as address:
        browser.show(address, **DESK, scheme="light")
        browser.wait(IS_DRAWN)
    browser.wait("document.getElementById('state').className === 'lost'")
    assert "Connection lost" in text(browser, "#state")
    assert "75%" in text(browser, "#figures")  # the last that was known
    assert browser.value("document.querySelector('main').classList.contains('old')")
    meter = busy_meter()
    step(meter, live=9)
    with server.opened(cfg, meter):
        browser.wait(
            "document.getElementById('said').innerText.startsWith('9 running')"
        )
        assert browser.value("document.getElementById('state').className") == "live"
        browser.call("Page.navigate", url="about:blank")
    browser.complaints.clear()  # that nobody answered is what happened


def test_silence_is_told_while_the_server_answers(browser, port):
    clock = [0.0]
    meter = make_meter(clock=lambda: clock[0])
    step(meter)  # long ago
    with shown(browser, port, meter):
        browser.wait("document.getElementById('state').className === 'quiet'")
        assert "nothing new for" in text(browser, "#state")


def test_names_are_text_and_never_html(browser, port):
    evil = "<img src=x onerror=alert(1)><script>alert(1)</script>"
    meter = make_meter()
    meter.decided(Decision(1.5e9, evil, evil, evil))
    with shown(browser, port, meter):
        assert evil in text(browser, "#decided")
        assert (
            browser.value("document.querySelectorAll('li img, li script').length") == 0
        )


def test_a_training_run_is_shown_by_the_same_page(browser, port):
    meter = make_training_meter()
    for at in range(1, 30):
        log(meter, at, loss=3.0 - at / 30)
    with shown(browser, port, meter, PHONE):
        assert text(browser, "#kind") == "training"
        charts = browser.value(
            "[...document.querySelectorAll('figcaption b')].map(b => b.innerText)"
        )
        assert charts[:2] == ["Loss", "Balance: MaxVio of a batch"]
        path = browser.value("document.querySelector('.chart .line').getAttribute('d')")
        assert path.count("L") == 28 and "NaN" not in path


def test_deepseek_v3_fits_a_phone(browser, port):
    meter = make_meter(layers=58, experts=256, devices=16)
    step(meter, count_LE=np.random.default_rng(0).integers(0, 20, (58, 256)))
    with shown(browser, port, meter, PHONE):
        width = browser.value("document.documentElement.scrollWidth")
        assert width <= PHONE["width"]
        assert "58 layers" in browser.value(
            "document.getElementById('heat').getAttribute('aria-label')"
        )


def test_no_browser_skips_with_a_plain_message(monkeypatch, tmp_path):
    monkeypatch.setattr(browsers.shutil, "which", lambda _: None)
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        with contextlib.ExitStack() as stack:
            stack.enter_context(browsers.opened(tmp_path))
