"""The first stage that departs: every stage of real answers on a backend, each fed the reference's own inputs.

The answers are those of PyTorch, so an error of one stage reaches no other, and one bad stage is not blamed for the
next. Steps are sampled: the first, the first that merges, one in the middle and the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import GenerationConfig, Loop, MergeConfig
from d3tom_export.diagnosis.compare import (
    LAYER_TOLERANCE,
    SENSITIVE,
    STAGE_TOLERANCE,
    TIED_DECISION,
    TIED_SIMILARITY,
    Difference,
    compare,
)
from d3tom_export.diagnosis.graph import StageGraph
from d3tom_export.diagnosis.layers import Descender
from d3tom_export.diagnosis.reference import Arrays, ReferenceBackend, ReferenceStage
from d3tom_export.diagnosis.report import Departure, Diagnosis, StageResult
from d3tom_export.errors import D3tomError
from d3tom_export.loop.backend import Backend, StageRunner
from d3tom_export.loop.denoise import StepRecord
from d3tom_export.model.lavida import Lavida
from d3tom_export.parity.ties import kept_gap
from d3tom_export.parity.validate import BACKEND_TOLERANCE, Report, expected_from_records
from d3tom_export.pipeline import Reader, embed_sample, run_loop
from d3tom_export.progress import Progress, no_progress
from d3tom_export.prompt.samples import Sample, TokenSample
from d3tom_export.stages.contract import stage_key


def sampled_steps(steps: int) -> list[int]:
    """Which of an answer's steps are looked at: the first, the first that merges, the middle and the last."""
    return sorted({0, min(1, steps - 1), steps // 2, steps - 1})


def first_steps(steps: int) -> list[int]:
    """The same, as many, of an answer of at most so many ``steps``, which may have its last one soon."""
    return list(range(min(4, steps)))


def as_runner(backend: Backend) -> StageRunner:
    """``backend`` as one whose stages run alone; refused where they do not."""
    if isinstance(backend, StageRunner):
        return backend
    raise D3tomError(
        f"The {backend.name} backend cannot run stages one at a time, so it cannot be diagnosed. Choose a backend that "
        "runs the bundle's stages, such as --backend onnxruntime."
    )


class _Loop:
    """One loop under diagnosis: the backend's stages beside the reference's."""

    def __init__(
        self, diagnosis: Diagnosis, bundle: Bundle, loop: Loop, model: Lavida, runner: StageRunner, progress: Progress
    ) -> None:
        self.diagnosis, self._bundle, self._loop, self._runner = diagnosis, bundle, loop, runner
        self._progress = progress
        self._names = {id(module): name for name, module in model.named_modules()}
        self.descend = False
        self.where: str | None = None
        """What is being run, where that is looked at."""
        self.scores: NDArray[np.float32] | None = None
        """(B, V) importance at the step, where it merges."""
        self._tolerance, self._near = STAGE_TOLERANCE[runner.precision], TIED_DECISION[runner.precision]
        self._results = {}
        seen = {result.stage for result in diagnosis.stages}
        for key, spec in bundle.manifest.stages.items():
            if spec.loop in (None, loop) and key not in seen:  # stages that both loops share are judged once
                self._results[spec.name] = StageResult(key, loop, self._tolerance)
        diagnosis.stages += self._results.values()
        self.reference = ReferenceBackend(bundle, loop, model, self._observe)

    def _observe(self, stage: ReferenceStage, inputs: Arrays, reference: Arrays) -> None:
        result = self._results.get(stage.spec.name)
        if self.where is None or result is None:
            return
        result.calls += 1
        differences = self._run(stage, inputs, reference, result)
        self._note(stage, inputs, result, differences)
        if result.calls == 1:
            self._leave_defaults_out(stage, inputs, result, reference)
        if stage.spec.name == "merge" and self._loop == "cached" and result.calls == 1:
            self._ask("decide", inputs)
        if stage.spec.name == "back" and result.calls == 1:
            for name in ("certainty", "candidates"):
                self._ask(name, reference)

    def _note(
        self, stage: ReferenceStage, inputs: Arrays, result: StageResult, differences: Mapping[str, Difference]
    ) -> None:
        for output, difference in differences.items():
            result.note(output, difference)
        departing = {output: difference for output, difference in differences.items() if difference.departs}
        if departing and result.first is None:
            result.first = self.where
        if departing and self.diagnosis.first is None:
            self._first(stage, inputs, departing)

    def _leave_defaults_out(
        self, stage: ReferenceStage, inputs: Arrays, result: StageResult, reference: Arrays
    ) -> None:
        """Run the stage again without the inputs that have their default's value: answers always give them."""
        given = {
            name
            for spec in stage.spec.inputs
            for name in [spec.name]
            if spec.default is not None and name in inputs and (inputs[name] == spec.default).all()
        }
        if given:
            fewer = {name: array for name, array in inputs.items() if name not in given}
            self._note(stage, fewer, result, self._run(stage, fewer, reference, result))

    def _ask(self, name: str, inputs: Arrays) -> None:
        """Ask stage ``name`` with tensors of another, where an answer may pass it over.

        `decide` is asked what `merge` was: where merging goes by the step, only steps that keep all ask it. Greedy
        answers never ask `certainty` or `candidates`.
        """
        stage, result = self.reference.stages.get(name), self._results.get(name)
        if result is not None and isinstance(stage, ReferenceStage):
            result.calls += 1
            asked = {spec.name: inputs[spec.name] for spec in stage.spec.inputs}
            reference = stage.outputs(asked)
            self._note(stage, asked, result, self._run(stage, asked, reference, result))

    def _run(
        self, stage: ReferenceStage, inputs: Arrays, reference: Arrays, result: StageResult
    ) -> dict[str, Difference]:
        """How far each output of the backend's stage is from the reference's."""
        try:
            found: Mapping[str, NDArray[Any]] = self._runner.run_stage(stage.spec.name, inputs, list(reference))
            return self._differences(stage, inputs, found, reference, result)
        except D3tomError as error:
            refused = Difference(np.inf, np.inf, self._tolerance, str(error))
            return dict.fromkeys(reference, refused)

    def _differences(
        self,
        stage: ReferenceStage,
        inputs: Arrays,
        found: Mapping[str, NDArray[Any]],
        reference: Arrays,
        result: StageResult,
    ) -> dict[str, Difference]:
        kept = found.get("kept")
        if kept is not None and self._near_tied(kept, reference["kept"]):
            # Other tokens were kept, by right: what was made of them does not compare.
            result.near_ties += 1
            return {"kept": Difference(0.0, 0.0, self._tolerance)}
        differences = {}
        # Tokens follow from logits: of two that depart, those are the ones to name.
        for output in sorted(reference, key=lambda name: name == "token"):
            expected = reference[output]
            tolerance = self._tolerance * SENSITIVE.get(output, 1.0)
            differences[output] = compare(found.get(output), expected, tolerance)
        if (
            differences.get("token")
            and differences["token"].departs
            and _near_tied_tokens(found, reference, self._near)
        ):
            result.near_ties += 1
            del differences["token"]
        if any(difference.departs and difference.problem is None for difference in differences.values()):
            self._allow_near_ties(stage, inputs, found, reference, differences, result)
        return differences

    def _allow_near_ties(
        self,
        stage: ReferenceStage,
        inputs: Arrays,
        found: Mapping[str, NDArray[Any]],
        reference: Arrays,
        differences: dict[str, Difference],
        result: StageResult,
    ) -> None:
        """Hold what a near-tied merge touched to any of its outcomes.

        Half precisions leave so many ties open that not all of their outcomes can be computed: rows that any of them
        touches are exempt there.
        """
        others = stage.alternatives(inputs, TIED_SIMILARITY[self._runner.precision])
        result.near_ties += bool(others)
        for output, difference in differences.items():
            if others and difference.departs and difference.problem is None:
                expected, outcomes = reference[output], [outcome[output] for outcome in others]
                exempt = None
                if self._runner.precision != "fp32":
                    exempt = (outcomes[0] != expected).any(axis=-1)
                differences[output] = compare(found[output], expected, difference.tolerance, outcomes, exempt)

    def _near_tied(self, kept: NDArray[Any], expected: NDArray[Any]) -> bool:
        """Whether the kept sets differ, and only by tokens whose scores float32 cannot tell apart."""
        if kept.shape != expected.shape or np.array_equal(kept, expected) or self.scores is None:
            return False
        rows = zip(kept, expected, self.scores, strict=True)
        return all(np.array_equal(a, b) or kept_gap(a, b, scores) <= self._near for a, b, scores in rows)

    def _graph(self, name: str) -> tuple[Path, str]:
        """The graph that the backend runs as stage ``name``, and its precision.

        An engine's own graph lies beside the stage's (engines.build.graph_file). ONNX Runtime has no bfloat16 on the
        CPU, so a bfloat16 engine is looked into through the bundle's graph; and so are those of the cached loop, whose
        tensors are others (engines.stages).
        """
        path, precision = self._bundle.stages(self._loop)[name], self._bundle.manifest.precision
        as_built = self._loop == "uncached" and not isinstance(self._runner, OnnxRuntimeBackend)
        if as_built and self._runner.precision in ("fp32", "fp16"):
            for merge_op in ("onnx", "plugin"):
                own = path.with_name(f"{path.stem}.{self._runner.precision}-{merge_op}.onnx")
                if self._bundle.file(own.name) is not None:
                    return own, self._runner.precision
        return path, precision

    def _first(self, stage: ReferenceStage, inputs: Arrays, departing: dict[str, Difference]) -> None:
        assert self.where is not None
        key = stage_key(stage.spec.name, stage.spec.loop, self._bundle.manifest.loops)
        self.diagnosis.first = Departure(key, self._loop, self.where, departing, dict(inputs))
        if not self.descend:
            return
        path, precision = self._graph(stage.spec.name)
        own = path.stem != key
        content = self._bundle.engine_graph(path.name) if own else self._bundle.graph(key)
        graph = StageGraph(path, content, self._bundle.weights_folder)
        tolerances = STAGE_TOLERANCE[precision], LAYER_TOLERANCE[precision]
        descender = Descender(stage, inputs, graph, self._names, tolerances, TIED_SIMILARITY[precision], self._progress)
        self.diagnosis.descent = descender.run(list(departing))


def _near_tied_tokens(found: Mapping[str, NDArray[Any]], reference: Arrays, near: float) -> bool:
    """Whether tokens differ only where PyTorch's own logits leave the choice to rounding."""
    token, expected, logits = found["token"], reference["token"], reference["logits"]
    if token.shape != expected.shape or token.dtype != expected.dtype:
        return False
    if token.min(initial=0) < 0 or token.max(initial=0) >= logits.shape[-1]:
        return False
    chosen = np.take_along_axis(logits, token[..., None], axis=-1)
    best = np.take_along_axis(logits, expected[..., None], axis=-1)
    return bool((best - chosen <= near * np.maximum(np.abs(best), np.abs(chosen))).all())


def diagnose(
    bundle: Bundle,
    model: Lavida,
    backends: Mapping[Loop, Backend],
    reader: Reader | None,
    samples: Sequence[Sample | TokenSample],
    generation: GenerationConfig,
    merge: MergeConfig,
    *,
    layers: bool = False,
    progress: Progress = no_progress,
) -> Diagnosis:
    """Find the first stage of ``backends`` (by loop) that departs from ``model``, and with ``layers`` where inside it.

    ``reader`` may be None where all samples are tokens. Raises :class:`D3tomError` for a backend whose stages cannot
    run alone.
    """
    runners = {loop: as_runner(backend) for loop, backend in backends.items()}
    name, precision = next((backends[loop].name, runner.precision) for loop, runner in runners.items())
    diagnosis = Diagnosis(name, precision, Report("pytorch stages", BACKEND_TOLERANCE))
    for loop, runner in runners.items():
        under = _Loop(diagnosis, bundle, loop, model, runner, progress)
        under.descend = layers
        ways = [(*way, False) for way in _ways_to_merge(bundle, loop, merge)]
        if backends[loop].shares_prefix:  # `extend` is asked too
            ways += [(settings, f"{how}, its prefix shared", True) for settings, how, _ in ways]
        for settings, how, shares in ways:
            oracle = PyTorchBackend(model, settings, kv_cache=loop == "cached")
            for index, sample in enumerate(samples):
                where = f"sample {index}{', with KV cache' if loop == 'cached' else ''}{how}"
                _follow(under, oracle, where, sample, reader, generation, settings, progress, shares=shares)
    progress("stages compared", 1, 1)
    return diagnosis


def _ways_to_merge(bundle: Bundle, loop: Loop, merge: MergeConfig) -> list[tuple[MergeConfig, str]]:
    """``merge``; and of stages for both, a merge at the prefill and at the steps each, which ask other stages."""
    if loop != "cached" or bundle.manifest.merge.merge_at != "prefill":
        return [(merge, "")]
    ways: list[tuple[MergeConfig, str]] = []
    for merge_at, how in (("prefill", ", merged at the prefill"), ("step", ", merged at its steps")):
        other = replace(merge, merge_at=merge_at)  # type: ignore[arg-type]
        try:
            other.check_cached()
        except D3tomError:
            continue  # of another policy or aggregation than the steps' merge has
        ways.append((other, how))
    return ways


def _follow(
    under: _Loop,
    oracle: Backend,
    where: str,
    sample: Sample | TokenSample,
    reader: Reader | None,
    generation: GenerationConfig,
    merge: MergeConfig,
    progress: Progress,
    *,
    shares: bool,
) -> None:
    """One answer, step by step: by the eager model, and by the reference's stages, which the backend's stand beside."""
    mask, cut = under.reference.language.mask_token_id, under.diagnosis.cut
    under.where, under.scores = f"{where}, prompt", None
    prompt = embed_sample(under.reference, sample, reader, generation)
    eager = run_loop(oracle, prompt, mask, generation, merge, logits=True, share_prefix=shares)
    record: StepRecord | None = next(eager)
    if merge.in_loop(oracle.kv_cache).merge_at == "prefill":
        assert record is not None
        under.scores = record.result.scores  # those that decide now, before the first step
    staged = run_loop(under.reference, prompt, mask, generation, merge, logits=True, share_prefix=shares)
    steps = generation.total_steps
    looked_at = (sampled_steps if generation.planned else first_steps)(steps)
    departed = [False] * len(prompt.embeddings)
    cut.samples += 1
    step = 0
    while record is not None:  # stops, and a rule that is sure, leave steps out
        progress(f"comparing stages, {where}", step, steps)
        under.where = f"{where}, step {step}" if step in looked_at else None
        under.scores = record.result.scores
        staged_record = next(staged, None)
        if staged_record is None:
            cut.problems.append(f"{where}: {step} steps ran on the stages, and more on the eager model")
            return
        for row in range(len(record.tokens)):
            here = f"{where}, step {step}"
            (expected,) = expected_from_records([record], row)
            departed[row] = cut.compare_step(here, expected, staged_record, departed=departed[row], row=row)
        record, step = next(eager, None), step + 1
