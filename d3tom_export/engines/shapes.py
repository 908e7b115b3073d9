"""Which sizes an engine serves: the ranges of every dynamic axis, and the optimization profile of each stage.

TensorRT wants for each input a smallest, a most common ("opt", what kernels are tuned for) and a largest shape. All of
them follow from four ranges a user can think in: batch, visual tokens V, the prompt's other tokens, answer tokens G.
Imports no TensorRT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from d3tom_export.config import GenerationConfig, MergeConfig, ModelConfig, VisionConfig
from d3tom_export.errors import D3tomError, SizeError
from d3tom_export.merging.schedule import kept_tokens, merge_ratio
from d3tom_export.pictures.canvas import count_visual_tokens
from d3tom_export.stages.contract import StageSpec, TensorSpec

SHAPE_INPUTS = {"keep": "K", "answer_length": "G"}
"""Inputs of one number that is an axis: TensorRT profiles their values, and reads them on the host."""


SHORT_PROMPT = "short prompt"
"""Beside the contract's axes: rows of a prompt behind l*, which may be C where it is merged at its prefill, or P."""


class Range(NamedTuple):
    """Smallest, most common and largest size of an axis."""

    min: int
    opt: int
    max: int

    @classmethod
    def parse(cls, text: str) -> Range:
        """Read ``min:opt:max``, or one number for all three. Raises :class:`D3tomError` where it is neither."""
        found = re.fullmatch(r"(\d+)(?::(\d+):(\d+))?", text.strip())
        if not found:
            raise D3tomError(
                f"{text!r} is not a range of sizes: expected min:opt:max, as 400:1008:1500, or one number."
            )
        first = int(found[1])
        return cls(first, int(found[2]), int(found[3])).checked() if found[2] else cls(first, first, first).checked()

    def checked(self) -> Range:
        """Itself, if 1 <= min <= opt <= max."""
        if not 1 <= self.min <= self.opt <= self.max:
            raise D3tomError(f"The range {self} does not satisfy 1 <= min <= opt <= max.")
        return self

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"

    def plus(self, *others: Range) -> Range:
        """The range of a sum."""
        terms = (self, *others)
        return Range(*(sum(term[i] for term in terms) for i in range(3)))


@dataclass(frozen=True)
class EngineShapes:
    """What an engine is to serve."""

    batch: Range
    visual_tokens: Range
    """V of one answer, all of its pictures together; 1 stands for a question without any."""
    text_tokens: Range
    """The prompt's tokens that are not visual."""
    answer_tokens: Range
    views: Range
    """Views of one call of the vision stage: a picture's thumbnail and tiles."""

    def to_json(self) -> dict[str, str]:
        return {name: str(value) for name, value in vars(self).items()}


@cache
def picture_tokens(config: VisionConfig) -> Range:
    """Smallest V, V of a square picture, and largest V over pictures of every aspect from 1:16 to 16:1."""
    sizes = [(width, height) for width in range(16, 257, 8) for height in range(16, 257, 8)]
    scaled = {(width * scale, height * scale) for width, height in sizes for scale in (1, 4, 16)}
    counts = [count_visual_tokens(size, config) for size in scaled]
    largest = max(max(pinpoint) for pinpoint in config.grid_pinpoints)
    return Range(min(counts), count_visual_tokens((largest, largest), config), max(counts))


def default_shapes(
    model: ModelConfig,
    generation: GenerationConfig,
    *,
    batch: Range | None = None,
    visual_tokens: Range | None = None,
    text_tokens: Range | None = None,
    answer_tokens: Range | None = None,
) -> EngineShapes:
    """What is given, and for the rest what the model's pictures and its way of answering imply.

    Raises :class:`D3tomError` where prompt and answer would exceed the model's longest sequence.
    """
    views, limit = Range(1, 1, 1), model.language.max_sequence_length
    if model.vision is not None:
        pictures = picture_tokens(model.vision)
        # One row stands in for the visual tokens of a question without pictures.
        visual_tokens = visual_tokens or Range(1, pictures.opt, pictures.max)
        side = model.vision.image_size
        tiles = [1 + (width // side) * (height // side) for width, height in model.vision.grid_pinpoints]
        views = Range(min(tiles), max(tiles), max(tiles))
    else:
        most = max(1, min(1024, limit // 4))  # tokens that stand in for visual ones
        visual_tokens = visual_tokens or Range(1, min(256, most), most)
    answer_tokens = answer_tokens or Range(*(generation.gen_length,) * 3)
    room = limit - visual_tokens.max - answer_tokens.max
    if text_tokens is None:
        largest = max(1, min(512, room))
        text_tokens = Range(1, min(64, largest), largest)
    if text_tokens.max > room:
        raise D3tomError(
            f"An engine for {visual_tokens.max} visual, {text_tokens.max} text and {answer_tokens.max} answer tokens "
            f"would exceed the model's longest sequence of {limit}. Lower the last number of --visual-tokens, "
            "--text-tokens or --answer-tokens."
        )
    return EngineShapes(batch or Range(1, 1, 1), visual_tokens, text_tokens, answer_tokens, views)


def _common_kept(visual_tokens: int, merge: MergeConfig, generation: GenerationConfig) -> int:
    """K of the middle merging step: what kernels ought to be tuned for."""
    steps, first = generation.steps_per_block, int(merge.merge_at != "prefill")
    kept = [kept_tokens(visual_tokens, merge_ratio(merge, step, steps)) for step in range(first, steps)]
    return sorted(kept)[len(kept) // 2] if kept else visual_tokens


def axis_ranges(
    shapes: EngineShapes, merge: MergeConfig, generation: GenerationConfig, *, kv_cache: bool
) -> dict[str, Range]:
    """The range of every dynamic axis (stages/contract.py), and of :data:`SHORT_PROMPT`.

    K may be anything up to V: a run may override the ratio.
    """
    visual, text, answer = shapes.visual_tokens, shapes.text_tokens, shapes.answer_tokens
    merge = merge.in_loop(kv_cache)
    kept = Range(1, _common_kept(visual.opt, merge, generation), visual.max)
    prompt = visual.plus(text)
    return {
        "B": shapes.batch,
        "P": prompt,
        "G": answer,
        "L": prompt.plus(answer),
        "V": visual,
        "K": kept,
        "M": kept.plus(text, answer),
        "C": kept.plus(text),
        "S": Range(1, answer.opt, max(prompt.max, answer.max)),
        "views": shapes.views,
        SHORT_PROMPT: kept.plus(text) if merge.merge_at == "prefill" else prompt,
    }


Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Smallest, most common and largest shape of each input; for :data:`SHAPE_INPUTS` the values in place of the shape."""


def stage_profile(stage: StageSpec, axes: Mapping[str, Range]) -> Profile:
    """The optimization profile of one stage; ``axes`` are those of :func:`axis_ranges`."""
    if stage.name == "rotate":  # the prompt's rows of every layer, behind l* too
        axes = {**axes, "P": axes["P"]._replace(min=min(axes["P"].min, axes[SHORT_PROMPT].min))}

    def sizes(tensor: TensorSpec, end: int) -> tuple[int, ...]:
        if tensor.name in SHAPE_INPUTS:
            return (axes[SHAPE_INPUTS[tensor.name]][end],)
        return tuple(axes[axis][end] if isinstance(axis, str) else axis for axis in tensor.axes)

    return {tensor.name: (sizes(tensor, 0), sizes(tensor, 1), sizes(tensor, 2)) for tensor in stage.inputs}


def check_fits(stage: str, profile: Profile, given: Mapping[str, tuple[int, ...]], remedy: str) -> None:
    """Refuse inputs that the profile does not cover; ``given`` has shapes, or values of :data:`SHAPE_INPUTS`."""
    for name, found in given.items():
        smallest, _, largest = profile[name]
        inside = len(found) == len(smallest) and all(
            low <= size <= high for low, size, high in zip(smallest, found, largest, strict=True)
        )
        if not inside:
            kind = "value" if name in SHAPE_INPUTS else "shape"
            raise SizeError(
                f"Stage {stage} was built for {name} of {kind} {_box(smallest, largest)}, and this answer needs "
                f"{_box(found, found)}. {remedy}"
            )


def _box(smallest: tuple[int, ...], largest: tuple[int, ...]) -> str:
    pairs = zip(smallest, largest, strict=True)
    return f"({', '.join(str(low) if low == high else f'{low}..{high}' for low, high in pairs)})"


def profile_table(profile: Profile) -> list[dict[str, Any]]:
    """``profile`` as rows for people and for JSON."""
    return [
        {"input": name, "min": list(low), "opt": list(common), "max": list(high)}
        for name, (low, common, high) in profile.items()
    ]
