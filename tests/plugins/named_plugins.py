"""Plugins of the ahead-of-time chain's names and shapes, to see NVIDIA's parser reach them through a function body.

``python -m tests.plugins.named_plugins`` prints the layers, and whether they build. TensorRT-RTX cannot make the real
ones; the parser that looks up names, namespaces and attributes is the same code.
"""

from __future__ import annotations

import json
from typing import Any

from d3tom_export.engines.toolkit import load_toolkit
from d3tom_export.plugins.aot_plugin import NEAREST, ORDER, SUM, aot_merge_function
from d3tom_export.plugins.merge_op import DOMAIN
from tests.plugins.engines import build, merge_model


def register(trt: Any, name: str, outputs: int, shapes: Any, types: Any) -> Any:
    """A plugin that is never run; ``shapes`` and ``types`` map its inputs' to its outputs'."""

    class Named(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        def __init__(self) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.plugin_name, self.plugin_namespace, self.plugin_version = name, DOMAIN, "1"
            self.num_outputs = outputs

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Named()

        def get_output_data_types(self, input_types: Any) -> Any:
            return types(input_types)

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> Any:
            made = []
            for dims in shapes(inputs, builder):
                exprs = trt.DimsExprs(len(dims))
                for index, dim in enumerate(dims):
                    exprs[index] = dim
                made.append(exprs)
            return made

        def supports_format_combination(self, pos: int, in_out: Any, num_inputs: int) -> bool:
            return bool(in_out[pos].desc.format == trt.TensorFormat.LINEAR)

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection([])

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = name, DOMAIN, "1"
            self.field_names = trt.PluginFieldCollection([])

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            return Named()

    creator = Creator()
    assert trt.get_plugin_registry().register_creator(creator, DOMAIN)
    return creator


def main() -> None:
    """Parse and build the chain."""
    trt = load_toolkit("tensorrt-rtx").trt

    def blocks(inputs: Any, builder: Any) -> Any:
        count = builder.operation(trt.DimensionOperation.CEIL_DIV, inputs[1][1], builder.constant(32))
        return [(inputs[0][0], count, inputs[0][1])] * 2

    keep = [
        register(trt, NEAREST, 2, blocks, lambda types: [trt.float32, trt.int32]),
        register(
            trt,
            ORDER,
            2,
            lambda inputs, builder: [(inputs[0][0], inputs[0][2]), (inputs[0][0], inputs[2][1])],
            lambda types: [trt.int32] * 2,
        ),
        register(
            trt,
            SUM,
            1,
            lambda inputs, builder: [(inputs[0][0], inputs[2][1], inputs[0][2])],
            lambda types: [types[0]],
        ),
    ]
    layers, plan = build(trt, merge_model("float16", None, body=aot_merge_function), [89])
    print(json.dumps({"layers": layers, "built": plan is not None, "plugins": len(keep)}))


if __name__ == "__main__":
    main()
