"""The command that builds, or runs, what a search has chosen."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.quality.settings import Setting

if TYPE_CHECKING:
    from .quality_source import Source

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


_NONE = {"top_k": "0", "top_p": "1"}
"""What an option takes for no limit, where a model has one of its own."""


@dataclass(frozen=True)
class Given:
    """What a search was told that is no part of a setting, as options of ``run``."""

    runtime: tuple[str, ...] = ()
    """Backend, provider and precision."""
    wording: tuple[str, ...] = ()
    """System text, stops, and whether answers end early."""
    graphs: tuple[str, ...] = ()
    """Options of ``build`` without which a bundle lacks what ``runtime`` asks for."""


def _generation(chosen: GenerationConfig, base: GenerationConfig) -> list[str]:
    found = {}
    for field, option in _GENERATION.items():
        value = getattr(chosen, field)
        if value != getattr(base, field):
            found[option] = _NONE.get(field) if value is None else str(value)
    # Steps take the place of a share of them, so one that stays is told with them, and they in place of one that goes.
    if chosen.step_ratio is None and base.step_ratio is not None and chosen.steps is not None:
        found["--steps"] = str(chosen.steps)
    if "--steps" in found and chosen.step_ratio is not None:
        found["--step-ratio"] = str(chosen.step_ratio)
    words = [word for option, value in found.items() if value is not None for word in (option, value)]
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


def build_command(
    setting: Setting,
    layer: int,
    base: GenerationConfig,
    model: Path | None,
    tower: Path | None,
    extra: Sequence[str] = (),
) -> str:
    """``d3tom-export build`` of ``setting``: of a checkpoint, or of the bundled model (None).

    ``layer`` is where stages are cut that merge nothing, ``base`` how the checkpoint answers unless told otherwise,
    ``extra`` further options.
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
    return shlex.join([*words, *_generation(setting.generation, base), *extra])


def runs(setting: Setting, built: MergeConfig) -> bool:
    """Whether ``run`` can be told ``setting`` of a bundle built for ``built``: it takes the selection as it is."""
    merge = setting.merge
    if merge is None:
        return True
    names = ("ratio", "schedule", "deciders", "merge_at", "keep_multiple")
    cache = replace(built.cache, remerge=merge.cache.remerge, adaptive=merge.cache.adaptive)
    told = replace(built, cache=cache, **{name: getattr(merge, name) for name in names})
    return Setting.of(setting.loop, told, setting.generation) == setting


def run_command(
    setting: Setting, bundle: Path, base: GenerationConfig, loops: Sequence[str], extra: Sequence[str] = ()
) -> str:
    """``d3tom-export run`` of a bundle in ``setting`` (:func:`runs`), with ``extra`` options; picture and question are
    to be filled in."""
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
    return shlex.join([*words, *_generation(setting.generation, base), *extra])


def command_of(setting: Setting, source: Source, given: Given) -> tuple[str, list[str]]:
    """The command that builds ``setting``, or runs it where a bundle's graphs can; and what it cannot say, in words."""
    if source.checkpoint is None and runs(setting, source.merge):
        extra = [*given.runtime, *given.wording]
        return run_command(setting, source.folder, source.own_generation, source.loops, extra), []
    notes = []
    model, tower = (source.folder, None) if source.checkpoint is None else source.checkpoint
    layer, base, later = source.merge.layer, source.own_generation, list(given.wording)
    extra = list(source.build_words())
    if source.checkpoint is None:
        from d3tom_export.checkpoint.folder import default_generation

        assert setting.merge is not None
        base, later = default_generation(source.reader.config, source.folder), [*given.runtime, *later]
        extra += given.graphs
        notes.append(
            f"`run` takes the selection of {source.folder} as it was built, {source.merge.select}: this builds a "
            f"bundle for {setting.merge.select}."
        )
    if setting.merge is not None and setting.merge.keep_multiple != 1:
        later += ["--keep-multiple", str(setting.merge.keep_multiple)]
    if later:
        notes.append(f"A bundle does not keep these: run it with {shlex.join(later)}")
    layer = min(layer, source.reader.config.language.n_layers - 1)
    return build_command(setting, layer, base, model, tower, extra), notes
