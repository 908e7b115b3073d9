"""Ranges, and the profiles that follow from them: whatever lies within the ranges lies within every profile."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3tom_export.bundled import bundled_model
from d3tom_export.config import LOOPS, GenerationConfig, MergeConfig
from d3tom_export.engines.shapes import (
    SHAPE_INPUTS,
    EngineShapes,
    Range,
    axis_ranges,
    check_fits,
    default_shapes,
    picture_tokens,
    stage_profile,
)
from d3tom_export.errors import D3tomError
from d3tom_export.families.registry import read_config
from d3tom_export.pictures.canvas import best_canvas
from d3tom_export.pictures.views import packing
from d3tom_export.stages.contract import stage_specs
from tests.conftest import raw_config

MODEL = read_config(raw_config())
GENERATION = GenerationConfig(gen_length=8)


def test_a_range_is_three_numbers_or_one() -> None:
    assert Range.parse("400:1008:1500") == Range(400, 1008, 1500)
    assert Range.parse(" 7 ") == Range(7, 7, 7)
    assert str(Range(1, 2, 3)) == "1:2:3"


@pytest.mark.parametrize("text", ["", "1:2", "1:2:3:4", "a:b:c", "-1:2:3", "0:1:2", "3:2:4", "1:5:4", "1.5"])
def test_other_ranges_are_refused(text: str) -> None:
    with pytest.raises(D3tomError, match=r"min:opt:max|min <= opt <= max"):
        Range.parse(text)


def test_pictures_of_every_aspect_lie_within_the_default_range() -> None:
    vision = MODEL.vision
    assert vision is not None
    found = picture_tokens(vision)
    sizes = [(w, h) for w in (9, 28, 57, 200, 999) for h in (11, 28, 90, 333, 1001)]
    counts = [packing(size, best_canvas(size, vision.grid_pinpoints), vision).visual_tokens for size in sizes]
    assert found.min <= min(counts)
    assert max(counts) <= found.max
    assert default_shapes(MODEL, GENERATION).visual_tokens == Range(1, found.opt, found.max)


def test_sizes_beyond_the_model_are_refused() -> None:
    with pytest.raises(D3tomError, match="longest sequence of 640"):
        default_shapes(MODEL, GENERATION, visual_tokens=Range(1, 300, 600), text_tokens=Range(1, 10, 100))


def test_the_common_kept_count_follows_the_schedule() -> None:
    shapes = default_shapes(MODEL, GENERATION, visual_tokens=Range(1, 100, 100))
    fixed = axis_ranges(shapes, MergeConfig(1, 0.75, "fixed"), GENERATION, kv_cache=False)
    assert fixed["K"] == Range(1, 25, 100)
    unmerged = axis_ranges(shapes, MergeConfig(1, 0.75, "none"), GENERATION, kv_cache=False)
    assert unmerged["K"].opt == 100


def _ranges(largest: int) -> st.SearchStrategy[Range]:
    return st.lists(st.integers(1, largest), min_size=3, max_size=3).map(lambda sizes: Range(*sorted(sizes)))


@given(st.data(), _ranges(3), _ranges(60), _ranges(40), _ranges(12))
def test_what_lies_within_the_ranges_lies_within_every_profile(
    data: st.DataObject, batch: Range, visual: Range, text: Range, answer: Range
) -> None:
    shapes = EngineShapes(batch, visual, text, answer, Range(1, 3, 5))
    merge = MergeConfig(1, 0.7)

    def pick(size: Range) -> int:
        return data.draw(st.integers(size.min, size.max))

    sizes = {"B": pick(batch), "V": pick(visual), "G": pick(answer), "views": pick(shapes.views)}
    text_tokens = pick(text)
    sizes["K"] = data.draw(st.integers(1, sizes["V"]))
    sizes["P"] = sizes["V"] + text_tokens
    sizes["L"] = sizes["P"] + sizes["G"]
    sizes["M"] = sizes["L"] - sizes["V"] + sizes["K"]
    sizes["C"] = sizes["P"] - sizes["V"] + sizes["K"]
    sizes["S"] = data.draw(st.sampled_from((sizes["P"], sizes["G"])))
    for spec in stage_specs(MODEL, merge, answer.opt, LOOPS).values():
        axes = axis_ranges(shapes, merge, GENERATION, kv_cache=spec.loop == "cached")
        profile = stage_profile(spec, axes)
        assert all(
            low <= common <= high for sizes in profile.values() for low, common, high in zip(*sizes, strict=True)
        )
        given_shapes = {
            tensor.name: (sizes[SHAPE_INPUTS[tensor.name]],)
            if tensor.name in SHAPE_INPUTS
            else tuple(sizes[axis] if isinstance(axis, str) else axis for axis in tensor.axes)
            for tensor in spec.inputs
        }
        check_fits(spec.name, profile, given_shapes, "")


def test_an_answer_beyond_the_profile_is_refused_by_name() -> None:
    shapes = default_shapes(MODEL, GENERATION, visual_tokens=Range(1, 100, 120))
    axes = axis_ranges(shapes, MergeConfig(1, 0.7), GENERATION, kv_cache=False)
    spec = stage_specs(MODEL, MergeConfig(1, 0.7), 8, ("uncached",))["merge"]
    with pytest.raises(
        D3tomError, match=r"merge was built for visual_positions of shape \(1\.\.120\).*\(121\)\. Widen"
    ):
        check_fits("merge", stage_profile(spec, axes), {"visual_positions": (121,)}, "Widen it.")
    with pytest.raises(D3tomError, match="keep of value"):
        check_fits("merge", stage_profile(spec, axes), {"keep": (121,)}, "Widen it.")


def test_the_bundled_model_has_room_for_its_prompts() -> None:
    from d3tom_export.checkpoint.folder import default_generation, open_checkpoint

    config = open_checkpoint(bundled_model()).config
    generation = default_generation(config, bundled_model())
    shapes = default_shapes(config, generation)
    assert shapes.text_tokens.max >= 256
    assert shapes.answer_tokens == Range(*[generation.gen_length] * 3)
