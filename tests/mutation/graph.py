"""Putting faults into a stage's graph: finding what computes what, in standard and in tuned graphs alike.

B batch, P prompt, G answer tokens, V visual tokens, K kept, D width, H query heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from d3tom_export.stages.edit import Editor, made_by, scalar, up

Change = Callable[["Graph"], None]
"""What a fault does to one graph."""

_FLOAT, _INT64, _HALF = int(ir.DataType.FLOAT), int(ir.DataType.INT64), int(ir.DataType.FLOAT16)


def _serialized(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


class Graph:
    """One graph of a bundle that is about to go wrong. Every search fails where it does not find what it looks for."""

    def __init__(self, path: Path, bundle: Path) -> None:
        self.path, self.bundle = path, bundle
        self.model = ir.load(path)
        self.nodes = self.model.graph
        self._before = _serialized(self.model)
        self.editor = Editor(self.model, "fault")

    @property
    def tuned(self) -> bool:
        """Whether it is one of the graphs for the CPU."""
        return self.path.parent != self.bundle

    def save(self) -> None:
        """Write the graph back, which must have changed."""
        self.nodes.sort()
        after = _serialized(self.model)
        assert after != self._before, f"the fault changed nothing in {self.path.name}"
        self.path.write_bytes(after)

    def all(self, op_type: str, where: Callable[[ir.Node], object] = lambda node: True) -> list[ir.Node]:
        """All nodes of a kind for which ``where`` holds; at least one."""
        found = [node for node in self.nodes if node.op_type == op_type and where(node)]
        assert found, f"{self.path.name} has no such {op_type}"
        return found

    def one(self, op_type: str, where: Callable[[ir.Node], object] = lambda node: True) -> ir.Node:
        """The only node of a kind for which ``where`` holds."""
        found = self.all(op_type, where)
        assert len(found) == 1, f"{self.path.name} has {len(found)} such {op_type}"
        return found[0]

    def input(self, name: str) -> ir.Value:
        return next(value for value in self.nodes.inputs if value.name == name)

    def output(self, name: str) -> ir.Value:
        return next(value for value in self.nodes.outputs if value.name == name)

    def weight(self, suffix: str) -> ir.Value:
        """The initializer of a checkpoint's tensor whose name ends so."""
        (name,) = (name for name in self.nodes.initializers if name.endswith(suffix))
        return self.nodes.initializers[name]

    def node(
        self, op_type: str, *inputs: ir.Value, domain: str = "", **attributes: int | float | Sequence[int]
    ) -> ir.Value:
        """What a new node makes of ``inputs``; its place is found when the graph is saved."""
        return self.editor.insert(self.nodes[0], op_type, inputs, attributes, domain=domain).outputs[0]

    def number(self, number: float) -> ir.Value:
        """A constant of shape () float32."""
        return self.editor.constant(np.array(number, dtype=np.float32))

    def constant(self, numbers: NDArray) -> ir.Value:
        return self.editor.constant(numbers)

    def ints(self, *numbers: int) -> ir.Value:
        """A constant of shape (n,) int64."""
        return self.editor.ints(*numbers)

    def integer(self, number: int) -> ir.Value:
        """A constant of shape () int64."""
        return self.editor.constant(np.array(number, dtype=np.int64))

    def pass_on(self, value: ir.Value, make: Callable[[ir.Value], ir.Value]) -> None:
        """Let all that read ``value``, outputs of the graph among them, read what ``make`` makes of it."""
        users, place = list(value.uses()), [i for i, output in enumerate(self.nodes.outputs) if output is value]
        assert users or place, f"{value.name} of {self.path.name} is read by nothing"
        made = make(value)
        assert made is not value
        for node, index in users:
            node.replace_input_with(index, made)
        for index in place:
            self.pass_out(index, made)

    def pass_out(self, index: int, made: ir.Value) -> None:
        """Give out ``made`` as the output at ``index``, under its name."""
        old = self.nodes.outputs[index]
        if made in self.nodes.outputs or made.is_graph_input():
            made = self.node("Add", made, self.integer(0) if old.dtype == ir.DataType.INT64 else self.number(0.0))
        name, old.name = old.name, f"{old.name}_right"
        made.name, made.type, made.shape = name, old.type, old.shape
        self.nodes.outputs[index] = made

    def give_out(self, name: str, make: Callable[[ir.Value], ir.Value]) -> None:
        """Let the output ``name`` alone be what ``make`` makes of it; nodes inside go on with the right one."""
        value = self.output(name)
        index = list(self.nodes.outputs).index(value)
        self.pass_out(index, make(value))

    def read(self, node: ir.Node, index: int, value: ir.Value) -> None:
        """Let ``node`` read ``value`` as its input ``index``."""
        node.replace_input_with(index, value)

    def scaled(self, value: ir.Value, factor: float) -> ir.Value:
        return self.node("Mul", value, self.number(factor))

    def frozen(self, suffix: str, numbers: NDArray[np.float32]) -> None:
        """Hold ``numbers`` in the graph itself where it read a weight from the bundle's files."""
        weight = self.weight(suffix)
        tensor = ir.tensor(numbers, name=weight.name)
        weight.const_value, weight.dtype = tensor, tensor.dtype

    def norm(self, suffix: str) -> tuple[ir.Value, ir.Value]:
        """What an RMS norm with this weight reads, and what it gives."""
        weight = self.weight(suffix)
        reader = next(node for node, _ in _through(weight, "Cast"))
        if reader.op_type == "RMSNormalization":
            return _known(reader.inputs[0]), reader.outputs[0]
        product = made_by(reader.inputs[0], "Mul")
        assert reader.op_type == "Mul"
        assert product is not None
        return _known(product.inputs[0]), reader.outputs[0]

    def product(self, suffix: str) -> ir.Value:
        """The rows multiplied by a weight, whether in float32 or int8."""
        ends = []
        for node, _ in _through(self.weight(suffix), "Cast", "Transpose", "QuantizeLinear"):
            if node.op_type in ("MatMul", "FusedMatMul"):
                ends.append(node.outputs[0])
            if node.op_type == "MatMulIntegerToFloat":  # of rows in units of their own scale
                ends += [user.outputs[0] for user, _ in node.outputs[0].uses() if user.op_type == "Mul"]
        unique = list(dict.fromkeys(ends))
        assert len(unique) == 1, f"{self.path.name} multiplies by {suffix} {len(unique)} times"
        return unique[0]

    def multiplied(self, suffix: str) -> tuple[ir.Node, ir.Value]:
        """The node that multiplies by a weight, and the rows it reads; in float32."""
        node = self.product(suffix).producer()
        assert node is not None
        assert node.op_type in ("MatMul", "FusedMatMul")
        return node, _known(node.inputs[0])

    def positions(self, *producers: str) -> list[ir.Value]:
        """The positions (S,) int64 that rotary angles are made of, those computed by one of ``producers``."""
        table = self.nodes.initializers["frequencies"]
        found = [up(node.inputs[0], "Unsqueeze", "Cast") for node, _ in table.uses()]
        known = [value for value in found if value is not None]
        assert len(known) == len(found) > 0
        chosen = [value for value in known if not producers or (value.producer() or known[0]).op_type in producers]
        assert chosen
        return list(dict.fromkeys(chosen))

    def body(self) -> ir.Function:
        """The merge node's body of a standard graph."""
        return next(iter(self.model.functions.values()))

    def in_body(self, op_type: str, nth: int = 0) -> ir.Node:
        return [node for node in self.body() if node.op_type == op_type][nth]


def _known(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def _through(value: ir.Value, *op_types: str) -> Iterator[tuple[ir.Node, int]]:
    """The readers of ``value``, and of what nodes of the given kinds make of it."""
    for node, index in value.uses():
        if node.op_type in op_types:
            yield from _through(node.outputs[0], *op_types)
        else:
            yield node, index


def is_number(value: ir.Value | None, number: float) -> bool:
    """Whether ``value`` is a constant of one number, this one."""
    found = scalar(value)
    return found is not None and bool(np.isclose(found, number, rtol=1e-5))


@contextmanager
def opened(path: Path, bundle: Path) -> Iterator[Graph]:
    """The graph at ``path``, written back at the end."""
    graph = Graph(path, bundle)
    yield graph
    graph.save()
