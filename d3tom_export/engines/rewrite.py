"""Standard graphs rewritten as engines have them (:mod:`d3tom_export.engines.stages`).

Attention in them is over a concatenated cache, softmax(q [cached, new keys]^T) [cached, new values], of which builders
make one kernel. Standard graphs multiply the parts apart, which copies nothing on the CPU and never fuses in an engine
(docs/engines.md has figures). `decide`, which scores by the probabilities, computes them beside it.

B batch, S rows of a call, C cached rows, N key/value heads, d head size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from d3tom_export.errors import D3tomError, listing
from d3tom_export.stages.contract import StageSpec
from d3tom_export.stages.edit import Editor, drop_unused, made_by, permutation
from d3tom_export.stages.patterns import SplitAttention, rms_norm, split_attention

_HEADS_FIRST, _KEYS_COLUMNS = [0, 2, 1, 3], [0, 1, 3, 2]


def rewrite_stage(model: ir.Model, stage: StageSpec) -> None:
    """Make of ``model``, the standard graph of a stage, the graph of ``stage``, in place; one of the contract stays.

    Raises :class:`D3tomError` where the graph is not made as it should be.
    """
    if _has_tensors(model, stage):
        return
    if stage.name == "merge":
        _keep_merging(model, stage)
    else:
        _join_attention(model)
        if stage.name == "back":
            _head_of_last_rows(model)
    drop_unused(model)
    if not _has_tensors(model, stage):
        raise _unexpected(f"{stage.name} came to have {listing(map(str, _names(model)))}")
    for node in model.graph:  # what was known of shapes is not true any more
        for value in node.outputs:
            value.shape = None
    for values, specs in ((model.graph.inputs, stage.inputs), (model.graph.outputs, stage.outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.shape = ir.Shape(spec.axes)


def _join_attention(model: ir.Model) -> None:
    """Every attention over a concatenated cache; keys and values of the new rows become outputs."""
    editor, graph = Editor(model, "joined"), model.graph
    for node in list(graph):
        split = split_attention(node)
        if split is None:
            continue
        # Keys and values as one tensor (2, B, N, C + S, d): joined so, one kernel joins both, and does the keys' rotary
        # embedding on the way; apart they take one each.
        cached, new = (
            _stacked(editor, node, pair)
            for pair in ((split.cached_keys, split.cached_values), (split.new_keys, split.new_values))
        )
        rows = editor.insert(node, "Concat", [cached, new], {"axis": 3}).outputs[0]
        keys, values = (
            editor.insert(node, "Gather", [rows, editor.constant(np.array(which))], {"axis": 0}).outputs[0]
            for which in (0, 1)
        )
        columns = editor.insert(node, "Transpose", [keys], {"perm": _KEYS_COLUMNS}).outputs[0]
        scores = editor.insert(node, "MatMul", [split.queries, columns]).outputs[0]
        weights = editor.insert(node, "Softmax", [scores], {"axis": -1}).outputs[0]
        mixed = editor.insert(node, "MatMul", [weights, values]).outputs[0]
        editor.replace(node.outputs[0], mixed)
        _read_probabilities(editor, node, split)
        layer = re.search(r"\d+$", str(split.cached_keys.name))
        assert layer is not None
        for name, new in (("keys", split.new_keys), ("values", split.new_values)):
            projected = _projected(new)
            projected.name = f"{name}_{layer[0]}"
            graph.outputs.append(projected)


def _stacked(editor: Editor, node: ir.Node, parts: Sequence[ir.Value]) -> ir.Value:
    """``parts`` (B, N, rows, d) as one tensor with a first axis for them."""
    lifted = [editor.insert(node, "Unsqueeze", [part, editor.ints(0)]).outputs[0] for part in parts]
    return editor.insert(node, "Concat", lifted, {"axis": 0}).outputs[0]


def _read_probabilities(editor: Editor, node: ir.Node, split: SplitAttention) -> None:
    """Let what read the probabilities of cached rows, but for the product with values, read those of all rows.

    A prompt's visual tokens are among its new rows; positions are the same in both, since the cache comes first. The
    probabilities get a product of their own, so that attention stays one kernel, and one that turns the few queries
    instead of the many keys: softmax([cached, new keys] q^T) over the rows.
    """
    readers = [(user, index) for user, index in split.to_cache.uses() if user.op_type in ("Reshape", "ReduceMean")]
    if not readers:
        return
    keys = editor.insert(node, "Concat", [split.cached_keys, split.new_keys], {"axis": 2}).outputs[0]
    columns = editor.insert(node, "Transpose", [split.queries], {"perm": _KEYS_COLUMNS}).outputs[0]
    scores = editor.insert(node, "MatMul", [keys, columns]).outputs[0]
    by_row = editor.insert(node, "Softmax", [scores], {"axis": 2}).outputs[0]
    weights = editor.insert(node, "Transpose", [by_row], {"perm": _KEYS_COLUMNS}).outputs[0]
    for user, index in readers:
        if user.op_type == "Reshape":  # heads of grouped queries, apart again: (B, H, S, C)
            shape = made_by(user.inputs[1], "Concat")
            if shape is None:
                raise _unexpected("probabilities are reshaped to a fixed shape")
            sizes = editor.insert(user, "Concat", [*shape.inputs[:-1], editor.ints(-1)], {"axis": 0}).outputs[0]
            user.replace_input_with(1, sizes)
        user.replace_input_with(index, weights)


def _projected(heads: ir.Value) -> ir.Value:
    """Rows (B, S, N, d) of which ``heads`` (B, N, S, d) are made, before a rotary embedding if there is one."""
    rotated = made_by(heads, "Add")
    straight = made_by(rotated.inputs[0], "Mul") if rotated is not None else None
    transposed = made_by(straight.inputs[0] if straight is not None else heads, "Transpose")
    rows = transposed.inputs[0] if transposed is not None else None
    if transposed is None or rows is None or list(permutation(transposed)) != _HEADS_FIRST:
        raise _unexpected("keys or values are not projected rows")
    return rows


def _head_of_last_rows(model: ir.Model) -> None:
    """Run final norm and head on the last ``answer_length`` rows alone."""
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    product = made_by(logits, "MatMul")
    norm = product.inputs[0].producer() if product is not None and product.inputs[0] is not None else None
    found = rms_norm(norm) if norm is not None else None
    if found is None:
        raise _unexpected("the head does not follow a norm")
    rows = found[0]
    readers = [(user, index) for user, index in rows.uses() if user.op_type in ("Pow", "Mul")]
    length = ir.Value(name="answer_length", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.append(length)
    editor = Editor(model, "head_rows")
    first = min((user for user, _ in readers), key=list(model.graph).index)
    start = editor.insert(first, "Neg", [length]).outputs[0]
    end = editor.ints(2**31 - 1)
    last = editor.insert(first, "Slice", [rows, start, end, editor.ints(1)]).outputs[0]
    for user, index in readers:
        user.replace_input_with(index, last)


def _keep_merging(model: ir.Model, stage: StageSpec) -> None:
    """Leave of layer l* and the merging behind it only the merging: `kept` comes in."""
    graph = model.graph
    old = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    kept = ir.Value(name="kept", shape=ir.Shape(["B", "K"]), type=ir.TensorType(ir.DataType.INT64))
    inputs = [kept if spec.name == "kept" else old[spec.name] for spec in stage.inputs]
    outputs = [old[spec.name] for spec in stage.outputs]
    dropped = [value for value in graph.inputs if value not in inputs]
    graph.inputs[:] = [*inputs, *dropped]
    graph.outputs[:] = outputs
    old["kept"].name = "kept_inside"
    ir.convenience.replace_all_uses_with(old["kept"], kept)
    drop_unused(model)
    editor = Editor(model, "sizes")
    places = {
        axis: (value, at)
        for value, spec in zip(inputs, stage.inputs, strict=True)
        for at, axis in enumerate(spec.axes)
        if isinstance(axis, str)
    }
    for value in dropped:
        axes = [str(axis) for axis in value.shape or ()]
        for user, index in list(value.uses()):
            axis = "K" if value.name == "keep" else _measured_axis(user, axes)
            if axis not in places:
                raise _unexpected(f"the merging reads {value.name}")
            source, at = places[axis]
            size = editor.insert(user, "Shape", [source], {"start": at, "end": at + 1}).outputs[0]
            if value.name == "keep":
                user.replace_input_with(index, size)
            else:
                editor.replace(user.outputs[0], size)
    drop_unused(model)
    graph.inputs[:] = inputs


def _measured_axis(node: ir.Node, axes: Sequence[str]) -> str:
    """Which of ``axes`` ``node`` gives the size of; empty where it does something else."""
    if node.op_type != "Shape" or "end" not in node.attributes:
        return ""
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    return axes[start] if node.attributes["end"].as_int() == start + 1 else ""


def _names(model: ir.Model) -> list[str | None]:
    return [value.name for value in (*model.graph.inputs, *model.graph.outputs)]


def _has_tensors(model: ir.Model, stage: StageSpec) -> bool:
    """Whether the graph's inputs and outputs are those of ``stage``, in order."""
    return _names(model) == [tensor.name for tensor in (*stage.inputs, *stage.outputs)]


def _unexpected(what: str) -> D3tomError:
    return D3tomError(
        f"The graph of a cached stage cannot be made an engine's: {what}. Rebuild the bundle with this version of "
        "d3tom-export; if that does not help, it is a defect: please report it with the versions of torch and onnx."
    )
