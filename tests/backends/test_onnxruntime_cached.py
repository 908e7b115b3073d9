"""The loop with a KV cache on ONNX Runtime against the oracle: sizes, cuts, batches, options, and what it holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.onnxruntime_sessions import CachedSession
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import CacheMergeConfig, GenerationConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.backend import Prompt
from d3tom_export.loop.denoise import StepRequest, denoise
from d3tom_export.model.lavida import Lavida
from d3tom_export.parity.validate import validate_backends
from d3tom_export.pipeline import Reader, run_loop
from d3tom_export.prompt.samples import Sample
from tests.backends.test_onnxruntime import PICTURES, assert_same
from tests.conftest import BuildBundle, picture


@pytest.fixture(scope="module")
def backend(bundle: Bundle) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(bundle, "cached", device="cpu")


@pytest.fixture(scope="module")
def cached_oracle(bundle: Bundle, eager_model: Lavida) -> PyTorchBackend:
    return PyTorchBackend(eager_model, bundle.manifest.merge, kv_cache=True)


@pytest.fixture(scope="module")
def reader(bundle: Bundle) -> Reader:
    return Reader.from_folder(bundle.folder, bundle.config)


def test_one_bundle_serves_pictures_of_every_size(
    backend: OnnxRuntimeBackend, cached_oracle: PyTorchBackend, reader: Reader, bundle: Bundle
) -> None:
    samples = [Sample("What is it?", picture(*size, seed)) for seed, size in enumerate(PICTURES)]
    pair, generation = (cached_oracle, backend), GenerationConfig(gen_length=8)
    report = validate_backends([pair], reader.config, reader, samples, generation, bundle.manifest.merge)
    assert report.passed, report
    assert report.samples == len(PICTURES)


BLOCKS = GenerationConfig(gen_length=24, block_length=8, step_ratio=0.5, schedule="shift")


@pytest.mark.parametrize(
    ("generation", "ratio", "schedule", "cache"),
    [
        (GenerationConfig(gen_length=1), 0.7, "adaptive", CacheMergeConfig()),
        (BLOCKS, 0.7, "adaptive", CacheMergeConfig()),
        (BLOCKS, 0.99, "fixed", CacheMergeConfig()),
        (BLOCKS, 0.0, "fixed", CacheMergeConfig()),
        (BLOCKS, 0.5, "none", CacheMergeConfig()),
        (BLOCKS, 0.7, "adaptive", CacheMergeConfig(adaptive=True)),
        (BLOCKS, 0.7, "adaptive", CacheMergeConfig(remerge="on-change")),
        (BLOCKS, 0.7, "adaptive", CacheMergeConfig(remerge="per-block")),
        (BLOCKS, 0.6, "adaptive", CacheMergeConfig(adaptive=True, remerge="per-block")),
        (
            GenerationConfig(gen_length=6, temperature=0.7, seed=3, remasking="entropy"),
            0.7,
            "fixed",
            CacheMergeConfig(),
        ),
    ],
    ids=str,
)
def test_one_bundle_serves_every_plan_ratio_and_rhythm(
    backend: OnnxRuntimeBackend,
    cached_oracle: PyTorchBackend,
    reader: Reader,
    generation: GenerationConfig,
    ratio: float,
    schedule: str,
    cache: CacheMergeConfig,
) -> None:
    merge = MergeConfig(1, ratio, schedule, cache=cache)  # type: ignore[arg-type]
    samples = [Sample("A question that is somewhat longer?", picture(60, 80, 5))]
    report = validate_backends([(cached_oracle, backend)], reader.config, reader, samples, generation, merge)
    assert report.passed, report


@pytest.mark.slow
@pytest.mark.parametrize(
    "merge",
    [
        MergeConfig(3, 0.7),
        MergeConfig(0, 0.7),
        MergeConfig(1, 0.7, cache=CacheMergeConfig(restore_norm=False)),
        MergeConfig(1, 0.7, cache=CacheMergeConfig(text_targets=False)),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_cut_and_option_in_a_batch(
    build_bundle: BuildBundle, eager_model: Lavida, merge: MergeConfig, batch: int
) -> None:
    prompts = np.random.default_rng(1).normal(size=(batch, 41, 32)).astype(np.float32)
    prompt = Prompt(prompts, np.concatenate([np.arange(2, 9), np.arange(12, 36)]))  # two pictures
    bundle = build_bundle(merge, ("cached",))
    backends = PyTorchBackend(eager_model, merge, kv_cache=True), OnnxRuntimeBackend(bundle, "cached", device="cpu")
    generation = GenerationConfig(gen_length=6, block_length=3)
    runs = [list(run_loop(backend, prompt, 258, generation, merge, logits=True)) for backend in backends]
    assert_same(*runs)
    assert runs[0][-1].merged


def test_no_picture_merges_nothing(
    backend: OnnxRuntimeBackend, cached_oracle: PyTorchBackend, reader: Reader, bundle: Bundle
) -> None:
    generation = GenerationConfig(gen_length=4)
    runs = []
    for side in (cached_oracle, backend):
        prompt = reader.read(side, "And?", [], generation)
        runs.append(list(run_loop(side, prompt, 258, generation, bundle.manifest.merge, logits=True)))
    assert_same(*runs)
    assert not any(record.merged for record in runs[1])


class _Watched:
    """A session that notes what its inner one holds after every step, and how often each stage ran."""

    first_token = None

    def __init__(self, session: CachedSession, backend: OnnxRuntimeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inner, self.held, self.runs = session, [], []  # type: ignore[var-annotated]
        self.first_token = session.first_token
        for name, stage in backend.stages.items():
            monkeypatch.setattr(stage, "run", self._noting(name, stage.run))

    def _noting(self, name, run):  # type: ignore[no-untyped-def]
        def noted(*arguments, **options):  # type: ignore[no-untyped-def]
            self.runs.append(name)
            return run(*arguments, **options)

        return noted

    def step(self, request: StepRequest):  # type: ignore[no-untyped-def]
        self.runs.clear()
        result = self.inner.step(request)
        groups = (self.inner._tokens, self.inner._attention, self.inner._merged)
        places = [{name: value.data_ptr() for name, value in group.items()} for group in groups]
        self.held.append((*places, list(self.runs)))
        return result


def _watch(
    backend: OnnxRuntimeBackend, monkeypatch: pytest.MonkeyPatch, cache: CacheMergeConfig, **merge: object
) -> list[tuple]:
    prompts = np.random.default_rng(2).normal(size=(1, 41, 32)).astype(np.float32)
    config = MergeConfig(1, **{"ratio": 0.7, "cache": cache} | merge).in_loop(True)  # type: ignore[arg-type]
    inner = backend.start(prompts, np.arange(4, 35), merges=config.schedule != "none")
    assert isinstance(inner, CachedSession)
    with monkeypatch.context() as patch:
        watched = _Watched(inner, backend, patch)
        generation = GenerationConfig(gen_length=6)
        list(denoise(watched, batch=1, visual_tokens=31, mask_token_id=258, generation=generation, merge=config))
    return watched.held


def test_the_full_cache_stays_where_it_is_and_merged_rows_go_into_the_same_buffers(
    backend: OnnxRuntimeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = _watch(backend, monkeypatch, CacheMergeConfig())
    first, *merged = held
    names = {f"{kind}_{layer}" for kind in ("keys", "values") for layer in (2, 3)}
    assert set(first[0]) == names  # what the merge reads, of the layers behind l* = 1
    assert set(first[1]) == {f"attention_{kind}_{layer}" for kind in ("keys", "values") for layer in range(4)}
    for tokens, attention, rows, runs in merged:
        assert tokens == first[0]
        assert attention == {name: place for name, place in first[1].items() if name[-1] in "01"}
        assert rows == merged[0][2]
        assert set(rows) == {f"merged_{name}" for name in names}
        assert runs == ["embed", "front", "merge", "back"]


def test_an_unmerged_answer_holds_one_form_of_the_cache(
    backend: OnnxRuntimeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tokens, attention, rows, runs in _watch(backend, monkeypatch, CacheMergeConfig(), schedule="none"):
        assert (tokens, len(attention), rows) == ({}, 8, {})
        assert runs == ["embed", "front", "decide", "back"]


def test_a_cache_merged_once_lets_the_full_one_go(backend: OnnxRuntimeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    held = _watch(backend, monkeypatch, CacheMergeConfig(remerge="per-block"))
    assert [runs[2] for *_, runs in held] == ["decide", "merge", *["decide"] * 4]
    assert all(tokens == {} for tokens, *_ in held[1:])
    assert len({tuple(rows.items()) for _, _, rows, _ in held[1:]}) == 1


def test_on_change_merges_again_only_where_other_tokens_are_kept(
    backend: OnnxRuntimeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = np.random.default_rng(2).normal(size=(1, 41, 32)).astype(np.float32)
    inner = backend.start(prompts, np.arange(4, 35))
    assert isinstance(inner, CachedSession)
    deciders = np.zeros((1, 5), dtype=np.bool_)
    deciders[0, 1] = True
    request = StepRequest(np.full((1, 5), 258), deciders, True, 9, "if-changed", False, False)
    with monkeypatch.context() as patch:
        watched = _Watched(inner, backend, patch)
        kept = [watched.step(request).kept.tolist() for request in (request, request, replace(request, keep=8))]
    assert [runs.count("merge") for *_, runs in watched.held] == [1, 0, 1]
    assert kept[0] == kept[1]
    assert len(kept[2][0]) == 8


def test_keeping_everything_runs_no_merge(backend: OnnxRuntimeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    for *_, rows, runs in _watch(backend, monkeypatch, CacheMergeConfig(), ratio=0.0):
        assert rows == {}
        assert runs == ["embed", "front", "decide", "back"]


def test_a_bundle_refuses_the_loop_it_was_not_built_for(build_bundle: BuildBundle, bundle: Bundle) -> None:
    cached = build_bundle(MergeConfig(3, 0.7), ("cached",))
    assert (cached.choose_loop(None), cached.choose_loop(True)) == ("cached", "cached")
    assert set(cached.manifest.stages) >= {"prefill", "front", "merge", "back"}
    with pytest.raises(D3tomError, match="built with KV cache"):
        cached.choose_loop(False)
    assert (bundle.choose_loop(None), bundle.choose_loop(True)) == ("uncached", "cached")
