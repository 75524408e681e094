"""A page in headless Chromium: what a script finds there, once the page has started."""

import html
import json
import re
import shutil
import subprocess

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium, and none of chromium, google-chrome is on the PATH"
)
FAULTS = """<head><script>
const faults = [];
addEventListener("error", (event) => faults.push(event.message));
addEventListener("securitypolicyviolation", (event) => faults.push(event.blockedURI));
</script>"""
FIND = """<script>
started.then(() => {
  const found = document.createElement("pre");
  found.id = "found";
  let value;
  try { value = (() => { %s })(); } catch (error) { faults.push(String(error)); }
  found.textContent = JSON.stringify({ value, faults });
  document.body.append(found);
}, (error) => faults.push(String(error)));
</script></body>"""


def found_in(page, script, folder, width=1280, dark=False):
    """Return what a script returns that runs once the promise `started` of the page is kept."""
    file = folder / "page.html"
    whole = page.replace("<head>", FAULTS, 1).replace("</body>", FIND % script, 1)
    file.write_text(whole, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]
    options += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900"]
    options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *options, file.as_uri()], capture_output=True, text=True, timeout=120
    )
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert match, done.stderr[-2000:]
    found = json.loads(html.unescape(match.group(1)))
    assert found["faults"] == []
    return found["value"]
