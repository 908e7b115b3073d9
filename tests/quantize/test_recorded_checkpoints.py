"""The recorded runs' checkpoints in few bits: ONNX Runtime against the oracle with the same numbers, step by step.

The recordings themselves are of the checkpoints as they were; what is taken from them is the prompt, the settings and
the model, whose families and quirks differ.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.config import Loop
from d3tom_export.export.assemble import write_stages
from d3tom_export.export.request import StageRequest
from d3tom_export.loop.backend import Backend, Prompt
from d3tom_export.parity.kept import gone_along
from d3tom_export.parity.recorded import case_model, load_recorded_run
from d3tom_export.parity.validate import BACKEND_TOLERANCE, Report, compare_runs, expected_from_records
from d3tom_export.pipeline import run_loop
from d3tom_export.quantize.plan import QuantizeRequest
from tests.conftest import OWN_FAMILIES, OWN_GOLDEN, recorded_runs, recorded_runs_of_families

FORMATS = {
    "int4": QuantizeRequest("int4"),
    "int4-zero-points": QuantizeRequest("int4", asymmetric=True),
    "int8": QuantizeRequest("int8"),
    "fp8": QuantizeRequest("fp8"),
    "nvfp4": QuantizeRequest("nvfp4"),
}

# Every architecture is among the repository's own runs; all of ../shared's take four minutes more.
RUNS = (
    (*recorded_runs(), *recorded_runs_of_families())
    if os.environ.get("D3TOM_EVERY_RUN")
    else sorted(path.parent for path in (*OWN_GOLDEN.glob("*/case.json"), *OWN_FAMILIES.glob("*/*/case.json")))
)
# Each run with one format, each format with a run or several: all pairs would take half an hour.
PAIRS = [
    pytest.param(folder, list(FORMATS)[at % len(FORMATS)], id=f"{folder.parent.name}-{folder.name}")
    for at, folder in enumerate(RUNS)
]


def agreement(folder: Path, request: QuantizeRequest, scratch: Path) -> Report:
    """The run's prompt answered by both, from its checkpoint quantized as ``request`` says."""
    family, changed = case_model(folder)
    checkpoint = open_checkpoint(folder, family=family, changed=changed)
    run = load_recorded_run(folder, checkpoint.config.language.n_layers)
    loop: Loop = "cached" if run.kv_cache else "uncached"
    bundle = write_stages(checkpoint, StageRequest(run.merge, (loop,), quantize=request), run.generation, scratch)
    rows = bundle.manifest.vocab_rows
    few = open_checkpoint(bundle.folder, vocab_rows=rows, family=family, changed=changed)
    assert few.quantized
    oracle = PyTorchBackend(load_model(few), run.merge, kv_cache=run.kv_cache)
    prompt, mask = Prompt(run.prompt_embeddings, run.visual_positions), bundle.config.language.mask_token_id

    def answer(backend: Backend) -> list:
        return list(run_loop(backend, prompt, mask, run.generation, run.merge, logits=True))

    found = answer(OnnxRuntimeBackend(bundle, loop, device="cpu"))
    reference, turned = gone_along(oracle, answer(oracle), found, answer)
    report = Report("onnxruntime", BACKEND_TOLERANCE, near_tied_selections=turned)
    compare_runs(report, run.name, expected_from_records(reference), found)
    return report


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "form"), PAIRS)
def test_onnxruntime_computes_what_the_oracle_does(folder: Path, form: str, tmp_path: Path) -> None:
    report = agreement(folder, FORMATS[form], tmp_path)
    assert report.passed, report
