"""The page in headless Chromium, opened from disk: the slider by keyboard, what it changes, and who can use it.

Chromium is the system's (Debian's `chromium`), none is downloaded. Where there is none the tests are skipped; with
D3TOM_NEEDS_BROWSER=1, as in CI, they fail.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.gallery import write_gallery
from d3tom_export.trust.terminal import legible
from tests.report.conftest import QUESTION, Written

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
DESKTOP, PHONE = (1280, 900), (360, 740)
CELL = re.compile(r"M([\d.]+) (\d+)h")


def _chromium() -> str:
    """The browser's program; skips, or fails in CI, where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        import playwright  # noqa: F401
    except ImportError as error:
        found, reason = None, f"Playwright is not installed here ({error})"
    else:
        reason = "there is no Chromium here (apt-get install chromium)"
    if found is None:
        if os.environ.get("D3TOM_NEEDS_BROWSER") == "1":
            pytest.fail(f"D3TOM_NEEDS_BROWSER=1, and {reason}")
        pytest.skip(reason)
    return found


Open = Callable[..., AbstractContextManager["Page"]]


@pytest.fixture(scope="module")
def browsing(tmp_path_factory: pytest.TempPathFactory, written: Written) -> Iterator[Open]:
    """Opens the page at a width, light or dark; nothing may go wrong in it, nor leave for a network."""
    program = _chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:

        @contextmanager
        def opened(
            size: tuple[int, int] = DESKTOP, scheme: str = "light", path: Path = written.path, **options: Any
        ) -> Iterator[Page]:
            context: BrowserContext = playwright.chromium.launch_persistent_context(
                tmp_path_factory.mktemp("profile"),
                executable_path=program,
                headless=True,
                args=FLAGS,
                color_scheme=scheme,
                viewport={"width": size[0], "height": size[1]},
                **options,
            )
            wrong: list[str] = []
            try:
                page = context.new_page()
                page.on("pageerror", lambda error: wrong.append(str(error)))
                page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
                page.on("request", lambda request: wrong.append(request.url)
                        if not request.url.startswith(("file:", "data:")) else None)  # fmt: skip
                page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
                page.goto(path.as_uri())
                yield page
                assert wrong == []
            finally:
                context.close()

        yield opened


@pytest.fixture(scope="module")
def desktop(browsing: Open) -> Iterator[Page]:
    with browsing() as page:
        yield page


def _kept(page: Page, answer: int, grids: list[dict[str, Any]]) -> set[int]:
    """The visual tokens that a picture shows uncovered, by where their outlines are drawn."""
    found = set()
    for number, grid in enumerate(grids):
        path = page.locator(f".answer >> nth={answer}").locator(f'svg[data-grid="{number}"] path.kept')
        for x, y in CELL.findall(path.get_attribute("d") or ""):
            column = min(int(float(x)), grid["columns"])
            before = sum(row < int(y) for row in grid["newlines"])
            found.add(grid["first"] + int(y) * grid["columns"] + column + before)
    return found


def test_the_slider_shows_what_each_step_kept(desktop: Page, written: Written) -> None:
    """By keyboard alone: from the first step to the last, and one back."""
    for number, answer in enumerate(written.data["answers"]):
        article = desktop.locator(f".answer >> nth={number}")
        slider = article.get_by_role("slider")
        slider.focus()
        desktop.keyboard.press("Home")
        keys = ["Home", *["ArrowRight"] * (len(answer["steps"]) - 1), "ArrowLeft"]
        steps = [*answer["steps"], answer["steps"][-2]]
        for key, step in zip(keys, steps, strict=True):
            desktop.keyboard.press(key)
            assert slider.input_value() == str(step["step"])
            every = set(range(answer["visual_tokens"])) if step["kept"] is None else set(step["kept"])
            drawn = _kept(desktop, number, answer["grids"])
            assert drawn == (every if step["merged"] else set())  # where nothing merged nothing is outlined
            veiled = sum(
                len(CELL.findall(path.get_attribute("d") or "")) for path in article.locator("path.veil").all()
            )
            assert veiled == answer["visual_tokens"] - len(every)
            told = slider.get_attribute("aria-valuetext") or ""
            assert told.startswith(f"Step {step['step']} of {len(answer['steps'])}: ")
            if step["merged"]:
                assert f"{step['keep']:,} of {answer['visual_tokens']:,} visual tokens are kept" in told
            assert (article.locator(".status").text_content() or "") in told
            assert article.locator(".pieces").text_content() == step["answer"]
            labels = [svg.get_attribute("aria-label") or "" for svg in article.locator("svg.tokens").all()]
            assert all(f"step {step['step']}: " in label for label in labels)
            assert sum(int(re.search(r": (\d+) of", label)[1]) for label in labels) == len(every)  # type: ignore[index]


def test_every_step_says_how_its_answer_changed(desktop: Page, written: Written) -> None:
    answer = written.data["answers"][1]
    article = desktop.locator(".answer >> nth=1")
    article.get_by_role("slider").focus()
    seen = set()
    desktop.keyboard.press("Home")
    for step in answer["steps"]:
        seen.add(article.locator(".pieces").inner_html())
        masks = step["answer"].count("░")
        heard = article.locator(".saying .hidden").text_content() or ""
        assert heard.endswith(f"{masks} mask{'s' if masks != 1 else ''}") or (not masks and "mask" not in heard)
        desktop.keyboard.press("ArrowRight")
    assert len(seen) > 1


def test_buttons_step_and_end_where_the_answer_does(desktop: Page, written: Written) -> None:
    article, last = desktop.locator(".answer >> nth=0"), len(written.data["answers"][0]["steps"])
    slider, back, on = article.get_by_role("slider"), article.locator(".back"), article.locator(".on")
    slider.focus()
    desktop.keyboard.press("Home")
    assert back.is_disabled()
    on.click()
    assert slider.input_value() == "2"
    assert not back.is_disabled()
    back.press("Enter")
    assert slider.input_value() == "1"
    slider.focus()
    desktop.keyboard.press("End")
    assert slider.input_value() == str(last)
    assert on.is_disabled()


def test_attention_takes_the_place_of_the_kept_tokens(desktop: Page, written: Written) -> None:
    article, answer = desktop.locator(".answer >> nth=0"), written.data["answers"][0]
    article.get_by_role("slider").focus()
    desktop.keyboard.press("End")
    article.get_by_role("radio", name="attention of the deciders").check()
    step = answer["steps"][-1]
    tiles = answer["grids"][1]
    paths = article.locator('svg[data-grid="1"] .heat path').all()
    cells = [CELL.findall(path.get_attribute("d") or "") for path in paths]
    assert sum(map(len, cells)) == tiles["rows"] * tiles["columns"] + len(tiles["newlines"])
    brightest = max(step["importance"])
    in_tiles = step["importance"][tiles["first"] :]
    assert len(cells[-1]) == sum(round(9 * each / brightest) == 9 for each in in_tiles)
    assert _kept(desktop, 0, answer["grids"]) == set()
    article.get_by_role("radio", name="kept tokens").check()
    assert _kept(desktop, 0, answer["grids"]) == set(step["kept"])


def test_a_hostile_question_is_read_not_run(desktop: Page) -> None:
    assert desktop.locator(".answer >> nth=0").locator("h3").text_content() == legible(QUESTION)
    assert desktop.locator("img").count() == 0


def test_the_policy_stops_what_is_not_the_pages(browsing: Open) -> None:
    blocked = r"""new Promise(done => {
        const violations = [];
        document.addEventListener("securitypolicyviolation", (event) => violations.push(event.effectiveDirective));
        const script = document.createElement("script");
        script.textContent = "window.ran = true";
        document.body.append(script);
        const picture = new Image();
        picture.src = "http://127.0.0.1:9/x.png";
        document.body.append(picture);
        setTimeout(() => done([violations.sort(), window.ran === true]), 300);
    })"""
    found = []
    with pytest.raises(AssertionError), browsing() as page:  # to the page's own checks a refusal is an error
        found.append(page.evaluate(blocked))
    assert found == [[["img-src", "script-src-elem"], False]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_no_serious_fault(browsing: Open, size: tuple[int, int], scheme: str) -> None:
    with browsing(size, scheme) as page:
        from axe_playwright_python.sync_playwright import Axe

        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        found = Axe().run(page).response
        faults = [
            (each["impact"], each["id"], [node["html"][:200] for node in each["nodes"]][:3])
            for each in found["violations"]
            if each["impact"] in ("serious", "critical")
        ]
        assert not faults, json.dumps(faults, indent=1)
        assert len(found["passes"]) > 20


@pytest.mark.parametrize("size", [DESKTOP, PHONE, (320, 640)], ids=["desktop", "phone", "narrow"])
def test_nothing_runs_over_the_edge(browsing: Open, size: tuple[int, int]) -> None:
    with browsing(size) as page:
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        over = page.evaluate(
            """[...document.querySelectorAll("body *")]
            .filter(each => !each.closest(".scroll, svg, .hidden, .skip"))
            .filter(each => each.getBoundingClientRect().right > innerWidth + 1)
            .map(each => `${each.tagName} ${each.className}`)"""
        )
        assert over == []
        small = page.evaluate(
            """[...document.querySelectorAll("button, input[type=range], summary, nav a, fieldset label")]
            .map(each => [each.tagName, each.getBoundingClientRect().height]).filter(each => each[1] < 24)"""
        )
        assert small == [], "too small for a finger"


def test_it_can_be_read_without_a_script_and_printed(browsing: Open, tmp_path: Path, written: Written) -> None:
    with browsing(java_script_enabled=False) as page:
        slider = page.get_by_role("slider").first
        answer = written.data["answers"][0]
        shown = answer["steps"][len(answer["steps"]) // 2]
        assert slider.input_value() == str(shown["step"])
        assert _kept(page, 0, answer["grids"]) == set(shown["kept"])
        assert "Without JavaScript" in (page.locator("noscript").first.text_content() or "")
    with browsing() as page:
        printed = page.pdf(path=tmp_path / "report.pdf", format="A4")
        assert printed.startswith(b"%PDF")


def test_the_gallery_is_made_of_the_page_s_parts(browsing: Open, tmp_path: Path) -> None:
    with browsing() as page:
        shots = write_gallery(page, tmp_path, answer=2, step=3)
    names = [path.name for path in shots]
    assert names == [f"report-{name}.png" for name in ("kept", "attention", "flops", "retention")]
    kept, attention, *charts = (np.asarray(Image.open(path).convert("RGB")) for path in shots)
    assert kept.shape == attention.shape
    assert (kept != attention).any()
    assert all(len(np.unique(chart.reshape(-1, 3), axis=0)) > 20 for chart in charts)
