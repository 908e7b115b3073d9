"""A stage's graph as an engine's: in the engine's precision, every input a real one, the merge node as chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from d3tom_export.engines.precision import Accumulation, PrecisionReport, lower_precision
from d3tom_export.engines.record import EnginePrecision, MergeOp
from d3tom_export.engines.rewrite import rewrite_stage
from d3tom_export.errors import D3tomError
from d3tom_export.plugins.aot_plugin import aot_merge_function
from d3tom_export.plugins.merge_op import DOMAIN, OP_TYPE, OP_VERSION, ROWS, common_rows
from d3tom_export.stages.contract import StageSpec

MERGE_FUNCTION = (DOMAIN, OP_TYPE, "")


@dataclass(frozen=True)
class EngineGraph:
    """What is given to the builder's parser."""

    model: bytes
    """A serialized ONNX model; its weights are external data beside the stage's own file."""
    path: Path
    """The stage's file, against whose folder external data are resolved."""
    merge_nodes: int
    merge_rows: int
    """Row inputs of all of them together."""
    merge_op: MergeOp
    """What became of them; "onnx" where there are none, so that engines without a merge serve every choice."""
    precision: PrecisionReport


def engine_graph(
    path: Path, stage: StageSpec, precision: EnginePrecision, merge_op: MergeOp, accumulate: Accumulation = "fp32"
) -> EngineGraph:
    """Convert the bundle's graph at ``path`` to that of ``stage``, one of engines (:mod:`d3tom_export.engines.stages`).

    Nothing is written and no weight is read.

    With ``merge_op`` "plugin" the merge nodes name the plugin and lose their body: a builder that does not know the
    plugin refuses the graph, where with a body it would silently take that. With "onnx" the body is put in their place,
    with "aot" another one, of three ahead-of-time plugins.
    """
    model = ir.load(path)
    for spec in stage.inputs:
        # An input with a default is an initializer too, and TensorRT would take it for a constant.
        if spec.default is not None and spec.name in model.graph.initializers:
            model.graph.initializers.pop(spec.name).const_value = None
    rewrite_stage(model, stage)
    report = PrecisionReport(precision)
    if precision != "fp32":
        report = lower_precision(model, stage, precision, accumulate)
    merges = [node for node in model.graph if node.domain == DOMAIN and node.op_type == OP_TYPE]
    if merge_op == "plugin":
        for node in merges:
            node.attributes.add(ir.AttrString("plugin_namespace", DOMAIN))
            node.attributes.add(ir.AttrString("plugin_version", str(OP_VERSION)))
            node.attributes.add(ir.AttrInt64(ROWS, len(node.outputs)))
        model.functions.pop(MERGE_FUNCTION, None)
    elif merges:
        if merge_op == "aot":
            rows = common_rows(len(node.outputs) for node in merges)
            model.functions[MERGE_FUNCTION] = ir.from_proto(aot_merge_function(model.opset_imports[""], rows))
        elif MERGE_FUNCTION not in model.functions:
            raise D3tomError(f"{path} has a {OP_TYPE} node without its function body. Rebuild the bundle.")
        common_passes.InlinePass()(model)
    common_passes.RemoveUnusedOpsetsPass()(model)
    serialized = ir.to_proto(model).SerializeToString(deterministic=True)
    rows = sum(len(node.outputs) for node in merges)
    return EngineGraph(serialized, path, len(merges), rows, merge_op if merges else "onnx", report)
