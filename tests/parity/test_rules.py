"""Every commit rule on ONNX Runtime against the oracle, and how a call at a rule's edge is reported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.bundled import bundled_model
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.config import LOOPS, GenerationConfig, Loop, MergeConfig
from d3tom_export.loop.denoise import StepRecord, StepRequest, StepResult, denoise
from d3tom_export.model.lavida import Lavida
from d3tom_export.parity.validate import BACKEND_TOLERANCE, Report, compare_runs, expected_from_records
from d3tom_export.pipeline import Reader, embed_sample, run_loop
from d3tom_export.prompt.samples import SAMPLES_FILE, load_samples
from tests.backends.test_tensorrt import RULES, THREE
from tests.conftest import Invoke

MASK = 258


@pytest.mark.parametrize("loop", LOOPS)
def test_batches_of_three_in_blocks(bundle: Bundle, eager_model: Lavida, loop: Loop) -> None:
    backend = OnnxRuntimeBackend(bundle, loop, device="cpu")
    oracle = PyTorchBackend(eager_model, bundle.manifest.merge, kv_cache=loop == "cached")
    for generation, merge in RULES:
        both = (run_loop(each, THREE, MASK, generation, merge, logits=True) for each in (oracle, backend))
        reference, candidate = (list(records) for records in both)
        report = Report("", BACKEND_TOLERANCE)
        for row in range(3):
            compare_runs(report, f"row {row}", expected_from_records(reference, row), candidate, row)
        # Embeddings are the test's own here.
        assert report.passed, report
        assert any(record.merged for record in reference)
        assert len({tuple(record.transfer.sum(axis=1)) for record in reference}) > 1  # a rule's counts, no plan's


@pytest.mark.parametrize("rule", [("threshold", "--threshold", 0.95), ("factor", "--factor", 0.6), ("frechet",)])
def test_validate_holds_a_trained_model_to_a_rule(tiny_bundle: Bundle, invoke: Invoke, rule: tuple) -> None:
    result = invoke("validate", tiny_bundle.folder, "--samples", 2, "--graphs", "tuned", "--commit", *rule)
    assert result.exit_code == 0, result.output
    assert "PASSED" in result.output


def test_a_trained_model_answers_in_few_steps_and_as_well(tiny_bundle: Bundle) -> None:
    checkpoint = open_checkpoint(bundled_model())
    oracle = PyTorchBackend(load_model(checkpoint), tiny_bundle.manifest.merge)
    reader, plan = Reader.of_bundle(tiny_bundle), tiny_bundle.manifest.generation
    unmerged = MergeConfig(2, 0.9, "none")
    steps, answers = [], []
    for generation in (plan, plan.changed(commit="threshold")):
        for sample in load_samples(tiny_bundle.folder / SAMPLES_FILE, 2):
            prompt = embed_sample(oracle, sample, reader, generation)
            records = list(run_loop(oracle, prompt, checkpoint.config.language.mask_token_id, generation, unmerged))
            steps.append(len(records))
            answers.append(reader.answer(records[-1], generation).text)
    assert max(steps[2:]) < min(steps[:2]) / 4
    assert answers[2:] == answers[:2]


class Sure:
    """Every position is as sure as it is told, of token 1."""

    first_token = None

    def __init__(self, confidences: list[float]) -> None:
        self.confidences = np.array([confidences])

    def step(self, request: StepRequest) -> StepResult:
        p = self.confidences
        others = np.log((1 - p) / 8)
        logits = np.stack([others, np.log(p), *[others] * 7], axis=-1)
        return StepResult(np.ones(p.shape, dtype=np.int64), p, None, logits.astype(np.float32))


def _records(confidences: list[float], **settings: Any) -> list[StepRecord]:
    generation = GenerationConfig(len(confidences), **settings)
    loop = denoise(Sure(confidences), batch=1, visual_tokens=0, mask_token_id=MASK, generation=generation,
                   merge=MergeConfig(0, 0.5), logits=True)  # fmt: skip
    return list(loop)


@pytest.mark.parametrize(
    ("settings", "confidences", "place"),
    [
        ({"commit": "threshold", "threshold": 0.8}, [0.95, 0.8, 0.6], 1),
        ({"commit": "factor"}, [0.99, 0.9, 0.75, 0.3, 0.2], 2),  # the third needs 1 - 1/4
        ({"commit": "frechet", "margin": 0.1}, [0.95, 0.575, 0.3], 1),  # 0.95 + 2 * 0.575 - 2 = 0.1
    ],
)
@pytest.mark.parametrize(("by", "near"), [(1e-7, True), (3e-3, False)])
def test_a_call_at_the_edge_is_a_near_tie(
    settings: dict, confidences: list[float], place: int, by: float, near: bool
) -> None:
    above, below = ([c + side * (at == place) for at, c in enumerate(confidences)] for side in (by, -by))
    for ours, theirs in ((above, below), (below, above)):
        report = Report("", 1.0)
        reference = list(expected_from_records(_records(theirs, **settings)))
        compare_runs(report, "answer", reference, _records(ours, **settings))
        assert not report.transfers_identical
        assert (report.near_ties, report.true_flips) == ((1, 0) if near else (0, 1)), report
