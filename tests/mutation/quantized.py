"""Faults in the graphs in int8, on the bundled model: a random one's tokens are all near-ties."""

from __future__ import annotations

from typing import Any

from tests.mutation.fault import Fault
from tests.mutation.graph import Change, Graph
from tests.mutation.layers import scaled, swapped, theta, without_norm, without_residual
from tests.mutation.place import in_graphs
from tests.mutation.selection import lowest_kept, mask_ignored, others_dropped
from tests.mutation.surroundings import features_scaled, output_scaled, token_one_up


def scale_of_one_product(weight: str, factor: float) -> Change:
    """A quantized weight's own scales times a factor, its integers as they are."""

    def change(graph: Graph) -> None:
        product = graph.product(weight).producer()
        inner = product.inputs[0].producer() if product is not None and product.inputs[0] is not None else None
        assert inner is not None
        assert inner.op_type == "MatMulIntegerToFloat"
        scales = inner.inputs[3]
        assert scales is not None
        graph.read(inner, 3, graph.scaled(scales, factor))

    return change


def _int8(
    name: str, stages: str | tuple[str, ...], change: Change, samples: int | None = 2, **rest: Any
) -> list[Fault]:
    samples = None if rest.get("reason") else samples
    return in_graphs(
        name, stages, change, graphs=("tuned",), precision="int8", subject="bundled", samples=samples, **rest
    )


FAULTS: list[Fault] = [
    *_int8("head negated", "back", scaled("transformer.ff_out.weight", -1.0)),
    *_int8("final norm dropped", "back", without_norm("ln_f.weight"), review=True),
    *_int8("projector negated", "vision", features_scaled(-1.0), review=True),
    *_int8("scales of one weight times 2", "back", scale_of_one_product("blocks.4.ff_out.weight", 2.0), samples=8),
    *_int8("feed-forward's residual missing in one layer", "back", without_residual("blocks.5.ff_out.weight")),
    *_int8("keys and values swapped in one layer", "back", swapped("5.k_proj.weight", "5.v_proj.weight")),
    *_int8("rope theta 10000 for 500000", "front", theta(10_000)),
    *_int8("decider mask ignored", "merge", mask_ignored),
    *_int8(
        "decider mask ignored",
        "decide",
        mask_ignored,
        reason="only steps that keep a merged cache use its choice, and only to see whether it changed: it costs time",
    ),
    *_int8("the least important kept", "cached_merge", lowest_kept),
    *_int8("others dropped in the place of merged", "merge", others_dropped),
    *_int8("output token one up", "cached_back", token_one_up),
    *_int8("output logits 20 % large", "back", output_scaled("logits", 1.2)),
    *_int8("output doubt halved", "back", output_scaled("doubt", 0.5)),
]
