"""int8 products with the weights: quantised by column when a session is made, rows when they come.

Each weight column has a scale of its own, max |w| / 127, and each row of activations one, max |x| / 127. Both are
symmetric; rows are stored as uint8 around 128, because ONNX Runtime's fast kernels take an unsigned left side. Sums are
int32 (of processors without VNNI the session asks for that), so that the only losses are the two roundings. No integer
stands for NaN or infinity: a row or column that holds any gets NaN for its scale.

The graph says how to quantise a weight - ONNX Runtime folds that once, when it loads the graph - so the bundle stores
no second copy of any weight.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from d3tom_export.stages.edit import MICROSOFT, Editor, stored_matrix

_LEVELS = 127.0
_SMALLEST = 1e-30
"""Of a scale: a row or a column of zeros has one too."""
_MIDDLE = 128


def quantize_products(model: ir.Model) -> int:
    """Make every product with a weight int8; returns how many there were. Those of the same rows quantise them once."""
    editor, count = Editor(model, "int8"), 0
    rows: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for node in list(model.graph):
        weight, x = stored_matrix(node), node.inputs[0]
        if weight is None or x is None:
            continue
        if x not in rows:
            rows[x] = _quantize_rows(editor, node, x)
        quantized, row_scale = rows[x]
        columns, column_scale = _quantize_columns(editor, node, weight)
        middle = editor.constant(np.array(_MIDDLE, dtype=np.uint8))
        one = editor.constant(np.array(1.0, dtype=np.float32))
        product = editor.insert(
            node, "MatMulIntegerToFloat", [quantized, columns, one, column_scale, middle], domain=MICROSOFT
        )
        scaled = editor.insert(node, "Mul", [product.outputs[0], row_scale])
        editor.replace(node.outputs[0], scaled.outputs[0])
        count += 1
    return count


def _nan_unless_finite(editor: Editor, before: ir.Node, x: ir.Value, axis: ir.Value, keepdims: int) -> ir.Value:
    """Zero for each row or column, NaN where one of its numbers is not finite: ReduceMax passes over a NaN."""
    total = editor.insert(before, "ReduceSum", [x, axis], {"keepdims": keepdims}).outputs[0]
    zero = editor.constant(np.array(0.0, dtype=np.float32))
    return editor.insert(before, "Mul", [total, zero]).outputs[0]


def _quantize_rows(editor: Editor, before: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """``x`` (..., D) as uint8 around 128, and the scale of each row (..., 1)."""
    size = editor.insert(before, "Abs", [x]).outputs[0]
    largest = editor.insert(before, "ReduceMax", [size, editor.ints(-1)], {"keepdims": 1}).outputs[0]
    smallest = editor.constant(np.array(_SMALLEST * _LEVELS, dtype=np.float32))
    safe = editor.insert(before, "Max", [largest, smallest]).outputs[0]
    levels = editor.constant(np.array(_LEVELS, dtype=np.float32))
    finite = _nan_unless_finite(editor, before, x, editor.ints(-1), keepdims=1)
    scale = editor.insert(before, "Add", [editor.insert(before, "Div", [safe, levels]).outputs[0], finite]).outputs[0]
    unit = editor.insert(before, "Div", [x, scale]).outputs[0]
    one = editor.constant(np.array(1.0, dtype=np.float32))
    middle = editor.constant(np.array(_MIDDLE, dtype=np.uint8))
    return editor.insert(before, "QuantizeLinear", [unit, one, middle]).outputs[0], scale


def _quantize_columns(editor: Editor, before: ir.Node, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
    """A weight (N, D) as int8 columns (D, N), and the scale of each (N,); constant, so ONNX Runtime folds all of it.

    Extremes from both ends and a transpose of what is int8 already: the folding holds no second float32 copy.
    """
    row = editor.ints(1)
    highest = editor.insert(before, "ReduceMax", [weight, row], {"keepdims": 0}).outputs[0]
    lowest = editor.insert(before, "ReduceMin", [weight, row], {"keepdims": 0}).outputs[0]
    opposite = editor.insert(before, "Neg", [lowest]).outputs[0]
    smallest = editor.constant(np.array(_SMALLEST * _LEVELS, dtype=np.float32))
    largest = editor.insert(before, "Max", [highest, opposite, smallest]).outputs[0]
    levels = editor.constant(np.array(_LEVELS, dtype=np.float32))
    finite = _nan_unless_finite(editor, before, weight, row, keepdims=0)
    scale = editor.insert(before, "Add", [editor.insert(before, "Div", [largest, levels]).outputs[0], finite]).outputs[
        0
    ]
    attributes = {"axis": 0, "output_dtype": int(ir.DataType.INT8)}
    quantized = editor.insert(before, "QuantizeLinear", [weight, scale], attributes).outputs[0]
    return editor.insert(before, "Transpose", [quantized], {"perm": (1, 0)}).outputs[0], scale
