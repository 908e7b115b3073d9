"""What TensorRT's own Python sources of ``tensorrt.plugin`` need of the compiled part, which no CPU machine can load.

Dimension expressions are trees of Python integers; registries, descriptors and enumerations are plain. Everything that
is judged by these tests, validation of the functions, shape and launch expressions, the order of arguments, is
TensorRT's own code over these stand-ins.
"""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "SUM": lambda a, b: a + b,
    "SUB": lambda a, b: a - b,
    "PROD": lambda a, b: a * b,
    "MAX": max,
    "MIN": min,
    "EQUAL": lambda a, b: int(a == b),
    "LESS": lambda a, b: int(a < b),
    "FLOOR_DIV": lambda a, b: a // b,
    "CEIL_DIV": lambda a, b: -(-a // b),
}


class DimensionExpr:
    """``trt.IDimensionExpr``: a number, the name of a dynamic dimension, or an operation on two expressions."""

    def __init__(self, value: int | str, *arguments: DimensionExpr) -> None:
        self.value, self.arguments = value, arguments

    def is_constant(self) -> bool:
        return isinstance(self.value, int) or bool(self.arguments and all(a.is_constant() for a in self.arguments))

    def get_constant_value(self) -> int:
        return self.at({})

    def at(self, dims: dict[str, int]) -> int:
        """Its value where the dynamic dimensions are ``dims``."""
        if self.arguments:
            one, two = (argument.at(dims) for argument in self.arguments)
            return OPERATIONS[str(self.value)](one, two)
        return self.value if isinstance(self.value, int) else dims[self.value]


class ExprBuilder:
    """``trt.IExprBuilder``."""

    def constant(self, value: int) -> DimensionExpr:
        return DimensionExpr(value)

    def operation(self, operation: enum.Enum, one: DimensionExpr, two: DimensionExpr) -> DimensionExpr:
        return DimensionExpr(operation.name, one, two)


class DynamicPluginTensorDesc:
    """``trt.DynamicPluginTensorDesc`` of a linear tensor."""

    def __init__(self, kind: Any, dims: list[DimensionExpr]) -> None:
        values = [expr.get_constant_value() if expr.is_constant() else -1 for expr in dims]
        self.desc = SimpleNamespace(type=kind, format="LINEAR", scale=1.0, dims=values)


def shim(plugin_folder: Path) -> types.ModuleType:
    """A module ``tensorrt`` whose ``tensorrt.plugin`` is the package in ``plugin_folder``."""
    module: Any = types.ModuleType("tensorrt")
    module.__path__ = [str(plugin_folder.parent)]
    module.__version__ = "shim"

    def plain(name: str, **members: Any) -> None:
        setattr(module, name, type(name, (), members))

    def enumeration(name: str, *members: str) -> None:
        setattr(module, name, enum.Enum(name, list(members)))

    enumeration("DataType", "FLOAT", "HALF", "BF16", "INT8", "INT32", "INT64", "BOOL", "FP8", "INT4", "UINT8", "FP4")
    for short, name in {
        "float32": "FLOAT",
        "float16": "HALF",
        "bfloat16": "BF16",
        "int32": "INT32",
        "int64": "INT64",
    }.items():
        setattr(module, short, module.DataType[name])
    enumeration("DimensionOperation", *OPERATIONS)
    fields = ("FLOAT16", "FLOAT32", "FLOAT64", "INT8", "INT16", "INT32", "CHAR", "DIMS", "UNKNOWN", "BF16", "INT64")
    enumeration("PluginFieldType", *fields)
    enumeration("QuickPluginCreationRequest", "UNKNOWN", "PREFER_JIT", "PREFER_AOT", "STRICT_JIT", "STRICT_AOT")
    enumeration("PluginArgType", "INT")
    enumeration("PluginArgDataType", "INT8", "INT16", "INT32")
    enumeration("TensorFormat", "LINEAR")
    enumeration("TensorRTPhase", "BUILD", "RUNTIME")
    interfaces = (
        "IPluginV3",
        "IPluginV3QuickCore",
        "IPluginV3QuickBuild",
        "IPluginV3QuickRuntime",
        "ITensor",
        "ISymExpr",
    )
    for name in (*interfaces, "IPluginV3QuickAOTBuild", "IPluginCreatorV3Quick"):
        plain(name)
    plain("Logger", WARNING=1, log=lambda self, severity, text: None)
    plain("PluginTensorDesc")
    module.Dims = type("Dims", (tuple,), {"MAX_DIMS": 8})
    module.DimsExprs = lambda length: [None] * length
    module.IDimensionExpr, module.IExprBuilder = DimensionExpr, ExprBuilder
    module.DynamicPluginTensorDesc = DynamicPluginTensorDesc
    module.PluginField, module.PluginFieldCollection = SimpleNamespace, list
    creators: dict[tuple[str, str, str], Any] = {}
    registry = SimpleNamespace(
        register_creator=lambda creator, ns: creators.setdefault((creator.name, "1", ns), creator),
        get_creator=lambda name, version, ns: creators.get((name, version, ns)),
    )
    module.get_plugin_registry = lambda: registry
    sys.modules["tensorrt"] = module
    return module  # type: ignore[no-any-return]
