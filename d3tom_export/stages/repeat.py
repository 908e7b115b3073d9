"""Stages of many like layers: five are traced, and the graph's third one is repeated for those that were left out.

Tracing takes seconds a layer, and a deep model's layers differ in their weights' names alone. Traced are the first
three layers of a stage and its last two; the second and the third prove, node for node, that a layer's piece of the
graph follows from the one before it by counting up. Where they do not, nothing is repeated and the stage has to be
traced whole.

A layer's piece is what depends on its weights or caches and on no later layer's. (It reaches from one layer's first
weight to the next one's, so it starts and ends within the norms: where a period starts does not matter.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from torch import nn

from d3tom_export.checkpoint.quantized import QuantizedTensor
from d3tom_export.stages.contract import StageSpec, TensorSpec
from d3tom_export.trust.tensors import StoredTensor

TRACED_LAYERS = 5
"""Layers traced of a stage that has more."""

_FIRST, _TEMPLATE, _AFTER = 1, 2, 3  # of the traced layers: the twins that are compared, and the one behind the gap
_NUMBERED = re.compile(r"(.*)_(\d+)")


Weights = Mapping[int, tuple[str, StoredTensor | QuantizedTensor]]
"""Checkpoint name and place of every parameter by its ``id``."""


class _Slot(NamedTuple):
    """What a weight, a cache or an output is to its layer."""

    layer: int
    """Counted from 0 within the stage."""
    role: str


@dataclass(frozen=True)
class Repetition:
    """The layers of a stage: which are traced, and what those are called that are not."""

    stage: StageSpec
    """The stage with the traced layers' tensors alone."""
    traced: tuple[int, ...]
    """Their places among the stage's layers."""
    path: str
    """The list of layers within the stage's module; empty where it has none."""
    slots: Mapping[str, _Slot]
    """By the name of a tensor in the graph."""

    @property
    def left_out(self) -> range:
        """The places of the layers that are not traced."""
        return range(self.traced[_TEMPLATE] + 1, self.traced[_AFTER])


def _numbered(stage: StageSpec) -> dict[str, tuple[str, int]]:
    """Tensors of ``stage`` that each of its layers has one of, but maybe the last: role and the layer's number."""
    found = {
        tensor.name: (match[1], int(match[2]))
        for tensor in (*stage.inputs, *stage.outputs)
        if (match := _NUMBERED.fullmatch(tensor.name))
    }
    each = Counter(role for role, _ in found.values())
    most = max(each.values(), default=0)
    return {name: (role, number) for name, (role, number) in found.items() if each[role] >= most - 1}


def _weights_of(
    layers: nn.ModuleList, weights: Mapping[int, tuple[str, StoredTensor | QuantizedTensor]]
) -> dict[str, _Slot] | None:
    """The slots of all layers' weights by checkpoint name; None where layers are not stored alike."""
    slots: dict[str, _Slot] = {}
    kinds: list[dict[str, object]] = []
    for place, layer in enumerate(layers):
        kinds.append({})
        for role, parameter in layer.named_parameters():
            name, stored = weights[id(parameter)]
            slots[name] = _Slot(place, role)
            kinds[-1][role] = (stored.dtype, tuple(parameter.shape))
    return slots if all(kind == kinds[0] for kind in kinds) else None


@contextmanager
def few_layers(stage: StageSpec, module: nn.Module, path: str, weights: Weights) -> Iterator[Repetition | None]:
    """Within, ``module`` has only the layers to be traced; None where it has few, or layers not stored alike.

    Args:
        stage: The whole stage.
        module: Its module.
        path: Where in it the list of layers is; empty for none.
        weights: Checkpoint name and place by ``id(parameter)``.
    """
    layers = module.get_submodule(path) if path else nn.ModuleList()
    assert isinstance(layers, nn.ModuleList)
    tensors = _numbered(stage)
    numbers = sorted({number for _, number in tensors.values()})
    count = max(len(layers), len(numbers))
    slots = _weights_of(layers, weights)
    if count <= TRACED_LAYERS or slots is None or not {len(layers), len(numbers)} <= {0, count}:
        yield None
        return
    slots |= {name: _Slot(numbers.index(number), role) for name, (role, number) in tensors.items()}
    traced = (0, _FIRST, _TEMPLATE, count - 2, count - 1)

    def of_traced(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(spec for spec in specs if spec.name not in slots or slots[spec.name].layer in traced)

    short = replace(stage, inputs=of_traced(stage.inputs), outputs=of_traced(stage.outputs))
    parent_path, _, name = path.rpartition(".")
    try:
        if path:
            setattr(module.get_submodule(parent_path), name, nn.ModuleList(layers[place] for place in traced))
        yield Repetition(short, traced, path, slots)
    finally:
        if path:
            setattr(module.get_submodule(parent_path), name, layers)


def _layers_of(graph: ir.Graph, repetition: Repetition) -> dict[ir.Value, int]:
    """The last layer that a value depends on, counted among the traced; without those that depend on none."""
    order = {place: index for index, place in enumerate(repetition.traced)}
    found: dict[ir.Value, int] = {}
    for value in (*graph.inputs, *graph.initializers.values()):
        slot = repetition.slots.get(value.name or "")
        if slot is not None:
            found[value] = order[slot.layer]
    for node in graph:
        of_inputs = [found[value] for value in node.inputs if value is not None and value in found]
        if of_inputs:
            found |= dict.fromkeys(node.outputs, max(of_inputs))
    return found


def _same_constant(one: ir.Value, other: ir.Value) -> bool:
    first, second = one.const_value, other.const_value
    if first is None or second is None or first.dtype != second.dtype:
        return False
    return np.array_equal(first.numpy(), second.numpy())


class _Pieces:
    """A traced graph by layers."""

    def __init__(self, graph: ir.Graph, repetition: Repetition) -> None:
        self._slots = repetition.slots
        self._layers = _layers_of(graph, repetition)
        self._nodes: list[list[ir.Node]] = [[] for _ in repetition.traced]
        for node in graph:
            layer = self._layers.get(node.outputs[0])
            if layer is not None:
                self._nodes[layer].append(node)
        self.template = self._nodes[_TEMPLATE]

    def _left_by(self, layer: int) -> set[tuple[ir.Value, int]]:
        """Values of ``layer`` that later layers read, with the layers that do."""
        return {
            (value, reader)
            for node in self._nodes[layer]
            for value in node.outputs
            for user, _ in value.uses()
            if (reader := self._layers[user.outputs[0]]) > layer
        }

    def twins(self) -> dict[ir.Value, ir.Value] | None:
        """What each value of the second layer is in the third; None where the two are not alike."""
        twins: dict[ir.Value, ir.Value] = {}
        handed: dict[ir.Value, ir.Value] = {}  # by the layer before

        def alike(one: ir.Value | None, other: ir.Value | None) -> bool:
            if one is None or other is None:
                return one is other
            slot, other_slot = self._slots.get(one.name or ""), self._slots.get(other.name or "")
            if slot and slot.layer == _FIRST and one not in twins:  # a weight or an input; a twin may be an output
                return other_slot == _Slot(_TEMPLATE, slot.role)
            layer = self._layers.get(one, -1)
            if layer == _FIRST:
                return twins.get(one) is other
            return one is other or _same_constant(one, other) or (layer == 0 and handed.setdefault(one, other) is other)

        first = self._nodes[_FIRST]
        if len(first) != len(self.template):
            return None
        for one, other in zip(first, self.template, strict=True):
            same_kind = one.op_identifier() == other.op_identifier() and dict(one.attributes) == dict(other.attributes)
            if not same_kind or len(one.inputs) != len(other.inputs) or len(one.outputs) != len(other.outputs):
                return None
            if not all(alike(a, b) for a, b in zip(one.inputs, other.inputs, strict=True)):
                return None
            twins.update(zip(one.outputs, other.outputs, strict=True))
        # The third layer must hand on what the second does, each to the next one alone.
        expected = {(twins[value], reader + 1) for value, reader in self._left_by(_FIRST)}
        return twins if self._left_by(_TEMPLATE) == expected else None


class _Copier:
    """Copies of the template for the layers that were left out."""

    def __init__(self, graph: ir.Graph, repetition: Repetition, twins: Mapping[ir.Value, ir.Value]) -> None:
        self._graph = graph
        self._repetition = repetition
        self._twins = twins
        self._names = {slot: name for name, slot in repetition.slots.items()}
        self.tensors = {value.name: value for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
        """The graph's inputs, outputs and weights by name, with those of the copies."""

    def _of_layer(self, value: ir.Value, place: int) -> ir.Value | None:
        """The weight or input of the layer at ``place`` that ``value`` is of the template; None if it is neither."""
        slot = self._repetition.slots.get(value.name or "")
        if slot is None or slot.layer != self._repetition.traced[_TEMPLATE]:
            return None
        name = self._names[_Slot(place, slot.role)]
        if name not in self.tensors:
            self.tensors[name] = ir.Value(name=name, shape=value.shape, type=value.type)
            if value.is_initializer():
                self._graph.initializers[name] = self.tensors[name]
        return self.tensors[name]

    def _name(self, value: ir.Value, node: ir.Node, place: int) -> str:
        """A copy's name: an output's own, a converted weight's after the weight, or one with the layer's place."""
        name = value.name or ""
        if name in self._repetition.slots:
            return self._names[_Slot(place, self._repetition.slots[name].role)]
        for source in node.inputs:
            if source is not None and source.name and name.startswith(source.name):
                own = self._of_layer(source, place)
                if own is not None:
                    return f"{own.name}{name.removeprefix(source.name)}"
        return f"{name}_{place}"

    def layer(
        self, template: Sequence[ir.Node], place: int, before: Mapping[ir.Value, ir.Value]
    ) -> tuple[list[ir.Node], dict[ir.Value, ir.Value]]:
        """The nodes of the layer at ``place``, and its values by the template's; ``before`` has the layer's before."""
        copies: dict[ir.Value, ir.Value] = {}

        def counterpart(value: ir.Value | None) -> ir.Value | None:
            if value is None or value in copies:
                return value and copies[value]
            if value in self._twins:
                return before[self._twins[value]]
            return self._of_layer(value, place) or value

        nodes = []
        for node in template:
            copy = ir.Node(
                node.domain,
                node.op_type,
                [counterpart(value) for value in node.inputs],
                node.attributes,
                num_outputs=len(node.outputs),
                version=node.version,
                name=f"{node.name}_{place}",
                metadata_props=_renumbered(node, self._repetition.path, {self._repetition.traced[_TEMPLATE]: place}),
            )
            for value, output in zip(node.outputs, copy.outputs, strict=True):
                output.name, output.type, output.shape = self._name(value, node, place), value.type, value.shape
                copies[value] = output
                if value.is_graph_output():
                    self.tensors[output.name] = output
            nodes.append(copy)
        return nodes, copies


def _renumbered(node: ir.Node, path: str, places: Mapping[int, int]) -> dict[str, str]:
    """The node's notes, in which layers of the list at ``path`` get the numbers in ``places``."""
    numbered = re.compile(rf"(?<![\w.]){re.escape(path)}\.(\d+)(?!\d)")
    return {
        key: numbered.sub(lambda match: f"{path}.{places.get(int(match[1]), match[1])}", text) if path else text
        for key, text in node.metadata_props.items()
    }


def _take_sizes_of_first(model: ir.Model, repetition: Repetition) -> None:
    """Let sizes that are read off a layer's cache be read off the first layer's: they are the same by the contract.

    The exporter takes a size from whichever input it met last, so that layers would seem to need a later one's cache.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    first = {slot.role: name for name, slot in repetition.slots.items() if slot.layer == 0 and name in inputs}
    for node in model.graph:
        of = node.inputs[0] if node.op_type == "Shape" else None
        slot = repetition.slots.get(of.name or "") if of is not None and of.is_graph_input() else None
        if slot is not None:
            node.replace_input_with(0, inputs[first[slot.role]])
    common_passes.CommonSubexpressionEliminationPass()(model)


def repeat_layers(model: ir.Model, stage: StageSpec, repetition: Repetition) -> bool:
    """Give ``model``, traced with few layers, all of those of ``stage``; False, and none added, where layers differ.

    The copies' weights get names, dtypes and shapes, and no content.
    """
    _take_sizes_of_first(model, repetition)
    graph = model.graph
    graph.sort()
    pieces = _Pieces(graph, repetition)
    twins = pieces.twins()
    if twins is None:
        return False
    template = pieces.template
    copier = _Copier(graph, repetition, twins)
    outputs = [value for node in template for value in node.outputs]
    readers = [(value, user, index) for value in outputs for user, index in value.uses() if user not in template]
    places = dict(enumerate(repetition.traced))
    for node in graph:
        node.metadata_props.update(_renumbered(node, repetition.path, places))
    last = {value: value for value in outputs}
    added: list[ir.Node] = []
    for place in repetition.left_out:
        nodes, last = copier.layer(template, place, last)
        added += nodes
    graph.insert_after(template[-1], added)
    for value, user, index in readers:
        user.replace_input_with(index, last[value])
    for values, specs in ((graph.inputs, stage.inputs), (graph.outputs, stage.outputs)):
        values.clear()
        values.extend(copier.tensors[spec.name] for spec in specs)
    graph.sort()
    return True
