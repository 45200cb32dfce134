"""The range report in a real browser: its sections are there, its pictures are decoded, and it asks for nothing."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading

import pytest
from report_checkpoints import save_checkpoints

from hf_r2.report.page import write_report

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
# The page has no script: one around it looks at what the browser has made of it
HARNESS = """<!doctype html><meta charset="utf-8"><iframe src="report.html" width="{width}" height="800"></iframe>
<pre></pre><script>
const frame = document.querySelector("iframe");
frame.onload = async () => {{
  const page = frame.contentDocument;
  const images = [...page.images];
  page.querySelectorAll("details").forEach(details => details.open = true);
  await Promise.all(images.map(image => image.decode().catch(() => null)));
  const shown = element => element.getBoundingClientRect().height > 20;
  document.querySelector("pre").textContent = JSON.stringify({{
    title: page.title,
    sections: [...page.querySelectorAll("section")].filter(shown).map(section => section.id),
    images: images.map(image => [image.naturalWidth, image.naturalHeight, shown(image)]),
    background: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    requests: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name)
      .filter(name => !name.startsWith("data:")),
  }});
}};
</script>"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and notes what was asked for."""

    def log_message(self, *arguments):
        self.server.asked.append(self.path)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder of a report, and the loopback server that serves it."""
    folder = tmp_path_factory.mktemp("site")
    write_report(save_checkpoints(tmp_path_factory.mktemp("models")), folder / "report.html")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, server
    server.shutdown()
    server.server_close()


def looked_at(site, profile, width, *flags):
    """Open the report in an iframe of a width, and return what the page around it saw."""
    folder, server = site
    server.asked.clear()
    (folder / "harness.html").write_text(HARNESS.format(width=width), encoding="utf-8")
    address = f"http://127.0.0.1:{server.server_port}/harness.html"
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={profile}", "--virtual-time-budget=60000", "--dump-dom"]
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=300, check=True)
    found = re.search(r"<pre>(.+?)</pre>", done.stdout)
    assert found, done.stdout + done.stderr
    return json.loads(found[1])


@pytest.mark.parametrize("width", [1200, 380])
def test_a_browser_shows_every_section_and_picture_and_asks_for_nothing(site, tmp_path, width):
    seen = looked_at(site, tmp_path, width)
    assert seen["title"] == "Range report: baseline, float, compressed"
    assert seen["sections"] == ["summary", "distributions", "profiles", "sqnr", "training", "weights"]
    assert len(seen["images"]) > 6
    assert all(wide > 500 and high > 100 and shown for wide, high, shown in seen["images"])
    assert seen["overflow"] == 0, "the page scrolls sideways; its tables and pictures should"
    assert seen["requests"] == []
    assert set(site[1].asked) <= {"/harness.html", "/report.html", "/favicon.ico"}


def test_it_is_dark_where_the_reader_wants_it_dark(site, tmp_path):
    light, dark = (
        looked_at(site, tmp_path / scheme, 1200, f"--blink-settings=preferredColorScheme={number}")
        for scheme, number in (("light", 1), ("dark", 0))
    )
    assert (light["background"], dark["background"]) == ("rgb(255, 255, 255)", "rgb(21, 23, 26)")
