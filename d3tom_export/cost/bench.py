"""Time, memory and work of one answer in the combinations of KV cache and merging, on one loop and one backend.

Every run answers the same prompt. The combinations take turns within a round, so that a slow minute of the machine
falls on all of them; ratios are taken within a round and reported with their spread. Imports no framework.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from d3tom_export.backends.select import open_backend
from d3tom_export.bundle.folder import load_bundle
from d3tom_export.config import GenerationConfig, LanguageConfig, Loop, MergeConfig, Remerge
from d3tom_export.cost.flops import Workload, answer_cost, cache_bytes_per_token, prompt_plan, step_merges
from d3tom_export.loop.backend import Backend, Prompt
from d3tom_export.pipeline import run_loop
from d3tom_export.process import claim
from d3tom_export.progress import Progress, no_progress

if TYPE_CHECKING:
    from d3tom_export.backends.onnxruntime_options import Device


@dataclass(frozen=True)
class Combination:
    """A loop, with or without merging."""

    loop: Loop
    merged: bool
    remerge: Remerge | None = None
    """How often a cache is merged anew, where not as the base configuration says."""

    @property
    def label(self) -> str:
        name = f"{self.loop} + D3ToM" if self.merged else self.loop
        return name if self.remerge is None else f"{name}, {self.remerge}"

    def merge(self, base: MergeConfig) -> MergeConfig:
        """``base``, switched off where this combination does not merge."""
        if not self.merged:
            return replace(base, schedule="none")
        return base if self.remerge is None else replace(base, cache=replace(base.cache, remerge=self.remerge))


def combinations_of(loops: Sequence[Loop]) -> list[Combination]:
    """Every loop of ``loops`` unmerged and merged."""
    return [Combination(loop, merged) for loop in loops for merged in (False, True)]


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
    answers: Mapping[Key, Answer], rounds: int, progress: Progress = no_progress, *, warm_up: int = 1
) -> dict[Key, list[Timing]]:
    """Time every answer once a round, each round beginning with another one; ``warm_up`` rounds are not counted."""
    keys = list(answers)
    timings: dict[Key, list[Timing]] = {key: [] for key in keys}
    total = (rounds + warm_up) * len(keys)
    for turn in range(rounds + warm_up):
        start = turn % len(keys)
        for place, key in enumerate([*keys[start:], *keys[:start]]):
            progress("warming up" if turn < warm_up else "answering", turn * len(keys) + place, total)
            timing = time_answer(answers[key])
            if turn >= warm_up:
                timings[key].append(timing)
    progress("answered", total, total)
    return timings


def time_combinations(
    backends: Mapping[Loop, Backend],
    combinations: Sequence[Combination],
    prompt: Prompt,
    mask_token_id: int,
    generation: GenerationConfig,
    merge: MergeConfig,
    rounds: int,
    progress: Progress = no_progress,
) -> dict[Combination, list[Timing]]:
    """Time every combination in turns; a first round is not counted."""
    answers = {
        combination: partial(
            run_loop, backends[combination.loop], prompt, mask_token_id, generation, combination.merge(merge)
        )
        for combination in combinations
    }
    return time_in_turns(answers, rounds, progress)


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
    config: LanguageConfig, work: Workload, layer: int, merge: MergeConfig, generation: GenerationConfig
) -> dict[str, int]:
    """Bytes of a cached answer's keys and values: held in full, merged, and what a later step moves.

    Merged at the prefill, the layers behind l* are held merged alone.
    """
    last = step_merges(merge, generation, work.visual_tokens, first_token=config.row_shift)[-1]
    per_token = work.batch * cache_bytes_per_token(config, work.bytes_per_element)
    per_layer = per_token // config.n_layers
    later = config.n_layers - layer - 1
    merged_rows = work.prompt_tokens - work.merged_away(last.keep)
    anew = last.keep is not None and last.afresh
    at_prefill = prompt_plan(merge, work.visual_tokens).keep is not None
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
    ran: int | None = None,
) -> int:
    """FLOPs of an answer's matrix products, of its first ``ran`` steps (None: of all)."""
    cached = combination.loop == "cached"
    effective = combination.merge(merge).in_loop(cached)
    steps = step_merges(effective, generation, work.visual_tokens, first_token=cached and config.row_shift)
    prompt = prompt_plan(effective, work.visual_tokens)
    return answer_cost(config, work, merge.layer, steps[:ran], cached=cached, prompt=prompt).flops


def summarize(
    timings: Mapping[Combination, Sequence[Timing]],
    peaks: Mapping[Combination, Peak | None],
    config: LanguageConfig,
    work: Workload,
    generation: GenerationConfig,
    merge: MergeConfig,
) -> list[dict[str, Any]]:
    """One row a combination: times in seconds, work in FLOPs, ratios to the first combination within each round."""
    rows: list[dict[str, Any]] = []
    base = next(iter(timings))
    for combination, runs in timings.items():
        totals = [run.total for run in runs]
        ratios = [first.total / run.total for first, run in zip(timings[base], runs, strict=True)]
        ran, ran_of_base = 1 + len(runs[0].steps), 1 + len(timings[base][0].steps)
        flops = answer_flops(combination, config, work, generation, merge, ran)
        ideal = answer_flops(base, config, work, generation, merge, ran_of_base) / flops
        peak = peaks.get(combination)
        row = {
            "combination": combination.label,
            "loop": combination.loop,
            "merged": combination.merged,
            "steps": ran,
            "answer_seconds": spread(totals),
            "first_token_seconds": spread([run.first_token for run in runs]),
            "step_seconds": spread([statistics.median(run.steps) for run in runs if run.steps] or [0.0]),
            "tokens_per_second": round(work.batch * work.answer_tokens / statistics.median(totals), 2),
            "flops": flops,
            "speedup": spread(ratios, 4),
            "flop_ideal_speedup": round(ideal, 4),
            "of_flop_ideal": round(statistics.median(ratios) / ideal, 4),
            "peak_bytes": None if peak is None else asdict(peak) | {"added": peak.added},
        }
        if combination.loop == "cached":
            effective = combination.merge(merge).in_loop(True)
            row["cache_bytes"] = cache_traffic(config, work, merge.layer, effective, generation)
        rows.append(row)
    return rows
