"""What of a model's weights is stored in few bits, as options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from d3tom_export.config import QUANT_FORMATS
from d3tom_export.errors import D3tomError
from d3tom_export.quantize.plan import QuantizeRequest

from .sections import Section, apply_options, heading

Function = TypeVar("Function", bound=Callable[..., Any])

_OPTIONS = (
    heading(Section.QUANTIZATION),
    click.option(
        "--quantize",
        type=click.Choice(QUANT_FORMATS),
        help="Weights of the language model's products in few bits: int4 in blocks, int8 or fp8 with a scale for each "
        "output, or nvfp4 in blocks of 16 for engines on SM100 and later. Everything else stays as it is.",
    ),
    click.option(
        "--quantize-block",
        type=int,
        metavar="N",
        help="Inputs that share a scale in int4, 16 or more; a weight whose inputs it does not divide gets half of it, "
        "or less.  [default: 128]",
    ),
    click.option("--quantize-head", is_flag=True, help="Quantize the language head too."),
    click.option("--quantize-tower", is_flag=True, help="Quantize the vision tower and the projector too."),
)
_ASYMMETRIC = click.option(
    "--quantize-asymmetric",
    is_flag=True,
    help="With int4: a zero point beside each scale, so that a block's sixteen values go from its lowest number to its "
    "highest. For ONNX Runtime; TensorRT takes none.",
)
_ACTIVATIONS = click.option(
    "--quantize-activations",
    is_flag=True,
    help="With fp8: round what the blocks' weights are multiplied with to fp8 too, at scales that --quantize-samples "
    "give, so that kernels of fp8 run the products.",
)
_SAMPLES = click.option(
    "--quantize-samples",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Round by what the products are multiplied with while the first N samples of the checkpoint's samples.zip, or "
    "made-up prompts where there is none, are answered (GPTQ), which takes a pass of each through the model in "
    "float32; 0: each number to the nearest.",
)


def build_options(function: Function) -> Function:
    """:func:`quantize_options`, and how weights are rounded."""
    return apply_options(function, [*_OPTIONS, _ASYMMETRIC, _SAMPLES, _ACTIVATIONS])


def quantize_options(function: Function) -> Function:
    """The options of :func:`quantize_from`."""
    return apply_options(function, _OPTIONS)


def quantize_from(given: dict[str, Any]) -> QuantizeRequest | None:
    """What the options ask for, which are taken out of ``given``; None: weights as they are."""
    form, block, head, tower = (given.pop(f"quantize{part}") for part in ("", "_block", "_head", "_tower"))
    samples, activations = given.pop("quantize_samples", 0), given.pop("quantize_activations", False)
    asymmetric = given.pop("quantize_asymmetric", False)
    if form is None and (block is not None or head or tower or samples or activations or asymmetric):
        raise click.UsageError(
            "--quantize-block, -head, -tower, -asymmetric, -samples and -activations go with --quantize."
        )
    try:
        return None if form is None else QuantizeRequest(form, block, head, tower, samples, activations, asymmetric)
    except D3tomError as error:
        raise click.UsageError(str(error)) from None
