"""The merge of a layer's cache, up to its rotary embedding, as one node for ONNX Runtime's CPU.

    keys, values (B, P, N, d)  of a prompt
    kept         (B, C)        int64, ascending positions of the survivors
    drops        (1,)          bool, whether there are others; else norms stay as they are
    normed       (B, P, D)     rows that are compared; left out where they are the keys' means over heads
    merged_keys, merged_values (B, N, C, d)

The node has a body, which ONNX Runtime inlines: the sums of :mod:`d3tom_export.cpu.merge`, and norms restored as
:class:`d3tom_export.stages.cached.MergeStage` does, in fewer passes, to the same bits: powers of two that make room in
float16 are left out, and where nothing is dropped a scale is 0 / norm + 1. A session with the library of
:mod:`d3tom_export.plugins.cpu_library` runs a kernel in the node's place.
"""

from __future__ import annotations

import onnx_ir as ir

from d3tom_export.cpu.merge import define, merge_body
from d3tom_export.plugins.launch import row_names
from d3tom_export.plugins.merge_op import CACHE_OP_TYPE, DOMAIN, OP_TYPE
from d3tom_export.stages.edit import Editor, drop_unused, made_by, only_user, permutation, scalar, up

_HEAD = CACHE_OP_TYPE + " (keys, values, kept, drops{normed}) => (merged_keys, merged_values)"
_MEAN = """
    heads = Constant <value_ints = [2]> ()
    normed = ReduceMean <keepdims = 0> (keys, heads)
"""
_FLAT = """
    as_rows = Constant <value_ints = [0, 0, -1]> ()
    hidden = Reshape (keys, as_rows)
    hidden_2 = Reshape (values, as_rows)
"""
_RESTORED = """
    smallest = Constant <value_float = 1e-8> ()
    nothing = Constant <value_float = 0.0> ()
    all_of_it = Constant <value_float = 1.0> ()
    middle_axes = Constant <value_ints = [1, 2]> ()
    left = Where (drops, nothing, all_of_it)
    head_axes = Shape <start = 2> (keys)
    two_axes = Constant <value_ints = [0, 0]> ()
    with_heads = Concat <axis = 0> (two_axes, head_axes)
    flat_kept = Add (kept, batch_start_column)
"""
_RESTORE = """
    {rows}_kept_rows = Gather ({hidden}_flat, flat_kept)
    {rows}_kept = Reshape ({rows}_kept_rows, with_heads)
    {rows}_kept_norms = ReduceL2 <keepdims = 0> ({rows}_kept, last)
    {rows}_mean_norm = ReduceMean <keepdims = 1> ({rows}_kept_norms, middle_axes)
    {rows}_mean_norm_4 = Unsqueeze ({rows}_mean_norm, last)
    {rows}_wanted = Where (drops, {rows}_mean_norm_4, nothing)
    {rows}_sums = Reshape ({merged}, with_heads)
    {rows}_norm = ReduceL2 <keepdims = 1> ({rows}_sums, last)
    {rows}_safe_norm = Add ({rows}_norm, smallest)
    {rows}_part = Div ({rows}_wanted, {rows}_safe_norm)
    {rows}_scale = Add ({rows}_part, left)
    {rows}_restored = Mul ({rows}_sums, {rows}_scale)
    merged_{rows} = Transpose <perm = [0, 2, 1, 3]> ({rows}_restored)
"""


def define_cache_merge(model: ir.Model, *, by_mean: bool) -> None:
    """Give the nodes of ``model`` their body; ``by_mean`` tells that they leave out what they compare by."""
    restore = "".join(
        _RESTORE.format(rows=rows, hidden=hidden, merged=merged)
        for rows, (hidden, merged) in zip(("keys", "values"), row_names(2), strict=True)
    )
    head = _HEAD.format(normed="" if by_mean else ", normed")
    define(model, head, (_MEAN if by_mean else "") + _FLAT + merge_body(2) + _RESTORED + restore)


def fold_cache_merges(model: ir.Model) -> int:
    """Put the node in the place of every merge of a cache whose norms are restored; returns how many there were."""
    merges = [node for node in model.graph if node.domain == DOMAIN and node.op_type == OP_TYPE]
    editor, found = Editor(model, "cache_merge"), 0
    by_mean = all(_is_mean(merge.inputs[1], up(merge.inputs[0], "Reshape")) for merge in merges)
    for merge in merges:
        if len(merge.outputs) != 2:
            continue
        keys_end, values_end = map(_restored, merge.outputs)
        keys, values = (up(merge.inputs[place], "Reshape") for place in (0, 3))
        if keys is None or values is None or keys_end is None or values_end is None:
            continue
        (last_keys, drops), (last_values, _) = keys_end, values_end
        inputs = [keys, values, merge.inputs[2], drops, *([] if by_mean else merge.inputs[1:2])]
        node = editor.insert(merge, CACHE_OP_TYPE, inputs, domain=DOMAIN, outputs=2)
        for old, new in zip((last_keys, last_values), node.outputs, strict=True):
            editor.replace(old, new)
        found += 1
    if found:
        drop_unused(model)
        model.functions.pop((DOMAIN, OP_TYPE, ""))
        define_cache_merge(model, by_mean=by_mean)
    return found


def _is_mean(rows: ir.Value | None, keys: ir.Value | None) -> bool:
    """Whether ``rows`` (B, P, d) are the means of ``keys`` (B, P, N, d) over heads."""
    mean = made_by(rows, "ReduceMean")
    if mean is None or keys is None or mean.inputs[0] is not keys:
        return False
    kept = mean.attributes.get("keepdims")
    return kept is not None and kept.as_int() == 0 and scalar(mean.inputs[1]) == 2


def _restored(sums: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """What becomes of ``sums``, norms restored and heads in front, and the condition that they are restored under."""
    rows = only_user(sums, "Reshape")
    scaled = next((user for user, _ in rows.outputs[0].uses() if user.op_type == "Mul"), None) if rows else None
    chosen = made_by(scaled.inputs[1], "Where") if scaled else None
    turned = only_user(scaled.outputs[0], "Transpose") if scaled else None
    if chosen is None or turned is None or permutation(turned) != (0, 2, 1, 3):
        return None
    assert chosen.inputs[0] is not None
    return turned.outputs[0], chosen.inputs[0]
