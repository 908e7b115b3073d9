"""Parity: two runs of the loop, compared step by step.

Fails closed: a missing output, a NaN, a step too few or a changed shape is a failure. Exact ties and near-ties are
counted apart from true flips, and the report names the smallest logit tolerance that would have passed.
Imports no framework: the caller brings the backends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d3tom_export.config import Choices, GenerationConfig, MergeConfig, ModelConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.backend import Backend, Prompt
from d3tom_export.loop.denoise import StepRecord
from d3tom_export.parity.bounds import EMBEDDING_TOLERANCE, relative_difference
from d3tom_export.parity.choice import check_choice
from d3tom_export.parity.kept import gone_along
from d3tom_export.parity.probes import (
    probe_note,
    probe_prompts,
    probed_line,
    table_difference,
    vision_difference,
)
from d3tom_export.parity.ties import NEAR_TIE, confidence_gap, kept_gap, token_gap
from d3tom_export.pipeline import Reader, embed_sample, run_loop
from d3tom_export.progress import Progress, no_progress
from d3tom_export.prompt.samples import Sample, TokenSample

ORACLE_TOLERANCE = 2e-4
"""Largest logit difference, absolute, of the float32 oracle to a recorded run (design.md, "Numbers")."""

FAMILIES_TOLERANCE = 5e-4
"""The same, to the recorded runs of the families that name themselves in their cases (golden-families)."""

BACKEND_TOLERANCE = 1e-3
"""Largest logit difference, absolute, of a float32 backend to the oracle or to a recorded run."""

OWN_WEIGHTS = "the bundle's own weights (a fault in the weights or the config themselves cannot be seen)"
"""What a backend is compared with where the checkpoint that its bundle was built from is not there."""

_MOST_REMEMBERED = 2**28
"""Bytes of the oracle's logits that are kept for a second backend: the answers of a small model, not of a large one."""


@dataclass(frozen=True)
class ExpectedStep:
    """What a step ought to give. Arrays without a batch axis: one answer at a time."""

    tokens: NDArray[np.int64]
    transfer: NDArray[np.bool_]
    logits: NDArray[np.float32]
    kept: NDArray[np.int64] | None
    scores: NDArray[np.float32] | None = None
    alternative_logits: tuple[NDArray[np.float32], ...] = ()
    """The reference's logits had near-ties of the merge gone the other way: as right, held to the same tolerance."""
    choices: Choices | None = None
    """Which of the logits are tokens that may be chosen, by the reference; None where it does not say."""


@dataclass
class Report:
    """The outcome of a validation; ``to_json`` is what ``validate --json`` writes."""

    backend: str
    logit_tolerance: float
    samples: int = 0
    steps: int = 0
    tokens_identical: bool = True
    transfers_identical: bool = True
    kept_identical: bool = True
    """These three hold over all steps of all answers."""
    max_abs_logit_error: float = 0.0
    """Over the steps of each answer up to its first departure; NaN or infinity where a logit was not finite. It is
    also the smallest tolerance that would have passed."""
    max_abs_logit_error_at: str | None = None
    """The step that had it."""
    near_tied_merges: int = 0
    """Steps whose merge was a near-tie (merging.merge.NEAR_TIE) that went the other way than in the reference. Their
    logits are held to the same tolerance, against the reference's with the tokens in question sent the other way."""
    max_abs_logit_error_at_near_ties: float = 0.0
    """Over those steps, against the reference as it went."""
    near_tied_selections: int = 0
    """Steps at which the backend kept another visual token, whose score was as good (:data:`NEAR_TIE`). The reference
    went along, so that everything else of the step, and of those behind it, is held to the same tolerances."""
    near_ties: int = 0
    """Departures of tokens, commits or kept sets that were near-ties (:data:`NEAR_TIE`)."""
    true_flips: int = 0
    """Departures that were not."""
    embedding_tolerance: float = EMBEDDING_TOLERANCE
    max_relative_embedding_error: float = 0.0
    """Of the prompts' embeddings, pictures among them, and of the embedding table's rows, relative to the largest;
    infinite where one had another shape or was not finite. It too is the smallest tolerance that would have passed."""
    max_relative_vision_error: float = 0.0
    """Of the visual features of two views of noise, relative to the largest."""
    compared_with: str = OWN_WEIGHTS
    """Whose weights the oracle has."""
    graphs: list[str] = field(default_factory=list)
    """Of a backend that has two kinds of graphs, those that were run."""
    share_prefix: bool = False
    """Whether what questions share was prefilled by itself, in the loop with a KV cache."""
    probes: list[str] = field(default_factory=list)
    """What was run beside the samples (parity/probes.py); its steps are counted apart."""
    probe_steps: int = 0
    not_probed: list[str] = field(default_factory=list)
    """What was not, and why."""
    problems: list[str] = field(default_factory=list)
    """What departed, the first of each answer."""
    exact_match: float | None = None
    exact_match_reference: float | None = None

    @property
    def passed(self) -> bool:
        return (
            self.samples > 0
            and self.steps > 0
            and self.tokens_identical
            and self.transfers_identical
            and self.kept_identical
            and bool(self.max_abs_logit_error <= self.logit_tolerance)
            and bool(self.max_relative_embedding_error <= self.embedding_tolerance)
            and bool(self.max_relative_vision_error <= self.embedding_tolerance)
            and not self.problems
        )

    def to_json(self) -> dict[str, Any]:
        raw = {"passed": self.passed, **asdict(self)}
        # JSON knows no NaN or infinity; null, and a failed report, stand for them.
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in raw.items()}

    def lines(self) -> list[str]:
        """The report for people."""

        def mark(identical: bool) -> str:
            return "identical" if identical else "DIFFERENT"

        shared = ", prefixes shared" if self.share_prefix else ""
        lines = [
            f"{'PASSED' if self.passed else 'FAILED'}: {self.backend}{shared}, {self.samples} answers, "
            f"{self.steps} steps",
            f"  oracle       {self.compared_with}",
            f"  tokens       {mark(self.tokens_identical)}",
            f"  transfers    {mark(self.transfers_identical)}",
            f"  kept sets    {mark(self.kept_identical)}",
            f"  logits       largest difference {self.max_abs_logit_error:.2e} (allowed {self.logit_tolerance:.0e})",
        ]
        if not self.max_abs_logit_error <= self.logit_tolerance and self.max_abs_logit_error_at is not None:
            lines[-1] += f", at {self.max_abs_logit_error_at}"
        lines.append(
            f"  embeddings   largest relative difference {self.max_relative_embedding_error:.1e}, of views of noise "
            f"{self.max_relative_vision_error:.1e} (allowed {self.embedding_tolerance:.0e})"
        )
        if self.exact_match is not None:
            lines.append(f"  exact match  {self.exact_match:.1%} (PyTorch {self.exact_match_reference:.1%})")
        if self.near_tied_merges:
            lines.append(
                f"  near-ties    {self.near_tied_merges} merges within float32's rounding went the other way "
                f"(straight difference {self.max_abs_logit_error_at_near_ties:.1e})"
            )
        if self.near_tied_selections:
            lines.append(
                f"  near-ties    {self.near_tied_selections} kept sets have another token whose score was as good, to "
                "float32's rounding"
            )
        if self.near_ties or self.true_flips:
            lines.append(f"  departures   {self.true_flips} true flips, {self.near_ties} near-ties")
        if self.probes:
            lines.append(f"  probed       {probed_line(self.probes)}")
        lines += [f"  not probed   {reason}" for reason in self.not_probed]
        return [*lines, *(f"  - {problem}" for problem in self.problems[:10])]

    def note_embeddings(self, what: str, difference: float) -> None:
        """Keep the largest relative difference of embeddings, and call one beyond the tolerance a problem."""
        self.max_relative_embedding_error = max(difference, self.max_relative_embedding_error)
        if not difference <= self.embedding_tolerance:
            self.problems.append(f"{what} differ by {difference:.1e} of the largest")

    def add_probe(self, probed: Report) -> None:
        """Take in what one probe found; its samples and steps are no samples' of the report's."""
        self.probe_steps += probed.steps
        self.tokens_identical &= probed.tokens_identical
        self.transfers_identical &= probed.transfers_identical
        self.kept_identical &= probed.kept_identical
        self.near_tied_merges += probed.near_tied_merges
        self.near_tied_selections += probed.near_tied_selections
        self.near_ties += probed.near_ties
        self.true_flips += probed.true_flips
        self.problems += probed.problems
        error, worst = probed.max_abs_logit_error, self.max_abs_logit_error
        if np.isnan(error) or error > worst:  # a NaN wins, and stays: nothing is larger
            self.max_abs_logit_error, self.max_abs_logit_error_at = error, probed.max_abs_logit_error_at
        straight = probed.max_abs_logit_error_at_near_ties
        self.max_abs_logit_error_at_near_ties = max(straight, self.max_abs_logit_error_at_near_ties)

    def _flip(self, where: str, what: str, gap: float | None) -> None:
        """Note a decision that went the other way, by how much it was open to doubt."""
        near = gap is not None and gap <= NEAR_TIE
        self.near_ties += near
        self.true_flips += not near
        doubt = "" if gap is None else f", relative gap of the two candidates {gap:.1e}"
        self.problems.append(f"{where}: {what} ({'near-tie' if near else 'true flip'}{doubt})")

    def _compare_logits(self, where: str, expected: ExpectedStep, record: StepRecord, row: int) -> bool:
        logits = record.result.logits
        if logits is None or logits[row].shape != expected.logits.shape:
            self.max_abs_logit_error, self.max_abs_logit_error_at = float("inf"), where
            self.problems.append(f"{where}: no logits of shape {expected.logits.shape}")
            return False
        found = logits[row].astype(np.float64)
        error = straight = float(np.abs(found - expected.logits).max())
        for other in expected.alternative_logits:
            error = min(error, float(np.abs(found - other).max()))  # a NaN stays: it is the first argument
        if error < straight:
            self.near_tied_merges += 1
            self.max_abs_logit_error_at_near_ties = max(self.max_abs_logit_error_at_near_ties, straight)
        if np.isnan(error) or error > self.max_abs_logit_error:  # a NaN wins, and stays: nothing is larger
            self.max_abs_logit_error, self.max_abs_logit_error_at = error, where
        return True

    def compare_step(
        self, where: str, expected: ExpectedStep, record: StepRecord, *, departed: bool = False, row: int = 0
    ) -> bool:
        """Compare one step and tell whether the answer has departed.

        After a departure the two runs see different inputs: whether tokens, commits and kept sets are identical is
        still a fact and is noted, but logits no longer compare and no further flip is counted.
        """
        self.steps += 1
        kept = record.result.kept
        same_kept = (kept is None) == (expected.kept is None) and (
            kept is None or np.array_equal(kept[row], expected.kept)  # type: ignore[arg-type]
        )
        same_transfer = np.array_equal(record.transfer[row], expected.transfer)
        same_tokens = np.array_equal(record.tokens[row], expected.tokens)
        self.kept_identical &= bool(same_kept)
        self.transfers_identical &= bool(same_transfer)
        self.tokens_identical &= bool(same_tokens)
        if departed:
            return True
        if not self._compare_logits(where, expected, record, row):
            return True
        result, scale = record.result, float(np.abs(expected.logits).max())
        assert result.logits is not None
        one = replace(
            result, token=result.token[[row]], confidence=result.confidence[[row]], logits=result.logits[[row]]
        )
        every = np.ones(one.token.shape, dtype=np.bool_)
        choices = expected.choices or result.choices or Choices(result.logits.shape[-1])
        wrong = check_choice(one, every, scale, choices, "fp32")
        if wrong is not None:
            self.problems.append(f"{where}: {wrong}")
            return True
        if not same_kept:
            gap = None
            if kept is not None and expected.kept is not None and expected.scores is not None:
                gap = kept_gap(kept[row], expected.kept, expected.scores)
            self._flip(where, "kept tokens differ", gap)
        elif not same_transfer:
            self._flip(where, "other positions were committed", confidence_gap(record, expected.transfer, row))
        elif not same_tokens:
            self._flip(where, "other tokens were committed", token_gap(record, expected.tokens, expected.logits, row))
        return not (same_kept and same_transfer and same_tokens)


def expected_from_records(records: Iterable[StepRecord], row: int = 0) -> Iterator[ExpectedStep]:
    """The steps of a reference run of the loop (logits asked for), of one row of its batch."""
    for record in records:
        result = record.result
        assert result.logits is not None
        yield ExpectedStep(
            record.tokens[row],
            record.transfer[row],
            result.logits[row],
            None if result.kept is None else result.kept[row],
            None if result.scores is None else result.scores[row],
            tuple(logits[row] for logits in result.alternative_logits),
            result.choices,
        )


def compare_runs(
    report: Report, where: str, expected: Iterable[ExpectedStep], records: Iterable[StepRecord], row: int = 0
) -> StepRecord | None:
    """Compare a run, or one row of its batch, with what was expected of it, into ``report``; returns its last step.

    A run that stops with an error has departed.
    """
    expected_steps = list(expected)
    report.samples += 1
    ran, departed, record = 0, False, None
    try:
        for ran, record in enumerate(records, start=1):
            if ran <= len(expected_steps):
                step = f"{where}, step {ran - 1}"
                departed = report.compare_step(step, expected_steps[ran - 1], record, departed=departed, row=row)
    except D3tomError as error:
        report.problems.append(f"{where}, step {ran}: {error}")
    if ran != len(expected_steps):
        report.tokens_identical = report.transfers_identical = report.kept_identical = False
        report.problems.append(f"{where}: {ran} steps ran, expected {len(expected_steps)}")
    return record


def validate_backends(
    pairs: Iterable[tuple[Backend, Backend]],
    config: ModelConfig,
    reader: Reader | None,
    samples: Sequence[Sample | TokenSample],
    generation: GenerationConfig,
    merge: MergeConfig,
    progress: Progress = no_progress,
    *,
    share_prefix: bool = False,
) -> Report:
    """Run every sample and probe on the oracle and the backend of each of ``pairs``, as one for each kind of loop.

    Each side embeds the picture itself; every step is compared. ``reader`` may be None where all samples are tokens. A
    pair is let go before the next is asked for; what the same oracle answered is remembered where it is small. With
    ``share_prefix`` both sides prefill what questions share by itself, in the loop with a KV cache.
    """
    report = Report("", BACKEND_TOLERANCE, share_prefix=share_prefix)
    remembered = _Remembered(config, reader, generation, merge, share_prefix)
    for oracle, backend in pairs:
        assert oracle.kv_cache == backend.kv_cache
        report.backend = report.backend or backend.name
        of_pair = f"{', with KV cache' if backend.kv_cache else ''}" + (
            f", {backend.name}" if backend.name != report.backend else ""
        )
        _compare_embeddings(report, of_pair, oracle, backend, config, generation)
        for index, sample in enumerate(samples):
            progress("comparing answers with PyTorch", index, len(samples))
            _compare_answer(report, f"sample {index}{of_pair}", remembered, oracle, backend, index, sample)
        _compare_probes(report, of_pair, oracle, backend, config, generation, merge, share_prefix)
        del oracle, backend  # a generator of pairs opens the next one only now
        progress("answers compared", len(samples), len(samples))
    report.exact_match, report.exact_match_reference = remembered.exact_match
    if not report.samples:
        report.problems.append("there was no sample to compare")
    return report


class _Remembered:
    """What an oracle answers to the samples, computed once for the backends of each kind of loop."""

    def __init__(
        self, config: ModelConfig, reader: Reader | None, generation: GenerationConfig, merge: MergeConfig, shares: bool
    ) -> None:
        self.config, self.reader, self.generation, self.merge = config, reader, generation, merge
        self._shares = shares
        self._oracle: Backend | None = None
        self._answers: dict[int, tuple[Prompt, list[StepRecord]]] = {}
        self._bytes = 0
        self.known = self.right = self.right_reference = 0

    @property
    def exact_match(self) -> tuple[float | None, float | None]:
        """Of the backends and of the oracle, over the samples with a known answer."""
        if not self.known:
            return None, None
        return self.right / self.known, self.right_reference / self.known

    def run(self, backend: Backend, sample: Sample | TokenSample) -> tuple[Prompt, Iterator[StepRecord]]:
        """The sample's prompt on ``backend``, and its answer."""
        prompt = embed_sample(backend, sample, self.reader, self.generation)
        return prompt, self.loop(backend, prompt)

    def loop(self, backend: Backend, prompt: Prompt) -> Iterator[StepRecord]:
        """The answer to ``prompt`` on ``backend``."""
        mask = self.config.language.mask_token_id
        shares = self._shares and backend.kv_cache
        return run_loop(backend, prompt, mask, self.generation, self.merge, logits=True, share_prefix=shares)

    def answer(self, oracle: Backend, index: int, sample: Sample | TokenSample) -> tuple[Prompt, list[StepRecord]]:
        """The oracle's prompt and answer to sample ``index``."""
        if oracle is not self._oracle:
            self._oracle, self._answers, self._bytes = oracle, {}, 0
        if index not in self._answers:
            prompt, loop = self.run(oracle, sample)
            records = list(loop)
            size = sum(
                logits.nbytes
                for record in records
                for logits in (record.result.logits, *record.result.alternative_logits)
                if logits is not None
            )
            if self._bytes + size > _MOST_REMEMBERED:
                return prompt, records
            self._answers[index], self._bytes = (prompt, records), self._bytes + size
        return self._answers[index]


def _collected(loop: Iterable[StepRecord]) -> tuple[list[StepRecord], D3tomError | None]:
    """The steps of ``loop``, and the error that ended it."""
    records: list[StepRecord] = []
    try:
        records.extend(loop)
    except D3tomError as error:
        return records, error
    return records, None


def _replayed(records: Iterable[StepRecord], error: D3tomError | None) -> Iterator[StepRecord]:
    """What :func:`_collected` took down, once more."""
    yield from records
    if error is not None:
        raise error


def _compare_answer(
    report: Report,
    where: str,
    remembered: _Remembered,
    oracle: Backend,
    backend: Backend,
    index: int,
    sample: Sample | TokenSample,
) -> None:
    """One sample on both sides."""
    expected, reference = remembered.answer(oracle, index, sample)
    prompt, candidate = remembered.run(backend, sample)
    difference = relative_difference(prompt.embeddings, expected.embeddings)
    report.note_embeddings(f"{where}: the prompt's embeddings", difference)
    records, error = _collected(candidate)
    reference, turned = gone_along(oracle, reference, records, lambda each: remembered.loop(each, expected))
    report.near_tied_selections += turned
    answer = compare_runs(report, where, expected_from_records(reference), _replayed(records, error))
    reader = remembered.reader
    if reader is not None and isinstance(sample, Sample) and sample.answer is not None:
        remembered.known += 1
        remembered.right += answer is not None and reader.answer(answer, remembered.generation).text == sample.answer
        remembered.right_reference += reader.answer(reference[-1], remembered.generation).text == sample.answer


def _compare_embeddings(
    report: Report, of_pair: str, oracle: Backend, backend: Backend, config: ModelConfig, generation: GenerationConfig
) -> None:
    """Views of noise and the rows of the embedding table, which no prompt shows all of."""
    if config.vision is not None:
        difference = vision_difference(oracle, backend, config)
        report.max_relative_vision_error = max(difference, report.max_relative_vision_error)
        if not difference <= EMBEDDING_TOLERANCE:
            report.problems.append(f"views of noise{of_pair}: features differ by {difference:.1e} of the largest")
    difference, rows = table_difference(oracle, backend, config, generation)
    report.note_embeddings(f"embedding table{of_pair}: its rows", difference)
    report.probes.append(probe_note(f"{rows} of {config.language.vocab_rows} rows of the embedding table", of_pair))


def _compare_probes(
    report: Report,
    of_pair: str,
    oracle: Backend,
    backend: Backend,
    config: ModelConfig,
    generation: GenerationConfig,
    merge: MergeConfig,
    shares: bool,
) -> None:
    """What no sample shows: two pictures apart, a batch whose rows differ, no picture, another length."""
    probes, skipped = probe_prompts(config, generation, backend)
    report.not_probed += [probe_note(reason, of_pair) for reason in skipped]
    for name, sample, settings in probes:
        prompt = embed_sample(oracle, sample, None, settings)
        difference = relative_difference(backend.embed_tokens(sample.token_ids), prompt.embeddings)
        report.note_embeddings(f"{name}{of_pair}: its embeddings", difference)
        mask = config.language.mask_token_id
        shares = shares and backend.kv_cache
        run = partial(
            run_loop,
            prompt=prompt,
            mask_token_id=mask,
            generation=settings,
            merge=merge,
            logits=True,
            share_prefix=shares,
        )
        try:
            reference, candidate = list(run(oracle)), list(run(backend))
            reference, turned = gone_along(oracle, reference, candidate, run)
        except D3tomError as error:
            report.problems.append(f"{name}{of_pair}: {error}")
            continue
        report.near_tied_selections += turned
        for row in range(len(prompt.embeddings)):
            probed = Report(backend.name, report.logit_tolerance)
            where = f"{name}{of_pair}" + (f", row {row}" if len(prompt.embeddings) > 1 else "")
            compare_runs(probed, where, expected_from_records(reference, row), candidate, row)
            report.add_probe(probed)
        report.probes.append(probe_note(name, of_pair))
