"""The options of ``build`` that concern engines, and what they become."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from d3tom_export.export.request import EngineRequest

from .options import PRECISIONS, F
from .sections import Section, apply_options, heading, under

if TYPE_CHECKING:
    from d3tom_export.engines.shapes import Range
    from d3tom_export.export.add import BuiltEngines

ENGINES = ("none", "tensorrt", "tensorrt-rtx")


class RangeType(click.ParamType):
    """``min:opt:max``."""

    name = "min:opt:max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Range:
        from d3tom_export.engines.shapes import Range
        from d3tom_export.errors import D3tomError

        if isinstance(value, Range):
            return value
        try:
            return Range.parse(value)
        except D3tomError as error:
            self.fail(str(error), param, ctx)


def _range(flag: str, help_text: str) -> Callable[[F], F]:
    return click.option(flag, type=RangeType(), metavar="MIN:OPT:MAX", help=help_text)


def engine_options(function: F) -> F:
    """Engines to build from the stages."""
    return apply_options(
        function,
        [
            heading(Section.ENGINES),
            click.option(
                "--engine",
                type=click.Choice(ENGINES),
                default="none",
                show_default=True,
                help="Engines to build from the stages: by TensorRT for the GPU at hand, or by TensorRT-RTX, ahead of "
                "time and without one.",
            ),
            click.option(
                "--sm",
                "sms",
                type=click.IntRange(min=50),
                multiple=True,
                metavar="SM",
                help="Compute capability to build for, as 89 or 120. Given several times, TensorRT-RTX's engines serve "
                "all of them, with the weights in them once.  [default: of the GPU at hand]",
            ),
            under(
                Section.QUANTIZATION,
                click.option(
                    "--precision",
                    type=click.Choice(PRECISIONS),
                    default="fp32",
                    show_default=True,
                    help="Precision of the engines; scores, norms, softmax and merge sums stay float32. Without "
                    "engines fp16, bf16 and int8 add graphs for ONNX Runtime to the float32 ones, int8 for the CPU.",
                ),
            ),
            click.option(
                "--merge-op",
                type=click.Choice(["plugin", "aot", "onnx"]),
                default="plugin",
                show_default=True,
                help="The merge as a TensorRT plugin with kernels of its own; as ahead-of-time plugins inside the "
                "engine, which then needs no plugin to run (--engine tensorrt); or as standard layers.",
            ),
            click.option(
                "--accumulate",
                type=click.Choice(["fp32", "any"]),
                default="fp32",
                show_default=True,
                help="What products of fp16 engines add their terms up in: float32, or whatever the builder finds "
                "fastest. Those of bf16 always add in float32.",
            ),
            _range("--visual-tokens", "Visual tokens that engines serve.  [default: 1, a square picture's, the most]"),
            _range("--text-tokens", "The prompt's other tokens that engines serve.  [default: 1:64:512]"),
            _range("--answer-tokens", "Answer tokens that engines serve.  [default: --gen-length]"),
            _range("--batch", "Answers at once that engines serve.  [default: 1]"),
            click.option(
                "--optimization-level",
                type=click.IntRange(0, 5),
                help="How long TensorRT searches for kernels.  [default: TensorRT's own]",
            ),
            click.option(
                "--workspace",
                "workspace_mib",
                type=click.IntRange(min=1),
                metavar="MIB",
                help="The most scratch memory a kernel may take.  [default: TensorRT's own]",
            ),
        ],
    )


OPTIONS = (
    *("engine", "sms", "precision", "merge_op", "accumulate", "visual_tokens", "text_tokens", "answer_tokens", "batch"),
    *("optimization_level", "workspace_mib"),
)
"""The options' names."""


def engine_request(options: dict[str, Any]) -> EngineRequest | None:
    """The engines that ``build``'s options ask for (``options`` is emptied of them); None for none.

    Refuses what cannot be built here before any work begins: a missing toolkit, an architecture it does not know.
    """
    given = {name: options.pop(name) for name in OPTIONS}
    if given["engine"] == "none":
        context = click.get_current_context()
        idle = [
            name
            for name in OPTIONS[1:]
            if name != "precision" and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        ]
        if idle:
            flags = [flag for option in context.command.params if option.name in idle for flag in option.opts]
            raise click.UsageError(
                f"{', '.join(flags)} concerns engines, and --engine none builds none. Add --engine tensorrt or "
                "--engine tensorrt-rtx."
            )
        return None

    ranges = {name: given[name] for name in ("batch", "visual_tokens", "text_tokens", "answer_tokens")}
    return EngineRequest.of(
        given["engine"],
        given["precision"],
        given["sms"],
        given["merge_op"],
        given["accumulate"],
        ranges,
        given["optimization_level"],
        given["workspace_mib"],
    )


def describe(built: BuiltEngines) -> list[str]:
    """Lines for people: the sizes that are served, then what became of each stage's engine, and why."""
    from d3tom_export.engines.shapes import axis_ranges

    manifest, options = built.bundle.manifest, built.options
    lines = [f"Sizes (min:opt:max), merge as {_MERGE_AS[options.merge_op]}:"]
    tables = {
        loop: axis_ranges(options.shapes, manifest.merge, manifest.generation, kv_cache=loop == "cached")
        for loop in manifest.loops
    }
    for axis, meaning in _AXES.items():
        sizes = " / ".join(dict.fromkeys(str(table[axis]) for table in tables.values()))
        lines.append(f"  {axis:5} {meaning:42} {sizes}")
    for outcome in built.outcomes:
        record, target = outcome.record, outcome.record.target
        lines.append(
            f"{target.folder}/{record.key}.plan  {record.plan_bytes / 1e6:.1f} MB, "
            f"{'unchanged, kept' if outcome.reused else 'built'}"
            + (f", plugin layers: {record.plugin_layers}" if record.plugin_layers else "")
        )
        if outcome.stale:
            lines.append(f"    the one that was there differed in {', '.join(outcome.stale)}")
        if target.precision != "fp32" and not outcome.reused:
            lines.append(f"    {outcome.precision}")
    return lines


_MERGE_AS = {"plugin": "a plugin", "aot": "ahead-of-time plugins", "onnx": "standard layers"}
_AXES = {
    "B": "answers at once",
    "V": "visual tokens",
    "K": "kept visual tokens",
    "P": "prompt tokens",
    "G": "answer tokens",
    "L": "sequence, P + G",
    "M": "merged sequence, L - V + K",
    "C": "merged cache, P - V + K",
    "views": "views of a picture",
}
