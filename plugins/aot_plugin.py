"""The merge as ahead-of-time plugins of ``tensorrt.plugin``: engines that carry the kernels and need no library.

Such a plugin is exactly one kernel and has no workspace (reference/tensorrt.md 1.2), so ``D3ToMMerge`` becomes a chain
of them, reached through a second function body of the operator:

    D3ToMNearest (normed, kept) -> (scores, slots)
    D3ToMOrder (scores, slots, kept) -> (order, starts)
    D3ToMSum (hidden, order, starts) -> merged          for every row input

TensorRT's own package only (10.8 or later; reading these nodes from ONNX: 10.9): TensorRT-RTX has no such plugins.
TensorRT launches with the inputs, then 32-bit sizes, then the outputs, which is how the kernels are written. Triton
declares two more pointers after those, for scratch memory that these kernels do not use; they are taken out of the PTX,
since TensorRT would pass nothing for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from d3tom_export.errors import D3tomError
from d3tom_export.plugins.compiled import check_sm, check_triton, compile_variant
from d3tom_export.plugins.identity import source_hash
from d3tom_export.plugins.launch import ALIGNMENT, Variant, row_names, spec
from d3tom_export.plugins.merge_op import DOMAIN, signature

if TYPE_CHECKING:
    import onnx

NEAREST, ORDER, SUM = "D3ToMNearest", "D3ToMOrder", "D3ToMSum"

_DEFAULT_SHARED = 48 * 1024
_BODY = """
<domain: "{domain}", opset_import: ["" : {opset}, "{domain}" : 1]>
{signature}
{{
    scores, slots = {domain}.{nearest} <plugin_namespace = "{domain}", aot = 1> (normed, kept)
    order, starts = {domain}.{order} <plugin_namespace = "{domain}", aot = 1> (scores, slots, kept)
{sums}
}}
"""
_SUM = """
    {merged} = {domain}.{sum} <plugin_namespace = "{domain}", aot = 1> ({hidden}, order, starts)
"""
_registered: dict[str, dict[str, int]] = {}


_SOURCES = ("kernels.py", "launch.py", "archive.py", "compiled.py", "identity.py", "aot_plugin.py")


def aot_identity() -> str:
    """A content hash of everything that decides what the three plugins put into an engine, but for Triton's version."""
    return source_hash(*_SOURCES)


def aot_merge_function(opset: int, rows: int = 1) -> onnx.FunctionProto:
    """A body of ``D3ToMMerge`` made of the three plugins, for graphs of ``opset`` that TensorRT alone will read.

    It has one plugin of each kind, and one more for each of the ``rows`` inputs after the first.

    The node itself must then carry no ``plugin_namespace``: it is to be inlined.
    """
    import onnx.parser

    sums = "".join(
        _SUM.format(domain=DOMAIN, sum=SUM, hidden=hidden, merged=merged) for hidden, merged in row_names(rows)
    )
    head = signature(rows)
    text = _BODY.format(domain=DOMAIN, opset=opset, signature=head, nearest=NEAREST, order=ORDER, sums=sums)
    return onnx.parser.parse_function(text)


def register_aot_merge(trt: Any, sm: int) -> None:
    """Register the three plugins with ``trt`` for engines built on a GPU of ``sm``; again only to change ``sm``.

    :raises D3tomError: ``trt`` offers no ahead-of-time plugins, Triton is missing, or ``sm`` is unknown.
    """
    check_sm(sm)
    check_triton()
    if not hasattr(trt, "QuickPluginCreationRequest"):
        raise D3tomError(
            f"{trt.__name__} {getattr(trt, '__version__', '')} has no ahead-of-time plugins. They come with TensorRT "
            "10.8 and not with TensorRT-RTX; use the plugin that is loaded beside the engine, or `--merge-op onnx`."
        )
    if trt.__name__ in _registered:
        _registered[trt.__name__]["sm"] = sm
        return
    import importlib

    trtp = importlib.import_module(f"{trt.__name__}.plugin")
    target = {"sm": sm}
    _register(trt, trtp, target)
    _registered[trt.__name__] = target


def without_scratch(ptx: str, symbol: str, parameters: int) -> str:
    """``ptx`` with only the first ``parameters`` of its entry declared.

    :raises D3tomError: one of the others is read somewhere.
    """
    head, declared, body = _split_entry(ptx, symbol)
    kept, dropped = declared[:parameters], declared[parameters:]
    for text in dropped:
        name = text.split()[-1]
        if re.search(rf"\b{re.escape(name)}\b", body):
            raise D3tomError(
                f"The merge kernel {symbol} uses Triton's scratch memory ({name}), which TensorRT's ahead-of-time "
                "plugins cannot pass. Use Triton 3.6 to 3.9, or the plugin that is loaded beside the engine."
            )
    return head + "(\n\t" + ",\n\t".join(kept) + "\n)" + body


def _split_entry(ptx: str, symbol: str) -> tuple[str, list[str], str]:
    """What stands before the entry's parameters, each parameter's declaration, and what follows them."""
    match = re.search(rf"\.visible\s+\.entry\s+{re.escape(symbol)}\s*\((.*?)\)", ptx, re.DOTALL)
    if match is None:
        raise D3tomError(f"The compiled merge kernel holds no entry {symbol}; report this as a bug.")
    start = ptx.rindex("(", 0, match.start(1))
    declared = [part.strip() for part in match.group(1).split(",")]
    return ptx[:start], declared, ptx[match.end() :]


def _register(trt: Any, trtp: Any, target: dict[str, int]) -> None:
    types = {trt.float32: "float32", trt.float16: "float16", trt.bfloat16: "bfloat16"}

    def row_type(desc: Any) -> str:
        if desc.dtype not in types:
            raise D3tomError(f"The merge takes float32, float16 or bfloat16 rows; TensorRT gives it {desc.dtype}.")
        return types[desc.dtype]

    def aligned(size: Any) -> bool:
        return bool(size.is_constant) and size.constant_value() % ALIGNMENT == 0

    def kernel(variant: Variant, grid: tuple[Any, ...], sizes: tuple[Any, ...]) -> tuple[Any, ...]:
        built = compile_variant(variant, target["sm"])
        if built.shared > _DEFAULT_SHARED:
            raise D3tomError(
                f"The merge kernel {variant.name} needs {built.shared} bytes of shared memory; report this."
            )
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = grid
        launch.block_x, launch.shared_mem = built.threads, built.shared
        ptx = without_scratch(built.ptx, built.symbol, len(spec(variant).arguments))
        return built.symbol, ptx, launch, trtp.SymIntExprs.from_tuple([trtp.SymInt32(size) for size in sizes])

    # Shapes, then kernels. Only the small tiles are used: they need no more shared memory than any launch may have, and
    # the number of blocks, a shape here, must not hang on a choice made by size.
    def nearest(normed: Any, kept: Any) -> Any:
        batch, visual, _ = normed.shape_expr
        blocks = trtp.cdiv(kept.shape_expr[1], 32)
        shape = (batch, blocks, visual)
        return trtp.from_shape_expr(shape, trt.float32), trtp.from_shape_expr(shape, trt.int32)

    def nearest_kernel(normed: Any, kept: Any, outputs: Any, tactic: int) -> Any:
        batch, visual, depth = normed.shape_expr
        count = kept.shape_expr[1]
        variant = Variant("nearest-narrow" if aligned(depth) else "nearest-ragged", row_type(normed))
        tiles = spec(variant).constants
        grid = (trtp.cdiv(visual, tiles["BLOCK_V"]), trtp.cdiv(count, tiles["BLOCK_K"]), batch)
        return kernel(variant, grid, (visual, count, depth))

    def order(scores: Any, slots: Any, kept: Any) -> Any:
        batch, _, visual = scores.shape_expr
        return (
            trtp.from_shape_expr((batch, visual), trt.int32),
            trtp.from_shape_expr((batch, kept.shape_expr[1]), trt.int32),
        )

    def order_kernel(scores: Any, slots: Any, kept: Any, outputs: Any, tactic: int) -> Any:
        batch, blocks, visual = scores.shape_expr
        variant = Variant("order", "")
        grid = (trtp.cdiv(visual, spec(variant).constants["BLOCK_V"]), batch, 1)
        return kernel(variant, grid, (visual, kept.shape_expr[1], blocks))

    def total(hidden: Any, order: Any, starts: Any) -> Any:
        batch, _, width = hidden.shape_expr
        return trtp.from_shape_expr((batch, starts.shape_expr[1], width), hidden.dtype)

    def total_kernel(hidden: Any, order: Any, starts: Any, outputs: Any, tactic: int) -> Any:
        batch, visual, width = hidden.shape_expr
        count = starts.shape_expr[1]
        variant = Variant("sum" if aligned(width) else "sum-ragged", row_type(hidden))
        grid = (trtp.cdiv(width, spec(variant).constants["BLOCK_W"]), count, batch)
        return kernel(variant, grid, (visual, count, width))

    desc: Any = trtp.TensorDesc
    pair: Any = tuple.__class_getitem__((desc, desc))
    for name, shapes, launched, result in (
        (NEAREST, nearest, nearest_kernel, pair),
        (ORDER, order, order_kernel, pair),
        (SUM, total, total_kernel, desc),
    ):
        _annotate(shapes, desc, result)
        _annotate(launched, desc, tuple.__class_getitem__((str, str, trtp.KernelLaunchParams, trtp.SymExprs)))
        trtp.register(f"{DOMAIN}::{name}")(shapes)
        trtp.aot_impl(f"{DOMAIN}::{name}")(launched)


def _annotate(function: Callable[..., Any], desc: Any, result: Any) -> None:
    """The type hints that TensorRT reads at run time, over classes that exist only then."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    hints: dict[str, Any] = dict.fromkeys((name for name in names if name not in ("outputs", "tactic")), desc)
    if "tactic" in names:
        hints |= {"outputs": tuple.__class_getitem__((desc,)), "tactic": int}
    function.__annotations__ = hints | {"return": result}
