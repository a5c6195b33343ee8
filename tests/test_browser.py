"""The page in a real browser: it fits desktop and phone, on light and on dark paper, and asks the network nothing."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_results import Fake, make

from cohortvi.report.page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"),
]


class Browser:
    """A headless Chromium with one page, driven over pipes (DevTools protocol)."""

    def __init__(self, profile: Path):
        theirs, self.to = os.pipe()
        self.back, mine = os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4.
        launch = f'exec "$0" "$@" 3<&{theirs} 4>&{mine}'
        command = ["bash", "-c", launch, CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, pass_fds=(theirs, mine))
        os.close(theirs)
        os.close(mine)
        self.buffer, self.asked, self.session, self.events = b"", 0, None, []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: object) -> dict:
        """Return the result of a command; events that come before it are kept."""
        self.asked += 1
        message = {"id": self.asked, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.asked:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self) -> dict:
        while b"\0" not in self.buffer:
            part = os.read(self.back, 1 << 20)
            assert part, "chromium ended"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, size: tuple[int, int], scheme: str) -> None:
        """Show a file at a size, on light or dark paper."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def value(self, expression: str) -> object:
        """Return the value of a JavaScript expression in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path, clip: dict | None = None) -> None:
        """Write what the page shows, all of it or a clip, as PNG."""
        options = {"clip": clip, "captureBeyondViewport": True} if clip else {}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"]))

    def close(self) -> None:
        self.session = None
        self.call("Browser.close")
        self.process.wait(timeout=20)
        os.close(self.to)
        os.close(self.back)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    title = "A cohort with a title " + "of_words_that_cannot_be_broken" * 4
    fake = Fake(cells=150, genes=300, models=("nb",), title=title)
    inputs, config = make(folder / "results", fake)
    write_report(inputs, config, folder / "index.html")
    return folder / "index.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
def test_page_fits_without_horizontal_scroll(browser: Browser, page: Path, device: str, scheme: str) -> None:
    browser.open(page, WIDTHS[device], scheme)
    assert browser.value("innerWidth") == WIDTHS[device][0]
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    sticking_out = """[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, .wide, pre, svg')
        && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    assert browser.value(sticking_out) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_paper(browser: Browser, page: Path, scheme: str) -> None:
    browser.open(page, WIDTHS["desktop"], scheme)
    contrast = """(() => {
        const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
        const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => linear(v / 255));
            return .2126 * r + .7152 * g + .0722 * b };
        const paper = light(getComputedStyle(document.body).backgroundColor);
        const ratio = c => { const l = light(c); return (Math.max(l, paper) + .05) / (Math.min(l, paper) + .05) };
        const text = [...document.querySelectorAll('p, h1, h2, h3, h4, dt, dd, td, th, figcaption, a, summary')];
        const drawn = [...document.querySelectorAll('svg text')];
        return Math.min(...text.map(e => ratio(getComputedStyle(e).color)),
            ...drawn.map(e => ratio(getComputedStyle(e).fill)));
    })()"""
    assert browser.value(contrast) >= 4.5


def test_page_asks_the_network_nothing_and_reports_no_fault(browser: Browser, page: Path) -> None:
    browser.open(page, WIDTHS["desktop"], "light")
    asked = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert [e for e in browser.events if e.get("method") in {"Log.entryAdded", "Runtime.exceptionThrown"}] == []


def test_every_link_of_the_contents_has_its_section(browser: Browser, page: Path) -> None:
    browser.open(page, WIDTHS["desktop"], "light")
    lost = "[...document.querySelectorAll('nav a')].filter(a => !document.querySelector(a.getAttribute('href'))).length"
    assert browser.value("document.querySelectorAll('nav a').length") > 5
    assert browser.value(lost) == 0
