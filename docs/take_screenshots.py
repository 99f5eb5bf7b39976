"""Take the screenshots of README and docs in a headless browser.

They show the selection page and the memory report of a run. A page is longer than a picture should be: parts are
left out, and a dashed line shows where.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw
from selenium.webdriver import Chrome
from selenium.webdriver.support.ui import WebDriverWait

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser import open_browser

SCALE = 2  # device pixels in a CSS pixel
MOST_BYTES = 300_000  # of a picture in all its colors; with more it keeps 256 of them
MARGIN = 14  # CSS pixels of white above and below a part
CUT = "#8c959f"

# Picture -> the window's width in CSS pixels, and the parts, each from the top of one element to the end of another.
PICTURES = {
    "selection": (1000, [("h1", "#by-weight"), ("h2:has(+ p + .map)", "p:has(+ .map)"), ("#map-2", "#map-2")]),
    "memory": (1180, [("h1", "h2 + p + table"), ("figure", "figure + figure")]),
}
READY = """
return [...document.images].every(image => image.complete) &&
  [...document.querySelectorAll('.plotly-graph-div')].every(figure => figure.querySelector('.main-svg'))
"""
EDGES = """
const [first, last] = [...arguments].map(selector => document.querySelector(selector).getBoundingClientRect());
return [Math.floor(first.top + scrollY), Math.ceil(last.bottom + scrollY) + 1];
"""


def take(browser: Chrome, page: Path, width: int, parts: list[tuple[str, str]]) -> Image.Image:
    """Return a picture of a page's parts, one below the other."""
    window = {"width": width, "height": 1000, "deviceScaleFactor": SCALE, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
    browser.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    browser.get(page.resolve().as_uri())
    WebDriverWait(browser, 60).until(lambda found: found.execute_script(READY))
    if str(Path.cwd()) in browser.execute_script("return document.body.innerText"):
        raise SystemExit(f"{page} shows a path of this machine")
    return join([shoot(browser, width, *browser.execute_script(EDGES, *part)) for part in parts])


def shoot(browser: Chrome, width: int, top: float, bottom: float) -> Image.Image:
    """Return what lies between two heights of the page."""
    clip = {"x": 0, "y": top, "width": width, "height": bottom - top, "scale": 1}
    options = {"format": "png", "captureBeyondViewport": True, "clip": clip}
    content = browser.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
    return Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")


def join(parts: list[Image.Image]) -> Image.Image:
    """Put parts below one another, with a dashed line where the page goes on between them."""
    margin = MARGIN * SCALE
    whole = Image.new("RGB", (parts[0].width, sum(part.height + 2 * margin for part in parts)), "white")
    draw, top = ImageDraw.Draw(whole), 0
    for part in parts:
        whole.paste(part, (0, top + margin))
        for left in range(0, whole.width if top else 0, 16 * SCALE):
            draw.line((left, top, left + 8 * SCALE, top), fill=CUT, width=SCALE)
        top += part.height + 2 * margin
    return whole


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG, with fewer colors if it is too large otherwise."""
    picture.save(path, optimize=True)
    if path.stat().st_size > MOST_BYTES:
        picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--selection", type=Path, required=True, help="selection page")
    parser.add_argument("--memory", type=Path, required=True, help="memory report")
    parser.add_argument("--folder", type=Path, required=True, help="where selection.png and memory.png go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as profile, open_browser(Path(profile)) as browser:
        for name, (width, parts) in PICTURES.items():
            save(take(browser, getattr(args, name), width, parts), args.folder / f"{name}.png")


if __name__ == "__main__":
    main()
