"""int8 on the bundled model: its tokens are float32's, and where it cannot run it says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from d3tom_export.agreement import INT8_AGREEMENT, compare_in_step
from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle import Bundle
from d3tom_export.bundled import bundled_model
from d3tom_export.checkpoint import load_model, open_checkpoint
from d3tom_export.config import LOOPS
from d3tom_export.cpu.tune import write_tuned
from d3tom_export.errors import D3tomError
from d3tom_export.pipeline import Reader
from d3tom_export.samples import samples_for


@pytest.fixture(scope="module")
def int8_bundle(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path_factory.mktemp("int8") / "bundle"))
    manifest, config = tiny_bundle.manifest, tiny_bundle.config
    write_tuned(folder, manifest.stages, config.language, manifest.merge, "int8")
    return Bundle(folder, manifest, config)


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
    report = compare_in_step(pairs, config, reader, samples, manifest.generation, manifest.merge)
    assert report.passed, report.lines()
    assert report.token_agreement >= INT8_AGREEMENT
    # It is int8 that ran: float32 differs by a thousandth of this.
    assert report.max_abs_logit_error > 1e-2
    assert "int8 against PyTorch in fp32" in report.lines()[0]
    assert report.to_json()["token_agreement_needed"] == INT8_AGREEMENT


def test_a_bundle_without_such_graphs_says_how_to_get_them(tiny_bundle: Bundle) -> None:
    with pytest.raises(D3tomError, match=r"no graphs in int8.*--precision int8"):
        OnnxRuntimeBackend(tiny_bundle, device="cpu", precision="int8")
    with pytest.raises(D3tomError, match="not fp16: that is for engines"):
        OnnxRuntimeBackend(tiny_bundle, device="cpu", precision="fp16")
