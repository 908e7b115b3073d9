"""Probes see what samples do not: two pictures apart, a batch with deciders of its own, no picture, every embedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import GenerationConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.denoise import Floats, Ints, Session, StepRequest, StepResult
from d3tom_export.model.lavida import Lavida
from d3tom_export.parity.probes import probe_generation, probe_prompts, probed_line, table_difference
from d3tom_export.parity.validate import Report, validate_backends
from d3tom_export.pipeline import Reader
from d3tom_export.prompt.samples import Sample
from tests.conftest import picture

GENERATION = GenerationConfig(gen_length=4)


class _Faulty(PyTorchBackend):
    """The oracle with one fault that a question about one picture never meets."""

    prompt: Callable[[Floats, Ints], tuple[Floats, Ints]] = staticmethod(
        lambda embeddings, visual: (embeddings, visual)
    )
    request: Callable[[StepRequest], StepRequest] = staticmethod(lambda request: request)
    row_7 = 1.0

    def embed_tokens(self, token_ids: Ints) -> Floats:
        return super().embed_tokens(token_ids) * np.where(token_ids == 7, np.float32(self.row_7), 1)[..., None]

    def start(self, prompt_embeddings: Floats, visual_positions: Ints, **more: Any) -> Session:  # type: ignore[override]
        session, change = super().start(*self.prompt(prompt_embeddings, visual_positions), **more), self.request

        class Changed:
            first_token = session.first_token

            def step(self, request: StepRequest) -> StepResult:
                return session.step(change(request))

        return Changed()


def _one_run(embeddings: Floats, visual: Ints) -> tuple[Floats, Ints]:
    return embeddings, visual[:1] + np.arange(len(visual))


def _no_text_only(embeddings: Floats, visual: Ints) -> tuple[Floats, Ints]:
    if not len(visual):
        raise D3tomError("an empty axis")
    return embeddings, visual


def _first_rows_deciders(request: StepRequest) -> StepRequest:
    return replace(request, deciders=np.repeat(request.deciders[:1], len(request.deciders), axis=0))


def _validate(bundle: Bundle, oracle: PyTorchBackend, backend: PyTorchBackend) -> Report:
    samples = [Sample("What is it?", picture(100, 60))]
    reader, merge = Reader.of_bundle(bundle), bundle.manifest.merge
    return validate_backends([(oracle, backend)], bundle.config, reader, samples, GENERATION, merge)


def test_a_right_backend_passes_them(bundle: Bundle, oracle: PyTorchBackend) -> None:
    report = _validate(bundle, oracle, oracle)
    assert report.passed, report.lines()
    assert (report.samples, report.steps, report.probe_steps) == (1, 4, 2 * 4 + 3)
    rows = bundle.config.language.vocab_rows
    assert report.probes == [
        f"{rows} of {rows} rows of the embedding table",
        "two pictures apart, in a batch of two",
        "no picture, an answer of 3 tokens",
    ]
    assert report.not_probed == []


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ({"prompt": _one_run}, "two pictures apart"),
        ({"request": _first_rows_deciders}, "in a batch of two, row 1"),
        ({"prompt": _no_text_only}, "no picture, an answer of 3 tokens: an empty axis"),
        ({"row_7": 1.001}, "embedding table: its rows differ by 1.0e-03"),
    ],
    ids=["one run", "first row's deciders", "no picture", "one embedding"],
)
def test_each_sees_its_fault(
    bundle: Bundle, eager_model: Lavida, oracle: PyTorchBackend, fault: dict[str, Any], named: str
) -> None:
    backend = _Faulty(eager_model, bundle.manifest.merge)
    for name, value in fault.items():
        setattr(backend, name, value)
    report = _validate(bundle, oracle, backend)
    assert not report.passed
    assert any(named in problem for problem in report.problems), report.lines()
    assert not [problem for problem in report.problems if problem.startswith("sample")]


def test_engines_are_asked_only_what_they_were_built_for(bundle: Bundle, oracle: PyTorchBackend) -> None:
    class Narrow(PyTorchBackend):
        def check(self, axes: dict[str, int]) -> None:
            if axes["B"] > 1 or axes["V"] == 1:
                raise D3tomError("built for other sizes")

    narrow = Narrow(oracle._model, bundle.manifest.merge)
    probes, skipped = probe_prompts(bundle.config, GENERATION, narrow)
    assert [probe.name for probe in probes] == ["two pictures apart"]
    assert skipped == [
        "two pictures apart, in a batch of two: built for other sizes",
        "no picture, an answer of 3 tokens: built for other sizes",
        "no picture: built for other sizes",
    ]
    report = _validate(bundle, oracle, narrow)
    assert report.passed
    assert [line for line in report.lines() if "not probed" in line]


def test_probes_are_short_and_without_noise() -> None:
    generation = probe_generation(GenerationConfig(gen_length=32, block_length=16, temperature=0.5))
    assert (generation.gen_length, generation.steps_per_block, generation.temperature) == (32, 4, 0.0)
    assert probe_generation(GENERATION).steps_per_block == 4
    ruled = GenerationConfig(gen_length=32, commit="threshold", max_steps=1, fill_after_end=True)
    assert probe_generation(ruled) == GenerationConfig(gen_length=32, step_ratio=4 / 32)  # merges, whatever the rule
    assert probed_line(["a [x]", "a [y]", "b"]) == "a (2x); b"


def test_a_table_of_another_shape_or_with_nan_is_infinitely_far(bundle: Bundle, oracle: PyTorchBackend) -> None:
    class Other(PyTorchBackend):
        def embed_tokens(self, token_ids: Ints) -> Floats:
            return super().embed_tokens(token_ids) * np.float32(np.nan)

    other = Other(oracle._model, bundle.manifest.merge)
    assert table_difference(oracle, other, bundle.config, GENERATION)[0] == np.inf
    assert table_difference(oracle, oracle, bundle.config, GENERATION) == (0.0, bundle.config.language.vocab_rows)
