"""Faults of single operators in graphs: an axis, a mask, a base, what shows only at some sizes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from tests.mutation.fault import Fault
from tests.mutation.graph import Change, Graph
from tests.mutation.layers import swapped
from tests.mutation.place import Graphs, in_graphs
from tests.mutation.selection import head_mean_of, masked_of, merged_of, scores_of

TUNED: tuple[Graphs, ...] = ("tuned",)
STANDARD: tuple[Graphs, ...] = ("standard",)


def causal(graph: Graph) -> None:
    for node in graph.all("Attention"):
        node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)


def softmax_axis(axis: int) -> Change:
    """Of the graph's first softmax."""

    def change(graph: Graph) -> None:
        graph.all("Softmax")[0].attributes["axis"] = ir.AttrInt64("axis", axis)

    return change


def first_head(graph: Graph) -> None:
    mean = head_mean_of(graph)
    rows = mean.inputs[0]
    assert rows is not None
    graph.pass_on(mean.outputs[0], lambda _: graph.node("Gather", rows, graph.integer(0), axis=1))


def decider_roll(graph: Graph) -> None:
    """Each decider is taken for its neighbour."""
    deciders = graph.input("deciders")

    def rolled(value: ir.Value) -> ir.Value:
        count = graph.node("Squeeze", graph.node("Shape", value, start=1, end=2))
        later = graph.node("Range", graph.integer(1), count, graph.integer(1))
        places = graph.node("Concat", later, graph.ints(0), axis=0)
        whole = graph.node("Cast", value, to=int(ir.DataType.INT64))
        return graph.node("Cast", graph.node("Gather", whole, places, axis=1), to=int(ir.DataType.BOOL))

    graph.pass_on(deciders, rolled)


def largest_of_deciders(graph: Graph) -> None:
    """The largest of the deciders' scores in the place of their sum."""
    sums = next(user for user, _ in masked_of(graph).outputs[0].uses())
    graph.pass_on(sums.outputs[0], lambda _: graph.node("ReduceMax", *sums.inputs, keepdims=0))  # type: ignore[arg-type]


def scores_from(place: int) -> Change:
    """Visual tokens from ``place`` on never count."""

    def change(graph: Graph) -> None:
        def cut(scores: ir.Value) -> ir.Value:
            count = graph.node("Squeeze", graph.node("Shape", scores, start=1, end=2))
            places = graph.node("Range", graph.integer(0), count, graph.integer(1))
            near = graph.node("Less", places, graph.integer(place))
            return graph.node("Mul", scores, graph.node("Cast", near, to=int(ir.DataType.FLOAT)))

        graph.pass_on(scores_of(graph), cut)

    return change


def scores_one_late(graph: Graph) -> None:
    """Each visual token has the score of the sequence's row before it."""
    node = scores_of(graph).producer()
    assert node is not None
    positions = node.inputs[1]
    assert positions is not None
    graph.read(node, 1, graph.node("Sub", positions, graph.integer(1)))


def kept_by_importance(graph: Graph) -> None:
    """Kept tokens stay in the order of their scores."""
    ranked = graph.all("TopK")[0].outputs[1]
    node = graph.output("kept").producer()
    assert node is not None
    assert node.op_type == "TopK"
    graph.pass_on(graph.output("kept"), lambda _: graph.node("Identity", ranked))


def kept_counted_twice(graph: Graph) -> None:
    rows, merged = merged_of(graph)
    column = graph.node("Unsqueeze", graph.output("kept"), graph.ints(-1))
    own = graph.node("GatherND", rows, column, batch_dims=1)
    graph.pass_on(merged, lambda value: graph.node("Add", value, own))


def only_if(axis_of: str, axis: int, size: int, name: str, factor: float) -> Change:
    """The output ``name`` is off only where an input's axis has this size."""

    def change(graph: Graph) -> None:
        def spoiled(value: ir.Value) -> ir.Value:
            found = graph.node("Shape", graph.input(axis_of), start=axis, end=axis + 1)
            there = graph.node("Cast", graph.node("Equal", found, graph.ints(size)), to=int(ir.DataType.FLOAT))
            return graph.node("Mul", value, graph.node("Add", graph.scaled(there, factor - 1), graph.number(1.0)))

        graph.give_out(name, spoiled)

    return change


def baked_length(graph: Graph) -> None:
    """The answer's length is a number of the graph: that of the bundle's own answers."""
    graph.pass_on(graph.input("answer_length"), lambda _: graph.ints(8))


def frequencies(change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def spoil(graph: Graph) -> None:
        table = graph.nodes.initializers["frequencies"]
        assert table.const_value is not None
        numbers = change(table.const_value.numpy().astype(np.float64))
        table.const_value = ir.tensor(numbers.astype(np.float32), name="frequencies")

    return spoil


def interleaved(graph: Graph) -> None:
    for node in graph.all("RotaryEmbedding"):
        node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


def turned_back(graph: Graph) -> None:
    """Rotation the other way round in queries and keys alike, which leaves differences of positions as they were."""
    for node in graph.all("RotaryEmbedding"):
        graph.read(node, 3, graph.node("Neg", node.inputs[3]))  # type: ignore[arg-type]


def one_turned_back(graph: Graph) -> None:
    node = graph.all("RotaryEmbedding")[0]
    graph.read(node, 3, graph.node("Neg", node.inputs[3]))  # type: ignore[arg-type]


def gelu_for_silu(graph: Graph) -> None:
    for node in graph.all("Sigmoid"):
        x = node.inputs[0]
        assert x is not None
        graph.read(node, 0, graph.scaled(x, 1.702))


def through_half(weight: str) -> Change:
    def change(graph: Graph) -> None:
        def rounded(value: ir.Value) -> ir.Value:
            half = graph.node("Cast", value, to=int(ir.DataType.BFLOAT16))
            return graph.node("Cast", half, to=int(ir.DataType.FLOAT))

        graph.pass_on(graph.product(weight), rounded)

    return change


def layer_skipped(layer: int) -> Change:
    """Neither of a layer's two sums takes anything in."""

    def change(graph: Graph) -> None:
        for weight in ("attn_out", "ff_out"):
            graph.pass_on(graph.product(f"blocks.{layer}.{weight}.weight"), lambda value: graph.scaled(value, 0.0))

    return change


def first_token_never(graph: Graph) -> None:
    """Tokens are chosen among all columns but the first."""
    node = graph.one("ArgMax", lambda node: node.outputs[0] is graph.output("token"))
    x = node.inputs[0]
    assert x is not None
    shape = x.shape
    assert shape is not None
    assert isinstance(shape[2], int)
    row = np.zeros(shape[2], dtype=np.float32)
    row[0] = -1e9
    graph.read(node, 0, graph.node("Add", x, graph.constant(row)))


def exchanged_outputs(first: str, second: str) -> Change:
    def change(graph: Graph) -> None:
        values = graph.output(first), graph.output(second)
        graph.give_out(first, lambda _: graph.node("Add", values[1], graph.number(0.0)))
        graph.give_out(second, lambda _: graph.node("Add", values[0], graph.number(0.0)))

    return change


_SIZES = "nothing that validate runs has this size; a graph has one formula for all of them unless someone adds another"

FAULTS: list[Fault] = [
    *in_graphs("attention is causal", "back", causal, graphs=TUNED),
    *in_graphs("attention is causal", "merge", causal, graphs=TUNED),
    *in_graphs("attention is causal", "front", causal, graphs=TUNED),
    *in_graphs("attention's softmax over the queries", "back", softmax_axis(-2), graphs=STANDARD),
    *in_graphs("importance's softmax over the queries", "merge", softmax_axis(-2), graphs=TUNED),
    *in_graphs("scores of the first head", "merge", first_head, graphs=TUNED),
    *in_graphs("scores of the first head", "cached_merge", first_head, graphs=TUNED),
    *in_graphs("deciders one place early", "merge", decider_roll, graphs=TUNED),
    *in_graphs("deciders one place early", "decide", decider_roll, graphs=TUNED),
    *in_graphs("largest score of the deciders", "merge", largest_of_deciders, graphs=TUNED),
    *in_graphs("visual tokens from the 64th on never kept", "merge", scores_from(64), graphs=TUNED),
    *in_graphs("scores of the row before", "merge", scores_one_late, graphs=TUNED),
    *in_graphs("scores of the row before", "cached_merge", scores_one_late, graphs=TUNED),
    *in_graphs("kept in the order of importance", "merge", kept_by_importance, graphs=TUNED),
    *in_graphs("kept rows counted twice", "merge", kept_counted_twice),
    *in_graphs(
        "residual 1 % large in batches of two",
        "front",
        only_if("prompt_embeddings", 0, 2, "hidden", 1.01),
        graphs=TUNED,
    ),
    *in_graphs("merged 1 % large at V = 1", "merge", only_if("visual_positions", 0, 1, "merged", 1.01), graphs=TUNED),
    *in_graphs(
        "residual 1 % large in batches of three",
        "front",
        only_if("prompt_embeddings", 0, 3, "hidden", 1.01),
        graphs=TUNED,
        reason=_SIZES,
    ),
    *in_graphs(
        "residual 1 % large in answers of one",
        "front",
        only_if("answer_embeddings", 1, 1, "hidden", 1.01),
        graphs=TUNED,
        reason=_SIZES,
    ),
    *in_graphs(
        "answer's length is the number 8",
        "back",
        baked_length,
        graphs=TUNED,
    ),
    *in_graphs("last rotary frequency zero", "back", frequencies(lambda x: np.append(x[:-1], 0.0)), graphs=TUNED),
    *in_graphs("rotary frequencies in reverse order", "front", frequencies(lambda x: x[::-1]), graphs=TUNED),
    *in_graphs("positions scaled by 1.01", "back", frequencies(lambda x: 1.01 * x), graphs=TUNED),
    *in_graphs("rotary pairs interleaved", "front", interleaved, graphs=TUNED),
    *in_graphs("rotation of queries alone the other way", "front", one_turned_back, graphs=TUNED),
    *in_graphs("rotation the other way", "front", turned_back, graphs=TUNED),
    *in_graphs("another activation", "back", gelu_for_silu, graphs=TUNED),
    *in_graphs("one product through bfloat16", "back", through_half("blocks.2.q_proj.weight"), graphs=TUNED),
    *in_graphs("one layer skipped", "back", layer_skipped(3), graphs=TUNED),
    *in_graphs("one layer skipped", "cached_back", layer_skipped(2), graphs=TUNED),
    *in_graphs(
        "gate and values of the feed-forward swapped",
        "front",
        swapped("0.ff_proj.weight", "0.up_proj.weight"),
        graphs=TUNED,
    ),
    *in_graphs(
        "token 0 never chosen",
        "back",
        first_token_never,
        graphs=TUNED,
    ),
    *in_graphs("confidence and doubt exchanged", "back", exchanged_outputs("confidence", "doubt"), graphs=TUNED),
    *in_graphs(
        "confidence and doubt exchanged", "cached_back", exchanged_outputs("confidence", "doubt"), graphs=STANDARD
    ),
]
