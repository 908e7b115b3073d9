"""Requests of equal layout in one batch: which those are, and each answered as it would be alone.

The graphs take one number of prompt tokens, one set of visual positions, one number of answer tokens and one K for all
rows of a batch, and no mask for padding; so what differs in these runs apart. Imports no framework.

B batch, P prompt tokens, G answer tokens, V visual tokens, D width, K kept.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from d3tom_export.api.answers import Answer
from d3tom_export.api.settings import Asked
from d3tom_export.errors import D3tomError
from d3tom_export.loop.backend import Backend, Prompt
from d3tom_export.loop.denoise import StepRecord
from d3tom_export.pipeline import run_loop


@dataclass(frozen=True)
class Ready:
    """A request whose prompt is embedded."""

    asked: Asked
    prompt: Prompt
    """Of one row."""
    seconds: float
    """That this took."""


def layout(ready: Ready, kv_cache: bool) -> Hashable:
    """What requests must have in common to run as one batch; None for one that runs alone.

    A batch has one K at every step. Under a plan it follows from the step, under a fixed ratio from V; but under a
    commit rule the adaptive ratio goes by what is committed, and a batch takes it from its row that is furthest, so
    that others would see more visual tokens than alone: those run alone. So do questions that share a prefix, which
    they do one after the other.
    """
    asked, prompt = ready.asked, ready.prompt
    merge, generation = asked.merge.in_loop(kv_cache), asked.generation
    by_commits = not generation.planned and merge.schedule == "adaptive" and len(prompt.visual_positions) > 0
    if asked.share_prefix or by_commits:
        return None
    return prompt.embeddings.shape[1], prompt.visual_positions.tobytes(), replace(generation, seed=0), merge


def grouped(requests: Mapping[int, Ready], kv_cache: bool, most: int) -> list[list[int]]:
    """The places of ``requests`` in groups that run together, of at most ``most``, in the order of their firsts."""
    found: dict[Hashable, list[list[int]]] = {}
    for place, ready in requests.items():
        key = layout(ready, kv_cache)
        groups = found.setdefault(("alone", place) if key is None else key, [])
        if not groups or len(groups[-1]) >= most:
            groups.append([])
        groups[-1].append(place)
    return sorted((group for groups in found.values() for group in groups), key=lambda group: group[0])


def batch_limit(backend: Backend, most: int) -> int:
    """The most answers at once, up to ``most``, that the backend's engines are built for."""
    check = getattr(backend, "check", None)
    for batch in range(most, 1, -1):
        try:
            if check is not None:
                check({"B": batch})
        except D3tomError:
            continue
        return batch
    return 1


class RowRecords:
    """What becomes of a batch's rows, step by step: the steps that each had, and whether they are what it had alone.

    Alone means: at a step of a batch that merges, every row that works has deciders, and with noise none works again
    that idled, for it would have drawn less.
    """

    def __init__(self, batch: int, *, noisy: bool, at_prefill: bool) -> None:
        self.kept: list[list[int]] = [[] for _ in range(batch)]
        """K of each step that the row had."""
        self.last: list[StepRecord | None] = [None] * batch
        """The row's last step, without logits."""
        self.independent = True
        self._noisy, self._at_prefill = noisy, at_prefill
        self._decided = np.zeros(batch, dtype=np.bool_)
        self._idled = np.zeros(batch, dtype=np.bool_)

    def add(self, record: StepRecord) -> None:
        working = record.working
        assert working is not None
        undecided = record.merged and not self._at_prefill and bool((working & ~self._decided).any())
        if undecided or (self._noisy and bool((working & self._idled).any())):
            self.independent = False
        self._decided |= record.transfer.any(axis=1)
        self._idled |= ~working
        kept = replace(record, result=replace(record.result, logits=None))  # a gigabyte of them, at real size
        for row in np.flatnonzero(working):
            self.kept[row].append(record.keep)
            self.last[row] = kept


def answer_together(backend: Backend, group: Sequence[Ready]) -> list[Answer] | None:
    """Answers to requests of one :func:`layout`, in their order; None where they may not be what each gets alone.

    Rows end apart: what a row has after its own last step does not count. The batch ends with its last row.
    """
    started, first = time.perf_counter(), group[0]
    merge, generation = first.asked.merge.in_loop(backend.kv_cache), first.asked.generation
    noisy = generation.temperature > 0 or generation.remasking == "random" or merge.select == "random"
    rows = RowRecords(len(group), noisy=noisy, at_prefill=merge.merge_at == "prefill")
    prompt = first.prompt
    if len(group) > 1:
        prompt = Prompt(np.concatenate([each.prompt.embeddings for each in group]), prompt.visual_positions)
    for record in run_loop(
        backend,
        prompt,
        first.asked.reader.config.language.mask_token_id,
        generation,
        first.asked.merge,
        share_prefix=first.asked.share_prefix,
        seeds=[each.asked.generation.seed for each in group],
    ):
        rows.add(record)
        if not rows.independent and len(group) > 1:
            return None
    seconds = (time.perf_counter() - started) / len(group)
    return [answer_of(backend, ready, rows.last[row], rows.kept[row], seconds, row) for row, ready in enumerate(group)]


def answer_of(
    backend: Backend, ready: Ready, last: StepRecord | None, kept: Sequence[int], seconds: float, row: int = 0
) -> Answer:
    """The answer of ``ready`` that ended with a row of the step ``last``."""
    assert last is not None  # an answer has a step
    asked, prompt = ready.asked, ready.prompt
    found = asked.reader.answer(last, asked.generation, raw=asked.raw_text, row=row)
    return Answer(
        text=found.text,
        token_ids=tuple(found.token_ids),
        kept=tuple(kept),
        visual_tokens=len(prompt.visual_positions),
        prompt_tokens=prompt.embeddings.shape[1],
        shared_tokens=prompt.shared_rows if asked.share_prefix else 0,
        merge=asked.merge,
        generation=asked.generation,
        backend=backend.name,
        kv_cache=backend.kv_cache,
        prompt_seconds=ready.seconds,
        denoise_seconds=seconds,
    )
