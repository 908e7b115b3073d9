"""Parity in low precision: a backend against PyTorch in the same precision, on PyTorch's own answer (design.md).

Two runs in fp16 part ways at the first token that rounding turns, and everything after it compares nothing. So here the
oracle leads: at every step the backend is asked the same question, and what it would have chosen is compared. Kept sets
must be equal up to ties, exact ones unless a tolerance is given: scores are float32, but of rows that were rounded on
the way, and another order of sums rounds them otherwise. How many tokens agree is reported for every step.

int8 has no oracle of its own precision, and is meant to stand in for float32: it is held against PyTorch in float32,
and passes where enough of the tokens agree (:data:`INT8_AGREEMENT`). Kept sets differ there, and are reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from d3tom_export.config import GenerationConfig, MergeConfig, ModelConfig
from d3tom_export.denoise import Floats, Session, StepRecord, StepRequest, StepResult, denoise
from d3tom_export.errors import D3tomError
from d3tom_export.pipeline import Backend, Prompt, Reader, embed_sample
from d3tom_export.progress import Progress, no_progress
from d3tom_export.samples import Sample, TokenSample
from d3tom_export.sampling import commit
from d3tom_export.validate import kept_gap, relative_difference, vision_difference

ROUNDING = {"fp16": 2.0**-10, "bf16": 2.0**-7, "int8": 2.0**-7}
"""Relative spacing of neighbouring numbers (of int8, the largest's): scores that differ by less are near-ties."""

INT8_AGREEMENT = 0.99
"""Share of the masked positions, over all steps of all answers, at which int8 must choose float32's token."""


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
    tie_tolerance: float = 0.0
    """Relative gap of two scores up to which they count as tied; 0: exact ties only (design.md)."""
    samples: int = 0
    steps: int = 0
    tokens_identical: bool = True
    transfers_identical: bool = True
    """Whether the same positions would have been committed at every step."""
    kept_identical: bool = True
    """Up to ties."""
    ties: int = 0
    """Steps whose kept sets differ by tokens whose scores tie."""
    near_ties: int = 0
    """Steps whose kept sets differ by tokens whose scores are within one rounding of the precision: a failure too,
    except in int8."""
    true_flips: int = 0
    """Steps whose kept sets differ by more."""
    max_kept_gap: float = 0.0
    """Largest relative gap of scores across which tokens changed places: the smallest tolerance that would pass."""
    max_abs_logit_error: float = 0.0
    max_relative_logit_error: float = 0.0
    """Relative to the largest logit of its step."""
    max_relative_embedding_error: float = 0.0
    """Of the prompts' embeddings, pictures among them, relative to the largest."""
    by_step: list[StepAgreement] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def token_agreement(self) -> float:
        """Share of positions with the same likeliest token, over all steps."""
        positions = sum(step.positions for step in self.by_step)
        return sum(step.same_tokens for step in self.by_step) / positions if positions else 1.0

    @property
    def reference(self) -> str:
        """The precision of the oracle."""
        return "fp32" if self.precision == "int8" else self.precision

    @property
    def passed(self) -> bool:
        agrees = self.token_agreement >= INT8_AGREEMENT if self.precision == "int8" else self.kept_identical
        return self.steps > 0 and agrees and not self.problems

    def to_json(self) -> dict[str, Any]:
        raw = asdict(self)
        del raw["by_step"]
        # JSON knows no NaN or infinity; null, and a failed report, stand for them.
        raw = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in raw.items()}
        raw["token_agreement"] = self.token_agreement
        if self.precision == "int8":
            raw["token_agreement_needed"] = INT8_AGREEMENT
        raw["token_agreement_by_step"] = [step.share for step in self.by_step]
        return {"passed": self.passed, **raw}

    def lines(self) -> list[str]:
        """The report for people."""
        worst = min((step.share for step in self.by_step), default=1.0)
        differing = self.ties + self.near_ties + self.true_flips
        return [
            f"{'PASSED' if self.passed else 'FAILED'}: {self.backend} in {self.precision} against PyTorch in "
            f"{self.reference}, {self.samples} answers, {self.steps} steps",
            f"  kept sets    {self.steps - differing} of {self.steps} steps identical, {self.ties} ties, "
            f"{self.near_ties} near-ties, {self.true_flips} true flips"
            + (f"; largest gap of scores {self.max_kept_gap:.1e}" if differing else ""),
            f"  tokens       {self.token_agreement:.2%} of positions agree, {worst:.1%} at the worst step"
            + (f" (needed {INT8_AGREEMENT:.0%} of all)" if self.precision == "int8" else ""),
            f"  logits       largest difference {self.max_abs_logit_error:.2e}, relative to the largest "
            f"{self.max_relative_logit_error:.1e}",
            f"  embeddings   largest difference relative to the largest {self.max_relative_embedding_error:.1e}",
            *(f"  - {problem}" for problem in self.problems[:10]),
        ]

    def compare(self, where: str, index: int, pair: _Pair, record: StepRecord, mask_token_id: int, block: int) -> None:
        """Compare what both sides answered to the last request, at step ``index`` of an answer."""
        request, found = pair.request, pair.found
        expected = record.result
        assert request is not None
        assert found is not None
        self.steps += 1
        while len(self.by_step) <= index:
            self.by_step.append(StepAgreement())
        masked = request.answer_ids == mask_token_id
        same = (found.token == expected.token) & masked
        self.by_step[index].positions += int(masked.sum())
        self.by_step[index].same_tokens += int(same.sum())
        self.tokens_identical &= int(same.sum()) == int(masked.sum())

        in_reach = np.arange(masked.shape[1]) < (record.block + 1) * block
        transfer = commit(found.confidence, masked & in_reach, int(record.transfer[0].sum()))
        self.transfers_identical &= bool(np.array_equal(transfer, record.transfer))
        self._compare_logits(where, expected, found)
        self._compare_kept(where, expected, found)

    def compare_embeddings(self, where: str, expected: Floats, found: Floats) -> None:
        """Compare a prompt's embeddings; the steps that follow are given the oracle's."""
        if found.shape != expected.shape or not np.isfinite(found).all():
            self._embed_problem(where)
            return
        error = relative_difference(found, expected)
        self.max_relative_embedding_error = max(error, self.max_relative_embedding_error)

    def compare_vision(self, where: str, difference: float) -> None:
        """Note the difference of views that no prompt shows, see :func:`~d3tom_export.validate.vision_difference`."""
        if not np.isfinite(difference):
            self._embed_problem(where)
            return
        self.max_relative_embedding_error = max(difference, self.max_relative_embedding_error)

    def _embed_problem(self, where: str) -> None:
        self.max_relative_embedding_error = float("inf")
        self.problems.append(f"{where}: embeddings of another shape, or not finite")

    def _compare_logits(self, where: str, expected: StepResult, found: StepResult) -> None:
        assert expected.logits is not None
        if found.logits is None or found.logits.shape != expected.logits.shape:
            self.problems.append(f"{where}: no logits of shape {expected.logits.shape}")
            return
        error = float(np.abs(found.logits.astype(np.float64) - expected.logits).max())
        if not np.isfinite(error):
            self.problems.append(f"{where}: logits that are not finite")
        self.max_abs_logit_error = max(error, self.max_abs_logit_error)
        scale = float(np.abs(expected.logits).max())
        self.max_relative_logit_error = max(error / max(scale, 1e-30), self.max_relative_logit_error)

    def _compare_kept(self, where: str, expected: StepResult, found: StepResult) -> None:
        if expected.kept is None or found.kept is None:
            if expected.kept is not found.kept:
                self.kept_identical = False
                self.problems.append(f"{where}: only one side merged")
            return
        if np.array_equal(expected.kept, found.kept):
            return
        gap = np.inf
        if expected.scores is not None:
            gap = kept_gap(found.kept[0], expected.kept[0], expected.scores[0])
        self.max_kept_gap = max(gap, self.max_kept_gap)
        if gap <= self.tie_tolerance:
            self.ties += 1
            return
        self.kept_identical = False
        near = gap <= ROUNDING[self.precision]
        if self.precision == "int8":  # its tokens are what it is judged by
            self.near_ties += near
            self.true_flips += not near
            return
        self.near_ties += near
        self.true_flips += not near
        self.problems.append(
            f"{where}: kept tokens differ ({'near-tie' if near else 'true flip'}, relative gap of the scores {gap:.1e})"
        )


class _Pair:
    """Two sessions as one: the oracle's result leads the loop, the backend's is kept beside it."""

    def __init__(self, oracle: Session, backend: Session) -> None:
        self._oracle, self._backend = oracle, backend
        self.request: StepRequest | None = None
        self.found: StepResult | None = None

    def step(self, request: StepRequest) -> StepResult:
        self.request, self.found = request, self._backend.step(request)
        return self._oracle.step(request)


def _steps(
    pair: _Pair, prompt: Prompt, mask_token_id: int, generation: GenerationConfig, merge: MergeConfig
) -> Iterator[StepRecord]:
    return denoise(
        pair,
        batch=1,
        visual_tokens=len(prompt.visual_positions),
        mask_token_id=mask_token_id,
        generation=generation,
        merge=merge,
        logits=True,
    )


def compare_in_step(
    pairs: Iterable[tuple[Backend, Backend]],
    config: ModelConfig,
    reader: Reader | None,
    samples: Sequence[Sample | TokenSample],
    generation: GenerationConfig,
    merge: MergeConfig,
    progress: Progress = no_progress,
    *,
    tie_tolerance: float = 0.0,
) -> AgreementReport:
    """Lead the backend of each of ``pairs`` through the answers of its oracle.

    The oracle computes in the same precision, or in float32 where the backend's is int8.

    Both see the oracle's embeddings of the prompt; how far the backend's own are from them is reported. A pair is let
    go before the next is asked for.
    """
    report = AgreementReport("", "", tie_tolerance)
    mask_token_id = config.language.mask_token_id
    for oracle, backend in pairs:
        report.backend, report.precision = backend.name, backend.precision
        assert (oracle.kv_cache, oracle.precision) == (backend.kv_cache, report.reference)
        settings = merge.in_loop(backend.kv_cache)
        if reader is None and config.vision is not None:
            report.compare_vision("views of noise", vision_difference(oracle, backend, config))
        for number, sample in enumerate(samples):
            progress("comparing steps with PyTorch", number, len(samples))
            prompt = embed_sample(oracle, sample, reader, generation)
            own = embed_sample(backend, sample, reader, generation).embeddings
            report.compare_embeddings(f"sample {number}", prompt.embeddings, own)
            merges = settings.schedule != "none" and len(prompt.visual_positions) > 0
            sessions = [
                each.start(prompt.embeddings, prompt.visual_positions, merges=merges) for each in (oracle, backend)
            ]
            pair = _Pair(sessions[0], sessions[1])
            where = f"sample {number}{', with KV cache' if backend.kv_cache else ''}"
            report.samples += 1
            index = -1
            try:
                for index, record in enumerate(_steps(pair, prompt, mask_token_id, generation, settings)):
                    report.compare(f"{where}, step {index}", index, pair, record, mask_token_id, generation.block)
            except D3tomError as error:
                report.problems.append(f"{where}, step {index + 1}: {error}")
        del oracle, backend, prompt, sessions, pair  # a generator of pairs opens the next one only now
        progress("steps compared", len(samples), len(samples))
    return report
