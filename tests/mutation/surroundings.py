"""Faults around the layers: what the last stage gives out, the embedding table, the eyes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from d3tom_export.checkpoint.stored import read_array, stored_tensors
from tests.mutation.fault import Fault
from tests.mutation.graph import Change, Graph
from tests.mutation.place import in_graphs

UNUSED_TOKEN = 3
"""A token of the synthetic tokenizer that no sample's question holds; the random model answers with others too."""


def output_scaled(name: str, factor: float) -> Change:
    def change(graph: Graph) -> None:
        graph.give_out(name, lambda value: graph.scaled(value, factor))

    return change


def token_one_up(graph: Graph) -> None:
    graph.give_out("token", lambda value: graph.node("Add", value, graph.integer(1)))


def doubt_reversed(graph: Graph) -> None:
    graph.give_out("doubt", lambda value: graph.node("Reciprocal", value))


def doubt_cancelled(graph: Graph) -> None:
    """1 / confidence - 1 in float32, which is 0 wherever the confidence rounds to 1."""

    def cancelled(_: ir.Value) -> ir.Value:
        return graph.node("Sub", graph.node("Reciprocal", graph.output("confidence")), graph.number(1.0))

    graph.give_out("doubt", cancelled)


def nan_logit(graph: Graph) -> None:
    """The last token of the vocabulary has the logit NaN; token and doubt come from the right ones."""

    def spoiled(value: ir.Value) -> ir.Value:
        shape = value.shape
        assert shape is not None
        width = shape[2]
        assert isinstance(width, int)
        row = np.zeros(width, dtype=np.float32)
        row[-1] = np.nan
        return graph.node("Add", value, graph.constant(row))

    graph.give_out("logits", spoiled)


def table(rows: Callable[[NDArray[np.float32]], None]) -> Change:
    """The embedding table as the graph holds it; the weights' file, and so the oracle, keep it as it was."""

    def change(graph: Graph) -> None:
        weight = graph.weight("wte.weight")
        assert weight.name is not None
        assert weight.shape is not None
        numbers = read_array(stored_tensors(graph.bundle)[weight.name])[: weight.shape[0]].copy()
        rows(numbers)
        graph.frozen("wte.weight", numbers)

    return change


def _negate_unused(numbers: NDArray[np.float32]) -> None:
    numbers[UNUSED_TOKEN] *= -1


def _last_row_nan(numbers: NDArray[np.float32]) -> None:
    numbers[0] = np.nan  # of a byte that no tokenizer's text holds alone


def _shift(numbers: NDArray[np.float32]) -> None:
    numbers[:] = np.roll(numbers, 1, axis=0)


def pooling(**attributes: str) -> Change:
    def change(graph: Graph) -> None:
        resize = graph.one("Resize")
        for name, value in attributes.items():
            resize.attributes[name] = ir.AttrString(name, value)

    return change


def gelu(nth: int, kind: str) -> Change:
    def change(graph: Graph) -> None:
        graph.all("Gelu")[nth].attributes["approximate"] = ir.AttrString("approximate", kind)

    return change


def layer_norm_epsilon(number: float) -> Change:
    def change(graph: Graph) -> None:
        for node in graph.all("LayerNormalization"):
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", number)

    return change


def features_scaled(factor: float) -> Change:
    def change(graph: Graph) -> None:
        graph.give_out("visual_features", lambda value: graph.scaled(value, factor))

    return change


def projector_norm(graph: Graph) -> None:
    """The tower's last layer norm is skipped."""
    node = graph.all("LayerNormalization")[-1]
    x = node.inputs[0]
    assert x is not None
    graph.pass_on(node.outputs[0], lambda _: x)


def tower_rows_reversed(graph: Graph) -> None:
    """Patches are numbered from the end, so each gets the opposite place's position embedding."""
    places = graph.nodes.initializers
    name = next(name for name in places if name.endswith("position_ids"))
    stored = places[name].const_value
    assert stored is not None
    places[name].const_value = ir.tensor(stored.numpy()[:, ::-1].copy(), name=name)


FAULTS: list[Fault] = [
    *in_graphs("output confidence halved", "back", output_scaled("confidence", 0.5), review=True),
    *in_graphs("output confidence halved", "cached_back", output_scaled("confidence", 0.5), graphs=("tuned",)),
    *in_graphs("output doubt halved", "back", output_scaled("doubt", 0.5)),
    *in_graphs("output doubt reversed", "back", doubt_reversed),
    *in_graphs("output doubt cancelled in float32", "back", doubt_cancelled, subject="bundled", samples=1, review=True),
    *in_graphs("output token one up", "back", token_one_up),
    *in_graphs("output token one up", "cached_back", token_one_up, graphs=("standard",)),
    *in_graphs("output logits 1 % large", "back", output_scaled("logits", 1.01)),
    *in_graphs("one logit NaN, token and doubt right", "back", nan_logit),
    *in_graphs(
        "embedding of a token in no sample negated", "embed", table(_negate_unused), graphs=("tuned",), review=True
    ),
    *in_graphs("embedding of a token in no sample NaN", "embed", table(_last_row_nan), graphs=("tuned",)),
    *in_graphs("embedding table shifted by one row", "embed", table(_shift), graphs=("tuned",)),
    *in_graphs("pooling nearest", "vision", pooling(mode="nearest"), graphs=("tuned",), review=True),
    *in_graphs(
        "pooling with aligned corners",
        "vision",
        pooling(coordinate_transformation_mode="align_corners"),
        graphs=("tuned",),
        review=True,
    ),
    *in_graphs("exact gelu in the tower", "vision", gelu(0, "none"), graphs=("tuned",), review=True),
    *in_graphs("tanh gelu in the projector", "vision", gelu(-1, "tanh"), graphs=("tuned",), review=True),
    *in_graphs("projector negated", "vision", features_scaled(-1.0), graphs=("tuned",)),
    *in_graphs("features 1 % large", "vision", features_scaled(1.01), graphs=("tuned",)),
    *in_graphs("one layer norm of the tower dropped", "vision", projector_norm, graphs=("tuned",)),
    *in_graphs("position embeddings in reverse order", "vision", tower_rows_reversed, graphs=("tuned",)),
    *in_graphs("epsilon of the tower's norms 1e-2 for 1e-6", "vision", layer_norm_epsilon(1e-2), graphs=("tuned",)),
    *in_graphs(
        "epsilon of the tower's norms 1e-5 for 1e-6",
        "vision",
        layer_norm_epsilon(1e-5),
        graphs=("tuned",),
        review=True,
        reason="it moves logits and features by less than float32's tolerances of 1e-3 and 1e-4",
    ),
]
