"""int8 on the bundled model: its tokens are float32's, and where it cannot run it says so."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from d3tom_export.backends import onnxruntime_stage
from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.onnxruntime_stage import session_options
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.bundle.manifest import MANIFEST_FILE
from d3tom_export.bundled import bundled_model
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.config import LOOPS
from d3tom_export.cpu.int8 import quantize_products
from d3tom_export.errors import D3tomError
from d3tom_export.parity.agreement import INT8_AGREEMENT, compare_in_step
from d3tom_export.pipeline import Reader
from d3tom_export.prompt.samples import samples_for


def test_tokens_agree_with_float32(int8_bundle: Bundle) -> None:
    manifest, config = int8_bundle.manifest, int8_bundle.config
    model = load_model(open_checkpoint(bundled_model()))
    pairs = [
        (
            PyTorchBackend(model, manifest.merge, kv_cache=loop == "cached"),
            OnnxRuntimeBackend(int8_bundle, loop, device="cpu", precision="int8"),
        )
        for loop in LOOPS
    ]
    samples = samples_for(int8_bundle.folder, config, 2)
    reader = Reader.of_bundle(int8_bundle)
    report = compare_in_step(pairs, config, reader, samples, manifest.generation.changed(steps=4), manifest.merge)
    assert report.passed, report.lines()
    assert report.token_agreement >= INT8_AGREEMENT
    # It is int8 that ran: float32 differs by a thousandth of this.
    assert report.max_abs_logit_error > 1e-2
    assert "int8 against PyTorch in fp32" in report.lines()[0]
    assert report.to_json()["token_agreement_needed"] == INT8_AGREEMENT


def test_a_bundle_without_such_graphs_says_how_to_get_them(tiny_bundle: Bundle) -> None:
    with pytest.raises(D3tomError, match=r"no graphs in int8.*--precision int8"):
        OnnxRuntimeBackend(tiny_bundle, device="cpu", precision="int8")
    with pytest.raises(D3tomError, match="no graphs in int8"):
        OnnxRuntimeBackend(tiny_bundle, device="cpu", precision="int8", tuned=False)
    with pytest.raises(D3tomError, match=r"no graphs in fp16.*--precision fp16"):
        OnnxRuntimeBackend(tiny_bundle, device="cpu", precision="fp16")
    with pytest.raises(D3tomError, match="not fp8: that is for engines"):
        OnnxRuntimeBackend(tiny_bundle, device="cpu", precision="fp8")


def test_graphs_of_an_interrupted_command_do_not_count(int8_bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(int8_bundle.folder, tmp_path / "bundle"))
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    del manifest["files"]["cpu/int8/back.onnx"]
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(D3tomError, match="no graphs in int8, or not all of them"):
        OnnxRuntimeBackend(load_bundle(folder), device="cpu", precision="int8")


def test_an_onnxruntime_without_the_kernels_is_named(int8_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "__version__", "1.23.2")
    with pytest.raises(D3tomError, match=r"onnxruntime 1\.23\.2 has no kernels for int8 graphs. Install version 1\.24"):
        OnnxRuntimeBackend(int8_bundle, device="cpu", precision="int8")


def _product(weight: NDArray[np.float32]) -> ort.InferenceSession:
    """x (S, D) times the transpose of ``weight`` (N, D), in int8."""
    outputs, inputs = weight.shape
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
        product (float[S, {inputs}] x) => (float[S, {outputs}] y)
        <float[{outputs}, {inputs}] w = {{{", ".join(["0"] * weight.size)}}}>
        {{ t = Transpose<perm = [1, 0]>(w)
           y = MatMul(x, t) }}"""
    )
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    assert quantize_products(model) == 1
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), session_options("cpu"), ["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 5, 31])
def test_what_is_not_finite_stays_so(bad: float, place: int) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((3, 32), dtype=np.float32), rng.standard_normal((4, 32), dtype=np.float32)
    (right,) = _product(weight).run(None, {"x": x})
    np.testing.assert_allclose(right, x @ weight.T, atol=0.2)
    row, column = x.copy(), weight.copy()
    row[1, place], column[2, place] = bad, bad
    (found,) = _product(weight).run(None, {"x": row})
    assert np.isfinite(found).all(axis=1).tolist() == [True, False, True]
    np.testing.assert_array_equal(found[[0, 2]], right[[0, 2]])
    (found,) = _product(column).run(None, {"x": x})
    assert np.isfinite(found).all(axis=0).tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    ("machine", "flags", "overflows"),
    [
        ("x86_64", "sse4_2 avx2", True),
        ("AMD64", "avx2 avx_vnni", False),
        ("x86_64", "avx2 avx512_vnni", False),
        ("x86_64", None, True),  # nobody tells
        ("aarch64", None, False),
    ],
)
def test_processors_without_vnni_are_asked_for_exact_sums(
    machine: str, flags: str | None, overflows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : fpu {flags}\nmodel name : none\n")
    assert onnxruntime_stage._overflows_in_int8(tmp_path / "cpuinfo") == overflows
    monkeypatch.setattr(onnxruntime_stage, "_overflows_in_int8", lambda: overflows)
    options = session_options("cpu")
    if overflows:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry("session.x64quantprecision")


def test_sums_of_extreme_products_do_not_overflow() -> None:
    """255 times 127, twice, is beyond 16 bits, in which processors without VNNI add up pairs unless told not to."""
    x, weight = np.full((1, 64), 2.0, np.float32), np.full((3, 64), 3.0, np.float32)
    np.testing.assert_allclose(_product(weight).run(None, {"x": x})[0], x @ weight.T, rtol=0.01)
