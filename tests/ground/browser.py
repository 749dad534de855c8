"""A page in headless Chromium, as wide as a test wants it, light or dark: what is really laid out, and how it looks.

A copy of the page gets a script that looks at it from inside and tells what it sees; the page itself stays as it is.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_SECONDS = 60
# WebCore's PreferredColorScheme, as --blink-settings takes it.
_SCHEMES = {"dark": 0, "light": 1}
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')

# width, page: the layout's and the content's width, equal where nothing has to be scrolled sideways.
# wide: the elements that stick out. contrast: the least of any text on what is behind it (WCAG 2.2, 1.4.3).
# alien: elements that a report has none of. text: all that is to be read. back: the page's colour.
_LOOK = """
<script>
addEventListener("load", () => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const [r, g, b] = channels(color).slice(0, 3).map((c) => c / 255)
      .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      const [, , , alpha = 1] = channels(color);
      if (alpha === 1) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const root = document.documentElement;
  const start = (element) => element.outerHTML.slice(0, 200);
  const all = [...document.body.querySelectorAll("*")].filter((element) => element.tagName !== "SCRIPT");
  const worded = all.filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
  const ratio = (element) => {
    const pair = [luminance(getComputedStyle(element).color), luminance(behind(element))].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  };
  parent.postMessage({
    width: root.clientWidth, page: root.scrollWidth,
    wide: all.filter((e) => e.getBoundingClientRect().right > root.clientWidth + 1).map(start),
    contrast: Math.min(...worded.map(ratio)),
    alien: all.filter((e) => ["IMG", "SCRIPT", "IFRAME", "LINK", "SVG", "A"].includes(e.tagName)).map(start),
    text: document.body.innerText, back: getComputedStyle(document.body).backgroundColor,
    ran: window.owned === undefined ? [] : ["owned"],
  }, "*");
});
</script>
"""

_FRAMES = """\
<!doctype html><meta charset="utf-8"><body><script>
const seen = {};
addEventListener("message", (event) => {
  for (const frame of document.querySelectorAll("iframe"))
    if (frame.contentWindow === event.source) seen[frame.width] = event.data;
  document.querySelector("pre").textContent = JSON.stringify(seen);
});
</script><pre></pre>%s</body>
"""


def program() -> str | None:
    """The browser of this machine."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


def look(page: Path, widths: Sequence[int], scheme: str) -> dict[int, dict[str, Any]]:
    """What a page looks like from inside at each width, in the colour scheme `light` or `dark`."""
    copy = page.with_suffix(".copy.html")
    # Without its policy the escaping of what stands in it has to hold alone.
    copy.write_text(_POLICY.sub("", page.read_text()).replace("</body>", f"{_LOOK}</body>"))
    outer = page.with_suffix(".frames.html")
    frames = (f'<iframe width="{width}" height="900" src="{copy.name}" style="border:0"></iframe>' for width in widths)
    outer.write_text(_FRAMES % "".join(frames))
    dump = _run(page.parent, scheme, "--virtual-time-budget=5000", "--dump-dom", outer.as_uri())
    found = re.search(r"<pre>(.*?)</pre>", dump, re.DOTALL)
    assert found is not None, dump
    seen = json.loads(unescape(found.group(1)))
    return {width: seen[str(width)] for width in widths}


def dump(page: Path) -> str:
    """The document of a page as it is, after it was loaded."""
    return _run(page.parent, "light", "--dump-dom", page.as_uri())


def picture(page: Path, target: Path, width: int, height: int, scheme: str) -> None:
    """A picture of a page, for people."""
    frame = page.with_suffix(".picture.html")
    style = f"border:0;width:{width}px;height:{height}px"
    frame.write_text(
        f'<!doctype html><body style="margin:0"><iframe src="{page.name}" style="{style}"></iframe></body>'
    )
    size = f"--window-size={max(width, 500)},{height}"
    _run(page.parent, scheme, "--hide-scrollbars", size, f"--screenshot={target}", frame.as_uri())


def _run(directory: Path, scheme: str, *words: str) -> str:
    browser = program()
    assert browser is not None
    quiet = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
    profile = f"--user-data-dir={directory / 'profile'}"
    settings = f"--blink-settings=preferredColorScheme={_SCHEMES[scheme]}"
    return subprocess.run(
        [browser, "--headless", *quiet, profile, settings, *words],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=True,
    ).stdout
