"""Cached stages cut as engines have them, on ONNX Runtime: the same numbers, and a prompt through the same graphs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from d3tom_export.bundle.folder import Bundle
from d3tom_export.bundle.manifest import stage_file
from d3tom_export.config import MergeConfig
from d3tom_export.engines.graph import engine_graph
from d3tom_export.engines.rewrite import rewrite_stage
from d3tom_export.engines.shapes import Range, axis_ranges, default_shapes
from d3tom_export.engines.stages import PROMPT_SIZES, engine_stages, served_sizes, stage_profiles
from d3tom_export.errors import D3tomError

BATCH, PROMPT, ANSWER, VISUAL, KEPT = 2, 37, 5, 23, 6
Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def stages(bundle: Bundle) -> dict[str, Any]:
    return engine_stages(bundle.manifest.stages, bundle.config, bundle.manifest.merge)


@pytest.fixture(scope="module")
def engines(bundle: Bundle, stages: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cached loop's float32 graphs as engines have them, beside their weights."""
    folder = tmp_path_factory.mktemp("rewritten")
    for path in bundle.folder.glob("*.safetensors"):
        shutil.copy(path, folder)  # the checker wants no links
    for key, spec in stages.items():
        if spec.loop == "cached":
            graph = engine_graph(bundle.folder / stage_file(key), spec, "fp32", "onnx")
            (folder / stage_file(key)).write_bytes(graph.model)
            onnx.checker.check_model(str(folder / stage_file(key)))
    return folder


def _run(path: Path, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    inputs = {tensor.name: feeds[tensor.name] for tensor in session.get_inputs()}
    return dict(zip(names, session.run(names, inputs), strict=True))


def _random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


@pytest.fixture(scope="module")
def prompt(bundle: Bundle) -> Arrays:
    """A prompt and what `prefill` makes of it."""
    embeddings = _random(BATCH, PROMPT, bundle.config.language.d_model)
    given = {"prompt_embeddings": embeddings, "visual_positions": np.arange(4, 4 + VISUAL)}
    return given | _run(bundle.folder / "prefill.onnx", given)


def test_a_prompt_runs_through_the_steps_engines_over_an_empty_cache(
    bundle: Bundle, engines: Path, prompt: Arrays
) -> None:
    language, layer = bundle.config.language, bundle.manifest.merge.layer
    empty = np.zeros((BATCH, language.n_kv_heads, 0, language.head_size), dtype=np.float32)
    feeds: Arrays = {"answer_embeddings": prompt["prompt_embeddings"], "visual_positions": prompt["visual_positions"]}
    for index in range(language.n_layers):
        kind = "merged" if index > layer else "attention"
        feeds |= {f"{kind}_keys_{index}": empty, f"{kind}_values_{index}": empty}
    feeds |= {"deciders": np.zeros((BATCH, PROMPT), dtype=np.bool_), "keep": np.array([PROMPT_SIZES["K"]])}
    feeds["answer_length"] = np.array([PROMPT_SIZES["G"]])
    found: Arrays = {}
    for key in ("cached_front", "decide", "cached_back"):
        found |= _run(engines / stage_file(key), feeds | found)
    for index in range(language.n_layers):
        for name in (f"keys_{index}", f"values_{index}"):
            np.testing.assert_allclose(found[name], prompt[name], rtol=0, atol=1e-5)
    assert found["logits"].shape[1] == 1  # no vocabulary of numbers for each of the prompt's rows


def test_steps_are_the_standard_graphs(bundle: Bundle, engines: Path, prompt: Arrays) -> None:
    language, layer = bundle.config.language, bundle.manifest.merge.layer
    feeds = dict(prompt)
    for index in range(language.n_layers):
        rotated = _run(bundle.folder / "rotate.onnx", {name: prompt[f"{name}_{index}"] for name in ("keys", "values")})
        feeds |= {f"{name}_{index}": array for name, array in rotated.items()}
    deciders = np.zeros((BATCH, ANSWER), dtype=np.bool_)
    deciders[0, 1] = deciders[1, 0] = deciders[1, 4] = True
    feeds |= {"deciders": deciders, "keep": np.array([KEPT]), "answer_length": np.array([ANSWER])}
    feeds["answer_embeddings"] = _random(BATCH, ANSWER, language.d_model)

    def step(folder: Path, *keys: str) -> Arrays:
        known = dict(feeds)
        for key in keys:
            known |= _run(folder / stage_file(key), known)
        return known

    expected = step(bundle.folder, "cached_front", "cached_merge", "cached_back")
    found = step(engines, "cached_front", "decide", "cached_merge", "cached_back")
    np.testing.assert_array_equal(found["kept"], expected["kept"])
    np.testing.assert_array_equal(found["token"], expected["token"])
    later = [f"merged_{name}_{index}" for index in range(layer + 1, language.n_layers) for name in ("keys", "values")]
    for name in ("hidden", "merged", "logits", "doubt", *later):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    kept_rows = PROMPT - VISUAL + KEPT
    assert found[later[0]].shape == (BATCH, language.n_kv_heads, kept_rows, language.head_size)


def test_no_graph_multiplies_the_cache_in_parts_or_bakes_a_size_in(stages: dict[str, Any], engines: Path) -> None:
    for key, spec in stages.items():
        if spec.loop != "cached":
            continue
        graph = onnx.load(engines / stage_file(key), load_external_data=False).graph
        for values, tensors in ((graph.input, spec.inputs), (graph.output, spec.outputs)):
            shapes = [tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values]
            assert shapes == [tensor.axes for tensor in tensors], key
        softmaxes = sum(node.op_type == "Softmax" for node in graph.node)
        joins = sum(
            node.op_type == "Concat" and node.attribute[0].i == 3 and len(node.input) == 2 for node in graph.node
        )
        attentions = sum("attention_keys" in t.name or "merged_keys" in t.name for t in spec.inputs)
        assert softmaxes == attentions + (key == "decide")  # its scores have one of their own
        assert joins >= attentions


def test_profiles_of_a_step_and_of_a_prompt(bundle: Bundle, stages: dict[str, Any]) -> None:
    manifest = bundle.manifest
    shapes = default_shapes(bundle.config, manifest.generation)
    axes = axis_ranges(shapes, manifest.merge, manifest.generation, kv_cache=True)
    step, prompt = stage_profiles(stages["cached_back"], axes)
    language = bundle.config.language
    width, last = language.d_model, language.n_layers - 1
    assert step["merged"] == tuple((1, size, width) for size in axes["G"])
    assert prompt["merged"] == tuple((1, size, width) for size in axes["P"])
    assert prompt[f"merged_keys_{last}"] == ((1, language.n_kv_heads, 0, language.head_size),) * 3
    assert (step["answer_length"], prompt["answer_length"]) == (tuple((size,) for size in axes["G"]), ((1,),) * 3)
    assert len(stage_profiles(stages["cached_merge"], axes)) == len(stage_profiles(stages["merge"], axes)) == 1


def test_a_graph_that_is_not_made_as_expected_is_refused(bundle: Bundle, stages: dict[str, Any]) -> None:
    model = ir.load(bundle.folder / "cached_back.onnx")
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    softmax.op_type = "LogSoftmax"
    with pytest.raises(D3tomError, match="cannot be made an engine's"):
        rewrite_stage(model, stages["cached_back"])


def test_profiles_of_a_prompt_that_may_become_short(prefill_bundle: Bundle) -> None:
    """Behind l* the prompt's profile reaches down to the fewest rows that a merge leaves, and so does `rotate`'s."""
    manifest = prefill_bundle.manifest
    stages = engine_stages(manifest.stages, prefill_bundle.config, manifest.merge)
    assert {"prompt_front", "prompt_back", "prefill"}.isdisjoint(stages)
    assert stages["prompt_merge"] == manifest.stages["prompt_merge"]
    shapes = replace(
        default_shapes(prefill_bundle.config, manifest.generation),
        visual_tokens=Range(50, 100, 400),
        text_tokens=Range(5, 30, 60),
    )
    axes = axis_ranges(shapes, manifest.merge, manifest.generation, kv_cache=True)
    assert (axes["P"], axes["C"]) == (Range(55, 130, 460), Range(6, 60, 460))
    width = prefill_bundle.config.language.d_model
    rows = {key: stage_profiles(stages[key], axes)[-1] for key in ("cached_front", "decide", "cached_back", "rotate")}
    assert rows["cached_front"]["answer_embeddings"] == tuple((1, size, width) for size in (55, 130, 460))
    assert rows["decide"]["hidden"] == tuple((1, size, width) for size in (55, 130, 460))
    assert rows["cached_back"]["merged"] == tuple((1, size, width) for size in (6, 60, 460))
    assert rows["rotate"]["keys"] == tuple((1, size, 2, 8) for size in (6, 130, 460))
    (merging,) = stage_profiles(stages["prompt_merge"], axes)
    assert merging["kept"] == tuple((1, size) for size in (1, 30, 400))
    assert "C" in served_sizes(stages["rotate"], axes)
    # As ever, where the loop merges at its steps.
    at_steps = axis_ranges(shapes, MergeConfig(1, 0.7), manifest.generation, kv_cache=True)
    assert stage_profiles(stages["rotate"], at_steps)[0]["keys"][0] == (1, 55, 2, 8)
    assert stage_profiles(stages["cached_back"], at_steps)[1]["merged"][0] == (1, 55, width)
    assert served_sizes(stages["rotate"], at_steps).keys() == {"B", "P"}
