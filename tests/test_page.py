"""report.html in headless Chromium: no console error, tables sort, readable at 400 and 1,400 px, light and dark."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from itertools import count
from pathlib import Path

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"
)


class Browser:
    """A page spoken to over the DevTools protocol by pipes; events gather in `events`."""

    def __init__(self, folder: str):
        (self.read_end, to_us), (from_us, self.write_end) = os.pipe(), os.pipe()

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
        self.numbers, self.rest, self.events, self.session = count(1), b"", [], {}
        target = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        session = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)[
            "sessionId"
        ]
        self.session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params) -> dict:
        number = next(self.numbers)
        os.write(
            self.write_end,
            json.dumps({"id": number, "method": method, "params": params, **self.session}).encode()
            + b"\0",
        )
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
def page(full):
    """The tiny run's report, opened."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(folder)
        try:
            browser("Page.navigate", url=(full / "report/report.html").as_uri())
            browser.run(
                "new Promise(done => document.readyState === 'complete' ? done()"
                " : addEventListener('load', done))"
            )
            yield browser
        finally:
            browser.close()


def column(page, table: int, index: int) -> list[str]:
    return page.run(
        f"[...document.querySelectorAll('table')[{table}].tBodies[0].rows]"
        f".map(r => r.cells[{index}].innerText.trim())"
    )


def test_page_opens_without_a_complaint(page):
    """No error in the console, nothing fetched from elsewhere, every figure drawn."""
    page.run("new Promise(done => setTimeout(done, 300))")
    bad = [
        e
        for e in page.events
        if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")
        or (
            e.get("method") == "Runtime.consoleAPICalled"
            and e["params"]["type"] in ("error", "warning")
        )
    ]
    assert bad == []
    assert (
        page.run(
            "performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length"
        )
        == 0
    )
    assert page.run("document.images.length + document.querySelectorAll('svg').length") >= 4
    assert page.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")


def test_tables_sort_by_a_click(page):
    """A heading sorts its table by number, a second click turns the order round, and readers are told by aria-sort."""
    table = page.run(
        "[...document.querySelectorAll('table')].findIndex("
        "t => t.tBodies[0].rows.length > 3 && t.querySelector('th button'))"
    )
    assert table >= 0
    before = column(page, table, 1)

    def click():
        page.run(
            f"document.querySelectorAll('table')[{table}].querySelectorAll('th button')[1].click()"
        )
        got = [
            float(c.split()[0].replace("−", "-").lstrip("+"))
            for c in column(page, table, 1)
            if c[:1] in "+-−0123456789"
        ]
        return got, page.run(
            f"document.querySelectorAll('table')[{table}].querySelector('th[aria-sort]')"
            ".getAttribute('aria-sort')"
        )

    first, second = click(), click()
    assert {first[1], second[1]} == {"ascending", "descending"}
    assert first[0] == sorted(first[0], reverse=first[1] == "descending")
    assert (
        second[0] == sorted(second[0], reverse=second[1] == "descending") and len(set(first[0])) > 1
    )
    assert sorted(column(page, table, 1)) == sorted(before)


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_on_any_screen(page, width, scheme, tmp_path):
    """The page itself never scrolls sideways, and its text stands out from what it lies on (WCAG AA, 4.5 : 1)."""
    page(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=900,
        deviceScaleFactor=1,
        mobile=width < 500,
    )
    page("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    assert page.run("document.documentElement.scrollWidth") <= width
    worst = page.run("""(() => {
        const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => { v /= 255;
            return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 });
            return .2126 * r + .7152 * g + .0722 * b };
        const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
            if (!/, 0\\)$|transparent/.test(c)) return c } return 'rgb(255,255,255)' };
        let low = 99;
        for (const e of document.querySelectorAll('h1, h2, p, td, th, summary, li, figcaption')) {
            const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
            low = Math.min(low, (a + .05) / (b + .05)) }
        return low })()""")
    assert worst >= 4.5
    shot = base64.b64decode(page("Page.captureScreenshot", format="png")["data"])
    out = Path(os.environ.get("SCREENSHOTS", tmp_path))
    (out / f"report-{width}-{scheme}.png").write_bytes(shot)
    assert len(shot) > 10_000
