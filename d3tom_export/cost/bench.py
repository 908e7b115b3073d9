"""Time, memory and work of answers in the combinations of KV cache, merging and commit rules, on one backend.

Every combination answers the same questions. They take turns within a round, so that a slow minute of the machine
falls on all of them; ratios are taken within a round and reported with their spread. Imports no framework.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from d3tom_export.backends.select import open_backend
from d3tom_export.bundle.folder import load_bundle
from d3tom_export.config import CommitRule, GenerationConfig, LanguageConfig, MergeConfig
from d3tom_export.cost.combinations import Combination
from d3tom_export.cost.flops import (
    PromptPlan,
    StepMerge,
    Workload,
    answer_cost,
    cache_bytes_per_token,
    prompt_plan,
    step_merges,
)
from d3tom_export.cost.ran import RanSteps, shares_kept
from d3tom_export.loop.backend import Backend, Prompt
from d3tom_export.loop.denoise import StepRecord
from d3tom_export.pipeline import run_loop
from d3tom_export.process import claim
from d3tom_export.progress import Progress, no_progress

if TYPE_CHECKING:
    from d3tom_export.backends.onnxruntime_options import Device


@dataclass(frozen=True)
class Timing:
    """One answer, in seconds."""

    first_token: float
    """From the prompt's embeddings to the first committed tokens: prefill, where there is one, and one step."""
    steps: tuple[float, ...]
    """Of every step after the first."""
    total: float


@dataclass(frozen=True)
class Peak:
    """Resident memory of a process that answers once, in bytes."""

    loaded: int
    """After the backend is loaded."""
    first: int
    """The highest up to the second step, the first that may merge; prefill, where there is one, included."""
    later: int
    """The highest in the steps after it."""

    @property
    def added(self) -> int:
        """What the answer adds to the loaded model, at its highest."""
        return max(self.first, self.later) - self.loaded


def random_prompt(config: LanguageConfig, text_tokens: int, visual_tokens: int, batch: int = 1) -> Prompt:
    """Embeddings of unit variance, the visual ones in one run after a fifth of the text: for sizes, not for answers."""
    before = text_tokens // 5
    shape = (batch, text_tokens + visual_tokens, config.d_model)
    embeddings = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return Prompt(embeddings, np.arange(before, before + visual_tokens))


Answer = Callable[[], Iterable[object]]
"""Starts one answer, prefill included, and gives something after each of its steps."""

Key = TypeVar("Key", bound=Hashable)


def time_answer(answer: Answer) -> Timing:
    """Answer once."""
    marks = [time.perf_counter()]
    for _ in answer():
        marks.append(time.perf_counter())
    steps = tuple(after - before for before, after in pairwise(marks[1:]))
    return Timing(marks[1] - marks[0], steps, marks[-1] - marks[0])


def time_in_turns(
    answers: Mapping[Key, Answer], rounds: int, progress: Progress = no_progress, *, warm_up: int = 1, first: int = 0
) -> dict[Key, list[Timing]]:
    """Time every answer once a round, each round beginning with another one; ``warm_up`` rounds are not counted.

    ``first`` is the place of the answer that the first round begins with.
    """
    keys = list(answers)
    timings: dict[Key, list[Timing]] = {key: [] for key in keys}
    total = (rounds + warm_up) * len(keys)
    for turn in range(rounds + warm_up):
        start = (first + turn) % len(keys)
        for place, key in enumerate([*keys[start:], *keys[:start]]):
            progress("warming up" if turn < warm_up else "answering", turn * len(keys) + place, total)
            timing = time_answer(answers[key])
            if turn >= warm_up:
                timings[key].append(timing)
    progress("answered", total, total)
    return timings


@dataclass(frozen=True)
class Question:
    """A prompt to answer."""

    prompt: Prompt
    right: Callable[[StepRecord, GenerationConfig], bool] | None = None
    """Whether an answer, by its last step, is what it should be; None where nobody knows."""


@dataclass(frozen=True)
class Answered:
    """One answer of a combination."""

    timing: Timing
    work: Workload
    steps: tuple[StepMerge, ...]
    """What each step that ran merged."""
    prompt: PromptPlan
    right: bool | None


class Answerer(Protocol):
    """Answers a prompt step by step; what happens once per answer happens in the call or its first step."""

    def __call__(self, prompt: Prompt, generation: GenerationConfig, merge: MergeConfig) -> Iterable[StepRecord]: ...


def on_backend(backend: Backend, mask_token_id: int) -> Answerer:
    """Our loop on ``backend``."""

    def answer(prompt: Prompt, generation: GenerationConfig, merge: MergeConfig) -> Iterator[StepRecord]:
        return run_loop(backend, prompt, mask_token_id, generation, merge)

    return answer


class _Watched:
    """An answer that can be timed, and what is left of its steps."""

    def __init__(
        self, answerer: Answerer, question: Question, generation: GenerationConfig, merge: MergeConfig
    ) -> None:
        self._answerer, self._question, self._generation, self._merge = answerer, question, generation, merge
        self._ran = RanSteps(merge)
        self._last: StepRecord | None = None

    def __call__(self) -> Iterator[StepRecord]:
        self._ran = RanSteps(self._merge)
        for record in self._answerer(self._question.prompt, self._generation, self._merge):
            self._ran.add(record)
            self._last = record
            yield record

    def answered(self, timing: Timing, bytes_per_element: int) -> Answered:
        """The answer whose ``timing`` this is, the last one."""
        prompt, right = self._question.prompt, self._question.right
        (batch, length), visual = prompt.embeddings.shape[:2], len(prompt.visual_positions)
        work = Workload(length, visual, self._generation.gen_length, batch, bytes_per_element)
        assert self._last is not None
        return Answered(
            timing,
            work,
            tuple(self._ran.steps),
            prompt_plan(self._merge, visual),
            None if right is None else right(self._last, self._generation),
        )


def answer_in_turns(
    answerers: Mapping[Combination, Answerer],
    questions: Sequence[Question],
    plan: GenerationConfig,
    rules: Mapping[CommitRule, GenerationConfig],
    merge: MergeConfig,
    rounds: int,
    progress: Progress = no_progress,
    *,
    bytes_per_element: int = 4,
) -> dict[Combination, list[Answered]]:
    """Answer every question in every combination ``rounds`` times, in turns; a first round is not counted.

    ``plan`` and ``rules`` say how answers are committed (:meth:`Combination.generation`), ``merge`` how they merge.
    The combinations take turns within a round, and there are ``rounds`` for each question.
    """
    found: dict[Combination, list[Answered]] = {combination: [] for combination in answerers}
    total = len(questions)
    for number, question in enumerate(questions):
        watched = {}
        for each, answerer in answerers.items():
            effective = each.merge(merge).in_loop(each.loop == "cached")
            watched[each] = _Watched(answerer, question, each.generation(plan, rules), effective)
        telling = progress if total == 1 else no_progress
        if total > 1:
            progress("answering", number, total)
        timings = time_in_turns(watched, rounds, telling, warm_up=int(not number), first=number * rounds)
        for each, runs in timings.items():
            found[each] += [watched[each].answered(run, bytes_per_element) for run in runs]
    progress("answered", total, total)
    return found


def _resident(field: str) -> int:
    """A field of Linux's process status, in bytes: VmRSS is what is resident now, VmHWM the most there was."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _answer_and_measure(
    folder: Path,
    backend_name: str,
    device: Device,
    combination: Combination,
    prompt: Prompt,
    generation: GenerationConfig,
    merge: MergeConfig,
    precision: str | None,
) -> Peak | None:
    claim()  # of a process made for this
    try:
        bundle = load_bundle(folder)
        backend = open_backend(backend_name, bundle, combination.loop, device=device, precision=precision)
        mark = Path("/proc/self/clear_refs")
        mark.write_text("5", encoding="ascii")  # VmHWM begins anew
        loaded = _resident("VmRSS")
        mask_token_id, used = bundle.config.language.mask_token_id, combination.merge(merge)
        records = run_loop(backend, prompt, mask_token_id, generation, used)
        for _ in islice(records, 2):
            pass
        first = _resident("VmHWM")
        mark.write_text("5", encoding="ascii")
        for _ in records:
            pass
        return Peak(loaded, first, _resident("VmHWM"))
    except OSError:  # no Linux, or no right to reset the mark
        return None


def peak_memory(
    folder: Path,
    backend_name: str,
    device: Device,
    combination: Combination,
    prompt: Prompt,
    generation: GenerationConfig,
    merge: MergeConfig,
    precision: str | None = None,
) -> Peak | None:
    """Resident memory of one answer in a fresh process; None where the system does not tell."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        call = (folder, backend_name, device, combination, prompt, generation, merge, precision)
        return pool.submit(_answer_and_measure, *call).result()


def spread(values: Sequence[float], digits: int = 6) -> dict[str, float]:
    """Median and range, rounded to ``digits``."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def cache_traffic(
    config: LanguageConfig, work: Workload, layer: int, last: StepMerge, prompt: PromptPlan
) -> dict[str, int]:
    """Bytes of a cached answer's keys and values: held in full, merged, and what its ``last`` step moves.

    Merged at the prefill, as ``prompt`` says, the layers behind l* (``layer``) are held merged alone.
    """
    per_token = work.batch * cache_bytes_per_token(config, work.bytes_per_element)
    per_layer = per_token // config.n_layers
    later = config.n_layers - layer - 1
    merged_rows = work.prompt_tokens - work.merged_away(last.keep)
    anew = last.keep is not None and last.afresh
    at_prefill = prompt.keep is not None
    return {
        "full": work.prompt_tokens * (per_layer * (layer + 1) if at_prefill else per_token),
        "merged": merged_rows * later * per_layer if last.keep is not None else 0,
        "read_per_step": work.prompt_tokens * (layer + 1) * per_layer
        + (work.prompt_tokens * later * per_layer if anew else 0)
        + merged_rows * later * per_layer,
        "written_per_step": merged_rows * later * per_layer if anew else 0,
    }


def answer_flops(
    combination: Combination,
    config: LanguageConfig,
    work: Workload,
    generation: GenerationConfig,
    merge: MergeConfig,
) -> int:
    """FLOPs of the matrix products of an answer that has all steps of its plan."""
    cached = combination.loop == "cached"
    effective = combination.merge(merge).in_loop(cached)
    steps = step_merges(effective, generation, work.visual_tokens, first_token=cached and config.row_shift)
    prompt = prompt_plan(effective, work.visual_tokens)
    return answer_cost(config, work, merge.layer, steps, cached=cached, prompt=prompt).flops


def share_interval(right: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that ``right`` of ``count`` were found to be."""
    z = statistics.NormalDist().inv_cdf(0.975)
    share, spare = right / count, z * z / count
    middle = (share + spare / 2) / (1 + spare)
    half = z * math.sqrt(share * (1 - share) / count + spare / count / 4) / (1 + spare)
    return max(0.0, middle - half), min(1.0, middle + half)


def summarize(
    answers: Mapping[Combination, Sequence[Answered]],
    peaks: Mapping[Combination, Peak | None],
    config: LanguageConfig,
    layer: int,
) -> list[dict[str, Any]]:
    """One row a combination: times in seconds, work in FLOPs, ratios to the first combination within each round.

    Where the right answers are known, the share of questions that were answered so, with its 95 % interval.
    """

    def flops(combination: Combination, each: Answered) -> int:
        cached = combination.loop == "cached"
        return answer_cost(config, each.work, layer, each.steps, cached=cached, prompt=each.prompt).flops

    rows: list[dict[str, Any]] = []
    base = next(iter(answers))
    for combination, found in answers.items():
        runs = [each.timing for each in found]
        totals = [run.total for run in runs]
        work = [flops(combination, each) for each in found]
        pairs = list(zip(answers[base], found, strict=True))
        ratios = [first.timing.total / each.timing.total for first, each in pairs]
        ideal = statistics.median(flops(base, first) / own for (first, _), own in zip(pairs, work, strict=True))
        kept = [share for each in found for share in shares_kept(each.work, each.steps)]
        tokens = sum(each.work.batch * each.work.answer_tokens for each in found)
        peak = peaks.get(combination)
        row = {
            "combination": combination.label,
            "by": combination.by,
            "loop": combination.loop,
            "merged": combination.merged,
            "merging": combination.merging,
            "commit": combination.commit,
            "steps": round(statistics.mean(len(each.steps) for each in found), 4),
            "mean_kept": round(statistics.mean(kept), 4),
            "answer_seconds": spread(totals),
            "first_token_seconds": spread([run.first_token for run in runs]),
            "step_seconds": spread([statistics.median(run.steps) for run in runs if run.steps] or [0.0]),
            "tokens_per_second": round(tokens / len(totals) / statistics.median(totals), 2),
            "flops": round(statistics.mean(work)),
            "speedup": spread(ratios, 4),
            "flop_ideal_speedup": round(ideal, 4),
            "of_flop_ideal": round(statistics.median(ratios) / ideal, 4),
            "peak_bytes": None if peak is None else asdict(peak) | {"added": peak.added},
        }
        if combination.loop == "cached":
            row["cache_bytes"] = cache_traffic(config, found[-1].work, layer, found[-1].steps[-1], found[-1].prompt)
        judged = [each.right for each in found if each.right is not None]
        if judged:
            low, high = share_interval(sum(judged), len(judged))
            row |= {"exact_match": round(sum(judged) / len(judged), 4), "questions": len(judged)}
            row["interval"] = [round(low, 4), round(high, 4)]
        rows.append(row)
    return rows
