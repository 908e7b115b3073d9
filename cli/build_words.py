"""The command that builds, or runs, what a search has chosen."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d3tom_export.config import GenerationConfig, MergeConfig

if TYPE_CHECKING:
    from d3tom_export.quality.settings import Setting

_GENERATION = {
    "gen_length": "--gen-length",
    "block_length": "--block-length",
    "steps": "--steps",
    "step_ratio": "--step-ratio",
    "schedule": "--step-schedule",
    "shift": "--shift",
    "commit": "--commit",
    "threshold": "--threshold",
    "factor": "--factor",
    "margin": "--margin",
    "max_steps": "--max-steps",
    "remasking": "--remasking",
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "seed": "--seed",
}
"""Fields of a generation by the options that set them."""


def _generation(chosen: GenerationConfig, base: GenerationConfig) -> list[str]:
    words = []
    for field, option in _GENERATION.items():
        value = getattr(chosen, field)
        if value != getattr(base, field) and value is not None:
            words += [option, str(value)]
    if chosen.fill_after_end != base.fill_after_end:
        words.append("--fill-after-end" if chosen.fill_after_end else "--no-fill-after-end")
    return words


def _cached(merge: MergeConfig) -> list[str]:
    """What is said of the loop with a KV cache alone."""
    words = ["--merge-at", "prefill"] if merge.merge_at == "prefill" else []
    words += ["--remerge", merge.cache.remerge] if merge.cache.remerge != "every-step" else []
    words += ["--cached-adaptive"] if merge.cache.adaptive else []
    words += [] if merge.cache.restore_norm else ["--no-restore-norm"]
    return words + ([] if merge.cache.text_targets else ["--no-text-targets"])


def build_command(setting: Setting, layer: int, base: GenerationConfig, model: Path | None, tower: Path | None) -> str:
    """``d3tom-export build`` of ``setting``: of a checkpoint, or of the bundled model (None).

    ``layer`` is where stages are cut that merge nothing, ``base`` how the checkpoint answers unless told otherwise.
    """
    words = ["d3tom-export", "build"]
    words += [] if model is None else ["--model", str(model)]
    words += [] if tower is None else ["--vision-tower", str(tower)]
    merge = setting.merge
    if merge is None:
        words += ["--layer", str(layer), "--schedule", "none"]
    else:
        words += ["--layer", str(merge.layer), "--ratio", str(merge.ratio), "--schedule", merge.schedule]
        for option, value, usual in (
            ("--select", merge.select, "decider"),
            ("--deciders", merge.deciders, "committed"),
            ("--aggregate", merge.aggregate, "sum"),
            ("--positions", merge.positions, "compact"),
        ):
            words += [] if value == usual else [option, value]
    if setting.loop == "cached":
        words += ["--kv-cache", *(_cached(merge) if merge is not None else [])]
    return shlex.join([*words, *_generation(setting.generation, base)])


def run_command(setting: Setting, bundle: Path, base: GenerationConfig, loops: Sequence[str]) -> str:
    """``d3tom-export run`` of a bundle in ``setting``; picture and question are to be filled in."""
    words = ["d3tom-export", "run", str(bundle), "--image", "FILE", "--prompt", "TEXT"]
    if len(loops) > 1:
        words.append("--kv-cache" if setting.loop == "cached" else "--no-kv-cache")
    merge = setting.merge
    if merge is None:
        words += ["--schedule", "none"]
    else:
        words += ["--ratio", str(merge.ratio), "--schedule", merge.schedule, "--deciders", merge.deciders]
        if setting.loop == "cached":
            words += ["--merge-at", merge.merge_at, "--remerge", merge.cache.remerge]
            words.append("--cached-adaptive" if merge.cache.adaptive else "--cached-fixed")
        words += [] if merge.keep_multiple == 1 else ["--keep-multiple", str(merge.keep_multiple)]
    return shlex.join([*words, *_generation(setting.generation, base)])
