"""A prompt merged at its prefill on ONNX Runtime against the oracle: sizes, batches, cuts, and what is held."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.onnxruntime_sessions import CachedSession
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.config import CacheMergeConfig, GenerationConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.export import assemble
from d3tom_export.export.request import StageRequest
from d3tom_export.loop.backend import Backend, Prompt
from d3tom_export.loop.denoise import denoise
from d3tom_export.loop.prompt_merge import best_of, prompt_merge
from d3tom_export.model.lavida import Lavida
from d3tom_export.parity.validate import validate_backends
from d3tom_export.pipeline import Reader, run_loop
from d3tom_export.prompt.samples import Sample
from tests.backends.test_onnxruntime import PICTURES, assert_same
from tests.backends.test_onnxruntime_cached import _Watched
from tests.conftest import BuildBundle, Shared, picture
from tests.families.checkpoints import write_family

MERGE = MergeConfig(layer=1, ratio=0.7, merge_at="prefill")
BLOCKS = GenerationConfig(gen_length=24, block_length=8, step_ratio=0.5, schedule="shift")


@pytest.fixture(scope="module")
def backend(prefill_bundle: Bundle) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(prefill_bundle, "cached", device="cpu")


@pytest.fixture(scope="module")
def oracle(eager_model: Lavida) -> PyTorchBackend:
    return PyTorchBackend(eager_model, MERGE, kv_cache=True)


@pytest.fixture(scope="module")
def reader(prefill_bundle: Bundle) -> Reader:
    return Reader.from_folder(prefill_bundle.folder, prefill_bundle.config)


def of_three() -> Prompt:
    """A batch of three with two pictures apart."""
    prompts = np.random.default_rng(1).normal(size=(3, 41, 32)).astype(np.float32)
    return Prompt(prompts, np.concatenate([np.arange(2, 9), np.arange(12, 36)]))


def test_the_best_are_chosen_as_the_oracle_does() -> None:
    """Lower positions first among equals."""
    scores = np.array([[0.1, 0.5, 0.5, 0.9, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0]], dtype=np.float32)
    assert best_of(scores, 3).tolist() == [[1, 2, 3], [0, 1, 2]]


def test_one_bundle_serves_pictures_of_every_size(
    backend: OnnxRuntimeBackend, oracle: PyTorchBackend, reader: Reader
) -> None:
    samples = [Sample("What is it?", picture(*size, seed)) for seed, size in enumerate(PICTURES)]
    generation = GenerationConfig(gen_length=8)
    report = validate_backends([(oracle, backend)], reader.config, reader, samples, generation, MERGE)
    assert report.passed, report
    assert report.samples == len(PICTURES)


@pytest.mark.parametrize("tuned", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ratio": 0.99},
        {"ratio": 0.0},
        {"schedule": "none"},
        {"select": "uniform"},
        {"keep_multiple": 8},
        {"merge_at": "step"},
        {"merge_at": "step", "cache": CacheMergeConfig(remerge="per-block")},
    ],
    ids=str,
)
def test_one_bundle_serves_every_ratio_and_both_ways_in_a_batch(
    prefill_bundle: Bundle, eager_model: Lavida, tuned: bool, changes: dict
) -> None:
    merge = replace(MERGE, **changes)
    backends: list[Backend] = [
        PyTorchBackend(eager_model, merge, kv_cache=True),
        OnnxRuntimeBackend(prefill_bundle, "cached", device="cpu", tuned=tuned),
    ]
    generation = replace(BLOCKS, suffix_ids=(4, 7))
    runs = [list(run_loop(each, of_three(), 258, generation, merge, logits=True)) for each in backends]
    assert_same(*runs)
    if merge.merge_at == "prefill" and merge.schedule != "none":
        assert all(record.merged for record in runs[1])
        kept = runs[1][0].result.kept
        assert kept is not None
        assert all(np.array_equal(record.result.kept, kept) for record in runs[1])


def test_keeping_everything_gives_the_plain_prefill_s_numbers(backend: OnnxRuntimeBackend, bundle: Bundle) -> None:
    plain = OnnxRuntimeBackend(bundle, "cached", device="cpu")
    unmerged = replace(MERGE, schedule="none")
    runs = [
        list(run_loop(side, of_three(), 258, BLOCKS, merge, logits=True))
        for side, merge in ((plain, unmerged), (backend, unmerged), (backend, replace(MERGE, ratio=0.0)))
    ]
    for first, second, third in zip(*runs, strict=True):
        np.testing.assert_allclose(first.result.logits, second.result.logits, atol=1e-5, rtol=0)
        np.testing.assert_allclose(first.result.logits, third.result.logits, atol=1e-5, rtol=0)


def test_no_picture_merges_nothing(backend: OnnxRuntimeBackend, oracle: PyTorchBackend, reader: Reader) -> None:
    generation = GenerationConfig(gen_length=4)
    runs = []
    for side in (oracle, backend):
        prompt = reader.read(side, "And?", [], generation)
        runs.append(list(run_loop(side, prompt, 258, generation, MERGE, logits=True)))
    assert_same(*runs)
    assert not any(record.merged for record in runs[1])


def test_the_later_layers_hold_the_short_prompt_alone(
    backend: OnnxRuntimeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation, prompt = GenerationConfig(gen_length=4), of_three()
    asked = prompt_merge(MERGE.in_loop(True), generation, 258, batch=3, visual_tokens=31, logits=False)
    rotated: list[list[int]] = []
    inner_run = backend.stages["rotate"].run

    def run(inputs, outputs=(), **more):  # type: ignore[no-untyped-def]
        rotated.append(inputs["keys"].shape())
        return inner_run(inputs, outputs, **more)

    with monkeypatch.context() as patch:
        patch.setattr(backend.stages["rotate"], "run", run)
        inner = backend.start(prompt.embeddings, prompt.visual_positions, merges=False, prompt_merge=asked)
    assert isinstance(inner, CachedSession)
    short = 41 - 31 + 9
    assert rotated == [[3, 41, 2, 8], [3, 41, 2, 8], [3, short, 2, 8], [3, short, 2, 8]]
    assert inner._tokens == {}
    assert set(inner._attention) == {f"attention_{kind}_{layer}" for kind in ("keys", "values") for layer in (0, 1)}
    assert {tuple(value.shape()) for value in inner._merged.values()} == {(3, 2, short, 8)}
    with monkeypatch.context() as patch:
        watched = _Watched(inner, backend, patch)
        loop = MERGE.in_loop(True)
        list(denoise(watched, batch=3, visual_tokens=31, mask_token_id=258, generation=generation, merge=loop))
    for tokens, attention, merged, runs in watched.held:
        assert (tokens, len(attention), len(merged)) == ({}, 4, 4)
        assert runs == ["embed", "front", "decide", "back"]


def test_a_bundle_built_for_the_steps_refuses_the_prefill(bundle: Bundle) -> None:
    backend = OnnxRuntimeBackend(bundle, "cached", device="cpu")
    with pytest.raises(D3tomError, match="built with --merge-at step"):
        run_loop(backend, of_three(), 258, BLOCKS, MERGE)


@pytest.mark.slow
@pytest.mark.parametrize("merge", [replace(MERGE, layer=0, aggregate="mean"), replace(MERGE, layer=2)], ids=str)
def test_every_cut_and_aggregate(build_bundle: BuildBundle, eager_model: Lavida, merge: MergeConfig) -> None:
    bundle = build_bundle(merge, ("cached",))
    backends = PyTorchBackend(eager_model, merge, kv_cache=True), OnnxRuntimeBackend(bundle, "cached", device="cpu")
    assert_same(*[list(run_loop(each, of_three(), 258, BLOCKS, merge, logits=True)) for each in backends])


@pytest.fixture(scope="module")
def shifted(shared: Shared) -> tuple[Bundle, Path]:
    """A bundle of the family with a row shift, and its checkpoint."""

    def fill(folder: Path) -> None:
        (folder / "bundle").mkdir()
        checkpoint = open_checkpoint(write_family(folder / "source", "lavida-dream"))
        request = StageRequest(replace(MERGE, aggregate="mean"), ("cached",))
        assemble.write_stages(checkpoint, request, GenerationConfig(gen_length=8), folder / "bundle")

    folder = shared("shifted prefill", fill)
    return load_bundle(folder / "bundle"), folder / "source"


@pytest.mark.slow
def test_the_short_prompt_s_last_row_gives_the_first_token_where_rows_are_shifted(
    shifted: tuple[Bundle, Path],
) -> None:
    bundle, source = shifted
    merge, language = bundle.manifest.merge, bundle.config.language
    prompts = np.random.default_rng(3).normal(size=(3, 41, language.d_model)).astype(np.float32)
    prompt, generation = Prompt(prompts, of_three().visual_positions), GenerationConfig(gen_length=6, block_length=3)
    oracle = PyTorchBackend(load_model(open_checkpoint(source)), merge, kv_cache=True)
    firsts, runs = [], []
    for merging in (merge, replace(merge, schedule="none")):
        for tuned in (True, False):
            sides: tuple[Backend, ...] = (oracle, OnnxRuntimeBackend(bundle, "cached", device="cpu", tuned=tuned))
            records = [
                list(run_loop(s, prompt, language.mask_token_id, generation, merging, logits=True)) for s in sides
            ]
            assert_same(*records)
            runs.append(records[1])
            firsts.append(records[1][0].tokens[:, 0].tolist())
    assert firsts[0] == firsts[1] != firsts[2] == firsts[3]  # the merge has changed what that row predicts
