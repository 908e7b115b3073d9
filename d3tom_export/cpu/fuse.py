"""Many nodes into one where ONNX Runtime has a kernel for it: RMS norm, rotary embedding, attention, products.

Each function rewrites every instance of its pattern and returns how many there were; the caller knows how many there
must be. B batch, S rows of a call, C cached rows, L rows attended to, H query heads, N key/value heads, d head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from d3tom_export.config import LanguageConfig
from d3tom_export.stages.edit import (
    MICROSOFT,
    Editor,
    made_by,
    multiplies_quantized,
    only_user,
    permutation,
    scalar,
    stored_matrix,
    up,
)
from d3tom_export.stages.patterns import rms_norm, split_attention

_HEADS_FIRST = (0, 2, 1, 3)


def fuse_norms(model: ir.Model) -> int:
    """``x * (1 / sqrt(mean(x ** 2) + eps)) * weight``, seven nodes -> RMSNormalization of opset 23."""
    editor, count = Editor(model, "rms_norm"), 0
    for node in list(model.graph):
        found = rms_norm(node)
        if found is None:
            continue
        x, weight, eps = found
        attributes = {"axis": -1, "epsilon": eps, "stash_type": int(ir.DataType.FLOAT)}
        editor.replace(node.outputs[0], editor.insert(node, "RMSNormalization", [x, weight], attributes).outputs[0])
        count += 1
    return count


@dataclass(frozen=True)
class _Angles:
    """What RotaryEmbedding reads: cosines and sines (rows, d/2), and which rows belong to whom."""

    cos: ir.Value
    sin: ir.Value
    rows: ir.Value


def fuse_rotary(model: ir.Model) -> int:
    """``x * cos + concat(-x2, x1) * sin``, six nodes -> ONNX Runtime's RotaryEmbedding.

    It reads rows as the projections leave them (B, S, heads * d), so the transpose to (B, heads, S, d) comes behind it,
    where attention needs none.
    """
    editor, count = Editor(model, "rotary"), 0
    angles: dict[tuple[ir.Value, ir.Value], _Angles] = {}
    for node in list(model.graph):
        found = _rotary(node)
        if found is None:
            continue
        x, cos, sin = found
        if (cos, sin) not in angles:
            angles[cos, sin] = _half_angles(editor, cos, sin)
        table = angles[cos, sin]
        tables, heads_first = [table.rows, table.cos, table.sin], made_by(x, "Transpose")
        split = made_by(heads_first.inputs[0], "Reshape") if heads_first is not None else None
        if heads_first is not None and split is not None and permutation(heads_first) == _HEADS_FIRST:
            flat = editor.insert(node, "RotaryEmbedding", [split.inputs[0], *tables], domain=MICROSOFT).outputs[0]
            parted = editor.insert(node, "Reshape", [flat, split.inputs[1]], {"allowzero": 1}).outputs[0]
            rotated = editor.insert(node, "Transpose", [parted], {"perm": _HEADS_FIRST}).outputs[0]
        else:
            rotated = editor.insert(node, "RotaryEmbedding", [x, *tables], domain=MICROSOFT).outputs[0]
        editor.replace(node.outputs[0], rotated)
        count += 1
    return count


def _rotary(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Input (B, heads, S, d), cosines and sines of the rotary embedding that ``node``, its last sum, completes."""
    if node.op_type != "Add":
        return None
    straight, turned = (made_by(value, "Mul") for value in node.inputs)
    if straight is None or turned is None:
        return None
    (x, cos), (swapped, sin) = straight.inputs, turned.inputs
    halves = made_by(swapped, "Concat")
    split = made_by(up(halves.inputs[0], "Neg"), "Split") if halves is not None else None
    if halves is None or split is None or split.inputs[0] is not x or halves.inputs[1] is not split.outputs[0]:
        return None
    if made_by(cos, "Cos") is None or made_by(sin, "Sin") is None:
        return None
    assert x is not None
    assert cos is not None
    assert sin is not None
    return x, cos, sin


def _half_angles(editor: Editor, cos: ir.Value, sin: ir.Value) -> _Angles:
    """Tables for the angles whose cosine and sine these are, without their second half, which repeats the first."""
    producer = made_by(cos, "Cos")
    assert producer is not None
    doubled = producer.inputs[0]
    shifted = made_by(doubled, "Unsqueeze")  # positions of their own in every batch row: (B, 1, S, d)
    both = made_by(shifted.inputs[0] if shifted is not None else doubled, "Concat")
    assert both is not None
    half, size = both.inputs[0], None
    if shifted is None:
        rows = editor.ints(0)  # row i of the call reads row i
    else:
        # (B, S, d/2) -> (B * S, d/2): batch row b of the call reads rows b * S and on.
        shape = editor.insert(producer, "Shape", [half], {"start": 0, "end": 2}).outputs[0]
        total = editor.insert(producer, "ReduceProd", [shape], {"keepdims": 0}).outputs[0]
        zero, one = (editor.constant(np.array(number, dtype=np.int64)) for number in (0, 1))
        counted = editor.insert(producer, "Range", [zero, total, one]).outputs[0]
        rows = editor.insert(producer, "Reshape", [counted, shape]).outputs[0]
        size = editor.insert(producer, "Shape", [half], {"start": 2}).outputs[0]
    tables = []
    for op_type in ("Cos", "Sin"):
        table = editor.insert(producer, op_type, [half]).outputs[0]
        if size is not None:
            flat = editor.insert(producer, "Concat", [editor.ints(-1), size], {"axis": 0}).outputs[0]
            table = editor.insert(producer, "Reshape", [table, flat]).outputs[0]
        tables.append(table)
    return _Angles(tables[0], tables[1], rows)


def fuse_attention(model: ir.Model, language: LanguageConfig) -> int:
    """Attention of (B, H, S, d) queries, with or without a cache -> Attention of opset 23 on unparted rows (B, S, D).

    An attention whose weights something else reads stays as it is: that of l* with a KV cache, which gives the scores.
    """
    editor, count = Editor(model, "attention"), 0
    for node in list(model.graph):
        inputs = _attention(node, language.head_size) or _cached_attention(node, language.head_size)
        output = _joined_heads(node.outputs[0]) if inputs is not None else None
        if inputs is None or output is None:
            continue
        attributes = {"q_num_heads": language.n_heads, "kv_num_heads": language.n_kv_heads}
        if len(inputs) > 3:
            inputs = [*inputs[:3], None, *inputs[3:]]  # no mask
        outputs = 3 if len(inputs) > 3 else 1  # with a cache it gives the longer one too, which nobody reads
        fused = editor.insert(output.producer() or node, "Attention", inputs, attributes, outputs=outputs)
        editor.replace(output, fused.outputs[0])
        count += 1
    return count


def _rows_of(value: ir.Value | None) -> ir.Value | None:
    """The rows (B, S, heads * d) that ``value`` (B, heads, S, d) is made of."""
    heads_first = made_by(value, "Transpose")
    if heads_first is None or permutation(heads_first) != _HEADS_FIRST:
        return None
    return up(heads_first.inputs[0], "Reshape")


def _unrepeated(value: ir.Value | None) -> ir.Value | None:
    """Key/value heads as they were before they were repeated for grouped queries."""
    return up(value, "Reshape", "Expand", "Unsqueeze") or value


def _scaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """A product with a constant, as its other factor and that constant; 1 where there is none."""
    product = made_by(value, "Mul")
    if product is None:
        return value, 1.0
    factor = product.inputs[1]
    like = made_by(factor, "CastLike")
    number = scalar(like.inputs[0] if like is not None else factor)
    return (value, 1.0) if number is None else (product.inputs[0], number)


def _attention(node: ir.Node, head_size: int) -> list[ir.Value | None] | None:
    """Rows of queries, keys and values of the attention that ``node``, the product with the values, completes."""
    scores = made_by(up(node.inputs[0], "Softmax"), "MatMul") if node.op_type == "MatMul" else None
    if scores is None or only_user(scores.outputs[0], "Softmax") is None:
        return None
    (queries, first), (keys, second) = (_scaled(value) for value in scores.inputs)
    # Torch transposes keys as (B * heads, S, d).
    keys = up(keys, "Reshape", "Transpose", "Reshape")
    rows = [_rows_of(queries), _rows_of(_unrepeated(keys)), _rows_of(_unrepeated(node.inputs[1]))]
    fits = all(rows) and math.isclose(first * second, head_size**-0.5, rel_tol=1e-6)
    return list(rows) if fits else None


def _cached_attention(node: ir.Node, head_size: int) -> list[ir.Value | None] | None:
    """The same with a cache: rows of queries, keys and values, then the cached keys and values (B, N, C, d)."""
    attention = split_attention(node)
    if attention is None:
        return None
    # Attention gives no probabilities.
    if any(only_user(part, "MatMul") is None for part in (attention.to_cache, attention.to_new)):
        return None
    queries, factor = _scaled(attention.queries)
    if not math.isclose(factor, head_size**-0.5, rel_tol=1e-6):
        return None
    # Query heads that share a key head were folded into rows of it.
    rows = [
        _rows_of(queries) or _rows_of(up(queries, "Reshape")),
        _rows_of(attention.new_keys),
        _rows_of(attention.new_values),
    ]
    return [*rows, attention.cached_keys, attention.cached_values] if all(rows) else None


def _joined_heads(value: ir.Value) -> ir.Value | None:
    """``value`` (B, H, S, d) as rows (B, S, D), which is all that is read of it."""
    unfolded = only_user(value, "Reshape")
    transposed = only_user(unfolded.outputs[0] if unfolded is not None else value, "Transpose")
    joined = only_user(transposed.outputs[0], "Reshape") if transposed is not None else None
    return joined.outputs[0] if joined is not None else None


def fuse_products(model: ir.Model) -> int:
    """Products with a transposed weight -> FusedMatMul, which packs the weight as it is stored.

    A Transpose of its own is folded when ONNX Runtime loads the graph: slowly, and with a second copy of every weight.
    Of those with a quantized weight it makes a kernel itself.
    """
    editor, count = Editor(model, "product"), 0
    for node in list(model.graph):
        count += multiplies_quantized(node)
        weight = stored_matrix(node)
        if weight is not None:
            fused = editor.insert(node, "FusedMatMul", [node.inputs[0], weight], {"transB": 1}, domain=MICROSOFT)
            editor.replace(node.outputs[0], fused.outputs[0])
            count += 1
    return count
