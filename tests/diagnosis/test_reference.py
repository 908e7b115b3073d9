"""The stages in PyTorch under ONNX Runtime's flow: the same answers as the eager model, every stage seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import GenerationConfig, Loop
from d3tom_export.diagnosis.reference import Arrays, ReferenceBackend, ReferenceStage
from d3tom_export.model.lavida import Lavida
from d3tom_export.parity.validate import BACKEND_TOLERANCE, Report, compare_runs, expected_from_records
from d3tom_export.pipeline import Reader, embed_sample, run_loop
from d3tom_export.prompt.samples import Sample
from d3tom_export.stages.contract import StageSpec, TensorSpec
from d3tom_export.stages.ops import merge_node

STEP = {"uncached": ["embed", "front", "merge", "back"], "cached": ["embed", "front", "merge", "back"]}
PROMPT = {"uncached": ["vision", "embed"], "cached": ["vision", "embed", "prefill", *["rotate"] * 4]}


@pytest.mark.parametrize("loop", ["uncached", "cached"])
def test_it_answers_as_the_eager_model_does_and_shows_every_stage(
    loop: Loop, bundle: Bundle, eager_model: Lavida, bundle_reader: Reader, sample: Sample
) -> None:
    seen: list[tuple[str, Arrays, Arrays]] = []
    reference = ReferenceBackend(
        bundle, loop, eager_model, lambda stage, inputs, outputs: seen.append((stage.spec.name, inputs, outputs))
    )
    oracle = PyTorchBackend(eager_model, bundle.manifest.merge, kv_cache=loop == "cached")
    generation = GenerationConfig(gen_length=3)
    report = Report(reference.name, BACKEND_TOLERANCE)
    expected, records = (
        run_loop(
            backend,
            embed_sample(backend, sample, bundle_reader, generation),
            bundle.config.language.mask_token_id,
            generation,
            bundle.manifest.merge,
            logits=True,
        )
        for backend in (oracle, reference)
    )
    compare_runs(report, "sample", expected_from_records(expected), records)
    assert report.passed, report
    names = [name for name, _, _ in seen]
    prompt, first = PROMPT[loop], ["embed", "front", "decide" if loop == "cached" else "merge", "back"]
    assert names == [*prompt, *first, *STEP[loop], *STEP[loop]]
    specs = {spec.name: spec for spec in bundle.manifest.stages.values() if spec.loop in (None, loop)}
    for name, inputs, outputs in seen:
        assert list(outputs) == [tensor.name for tensor in specs[name].outputs]
        assert set(inputs) <= {tensor.name for tensor in specs[name].inputs}
        assert all(array.flags.c_contiguous for array in outputs.values())


class _Merge(nn.Module):
    def forward(self, hidden: Tensor, normed: Tensor, kept: Tensor) -> Tensor:
        return merge_node([hidden], normed, kept)[0]


def test_near_ties_go_every_way() -> None:
    """Token 1 is as near to kept token 0 as to kept token 2: it may have joined either."""
    axes = [TensorSpec(name, "float32", ("B", "V", 2)) for name in ("hidden", "normed", "merged")]
    spec = StageSpec("merge", (*axes[:2], TensorSpec("kept", "int64", ("B", "K"))), (axes[2],))
    stage = ReferenceStage(spec, _Merge(), lambda *_: None)
    normed = np.array([[[1, 0], [1, 1], [0, 1], [1, -0.1]]], dtype=np.float32)
    hidden = np.array([[[1, 1], [10, 10], [100, 100], [1000, 1000]]], dtype=np.float32)
    inputs = {"hidden": hidden, "normed": normed, "kept": np.array([[0, 2]])}
    (value,) = stage.run({name: _value(array) for name, array in inputs.items()}, ["merged"])
    assert value.numpy()[0, :, 0].tolist() == [1011.0, 100.0]
    outcomes = [outcome["merged"][0, :, 0].tolist() for outcome in stage.alternatives(inputs, 5e-7)]
    assert outcomes == [[1001.0, 110.0]] * 2  # all ties turned, and the one alone
    normed[0, 1, 0] += 0.01
    assert stage.alternatives(inputs, 5e-7) == []
    assert len(stage.alternatives(inputs, 0.1)) == 2


def _value(array: np.ndarray):  # type: ignore[no-untyped-def]
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(array)


def test_values_outlive_what_they_were_made_of(bundle: Bundle, eager_model: Lavida) -> None:
    """A value made on an array's memory would show whatever took its place."""
    reference = ReferenceBackend(bundle, "uncached", eager_model, lambda *_: None)
    ids = np.arange(2000, dtype=np.int64).reshape(1, -1) % 260
    embeddings = reference.embed_tokens(ids)
    litter = [np.full_like(embeddings, 7.0) for _ in range(20)]
    with torch.no_grad():
        expected = eager_model.embed_tokens(torch.from_numpy(ids)).numpy()
    assert np.array_equal(embeddings, expected)
    assert len(litter) == 20
