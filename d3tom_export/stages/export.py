"""Stages to ONNX: one graph per stage, weights referenced by name in the safetensors files of the bundle.

Opset 20 is chosen: it is the exporter's own default, every ONNX Runtime since 1.17 and every TensorRT 10, 11 and
TensorRT-RTX reads it. Opset 23 would turn attention into one node, but TensorRT's parser refuses that node in float32
and ONNX Runtime gains 7 % from it (reference figures: 418 against 434 GFLOP/s at 240 rows).
"""

from __future__ import annotations

import inspect
import logging
import math
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from onnx_ir.passes.common import initializer_deduplication
from onnxscript import optimizer, rewriter, values
from torch import Tensor, nn

from d3tom_export.checkpoint.quantized import QuantizedTensor
from d3tom_export.errors import D3tomError, listing
from d3tom_export.plugins.merge_op import (
    DOMAIN,
    OP_TYPE,
    OP_VERSION,
    ROWS,
    common_rows,
    merge_function,
    merge_schema,
)
from d3tom_export.stages.contract import StageSpec, TensorSpec
from d3tom_export.stages.quantized import Parts, quantize_products
from d3tom_export.stages.repeat import Weights, few_layers, repeat_layers
from d3tom_export.trust.files import create_file, write_file
from d3tom_export.trust.tensors import StoredTensor

OPSET = 20

_DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
"""Dtypes of stored weights that graphs read, as safetensors spells them."""

_MODULE_SCOPES = "pkg.torch.onnx.name_scopes"
"""Node metadata that names the PyTorch module a node came from."""

_TRACED_SIZES = {"B": 11, "P": 58, "G": 31, "L": 89, "V": 41, "K": 17, "M": 65, "C": 34, "S": 19, "views": 23}
"""Sizes to trace with: all different, and odd enough that one baked into a graph can be told from the model's own."""


def _example(spec: TensorSpec) -> Tensor:
    shape = [axis if isinstance(axis, int) else _TRACED_SIZES[axis] for axis in spec.axes]
    if spec.name == "visual_positions":
        return torch.arange(3, 3 + shape[0])
    if spec.name == "keep":
        return torch.tensor([_TRACED_SIZES["K"]])
    if spec.name == "answer_length":
        return torch.tensor([_TRACED_SIZES["G"]])
    if spec.name == "positions":
        return torch.arange(shape[1]).expand(shape)
    if spec.dtype == "bool":
        return torch.ones(shape, dtype=torch.bool)
    if spec.dtype == "int64":
        return torch.zeros(shape, dtype=torch.int64)
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


def _trace(stage: StageSpec, module: nn.Module) -> ir.Model:
    """Export one stage with dynamic axes; graph initializers keep the module's parameter names."""
    dynamic: list[Any] = [
        {i: torch.export.Dim.DYNAMIC for i, axis in enumerate(spec.axes) if isinstance(axis, str)}
        for spec in stage.inputs
    ]
    parameters = list(inspect.signature(module.forward).parameters.values())
    named = len(parameters) - 1
    # torch wants those of a variadic parameter nested, where there are any.
    if parameters[-1].kind is inspect.Parameter.VAR_POSITIONAL and len(dynamic) > named:
        dynamic = [*dynamic[:named], tuple(dynamic[named:])]

    def translate(rows: Any, normed: Any, kept: Any) -> Any:
        hidden, *further = rows
        merge_node = values.Op(values.Opset(DOMAIN, OP_VERSION), OP_TYPE, merge_schema(len(rows)))
        if not further:
            return [merge_node(hidden, normed, kept)]
        return list(merge_node(hidden, normed, kept, *further, **{ROWS: len(rows)}))

    # The exporter warns of torchvision's absence and of its own deprecations: nothing a user could mend.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            tuple(_example(spec) for spec in stage.inputs),
            input_names=[spec.name for spec in stage.inputs],
            output_names=[spec.name for spec in stage.outputs],
            dynamic_shapes=tuple(dynamic),
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
            custom_translation_table={torch.ops.d3tom_export.merge.default: translate},
        )
    assert program is not None
    return program.model


def _simplify(model: ir.Model) -> None:
    """Inline the exporter's helper functions, fold constants and remove what is unused; weights are left whole.

    A folded weight would be a copy inside the graph under a made-up name: it would neither be shared nor refittable.
    """

    def should_fold(node: ir.Node) -> bool | None:
        reads_weight = any(
            value is not None and value.is_initializer() and value.const_value is None for value in node.inputs
        )
        return False if reads_weight else None

    common_passes.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants_ir(model, should_fold=should_fold)
        _rewrite(model)
        common_passes.RemoveUnusedNodesPass()(model)
    common_passes.RemoveUnusedOpsetsPass()(model)
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    logging.getLogger(initializer_deduplication.__name__).setLevel(
        logging.ERROR
    )  # it warns of weights' lack of content
    common_passes.DeduplicateInitializersPass()(model)
    common_passes.CommonSubexpressionEliminationPass()(model)
    common_passes.NameFixPass()(model)


def _rewrite(model: ir.Model) -> None:
    """Apply the rewriter's rules, from which numbers that are nearly 0 or 1 are hidden.

    It compares within 1e-8 and 1e-5, and would drop the sum with a small epsilon as one with 0.
    """
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    numbers = {value: value.const_value for value in model.graph.initializers.values() if _is_nearly_neutral(value)}
    for value in numbers:
        value.const_value = None
    rewriter.rewrite(model)
    for value, number in numbers.items():
        value.const_value = number


def _is_nearly_neutral(value: ir.Value) -> bool:
    """Whether ``value`` is one number that the rewriter may take for the 0 or 1 that it is not."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size != 1 or not tensor.dtype.is_floating_point():
        return False
    number = float(tensor.numpy().item())
    return 0.0 < abs(number) <= 1e-7 or 0.0 < abs(number - 1.0) <= 1e-4


def _name_axes(model: ir.Model, stage: StageSpec) -> None:
    """Give inputs and outputs the contract's axis names, after checking that the graph agrees with the contract."""
    problems = []
    for kind, specs, found in (
        ("input", stage.inputs, model.graph.inputs),
        ("output", stage.outputs, model.graph.outputs),
    ):
        if [value.name for value in found] != [spec.name for spec in specs]:
            problems.append(f"{kind}s are {listing(v.name for v in found)}, expected {listing(s.name for s in specs)}")
            continue
        for value, spec in zip(found, specs, strict=True):
            axes = list(value.shape or ())
            fits = len(axes) == len(spec.axes) and all(
                isinstance(axis, int) == isinstance(wanted, int) and (not isinstance(wanted, int) or axis == wanted)
                for axis, wanted in zip(axes, spec.axes, strict=True)
            )
            if not fits:
                problems.append(f"{kind} {spec.name} has axes {axes}, expected {list(spec.axes)}")
            value.shape = ir.Shape(spec.axes)
    if problems:
        raise D3tomError(
            f"Exporting stage {stage.name} baked in or lost an axis: {'; '.join(problems)}. "
            "This is a defect of the export, not of the checkpoint; please report it with the torch version."
        )


def _refer_to_weights(model: ir.Model, module: nn.Module, weights: Weights) -> None:
    """Rename initializers to the checkpoint's tensor names and give them its dtypes.

    A weight stored in another dtype than float32 is cast in the graph, exactly; of a table that is only looked up, the
    rows found. The initializers are left without content, so that no pass over the graph can read any.
    """
    parameters = dict(module.named_parameters())
    initializers = model.graph.initializers
    found = [(initializers[name], *weights[id(parameters[name])]) for name in list(initializers) if name in parameters]
    for number, (value, _, _) in enumerate(found):
        value.name = f"weight_{number}"  # out of the way: one's old name may be another's new one
    for value, name, stored in found:
        value.name, value.const_value = name, None
        if stored.dtype != "F32":
            _cast_where_used(model.graph, value, _DTYPES[stored.dtype])


def _locate_weights(model: ir.Model, places: Parts) -> list[str]:
    """Point initializers to where the stored tensors of their names lie, and return the names."""
    found = []
    for name, value in model.graph.initializers.items():
        if name not in places:
            continue
        place, dtype = places[name]
        shape = ir.Shape(value.shape or ())  # of a vocabulary's table, the rows in use, which come first
        value.const_value = ir.ExternalTensor(
            place.file.name,
            place.offset,
            math.ceil(math.prod(shape.numpy()) * dtype.itemsize),
            dtype,
            shape=shape,
            name=name,
            base_dir=str(place.file.parent),
        )
        found.append(name)
    return found


def _cast_where_used(graph: ir.Graph, weight: ir.Value, dtype: ir.DataType) -> None:
    """Make ``weight`` one of ``dtype`` whose users get it, or the rows of it that they look up, in float32."""
    users = list(weight.uses())
    weight.dtype = dtype
    whole: ir.Value | None = None
    for node, index in users:
        if node.op_type == "Gather" and index == 0:
            rows = node.outputs[0]
            cast = ir.node("Cast", [rows], attributes={"to": int(ir.DataType.FLOAT)}, num_outputs=1)
            found = cast.outputs[0]
            found.dtype, found.shape, rows.dtype = ir.DataType.FLOAT, rows.shape, dtype
            for place, output in enumerate(graph.outputs):
                if output is rows:
                    found.name, rows.name = rows.name, f"{rows.name}_stored"
                    graph.outputs[place] = found
            for user, place in list(rows.uses()):
                if user is not cast:
                    user.replace_input_with(place, found)
            graph.insert_after(node, cast)
            continue
        if whole is None:
            cast = ir.node("Cast", [weight], attributes={"to": int(ir.DataType.FLOAT)}, num_outputs=1)
            whole = cast.outputs[0]
            whole.name, whole.dtype, whole.shape = f"{weight.name}_float", ir.DataType.FLOAT, weight.shape
            graph.insert_before(graph[0], cast)
        node.replace_input_with(index, whole)


def _strip_traces(model: ir.Model) -> None:
    """Keep each node's module scope, drop the rest of the exporter's notes: they hold source paths of this machine."""
    for node in model.graph:
        scopes = node.metadata_props.get(_MODULE_SCOPES)
        node.metadata_props.clear()
        node.doc_string = None
        if scopes is not None:
            node.metadata_props[_MODULE_SCOPES] = scopes
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _add_defaults(model: ir.Model, stage: StageSpec) -> None:
    """Inputs with a default become initializers too, which makes them optional inputs."""
    for spec, value in zip(stage.inputs, model.graph.inputs, strict=True):
        if spec.default is not None:
            value.const_value = ir.tensor([spec.default], dtype=ir.DataType.INT64, name=spec.name)
            model.graph.register_initializer(value)


def export_stage(stage: StageSpec, module: nn.Module, path: Path, weights: Weights) -> list[str]:
    """Write one stage's ONNX file and return the names of the weights it uses.

    ``module`` is traced, its parameters need no content; if it has many layers, a few of them, named by its attribute
    ``LAYERS``, unless that is None. The weight files must lie beside ``path``, where no file may be yet. Raises
    :class:`D3tomError` where the graph departs from the contract.
    """
    model = _graph(stage, module, weights)
    stored = dict(weights.values())
    places = quantize_products(
        model, {name: tensor for name, tensor in stored.items() if isinstance(tensor, QuantizedTensor)}
    )
    for name, tensor in stored.items():
        if isinstance(tensor, StoredTensor):
            places[name] = tensor, _DTYPES[tensor.dtype]
    names = _locate_weights(model, places)
    _name_axes(model, stage)
    _strip_traces(model)
    _add_defaults(model, stage)
    merges = [node for node in model.graph if node.domain == DOMAIN]
    if merges:
        function = ir.from_proto(
            merge_function(model.opset_imports[""], common_rows(len(node.outputs) for node in merges))
        )
        model.functions[function.identifier()] = function
    model.producer_name, model.doc_string = "d3tom-export", f"D3ToM stage: {stage.name}"
    graph = ir.to_proto(model).SerializeToString()
    write_file(path, graph)
    _check(path, graph, {place.file.name: place.file_bytes for place, _ in places.values()})
    return names


def _graph(stage: StageSpec, module: nn.Module, weights: Weights) -> ir.Model:
    """The stage's graph with the checkpoint's weights in it by name."""

    def traced(stage: StageSpec) -> ir.Model:
        model = _trace(stage, module)
        _refer_to_weights(model, module, weights)
        _simplify(model)
        return model

    layers = getattr(module, "LAYERS", "")
    if layers is None:
        return traced(stage)
    with few_layers(stage, module, layers, weights) as repetition:
        few = traced(repetition.stage) if repetition else None
    if few is not None and repetition is not None and repeat_layers(few, stage, repetition):
        return few
    return traced(stage)


def _check(path: Path, graph: bytes, weight_files: Mapping[str, int]) -> None:
    """Hold the graph against ONNX's checker.

    It refuses external data in files that have several hard links, as linked weights do; so it is shown the graph
    beside empty files of the same names and sizes.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for name, size in weight_files.items():
            with create_file(Path(folder) / name) as stand_in:
                stand_in.truncate(size)
        copy = Path(folder) / path.name
        write_file(copy, graph)
        onnx.checker.check_model(copy)
