"""The plugin in engines built by TensorRT-RTX, and its enqueue on the CPU through the very argument block."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from d3tom_export.engines.toolkit import load_toolkit
from d3tom_export.errors import D3tomError
from d3tom_export.plugins import merge_plugin
from d3tom_export.plugins.compiled import compile_kernels
from d3tom_export.plugins.launch import DTYPES, MergeSizes, launches, variants
from d3tom_export.plugins.merge_plugin import PLUGIN_NAMESPACE, plugin_classes, plugin_identity, register_merge_plugin
from tests.plugins.engines import build, kernels_in, merge_model


@pytest.fixture(scope="module")
def trt() -> Any:
    """TensorRT-RTX, which builds without a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX, the one that builds without a GPU, is not installed here")
    pytest.importorskip("triton", reason="the kernels are compiled by Triton, which is not installed here")
    return load_toolkit("tensorrt-rtx").trt


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sms", [(89,), (120,), (89, 120)], ids=str)
def test_the_node_becomes_the_plugin_and_builds(trt: Any, sms: tuple[int, ...], dtype: str) -> None:
    register_merge_plugin(trt, sms)
    layers, plan = build(trt, merge_model(dtype, PLUGIN_NAMESPACE), sms)
    assert layers == ["PLUGIN_V3"]
    assert plan is not None
    held = kernels_in(plan)
    assert {(kernel.sm, kernel.variant) for kernel in held} == {
        (sm, variant) for sm in sms for variant in variants(dtype, 48, 64)
    }
    assert set(held) == set(compile_kernels(dtype, sms, 48, 64))


def test_a_ragged_width_brings_ragged_kernels(trt: Any) -> None:
    register_merge_plugin(trt, 89)
    _, plan = build(trt, merge_model("float16", PLUGIN_NAMESPACE, width=50), [89])
    assert plan is not None
    names = [kernel.variant.name for kernel in kernels_in(plan)]
    assert names == ["nearest-narrow", "nearest-wide", "order", "sum-ragged"]


def test_several_row_inputs_are_one_node(trt: Any, capfd: pytest.CaptureFixture[str]) -> None:
    register_merge_plugin(trt, 89)
    layers, plan = build(trt, merge_model("float16", PLUGIN_NAMESPACE, further=(50, 1)), [89])
    assert layers == ["PLUGIN_V3"]
    assert plan is not None
    assert set(kernels_in(plan)) == set(compile_kernels("float16", (89,), 48, 64, 50, 1))
    layers, plan = build(trt, merge_model("float16", None, further=(50, 1)), [89])
    assert "PLUGIN_V3" not in layers
    assert plan is not None
    assert "Attribute" not in capfd.readouterr().err  # the parser knows `rows`

    model = onnx.load_from_string(merge_model("float16", PLUGIN_NAMESPACE, further=(50,)))
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("plugin_namespace", PLUGIN_NAMESPACE))
    with pytest.raises(AssertionError):  # it does not parse
        build(trt, model.SerializeToString(), [89])
    assert "of 1 row inputs (its attribute `rows`) takes 3 inputs" in capfd.readouterr().err


@pytest.mark.parametrize("namespace", [None, "elsewhere"])
def test_without_the_attribute_the_body_is_inlined(trt: Any, namespace: str | None) -> None:
    register_merge_plugin(trt, 89)
    layers, plan = build(trt, merge_model("float16", namespace), [89])
    assert "PLUGIN_V3" not in layers
    assert "MATRIX_MULTIPLY" in layers
    assert plan is not None


def test_mixed_types_do_not_build(trt: Any, capfd: pytest.CaptureFixture[str]) -> None:
    register_merge_plugin(trt, 89)
    # The operator's schema has one type for both; a graph that is not checked could still mix them.
    mixed = merge_model("float32", PLUGIN_NAMESPACE, normed_dtype="float16")
    layers, plan = build(trt, mixed, [89])
    assert layers == ["PLUGIN_V3"]
    assert plan is None


def test_registering_again_only_re_targets(trt: Any) -> None:
    creator = register_merge_plugin(trt, 89)
    assert register_merge_plugin(trt, (120, 89, 120)) is creator
    assert creator.sms == (120, 89)
    assert register_merge_plugin(trt) is creator
    assert creator.sms == (120, 89)
    found = trt.get_plugin_registry().get_creator("D3ToMMerge", "1", "d3tom_export")
    assert found is not None
    with pytest.raises(D3tomError, match="found 75"):
        register_merge_plugin(trt, 75)


def test_the_workspace_is_that_of_the_largest_merge(trt: Any) -> None:
    from types import SimpleNamespace

    plugin = plugin_classes(trt)().create_plugin("merge", trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD)
    shapes = [(2, 300, 64), (2, 300, 48), (2, 200)]
    size = plugin.get_workspace_size([SimpleNamespace(max=shape) for shape in shapes], None)
    sizes = MergeSizes(2, 300, 200, 48, 64)
    blocks = launches(sizes, "float16")[0].grid[1]
    assert size >= 2 * 4 * 2 * 300 * blocks + 4 * 2 * 300 + 4 * 2 * 200


def test_identity_covers_every_module_the_plugin_is_made_of() -> None:
    folder = Path(merge_plugin.__file__).parent
    reached, found = ["merge_plugin"], {"merge_plugin"}
    while reached:
        for node in ast.walk(ast.parse((folder / f"{reached.pop()}.py").read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("d3tom_export.plugins"):
                continue
            names = [alias.name for alias in node.names] if node.module == "d3tom_export.plugins" else []
            for name in names or [str(node.module).rsplit(".", 1)[1]]:
                if name not in found:
                    found.add(name)
                    reached.append(name)
    assert {f"{name}.py" for name in found - {"merge_op"}} == set(merge_plugin._SOURCES)
    assert len(plugin_identity()) == 64


def test_neither_triton_nor_torch_is_needed_to_load_an_engine(trt: Any) -> None:
    code = (
        "import sys; sys.modules['triton'] = sys.modules['torch'] = None\n"
        "from d3tom_export.engines.toolkit import load_toolkit\n"
        "from d3tom_export.plugins.merge_plugin import register_merge_plugin\n"
        "trt = load_toolkit('tensorrt-rtx').trt\n"
        "creator = register_merge_plugin(trt)\n"
        "assert trt.get_plugin_registry().get_creator('D3ToMMerge', '1', 'd3tom_export') is not None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
