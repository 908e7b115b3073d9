"""What standard graphs are made of, found again in them: attention over a cache, RMS norm.

B batch, S rows of a call, C cached rows, N key/value heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from d3tom_export.stages.edit import made_by, scalar, up


@dataclass(frozen=True)
class SplitAttention:
    """Attention over a cache whose parts are multiplied apart (stages/cached.py)."""

    queries: ir.Value
    """(B, N, rows, d), rotated and scaled; query heads that share a key head are rows of it."""
    cached_keys: ir.Value
    """(B, N, C, d), as are the cached values; the new ones are (B, N, S, d)."""
    new_keys: ir.Value
    cached_values: ir.Value
    new_values: ir.Value
    to_cache: ir.Value
    """Probabilities of the cached rows (B, N, rows, C)."""
    to_new: ir.Value
    """Probabilities of the new ones (B, N, rows, S)."""


def split_attention(node: ir.Node) -> SplitAttention | None:
    """The attention that ``node``, the sum of the products with both kinds of values, completes; None if it is none."""
    if node.op_type != "Add":
        return None
    mixed = [made_by(value, "MatMul") for value in node.inputs]
    slices = [made_by(product.inputs[0], "Slice") if product is not None else None for product in mixed]
    weights = [made_by(part.inputs[0], "Softmax") if part is not None else None for part in slices]
    if weights[0] is None or weights[0] is not weights[1]:
        return None
    both = made_by(weights[0].inputs[0], "Concat")
    scored = [made_by(value, "MatMul") for value in both.inputs] if both is not None else []
    if len(scored) != 2 or any(product is None for product in scored):
        return None
    queries = {product.inputs[0] for product in scored if product is not None}
    keys = [up(product.inputs[1], "Transpose") for product in scored if product is not None]
    values = [product.inputs[1] for product in mixed if product is not None]
    parts = [*queries, *keys, *values, *(part.outputs[0] for part in slices if part is not None)]
    found = [part for part in parts if part is not None]
    if len(queries) != 1 or len(found) != 7:
        return None
    return SplitAttention(*found)


def rms_norm(node: ir.Node) -> tuple[ir.Value, ir.Value, float] | None:
    """Input, weight and epsilon of the RMS norm that ``node``, its last product, completes; None if it is none."""
    normed = made_by(node.inputs[0], "Mul") if node.op_type == "Mul" else None
    if normed is None:
        return None
    (x, inverse), weight = normed.inputs, node.inputs[1]
    added = made_by(up(inverse, "Reciprocal", "Sqrt"), "Add")
    power = made_by(up(added.inputs[0], "ReduceMean"), "Pow") if added is not None else None
    eps = scalar(added.inputs[1]) if added is not None else None
    if power is None or power.inputs[0] is not x or scalar(power.inputs[1]) != 2 or eps is None:
        return None
    assert x is not None
    assert weight is not None
    return x, weight, eps
