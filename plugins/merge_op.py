"""The ``D3ToMMerge`` ONNX operator: its name, its schema and its body of standard ops.

One node carries the merge in every exported graph. A runtime without a kernel for it inlines the function body below;
TensorRT takes a plugin of the same name instead where one is registered.

    hidden (B, V, W)  residual stream of the visual tokens (any width W)
    normed (B, V, D)  attention-normed rows; cosine similarity on them decides who merges into whom
    kept   (B, K)     int64, ascending indices of the tokens that stay
    merged (B, K, W)  kept rows, each with the rows merged into it summed in

Who joins whom is found once for any number of row inputs: with the attribute ``rows`` at 2, ``hidden_2`` (of its own
width) follows behind ``kept``, and ``merged_2`` behind ``merged``; and so on. A function's inputs are fixed, so the
body is made for the number that a model's nodes have, which is one for all of them.

The body keeps to ops that ONNX Runtime and TensorRT both take: no scatter with a reduction, no NonZero. A kept token's
target is overwritten by itself, so that an identical twin cannot take it in. The sum is a product with the 0/1
assignment matrix, in float32: on the CPU, ONNX Runtime's ScatterND with a reduction loses rows to its own threads.
Source: algorithm.md, "Merging at layer l*", steps 4 and 5.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from d3tom_export.errors import D3tomError, listing
from d3tom_export.plugins.launch import buffer_names, row_names

if TYPE_CHECKING:
    import onnx

DOMAIN = "d3tom_export"
OP_TYPE = "D3ToMMerge"
CACHE_OP_TYPE = "D3ToMCacheMerge"
"""In graphs for ONNX Runtime's CPU: a merge of a layer's cache with all that belongs to it (cpu/cache_merge.py)."""
OP_VERSION = 1
ROWS = "rows"
"""The attribute that says how many row inputs a node has, where they are not one."""

_BODY = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{signature}
{{
    last = Constant <value_ints = [-1]> ()
    middle = Constant <value_ints = [1]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    smallest_norm = Constant <value_float = 1e-12> ()

    compared = Cast <to = 1> (normed)
    squares = Mul (compared, compared)
    square_sum = ReduceSum <keepdims = 1> (squares, last)
    norm = Sqrt (square_sum)
    safe_norm = Max (norm, smallest_norm)
    unit = Div (compared, safe_norm)
    kept_column = Unsqueeze (kept, last)
    unit_kept = GatherND <batch_dims = 1> (unit, kept_column)
    unit_kept_t = Transpose <perm = [0, 2, 1]> (unit_kept)
    similarity = MatMul (unit, unit_kept_t)
    nearest = ArgMax <axis = 2, keepdims = 0, select_last_index = 0> (similarity)

    kept_count_1d = Shape <start = 1, end = 2> (kept)
    kept_count = Squeeze (kept_count_1d)
    slots = Range (zero, kept_count, one)
    kept_shape = Shape (kept)
    own_slots = Expand (slots, kept_shape)
    target = ScatterElements <axis = 1> (nearest, kept, own_slots)

    target_row = Unsqueeze (target, middle)
    slot_column = Unsqueeze (slots, last)
    joins = Equal (slot_column, target_row)
    assignment = Cast <to = 1> (joins)
{sums}
}}
"""
_SUM = """
    {hidden}_f = Cast <to = 1> ({hidden})
    {merged}_sums = MatMul (assignment, {hidden}_f)
    {merged} = CastLike ({merged}_sums, {hidden})
"""


def signature(rows: int) -> str:
    """The head of a function of the operator with ``rows`` row inputs, in ONNX's textual syntax.

    :raises D3tomError: no such number of row inputs.
    """
    names = buffer_names(rows)
    attribute = f"<{ROWS}> " if rows > 1 else ""
    return f"{OP_TYPE} {attribute}({', '.join(names[: rows + 2])}) => ({', '.join(names[rows + 2 :])})"


def common_rows(outputs: Iterable[int]) -> int:
    """The number of row inputs of a model's nodes, from their numbers of outputs.

    :raises D3tomError: they are not all alike; one function body is to serve them.
    """
    found = sorted(set(outputs))
    if len(found) != 1:
        raise D3tomError(
            f"The {OP_TYPE} nodes of one graph share one function body and must take equally many row inputs; found "
            f"nodes with {listing(found) or 'none'}. Merge the rows of the larger ones by several nodes."
        )
    return found[0]


def merge_function(opset: int, rows: int = 1) -> onnx.FunctionProto:
    """The operator's body as a model-local function for graphs of ``opset`` whose nodes have ``rows`` row inputs.

    The checker wants a function's opset import to equal the model's.
    """
    import onnx.parser

    sums = "".join(_SUM.format(hidden=hidden, merged=merged) for hidden, merged in row_names(rows))
    return onnx.parser.parse_function(_BODY.format(domain=DOMAIN, opset=opset, signature=signature(rows), sums=sums))


def merge_schema(rows: int = 1) -> onnx.defs.OpSchema:
    """The schema of nodes with ``rows`` row inputs, for exporters that refuse a node without one."""
    import onnx

    formal = onnx.defs.OpSchema.FormalParameter
    attribute = onnx.defs.OpSchema.Attribute
    names = buffer_names(rows)
    return onnx.defs.OpSchema(
        OP_TYPE,
        DOMAIN,
        OP_VERSION,
        inputs=[formal(name, "tensor(int64)" if name == "kept" else "T") for name in names[: rows + 2]],
        outputs=[formal(name, "T") for name in names[rows + 2 :]],
        attributes=[attribute(ROWS, onnx.defs.OpSchema.AttrType.INT, required=False)] if rows > 1 else [],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "Floating-point rows")],
    )
