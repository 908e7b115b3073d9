"""Parity in low precision: a backend against PyTorch in the same precision, on PyTorch's own answer (design.md).

Two runs in fp16 part ways at the first token that rounding turns, and everything after it compares nothing. So here the
oracle leads: at every step the backend is asked the same question, and what it would have chosen is compared. Beside
them runs the oracle's witness, the same weights without the precision's roundings, and how far that is from the oracle
bounds how far the backend may be (:mod:`d3tom_export.parity.bounds`): tokens, logits, confidences, kept sets,
embeddings. Where a backend rightly kept another token, whose score was as good, the oracle repeats the step with the
backend's kept set, so that the logits compare all the same; or where the prompt was merged at its prefill, the prefill.

int8 has no oracle of its own precision, and is meant to stand in for float32: it is held against PyTorch in float32,
and the witness is the one that rounds, as the int8 graphs do. Where products round their inputs to float8, float32 is
bounded too, for a sum in another order may send a number to the next float8: its witness does not round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from d3tom_export.config import GenerationConfig, MergeConfig, ModelConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.backend import Backend, Prompt
from d3tom_export.loop.denoise import Floats, Session, StepRecord, StepResult, denoise, of_answer
from d3tom_export.loop.prompt_merge import prompt_merge
from d3tom_export.loop.sampling import commit
from d3tom_export.parity.bounds import (
    INT8_AGREEMENT,
    Bound,
    Measured,
    bounds,
    kept_bound,
    log_odds,
    relative_difference,
    rms_difference,
    score_difference,
)
from d3tom_export.parity.choice import check_choice
from d3tom_export.parity.probes import (
    noise_views,
    probe_note,
    probe_prompts,
    probed_line,
    table_difference,
)
from d3tom_export.parity.ties import kept_gap
from d3tom_export.parity.trio import Trio
from d3tom_export.parity.validate import OWN_WEIGHTS
from d3tom_export.pipeline import Reader, embed_sample
from d3tom_export.progress import Progress, no_progress
from d3tom_export.prompt.samples import Sample, TokenSample

__all__ = ["INT8_AGREEMENT", "AgreementReport", "Oracle", "StepAgreement", "compare_in_step"]


class Oracle(Backend, Protocol):
    """A backend that has a witness: PyTorch."""

    def witness(self, precision: str) -> Backend:
        """The same weights without the roundings of ``precision`` (of fp32: of products' inputs), or of int8 with."""


@dataclass
class StepAgreement:
    """How one step of all answers agreed."""

    positions: int = 0
    """Answer positions still masked, over the answers."""
    same_tokens: int = 0
    """Of those, positions with the same likeliest token."""

    @property
    def share(self) -> float:
        return self.same_tokens / self.positions if self.positions else 1.0


@dataclass
class AgreementReport:
    """The outcome; ``to_json`` is what ``validate --json`` writes for a backend in low precision."""

    backend: str
    precision: str
    samples: int = 0
    steps: int = 0
    tokens_identical: bool = True
    transfers_identical: bool = True
    """Whether the same positions would have been committed at every step."""
    kept_identical: bool = True
    """Up to near-ties."""
    near_ties: int = 0
    """Steps whose kept sets differ by tokens whose scores are as close as the precision can tell."""
    true_flips: int = 0
    """Steps whose kept sets differ by more."""
    max_kept_gap: float = 0.0
    """Largest relative gap of scores across which tokens changed places."""
    max_abs_logit_error: float = 0.0
    max_relative_logit_error: float = 0.0
    """Relative to the largest logit of its step."""
    max_relative_embedding_error: float = 0.0
    """Of the prompts' embeddings, pictures among them, relative to the largest."""
    share_prefix: bool = False
    """Whether what questions share was prefilled by itself, in the loop with a KV cache."""
    probes: list[str] = field(default_factory=list)
    """What was run beside the samples (parity/probes.py)."""
    not_probed: list[str] = field(default_factory=list)
    """What was not, and why."""
    compared_with: str = OWN_WEIGHTS
    """Whose weights the oracle has."""
    graphs: list[str] = field(default_factory=list)
    """Of a backend that has two kinds of graphs, those that were run."""
    by_step: list[StepAgreement] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    """Every figure that is bounded, of each kind of loop."""
    problems: list[str] = field(default_factory=list)

    @property
    def token_agreement(self) -> float:
        """Share of positions with the same likeliest token, over all steps."""
        positions = sum(step.positions for step in self.by_step)
        return sum(step.same_tokens for step in self.by_step) / positions if positions else 0.0

    @property
    def token_agreement_needed(self) -> float:
        """The share that passes; of several loops the highest."""
        shares = [bound.allowed for bound in self.bounds if bound.name == "share of other tokens"]
        return 1.0 - min(shares, default=0.0)

    @property
    def reference(self) -> str:
        """The precision of the oracle."""
        return "fp32" if self.precision == "int8" else self.precision

    @property
    def passed(self) -> bool:
        return (
            self.samples > 0
            and self.steps > 0
            and bool(self.bounds)
            and all(bound.holds for bound in self.bounds)
            and self.kept_identical
            and not self.problems
        )

    @property
    def failures(self) -> list[str]:
        """Why it did not pass: the problems, and the bounds that do not hold."""
        broken = [bound for bound in self.bounds if not bound.holds]
        return [*self.problems, *(f"{b.name}{f', {b.where}' if b.where else ''}: {b}" for b in broken)]

    def to_json(self) -> dict[str, Any]:
        raw = {each.name: getattr(self, each.name) for each in fields(self)}
        del raw["by_step"]
        # JSON knows no NaN or infinity; null, and a failed report, stand for them.
        raw = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in raw.items()}
        raw["bounds"] = [bound.to_json() for bound in self.bounds]
        raw["token_agreement"] = self.token_agreement
        raw["token_agreement_needed"] = self.token_agreement_needed
        raw["token_agreement_by_step"] = [step.share for step in self.by_step]
        return {"passed": self.passed, **raw}

    def lines(self) -> list[str]:
        """The report for people."""
        worst = min((step.share for step in self.by_step), default=0.0)
        differing = self.near_ties + self.true_flips
        lines = [
            f"{'PASSED' if self.passed else 'FAILED'}: {self.backend} in {self.precision} against PyTorch in "
            f"{self.reference}{', prefixes shared' if self.share_prefix else ''}, {self.samples} answers, "
            f"{self.steps} steps",
            f"  oracle       {self.compared_with}",
            f"  kept sets    {self.steps - differing} of {self.steps} steps identical, {self.near_ties} near-ties, "
            f"{self.true_flips} true flips",
            f"  tokens       {self.token_agreement:.2%} of positions agree, {worst:.1%} at the worst step "
            f"(needed {self.token_agreement_needed:.1%} of all)",
        ]
        for bound in self.bounds:
            where = f", {bound.where}" if bound.where else ""
            lines.append(f"  {'  ' if bound.holds else '! '}{bound.name}{where}: {bound}")
        if self.probes:
            lines.append(f"  probed       {probed_line(self.probes)}")
        lines += [f"  not probed   {reason}" for reason in self.not_probed]
        return [*lines, *(f"  - {problem}" for problem in self.problems[:10])]


class _Comparison:
    """One oracle, one backend, one kind of loop: how far apart they are, and how far they may be."""

    def __init__(self, report: AgreementReport, oracle: Oracle, backend: Backend, config: ModelConfig) -> None:
        self._shares = report.share_prefix and backend.kv_cache
        self.report, self.oracle, self.backend, self.config = report, oracle, backend, config
        self.witness = oracle.witness(backend.precision)
        self.where = ", with KV cache" if backend.kv_cache else ""
        self.asked, self.random = Measured(), Measured()

    def embeddings(self, where: str, prompts: Sequence[Prompt]) -> None:
        """Compare a prompt of the oracle, the backend and the witness; the steps that follow are given the oracle's."""
        expected, found, seen = prompts
        visual = np.zeros(expected.embeddings.shape[1], dtype=np.bool_)
        visual[expected.visual_positions] = True
        if found.embeddings.shape != expected.embeddings.shape or not np.isfinite(found.embeddings).all():
            self.report.max_relative_embedding_error = float("inf")
            self.report.problems.append(f"{where}: embeddings of another shape, or not finite")
            return
        for name, rows in (("prompt", ~visual), ("pictures", visual)):
            for distances, other in self.asked.both(found, seen):
                difference = relative_difference(other.embeddings[:, rows], expected.embeddings[:, rows])
                getattr(distances, name).append(difference)
        error = relative_difference(found.embeddings, expected.embeddings)
        self.report.max_relative_embedding_error = max(error, self.report.max_relative_embedding_error)

    def vision_and_table(self, generation: GenerationConfig) -> None:
        """Compare views of noise and the rows of the embedding table."""
        if self.config.vision is not None:
            pixels = noise_views(self.config)
            expected = self.oracle.encode_views(pixels)
            for distances, side in self.asked.both(self.backend, self.witness):
                distances.pictures.append(relative_difference(side.encode_views(pixels), expected))
        for distances, side in self.asked.both(self.backend, self.witness):
            difference, rows = table_difference(self.oracle, side, self.config, generation)
            distances.table.append(difference)
        told = f"{rows} of {self.config.language.vocab_rows} rows of the embedding table"
        self.report.probes.append(probe_note(told, self.where))

    def embedded(self, probe: TokenSample, expected: Prompt) -> None:
        """Compare a probe's embeddings: of all prompts, these alone may be a batch."""
        for distances, side in self.asked.both(self.backend, self.witness):
            found = side.embed_tokens(probe.token_ids)
            distances.table.append(relative_difference(found, expected.embeddings))

    def answer(
        self, where: str, prompt: Prompt, generation: GenerationConfig, merge: MergeConfig, *, random: bool = False
    ) -> int:
        """Lead all three through an answer; returns its steps.

        ``random`` tells whether the prompt is: judged apart, and its tokens do not count for the share that agrees.
        """
        measured = self.random if random else self.asked
        at_prefill = prompt_merge(
            merge,
            generation,
            self.config.language.mask_token_id,
            batch=len(prompt.embeddings),
            visual_tokens=len(prompt.visual_positions),
            logits=True,
        )
        merges = merge.schedule != "none" and len(prompt.visual_positions) > 0 and at_prefill is None

        def started(side: Backend, scores: Floats | None = None) -> Session:
            asked = at_prefill
            if asked is not None and scores is not None:
                asked = replace(asked, selection_scores=scores)
            return side.start(
                prompt.embeddings,
                prompt.visual_positions,
                merges=merges,
                prompt_merge=asked,
                shared_rows=prompt.shared_rows if self._shares else 0,
            )

        sessions = started(self.oracle), started(self.backend), started(self.witness)
        restarts = partial(started, self.oracle), partial(started, self.witness)
        trio = Trio(*sessions, restarts if at_prefill is not None else None)
        if not random and trio.first_token is not None:
            for distances, token in measured.both(*trio.first_tokens):
                distances.positions += len(trio.first_token)
                distances.same_tokens += int(np.sum(trio.first_token == token))
        ran = 0
        try:
            for index, record in enumerate(_steps(trio, prompt, self.config, generation, merge)):
                self.step(f"{where}, step {index}", index, measured, trio, record, generation.block)
                ran += 1
        except D3tomError as error:
            self.report.problems.append(f"{where}, step {ran}: {error}")
        return ran

    def step(self, where: str, index: int, measured: Measured, trio: Trio, record: StepRecord, block: int) -> None:
        """Compare what the sides answered to the last request, at step ``index`` of its answer."""
        request, found, seen, expected = trio.request, trio.found, trio.seen, record.result
        assert request is not None
        assert found is not None
        assert seen is not None
        found, seen = (of_answer(each, record.tokens.shape[1]) for each in (found, seen))
        report = self.report
        self._compare_kept(where, measured, expected, found, seen)
        masked = request.answer_ids == self.config.language.mask_token_id
        masked = masked[:, : record.tokens.shape[1]]
        if not found.token.shape == found.confidence.shape == expected.token.shape:
            shapes = f"{found.token.shape} and {found.confidence.shape}"
            report.problems.append(
                f"{where}: tokens and confidences of shape {shapes}, expected {expected.token.shape} of both"
            )
            return
        same = (found.token == expected.token) & masked
        if measured is self.asked:
            while len(report.by_step) <= index:
                report.by_step.append(StepAgreement())
            report.by_step[index].positions += int(masked.sum())
            report.by_step[index].same_tokens += int(same.sum())
        report.tokens_identical &= int(same.sum()) == int(masked.sum())
        in_reach = np.arange(masked.shape[1]) < (record.block + 1) * block
        ranked = found.confidence if found.certainty is None else found.certainty
        chosen = record.transfer if record.filled is None else record.transfer & ~record.filled
        transfer = commit(ranked, masked & in_reach, chosen.sum(axis=1))
        report.transfers_identical &= bool(np.array_equal(transfer, chosen))
        self._compare_logits(where, measured, masked, expected, found, seen)

    def _compare_logits(
        self,
        where: str,
        measured: Measured,
        masked: NDArray[np.bool_],
        expected: StepResult,
        found: StepResult,
        seen: StepResult,
    ) -> None:
        assert expected.logits is not None
        assert seen.logits is not None
        report = self.report
        if found.logits is None or found.logits.shape != expected.logits.shape:
            report.problems.append(f"{where}: no logits of shape {expected.logits.shape}")
            return
        if not np.isfinite(found.logits).all():
            report.max_abs_logit_error = float("inf")
            report.problems.append(f"{where}: logits that are not finite")
            return
        scale = max(float(np.abs(expected.logits).max()), 1e-30)
        wrong = check_choice(found, masked, scale, self.config.language.choices, report.precision)
        if wrong is not None:
            report.problems.append(f"{where}: {wrong}")
        # Margins in float32, whichever of oracle and witness that is.
        exact = expected.logits if report.reference == "fp32" else seen.logits
        for distances, other in measured.both(found, seen):
            assert other.logits is not None
            distances.logits.append(relative_difference(other.logits, expected.logits))
            distances.logits_rms.append(rms_difference(other.logits, expected.logits))
            if expected.kept is None:
                distances.unmerged_rms.append(distances.logits_rms[-1])
            differs = masked & (other.token != expected.token)
            if measured is self.asked:
                distances.positions += int(masked.sum())
                distances.same_tokens += int((masked & ~differs).sum())
            two = np.partition(exact, -2, axis=-1)[..., -2:]
            distances.margins += [float(m) / (2 * scale) for m in (two[..., 1] - two[..., 0])[differs]]
            odds = np.abs(log_odds(other.confidence) - log_odds(expected.confidence))[masked]
            distances.confidence.append(float(odds.max(initial=0.0)) / (2 * scale))
        turned = [relative_difference(other, seen.logits, scale) for other in seen.alternative_logits]
        measured.resolved.flips += turned
        error = float(np.abs(found.logits.astype(np.float64) - expected.logits).max())
        report.max_abs_logit_error = max(error, report.max_abs_logit_error)
        report.max_relative_logit_error = max(error / scale, report.max_relative_logit_error)

    def _compare_kept(
        self, where: str, measured: Measured, expected: StepResult, found: StepResult, seen: StepResult
    ) -> None:
        if expected.kept is None or found.kept is None:
            if expected.kept is not found.kept:
                self.report.kept_identical = False
                self.report.problems.append(f"{where}: only one side merged")
            return
        if expected.scores is not None and seen.scores is not None:
            rows = zip(expected.scores, seen.scores, strict=True)
            measured.resolved.scores += [score_difference(scores, others) for scores, others in rows]
        if found.kept.shape != expected.kept.shape:
            measured.flips.append((where, float("inf")))
        elif not np.array_equal(expected.kept, found.kept):
            gaps = [0.0 if np.array_equal(*pair) else np.inf for pair in zip(found.kept, expected.kept, strict=True)]
            if expected.scores is not None:
                three = zip(found.kept, expected.kept, expected.scores, gaps, strict=True)
                gaps = [kept_gap(here, there, scores) if gap else 0.0 for here, there, scores, gap in three]
            measured.flips.append((where, float(np.max(gaps))))  # a NaN wins

    def conclude(self) -> None:
        """Judge everything that was measured, now that the witness has said what the precision resolves."""
        report = self.report
        for measured, what in ((self.asked, ""), (self.random, ", random prompts")):
            if what and not measured.found.logits and not measured.flips:
                continue  # no random prompt was run
            where = f"{self.where}{what}".removeprefix(", ")
            measured.found.kept = [gap for _, gap in measured.flips]
            report.bounds += bounds(report.precision, where, measured.found, measured.resolved)
            allowed = kept_bound(report.precision, measured.resolved)
            for step, gap in measured.flips:
                report.max_kept_gap = max(gap, report.max_kept_gap)
                near = gap <= allowed
                report.near_ties += near
                report.true_flips += not near
                if not near:
                    report.kept_identical = False
                    report.problems.append(
                        f"{step}: kept tokens differ (true flip, relative gap of the scores {gap:.1e}, allowed "
                        f"{allowed:.1e})"
                    )


def _steps(
    trio: Trio, prompt: Prompt, config: ModelConfig, generation: GenerationConfig, merge: MergeConfig
) -> Iterator[StepRecord]:
    return denoise(
        trio,
        batch=len(prompt.embeddings),
        visual_tokens=len(prompt.visual_positions),
        mask_token_id=config.language.mask_token_id,
        generation=generation,
        merge=merge,
        logits=True,
    )


def compare_in_step(
    pairs: Iterable[tuple[Oracle, Backend]],
    config: ModelConfig,
    reader: Reader | None,
    samples: Sequence[Sample | TokenSample],
    generation: GenerationConfig,
    merge: MergeConfig,
    progress: Progress = no_progress,
    *,
    share_prefix: bool = False,
) -> AgreementReport:
    """Lead the backend of each of ``pairs`` through the answers of its oracle, and through the probes' answers.

    The oracle computes in the same precision, or in float32 where the backend's is int8.

    All see the oracle's embeddings of the prompt; how far the backend's own are from them is bounded apart. A pair is
    let go before the next is asked for. ``share_prefix`` as for
    :func:`~d3tom_export.parity.validate.validate_backends`.
    """
    report = AgreementReport("", "", share_prefix=share_prefix)
    for oracle, backend in pairs:
        report.backend, report.precision = report.backend or backend.name, backend.precision
        assert (oracle.kv_cache, oracle.precision) == (backend.kv_cache, report.reference)
        comparison = _Comparison(report, oracle, backend, config)
        del oracle, backend  # a generator of pairs opens the next one only now
        _compare_answers(comparison, reader, samples, generation, merge, progress)
        comparison.conclude()
        del comparison
        progress("steps compared", len(samples), len(samples))
    if not report.samples:
        report.problems.append("there was no sample to compare")
    return report


def _compare_answers(
    comparison: _Comparison,
    reader: Reader | None,
    samples: Sequence[Sample | TokenSample],
    generation: GenerationConfig,
    merge: MergeConfig,
    progress: Progress,
) -> None:
    """All samples and probes of one pair."""
    report, where, backend = comparison.report, comparison.where, comparison.backend
    settings = merge.in_loop(backend.kv_cache)
    comparison.vision_and_table(generation)
    for number, sample in enumerate(samples):
        progress("comparing steps with PyTorch", number, len(samples))
        sides = (comparison.oracle, backend, comparison.witness)
        prompts = [embed_sample(each, sample, reader, generation) for each in sides]
        comparison.embeddings(f"sample {number}{where}", prompts)
        report.samples += 1
        report.steps += comparison.answer(f"sample {number}{where}", prompts[0], generation, settings)
    probes, skipped = probe_prompts(comparison.config, generation, backend)
    for probe in probes:
        prompt = embed_sample(comparison.oracle, probe.sample, None, probe.generation)
        comparison.embedded(probe.sample, prompt)
        comparison.answer(f"{probe.name}{where}", prompt, probe.generation, settings, random=True)
    report.probes += [probe_note(probe.name, where) for probe in probes]
    report.not_probed += [probe_note(reason, where) for reason in skipped]
