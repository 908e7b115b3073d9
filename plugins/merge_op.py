"""The ``D3ToMMerge`` ONNX operator: its name, its schema and its body of standard ops.

One node carries the merge in every exported graph. A runtime without a kernel for it inlines the function body below;
TensorRT takes a plugin of the same name instead where one is registered.

    hidden (B, V, W)  residual stream of the visual tokens (any width W)
    normed (B, V, D)  attention-normed rows; cosine similarity on them decides who merges into whom
    kept   (B, K)     int64, ascending indices of the tokens that stay
    merged (B, K, W)  kept rows, each with the rows merged into it summed in

The body keeps to ops that ONNX Runtime and TensorRT both take: no scatter with a reduction, no NonZero. A kept token's
target is overwritten by itself, so that an identical twin cannot take it in. The sum is a product with the 0/1
assignment matrix, in float32: on the CPU, ONNX Runtime's ScatterND with a reduction loses rows to its own threads.
Source: algorithm.md, "Merging at layer l*", steps 4 and 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

DOMAIN = "d3tom_export"
OP_TYPE = "D3ToMMerge"
OP_VERSION = 1
ROWS = "rows"
"""The attribute that says how many row inputs a node has, where they are not one."""

_BODY = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{op_type} (hidden, normed, kept) => (merged)
{{
    last = Constant <value_ints = [-1]> ()
    middle = Constant <value_ints = [1]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    smallest_norm = Constant <value_float = 1e-12> ()

    rows = Cast <to = 1> (normed)
    squares = Mul (rows, rows)
    square_sum = ReduceSum <keepdims = 1> (squares, last)
    norm = Sqrt (square_sum)
    safe_norm = Max (norm, smallest_norm)
    unit = Div (rows, safe_norm)
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
    hidden_f = Cast <to = 1> (hidden)
    sums = MatMul (assignment, hidden_f)
    merged = CastLike (sums, hidden)
}}
"""


def merge_function(opset: int) -> onnx.FunctionProto:
    """The operator's body as a model-local function for graphs of ``opset``.

    The checker wants a function's opset import to equal the model's.
    """
    import onnx.parser

    return onnx.parser.parse_function(_BODY.format(domain=DOMAIN, op_type=OP_TYPE, opset=opset))


def merge_schema() -> onnx.defs.OpSchema:
    """The operator's schema, for exporters that refuse a node without one."""
    import onnx

    formal = onnx.defs.OpSchema.FormalParameter
    return onnx.defs.OpSchema(
        OP_TYPE,
        DOMAIN,
        OP_VERSION,
        inputs=[formal("hidden", "T"), formal("normed", "T"), formal("kept", "tensor(int64)")],
        outputs=[formal("merged", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "Floating-point rows")],
    )
