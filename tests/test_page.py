"""report.html in headless Chromium: no complaint, tables sort, readable at any width and scheme."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from itertools import count
from pathlib import Path

import pytest
import test_report
import test_results as canned

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"
)


class Browser:
    """A page spoken to over the DevTools protocol by pipes; events gather in `events`."""

    def __init__(self, folder: str):
        self.read_end, to_us = os.pipe()
        from_us, self.write_end = os.pipe()

        def wire():  # Chromium reads commands from descriptor 3 and writes to 4
            os.dup2(os.dup(from_us), 3)
            os.dup2(os.dup(to_us), 4)

        ours = os.dup(from_us), os.dup(to_us)  # keep 3 and 4 free of what dup2 would close
        self.process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-quic",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                f"--user-data-dir={folder}",
                "--remote-debugging-pipe",
                "about:blank",
            ],
            preexec_fn=wire,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (*ours, from_us, to_us):
            os.close(end)
        self.numbers = count(1)
        self.rest = b""
        self.events = []
        self.session = {}
        targets = self("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params) -> dict:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params, **self.session}
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                chunk = os.read(self.read_end, 1 << 20)
                assert chunk, "Chromium is gone"
                self.rest += chunk
            text, self.rest = self.rest.split(b"\0", 1)
            message = json.loads(text)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def run(self, script: str):
        found = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.read_end)
        os.close(self.write_end)


@pytest.fixture
def page(tmp_path):
    """The canned run's report, opened."""
    made = test_report.make_report(canned.make_run(tmp_path / "canned"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(folder)
        try:
            browser("Page.navigate", url=(made.folder / "report.html").as_uri())
            browser.run(
                "new Promise(done => document.readyState === 'complete' ? done()"
                " : addEventListener('load', done))"
            )
            yield browser
        finally:
            browser.close()


def complaint(event: dict) -> bool:
    """Whether an event of the browser says that something is wrong with the page."""
    if event.get("method") == "Runtime.consoleAPICalled":
        return event["params"]["type"] in ("error", "warning")
    return event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")


def test_page_opens_without_a_complaint(page):
    """No error in the console, nothing fetched from elsewhere, every figure drawn."""
    page.run("new Promise(done => setTimeout(done, 300))")
    assert [event for event in page.events if complaint(event)] == []
    fetched = "performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:'))"
    assert page.run(f"{fetched}.length") == 0
    assert page.run("document.images.length") == 3
    assert page.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.run("[...document.images].every(i => i.alt.length > 20)")


# The table with the accuracies of the first domain.
TABLE = "document.querySelectorAll('table')[0]"


def column_after_a_click(page) -> tuple[list[str], str]:
    """The cells of the second column once its heading was clicked, and the order it announces."""
    page.run(f"{TABLE}.querySelectorAll('th button')[1].click()")
    order = page.run(f"{TABLE}.querySelector('th[aria-sort]').getAttribute('aria-sort')")
    cells = page.run(f"[...{TABLE}.tBodies[0].rows].map(r => r.cells[1].innerText.trim())")
    return cells, order


def test_tables_sort_by_a_click(page):
    """By number, what was not run last; a second click turns round; aria-sort tells readers."""
    found = {}
    for _ in range(2):
        cells, order = column_after_a_click(page)
        numbers = [float(cell.split()[0]) for cell in cells if cell != "not run"]
        assert numbers == sorted(numbers, reverse=order == "descending")
        assert len(set(numbers)) > 1
        assert cells[len(numbers) :] == ["not run"] * (len(cells) - len(numbers))
        found[order] = sorted(cells)
    assert set(found) == {"ascending", "descending"}
    assert found["ascending"] == found["descending"]


# The lowest contrast of a text to what it lies on, as WCAG defines it.
WORST_CONTRAST = """(() => {
    const light = color => {
        const linear = color.match(/[\\d.]+/g).slice(0, 3).map(value => {
            value /= 255;
            return value <= .03928 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
        });
        return .2126 * linear[0] + .7152 * linear[1] + .0722 * linear[2];
    };
    const ground = element => {
        for (; element; element = element.parentElement) {
            const color = getComputedStyle(element).backgroundColor;
            if (!/, 0\\)$|transparent/.test(color)) return color;
        }
        return 'rgb(255,255,255)';
    };
    let worst = 99;
    const texts = 'h1, h2, h3, p, td, th, summary, li, figcaption, dt, dd, .gain, .loss';
    for (const element of document.querySelectorAll(texts)) {
        const pair = [light(getComputedStyle(element).color), light(ground(element))];
        pair.sort((x, y) => y - x);
        worst = Math.min(worst, (pair[0] + .05) / (pair[1] + .05));
    }
    return worst;
})()"""


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_on_any_screen(page, width, scheme, tmp_path):
    """The page itself never scrolls sideways, and its text stands out (WCAG AA, 4.5 : 1)."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    page("Emulation.setDeviceMetricsOverride", **size)
    page("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run(WORST_CONTRAST) >= 4.5
    shot = base64.b64decode(page("Page.captureScreenshot", format="png")["data"])
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    (folder / f"report-{width}-{scheme}.png").write_bytes(shot)
    assert len(shot) > 10_000
