"""Numbers and choices of configs: kinds and bounds, in phrases that stay short."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3tom_export.trust.fields import canvas_sizes, fixed_field_problems, number_problems, shown

_ANY = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers()))


@pytest.mark.parametrize("value", [True, 0, -1, 1.0, "4", [4], {}, 2**31, 10**400, float("nan")])
def test_what_is_no_size(value: object) -> None:
    (problem,) = number_problems({"size": value}, integers={"size": 2**31 - 1}, prefix="vision_config.")
    assert problem.startswith("vision_config.size is ")
    assert "expected a positive integer" in problem
    assert len(problem) < 200


@pytest.mark.parametrize("value", [True, 0, -1.0, "1", float("inf"), float("nan"), 10**400, 1e-40, 2.5])
def test_what_is_no_epsilon(value: object) -> None:
    (problem,) = number_problems({"eps": value}, floats={"eps": (1e-30, 1)})
    assert "expected a positive number" in problem


@given(_ANY)
def test_accepted_numbers_are_numbers(value: Any) -> None:
    if value is not None and not number_problems({"n": value}, integers={"n": 1024}):
        assert type(value) is int
        assert 1 <= value <= 1024
    if value is not None and not number_problems({"x": value}, floats={"x": (1, 1e12)}):
        assert 1 <= float(value) <= 1e12


def test_choices_are_of_the_kind_too() -> None:
    allowed: dict[str, tuple[Any, ...]] = {"rope": (True,), "block_type": ("llama",), "resampler": (None,)}
    assert fixed_field_problems({"rope": True, "block_type": None, "resampler": None}, allowed) == []
    problems = fixed_field_problems({"rope": 1, "block_type": ["llama"], "resampler": "qformer"}, allowed)
    assert [problem.split(" is ")[0] for problem in problems] == ["rope", "block_type", "resampler"]


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ([[22400, 22400]], "the largest of 501,760,000 pixels; at most 256 are supported"),
        ([[112, 224]] * 1_000_000, "has 1,000,000 canvases"),
        ([[112 * 257, 112]], "in at most 256 views of 112 by 112"),
        ([[112, 224], [113, 224]], "in multiples of 112"),
        ([[112, 224], [112.0, 224]], "in multiples of 112"),
        ([[112, 224], [112]], "in multiples of 112"),
        ([["112", "224"]], "in multiples of 112"),
        ([[True, 224]], "in multiples of 112"),
        ("[[112, 224]]", "in multiples of 112"),
        ([], "in multiples of 112"),
        ({"112": 224}, "in multiples of 112"),
    ],
)
def test_canvases_have_a_limit(pairs: object, says: str) -> None:
    grid, (problem,) = canvas_sizes("image_grid_pinpoints", pairs, 112)
    assert grid == ()
    assert says in problem
    assert len(problem) < 400


def test_published_canvases_are_taken() -> None:
    released = [[384, 768], [768, 384], [768, 768], [1152, 384], [384, 1152]]
    largest = [[384 * columns, 384 * rows] for columns in range(1, 7) for rows in range(1, 7)]
    for pairs in (released, largest):
        assert canvas_sizes("grid", pairs, 384) == (tuple(map(tuple, pairs)), [])


def test_long_values_are_shortened() -> None:
    assert shown(10**9) == "1,000,000,000"
    assert shown(10**5000) == "a number of more than 24 digits"
    assert len(shown(["x"] * 10**6)) < 250
