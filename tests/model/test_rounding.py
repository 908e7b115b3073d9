"""Inputs rounded to float8 are ONNX's: held against its own QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from d3tom_export.model.rounding import RoundedLinear, round_input, rounded_to_fp8, stop_rounding

SCALE = 0.013


def onnx_rounded(x: np.ndarray, scale: float) -> np.ndarray:
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    constants = [helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]), zero]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["y"]),
    ]
    x_info, y_info = (helper.make_tensor_value_info(name, TensorProto.FLOAT, list(x.shape)) for name in "xy")
    graph = helper.make_graph(nodes, "rounded", [x_info], [y_info], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (y,) = ReferenceEvaluator(model).run(None, {"x": x})
    return np.asarray(y)


def test_rounding_is_that_of_the_graphs() -> None:
    numbers = torch.randn(400, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 400)
    found = rounded_to_fp8(numbers, SCALE)
    assert np.array_equal(found.numpy(), onnx_rounded(numbers.numpy(), SCALE))
    assert found.abs().max() == pytest.approx(448 * SCALE)  # what is larger is held to that
    assert ((found - numbers).abs() <= numbers.abs() / 16 + SCALE * 2**-10)[numbers.abs() < 448 * SCALE].all()


def test_a_number_that_is_none_stays_none() -> None:
    found = rounded_to_fp8(torch.tensor([float("nan"), float("inf"), -float("inf")]), SCALE)
    assert found[0].isnan()
    assert found[1:].tolist() == pytest.approx([448 * SCALE, -448 * SCALE])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_product_rounds_what_it_is_given(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)).to(dtype)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain = model(x)
    round_input(model[0], SCALE)
    assert isinstance(model[0], RoundedLinear)
    assert torch.equal(
        model(x), model[1](nn.functional.linear(rounded_to_fp8(x, SCALE), model[0].weight, model[0].bias))
    )
    assert not torch.equal(model(x), plain)
    assert stop_rounding(model)
    assert torch.equal(model(x), plain)
    assert not stop_rounding(model)
