"""Engines of one merge node, built by TensorRT-RTX for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import onnx
from onnx import TensorProto, helper

from d3tom_export.plugins.archive import MAGIC, Kernel, unpack
from d3tom_export.plugins.merge_op import DOMAIN, OP_TYPE, merge_function
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
    body: Callable[[int], onnx.FunctionProto] = merge_function,
) -> bytes:
    """A graph of one merge node with a function body; ``namespace`` asks TensorRT for the plugin."""
    attributes = {} if namespace is None else {"plugin_namespace": namespace}
    kind = ONNX_TYPES[dtype]
    graph = helper.make_graph(
        [helper.make_node(OP_TYPE, ["hidden", "normed", "kept"], ["merged"], domain=DOMAIN, **attributes)],
        "merge",
        [
            helper.make_tensor_value_info("hidden", kind, ["B", "V", width]),
            helper.make_tensor_value_info("normed", ONNX_TYPES[normed_dtype or dtype], ["B", "V", DEPTH]),
            helper.make_tensor_value_info("kept", TensorProto.INT64, ["B", "K"]),
        ],
        [helper.make_tensor_value_info("merged", kind, ["B", "K", width])],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[body(OPSET)], ir_version=10)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def build(trt: Any, model: bytes, sms: Iterable[int], width: int = WIDTH) -> tuple[list[str], bytes | None]:
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
    profile.set_shape("hidden", (1, 4, width), (1, 100, width), (2, 300, width))
    profile.set_shape("normed", (1, 4, DEPTH), (1, 100, DEPTH), (2, 300, DEPTH))
    profile.set_shape("kept", (1, 1), (1, 10), (2, 200))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return layers, None if plan is None else bytes(plan)


def kernels_in(plan: bytes) -> tuple[Kernel, ...]:
    """The merge kernels a plan carries."""
    return unpack(plan[plan.index(MAGIC) :])
