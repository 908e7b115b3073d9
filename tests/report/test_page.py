"""The page as a file: well-formed, of one piece, its numbers those of the run, and nobody's markup but ours."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from d3tom_export.report import page
from d3tom_export.report.data import Report
from d3tom_export.report.page import write_page
from d3tom_export.trust.terminal import legible
from tests.report.conftest import HOSTILE, QUESTION, Written

VOID = {"meta", "input", "br", "img", "link", "hr"}
FETCHING = {"src", "href", "data", "action", "poster", "srcset", "formaction", "background", "xlink:href"}


class Parsed(HTMLParser):
    """A page's elements, which must be closed in the order in which they were opened."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.contents: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.contents.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        return [data for name, data in self.contents if name == tag]


def _data(parsed: Parsed) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(next(text for text in parsed.text("script") if text.startswith("[")))
    return found


@pytest.fixture(scope="module")
def parsed(written: Written) -> Parsed:
    return Parsed(written.html)


def test_a_page_is_one_well_formed_document_of_sane_size(parsed: Parsed, written: Written) -> None:
    assert written.html.startswith("<!doctype html>")
    assert written.path.stat().st_size < 1_000_000
    assert parsed.of("html") == [{"lang": "en"}]
    assert len(parsed.of("h1")) == len(parsed.of("main")) == len(parsed.of("title")) == 1
    ids = Counter(attributes["id"] for _, attributes in parsed.elements if "id" in attributes)
    assert max(ids.values()) == 1
    named = [name for _, attributes in parsed.elements for key in ("aria-labelledby", "for", "aria-describedby")
             if (name := attributes.get(key))]  # fmt: skip
    named += [link[1:] for _, attributes in parsed.elements if (link := attributes.get("href") or "").startswith("#")]
    named += re.findall(r"url\(#([^)]+)\)", written.html)
    assert set(named) <= ids.keys()


def test_nothing_is_fetched_and_the_policy_lets_nothing_be(parsed: Parsed) -> None:
    for tag, attributes in parsed.elements:
        for name in FETCHING & attributes.keys():
            assert (attributes[name] or "").startswith(("#", "data:image/")), f"{tag} {name}"
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")], tag
    style = "".join(parsed.text("style"))
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] or "" for a in parsed.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    own = {}
    for name, content in (("style-src", style), ("script-src", parsed.text("script")[-1])):
        own[name] = f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    assert rules == own | {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}


def test_what_the_slider_knows_is_what_ran(parsed: Parsed, written: Written) -> None:
    known, ran = _data(parsed), written.data["answers"]
    assert len(known) == len(ran) == 2
    for shown, answer in zip(known, ran, strict=True):
        visual = answer["visual_tokens"]
        assert sum(grid["rows"] * grid["columns"] + len(grid["newlines"]) for grid in shown["grids"]) == visual
        assert len(shown["steps"]) == len(answer["steps"]) == 8
        for step, expected in zip(shown["steps"], answer["steps"], strict=True):
            assert (step["kept"], step["keep"]) == (expected["kept"], expected["keep"])
            assert "".join(text for text, _ in step["pieces"]) == expected["answer"]
            assert f"{expected['keep']:,}" in step["status"] or not expected["merged"]
            assert step["status"] in step["value"]
            if expected["importance"] is None:
                assert step["levels"] is None
                continue
            largest = max(expected["importance"])
            exact = [(page.LEVELS - 1) * each / largest for each in expected["importance"]]
            assert len(step["levels"]) == visual
            assert all(abs(int(level) - each) < 0.51 for level, each in zip(step["levels"], exact, strict=True))
    assert [step["merged"] for step in ran[0]["steps"]] == [False, *[True] * 7]


def test_tables_and_key_figures_say_what_ran(parsed: Parsed, written: Written) -> None:
    cells = {" ".join(text.split()) for tag in ("td", "th", "b") for text in parsed.text(tag)}
    for answer in written.data["answers"]:
        for step in answer["steps"]:
            assert str(step["keep"]) in cells
            if step["held_importance"] is not None:
                assert f"{100 * step['held_importance']:.1f} %" in cells
        assert f"{100 * answer['flops']['saved']:.1f} %" in cells
    mean = sum(answer["mean_kept"] for answer in written.data["answers"]) / 2
    assert f"{100 * mean:.1f} %" in cells
    assert "passed" in cells
    assert written.data["parity"]["passed"]
    told = " ".join(parsed.text("p"))
    here = written.data["reductions"]["here"]
    assert f"save {100 * here:.1f}" in told
    layer = written.data["reductions"]["layer"]
    assert f"{written.data['redundancy']['median'][-1][layer]:.3f}" in told
    assert {"62.5 %", "95.0 %", "90.0 %"} <= cells
    assert written.data["hashes"]["manifest.json"] in parsed.text("code")


def test_every_figure_is_told_in_words_with_numbers(parsed: Parsed) -> None:
    figures = [attributes for attributes in parsed.of("svg") if attributes.get("role") == "img"]
    told = {attributes["id"] for attributes in parsed.of("p") if "id" in attributes}
    for attributes in figures:
        assert attributes.get("aria-label") or attributes["aria-labelledby"] in told
    assert len([each for each in figures if each.get("class") == "figure"]) == 7
    assert len(parsed.of("caption")) == len(parsed.of("table")) == 7 + 2 + 1


def test_a_strangers_words_are_words(parsed: Parsed, written: Written) -> None:
    assert parsed.of("img") == []
    assert len(parsed.of("script")) == 2
    assert legible(QUESTION) in parsed.text("h3")
    assert "\u202e" not in written.html
    assert "\x07" not in written.html


def test_whatever_is_hostile_stays_text(made_up: Report) -> None:
    html = write_page(made_up).decode()
    parsed = Parsed(html)
    assert (parsed.of("img"), len(parsed.of("script")), len(parsed.of("style"))) == ([], 2, 1)
    assert "onerror" in html
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    assert "49" not in "".join(parsed.text("h1"))
    shown = legible(HOSTILE)
    assert parsed.text("h1") == [shown]
    assert parsed.text("title") == [f"{shown}: D3ToM report"]
    assert "\x07" not in html
    assert "\u202e" not in html
    (known,) = _data(parsed)
    assert known["steps"][1]["pieces"] == [[HOSTILE, "said"]]
    assert "Failed" in parsed.text("p")


def test_names_that_are_no_text_are_written_all_the_same(made_up: Report) -> None:
    html = write_page(replace(made_up, title="a\ud800b\0")).decode("utf-8")
    assert "\0" not in html
    Parsed(html)


def test_the_same_report_is_the_same_page(made_up: Report) -> None:
    assert write_page(made_up) == write_page(made_up)


def test_sections_without_numbers_say_why(made_up: Report) -> None:
    reasons = {name: f"No {name}: run `{name} --it`." for name in
               ("importance", "redundancy", "flops", "retention", "parity")}  # fmt: skip
    steps = [replace(step, importance=None) for step in made_up.answers[0].steps]
    bare = replace(
        made_up, answers=[replace(made_up.answers[0], steps=steps)], reductions=None, redundancy=None, settings=None,
        parity=None, left_out=reasons,
    )  # fmt: skip
    parsed = Parsed(write_page(bare).decode())
    for name in reasons:
        assert f"No {name}: run " in parsed.text("p")
        assert f"{name} --it" in parsed.text("code")
    assert not [each for each in parsed.of("input") if each.get("type") == "radio"]


def test_answers_without_pictures_have_a_slider_too(made_up: Report) -> None:
    steps = [replace(step, kept=None, visual_tokens=0, importance=None) for step in made_up.answers[0].steps]
    blind = replace(made_up.answers[0], picture=None, grids=[], visual_tokens=0, steps=steps)
    parsed = Parsed(write_page(replace(made_up, answers=[blind], left_out={"importance": "none"})).decode())
    assert len([each for each in parsed.of("input") if each.get("type") == "range"]) == 1
    assert "Step 2 of 2." in parsed.text("p")
