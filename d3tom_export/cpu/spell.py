"""Floats of four bits spelt out for ONNX Runtime's CPU kernels, which have none: as integers of eight, folded at load.

E2M1's values are halves, so twice a value is an integer, and a scale's half makes up for it exactly.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from d3tom_export.stages.edit import Editor

_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.int8)
"""Twice the value of each code."""


def spell_out_float4(model: ir.Model) -> int:
    """Every weight in float4e2m1, by blocks of scales -> the same bytes as integers; returns how many there were."""
    editor, count = Editor(model, "float4"), 0
    for node in list(model.graph):
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.dtype != ir.DataType.FLOAT4E2M1:
            continue
        integers = _integers(editor, node, codes)
        half = editor.constant(np.array(0.5, dtype=np.float32))
        scale = editor.insert(node, "Mul", [node.inputs[1], half]).outputs[0]
        attributes = {"axis": 0, "block_size": node.attributes["block_size"].as_int()}
        weight = editor.insert(node, "DequantizeLinear", [integers, scale], attributes).outputs[0]
        editor.replace(node.outputs[0], weight)
        count += 1
    return count


def _integers(editor: Editor, before: ir.Node, codes: ir.Value) -> ir.Value:
    """Twice the values of ``codes`` (K, N), an initializer: int8 (K, N)."""
    shape = codes.shape
    assert shape is not None
    packed = _bytes_of(editor.graph, codes)
    low = editor.insert(before, "BitwiseAnd", [packed, editor.constant(np.array(15, np.uint8))]).outputs[0]
    four = editor.constant(np.array(4, np.uint8))
    high = editor.insert(before, "BitShift", [packed, four], {"direction": "RIGHT"}).outputs[0]
    both = [editor.insert(before, "Unsqueeze", [part, editor.ints(1)]).outputs[0] for part in (low, high)]
    pairs = editor.insert(before, "Concat", both, {"axis": 1}).outputs[0]
    matrix = editor.insert(before, "Reshape", [pairs, editor.ints(*shape.numpy())]).outputs[0]
    index = editor.insert(before, "Cast", [matrix], {"to": int(ir.DataType.INT32)}).outputs[0]
    return editor.insert(before, "Gather", [editor.constant(_TWICE), index], {"axis": 0}).outputs[0]


def _bytes_of(graph: ir.Graph, codes: ir.Value) -> ir.Value:
    """An initializer of the name, and at the place, of ``codes`` that is their bytes; it takes their place."""
    stored, name = codes.const_value, codes.name
    assert isinstance(stored, ir.ExternalTensor)
    assert name is not None
    shape = ir.Shape((stored.size // 2,))
    tensor = ir.ExternalTensor(
        stored.location,
        stored.offset,
        stored.size // 2,
        ir.DataType.UINT8,
        shape=shape,
        name=name,
        base_dir=stored.base_dir,
    )
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.UINT8), shape=shape, const_value=tensor)
    del graph.initializers[name]
    codes.name = f"{name}_float4"
    graph.register_initializer(value)
    return value
