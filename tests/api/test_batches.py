"""Many requests at once: which run together, and that each answer is the one that its request gets alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import d3tom_export as d3
from d3tom_export.api import model as model_module
from d3tom_export.api.batches import Ready, batch_limit, grouped
from d3tom_export.api.settings import Asked
from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.backend import Backend, Prompt
from d3tom_export.pipeline import Reader
from d3tom_export.quality.dataset import samples_of
from tests.conftest import picture

PICTURES = [None, *(picture(60, 40, seed) for seed in range(3)), picture(40, 60, 9), [picture(40, 40), picture(60, 40)]]
QUESTIONS = ["What?", "When", "Is it?", "How many of them are there?"]

REQUESTS = st.lists(
    st.builds(
        lambda image, question, seed, more: d3.Request(image, question, seed=seed, **more),
        st.sampled_from(PICTURES),
        st.sampled_from(QUESTIONS),
        st.integers(0, 3),
        st.sampled_from(
            [
                {},
                {"gen_length": 6},
                {"gen_length": 12, "block_length": 6, "step_ratio": 0.5},
                {"temperature": 0.8},
                {"schedule": "none"},
                {"ratio": 0.3, "schedule": "fixed", "commit": "threshold", "threshold": 0.02},
                {"commit": "frechet"},
                {"raw_text": True, "step_schedule": "shift"},
            ]
        ),
    ),
    min_size=2,
    max_size=10,
)


def _same(many: Sequence[d3.Answer | D3tomError], alone: Sequence[d3.Answer]) -> None:
    for found, expected in zip(many, alone, strict=True):
        assert isinstance(found, d3.Answer)
        assert (found.token_ids, found.text, found.kept) == (expected.token_ids, expected.text, expected.kept)
        assert found.generation == expected.generation


@settings(max_examples=12)
@given(requests=REQUESTS, batch=st.integers(2, 5))
def test_answers_are_those_of_one_at_a_time(model: d3.Model, requests: list[d3.Request], batch: int) -> None:
    """Token for token, under every plan; under commit rules too, where those that would share a K run alone."""
    alone = [model.answer(each.image, each.question, **each.settings) for each in requests]
    _same(model.answer_many(requests, batch=batch), alone)


def _watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of answers that run together from now on."""
    sizes: list[int] = []
    together = model_module.answer_together

    def counted(backend: Backend, group: Sequence[Ready]) -> list[d3.Answer] | None:
        sizes.append(len(group))
        return together(backend, group)

    monkeypatch.setattr(model_module, "answer_together", counted)
    return sizes


def test_scenes_of_the_bundled_model(tiny_bundle: Bundle, tiny: d3.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained model ends its answers at different steps."""
    data = samples_of(tiny_bundle.folder)
    requests = [d3.Request(data.decode(item, data.contents(item)), item.question) for item in data.first(10)]
    for settings_ in ({"steps": 4}, {"commit": "threshold", "schedule": "none"}):
        asked = [d3.Request(each.image, each.question, **settings_) for each in requests]  # type: ignore[arg-type]
        alone = [tiny.answer(each.image, each.question, **each.settings) for each in asked]
        with monkeypatch.context() as patch:
            sizes = _watch(patch)
            _same(tiny.answer_many(asked), alone)
        assert sum(sizes) == 10
        assert max(sizes) > 1


def test_equal_layouts_run_together_and_others_apart(model: d3.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = _watch(monkeypatch)
    image, tall = picture(60, 40), picture(40, 60)
    asked = [(image, "What?"), (tall, "What?"), (image, "When?"), (image, "Whence?"), (None, "What?"), (image, "Whoa?")]
    model.answer_many([d3.Request(*each, gen_length=4, seed=seed) for seed, each in enumerate(asked)])
    assert sizes == [3, 1, 1, 1]
    sizes.clear()
    model.answer_many([d3.Request(image, "What?", gen_length=4)] * 7, batch=3)
    assert sizes == [3, 3, 1]
    sizes.clear()
    model.answer_many([d3.Request(image, "What?", gen_length=length) for length in (4, 5, 4)], batch=8)
    assert sizes == [2, 1]
    for batch in (0, "4", None):
        with pytest.raises(D3tomError, match="A batch of"):
            model.answer_many([], batch=batch)  # type: ignore[arg-type]
    assert model.answer_many([]) == []


def test_one_that_fails_loses_no_other(model: d3.Model) -> None:
    image = picture(60, 40)
    good = model.answer(image, "What?", gen_length=4)
    asked: list[Any] = [
        (image, "What?"),
        ("absent.png", "What?"),
        (image, "long " * 200),
        (image, None),
        (image, "What?"),
    ]
    found = model.answer_many([d3.Request(*each, gen_length=4) for each in asked])
    assert [isinstance(each, D3tomError) for each in found] == [False, True, True, True, False]
    for place, says in ((1, "does not exist"), (2, "exceeds this model's limit"), (3, "None was given for a question")):
        assert says in str(found[place])
    _same([found[0], found[4]], [good, good])


def test_where_a_batch_does_not_go_its_requests_run_alone(model: d3.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [d3.Request(picture(60, 40, seed), "What?", gen_length=4) for seed in range(3)]
    alone = [model.answer(each.image, each.question, **each.settings) for each in requests]
    start = OnnxRuntimeBackend.start

    def lacking(backend: OnnxRuntimeBackend, embeddings: np.ndarray, *rest: Any, **more: Any) -> Any:
        if len(embeddings) > 1:
            raise RuntimeError("no memory for that")
        return start(backend, embeddings, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntimeBackend, "start", lacking)
        sizes = _watch(patch)
        _same(model.answer_many(requests), alone)
        assert sizes == [3, 1, 1, 1]

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory at all")

    monkeypatch.setattr(OnnxRuntimeBackend, "start", broken)
    found = model.answer_many(requests)
    assert all("unexpected RuntimeError: no memory at all" in str(each) for each in found)
    assert all(isinstance(each, D3tomError) and isinstance(each.__cause__, RuntimeError) for each in found)


def test_a_model_that_is_closed_meanwhile_loses_no_answer(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with d3.open(bundle.folder, device="cpu", kv_cache=False) as model:
        requests = [d3.Request(None, "What?", gen_length=2) for _ in range(3)]

        def some() -> Any:
            yield from requests * 4
            monkeypatch.setattr(model, "_ready", ready_and_close)
            yield from requests

        ready = model._ready

        def ready_and_close(*asked: Any) -> Ready:
            found = ready(*asked)
            if len(closing := [*closed, found]) == 3:
                model.close()
            closed[:] = closing
            return found

        closed: list[Ready] = []
        found = model.answer_many(some(), batch=3)
    assert [isinstance(each, d3.Answer) for each in found] == [True] * 12 + [False] * 3
    assert all("is closed" in str(each) for each in found[12:])


class _UpTo:
    """A backend whose engines are built for so many answers at once."""

    def __init__(self, most: int) -> None:
        self._most = most

    def check(self, axes: dict[str, int]) -> None:
        if axes["B"] > self._most:
            raise D3tomError("built for fewer")


def test_engines_say_how_many_run_at_once() -> None:
    for most, batch, expected in ((1, 8, 1), (3, 8, 3), (9, 8, 8), (3, 2, 2)):
        assert batch_limit(_UpTo(most), batch) == expected  # type: ignore[arg-type]
    assert batch_limit(object(), 8) == 8  # type: ignore[arg-type]


def test_what_shares_a_layout(bundle: Bundle) -> None:
    reader, merge = Reader.of_bundle(bundle), MergeConfig(1, 0.7)
    plan = GenerationConfig(gen_length=8)
    prompt = Prompt(np.zeros((1, 20, 4), np.float32), np.arange(3, 12))

    def groups(*others: tuple[dict[str, Any], dict[str, Any]], kv_cache: bool = False) -> list[list[int]]:
        ready = {}
        for place, (of_asked, of_prompt) in enumerate([({}, {}), *others]):
            asked = replace(Asked(reader, plan, merge, False, False), **of_asked)
            ready[place] = Ready(asked, replace(prompt, **of_prompt), 0.0)
        return grouped(ready, kv_cache, 8)

    together: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"generation": replace(plan, seed=3)}, {}),
        ({"raw_text": True}, {}),
    ]
    assert groups(*together) == [[0, 1, 2]]
    for of_asked, of_prompt in (
        ({}, {"embeddings": np.zeros((1, 21, 4), np.float32)}),
        ({}, {"visual_positions": np.arange(4, 13)}),
        ({}, {"visual_positions": np.arange(3, 11)}),
        ({"generation": replace(plan, gen_length=9)}, {}),
        ({"generation": replace(plan, suffix_ids=(1,))}, {}),
        ({"merge": replace(merge, ratio=0.5)}, {}),
        ({"share_prefix": True}, {}),
    ):
        assert groups((of_asked, of_prompt)) == [[0], [1]]
    rule = replace(plan, commit="threshold")
    two = [({"generation": rule}, {})] * 2
    assert groups(*two) == [[0], [1], [2]]  # the adaptive ratio would be one row's
    assert groups(*two, kv_cache=True) == [[0], [1, 2]]  # with a cache the ratio is fixed
    blind = [({"generation": rule}, {"visual_positions": np.zeros(0, np.int64)})] * 2
    assert groups(*blind) == [[0], [1, 2]]
    assert groups(*[({"share_prefix": True}, {})] * 2) == [[0], [1], [2]]
