"""Which of ONNX Runtime's CPU kernels does a piece of a step's work fastest: why the tuned graphs are as they are.

    python -m benchmarks.cpu_kernels [--seconds N] [--json FILE]

Attention, products with weights, and the merge, at the shapes of LaViDa's proportions in small: 1147 rows of an
unmerged step, 240 of a merged one, 64 of a step with a cache. What the tuned graphs use comes first in its group (a
product's transpose is part of ``FusedMatMul`` there; here ONNX Runtime folds it). Kernels of a group take turns.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks.loops import machine
from d3tom_export.backends.onnxruntime_stage import session_options
from d3tom_export.cpu.int8 import quantize_products
from d3tom_export.cpu.merge import BLOCK, inline_merges
from d3tom_export.plugins.merge_op import DOMAIN, OP_TYPE, merge_function
from d3tom_export.process import claim
from d3tom_export.stages.edit import drop_unused

WIDTH, INNER, HEADS = 512, 1536, 8
HEAD = WIDTH // HEADS
OPSET = 23

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Kernel:
    """One way to do a group's work."""

    group: str
    name: str
    model: onnx.ModelProto
    inputs: Arrays
    flops: int
    """Of the work, however the kernel goes about it."""


def _model(body: str, inputs: str, output: str = "float[rows, columns] y", weights: Arrays | None = None) -> Any:
    opsets = f'"": {OPSET}, "com.microsoft": 1, "{DOMAIN}": 1'
    model = onnx.parser.parse_model(f"<ir_version: 10, opset_import: [{opsets}]> g ({inputs}) => ({output}) {{{body}}}")
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in (weights or {}).items())
    return model


def attentions(queries: int, keys: int) -> Iterator[Kernel]:
    """Attention of rows as the projections leave them."""
    rng = np.random.default_rng(0)
    inputs = {
        name: rng.normal(size=(1, rows, WIDTH)).astype(np.float32)
        for name, rows in (("q", queries), ("k", keys), ("v", keys))
    }
    parts = "".join(
        f"{name}p = Reshape({name}, parted) {name}t = Transpose<perm = [{perm}]>({name}p) "
        for name, perm in (("q", "0, 2, 1, 3"), ("k", "0, 2, 3, 1"), ("v", "0, 2, 1, 3"))
    )
    parts += "qs = Mul(qt, scale) scores = MatMul(qs, kt) weights = Softmax(scores) mixed = MatMul(weights, vt) "
    parts += "back = Transpose<perm = [0, 2, 1, 3]>(mixed) y = Reshape(back, joined)"
    constants = {
        "parted": np.array([0, 0, HEADS, HEAD]),
        "joined": np.array([0, 0, WIDTH]),
        "scale": np.float32(HEAD**-0.5),
    }
    for name, body, weights in (
        ("Attention (opset 23)", f"y = Attention<q_num_heads = {HEADS}, kv_num_heads = {HEADS}>(q, k, v)", {}),
        ("MultiHeadAttention", f"y = com.microsoft.MultiHeadAttention<num_heads = {HEADS}>(q, k, v)", {}),
        ("MatMul, Softmax, MatMul", parts, constants),
    ):
        signature = ", ".join(f"float[1, {name}_rows, {WIDTH}] {name}" for name in inputs)
        model = _model(body, signature, f"float[1, q_rows, {WIDTH}] y", {k: np.asarray(v) for k, v in weights.items()})
        yield Kernel(f"attention {queries} x {keys}", name, model, inputs, 4 * queries * keys * WIDTH)


def products(rows: int) -> Iterator[Kernel]:
    """Rows times a weight of the feed-forward."""
    rng = np.random.default_rng(0)
    inputs = {"x": rng.normal(size=(rows, WIDTH)).astype(np.float32)}
    weight = rng.normal(size=(INNER, WIDTH), scale=WIDTH**-0.5).astype(np.float32)
    signature, group, flops = f"float[rows, {WIDTH}] x", f"product {rows} x {WIDTH} x {INNER}", 2 * rows * WIDTH * INNER
    plain = _model("wt = Transpose<perm = [1, 0]>(w) y = MatMul(x, wt)", signature, weights={"w": weight})
    yield Kernel(group, "float32: MatMul", plain, inputs, flops)
    quantized = ir.from_proto(plain)
    assert isinstance(quantized, ir.Model)
    quantize_products(quantized)
    drop_unused(quantized)
    yield Kernel(group, "int8 by row and column: MatMulIntegerToFloat", ir.to_proto(quantized), inputs, flops)
    scale = np.abs(weight).max(axis=1) / 127
    levels = np.rint(weight / scale[:, None]).astype(np.int8)
    dynamic = _model(
        "y = com.microsoft.DynamicQuantizeMatMul(x, w, s)",
        signature,
        weights={"w": levels.T.copy(), "s": scale.astype(np.float32)},
    )
    yield Kernel(group, "int8, one scale for all rows: DynamicQuantizeMatMul", dynamic, inputs, flops)
    block = 32
    blocks = weight.reshape(INNER, -1, block)
    block_scale = np.maximum(np.abs(blocks).max(axis=2) / 127, 1e-30)
    packed = (np.rint(blocks / block_scale[..., None]) + 128).astype(np.uint8)
    attributes = f"K = {WIDTH}, N = {INNER}, bits = 8, block_size = {block}, accuracy_level = 4"
    nbits = _model(
        f"y = com.microsoft.MatMulNBits<{attributes}>(x, w, s)",
        signature,
        weights={"w": packed, "s": block_scale.astype(np.float32).ravel()},
    )
    yield Kernel(group, f"int8 by blocks of {block}: MatMulNBits", nbits, inputs, flops)


_ADDING = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{op_type} (hidden, kept_column, target, last) => (merged)
{{
    target_column = Unsqueeze (target, last)
    everywhere = Shape (hidden)
    place = Expand (target_column, everywhere)
    first = GatherND <batch_dims = 1> (hidden, kept_column)
    nothing = Sub (first, first)
    merged = ScatterElements <axis = 1, reduction = "add"> (nothing, place, hidden)
}}
"""


def scattering() -> onnx.FunctionProto:
    """The standard body up to the tokens' targets, its sums as a ScatterElements that adds."""
    function = merge_function(OPSET)
    upto = next(index for index, node in enumerate(function.node) if "target" in node.output)
    del function.node[upto + 1 :]
    adding = onnx.parser.parse_function(_ADDING.format(domain=DOMAIN, op_type=OP_TYPE, opset=OPSET))
    function.node.extend(adding.node)
    return function


def merges(rows: int, kept: int, width: int, compared: int) -> Iterator[Kernel]:
    """The merge node: who joins whom, and the sums."""
    rng = np.random.default_rng(0)
    inputs = {
        "hidden": rng.normal(size=(1, rows, width)).astype(np.float32),
        "normed": rng.normal(size=(1, rows, compared)).astype(np.float32),
        "kept": np.sort(rng.choice(rows, (1, kept), replace=False)),
    }
    signature = f"float[B, V, {width}] hidden, float[B, V, {compared}] normed, int64[B, K] kept"

    def node(function: onnx.FunctionProto) -> onnx.ModelProto:
        model: onnx.ModelProto = _model(
            f"y = {DOMAIN}.{OP_TYPE}(hidden, normed, kept)", signature, f"float[B, K, {width}] y"
        )
        model.functions.append(function)
        return model

    group, flops = f"merge of {rows} x {width} onto {kept}", 2 * rows * kept * compared
    for block in (BLOCK, 8, 32, 64):
        blocked = ir.from_proto(node(merge_function(OPSET)))
        assert isinstance(blocked, ir.Model)
        inline_merges(blocked, block)
        yield Kernel(group, f"sums in sorted blocks of {block}", ir.to_proto(blocked), inputs, flops)
    yield Kernel(
        group, "product with the 0/1 assignment (the standard graph)", node(merge_function(OPSET)), inputs, flops
    )
    yield Kernel(group, "ScatterElements that adds", node(scattering()), inputs, flops)


def kernels() -> Iterator[Kernel]:
    """Everything that is compared."""
    for queries, keys in ((1147, 1147), (240, 240), (64, 1147)):
        yield from attentions(queries, keys)
    for rows in (1147, 240, 64):
        yield from products(rows)
    yield from merges(1008, 100, WIDTH, WIDTH)  # without a cache: rows of the residual stream
    yield from merges(1083, 175, WIDTH, HEAD)  # with one: keys or values of a layer, compared by their mean over heads


def measure(found: Sequence[Kernel], seconds: float) -> list[dict[str, Any]]:
    """Median milliseconds of each; kernels of a group take turns for about ``seconds`` each, on the group's inputs."""
    rows = []
    for group in dict.fromkeys(kernel.group for kernel in found):
        members = [kernel for kernel in found if kernel.group == group]
        calls: list[Callable[[], Any]] = []
        for kernel in members:
            session = ort.InferenceSession(
                kernel.model.SerializeToString(), session_options("cpu"), providers=["CPUExecutionProvider"]
            )
            calls.append(lambda session=session, inputs=kernel.inputs: session.run(None, inputs)[0])
        answers = [call() for call in calls]
        times: list[list[float]] = [[] for _ in calls]
        while sum(map(sum, times)) < seconds * len(calls) or len(times[0]) < 3:
            for call, taken in zip(calls, times, strict=True):
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
        for kernel, taken, answer in zip(members, times, answers, strict=True):
            median = statistics.median(taken)
            scale = float(np.abs(answers[0]).max())
            rows.append(
                {
                    "group": group,
                    "kernel": kernel.name,
                    "ms": round(1000 * median, 3),
                    "gflop_per_second": round(kernel.flops / median / 1e9, 1),
                    "over_first": round(median / statistics.median(times[0]), 3),
                    "difference": float(np.abs(answer - answers[0]).max()) / scale,
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown. GFLOP/s of a merge would count the search alone, so there are none."""
    lines = ["| work | kernel | ms | GFLOP/s | time over the first | difference |", "| --- " * 6 + "|"]
    for row in rows:
        rate = "" if row["group"].startswith("merge") else f"{row['gflop_per_second']:.0f}"
        lines.append(
            f"| {row['group']} | {row['kernel']} | {row['ms']:.2f} | {rate} | {row['over_first']:.2f} | "
            f"{row['difference']:.0e} |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--seconds", default=1.0, show_default=True, help="For each kernel.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(seconds: float, json_file: Path | None) -> None:
    """Measure and print a Markdown table."""
    rows = measure(list(kernels()), seconds)
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n", encoding="utf-8")
    click.echo(table(rows))


if __name__ == "__main__":
    claim()
    main()
