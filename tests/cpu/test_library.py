"""The merge of a cache as a node, by its body and by the library's kernel; what that refuses, and who runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.onnxruntime_stage import session_options
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle, load_bundle, write_manifest
from d3tom_export.config import LOOPS, CacheMergeConfig, Loop, MergeConfig
from d3tom_export.cpu.cache_merge import define_cache_merge
from d3tom_export.cpu.place import tuned_graph, with_library
from d3tom_export.cpu.tune import OPSET
from d3tom_export.errors import D3tomError
from d3tom_export.merging.cached import LayerCache, merge_cache
from d3tom_export.merging.merge import nearest_kept
from d3tom_export.model.lavida import Lavida
from d3tom_export.parity.validate import validate_backends
from d3tom_export.pipeline import Reader
from d3tom_export.plugins.cpu_library import LIBRARY_VARIABLE, compile_library, give_kernel
from d3tom_export.plugins.merge_op import CACHE_OP_TYPE, DOMAIN
from d3tom_export.prompt.samples import Sample
from tests.conftest import BuildBundle, Invoke, picture

NAMES = ("keys", "values", "kept", "drops", "normed")


def _node(by_mean: bool) -> bytes:
    """A graph of one such node, with its body; ``by_mean``: that finds out for itself what it compares."""
    value = onnx.helper.make_tensor_value_info
    cache, merged = ["B", "P", "N", "d"], ["B", "N", "C", "d"]
    outputs = ["merged_keys", "merged_values"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(CACHE_OP_TYPE, NAMES[:4] if by_mean else NAMES, outputs, domain=DOMAIN)],
        "merge",
        [
            value("keys", 1, cache),
            value("values", 1, cache),
            value("kept", 7, ["B", "C"]),
            value("drops", 9, [1]),
            value("normed", 1, ["B", "P", "D"]),
        ],
        [value(name, 1, merged) for name in outputs],
    )
    imports = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, 1)]
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=imports, ir_version=10))
    assert isinstance(model, ir.Model)
    define_cache_merge(model, by_mean=by_mean)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    content: bytes = proto.SerializeToString()
    return content


class Ran:
    """Such a graph on ONNX Runtime, by its body or, with a library, by that."""

    def __init__(self, library: Path | None, by_mean: bool) -> None:
        options = ort.SessionOptions()
        if library is not None:
            give_kernel(options, library)
        self._session = ort.InferenceSession(_node(by_mean), options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: dict[str, Any]) -> list[Any]:
        found: list[Any] = self._session.run(None, inputs)
        return found


@pytest.fixture(scope="module", params=["body", "body by mean", "library", "library by mean"])
def ran(request: pytest.FixtureRequest) -> Ran:
    library = request.getfixturevalue("merge_library") if "library" in request.param else None
    return Ran(library, "mean" in request.param)


@pytest.fixture(scope="module")
def kernel(merge_library: Path) -> Ran:
    return Ran(merge_library, False)


def _inputs(seed: int, batch: int, rows: int, kept: int, heads: int = 2, size: int = 6) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    keys, values = rng.normal(size=(2, batch, rows, heads, size)).astype(np.float32)
    chosen = np.stack([np.sort(rng.choice(rows, kept, replace=False)) for _ in range(batch)])
    tensors = (keys, values, chosen.astype(np.int64), np.array([kept < rows]), keys.mean(axis=2))
    return dict(zip(NAMES, tensors, strict=True))


def _expected(inputs: dict[str, Any]) -> list[Any]:
    """By the eager model's merge."""
    keys, values, kept, _, normed = (torch.from_numpy(inputs[name]) for name in NAMES)
    if not inputs["drops"].item():
        return [rows.transpose(1, 2).numpy() for rows in (keys, values)]
    cache = LayerCache(keys.transpose(1, 2), values.transpose(1, 2))
    return [rows.numpy() for rows in merge_cache(cache, nearest_kept(normed, kept), kept)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 3),
    rows=st.integers(1, 150),
    share=st.floats(0, 1),
    heads=st.integers(1, 5),
    size=st.sampled_from([2, 6, 16, 50, 64]),
)
def test_it_is_the_eager_merge_of_a_cache(
    ran: Ran, seed: int, batch: int, rows: int, share: float, heads: int, size: int
) -> None:
    inputs = _inputs(seed, batch, rows, max(1, int(share * rows)), heads, size)
    for found, expected in zip(ran(inputs), _expected(inputs), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_kept_token_keeps_itself_beside_an_identical_twin(ran: Ran) -> None:
    inputs = _inputs(0, 1, 4, 2, 1, 2)
    inputs |= {name: np.ones_like(inputs[name]) for name in ("keys", "normed")}
    inputs |= {"values": np.array([0, 1, 2, 4], np.float32).repeat(2).reshape(1, 4, 1, 2), "kept": np.array([[1, 3]])}
    _, values = ran(inputs)
    # rows 0 and 2 join row 1; the mean norm of rows 1 and 3 is 2.5 times that of a row of ones
    np.testing.assert_allclose(values, np.full((1, 1, 2, 2), 2.5), rtol=1e-6)


@pytest.mark.parametrize("way", ["body", "library"])
def test_a_long_row_is_compared_to_float32s_precision(merge_library: Path, way: str) -> None:
    """As for the merge without a cache (tests/cpu/test_merge.py): rows between two kept ones, nearer to one by 6e-7."""
    rng, pairs, width = np.random.default_rng(4096), 100, 4096
    one, other = (rng.normal(size=(pairs, width)) for _ in range(2))
    one, other = (ends / np.linalg.norm(ends, axis=-1, keepdims=True) for ends in (one, other))
    rows = np.concatenate([one, other, one * (1 + 1e-6) + other]) * rng.uniform(1, 50, size=(3 * pairs, 1))
    unit = rows.astype(np.float32).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    cosine = np.einsum("rw,krw->rk", unit[2 * pairs :], unit[: 2 * pairs].reshape(2, pairs, width))
    clear = np.abs(cosine[:, 0] - cosine[:, 1]) > 5e-7
    assert clear.sum() > pairs / 2
    # Each row between says by a number of its own where it went.
    numbers = np.zeros((1, 3 * pairs, 1, 1), np.float32)
    numbers[0, 2 * pairs :, 0, 0] = np.arange(1, pairs + 1)
    inputs = {"keys": numbers, "values": numbers, "normed": rows[None].astype(np.float32)}
    inputs |= {"kept": np.arange(2 * pairs)[None], "drops": np.array([False])}
    sums = Ran(merge_library if way == "library" else None, by_mean=False)(inputs)[0][0, 0, :, 0]
    for pair in np.flatnonzero(clear):
        assert sums[pair if cosine[pair, 0] > cosine[pair, 1] else pairs + pair] == pair + 1


def test_equal_inputs_give_equal_bits(kernel: Ran) -> None:
    inputs = _inputs(0, 2, 500, 60, 4, 64)
    first, second = (kernel(inputs)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("index", [-1, 20, 2**40])
def test_a_kept_row_that_is_none_is_refused(kernel: Ran, index: int) -> None:
    inputs = _inputs(0, 1, 20, 3)
    inputs["kept"][0, 2] = index
    with pytest.raises(Exception, match="a kept row is none of the rows"):
        kernel(inputs)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("values", (1, 20, 2, 5), "keys and values differ in shape"),
        ("normed", (1, 19, 6), "differ in number"),
        ("kept", (2, 3), "differ in their batch"),
        ("kept", (1, 0), "no row is kept"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kernel: Ran, name: str, shape: tuple[int, ...], words: str) -> None:
    inputs = _inputs(0, 1, 20, 3)
    inputs[name] = np.zeros(shape, inputs[name].dtype)
    with pytest.raises(Exception, match=words):
        kernel(inputs)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_no_number_stays_in_its_sum(kernel: Ran, bad: float) -> None:
    inputs = _inputs(0, 1, 200, 30) | {"drops": np.array([False])}
    for name in ("keys", "values", "normed"):
        inputs[name][0, 7] = bad
    for merged in kernel(inputs):
        assert (~np.isfinite(merged)).any(axis=-1).sum() == 2  # one in each head


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("text_targets", [True, False])
def test_answers_are_proven_with_it(
    build_bundle: BuildBundle, eager_model: Lavida, merge_library: Path, text_targets: bool, loop: Loop
) -> None:
    """Step by step against PyTorch; without a cache there is nothing for it to do."""
    merge = MergeConfig(layer=1, ratio=0.7, cache=CacheMergeConfig(text_targets=text_targets))
    bundle = build_bundle(merge, LOOPS)
    oracle = PyTorchBackend(eager_model, merge, kv_cache=loop == "cached")
    backend = OnnxRuntimeBackend(bundle, loop, device="cpu", merge_library=merge_library)
    assert backend.name == ("onnxruntime, merge library" if loop == "cached" else "onnxruntime")
    samples = [Sample("What is it?", picture(100, 60)), Sample("And this?", picture(30, 90, 1))]
    arguments = (bundle.config, Reader.of_bundle(bundle), samples, bundle.manifest.generation, merge)
    report = validate_backends([(oracle, backend)], *arguments)
    assert report.passed, report


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_its_graph_is_the_other_ones_to_the_bit(int8_bundle: Bundle, merge_library: Path, precision: str) -> None:
    """Where no library is: its node's body is what is inlined in the other, of fewer steps."""
    sessions, folder = [], int8_bundle.folder
    for name in (precision, with_library(precision)):
        path = tuned_graph(folder, name, "cached_merge")
        options = session_options("cpu", folder)
        sessions.append(ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"]))
    later = int8_bundle.config.language.n_layers - int8_bundle.manifest.merge.layer - 1
    ops = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    assert ops[CACHE_OP_TYPE] == later
    assert ops["ArgMax"] == 0
    rng, sizes = np.random.default_rng(0), {"B": 2, "G": 5, "P": 60, "V": 40}
    given = {"visual_positions": np.arange(9, 49), "keep": np.array([8])}
    for tensor in sessions[0].get_inputs():
        shape = [sizes.get(axis, axis) for axis in tensor.shape]
        value = rng.random(shape) < 0.3 if tensor.type == "tensor(bool)" else rng.normal(size=shape)
        given.setdefault(tensor.name, value if value.dtype == bool else value.astype(np.float32))
    for plain, folded in zip(*(session.run(None, given) for session in sessions), strict=True):
        np.testing.assert_array_equal(plain, folded)


def test_a_library_is_named_or_there_is_none(
    bundle: Bundle, merge_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def name(**arguments: Any) -> str:
        return OnnxRuntimeBackend(bundle, "cached", device="cpu", **arguments).name

    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    assert name() == "onnxruntime"
    monkeypatch.setenv(LIBRARY_VARIABLE, str(merge_library))
    assert name() == "onnxruntime, merge library"
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "missing.so"))
    with pytest.raises(D3tomError, match=r"missing\.so.*is no file"):
        name()
    assert name(merge_library=False) == "onnxruntime"
    assert name(tuned=False) == "onnxruntime, standard graphs"
    (tmp_path / "missing.so").write_bytes(b"no library")
    with pytest.raises(D3tomError, match="refused by ONNX Runtime"):
        name()


def test_a_bundle_of_before_runs_without_it(bundle: Bundle, merge_library: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    shutil.rmtree(tuned_graph(folder, with_library("fp32"), "cached_merge").parent)
    write_manifest(folder, bundle.manifest)
    backend = OnnxRuntimeBackend(load_bundle(folder), "cached", device="cpu", merge_library=merge_library)
    assert backend.name == "onnxruntime"


def test_doctor_says_what_is_named(
    merge_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, invoke: Invoke
) -> None:
    for library, usable in ((merge_library, True), (tmp_path / "missing.so", False)):
        monkeypatch.setenv(LIBRARY_VARIABLE, str(library))
        found = json.loads(invoke("doctor", "--json", "-").stdout)["backends"]
        (cpu,) = (each for each in found if each["name"] == "onnxruntime (cpu)")
        assert cpu["usable"] is usable
        assert str(library) in cpu["found" if usable else "remedy"]


def test_the_command_compiles_one_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "lib merge.so"
    command = [sys.executable, "-m", "d3tom_export.plugins.cpu_library", "--output", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"export {LIBRARY_VARIABLE}='{library}'" in done.stdout
    give_kernel(ort.SessionOptions(), library)
    before = library.read_bytes()
    for compiler, words in (("false", "failed (exit code 1)"), ("no-such-compiler", "cannot be run")):
        monkeypatch.setenv("CXX", compiler)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert words in done.stderr
    assert library.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [library.name]
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(D3tomError, match="No C\\+\\+ compiler"):
        compile_library(tmp_path / "other.so")
