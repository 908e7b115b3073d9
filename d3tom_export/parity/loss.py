"""What quantizing lost: a quantized model beside the unquantized one, step by step and answer by answer.

That is a figure of quality and no parity: nothing of it passes or fails. The unquantized model leads through its own
answers, and the other one is asked the same at every step, for after the first other token two runs compare nothing.
Then it answers by itself. Imports no framework: the caller brings the backends.

B batch, G answer tokens, K kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from d3tom_export.config import GenerationConfig, MergeConfig, ModelConfig
from d3tom_export.loop.backend import Backend, Prompt
from d3tom_export.loop.denoise import (
    Floats,
    Ints,
    PromptMerge,
    Session,
    StepRecord,
    StepRequest,
    StepResult,
    of_answer,
)
from d3tom_export.parity.bounds import relative_difference, rms_difference
from d3tom_export.pipeline import Reader, embed_sample, run_loop
from d3tom_export.progress import Progress, no_progress
from d3tom_export.prompt.samples import Sample, TokenSample


@dataclass
class LossReport:
    """How far a quantized model is from the unquantized one; ``to_json`` is what ``validate --json`` writes."""

    quantized: str
    """Its backend and the format of its weights."""
    compared_with: str
    """Whose weights the unquantized model has."""
    loops: list[str] = field(default_factory=list)
    samples: int = 0
    """Answers, each loop's counted."""
    fitted: int = 0
    """Samples that the quantized weights were rounded by, among those that are asked."""
    steps: int = 0
    positions: int = 0
    """Answer positions still masked, over all steps."""
    same_tokens: int = 0
    """Of those, positions with the same likeliest token."""
    logit_errors: list[float] = field(default_factory=list)
    """Root mean square difference of each step's logits, relative to that of the logits."""
    max_relative_logit_error: float = 0.0
    """Largest difference of any logit, relative to its step's largest."""
    kept_in_common: list[float] = field(default_factory=list)
    """Share of the kept visual tokens that both kept, of each merging step."""
    same_answers: int = 0
    """Answers that are the same, token for token, where each model answers by itself."""
    judged: int = 0
    """Answers whose right one is known."""
    right: int = 0
    """Of those, the quantized model's right ones, word for word."""
    right_unquantized: int = 0

    @property
    def token_agreement(self) -> float:
        """Share of the masked positions with the same likeliest token; NaN where none was asked."""
        return self.same_tokens / self.positions if self.positions else float("nan")

    @property
    def logit_error(self) -> float:
        """The median step's; NaN where there was none."""
        return float(np.median(self.logit_errors)) if self.logit_errors else float("nan")

    @property
    def kept_agreement(self) -> float | None:
        """Share of the kept visual tokens that both kept; None where nothing merged."""
        return float(np.mean(self.kept_in_common)) if self.kept_in_common else None

    def to_json(self) -> dict[str, Any]:
        raw = asdict(self)
        del raw["logit_errors"], raw["kept_in_common"]
        raw |= {
            "token_agreement": self.token_agreement,
            "relative_logit_error": self.logit_error,
            "kept_agreement": self.kept_agreement,
            "exact_match": self.right / self.judged if self.judged else None,
            "exact_match_unquantized": self.right_unquantized / self.judged if self.judged else None,
        }
        # JSON knows no NaN or infinity.
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in raw.items()}

    def lines(self) -> list[str]:
        """The report for people."""
        lines = [
            f"{self.quantized} beside PyTorch unquantized, {' and '.join(self.loops)} loop"
            f"{'s' if len(self.loops) > 1 else ''}: {self.samples} answers, {self.steps} steps",
            f"  unquantized  {self.compared_with}",
            *(
                [f"  rounded by   the first {self.fitted} of the samples asked, which are no test of it"]
                if self.fitted
                else []
            ),
            f"  tokens       {self.token_agreement:.2%} of {self.positions:,} positions agree",
            f"  logits       off by {self.logit_error:.2%} at the median step (root mean square), "
            f"{self.max_relative_logit_error:.2%} of the largest at worst",
        ]
        if self.kept_agreement is not None:
            lines.append(f"  kept sets    {self.kept_agreement:.2%} of the kept visual tokens in common")
        lines.append(f"  answers      {self.same_answers} of {self.samples} the same, token for token")
        if self.judged:
            lines.append(
                f"  exact match  {self.right} of {self.judged} ({self.right / self.judged:.1%}), unquantized "
                f"{self.right_unquantized} ({self.right_unquantized / self.judged:.1%})"
            )
        return lines


class _Pair:
    """Two sessions as one: the unquantized one's results lead the loop, the other's last one is kept."""

    def __init__(self, leading: Session, other: Session) -> None:
        self._leading, self._other = leading, other
        self.first_token = leading.first_token
        self.request: StepRequest | None = None
        self.found: StepResult | None = None

    def step(self, request: StepRequest) -> StepResult:
        self.request, self.found = request, self._other.step(request)
        return self._leading.step(request)


class _Led:
    """Two backends as one for an answer: each starts with its own embeddings of the prompt."""

    precision, shares_prefix = "fp32", False

    def __init__(self, leading: Backend, other: Backend, prompt: Prompt) -> None:
        self._leading, self._other, self._prompt = leading, other, prompt
        self.name, self.kv_cache = leading.name, leading.kv_cache
        self.embed_tokens, self.encode_views = leading.embed_tokens, leading.encode_views
        self.image_newline = leading.image_newline
        self.pair: _Pair | None = None

    def start(
        self,
        prompt_embeddings: Floats,
        visual_positions: Ints,
        *,
        merges: bool = True,
        prompt_merge: PromptMerge | None = None,
        shared_rows: int = 0,
    ) -> Session:
        how: dict[str, Any] = {"merges": merges, "prompt_merge": prompt_merge, "shared_rows": shared_rows}
        self.pair = _Pair(
            self._leading.start(prompt_embeddings, visual_positions, **how),
            self._other.start(self._prompt.embeddings, visual_positions, **how),
        )
        return self.pair


def _compare(report: LossReport, pair: _Pair, record: StepRecord, mask_token_id: int) -> None:
    """Add one step."""
    request, expected = pair.request, record.result
    assert request is not None
    assert pair.found is not None
    assert expected.logits is not None
    found = of_answer(pair.found, record.tokens.shape[1])
    assert found.logits is not None
    masked = request.answer_ids[:, : record.tokens.shape[1]] == mask_token_id
    report.steps += 1
    report.positions += int(masked.sum())
    report.same_tokens += int(((found.token == expected.token) & masked).sum())
    report.logit_errors.append(rms_difference(found.logits, expected.logits))
    error = relative_difference(found.logits, expected.logits)
    report.max_relative_logit_error = max(error, report.max_relative_logit_error)
    if expected.kept is not None and found.kept is not None:
        both = [len(np.intersect1d(*rows)) / len(rows[0]) for rows in zip(expected.kept, found.kept, strict=True)]
        report.kept_in_common.append(float(np.mean(both)))


def measure_loss(
    report: LossReport,
    unquantized: Backend,
    quantized: Backend,
    config: ModelConfig,
    reader: Reader | None,
    samples: Sequence[Sample | TokenSample],
    generation: GenerationConfig,
    merge: MergeConfig,
    progress: Progress = no_progress,
) -> None:
    """Add to ``report`` what ``quantized`` makes of ``samples`` otherwise than ``unquantized``, in one kind of loop.

    Both run all steps. ``reader`` may be None for samples of tokens, of which no right answer is known. Raises
    :class:`D3tomError` as the backends do.
    """
    mask = config.language.mask_token_id
    report.loops.append("cached" if unquantized.kv_cache else "uncached")
    for number, sample in enumerate(samples):
        progress("comparing answers with the unquantized model's", number, len(samples))
        prompt, own = (embed_sample(each, sample, reader, generation) for each in (unquantized, quantized))
        led = _Led(unquantized, quantized, own)
        last = None
        for last in run_loop(led, prompt, mask, generation, merge, logits=True):
            assert led.pair is not None
            _compare(report, led.pair, last, mask)
        *_, alone = run_loop(quantized, own, mask, generation, merge)
        assert last is not None
        report.samples += 1
        report.same_answers += int(np.array_equal(last.tokens, alone.tokens))
        answer = getattr(sample, "answer", None)
        if reader is not None and answer is not None:
            report.judged += 1
            report.right += reader.answer(alone, generation).text == answer
            report.right_unquantized += reader.answer(last, generation).text == answer
    progress("answers compared", len(samples), len(samples))
