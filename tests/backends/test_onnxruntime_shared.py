"""A picture's prefill shared between questions on ONNX Runtime: the oracle's answers, what is run, kept and let go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.onnxruntime_prefixes import Prefix, PrefixStore, prefix_key
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.config import CacheMergeConfig, GenerationConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.export import assemble
from d3tom_export.export.request import StageRequest
from d3tom_export.loop.backend import Backend, Prompt
from d3tom_export.loop.denoise import StepRecord
from d3tom_export.loop.prompt_merge import prompt_merge
from d3tom_export.model.lavida import Lavida
from d3tom_export.pipeline import run_loop
from tests.backends.test_onnxruntime import assert_same
from tests.conftest import Shared
from tests.families.checkpoints import write_family

MERGE = MergeConfig(layer=1, ratio=0.7)
BLOCKS = GenerationConfig(gen_length=24, block_length=8, step_ratio=0.5, schedule="shift", suffix_ids=(4, 7))
SHORT = GenerationConfig(gen_length=4)
VISUAL = np.concatenate([np.arange(2, 9), np.arange(12, 36)])
ROWS, PREFIX = 41, 36


def prompt_of(picture: int, question: int, batch: int = 1, rows: int = ROWS, width: int = 32) -> Prompt:
    """A prompt whose prefix follows from ``picture`` alone, and the rest from ``question``."""
    prefix = np.random.default_rng(picture).normal(size=(batch, PREFIX, width))
    rest = np.random.default_rng(100 + question).normal(size=(batch, rows - PREFIX, width))
    return Prompt(np.concatenate([prefix, rest], axis=1).astype(np.float32), VISUAL)


def ask(
    backend: Backend, prompt: Prompt, generation: GenerationConfig, merge: MergeConfig, *, shared: bool = True
) -> list[StepRecord]:
    return list(run_loop(backend, prompt, 258, generation, merge, logits=True, share_prefix=shared))


@pytest.fixture(scope="module", params=["step", "prefill"])
def built(request: pytest.FixtureRequest, sharing_bundle: Bundle, sharing_prefill_bundle: Bundle) -> Bundle:
    """A bundle for either place of merging."""
    return sharing_bundle if request.param == "step" else sharing_prefill_bundle


@pytest.fixture
def backend(built: Bundle) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(built, "cached", device="cpu")


@contextmanager
def counted(backend: OnnxRuntimeBackend) -> Iterator[list[str]]:
    """The names of the stages that run within."""
    names: list[str] = []

    def noting(name: str, run: Callable) -> Callable:  # type: ignore[type-arg]
        def noted(*arguments: object, **options: object) -> object:
            names.append(name)
            return run(*arguments, **options)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for name, stage in backend.stages.items():
            patch.setattr(stage, "run", noting(name, stage.run))
        yield names


@pytest.mark.parametrize("tuned", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ratio": 0.99},
        {"ratio": 0.0},
        {"schedule": "none"},
        {"merge_at": "step", "cache": CacheMergeConfig(remerge="per-block")},
        {"merge_at": "step"},
    ],
    ids=str,
)
def test_two_questions_in_a_batch_are_the_oracle_s(
    built: Bundle, eager_model: Lavida, tuned: bool, changes: dict
) -> None:
    merge = replace(built.manifest.merge, **changes)
    oracle = PyTorchBackend(eager_model, merge, kv_cache=True)
    backend = OnnxRuntimeBackend(built, "cached", device="cpu", tuned=tuned)
    for question, rows in enumerate((ROWS, PREFIX + 1)):  # the second has one row alone behind the picture
        prompt = prompt_of(7, question, 3, rows)
        runs = [ask(each, prompt, BLOCKS, merge) for each in (oracle, backend)]
        assert_same(*runs)
        assert any(record.merged for record in runs[1]) is (merge.schedule != "none")
        assert len(backend.prefixes) == 1


def test_an_even_stride_is_kept_of_a_shared_prefix(sharing_prefill_bundle: Bundle, eager_model: Lavida) -> None:
    merge = replace(sharing_prefill_bundle.manifest.merge, select="uniform")
    backend = OnnxRuntimeBackend(sharing_prefill_bundle, "cached", device="cpu")
    runs = [
        ask(each, prompt_of(7, 1, 3), BLOCKS, merge)
        for each in (PyTorchBackend(eager_model, merge, kv_cache=True), backend)
    ]
    assert_same(*runs)
    assert runs[1][0].merged


def test_a_further_question_runs_its_own_rows_alone(backend: OnnxRuntimeBackend) -> None:
    merge = backend._bundle.manifest.merge
    prefill = {"prefill", "prompt_front", "prompt_merge", "prompt_back"}
    answers = []
    for picture, question, runs_prefill in ((1, 1, True), (1, 2, False), (2, 2, True), (1, 1, False)):
        with counted(backend) as names:
            answers.append(ask(backend, prompt_of(picture, question), SHORT, merge))
        assert bool(prefill & set(names)) is runs_prefill
        assert names.count("extend") == 1
    assert_same(answers[0], answers[3])
    with counted(backend) as names:
        ask(backend, prompt_of(1, 1), SHORT, merge, shared=False)
    assert prefill & set(names)
    assert "extend" not in names


def test_another_merge_of_the_same_picture_is_another_prefix(sharing_prefill_bundle: Bundle) -> None:
    backend = OnnxRuntimeBackend(sharing_prefill_bundle, "cached", device="cpu")
    merge, prompt = sharing_prefill_bundle.manifest.merge, prompt_of(1, 1)
    settings = [
        (merge, SHORT),
        (merge, replace(SHORT, gen_length=5)),  # more masks score
        (replace(merge, ratio=0.5), SHORT),
        (replace(merge, select="uniform"), SHORT),
        (replace(merge, merge_at="step"), SHORT),
    ]
    for count, (own, generation) in enumerate(settings, start=1):
        ask(backend, prompt, generation, own)
        assert len(backend.prefixes) == count
    # No mask scores under an even stride, and nothing is merged as often as nothing is kept back.
    ask(backend, prompt, replace(SHORT, gen_length=6), replace(merge, select="uniform"))
    ask(backend, prompt, SHORT, replace(merge, schedule="none"))
    ask(backend, prompt, SHORT, replace(merge, ratio=0.0))
    assert len(backend.prefixes) == len(settings)


def test_the_store_states_its_bytes_and_lets_the_longest_unasked_go(built: Bundle) -> None:
    merge = built.manifest.merge
    backend = OnnxRuntimeBackend(built, "cached", device="cpu")
    ask(backend, prompt_of(1, 1), SHORT, merge)
    row = 2 * 2 * 8 * 4  # keys and values of two heads of eight float32
    short = PREFIX - 31 + 9
    own = 4 * PREFIX * row if merge.merge_at == "step" else 2 * (PREFIX + short) * row
    assert backend.prefixes.nbytes == own
    small = OnnxRuntimeBackend(built, "cached", device="cpu", prefix_bytes=2 * own)
    for picture in (1, 2, 1, 3):
        ask(small, prompt_of(picture, 1), SHORT, merge)
    assert small.prefixes.nbytes == 2 * own
    with counted(small) as names:
        ask(small, prompt_of(1, 2), SHORT, merge)
        ask(small, prompt_of(3, 2), SHORT, merge)
    assert not {"prefill", "prompt_front"} & set(names)
    with counted(small) as names:
        ask(small, prompt_of(2, 2), SHORT, merge)
    assert {"prefill", "prompt_front"} & set(names)
    none = OnnxRuntimeBackend(built, "cached", device="cpu", prefix_bytes=own - 1)
    assert_same(ask(none, prompt_of(1, 1), SHORT, merge), ask(backend, prompt_of(1, 1), SHORT, merge))
    assert none.prefixes.nbytes == 0


def test_the_key_is_all_that_a_prefix_follows_from() -> None:
    embeddings, merge = prompt_of(1, 1, 2).embeddings, replace(MERGE, merge_at="prefill")
    asked = prompt_merge(merge.in_loop(True), SHORT, 258, batch=2, visual_tokens=31, logits=False)
    assert asked is not None
    scores = np.ones((2, 31), dtype=np.float32)
    variants = [
        (embeddings, VISUAL, None),
        (embeddings[:1], VISUAL, None),
        (embeddings.reshape(1, 2 * ROWS, 32), VISUAL, None),
        (embeddings + np.float32(1e-3), VISUAL, None),
        (embeddings, VISUAL[1:], None),
        (embeddings, VISUAL, asked),
        (embeddings, VISUAL, replace(asked, keep=5)),
        (embeddings, VISUAL, replace(asked, answer_ids=asked.answer_ids + 1)),
        (embeddings, VISUAL, replace(asked, deciders=~asked.deciders)),
        (embeddings, VISUAL, replace(asked, selection_scores=scores)),
        (embeddings, VISUAL, replace(asked, selection_scores=scores + 1)),
    ]
    assert len({prefix_key(*variant) for variant in variants}) == len(variants)
    assert prefix_key(*variants[5]) == prefix_key(embeddings.copy(), VISUAL, replace(asked, logits=True))
    # Whoever scores from outside asks no mask.
    other = replace(asked, selection_scores=scores, answer_ids=asked.answer_ids[:, :2])
    assert prefix_key(*variants[9]) == prefix_key(embeddings, VISUAL, other)


def test_a_store_counts_what_it_holds() -> None:
    def prefix(rows: int) -> Prefix:
        return Prefix({"keys_0": np.zeros((1, rows, 2, 4), dtype=np.float32)}, np.zeros((1, 0), dtype=np.int64))

    store = PrefixStore(most_bytes=32 * 10)
    for key, rows, held in ((b"a", 4, 4), (b"b", 6, 10), (b"c", 11, 10), (b"d", 1, 7)):
        store.keep(key, prefix(rows))
        assert store.nbytes == 32 * held
    assert store.get(b"a") is None  # the first to go
    assert store.get(b"c") is None  # larger than all that is kept
    assert store.get(b"b") is not None


def test_nothing_of_the_question_is_kept_and_the_answer_s_buffers_are_its_own(backend: OnnxRuntimeBackend) -> None:
    merge = backend._bundle.manifest.merge
    ask(backend, prompt_of(1, 1), BLOCKS, merge)
    (prefix,) = backend.prefixes._kept.values()
    before = {name: array.copy() for name, array in prefix.tokens.items()}
    assert {name: array.shape[1] for name, array in before.items() if name.endswith("_0")} == {
        "keys_0": PREFIX,
        "values_0": PREFIX,
    }
    ask(backend, prompt_of(1, 2), BLOCKS, merge)
    assert all(np.array_equal(prefix.tokens[name], array) for name, array in before.items())


def test_a_prompt_with_nothing_to_share_runs_as_ever(backend: OnnxRuntimeBackend) -> None:
    merge = backend._bundle.manifest.merge
    none = replace(prompt_of(1, 1), visual_positions=np.zeros(0, dtype=np.int64))
    at_the_end = replace(prompt_of(1, 1), visual_positions=np.arange(20, ROWS))
    for prompt in (none, at_the_end):
        with counted(backend) as names:
            records = ask(backend, prompt, SHORT, merge)
        assert "extend" not in names
        assert_same(records, ask(backend, prompt, SHORT, merge, shared=False))
    assert backend.prefixes.nbytes == 0


def test_bundles_without_the_stage_and_loops_without_a_cache_refuse_it(bundle: Bundle, sharing_bundle: Bundle) -> None:
    plain = OnnxRuntimeBackend(bundle, "cached", device="cpu")
    assert not plain.shares_prefix
    with pytest.raises(D3tomError, match="Build it anew with --kv-cache and --share-prefix"):
        ask(plain, prompt_of(1, 1), SHORT, MERGE)
    with pytest.raises(D3tomError, match="Run that with --kv-cache"):
        ask(OnnxRuntimeBackend(sharing_bundle, device="cpu"), prompt_of(1, 1), SHORT, MERGE)


@pytest.fixture(scope="module", params=["step", "prefill"])
def shifted(request: pytest.FixtureRequest, shared: Shared) -> tuple[Bundle, Path]:
    """A sharing bundle of the family with a row shift, and its checkpoint."""

    def fill(folder: Path) -> None:
        (folder / "bundle").mkdir()
        checkpoint = open_checkpoint(write_family(folder / "source", "lavida-dream"))
        stages = StageRequest(replace(MERGE, merge_at=request.param), ("cached",), share_prefix=True)
        assemble.write_stages(checkpoint, stages, GenerationConfig(gen_length=8), folder / "bundle")

    folder = shared(f"shifted sharing {request.param}", fill)
    return load_bundle(folder / "bundle"), folder / "source"


@pytest.mark.slow
@pytest.mark.parametrize("tuned", [True, False])
def test_the_rest_s_last_row_gives_the_first_token_where_rows_are_shifted(
    shifted: tuple[Bundle, Path], tuned: bool
) -> None:
    bundle, source = shifted
    merge, language = bundle.manifest.merge, bundle.config.language
    oracle = PyTorchBackend(load_model(open_checkpoint(source)), merge, kv_cache=True)
    sides = oracle, OnnxRuntimeBackend(bundle, "cached", device="cpu", tuned=tuned)
    firsts = []
    for question, rows in enumerate((ROWS, ROWS, PREFIX + 1)):
        prompt = prompt_of(3, question, 3, rows, language.d_model)
        settings = (replace(BLOCKS, suffix_ids=()), merge)
        runs = [
            list(run_loop(side, prompt, language.mask_token_id, *settings, logits=True, share_prefix=True))
            for side in sides
        ]
        assert_same(*runs)
        firsts.append(runs[1][0].tokens[:, 0].tolist())
    assert firsts[0] != firsts[1]
