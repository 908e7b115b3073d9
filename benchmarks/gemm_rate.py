"""What this machine's matrix products reach: the ceiling of every loop, which is little else.

Products of the shapes that dominate a step, (M, 512) x (512, 1536) and (M, 1536) x (1536, 512), in a chain with
constant weights. M = 64 are the rows of a cached step at LaViDa's proportions, 240 those of a merged
step at its mean ratio, 1147 those of an unmerged one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

from d3tom_export.backends.onnxruntime_stage import session_options

WIDTH, INNER, PAIRS = 512, 1536, 4
ROWS = (64, 240, 1147)


def chain_flops(rows: int) -> int:
    """FLOPs of one pass of ``rows`` rows through the chain."""
    return PAIRS * 4 * rows * WIDTH * INNER


def _rate(work: Callable[[], object], flops: int, seconds: float) -> float:
    """FLOP/s of ``work``, the median of its calls over about ``seconds``."""
    work()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return flops / statistics.median(times)


def _weights() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = [(WIDTH, INNER), (INNER, WIDTH)] * PAIRS
    return [generator.normal(size=shape, scale=shape[0] ** -0.5).astype(np.float32) for shape in shapes]


def torch_rate(rows: int, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of PyTorch's products in ``dtype``."""
    x = torch.randn(rows, WIDTH).to(dtype)
    weights = [torch.from_numpy(weight.T.copy()).to(dtype) for weight in _weights()]

    def work() -> None:
        y = x
        for weight in weights:
            y = torch.nn.functional.linear(y, weight)

    with torch.inference_mode():
        return _rate(work, chain_flops(rows), seconds)


def onnxruntime_rate(rows: int, seconds: float = 0.3) -> float:
    """FLOP/s of ONNX Runtime's products in float32."""
    weights = [numpy_helper.from_array(weight, f"w{index}") for index, weight in enumerate(_weights())]
    nodes = [helper.make_node("MatMul", [f"x{index}", f"w{index}"], [f"x{index + 1}"]) for index in range(len(weights))]
    shape: list[str | int | None] = ["rows", WIDTH]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"x{len(weights)}", TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(
        model.SerializeToString(), session_options("cpu"), providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(1).normal(size=(rows, WIDTH)).astype(np.float32)
    return _rate(lambda: session.run(None, {"x0": x}), chain_flops(rows), seconds)


def measured(rows: Sequence[int] = ROWS, seconds: float = 0.3) -> dict[str, dict[int, float]]:
    """GFLOP/s by runtime and M, rounded."""
    rates: dict[str, Callable[[int], float]] = {
        "PyTorch float32": lambda count: torch_rate(count, torch.float32, seconds),
        "PyTorch bfloat16": lambda count: torch_rate(count, torch.bfloat16, seconds),
        "ONNX Runtime float32": lambda count: onnxruntime_rate(count, seconds),
    }
    return {name: {count: round(rate(count) / 1e9, 1) for count in rows} for name, rate in rates.items()}


def table(rates: dict[str, dict[int, float]]) -> str:
    """The rates in Markdown."""
    rows = list(next(iter(rates.values())))
    lines = ["| matrix products, GFLOP/s | " + " | ".join(f"M = {count}" for count in rows) + " |"]
    lines.append("| --- " * (len(rows) + 1) + "|")
    for name, values in rates.items():
        lines.append(f"| {name} | " + " | ".join(f"{rate:.0f}" for rate in values.values()) + " |")
    return "\n".join(lines)
