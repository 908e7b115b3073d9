"""Pictures of a page that `d3tom-export report` wrote: the README's gallery.

    python -m benchmarks.gallery REPORT.html FOLDER [--answer 1] [--step 12]

Takes Playwright (a development dependency) and the system's Chromium. Writes into FOLDER report-kept.png, the player of
one answer at a step; report-attention.png, the same with the deciders' attention over the picture; and report-flops.png
and, of a page with an evaluation, report-retention.png, its charts.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

_WIDTH, _HEIGHT, _SCALE = 1000, 900, 1.5
"""Of the window in CSS pixels, and device pixels to each."""


def write_gallery(page: Page, folder: Path, answer: int, step: int) -> list[Path]:
    """Photograph the parts of an open ``page``; ``answer`` and ``step`` count from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    player = page.locator(".answer").nth(answer - 1)
    slider = player.get_by_role("slider")
    slider.focus()
    page.keyboard.press("Home")
    for _ in range(step - 1):
        page.keyboard.press("ArrowRight")
    slider.blur()
    written = []

    def shoot(name: str, part: Locator) -> None:
        written.append(folder / f"report-{name}.png")
        part.screenshot(path=written[-1])

    shoot("kept", player.locator(".player"))
    attention = player.get_by_label("attention of the deciders")
    if attention.count():
        attention.check()
        shoot("attention", player.locator(".player"))
    for name in ("flops", "retention"):
        figure = page.locator(f"#{name} figure.drawn svg")
        if figure.count():
            shoot(name, figure.first)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--answer", type=int, default=1, help="Which of the page's answers; default 1.")
    parser.add_argument("--step", type=int, default=12, help="Where its slider stands; default 12.")
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        sys.exit("There is no Chromium here (apt-get install chromium).")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(
            viewport={"width": _WIDTH, "height": _HEIGHT}, device_scale_factor=_SCALE, color_scheme="light"
        )
        page.goto(arguments.report.resolve().as_uri())
        for path in write_gallery(page, arguments.folder, arguments.answer, arguments.step):
            print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
        browser.close()


if __name__ == "__main__":
    main()
