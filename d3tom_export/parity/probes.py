"""What samples leave out: prompts and ids that probe a backend where questions about one picture never lead it.

Imports no framework. B batch, P prompt tokens, V visual tokens, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from d3tom_export.config import GenerationConfig, ModelConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.backend import Backend
from d3tom_export.loop.denoise import Floats
from d3tom_export.parity.bounds import relative_difference
from d3tom_export.prompt.samples import TokenSample

_STEPS = 4
"""Steps of a probe's answer, each block: one that merges nothing and three that do."""
_ROWS = 4096
"""Rows of an embedding table that are looked up, where it has more."""


class Probe(NamedTuple):
    """A prompt of token ids, how it is answered, and what it is for."""

    name: str
    sample: TokenSample
    generation: GenerationConfig


def probed_line(probes: Sequence[str]) -> str:
    """What a report tells people of its ``probes``: each kind once, with how many backends and loops it was run on."""
    counts = Counter(probe.partition(" [")[0] for probe in probes)
    return "; ".join(f"{name} ({count}x)" if count > 1 else name for name, count in counts.items())


def probe_note(name: str, where: str) -> str:
    """A probe in a report's list, with the loop and the backend it was run on."""
    where = where.removeprefix(", ")
    return f"{name} [{where}]" if where else name


def probe_generation(generation: GenerationConfig) -> GenerationConfig:
    """How a probe is answered: the same tokens in few steps, without noise.

    By a plan, with nothing filled in: under a rule an answer may have one step, which merges nothing.
    """
    if not generation.planned:
        generation = generation.changed(commit="plan")
    ratio = min(1.0, _STEPS / generation.block, generation.step_ratio or 1.0)
    return replace(generation, step_ratio=ratio, temperature=0.0, fill_after_end=False)


def probe_prompts(config: ModelConfig, generation: GenerationConfig, backend: Backend) -> tuple[list[Probe], list[str]]:
    """Prompts that show what no sample does, and the reasons why some are left out.

    Two pictures apart: the visual tokens are no run. A batch of two: each row has prompt and deciders of its own. No
    picture: nothing to merge. Its answer is a token shorter than all others: a graph may have their length built in.
    Engines refuse what they were not built for; such a prompt is left out and said to be, or has the usual length.
    """
    room = config.language.max_sequence_length - generation.gen_length
    if room < 12:
        return [], [f"a prompt of two pictures does not fit into the {room} tokens that the answer leaves"]
    # Text, picture, text, picture, text.
    runs = [max(1, size * min(room, 40) // 40) for size in (5, 11, 4, 13, 7)]
    ends = np.cumsum(runs)
    visual = np.concatenate([np.arange(ends[0], ends[1]), np.arange(ends[2], ends[3])])
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.language.vocab_rows, (2, int(ends[-1])))
    none = np.zeros(0, dtype=np.int64)
    text = ids[:1, : min(room, 16)]
    probes: list[Probe] = []
    skipped: list[str] = []
    usual = probe_generation(generation)
    length = usual.gen_length - 1 or 2
    shorter = probe_generation(replace(usual, gen_length=length, block_length=None))
    two = Probe("two pictures apart, in a batch of two", TokenSample(ids, visual), usual)
    plain = Probe(f"no picture, an answer of {length} tokens", TokenSample(text, none), shorter)
    for wanted, instead in (
        (two, Probe("two pictures apart", TokenSample(ids[:1], visual), usual)),
        (plain, Probe("no picture", plain.sample, usual)),
    ):
        probe, reason = wanted, _misfit(backend, wanted)
        if reason is not None:
            skipped.append(f"{wanted.name}: {reason}")
            probe, reason = instead, _misfit(backend, instead)
        if reason is None:
            probes.append(probe)
        else:
            skipped.append(f"{probe.name}: {reason}")
    return probes, skipped


def _misfit(backend: Backend, probe: Probe) -> str | None:
    """Why ``backend`` was not built for such a prompt and answer: engines have ranges of sizes, other backends none."""
    check = getattr(backend, "check", None)
    if check is None:
        return None
    batch, prompt = probe.sample.token_ids.shape
    visual = max(1, len(probe.sample.visual_positions))
    try:
        check({"B": batch, "P": prompt, "V": visual, "G": probe.generation.gen_length})
    except D3tomError as error:
        return str(error)
    return None


def _table_rows(config: ModelConfig) -> NDArray[np.int64]:
    rows = config.language.vocab_rows
    if rows <= _ROWS:
        return np.arange(rows)
    chosen = np.random.default_rng(0).choice(rows, _ROWS, replace=False)
    return np.union1d(chosen, [0, rows - 1, config.language.mask_token_id])


def table_difference(
    oracle: Backend, backend: Backend, config: ModelConfig, generation: GenerationConfig
) -> tuple[float, int]:
    """The largest difference of any embedding from ``oracle``'s, relative to its row's largest, and how many it saw.

    All rows of a small table; of a large one 4,096, the first and the last among them.
    """
    rows, worst = _table_rows(config), 0.0
    # As many at a time as an answer has: engines take no more than they were built for.
    size = generation.gen_length
    for start in range(0, len(rows), size):
        ids = np.resize(rows[start : start + size], (1, size))
        found, expected = backend.embed_tokens(ids), oracle.embed_tokens(ids)
        if found.shape != expected.shape or not np.isfinite(found).all():
            return float("inf"), len(rows)
        scale = np.maximum(np.abs(expected).max(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
        worst = float(np.maximum(worst, (np.abs(found - expected) / scale).max()))  # a NaN of the oracle's wins
    return worst, len(rows)


def noise_views(config: ModelConfig) -> Floats:
    """Two views of noise (2, 3, S, S)."""
    assert config.vision is not None
    size = config.vision.image_size
    return np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)


def vision_difference(oracle: Backend, backend: Backend, config: ModelConfig) -> float:
    """The largest difference of the visual features of two views of noise, relative to the largest.

    It is infinite where the features have another shape or are not finite.
    """
    pixels = noise_views(config)
    return relative_difference(backend.encode_views(pixels), oracle.encode_views(pixels))
