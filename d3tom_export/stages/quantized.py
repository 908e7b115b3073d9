"""Products with quantized weights: a DequantizeLinear in front of each, over the parts that the bundle's file has.

ONNX Runtime makes one kernel of the pair on the CPU and on CUDA, TensorRT one product that reads the few bits. Codes
are stored inputs first, (K, N), for both look for a weight that needs no Transpose.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from d3tom_export.checkpoint.quantized import QuantizedTensor
from d3tom_export.errors import D3tomError, listing
from d3tom_export.stages.edit import Editor, drop_unused, stored_matrix
from d3tom_export.trust.tensors import StoredTensor

_CODES = {
    "int4": ir.DataType.INT4,
    "int8": ir.DataType.INT8,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "nvfp4": ir.DataType.FLOAT4E2M1,
}
OPSETS = {"int4": 21, "int8": 20, "fp8": 20, "nvfp4": 23}
"""The first that has what a format needs: blocks and integers of four bits, floats of four."""

Parts = dict[str, tuple[StoredTensor, ir.DataType]]
"""Where the initializers that were added lie, and what their bytes are, by name."""


def quantize_products(model: ir.Model, weights: Mapping[str, QuantizedTensor]) -> Parts:
    """Let every product with one of ``weights``, by their names in the graph, read its parts instead.

    Raises :class:`D3tomError` where one of them is read by anything else than a product.
    """
    graph, parts = model.graph, Parts()
    found = {name: weights[name] for name in graph.initializers if name in weights}
    if not found:
        return parts
    editor = Editor(model, "quantized")
    dequantized: dict[ir.Value, ir.Value] = {}
    # Products of the same numbers round them once: calibration has seen the same for each, so their scales are one.
    inputs: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        weight, x = stored_matrix(node), node.inputs[0] if node.inputs else None
        if weight is None or x is None or weight.name not in found:
            continue
        tensor = found[weight.name]
        if weight not in dequantized:
            dequantized[weight] = _dequantized(graph, editor, weight.name, tensor, parts)
        node.replace_input_with(1, dequantized[weight])
        if tensor.input_scale is not None:
            if x not in inputs:
                inputs[x] = _rounded(graph, editor, node, x, weight.name, tensor.input_scale, parts)
            node.replace_input_with(0, inputs[x])
    drop_unused(model)
    left = sorted(graph.initializers.keys() & found.keys())
    if left:
        raise D3tomError(
            f"The exported graph reads quantized weights elsewhere than in products: {listing(left, 8)}. This is a "
            "defect of the export, not of the checkpoint; please report it with the versions of torch and onnxscript."
        )
    graph.opset_imports[""] = max(graph.opset_imports[""], *(OPSETS[tensor.format] for tensor in found.values()))
    return parts


def _part(
    graph: ir.Graph, name: str, place: StoredTensor, dtype: ir.DataType, shape: tuple[int, ...], parts: Parts
) -> ir.Value:
    """An initializer for the tensor at ``place``."""
    if name not in graph.initializers:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        # What has no content is no initializer; where its bytes lie is told when the graph is written.
        graph.initializers[name] = value
        parts[name] = place, dtype
    return graph.initializers[name]


def _dequantized(graph: ir.Graph, editor: Editor, name: str, tensor: QuantizedTensor, parts: Parts) -> ir.Value:
    """The weight (K, N) float32."""
    first, (outputs, inputs) = graph[0], tensor.shape
    ending = f"{name}.{tensor.format}"
    codes = _part(graph, ending, tensor.codes, _CODES[tensor.format], (inputs, outputs), parts)
    if tensor.whole is None:
        scale = _part(graph, f"{ending}_scale", tensor.scale, ir.DataType.FLOAT, tensor.scale.shape, parts)
    else:
        small = _part(graph, f"{ending}_scale", tensor.scale, ir.DataType.FLOAT8E4M3FN, tensor.scale.shape, parts)
        whole = _part(graph, f"{ending}_whole", tensor.whole, ir.DataType.FLOAT, (), parts)
        scale = _typed(editor.insert(first, "DequantizeLinear", [small, whole]), tensor.scale.shape)
    blocked = len(tensor.scale.shape) == 2
    attributes = {"axis": 0, "block_size": tensor.block} if blocked else {"axis": 1}
    given = [codes, scale]
    if tensor.zero is not None:
        given.append(_part(graph, f"{ending}_zero", tensor.zero, _CODES[tensor.format], tensor.scale.shape, parts))
    return _typed(editor.insert(first, "DequantizeLinear", given, attributes), (inputs, outputs))


def _rounded(
    graph: ir.Graph, editor: Editor, before: ir.Node, x: ir.Value, name: str, place: StoredTensor, parts: Parts
) -> ir.Value:
    """``x`` as fp8 has it, at the scale that lies at ``place``."""
    scale = _part(graph, f"{name}.fp8_input", place, ir.DataType.FLOAT, (), parts)
    zero = editor.constant(np.zeros((), dtype=ir.DataType.FLOAT8E4M3FN.numpy()))
    codes = editor.insert(before, "QuantizeLinear", [x, scale, zero])
    codes.outputs[0].dtype, codes.outputs[0].shape = ir.DataType.FLOAT8E4M3FN, x.shape
    rounded = editor.insert(before, "DequantizeLinear", [codes.outputs[0], scale])
    rounded.outputs[0].dtype, rounded.outputs[0].shape = ir.DataType.FLOAT, x.shape
    return rounded.outputs[0]


def _typed(node: ir.Node, shape: tuple[int, ...]) -> ir.Value:
    value = node.outputs[0]
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(shape)
    return value
