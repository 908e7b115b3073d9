"""Stages run alone on ONNX Runtime, which is what diagnosis asks of a backend."""

from __future__ import annotations

import numpy as np
import pytest

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import Loop
from d3tom_export.errors import D3tomError
from d3tom_export.loop.backend import StageRunner
from d3tom_export.model.lavida import Lavida


@pytest.mark.parametrize("loop", ["uncached", "cached"])
def test_every_stage_of_a_loop_runs_by_its_contract(loop: Loop, bundle: Bundle) -> None:
    """Arrays of the contract's shapes in, arrays of its shapes and dtypes out; the inputs stay as they were."""
    backend = OnnxRuntimeBackend(bundle, loop, device="cpu")
    assert isinstance(backend, StageRunner)
    assert backend.precision == "fp32"
    sizes = {"B": 2, "P": 21, "G": 5, "L": 26, "V": 9, "K": 4, "M": 21, "C": 16, "S": 7, "views": 3}
    rng = np.random.default_rng(0)
    for name in bundle.stages(loop):
        spec = next(s for s in bundle.manifest.stages.values() if s.name == name and s.loop in (None, loop))
        inputs = {}
        for tensor in spec.inputs:
            shape = [sizes[axis] if isinstance(axis, str) else axis for axis in tensor.axes]
            fixed = {"visual_positions": np.arange(4, 13), "keep": np.array([4]), "answer_length": np.array([5])}
            inputs[tensor.name] = fixed.get(tensor.name, rng.integers(0, 2, shape).astype(tensor.dtype))
        before = {key: value.copy() for key, value in inputs.items()}
        found = backend.run_stage(name, inputs, [tensor.name for tensor in spec.outputs])
        assert list(found) == [tensor.name for tensor in spec.outputs]
        for tensor in spec.outputs:
            array = found[tensor.name]
            assert array.dtype == tensor.dtype
            assert array.shape == tuple(sizes[axis] if isinstance(axis, str) else axis for axis in tensor.axes), name
        assert all(np.array_equal(inputs[key], before[key]) for key in inputs)
        first = spec.outputs[-1].name
        again = backend.run_stage(name, inputs, [first])
        assert list(again) == [first]
        assert np.array_equal(again[first], found[first])


def test_what_the_runtime_refuses_is_an_error_with_the_stages_name(ort_backend: OnnxRuntimeBackend) -> None:
    with pytest.raises(D3tomError, match="ONNX Runtime cannot run stage embed"):
        ort_backend.run_stage("embed", {"token_ids": np.arange(3)}, ["embeddings"])


def test_the_oracle_has_no_stages(eager_model: Lavida, bundle: Bundle) -> None:
    assert not isinstance(PyTorchBackend(eager_model, bundle.manifest.merge), StageRunner)
