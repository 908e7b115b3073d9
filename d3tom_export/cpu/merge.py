"""The merge and the selection before it as ONNX Runtime's CPU kernels do them best; the answers stay the same.

*Selection.* The standard graph ranks scores by counting, V * V comparisons, because TensorRT's TopK leaves ties open.
ONNX's does not: of equal entries the one with the lower index comes first. So two TopKs take the place of the counting.

*Sums.* The standard body multiplies by the 0/1 assignment matrix: 2 * K * V * W FLOPs for V rows of W numbers. Here the
rows are gathered in the order of their targets and summed in blocks of 16 by 16 x 16 matrices: 32 * V * W FLOPs. In a
sorted list a target's rows are neighbours, and because every target has a row, its own, targets have no gaps. So a
block's rows go to at most 16 successive targets, and its sums fill slots from the block's first target on. A target
whose rows span several blocks is in the first slot of all but the first of these, and a product with a 0/1 matrix (K,
blocks) adds those up: K * V * W / 8 FLOPs more, a sixteenth of the standard body's. No scatter with a reduction: with
several threads ONNX Runtime's loses rows.

*Likeness.* Only the kept rows are divided by their norms: that of the row that looks for its nearest scales all of its
cosines alike. Norms are not ReduceL2's, whose error is 4e-7 at 512 numbers and 1e-6 at 4096, as large as what may
decide between two kept rows; with a ReduceSum it is 1e-7 and 2e-7.

B batch, V rows to merge, K kept, W width of the rows, D width of those that are compared, n blocks, b = 16.
"""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from d3tom_export.plugins.launch import row_names
from d3tom_export.plugins.merge_op import DOMAIN, OP_TYPE, common_rows, signature
from d3tom_export.stages.edit import Editor, made_by

BLOCK = 16
_FEW = 8
"""Numbers of a constant that is compared with others: fewer than any weight's."""

_HEAD = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{signature}
{{
"""
_SEARCH = """
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    first_axis = Constant <value_ints = [0]> ()
    middle = Constant <value_ints = [1]> ()
    inner = Constant <value_ints = [2]> ()
    last = Constant <value_ints = [-1]> ()
    block = Constant <value_int = {block}> ()
    block_1d = Constant <value_ints = [{block}]> ()
    smallest_norm = Constant <value_float = 1e-12> ()

    kept_column = Unsqueeze (kept, last)
    kept_rows = GatherND <batch_dims = 1> (normed, kept_column)
    squares = Mul (kept_rows, kept_rows)
    square_sum = ReduceSum <keepdims = 1> (squares, last)
    norm = Sqrt (square_sum)
    safe_norm = Max (norm, smallest_norm)
    unit_kept = Div (kept_rows, safe_norm)
    unit_kept_t = Transpose <perm = [0, 2, 1]> (unit_kept)
    similarity = MatMul (normed, unit_kept_t)
    nearest = ArgMax <axis = 2, keepdims = 0, select_last_index = 0> (similarity)
    kept_count = Shape <start = 1, end = 2> (kept)
    kept_scalar = Squeeze (kept_count)
    slots = Range (zero, kept_scalar, one)
    kept_shape = Shape (kept)
    own_slots = Expand (slots, kept_shape)
    target = ScatterElements <axis = 1> (nearest, kept, own_slots)

    batch = Shape <start = 0, end = 1> (kept)
    batch_scalar = Squeeze (batch)
    batches = Range (zero, batch_scalar, one)
    row_count = Shape <start = 1, end = 2> (normed)
    row_count_up = Add (row_count, block_1d)
    row_count_below = Sub (row_count_up, middle)
    block_count = Div (row_count_below, block_1d)
    padded_count = Mul (block_count, block_1d)
    padding = Sub (padded_count, row_count)
    behind = Concat <axis = 0> (first_axis, padding)
    sorted_target, order = TopK <axis = 1, largest = 0, sorted = 1> (target, row_count)

    batch_start = Mul (batches, row_count)
    batch_start_column = Unsqueeze (batch_start, last)
    flat_order = Add (order, batch_start_column)
    padded_order = Pad (flat_order, behind, zero, middle)
    padded_target = Pad (sorted_target, behind, kept_scalar, middle)
    blocked_shape = Concat <axis = 0> (batch, block_count, block_1d)
    blocked_target = Reshape (padded_target, blocked_shape)
    first_column = Gather <axis = 2> (blocked_target, first_axis)
    place = Sub (blocked_target, first_column)
    place_row = Unsqueeze (place, inner)
    places = Range (zero, block, one)
    place_column = Unsqueeze (places, last)
    here = Equal (place_row, place_column)
    in_block = CastLike (here, normed)

    before = Constant <value_ints = [1, -1]> ()
    none = Constant <value_int = -1> ()
    previous = Pad (sorted_target, before, none, middle)
    goes_on_here = Equal (sorted_target, previous)
    goes_on_int = Cast <to = 6> (goes_on_here)
    unused, start = TopK <axis = 1, largest = 0, sorted = 1> (goes_on_int, kept_count)
    start_block = Div (start, block)
    first_target = Squeeze (first_column, last)
    first_there = GatherElements <axis = 1> (first_target, start_block)
    start_place = Sub (slots, first_there)
    start_row = Mul (start_block, block)
    sum_row = Add (start_row, start_place)
    batch_rows = Mul (batches, padded_count)
    batch_rows_column = Unsqueeze (batch_rows, last)
    flat_sum_row = Add (sum_row, batch_rows_column)

    block_count_scalar = Squeeze (block_count)
    blocks = Range (zero, block_count_scalar, one)
    start_block_column = Unsqueeze (start_block, last)
    later = Less (start_block_column, blocks)
    first_target_row = Unsqueeze (first_target, middle)
    slot_column = Unsqueeze (slots, last)
    leads = Equal (first_target_row, slot_column)
    goes_on = And (leads, later)
    continued = CastLike (goes_on, normed)
"""
_SUM = """
    {hidden}_width = Shape <start = 2, end = 3> ({hidden})
    {hidden}_flat_shape = Concat <axis = 0> (last, {hidden}_width)
    {hidden}_flat = Reshape ({hidden}, {hidden}_flat_shape)
    {hidden}_sorted = Gather ({hidden}_flat, padded_order)
    {hidden}_sorted_shape = Concat <axis = 0> (blocked_shape, {hidden}_width)
    {hidden}_blocked = Reshape ({hidden}_sorted, {hidden}_sorted_shape)
    {merged}_sums = MatMul (in_block, {hidden}_blocked)
    {merged}_flat = Reshape ({merged}_sums, {hidden}_flat_shape)
    {merged}_begun = Gather ({merged}_flat, flat_sum_row)
    {merged}_first = Gather <axis = 2> ({merged}_sums, zero)
    {merged}_rest = MatMul (continued, {merged}_first)
    {merged} = Add ({merged}_begun, {merged}_rest)
"""


def merge_body(rows: int, block: int = BLOCK) -> str:
    """The body, in ONNX's textual syntax, of a merge of ``rows`` row inputs whose sums are in blocks of ``block``."""
    sums = "".join(_SUM.format(hidden=hidden, merged=merged) for hidden, merged in row_names(rows))
    return _SEARCH.format(block=block) + sums


def define(model: ir.Model, head: str, body: str) -> None:
    """Add a function of our domain to ``model``, in the place of one of its name."""
    text = _HEAD.format(domain=DOMAIN, opset=model.opset_imports[""], signature=head) + body + "\n}"
    function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    model.functions[function.identifier()] = function


def inline_merges(model: ir.Model, block: int = BLOCK) -> int:
    """Put the sums in sorted blocks of ``block`` in the place of every merge node; returns how many there were.

    What merges of the same rows by the same likeness share - keys and values of a layer, in graphs that merge them by
    nodes of their own - is computed once.
    """
    merges = [node for node in model.graph if node.domain == DOMAIN and node.op_type == OP_TYPE]
    if merges:
        rows = common_rows(len(node.outputs) for node in merges)
        define(model, signature(rows), merge_body(rows, block))
        common_passes.InlinePass()(model)
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common_passes.DeduplicateInitializersPass(size_limit=_FEW)(model)
        common_passes.CommonSubexpressionEliminationPass()(model)
    return len(merges)


def select_by_topk(model: ir.Model) -> int:
    """``kept`` by TopK instead of by counting ranks; returns how often that was found."""
    kept = next((value for value in model.graph.outputs if value.name == "kept"), None)
    scores = _ranked(kept)
    if kept is None or scores is None:
        return 0
    node, editor = kept.producer(), Editor(model, "selection")
    assert node is not None
    keep = next(value for value in model.graph.inputs if value.name == "keep")
    highest = editor.insert(node, "TopK", [scores, keep], {"axis": -1, "largest": 1, "sorted": 1}, outputs=2)
    ascending = editor.insert(node, "TopK", [highest.outputs[1], keep], {"largest": 0, "sorted": 1}, outputs=2)
    editor.replace(kept, ascending.outputs[0])
    return 1


def _ranked(kept: ir.Value | None) -> ir.Value | None:
    """The scores (B, V) whose ranks by counting gave ``kept``."""
    compacted = made_by(kept, "Slice")
    written = made_by(compacted.inputs[0], "ScatterElements") if compacted is not None else None
    slot = made_by(written.inputs[1], "Where") if written is not None else None
    below = made_by(slot.inputs[0], "Less") if slot is not None else None
    rank = made_by(below.inputs[0], "ReduceSum") if below is not None else None
    ahead = made_by(rank.inputs[0], "Cast") if rank is not None else None
    either = made_by(ahead.inputs[0], "Or") if ahead is not None else None
    higher = made_by(either.inputs[0], "Greater") if either is not None else None
    other = made_by(higher.inputs[0], "Unsqueeze") if higher is not None else None
    return other.inputs[0] if other is not None else None
