"""A stage's ONNX graph, open to questions: which of its values are a module's, and what a part of it computes.

Parts are cut out as graphs of their own, a few nodes on ONNX Runtime, instead of marking inner values as outputs of the
whole: that would hold them all at once, and keep the runtime from fusing what it fuses elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from d3tom_export.backends.onnxruntime_package import ort
from d3tom_export.backends.onnxruntime_stage import session_options
from d3tom_export.errors import D3tomError
from d3tom_export.plugins.merge_op import OP_TYPE, ROWS, common_rows, merge_function

MODULE_SCOPES = "pkg.torch.onnx.name_scopes"
"""Node metadata that the exporter writes and :mod:`d3tom_export.stages.export` keeps: the modules around a node."""

_MOVES = {"Cast", "CastLike", "Concat", "Expand", "Identity", "Reshape", "Split", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators that only move or convert data."""

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


class ModuleValues(NamedTuple):
    """The graph's values for what a module takes and gives."""

    inputs: tuple[str, ...]
    output: str


def _scope(node: onnx.NodeProto) -> str | None:
    """The innermost module a node came from, by its name within the stage; None where the graph does not tell."""
    for entry in node.metadata_props:
        if entry.key == MODULE_SCOPES:
            # A list in Python's spelling: the scopes from the outside in, and the node's own name.
            scopes = [scope.strip(" '\"") for scope in entry.value.strip("[]").split(",")]
            return scopes[-2] if len(scopes) > 1 else ""
    return None


def _runnable(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with a body for its merge nodes: an engine's graph leaves that to the plugin they name."""
    merges = [node for node in model.graph.node if node.op_type == OP_TYPE]
    if merges and not any(function.name == OP_TYPE for function in model.functions):
        for node in merges:
            kept = [attribute for attribute in node.attribute if attribute.name == ROWS and len(node.output) > 1]
            del node.attribute[:]
            node.attribute.extend(kept)
        (opset,) = (entry.version for entry in model.opset_import if not entry.domain)
        model.functions.append(merge_function(opset, common_rows(len(node.output) for node in merges)))
    return model


class StageGraph:
    """The graph in ``path``; its weights stay in their file beside it, or in ``weights_folder``.

    ``content`` is the file's, where it was read already (:meth:`d3tom_export.bundle.folder.Bundle.graph`). Raises
    :class:`D3tomError` where it cannot be read.
    """

    def __init__(self, path: Path, content: bytes | None = None, weights_folder: Path | None = None) -> None:
        self._weights_folder = weights_folder or path.parent
        try:
            model = onnx.load_from_string(path.read_bytes() if content is None else content)
            typed = {value.name for value in (*model.graph.value_info, *model.graph.output)}
            if any(name not in typed for node in model.graph.node for name in node.output if name):
                model = onnx.shape_inference.infer_shapes(model)
            self._model = _runnable(model)
        except Exception as error:  # protobuf raises errors of its own
            raise D3tomError(f"{path} cannot be read as ONNX: {error}. Rebuild the bundle.") from None
        self.path = path
        graph = self._model.graph
        self._nodes = list(graph.node)
        self.inputs = {value.name for value in graph.input}
        self.outputs = [value.name for value in graph.output]
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._types = {
            value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)
        }
        self._varying = set(self.inputs)
        self._maker: dict[str, int] = {}
        self._users: dict[str, set[int]] = {}
        self._by_scope: dict[str, list[int]] = {}
        for index, node in enumerate(self._nodes):
            self._maker.update(dict.fromkeys(filter(None, node.output), index))
            for name in filter(None, node.input):
                self._users.setdefault(name, set()).add(index)
            if not self._varying.isdisjoint(node.input):
                self._varying.update(node.output)
            scope = _scope(node)
            if scope:
                self._by_scope.setdefault(scope, []).append(index)
        self._unscoped = [index for index, node in enumerate(self._nodes) if _scope(node) is None]

    def _members(self, scope: str) -> set[int]:
        """The nodes of a module, and those that graph passes put between them."""
        members = set(self._by_scope.get(scope, []))
        size = -1
        while size != len(members):
            size = len(members)
            for index in set(self._unscoped) - members:
                node = self._nodes[index]
                made_inside = any(self._maker.get(name) in members for name in node.input)
                users = set().union(*(self._users.get(name, set()) for name in node.output))
                if made_inside and users and users <= members and not set(node.output) & set(self.outputs):
                    members.add(index)
        return members

    def module_values(self, scope: str) -> ModuleValues | str:
        """The values of the module called ``scope`` in the stage, or why the graph does not show them."""
        members = self._members(scope)
        if not members:
            return "the graph has no node of it: folded or merged into others"
        nodes = [self._nodes[index] for index in members]
        made = {name for node in nodes for name in node.output}
        given = {name for name in made if self._users.get(name, set()) - members or name in self.outputs}
        # What depends on no input is a weight, cast or scaled it may be.
        taken = {name for node in nodes for name in node.input if name in self._varying} - made
        inputs, outputs = ([n for n in names if self._types.get(n) in _FLOATS] for names in (taken, given))
        if len(outputs) != 1 or len(inputs) > 1:
            return f"the graph takes {len(inputs)} and gives {len(outputs)} values of it, expected one and one"
        return ModuleValues(tuple(inputs), outputs[0])

    def merges(self) -> list[ModuleValues]:
        """The values of every row input of every merge node, in order: the rows, what is compared, what is kept."""
        return [
            ModuleValues((rows, *node.input[1:3]), output)
            for node in self._nodes
            if node.op_type == OP_TYPE
            for rows, output in zip((node.input[0], *node.input[3:]), node.output, strict=True)
        ]

    def part(self, target: str, cuts: Collection[str]) -> list[onnx.NodeProto]:
        """The nodes that compute ``target`` from the values ``cuts`` and the stage's inputs, in order."""
        members: set[int] = set()
        waiting, seen = [target], set(cuts)
        while waiting:
            name = waiting.pop()
            if name in seen or name not in self._maker:
                continue
            seen.add(name)
            members.add(self._maker[name])
            waiting += self._nodes[self._maker[name]].input
        return [self._nodes[index] for index in sorted(members)]

    def ancestors(self, target: str) -> set[str]:
        """Every value that ``target`` depends on."""
        return {name for node in self.part(target, ()) for name in node.input}

    def computing(self, nodes: Iterable[onnx.NodeProto]) -> list[str]:
        """Outputs of those of ``nodes`` that compute floats: the others handle shapes and indices, or move."""
        return [
            node.output[0]
            for node in nodes
            if node.op_type not in _MOVES and self._types.get(node.output[0]) in _FLOATS
        ]

    def node_name(self, value: str) -> str:
        """Operator and name of the node that computes ``value``."""
        node = self._nodes[self._maker[value]]
        return f"{node.op_type} {node.name}"

    def weights(self, nodes: Iterable[onnx.NodeProto]) -> list[str]:
        """The checkpoint's tensors that ``nodes`` read: those that lie in the weights file."""
        names = {name: None for node in nodes for name in node.input if name in self._initializers}
        return [name for name in names if name.startswith("model.")]

    def typed(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """``feeds`` as the graph takes them: its inputs and values may be half precision."""
        dtypes = {name: helper.tensor_dtype_to_np_dtype(self._types[name]) for name in feeds}
        return {name: np.ascontiguousarray(array, dtypes[name]) for name, array in feeds.items()}

    def run(self, target: str, feeds: Mapping[str, NDArray[Any]], cuts: Collection[str] = ()) -> NDArray[Any]:
        """The value ``target`` on ONNX Runtime's CPU, with the values ``cuts`` and the stage's inputs out of ``feeds``.

        Only the weights of the nodes in between are loaded. Raises :class:`D3tomError` where they do not run.
        """
        nodes = self.part(target, cuts)
        needed = {name for node in nodes for name in node.input if name}
        made = {name for node in nodes for name in node.output}
        fed = [name for name in feeds if name in needed and name not in made and (name in cuts or name in self.inputs)]
        graph = helper.make_graph(
            nodes,
            target,
            [helper.make_tensor_value_info(name, self._types[name], [None] * feeds[name].ndim) for name in fed],
            [helper.make_empty_tensor_value_info(target)],
            [tensor for name, tensor in self._initializers.items() if name in needed and name not in fed],
        )
        model = helper.make_model(
            graph,
            opset_imports=self._model.opset_import,
            functions=self._model.functions,
            ir_version=self._model.ir_version,
        )
        options = session_options("cpu", self._weights_folder)
        try:
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            return session.run([target], self.typed({name: feeds[name] for name in fed}))[0]
        except Exception as error:  # ONNX Runtime raises a family of unrelated types
            raise D3tomError(f"ONNX Runtime cannot run the part of {self.path.name} up to {target}: {error}") from None
