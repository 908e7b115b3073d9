"""Engines of one merge node, built by TensorRT-RTX for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import onnx
from onnx import TensorProto, helper

from d3tom_export.plugins.archive import MAGIC, Kernel, unpack
from d3tom_export.plugins.launch import buffer_names
from d3tom_export.plugins.merge_op import DOMAIN, OP_TYPE, ROWS, merge_function
from d3tom_export.stages.export import OPSET

ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}


WIDTH, DEPTH = 64, 48


def merge_model(
    dtype: str,
    namespace: str | None,
    width: int = WIDTH,
    normed_dtype: str | None = None,
    body: Callable[[int, int], onnx.FunctionProto] = merge_function,
    further: tuple[int, ...] = (),
) -> bytes:
    """A graph of one merge node with a function body; ``namespace`` asks TensorRT for the plugin.

    ``further`` has the widths of the row inputs after the first.
    """
    attributes: dict[str, Any] = {} if namespace is None else {"plugin_namespace": namespace}
    widths = (width, *further)
    if further:
        attributes[ROWS] = len(widths)
    kind, names = ONNX_TYPES[dtype], buffer_names(len(widths))
    inputs, outputs = names[: len(widths) + 2], names[len(widths) + 2 :]
    rows = [name for name in inputs if name.startswith("hidden")]
    graph = helper.make_graph(
        [helper.make_node(OP_TYPE, inputs, outputs, domain=DOMAIN, **attributes)],
        "merge",
        [
            helper.make_tensor_value_info("normed", ONNX_TYPES[normed_dtype or dtype], ["B", "V", DEPTH]),
            helper.make_tensor_value_info("kept", TensorProto.INT64, ["B", "K"]),
            *(helper.make_tensor_value_info(n, kind, ["B", "V", w]) for n, w in zip(rows, widths, strict=True)),
        ],
        [helper.make_tensor_value_info(n, kind, ["B", "K", w]) for n, w in zip(outputs, widths, strict=True)],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[body(OPSET, len(widths))], ir_version=10)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def build(trt: Any, model: bytes, sms: Iterable[int]) -> tuple[list[str], bytes | None]:
    """The network's layer types and the plan, None where it did not build; B 1..2, V 4..300, K 1..200.

    ``sms`` are TensorRT-RTX's targets; empty for TensorRT, which builds for the GPU at hand.
    """
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    # TensorRT 11 has no other networks and may do without the flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model), [str(parser.get_error(index)) for index in range(parser.num_errors)]
    layers = [network.get_layer(index).type.name for index in range(network.num_layers)]
    config = builder.create_builder_config()
    sms = list(sms)
    if sms:
        config.num_compute_capabilities = len(sms)
    for index, sm in enumerate(sms):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
    profile = builder.create_optimization_profile()
    for name, shape in ((network.get_input(i).name, network.get_input(i).shape) for i in range(network.num_inputs)):
        rows = [(1, 1), (1, 10), (2, 200)] if name == "kept" else [(1, 4), (1, 100), (2, 300)]
        profile.set_shape(name, *((*sizes, *tuple(shape)[2:]) for sizes in rows))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return layers, None if plan is None else bytes(plan)


def kernels_in(plan: bytes) -> tuple[Kernel, ...]:
    """The merge kernels a plan carries."""
    return unpack(plan[plan.index(MAGIC) :])
