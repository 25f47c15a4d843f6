"""The report in a real browser: no error, no network, legible in both themes, nothing cut off on a phone."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phasewise.report.records import BatchReport, TableReport
from phasewise.report.write import write_report
from tests.unit.report.reports import read_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SAMPLE = Path(__file__).parents[1] / "data" / "report.json"
#: Set to a folder to keep the screenshots, to look at them.
SCREENSHOTS = os.environ.get("REPORT_SCREENSHOTS")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)

# Chromium speaks its DevTools protocol over file descriptors 3 (it reads) and 4 (it writes): no port, and it ends
# by itself when this process does, even when that is killed.
LAUNCH = """
import fcntl, os, sys
# Above 10 first: the pipe's own numbers may be 3 or 4.
reading, writing = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(reading, 3), os.dup2(writing, 4)
os.closerange(5, 256)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Chromium:
    """A headless browser with one page, spoken to in the DevTools protocol."""

    def __init__(self, profile: Path) -> None:
        reads, self._writer = os.pipe()
        self._reader, writes = os.pipe()
        command = [sys.executable, "-c", LAUNCH, str(reads), str(writes), str(CHROMIUM), *FLAGS]
        command += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        with (profile / "log").open("wb") as log:
            self.process = subprocess.Popen(
                command, pass_fds=(reads, writes), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        os.close(reads)
        os.close(writes)
        self._received = b""
        self._calls = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        try:
            self._open_page()
        except BaseException:
            self.close()
            raise

    def _open_page(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._calls += 1
        message: dict[str, Any] = {"id": self._calls, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._calls:
            self.events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def open(self, page: Path, *, width: int = 1280, theme: str = "light") -> None:
        """Load *page* and wait until it is loaded; ``events`` are those since then."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not self.find_events("Page.loadEventFired"):
            self.events.append(self._read())

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def find_events(self, *methods: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") in methods]

    def take_screenshot(self, path: Path) -> None:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(picture))

    def close(self) -> None:
        os.close(self._writer)
        os.close(self._reader)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + 30
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._reader], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "Chromium did not answer within 30 s."
            part = os.read(self._reader, 1 << 16)
            assert part, f"Chromium ended with {self.process.poll()}."
            self._received += part
        message, _, self._received = self._received.partition(b"\0")
        return dict(json.loads(message))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    chromium = Chromium(tmp_path_factory.mktemp("chromium"))
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def sample() -> BatchReport:
    return read_report(SAMPLE)


@pytest.fixture(scope="module")
def page(sample: BatchReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(sample, tmp_path_factory.mktemp("reports")).html


# The contrast of each text with what lies behind it, as WCAG 2 defines it, where it is below the 4.5 of level AA.
FIND_FAINT_TEXT = """
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const parse = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (color) => {
    const [r, g, b] = color.map((part) => part / 255).map((part) =>
      part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const findBackground = (element) => {
    for (; element; element = element.parentElement) {
      const color = parse(getComputedStyle(element).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  const faint = new Set();
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility() || element.closest("script, style")) continue;
    const style = getComputedStyle(element);
    const text = parse(element instanceof SVGElement ? style.fill : style.color);
    const [light, dark] = [luminance(text), luminance(findBackground(element))].sort((a, b) => b - a);
    const contrast = (light + 0.05) / (dark + 0.05);
    seen += 1;
    if (contrast < 4.5) faint.add(`${texts.currentNode.data.trim().slice(0, 40)}: ${contrast.toFixed(2)}`);
  }
  return { seen, faint: [...faint] };
})()
"""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_is_whole_without_errors_and_without_the_network(
    browser: Chromium, page: Path, theme: str, width: int
) -> None:
    browser.open(page, width=width, theme=theme)

    text = browser.evaluate("document.body.innerText")
    requests = [event["request"]["url"] for event in browser.find_events("Network.requestWillBeSent")]
    assert requests == [page.as_uri()]
    assert not browser.find_events("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    for fact in ("Published", "636,659", "Time saved", "process-table-etl × 27", "batting", "Career home runs"):
        assert fact in text
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    if SCREENSHOTS:
        browser.take_screenshot(Path(SCREENSHOTS) / f"report-{theme}-{width}.png")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_stands_out_from_its_background(browser: Chromium, page: Path, theme: str) -> None:
    browser.open(page, theme=theme)

    found = browser.evaluate(FIND_FAINT_TEXT)

    assert found["seen"] > 300
    assert found["faint"] == []


def test_the_page_prints_dark_on_white_whatever_the_theme(browser: Chromium, page: Path) -> None:
    browser.open(page, theme="dark")
    browser.evaluate("document.documentElement.dataset.theme = 'dark'")

    browser.call("Emulation.setEmulatedMedia", media="print")
    found = browser.evaluate(FIND_FAINT_TEXT)
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    browser.call("Emulation.setEmulatedMedia", media="")

    assert background == "rgb(255, 255, 255)"
    assert found["faint"] == []


def test_the_drawing_that_fits_the_width_is_shown(browser: Chromium, page: Path) -> None:
    shown = "[...document.querySelectorAll('.chart svg')].filter(e => e.checkVisibility()).map(e => e.clientWidth)"

    browser.open(page, width=1280)
    wide = browser.evaluate(shown)
    browser.open(page, width=390)
    narrow = browser.evaluate(shown)

    assert len(wide) == len(narrow) == 9
    # At its own size the text of a drawing is as large as it was meant to be.
    assert min(wide) > 480
    assert 280 < min(narrow) <= max(narrow) <= 320


def test_a_click_sorts_the_tables_and_another_turns_them(browser: Chromium, page: Path) -> None:
    first = "document.querySelector('.tables tbody th .name').textContent"
    click = "document.querySelectorAll('.tables thead button')[1].click()"
    browser.open(page)

    browser.evaluate(click)
    largest = browser.evaluate(first)
    browser.evaluate(click)
    smallest = browser.evaluate(first)

    assert (largest, smallest) == ("fielding", "teams_half")
    assert browser.evaluate("document.querySelectorAll('.tables thead th')[1].ariaSort") == "ascending"


def test_pointing_at_a_bar_tells_what_it_is(browser: Chromium, page: Path) -> None:
    browser.open(page)
    box = browser.evaluate("""
        (async () => {
          const bars = [...document.querySelectorAll(".timeline a.bar")];
          const bar = bars.find((bar) => bar.dataset.tip.startsWith("process-table-etl/batting\\n"));
          bar.scrollIntoView({ block: "center" });
          // Scrolling hides the tip, and is told with the next frame.
          for (const _ of [1, 2]) await new Promise(requestAnimationFrame);
          const { x, y, width, height } = bar.getBoundingClientRect();
          return { x: x + width / 2, y: y + height / 2 };
        })()
    """)

    browser.call("Input.dispatchMouseEvent", type="mouseMoved", **box)

    tip = browser.evaluate("document.querySelector('#tip:not([hidden])').innerText")
    assert tip.startswith("process-table-etl/batting\nCompleted\nstarted ")


def test_the_button_switches_the_theme(browser: Chromium, page: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    browser.open(page, theme="light")
    light = browser.evaluate(background)

    browser.evaluate("document.getElementById('theme').click()")

    assert browser.evaluate(background) != light


def test_a_hostile_name_is_text_and_its_script_does_not_run(
    browser: Chromium, sample: BatchReport, tmp_path: Path
) -> None:
    name = "<img src=x onerror=\"document.title='owned'\"><script>document.title = 'owned'</script>"
    tables = [TableReport(name=name, rows=1, size_bytes=1, seconds=1, notes=[name])]

    browser.open(write_report(replace(sample, batch="hostile", tables=tables, message=name), tmp_path).html)

    assert name in browser.evaluate("document.querySelector('.tables').innerText")
    assert browser.evaluate("document.title") != "owned"
    assert not browser.find_events("Log.entryAdded", "Runtime.exceptionThrown")


def test_two_hundred_tables_open_quickly_and_fold(browser: Chromium, sample: BatchReport, tmp_path: Path) -> None:
    run = next(run for run in sample.runs if run.name == "process-table-etl/batting")
    runs = [replace(run, run_id=f"more-{number}", name=f"process-table-etl/t{number}") for number in range(200)]
    tables = [TableReport(name=f"t{number}", rows=number, size_bytes=number, seconds=0.1) for number in range(200)]
    many = replace(sample, batch="many", runs=[*sample.runs, *runs], tables=tables)

    browser.open(write_report(many, tmp_path).html, width=390)

    assert "process-table-etl × 227" in browser.evaluate("document.querySelector('.timeline').innerText")
    assert browser.evaluate("document.querySelector('.timeline').clientHeight") < 900
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
