"""ONNX graphs of strangers: looked through before a runtime sees them, and refused where ours have no such thing.

What is checked, on the very bytes that are opened then: every message has only the fields that our exports have; no
operator outside :data:`OPERATORS`, so no loop, no condition, no subgraph, no kernel that somebody registered; no
function but the merge; weights outside the graph only as plain ranges of safetensors files, of the size that their
shape needs; no tensor of a giant constant size.

What is not: operators that are allowed may be put together into something slow or large, as any program may. How much
memory and time a process gets is its system's business.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from d3tom_export.trust.wire import Span, field_bytes, fields, integer, read_message, rewritten, text

MOST_BYTES = 256 << 20
"""Of a graph. Ours take some 20 kB a layer, whatever the model's width: their weights lie elsewhere."""

MERGE_DOMAIN, MERGE_OP, CACHE_MERGE_OP = "d3tom_export", "D3ToMMerge", "D3ToMCacheMerge"

_STANDARD = """
    Abs Add And ArgMax Attention BitShift BitwiseAnd Cast CastLike Clip Concat Constant ConstantOfShape Conv Cos CumSum
    DequantizeLinear Div Equal Exp Expand Gather GatherElements GatherND Gelu Greater LayerNormalization Less Log MatMul
    Max Mul Neg Or Pad Pow QuantizeLinear RMSNormalization Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum Reshape Resize ScatterElements Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub TopK
    Transpose Unsqueeze Where
"""
_OTHER_EXPORTERS = "Flatten GreaterOrEqual Identity LessOrEqual Min Not Tanh Tile Xor"
"""Of the same harmless kinds: other versions of the exporter may write these for the same modules."""

OPERATORS: dict[str, frozenset[str]] = {
    "": frozenset(_STANDARD.split()) | frozenset(_OTHER_EXPORTERS.split()),
    "com.microsoft": frozenset(("FusedMatMul", "MatMulIntegerToFloat", "RotaryEmbedding")),
    MERGE_DOMAIN: frozenset((MERGE_OP, CACHE_MERGE_OP)),
}
"""What nodes may be, by domain: tests derive it from real exports, of every way to merge, for every runtime."""

_SHAPED = {"ConstantOfShape": (0,), "Expand": (1,), "Tile": (1,), "Range": (0, 1), "Resize": (3,), "Pad": (1,)}
"""Operators whose result is as large as some of their inputs say, and which inputs these are."""
_MOST_ELEMENTS = 1 << 26
"""Of a tensor whose size is a constant in the graph."""

_ITEM_SIZES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 16: 2, 17: 1, 22: 0.5, 23: 0.5}
"""Bytes per element, by ONNX's numbers of data types."""
_DTYPES = {1: "float32", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 16: "bfloat16"}
"""Of inputs and outputs."""
_STORED = (1, 2, 3, 10, 16, 17, 22, 23)
"""Data types of weights in files: float32, float16, bfloat16; quantized: int8, float8e4m3fn, int4, float4e2m1, and as
bytes where a runtime lacks that."""
_INT32, _INT64 = 6, 7

# Field numbers are those of onnx.proto.
_MODEL = fields(numbers=(1, 5), spans=(2, 3, 4, 6, 7, 8, 14, 25), many=(8, 14, 25))
_OPSET = fields(numbers=(2,), spans=(1,))
_GRAPH = fields(spans=(1, 2, 5, 10, 11, 12, 13, 16), many=(1, 5, 11, 12, 13, 16))
_NODE = fields(spans=(1, 2, 3, 4, 5, 6, 7, 9), many=(1, 2, 5, 9))
_ATTRIBUTE = fields(numbers=(3, 8, 20), spans=(1, 4, 5, 6, 9, 11, 13, 21), floats=(2, 7), many=(7, 8, 9, 11))
_TENSOR = fields(numbers=(1, 2, 14), spans=(8, 9, 12, 13), many=(1, 13))
_ENTRY = fields(spans=(1, 2))
_VALUE = fields(spans=(1, 2, 3, 4), many=(4,))
_TYPE = fields(spans=(1, 6))
_TENSOR_TYPE = fields(numbers=(1,), spans=(2,))
_SHAPE = fields(spans=(1,), many=(1,))
_DIMENSION = fields(numbers=(1,), spans=(2, 3))
_FUNCTION = fields(spans=(1, 4, 5, 6, 7, 8, 9, 10, 12, 14), many=(4, 5, 6, 7, 9, 12, 14))


class GraphTensor(NamedTuple):
    """An input or output of a graph."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]


class GraphWeight(NamedTuple):
    """A weight that a graph takes from a file: where it lies in it, in bytes."""

    name: str
    file: str
    offset: int
    length: int
    shape: tuple[int, ...]


class Graph(NamedTuple):
    """What a graph is held against."""

    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    weights: tuple[GraphWeight, ...]
    operators: frozenset[tuple[str, str]]
    """Domain and type of its nodes."""


def _whole(data: bytes) -> dict[int, Any]:
    model = read_message(data, (0, len(data)), _MODEL, "the model")
    if 7 not in model:
        raise ValueError("it holds no graph")
    return model


def read_graph(data: bytes) -> Graph:
    """Look through a serialized ONNX model. Raises ``ValueError`` with what is wrong, in words for a message."""
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has {len(data):,} bytes, at most {MOST_BYTES:,} are expected of a graph")
    model = _whole(data)
    for span in model.get(8, ()):
        domain = text(data, read_message(data, span, _OPSET, "an operator set").get(1))
        if domain not in OPERATORS:
            raise ValueError(f"it imports operators of the domain {domain!r}, expected only {_domains()}")
    functions = model.get(25, ())
    if len(functions) > 1:
        raise ValueError(f"it holds {len(functions)} functions, expected at most {MERGE_OP}")
    for span in functions:
        _check_function(data, span)
    graph = read_message(data, model[7], _GRAPH, "the graph")
    constants: dict[str, tuple[int, ...]] = {}
    weights = [found for span in graph.get(5, ()) if (found := _initializer(data, span, constants)) is not None]
    operators = {_check_node(data, span, constants, OPERATORS) for span in graph.get(1, ())}
    return Graph(
        tuple(_tensor_of(data, span) for span in graph.get(11, ())),
        tuple(_tensor_of(data, span) for span in graph.get(12, ())),
        tuple(weights),
        frozenset(operators),
    )


def _domains() -> str:
    return ", ".join(domain or "ONNX's own" for domain in OPERATORS)


def _check_function(data: bytes, span: Span) -> None:
    function = read_message(data, span, _FUNCTION, "a function")
    key = text(data, function.get(10)), text(data, function.get(1))
    if key not in ((MERGE_DOMAIN, MERGE_OP), (MERGE_DOMAIN, CACHE_MERGE_OP)):
        raise ValueError(f"it defines the function {'.'.join(key)!r}, expected only {MERGE_DOMAIN}.{MERGE_OP}")
    for opset in function.get(9, ()):
        if text(data, read_message(data, opset, _OPSET, "an operator set").get(1)):
            raise ValueError(f"its function {key[1]} imports operators other than ONNX's own")
    for node in function.get(7, ()):
        _check_node(data, node, {}, {"": OPERATORS[""]})


def _check_node(
    data: bytes, span: Span, constants: dict[str, tuple[int, ...]], allowed: Mapping[str, frozenset[str]]
) -> tuple[str, str]:
    """Domain and type of a node that is allowed and makes no giant tensor."""
    node = read_message(data, span, _NODE, "a node")
    domain, kind = text(data, node.get(7)), text(data, node.get(4))
    if kind not in allowed.get(domain, ()):
        name = f"{domain}.{kind}" if domain else kind
        raise ValueError(f"its node {text(data, node.get(3))!r} is of {name}, an operator that no stage of ours has")
    for attribute in node.get(5, ()):
        found = read_message(data, attribute, _ATTRIBUTE, f"an attribute of a {kind}")
        if 6 in found or 11 in found:
            raise ValueError(f"its node {text(data, node.get(3))!r}, a {kind}, holds a graph inside")
        inner: dict[str, tuple[int, ...]] = {}
        if 5 in found:
            _initializer(data, found[5], inner, inside=True)
        if kind == "Constant" and 2 in node:
            integers = (found[3],) if 3 in found else found.get(8, ())[:16]
            constants[text(data, node[2][0])] = next(iter(inner.values()), tuple(map(integer, integers)))
    inputs = node.get(1, ())
    for place in _SHAPED.get(kind, ()):
        sizes = constants.get(text(data, inputs[place]), ()) if place < len(inputs) else ()
        if math.prod(max(abs(size), 1) for size in sizes) > _MOST_ELEMENTS:
            raise ValueError(
                f"its node {text(data, node.get(3))!r}, a {kind}, makes a tensor of size {list(sizes)}, larger than "
                f"the {_MOST_ELEMENTS:,} elements that are allowed"
            )
    return domain, kind


def _initializer(
    data: bytes, span: Span, constants: dict[str, tuple[int, ...]], *, inside: bool = False
) -> GraphWeight | None:
    """Where a tensor's content lies, None where it is in the graph; small integers are noted in ``constants``.

    A tensor ``inside`` a node has none in files.
    """
    tensor = read_message(data, span, _TENSOR, "a tensor")
    name, dtype = text(data, tensor.get(8)), tensor.get(2, 0)
    dims = [integer(dim) for dim in tensor.get(1, ())]
    if dtype not in _ITEM_SIZES or any(dim < 0 for dim in dims):
        raise ValueError(f"its tensor {name!r} is of data type {dtype} and shape {dims}, which no stage of ours has")
    length = math.ceil(_ITEM_SIZES[dtype] * math.prod(dims))
    if tensor.get(14, 0) == 0 and 13 not in tensor:
        begin, end = tensor.get(9, (0, 0))
        if end - begin != length:
            raise ValueError(f"its tensor {name!r} of shape {dims} has {end - begin:,} bytes, expected {length:,}")
        if dtype in (_INT64, _INT32) and length <= 128:
            constants[name] = struct.unpack(f"<{math.prod(dims)}{'q' if dtype == _INT64 else 'i'}", data[begin:end])
        return None
    entries = dict(_entry(data, entry) for entry in tensor.get(13, ()))
    if tensor.get(14) != 1 or 9 in tensor or inside or not {"location"} <= entries.keys() <= _PLACE:
        raise ValueError(f"its tensor {name!r} lies outside the graph in a way that our exports' do not ({entries})")
    if dtype not in _STORED:
        raise ValueError(f"its weight {name!r} is of data type {dtype}, which no weight of ours has")
    offset, stated = _number(entries.get("offset", "0")), _number(entries.get("length", str(length)))
    if stated != length:
        raise ValueError(f"its weight {name!r} of shape {dims} takes {stated:,} bytes of a file, expected {length:,}")
    return GraphWeight(name, entries["location"], offset, length, tuple(dims))


_PLACE = {"location", "offset", "length"}


def _entry(data: bytes, span: Span) -> tuple[str, str]:
    entry = read_message(data, span, _ENTRY, "an entry")
    return text(data, entry.get(1)), text(data, entry.get(2))


def _number(digits: str) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) < 19):
        raise ValueError(f"it has {digits[:40]!r} for a place in a file, expected a number")
    return int(digits)


def _tensor_of(data: bytes, span: Span) -> GraphTensor:
    value = read_message(data, span, _VALUE, "an input or output")
    name = text(data, value.get(1))
    kind = read_message(data, value[2], _TYPE, "a type") if 2 in value else {}
    tensor = read_message(data, kind[1], _TENSOR_TYPE, "a type") if 1 in kind else {}
    if 2 not in tensor:
        raise ValueError(f"its tensor {name!r} has no shape")
    axes: list[str | int] = []
    for each in read_message(data, tensor[2], _SHAPE, "a shape").get(1, ()):
        axis = read_message(data, each, _DIMENSION, "an axis")
        axes.append(integer(axis[1]) if 1 in axis else text(data, axis.get(2)))
    return GraphTensor(name, _DTYPES.get(tensor.get(1, 0), f"data type {tensor.get(1, 0)}"), tuple(axes))


def relocated(data: bytes, files: Mapping[str, str]) -> bytes:
    """The model in ``data``, which was looked through, with its weights' files under the names that ``files`` gives."""

    def entry(span: Span) -> bytes:
        key, value = _entry(data, span)
        return field_bytes(1, key.encode()) + field_bytes(2, files.get(value, value).encode())

    def tensor(span: Span) -> bytes:
        return rewritten(data, span, 13, entry)

    def graph(span: Span) -> bytes:
        return rewritten(data, span, 5, tensor)

    return rewritten(data, (0, len(data)), 7, graph)


def without_defaults(data: bytes) -> bytes:
    """The model in ``data``, which was looked through, with inputs that have to be given.

    An input with a default is an initializer too, and TensorRT would take it for a constant.
    """
    found = read_message(data, _whole(data)[7], _GRAPH, "the graph")
    inputs = {text(data, read_message(data, span, _VALUE, "an input").get(1)) for span in found.get(11, ())}

    def initializer(span: Span) -> bytes | None:
        given = text(data, read_message(data, span, _TENSOR, "a tensor").get(8)) in inputs
        return None if given else data[span[0] : span[1]]

    return rewritten(data, (0, len(data)), 7, lambda span: rewritten(data, span, 5, initializer))
