"""Faults in the transformer's layers: norms, rotary positions, attention, feed-forward, the answer's rows."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tests.mutation.fault import Fault
from tests.mutation.graph import Change, Graph, is_number
from tests.mutation.place import BOTH, in_graphs

HEADS, HEAD_SIZE = 4, 8
"""Of the synthetic checkpoint; two query heads share a key head."""


def without_norm(weight: str) -> Change:
    def change(graph: Graph) -> None:
        x, normed = graph.norm(weight)
        graph.pass_on(normed, lambda _: x)

    return change


def epsilon(number: float) -> Change:
    """Of every RMS norm of the graph."""

    def change(graph: Graph) -> None:
        if graph.tuned:
            for node in graph.all("RMSNormalization"):
                node.attributes["epsilon"] = ir.AttrFloat32("epsilon", number)
            return
        for node in graph.all("Add", lambda node: is_number(node.inputs[1], 1e-5)):
            graph.read(node, 1, graph.number(number))

    return change


def theta(base: float) -> Change:
    def change(graph: Graph) -> None:
        table = graph.nodes.initializers["frequencies"]
        assert table.const_value is not None
        size = 2 * table.const_value.size
        numbers = base ** (-np.arange(0, size, 2, dtype=np.float64) / size)
        table.const_value = ir.tensor(numbers.astype(np.float32), name="frequencies")

    return change


def _casts(positions: ir.Value) -> list[ir.Node]:
    """The nodes that make angles of ``positions``, which serve as indices besides."""
    casts = [node for node, _ in positions.uses() if node.op_type == "Cast"]
    return [node for node in casts if any(user.op_type == "Unsqueeze" for user, _ in node.outputs[0].uses())]


def shifted_positions(by: int, *producers: str) -> Change:
    def change(graph: Graph) -> None:
        for positions in graph.positions(*producers):
            for cast in _casts(positions):
                graph.read(cast, 0, graph.node("Add", positions, graph.integer(by)))

    return change


def reversed_positions(graph: Graph) -> None:
    for positions in graph.positions():
        for cast in _casts(positions):
            graph.read(cast, 0, graph.node("Neg", positions))


def scaled(weight: str, factor: float) -> Change:
    """The product with a weight, times a factor."""

    def change(graph: Graph) -> None:
        graph.pass_on(graph.product(weight), lambda value: graph.scaled(value, factor))

    return change


def without_residual(weight: str) -> Change:
    """The sum that takes in the product with ``weight`` gives that product alone."""

    def change(graph: Graph) -> None:
        product = graph.product(weight)
        (sums,) = (user for user, _ in product.uses() if user.op_type == "Add")
        graph.pass_on(sums.outputs[0], lambda _: product)

    return change


def one_head_zeroed(layer: int, head: int) -> Change:
    def change(graph: Graph) -> None:
        node, rows = graph.multiplied(f"blocks.{layer}.attn_out.weight")
        heads = np.ones(HEADS, dtype=np.float32)
        heads[head] = 0.0
        graph.read(node, 0, graph.node("Mul", rows, graph.constant(np.repeat(heads, HEAD_SIZE))))

    return change


def swapped(first: str, second: str) -> Change:
    """What reads the product with one weight reads that with the other."""

    def change(graph: Graph) -> None:
        values = graph.product(first), graph.product(second)
        users = [list(value.uses()) for value in values]
        for readers, other in zip(users, reversed(values), strict=True):
            for node, index in readers:
                graph.read(node, index, other)

    return change


def other_key_heads(layer: int) -> Change:
    """Query heads read key heads in the order 0 1 0 1 for 0 0 1 1."""
    order = np.array([0, 2, 1, 3])  # its own inverse
    columns = (order[:, None] * HEAD_SIZE + np.arange(HEAD_SIZE)).ravel()

    def change(graph: Graph) -> None:
        def permuted(value: ir.Value) -> ir.Value:
            return graph.node("Gather", value, graph.constant(columns), axis=2)

        graph.pass_on(graph.product(f"blocks.{layer}.q_proj.weight"), permuted)
        node, rows = graph.multiplied(f"blocks.{layer}.attn_out.weight")
        graph.read(node, 0, permuted(rows))

    return change


def attention_scale(factor: float) -> Change:
    """Of the first layer of the graph."""

    def change(graph: Graph) -> None:
        if graph.tuned:
            node = graph.all("Attention")[0]
            node.attributes["scale"] = ir.AttrFloat32("scale", factor * HEAD_SIZE**-0.5)
            return
        scores = graph.all("Softmax")[0].inputs[0]
        assert scores is not None
        graph.pass_on(scores, lambda value: graph.scaled(value, factor))

    return change


def answer_rows_one_early(graph: Graph) -> None:
    """The last layer's queries and residuals are those of the rows before; its angles are right."""
    for node in graph.all("Gather", lambda node: "axis" in node.attributes and node.attributes["axis"].as_int() == 1):
        rows = node.inputs[1]
        assert rows is not None
        graph.read(node, 1, graph.node("Sub", rows, graph.ints(1)))


def answer_angles_from_zero(graph: Graph) -> None:
    """The last layer's queries stand at 0..G-1."""
    (positions,) = graph.positions("Add")
    sums = positions.producer()
    assert sums is not None
    answer = sums.inputs[0]
    assert answer is not None
    for cast in _casts(positions):
        graph.read(cast, 0, answer)


def default_answer_length(graph: Graph) -> None:
    default = graph.nodes.initializers["answer_length"]
    default.const_value = ir.tensor([7], dtype=ir.DataType.INT64, name="answer_length")


_TOLERATED = "it moves the logits by less than float32's tolerance of 1e-3"

FAULTS: list[Fault] = [
    *in_graphs("attention norm dropped", "back", without_norm("blocks.2.attn_norm.weight"), review=True),
    *in_graphs("final norm dropped", "back", without_norm("ln_f.weight"), review=True),
    *in_graphs("feed-forward norm dropped", "merge", without_norm("blocks.1.ff_norm.weight")),
    *in_graphs("attention norm dropped", "prefill", without_norm("blocks.3.attn_norm.weight"), graphs=("standard",)),
    *in_graphs("epsilon of the norms 1e-2 for 1e-5", "back", epsilon(1e-2)),
    *in_graphs("epsilon of the norms 1e-3 for 1e-5", "cached_front", epsilon(1e-3), graphs=("tuned",)),
    *in_graphs("epsilon of the norms 1e-6 for 1e-5", ("front", "merge", "back"), epsilon(1e-6), review=True),
    *in_graphs(
        "epsilon of the norms 9.9e-6 for 1e-5",
        ("front", "merge", "back"),
        epsilon(9.9e-6),
        graphs=("tuned",),
        reason=_TOLERATED,
    ),
    *in_graphs("rope theta 500000 for 10000", "front", theta(500_000), review=True),
    *in_graphs("rope theta 11000 for 10000", "back", theta(11_000), review=True),
    *in_graphs("rope theta 10010 for 10000", "merge", theta(10_010), review=True),
    *in_graphs("rope theta 10010 for 10000", "rotate", theta(10_010), graphs=("tuned",)),
    *in_graphs("rope theta 10000.5 for 10000", "merge", theta(10_000.5), samples=8, review=True),
    *in_graphs("rope theta 10000.1 for 10000", "merge", theta(10_000.1), reason=_TOLERATED),
    *in_graphs(
        "all positions one late",
        ("front", "merge", "back"),
        shifted_positions(1),
        review=True,
        reason="rotary attention sees differences of positions alone: the same model",
    ),
    *in_graphs("positions reversed", "front", reversed_positions, review=True),
    *in_graphs("the answer's positions one late", "cached_front", shifted_positions(1, "Add"), review=True),
    *in_graphs("the answer's positions one late", "cached_back", shifted_positions(1, "Add"), graphs=("standard",)),
    *in_graphs("attention's residual missing in one layer", "back", without_residual("blocks.3.attn_out.weight")),
    *in_graphs(
        "feed-forward's residual missing in one layer", "cached_back", without_residual("blocks.2.ff_out.weight")
    ),
    *in_graphs("one head zeroed in one layer", "back", one_head_zeroed(2, 3)),
    *in_graphs("one head zeroed in the prompt's layer", "prefill", one_head_zeroed(1, 0)),
    *in_graphs("keys and values swapped in one layer", "back", swapped("2.k_proj.weight", "2.v_proj.weight")),
    *in_graphs("keys and values swapped in one layer", "prefill", swapped("3.k_proj.weight", "3.v_proj.weight")),
    *in_graphs("gate and values of the feed-forward swapped", "merge", swapped("ff_proj.weight", "up_proj.weight")),
    *in_graphs("key heads repeated in the order 0 1 0 1", "back", other_key_heads(2)),
    *in_graphs("attention's scale 5 % off in one layer", "back", attention_scale(1.05)),
    *in_graphs("the last layer's answer rows one early", "back", answer_rows_one_early),
    *in_graphs("the last layer's queries at positions 0..G-1", "back", answer_angles_from_zero),
    *in_graphs("one product times 1.1", "front", scaled("blocks.0.ff_out.weight", 1.1)),
    *in_graphs(
        "one product times 1.1", "decide", scaled("blocks.1.ff_out.weight", 1.1), graphs=("standard",), samples=8
    ),
    *in_graphs("one product negated", "cached_back", scaled("blocks.3.ff_proj.weight", -1.0), graphs=("tuned",)),
    *in_graphs("default of answer_length 7 for 8", "back", default_answer_length, graphs=BOTH, review=True),
]
