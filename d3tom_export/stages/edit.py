"""Reading and rewriting a graph of onnx_ir: producers up the chain, constants, new nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that computes ``value``, where it is an ``op_type``."""
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == op_type else None


def up(value: ir.Value | None, *op_types: str) -> ir.Value | None:
    """What comes in at the first input of a chain of nodes that ends in ``value``, named from the last to the first."""
    for op_type in op_types:
        node = made_by(value, op_type)
        if node is None:
            return None
        value = node.inputs[0]
    return value


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that reads ``value``, where it is an ``op_type``."""
    users = [user for user, _ in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op_type else None


def permutation(node: ir.Node) -> tuple[int, ...]:
    """Of a Transpose node."""
    return tuple(node.attributes["perm"].as_ints())


def scalar(value: ir.Value | None) -> float | None:
    """The number of a constant in the graph that is one number; None for anything else."""
    tensor = value.const_value if value is not None and value.producer() is None else None
    if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size != 1:
        return None
    return float(tensor.numpy().item())


def stored_matrix(node: ir.Node) -> ir.Value | None:
    """The float32 weight (N, D) by whose transpose ``node``, a MatMul, multiplies; None where it is no such product."""
    transposed = made_by(node.inputs[1], "Transpose") if node.op_type == "MatMul" else None
    weight = transposed.inputs[0] if transposed is not None else None
    stored = up(weight, "Cast") or weight
    return weight if stored is not None and stored.is_initializer() else None


def multiplies_quantized(node: ir.Node) -> bool:
    """Whether ``node`` is a product with a quantized weight, which a DequantizeLinear gives it (D, N) in float32."""
    weight = made_by(node.inputs[1], "DequantizeLinear") if node.op_type == "MatMul" else None
    codes = weight.inputs[0] if weight is not None else None
    return codes is not None and codes.is_initializer()


class Editor:
    """Adds nodes to ``model``'s graph. Names are made from ``name``, which no other editor of the model shares."""

    def __init__(self, model: ir.Model, name: str) -> None:
        self.graph = model.graph
        self._name, self._count = name, 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def constant(self, numbers: NDArray) -> ir.Value:
        """An initializer that holds ``numbers``; the same ones are stored once."""
        key = (str(numbers.dtype), numbers.shape, numbers.tobytes())
        if key not in self._constants:
            self._count += 1
            tensor = ir.tensor(numbers, name=f"{self._name}_{self._count}")
            value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), const_value=tensor)
            value.shape = ir.Shape(numbers.shape)
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def ints(self, *numbers: int) -> ir.Value:
        """A constant of shape (n,) int64."""
        return self.constant(np.array(numbers, dtype=np.int64))

    def insert(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, ir.Attr | int | float | str | Sequence[int]] | None = None,
        domain: str = "",
        outputs: int = 1,
    ) -> ir.Node:
        """A new node in front of ``before``."""
        node = ir.node(op_type, list(inputs), attributes=dict(attributes or {}), domain=domain, num_outputs=outputs)
        for output in node.outputs:
            self._count += 1
            output.name = f"{self._name}_{self._count}"
        self.graph.insert_before(before, node)
        return node

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let everything that read ``old`` read ``new``; an output of the graph keeps its name."""
        for index, output in enumerate(self.graph.outputs):
            if output is old:
                assert old.name is not None
                new.name, old.name = old.name, f"{old.name}_replaced"
                new.type, new.shape = old.type, old.shape
                self.graph.outputs[index] = new
        ir.convenience.replace_all_uses_with(old, new)


def drop_unused(model: ir.Model) -> None:
    """Remove nodes and constants that nothing reads.

    The pass of onnx_ir also unnames outputs that nothing reads, and ONNX Runtime's Attention insists on its own.
    """
    graph = model.graph
    kept = set(graph.outputs)
    for node in reversed(graph):
        if not any(output in kept or output.uses() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if value not in kept and not value.uses() and value not in graph.inputs:
            del graph.initializers[name]
