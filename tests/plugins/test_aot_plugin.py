"""Ahead-of-time plugins: TensorRT's own sources accept them, and their chain is the merge. None was ever executed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from d3tom_export.errors import D3tomError
from d3tom_export.plugins import aot_plugin
from d3tom_export.plugins.aot_plugin import (
    NEAREST,
    ORDER,
    SUM,
    aot_merge_function,
    register_aot_merge,
    without_scratch,
)
from d3tom_export.plugins.compiled import compile_variant, entry
from d3tom_export.plugins.launch import DTYPES, MergeSizes, Variant, row_names, spec, variants
from d3tom_export.plugins.merge_op import DOMAIN, OP_TYPE
from d3tom_export.stages.export import OPSET
from tests.plugins import interpreter
from tests.plugins.interpreter import Interpret, Step
from tests.plugins.tensorrt_shim import DimensionExpr, DynamicPluginTensorDesc, ExprBuilder, shim

pytest.importorskip("triton", reason="the kernels are compiled by Triton, which is not installed here")
# TensorRT's sources hold such escapes in their docstrings.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence")
# The chain's names of the plugins' outputs, but for the sums'.
OUTPUTS = {NEAREST: ["scores", "slots"], ORDER: ["order", "starts"]}


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """TensorRT's Python sources of ``tensorrt.plugin`` over stand-ins for its compiled part."""
    folder = os.environ.get("TENSORRT_BINDINGS_DIR")
    if not folder:
        found = importlib.util.find_spec("tensorrt_bindings")
        folder = found.submodule_search_locations[0] if found and found.submodule_search_locations else None
    if folder is None or not (Path(folder) / "plugin" / "_plugin_class.py").is_file():
        pytest.skip(
            "TensorRT's Python sources are not here: neither TENSORRT_BINDINGS_DIR nor an installed "
            "tensorrt_bindings holds plugin/_plugin_class.py"
        )
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "tensorrt"}
    monkeypatch.setattr(aot_plugin, "_registered", {})
    yield shim(Path(folder) / "plugin")
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt"]:
        del sys.modules[name]
    sys.modules.update(before)


def _nodes(rows: int = 1) -> list[onnx.NodeProto]:
    return list(aot_merge_function(OPSET, rows).node)


def _plan(trt: Any, dtype: str, sizes: MergeSizes, dynamic: bool = True) -> tuple[list[Step], list[str]]:
    """Walks the function body as TensorRT's builder would; the chain at ``sizes``, and every kernel's PTX."""
    dims = dict(zip("BVK", sizes[:3], strict=True))

    def axis(name: str) -> DimensionExpr:
        return DimensionExpr(name) if dynamic else DimensionExpr(dims[name])

    depth = DimensionExpr(sizes.depth)
    row = getattr(trt, dtype)
    names = row_names(len(sizes.widths))
    widths = {hidden: width for (hidden, _), width in zip(names, sizes.widths, strict=True)}
    tensors: dict[str, tuple[Any, list[DimensionExpr]]] = {
        "normed": (row, [axis("B"), axis("V"), depth]),
        "kept": (trt.int64, [axis("B"), axis("K")]),
    }
    tensors |= {name: (row, [axis("B"), axis("V"), DimensionExpr(width)]) for name, width in widths.items()}
    builder, steps, images = ExprBuilder(), [], []
    for node in _nodes(len(names)):
        creator = trt.get_plugin_registry().get_creator(node.op_type, "1", node.domain)
        request = trt.QuickPluginCreationRequest.STRICT_AOT
        plugin = creator.create_plugin(node.op_type, node.domain, [], trt.TensorRTPhase.BUILD, request)
        held = [tensors[name] for name in node.input]
        kinds = plugin.get_output_data_types([kind for kind, _ in held], [len(shape) for _, shape in held])
        shapes = plugin.get_output_shapes([shape for _, shape in held], [], builder)
        assert plugin.num_outputs == len(node.output) == len(shapes)
        outputs = list(zip(kinds, shapes, strict=True))
        in_out = [DynamicPluginTensorDesc(kind, shape) for kind, shape in held + outputs]
        taken = plugin.get_supported_format_combinations(in_out, len(held))
        assert [desc.type for desc in taken] == [kind for kind, _ in held + outputs]
        plugin.set_tactic(0)
        params, setter = SimpleNamespace(), _Setter()
        plugin.get_launch_params([shape for _, shape in held], in_out, len(held), params, setter, builder)
        descs = [desc.desc for desc in in_out]
        name, ptx = plugin.get_kernel(descs[: len(held)], descs[len(held) :])
        images.append(ptx.decode())
        symbol, declared = entry(ptx.decode())
        # Inputs, sizes, outputs, and nothing else: what TensorRT passes is what the kernel declares.
        assert symbol == name
        assert declared == ("u64",) * len(held) + ("u32",) * len(setter.values) + ("u64",) * len(outputs)
        assert all(scalar.dtype.name == "INT32" for scalar in setter.values)
        threads = params.block_x.expr.at(dims)
        assert f".reqntid {threads}" in ptx.decode()
        assert (params.block_y.expr.at(dims), params.block_z.expr.at(dims)) == (1, 1)
        assert 0 <= params.shared_mem.expr.at(dims) <= 48 * 1024

        variant = _variant(node.op_type, dtype, sizes.depth, widths.get(node.input[0], 0))
        assert compile_variant(variant, 89).threads == threads
        assert compile_variant(variant, 89).shared == params.shared_mem.expr.at(dims)
        grid = tuple(getattr(params, f"grid_{axis}").expr.at(dims) for axis in "xyz")
        made = {
            output: (tuple(expr.at(dims) for expr in shape), _torch_type(kind, trt))
            for output, (kind, shape) in zip(OUTPUTS.get(node.op_type, node.output), outputs, strict=True)
        }
        assert list(node.output) == list(made)
        scalars = tuple(scalar.expr.at(dims) for scalar in setter.values)
        steps.append(Step(variant, grid, tuple(node.input), scalars, made))  # type: ignore[arg-type]
        tensors |= dict(zip(node.output, outputs, strict=True))
    return steps, images


class _Setter:
    """The receiver of a plugin's scalar arguments."""

    nbSymExprs = 0  # noqa: N815

    def __init__(self) -> None:
        self.values: list[Any] = []

    def __setitem__(self, index: int, value: Any) -> None:
        assert index == len(self.values) < self.nbSymExprs
        self.values.append(value)


def _torch_type(kind: Any, trt: Any) -> str:
    names = {trt.float32: "float32", trt.float16: "float16", trt.bfloat16: "bfloat16", trt.int32: "int32"}
    return names[kind]


def _variant(plugin: str, dtype: str, depth: int, width: int) -> Variant:
    if plugin == ORDER:
        return Variant("order", "")
    if plugin == NEAREST:
        return Variant("nearest-ragged" if depth % 16 else "nearest-narrow", dtype)
    return Variant("sum-ragged" if width % 16 else "sum", dtype)


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        ("float32", MergeSizes(2, 40, 9, 33, 50)),
        ("float16", MergeSizes(1, 70, 66, 64, 272)),
        ("bfloat16", MergeSizes(3, 33, 1, 16, 16, (16, 1))),
    ],
    ids=str,
)
def test_the_chain_is_the_merge(trt: Any, interpret: Interpret, dtype: str, sizes: MergeSizes, dynamic: bool) -> None:
    register_aot_merge(trt, 89)
    steps, _ = _plan(trt, dtype, sizes, dynamic)
    rng = np.random.default_rng(sizes.visual)
    hidden, *further = (rng.normal(size=(*sizes[:2], width)).astype(np.float32) for width in sizes.widths)
    normed = rng.normal(size=(sizes.batch, sizes.visual, sizes.depth)).astype(np.float32)
    kept = np.stack([np.sort(rng.permutation(sizes.visual)[: sizes.kept]) for _ in range(sizes.batch)])
    merged = interpret(interpreter.chain, steps, hidden, normed, kept, dtype, *further)
    assert [array.shape for array in merged] == [(sizes.batch, sizes.kept, width) for width in sizes.widths]
    # Proven against the oracle elsewhere.
    expected = interpret(interpreter.merge, hidden, normed, kept, dtype, False, *further)
    for found, right in zip(merged, (expected.merged, *expected.further), strict=True):
        np.testing.assert_array_equal(found, right)


def test_registering_again_only_re_targets(trt: Any) -> None:
    register_aot_merge(trt, 89)
    _, ada = _plan(trt, "float16", MergeSizes(1, 64, 8, 64, 64))
    register_aot_merge(trt, 120)
    _, blackwell = _plan(trt, "float16", MergeSizes(1, 64, 8, 64, 64))
    assert all(".target sm_89" in ptx for ptx in ada)
    assert all(".target sm_120" in ptx for ptx in blackwell)


def test_other_rows_are_refused(trt: Any) -> None:
    register_aot_merge(trt, 89)
    with pytest.raises(D3tomError, match="float32, float16 or bfloat16"):
        _plan(trt, "int32", MergeSizes(1, 8, 2, 16, 16))


def test_a_toolkit_without_them_says_so() -> None:
    rtx = SimpleNamespace(__name__="tensorrt_rtx", __version__="1.7")
    with pytest.raises(D3tomError, match=r"tensorrt_rtx 1.7 has no ahead-of-time plugins.*--merge-op onnx"):
        register_aot_merge(rtx, 89)


@pytest.mark.parametrize("sm", [89, 90, 120])
def test_the_ptx_without_scratch_parameters_assembles(sm: int, tmp_path: Path) -> None:
    from triton import knobs

    ptxas = knobs.nvidia.ptxas_blackwell.path if sm >= 100 else knobs.nvidia.ptxas.path
    chosen = [variant for variant in variants("float16", 64, 64) if variant.name != "nearest-wide"]
    for variant in chosen:
        built = compile_variant(variant, sm)
        count = len(spec(variant).arguments)
        assert len(built.parameters) == count + 2
        ptx = without_scratch(built.ptx, built.symbol, count)
        assert entry(ptx) == (built.symbol, built.parameters[:count])
        source = tmp_path / f"{variant.name}.ptx"
        source.write_text(ptx)
        target = f"sm_{sm}a" if sm >= 90 else f"sm_{sm}"
        subprocess.run([ptxas, f"--gpu-name={target}", source, "-o", tmp_path / "out"], check=True)


def test_a_scratch_parameter_in_use_is_refused() -> None:
    built = compile_variant(Variant("order", ""), 89)
    last = f"{built.symbol}_param_{len(built.parameters) - 1}"
    used = built.ptx.replace("ret;", f"ld.param.b64 %rd1, [{last}];\n\tret;", 1)
    with pytest.raises(D3tomError, match=last):
        without_scratch(used, built.symbol, len(built.parameters) - 2)
    with pytest.raises(D3tomError, match="no entry other"):
        without_scratch(built.ptx, "other", 1)


def test_every_aot_kernel_fits_default_shared_memory() -> None:
    chosen = {variant for dtype in DTYPES for variant in variants(dtype) if variant.name != "nearest-wide"}
    for variant in chosen:
        assert compile_variant(variant, 89).shared <= 48 * 1024
    # Staging differs most on Hopper.
    for variant in (Variant("nearest-narrow", "float32"), Variant("nearest-narrow", "bfloat16")):
        assert compile_variant(variant, 90).shared <= 48 * 1024


def test_the_body_is_valid_and_reaches_the_three() -> None:
    kind = TensorProto.FLOAT16
    graph = helper.make_graph(
        [helper.make_node(OP_TYPE, ["hidden", "normed", "kept"], ["merged"], domain=DOMAIN)],
        "merge",
        [
            helper.make_tensor_value_info("hidden", kind, ["B", "V", 64]),
            helper.make_tensor_value_info("normed", kind, ["B", "V", 64]),
            helper.make_tensor_value_info("kept", TensorProto.INT64, ["B", "K"]),
        ],
        [helper.make_tensor_value_info("merged", kind, ["B", "K", 64])],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[aot_merge_function(OPSET)], ir_version=10)
    onnx.checker.check_model(model)
    assert [node.op_type for node in _nodes()] == [NEAREST, ORDER, SUM]
    for node in _nodes():
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert attributes == {"plugin_namespace": DOMAIN.encode(), "aot": 1}


def test_the_parser_reaches_the_three_through_the_body() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX, the one that parses without a GPU, is not installed here")
    # In a process of its own: the registry would keep these stand-ins.
    command = [sys.executable, "-m", "tests.plugins.named_plugins"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"layers": ["PLUGIN_V3"] * 3, "built": True, "plugins": 3}
