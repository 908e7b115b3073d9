"""What to launch for a merge of given sizes: kernels, grids, arguments and workspace, as pure functions.

The just-in-time kernels, the Python plugin, the C++ library and the tests all launch by this plan; it imports neither
Triton nor a driver. B batch, V visual tokens, K kept, D width of ``normed``, W width of ``hidden``.

A merge has one search and one sum for each of its row inputs: who joins whom is found once from ``normed`` and
``kept``, and ``hidden``, ``hidden_2``, ... are each summed by it into ``merged``, ``merged_2``, ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, NamedTuple, get_args

from d3tom_export.errors import D3tomError

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

WIDE_PROGRAMS = 96
"""Large tiles read less but make fewer programs: they are taken from this many on, enough for most of a GPU's cores."""
ALIGNMENT = 16
"""A width that this divides lets 16 bytes be read at once, in every precision."""
MOST_ROWS = 8
"""Row inputs of one merge."""
_MAX_GRID = 65535
_ADDRESS_LIMIT = 2**31


class MergeSizes(NamedTuple):
    """The sizes of one merge; see the module's docstring."""

    batch: int
    visual: int
    kept: int
    depth: int
    width: int
    further: tuple[int, ...] = ()
    """Widths of the row inputs after the first."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of all row inputs."""
        return (self.width, *self.further)


@dataclass(frozen=True, order=True)
class Variant:
    """One compiled form of one kernel."""

    name: str
    """``nearest-wide``, ``nearest-narrow``, ``nearest-ragged``, ``order``, ``sum`` or ``sum-ragged``. Ragged forms take
    any width, the others a multiple of :data:`ALIGNMENT`."""
    dtype: str
    """Of the rows; empty for ``order``, which sees none."""


@dataclass(frozen=True)
class Spec:
    """How a variant is compiled and called."""

    function: str
    """Its name in :mod:`d3tom_export.plugins.kernels`."""
    inputs: tuple[str, ...]
    """Buffers read, first among the arguments."""
    sizes: tuple[str, ...]
    """Then int32 sizes."""
    outputs: tuple[str, ...]
    """Then buffers written."""
    constants: Mapping[str, int]
    warps: int
    stages: int
    divisible: tuple[str, ...]
    """Arguments promised to be multiples of :data:`ALIGNMENT`; of buffers, their addresses."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """All runtime arguments in the order of the kernel's parameters."""
        return self.inputs + self.sizes + self.outputs


class Launch(NamedTuple):
    """One kernel launch: what a driver needs besides the buffers' addresses."""

    variant: Variant
    grid: tuple[int, int, int]
    sizes: tuple[int, ...]
    """Values of the spec's sizes."""
    buffers: tuple[str, ...]
    """Which of the merge's buffers stand for the spec's inputs, then for its outputs."""

    @property
    def arguments(self) -> tuple[str | int, ...]:
        """What the kernel's parameters are given, in their order: names of buffers, and sizes."""
        inputs = len(self.buffers) - len(spec(self.variant).outputs)
        return (*self.buffers[:inputs], *self.sizes, *self.buffers[inputs:])


def row_names(rows: int) -> tuple[tuple[str, str], ...]:
    """Names of each row input and of its output: ``hidden``, ``merged``, then ``hidden_2``, ``merged_2``, ...

    :raises D3tomError: no such number of row inputs.
    """
    if not 1 <= rows <= MOST_ROWS:
        raise D3tomError(f"A merge takes 1 to {MOST_ROWS} row inputs by one search; found {rows}.")
    return tuple((f"hidden{end}", f"merged{end}") for end in ("", *(f"_{place}" for place in range(2, rows + 1))))


def buffer_names(rows: int) -> tuple[str, ...]:
    """A merge's inputs, then its outputs, in the order of the node's."""
    hidden, merged = zip(*row_names(rows), strict=True)
    return (hidden[0], "normed", "kept", *hidden[1:], *merged)


_ELEMENT = {"float32": 4, "float16": 2, "bfloat16": 2}
# Rows are staged through shared memory in four stages of 8 to 16 KiB: two tiles of 64 or 128 bytes by 32 or 64 rows.
_TILES = {
    "nearest-wide": {4: (64, 64, 32, 8), 2: (64, 64, 64, 4)},
    "nearest-narrow": {4: (32, 32, 64, 4), 2: (32, 32, 128, 4)},
    "nearest-ragged": {4: (32, 32, 32, 4), 2: (32, 32, 128, 4)},
}
_SUM_ROWS = 16
_SUM_BYTES = 512  # a warp's reach: 32 lanes of 16 bytes
_ORDER = {"BLOCK_V": 32, "BLOCK_U": 256, "BLOCK_N": 8}


@cache
def spec(variant: Variant) -> Spec:
    """The compile and call specification of ``variant``; KeyError for one that does not exist."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    if variant.name == "order":
        inputs, outputs = ("scores", "slots", "kept"), ("order", "starts")
        return Spec(
            "token_order_kernel",
            inputs,
            ("V", "K", "N"),
            outputs,
            _ORDER,
            warps=8,
            stages=1,
            divisible=inputs + outputs,
        )
    size = _ELEMENT[variant.dtype]
    if variant.name in ("sum", "sum-ragged"):
        inputs, outputs = ("hidden", "order", "starts"), ("merged",)
        constants = {"BLOCK_R": _SUM_ROWS, "BLOCK_W": _SUM_BYTES // size}
        width = () if variant.name == "sum-ragged" else ("W",)
        buffers = inputs + outputs
        return Spec("segment_sum_kernel", inputs, ("V", "K", "W"), outputs, constants, 4, 3, buffers + width)
    block_v, block_k, block_d, warps = _TILES[variant.name][size]
    inputs, outputs = ("normed", "kept"), ("scores", "slots")
    constants = {"BLOCK_V": block_v, "BLOCK_K": block_k, "BLOCK_D": block_d, "WIDEN": 0}
    depth = () if variant.name == "nearest-ragged" else ("D",)
    return Spec("nearest_kept_kernel", inputs, ("V", "K", "D"), outputs, constants, warps, 4, inputs + outputs + depth)


def variants(dtype: str, depth: int | None = None, *widths: int | None) -> tuple[Variant, ...]:
    """Every variant that merges of ``dtype`` can need, for any D and W or for known ones, in a fixed order.

    ``widths`` has that of each row input; without them they are any.
    """
    nearest = ["nearest-wide", "nearest-narrow"] if depth is None or depth % ALIGNMENT == 0 else []
    nearest += ["nearest-ragged"] if depth is None or depth % ALIGNMENT else []
    every = widths or (None,)
    sums = ["sum"] if any(width is None or width % ALIGNMENT == 0 for width in every) else []
    sums += ["sum-ragged"] if any(width is None or width % ALIGNMENT for width in every) else []
    return (*(Variant(name, dtype) for name in nearest), Variant("order", ""), *(Variant(name, dtype) for name in sums))


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def check_sizes(sizes: MergeSizes) -> None:
    """Raises :class:`D3tomError` for sizes beyond the kernels' 32-bit offsets or the grid."""
    batch, visual, kept, depth, *_ = sizes
    widest = max(depth, *sizes.widths)
    if kept > visual or min(*sizes[:4], *sizes.widths) < 0:
        raise D3tomError(
            f"A merge keeps between 1 and all of its tokens; it was asked to keep {kept} of {visual} (batch {batch}). "
            "Check the shape of `kept` (B, K) against `hidden` (B, V, W)."
        )
    # The order's keys go up to V*K plus the last block's tokens.
    largest = max(visual * widest, visual * (kept + 1) + _ORDER["BLOCK_U"])
    if largest >= _ADDRESS_LIMIT or kept > _MAX_GRID or batch > _MAX_GRID:
        raise D3tomError(
            f"The merge kernels cannot merge {visual} tokens of width {widest} into {kept} in a batch of "
            f"{batch}: V times the width and V times K must stay below 2^31, K and the batch below 65536. Build the "
            "engine with `--merge-op onnx`, which has no such limit."
        )


@lru_cache(maxsize=4096)
def launches(sizes: MergeSizes, dtype: str) -> tuple[Launch, ...]:
    """The launches of one merge, in order: the search, and a sum for every row input that has rows to write.

    :raises D3tomError: sizes that the kernels cannot address.
    """
    check_sizes(sizes)
    batch, visual, kept, depth, *_ = sizes
    if not batch * visual * kept * max(sizes.widths):
        return ()
    name = "nearest-wide" if depth % ALIGNMENT == 0 else "nearest-ragged"
    blocks = _blocks(name, dtype)
    if name == "nearest-wide" and batch * ceil_div(visual, blocks[0]) * ceil_div(kept, blocks[1]) < WIDE_PROGRAMS:
        name = "nearest-narrow"
        blocks = _blocks(name, dtype)
    kept_blocks = ceil_div(kept, blocks[1])
    nearest, order = Variant(name, dtype), Variant("order", "")
    plan = [
        Launch(
            nearest,
            (ceil_div(visual, blocks[0]), kept_blocks, batch),
            (visual, kept, depth),
            ("normed", "kept", "scores", "slots"),
        ),
        Launch(
            order,
            (ceil_div(visual, _ORDER["BLOCK_V"]), batch, 1),
            (visual, kept, kept_blocks),
            ("scores", "slots", "kept", "order", "starts"),
        ),
    ]
    for width, (hidden, merged) in zip(sizes.widths, row_names(len(sizes.widths)), strict=True):
        total = Variant("sum" if width % ALIGNMENT == 0 else "sum-ragged", dtype)
        columns = ceil_div(width, spec(total).constants["BLOCK_W"])
        if columns:
            buffers = (hidden, "order", "starts", merged)
            plan.append(Launch(total, (columns, kept, batch), (visual, kept, width), buffers))
    return tuple(plan)


def _blocks(name: str, dtype: str) -> tuple[int, int]:
    constants = spec(Variant(name, dtype)).constants
    return constants["BLOCK_V"], constants["BLOCK_K"]


class Workspace(NamedTuple):
    """Byte offsets of the intermediate buffers in one block of device memory."""

    offsets: dict[str, int]
    size: int


def workspace(sizes: MergeSizes) -> Workspace:
    """Where ``scores``, ``slots``, ``order`` and ``starts`` lie, each 256-byte aligned.

    No part shrinks as any size grows, so the workspace of a profile's largest sizes serves all smaller ones. Row inputs
    share it: their sums read one order.
    """
    batch, visual, kept, *_ = sizes
    # Tiles of the narrow kernels are the most numerous.
    per_block = 4 * batch * visual * ceil_div(kept, 32)
    parts = {"scores": per_block, "slots": per_block, "order": 4 * batch * visual, "starts": 4 * batch * kept}
    offsets, end = {}, 0
    for name, size in parts.items():
        offsets[name] = end
        end += ceil_div(size, 256) * 256
    return Workspace(offsets, end)
