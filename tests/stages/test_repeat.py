"""Repeated layers: a graph of few traced layers, made longer, is the graph of all of them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from d3tom_export.checkpoint.folder import Checkpoint, open_checkpoint
from d3tom_export.checkpoint.models import hollow_model, load_model
from d3tom_export.checkpoint.stored import stored_tensors
from d3tom_export.config import LOOPS, MergeConfig
from d3tom_export.diagnosis.graph import MODULE_SCOPES
from d3tom_export.stages import export, repeat
from d3tom_export.stages.contract import StageSpec, TensorSpec, stage_specs
from d3tom_export.stages.cut import stage_modules
from d3tom_export.stages.export import Weights, export_stage
from d3tom_export.stages.repeat import few_layers
from tests.conftest import raw_config, write_checkpoint

MERGE = MergeConfig(layer=0, ratio=0.7)
SIZES = {"B": 2, "P": 23, "G": 6, "L": 29, "V": 9, "K": 4, "M": 24, "C": 18, "S": 5, "views": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Eight layers, seven of a tower's eight in use; every second role's tensors are stored in bfloat16."""
    raw = raw_config(n_layers=8)
    raw["vision_config"] = raw["vision_config"] | {"num_hidden_layers": 8}
    folder = write_checkpoint(tmp_path_factory.mktemp("deep"), raw, shards=1)
    state = load_file(folder / "model.safetensors")
    role = {name: re.sub(r"\.\d+\.", ".", name) for name in state}
    half = set(sorted(set(role.values()))[::2])
    stored = {name: weight.bfloat16() if role[name] in half else weight for name, weight in state.items()}
    save_file(stored, folder / "model.safetensors")
    return open_checkpoint(folder)


def _weights(checkpoint: Checkpoint, model: nn.Module) -> Weights:
    stored = stored_tensors(checkpoint.folder)
    return {id(parameter): (name, stored[name]) for name, parameter in model.named_parameters()}


def _inputs(stage: StageSpec) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    given = {
        "visual_positions": np.arange(3, 3 + SIZES["V"]),
        "keep": np.array([SIZES["K"]]),
        "answer_length": np.array([SIZES["G"]]),
        "deciders": rng.random((SIZES["B"], SIZES["G"])) < 0.5,
    }
    shapes = {spec.name: [SIZES[a] if isinstance(a, str) else a for a in spec.axes] for spec in stage.inputs}
    return {name: given.get(name, rng.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[StageSpec]:
    """The stages that are traced from now on."""
    traced = []

    def trace(stage: StageSpec, module: nn.Module, _trace: Any = export._trace) -> Any:
        traced.append(stage)
        return _trace(stage, module)

    monkeypatch.setattr(export, "_trace", trace)
    return traced


def _scopes(model: onnx.ModelProto) -> Counter[str]:
    """The modules that multiply matrices."""
    notes = (entry for node in model.graph.node if node.op_type == "MatMul" for entry in node.metadata_props)
    return Counter(entry.value.rsplit(",", 1)[0] for entry in notes if entry.key == MODULE_SCOPES)


@pytest.mark.parametrize(
    "key",
    [
        "vision",
        *(
            pytest.param(key, marks=pytest.mark.slow)
            for key in ("back", "prefill", "extend", "cached_merge", "cached_back")
        ),
    ],
)
def test_repeated_layers_are_those_traced_whole(
    checkpoint: Checkpoint, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hollow_model(checkpoint)
    stage = stage_specs(checkpoint.config, MERGE, 8, LOOPS, True)[key]
    module = stage_modules(model, MERGE, LOOPS, True)[key]
    paths = {}
    for kind in ("repeated", "whole"):
        (tmp_path / kind).mkdir()
        for file in checkpoint.folder.glob("*.safetensors"):
            (tmp_path / kind / file.name).hardlink_to(file)
        paths[kind] = tmp_path / kind / f"{key}.onnx"
    traced = _counted(monkeypatch)
    found = {"repeated": export_stage(stage, module, paths["repeated"], _weights(checkpoint, model))}
    assert len(traced) == 1  # none was traced whole in the end
    monkeypatch.setattr(repeat, "TRACED_LAYERS", 99)
    found["whole"] = export_stage(stage, module, paths["whole"], _weights(checkpoint, model))
    assert sorted(found["repeated"]) == sorted(found["whole"])

    graphs = {kind: onnx.load(path, load_external_data=False) for kind, path in paths.items()}
    operators = {kind: Counter(node.op_type for node in graph.graph.node) for kind, graph in graphs.items()}
    for operator in ("MatMul", "Softmax", "D3ToMMerge", "Sigmoid", "Cast", "ReduceMean"):
        assert operators["repeated"][operator] == operators["whole"][operator]
    assert _scopes(graphs["repeated"]) == _scopes(graphs["whole"])
    names = [output for node in graphs["repeated"].graph.node for output in node.output]
    assert len(names) == len(set(names))

    results = {}
    for kind, path in paths.items():
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        results[kind] = session.run(None, _inputs(stage))
    for one, other, spec in zip(results["repeated"], results["whole"], stage.outputs, strict=True):
        assert one.shape == tuple(SIZES[axis] if isinstance(axis, str) else axis for axis in spec.axes)
        np.testing.assert_array_equal(one, other)


class _Layer(nn.Module):
    def __init__(self, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.project, self.activation = nn.Linear(width, width), activation

    def forward(self, x: Tensor) -> Tensor:
        return x + self.activation(self.project(x))


class _Stack(nn.Module):
    """Layers of one width, with the activations given."""

    LAYERS = "layers"

    def __init__(self, *activations: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(4, activation) for activation in activations)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Skipping(_Stack):
    """As above, with what the third layer gives added at the end."""

    def forward(self, x: Tensor) -> Tensor:
        third = x
        for place, layer in enumerate(self.layers):
            x = layer(x)
            third = x if place == 2 else third
        return x + third


def _saved(module: nn.Module, folder: Path, dtypes: dict[str, torch.dtype]) -> Weights:
    save_file({n: p.detach().to(dtypes.get(n)) for n, p in module.named_parameters()}, folder / "model.safetensors")
    stored = stored_tensors(folder)
    return {id(parameter): (name, stored[name]) for name, parameter in module.named_parameters()}


STACK = StageSpec("stack", (TensorSpec("x", "float32", ("S", 4)),), (TensorSpec("y", "float32", ("S", 4)),))


@pytest.mark.parametrize(
    ("module", "dtypes", "traces"),
    [
        (_Stack(*[nn.Tanh()] * 8), {}, 1),
        (_Stack(*[nn.Tanh()] * 6), {}, 1),
        (_Stack(*[nn.Tanh()] * 5), {}, 1),  # few enough
        (_Stack(*[nn.Tanh()] * 7, nn.Sigmoid()), {}, 1),  # the last may differ
        (_Stack(nn.Sigmoid(), *[nn.Tanh()] * 7), {}, 1),  # so may the first
        (_Stack(*[nn.Tanh(), nn.Sigmoid()] * 4), {}, 2),
        (_Skipping(*[nn.Tanh()] * 8), {}, 2),
        (_Stack(*[nn.Tanh()] * 8), {"layers.4.project.weight": torch.bfloat16}, 1),
    ],
)
def test_layers_that_differ_are_traced_whole(
    module: _Stack,
    dtypes: dict[str, torch.dtype],
    traces: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, layers = _saved(module, tmp_path, dtypes), list(module.layers)
    traced = _counted(monkeypatch)
    names = export_stage(STACK, module, tmp_path / "stack.onnx", weights)
    assert len(traced) == traces
    assert sorted(names) == sorted(dict(module.named_parameters()))
    assert list(module.layers) == layers
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name)).float()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    session = ort.InferenceSession(tmp_path / "stack.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], module(x).detach(), atol=1e-6)


def test_layers_that_differ_in_dtype_are_not_left_out(tmp_path: Path) -> None:
    module = _Stack(*[nn.Tanh()] * 8)
    for dtypes, left_out in (({}, True), ({"layers.4.project.weight": torch.bfloat16}, False)):
        with few_layers(STACK, module, "layers", _saved(module, tmp_path, dtypes)) as repetition:
            assert (repetition is not None) == left_out
            assert len(module.layers) == (5 if left_out else 8)
        assert len(module.layers) == 8


def test_a_failed_trace_leaves_the_module_whole(tmp_path: Path) -> None:
    module = _Stack(*[nn.Tanh()] * 8)
    layers = list(module.layers)
    with pytest.raises(RuntimeError), few_layers(STACK, module, "layers", _saved(module, tmp_path, {})):
        raise RuntimeError
    assert list(module.layers) == layers


@pytest.mark.slow
def test_a_stage_whose_layers_read_caches_of_two_sizes_is_traced_whole(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a prompt merged at its prefill: layers behind l* have C rows where those before have P."""
    model, merge = hollow_model(checkpoint), MergeConfig(3, 0.7, merge_at="prefill")
    stage = stage_specs(checkpoint.config, merge, 8, LOOPS, True)["extend"]
    module = stage_modules(model, merge, LOOPS, True)["extend"]
    for file in checkpoint.folder.glob("*.safetensors"):
        (tmp_path / file.name).hardlink_to(file)
    traced = _counted(monkeypatch)
    export_stage(stage, module, tmp_path / "extend.onnx", _weights(checkpoint, model))
    assert [len(each.outputs) for each in traced] == [2 * 8]
    session = ort.InferenceSession(tmp_path / "extend.onnx", providers=["CPUExecutionProvider"])
    inputs = _inputs(stage)
    eager = stage_modules(load_model(checkpoint), merge, LOOPS, True)["extend"]
    wanted = eager(*(torch.from_numpy(array) for array in inputs.values()))
    for one, other in zip(session.run(None, inputs), wanted, strict=True):
        np.testing.assert_allclose(one, other.detach().numpy(), atol=1e-4, rtol=0)
