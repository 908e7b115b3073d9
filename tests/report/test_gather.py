"""What is gathered is what ran: the same steps, kept sets, times and work, and the eager model's own scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.cost.flops import Workload, answer_cost, prompt_plan, step_merges
from d3tom_export.loop.backend import Backend, StageClock
from d3tom_export.pipeline import Reader, run_loop
from d3tom_export.progress import no_progress
from d3tom_export.prompt.samples import synthetic_samples
from d3tom_export.report.data import Answer, Redundancy
from d3tom_export.report.gather import Asked, built_with, gather, hashes_of, merging_words, reductions_of
from d3tom_export.report.oracle import Oracle
from tests.conftest import picture

GENERATION = GenerationConfig(gen_length=8)
ASKED = [Asked("What?", picture(70, 50), "a"), Asked("And?", picture(30, 60, 1), "b", "yes")]


@pytest.fixture(scope="module")
def reader(bundle: Bundle) -> Reader:
    return Reader.of_bundle(bundle)


@pytest.fixture(scope="module", params=["uncached", "cached"])
def backend(request: pytest.FixtureRequest, bundle: Bundle) -> Backend:
    return OnnxRuntimeBackend(bundle, request.param, device="cpu")


@pytest.fixture(scope="module")
def oracle(bundle: Bundle, backend: Backend) -> Oracle:
    return Oracle(bundle, backend, bundle.manifest.merge, None, None, no_progress)


@pytest.fixture(scope="module")
def gathered(bundle: Bundle, backend: Backend, oracle: Oracle, reader: Reader) -> tuple[list[Answer], Redundancy]:
    answers, redundancy = gather(
        bundle, backend, reader, ASKED, GENERATION, bundle.manifest.merge, no_progress, oracle.importance,
        oracle.similarities,
    )  # fmt: skip
    assert redundancy is not None
    return answers, redundancy


def test_steps_are_those_of_a_run(
    bundle: Bundle, backend: Backend, reader: Reader, gathered: tuple[list[Answer], Redundancy]
) -> None:
    for asked, answer in zip(ASKED, gathered[0], strict=True):
        assert asked.picture is not None
        prompt = reader.read(backend, asked.question, [asked.picture], GENERATION)
        mask = reader.config.language.mask_token_id
        records = list(run_loop(backend, prompt, mask, GENERATION, bundle.manifest.merge))
        assert (answer.prompt_tokens, answer.visual_tokens) == (
            prompt.embeddings.shape[1],
            len(prompt.visual_positions),
        )
        assert answer.visual_tokens == sum(grid.tokens for grid in answer.grids)
        assert [step.number for step in answer.steps] == list(range(1, len(records) + 1))
        for step, record in zip(answer.steps, records, strict=True):
            kept = record.result.kept
            assert step.merged == record.merged
            assert step.kept == (None if kept is None or not record.merged else kept[0].tolist())
            assert step.committed == record.transfer[0].sum()
        assert answer.text == reader.answer(records[-1], GENERATION).text
        assert answer.right == asked.right


def test_importance_is_what_kept_the_tokens(gathered: tuple[list[Answer], Redundancy]) -> None:
    merged = [step for answer in gathered[0] for step in answer.steps if step.merged]
    assert merged
    for step in merged:
        assert step.importance is not None
        assert step.kept is not None
        order = np.argsort(-step.importance, kind="stable")
        assert sorted(order[: step.keep].tolist()) == step.kept
        held = step.held_importance
        assert held is not None
        assert step.keep / step.visual_tokens <= held <= 1
    assert all(answer.steps[0].importance is None for answer in gathered[0])


def test_redundancy_is_of_all_pictures(
    backend: Backend, bundle: Bundle, gathered: tuple[list[Answer], Redundancy]
) -> None:
    answers, redundancy = gathered
    tokens = sum(answer.visual_tokens for answer in answers)
    steps = 1 if backend.kv_cache else 3
    assert redundancy.similarities.shape == (steps, bundle.config.language.n_layers, tokens)
    assert len(redundancy.steps) == steps
    assert (np.diff([redundancy.quantile(share) for share in (0.1, 0.5, 0.9)], axis=0) >= 0).all()
    assert redundancy.similarities.max() <= 1 + 1e-5


def test_time_is_spent_in_stages(backend: Backend, gathered: tuple[list[Answer], Redundancy]) -> None:
    assert isinstance(backend, StageClock)
    for answer in gathered[0]:
        assert {"vision", "embed"} <= answer.prompt_stages.keys()
        assert ("prefill" in answer.prompt_stages) == backend.kv_cache
        for step in answer.steps:
            assert {"front", "back"} <= step.stages.keys()
            assert 0 < sum(step.stages.values()) <= step.seconds
        assert answer.denoise_seconds == pytest.approx(sum(step.seconds for step in answer.steps))


def test_work_is_what_the_steps_cost(
    bundle: Bundle, backend: Backend, gathered: tuple[list[Answer], Redundancy]
) -> None:
    language, merge = bundle.config.language, bundle.manifest.merge.in_loop(backend.kv_cache)
    for answer in gathered[0]:
        sizes = Workload(answer.prompt_tokens, answer.visual_tokens, 8)
        steps = step_merges(merge, GENERATION, answer.visual_tokens)
        plan = prompt_plan(merge, answer.visual_tokens)
        cached = backend.kv_cache
        assert answer.work.total == answer_cost(language, sizes, merge.layer, steps, cached=cached, prompt=plan).flops
        assert answer.work.unmerged > answer.work.total or cached
        assert answer.merges == steps


def test_parity_is_that_of_validate(bundle: Bundle, backend: Backend, oracle: Oracle, reader: Reader) -> None:
    report, lines = oracle.parity(reader, synthetic_samples(bundle.config, 1), GENERATION, no_progress)
    assert report["passed"]
    assert report["tokens_identical"]
    assert report["samples"] == 1
    assert lines[0].startswith("PASSED")


def test_nobody_asks_the_eager_model_unless_told(bundle: Bundle, backend: Backend, reader: Reader) -> None:
    early = replace(GENERATION, gen_length=4)
    answers, redundancy = gather(bundle, backend, reader, ASKED[:1], early, bundle.manifest.merge, no_progress)
    assert redundancy is None
    assert all(step.importance is None for step in answers[0].steps)
    assert answers[0].to_json()["steps"][1]["importance"] is None


def test_a_question_without_a_picture_has_steps_too(
    bundle: Bundle, backend: Backend, oracle: Oracle, reader: Reader
) -> None:
    asked = [Asked("What?", None, "")]
    (answer,), redundancy = gather(
        bundle, backend, reader, asked, GENERATION, bundle.manifest.merge, no_progress, oracle.importance,
        oracle.similarities,
    )  # fmt: skip
    assert (answer.visual_tokens, answer.grids, redundancy) == (0, [], None)
    assert answer.mean_kept == 0
    assert not any(step.merged for step in answer.steps)
    assert reductions_of(bundle, answer, GENERATION, bundle.manifest.merge) is None


def test_the_map_holds_the_bundles_own_setting(bundle: Bundle, gathered: tuple[list[Answer], Redundancy]) -> None:
    answer, merge = gathered[0][0], replace(bundle.manifest.merge, layer=2, ratio=0.8)
    found = reductions_of(bundle, answer, GENERATION, merge)
    assert found is not None
    assert found.here == found.saved[2][found.ratios.index(0.8)]
    fixed = reductions_of(bundle, answer, GENERATION, replace(merge, schedule="fixed"))
    assert fixed is not None
    assert fixed.ratios[0] == 0.1
    assert reductions_of(bundle, answer, GENERATION, replace(merge, schedule="none")) is None
    ruled = reductions_of(bundle, answer, GENERATION.changed(commit="threshold"), merge)
    assert ruled is not None
    assert ruled.here == found.here


def test_what_it_was_built_with_names_no_host_and_no_folder(bundle: Bundle, backend: Backend) -> None:
    told = dict(built_with(bundle, backend, GENERATION, bundle.manifest.merge))
    assert list(told) == ["Model", "Answers", "Bundle", "Run"]
    values = [value for entries in told.values() for _, value in entries]
    assert not [value for value in values if str(bundle.folder) in value or "/tmp" in value]
    names = [name for name, _ in hashes_of(bundle, cached=backend.kv_cache)]
    assert names[:2] == ["manifest.json", "weights"]
    assert ("prefill.onnx" in names) == backend.kv_cache


@pytest.mark.parametrize(
    ("merge", "cached", "words"),
    [
        (MergeConfig(2, 0.9), False, "merged at layer 2, ratio 0.9 adaptive"),
        (MergeConfig(2, 0.9), True, "merged at layer 2, ratio 0.9 fixed"),
        (MergeConfig(2, 0.9, merge_at="prefill"), True, "merged at layer 2, ratio 0.9 fixed, once at the prefill"),
        (MergeConfig(1, 0.5, select="random"), False, "merged at layer 1, ratio 0.5 adaptive, selected by random"),
        (MergeConfig(1, 0.5, schedule="none"), False, "nothing merged"),
    ],
)
def test_merging_in_words(merge: MergeConfig, cached: bool, words: str) -> None:
    assert merging_words(merge, cached=cached) == words


def test_a_backend_without_a_clock_gives_whole_steps(
    bundle: Bundle, reader: Reader, eager_model: Callable[..., object]
) -> None:
    eager = PyTorchBackend(eager_model, bundle.manifest.merge)  # type: ignore[arg-type]
    (answer,), _ = gather(bundle, eager, reader, ASKED[:1], GENERATION, bundle.manifest.merge, no_progress)
    assert answer.stage_seconds == {}
    assert answer.denoise_seconds > 0
