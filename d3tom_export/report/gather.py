"""Runs a bundle on a few questions and gathers what a report says of it.

V visual tokens, K kept. Imports no framework but NumPy; what the eager model tells comes from outside.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d3tom_export.bundle.folder import Bundle, file_sha256
from d3tom_export.bundle.manifest import MANIFEST_FILE, stage_file, weights_sha256
from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.cost.flop_stages import answer_stages, reductions
from d3tom_export.cost.flops import StepMerge, Workload, answer_cost, prompt_plan
from d3tom_export.cost.ran import RanSteps
from d3tom_export.families.registry import family_of
from d3tom_export.loop.backend import Backend
from d3tom_export.loop.denoise import StepRecord
from d3tom_export.pictures.places import token_grids
from d3tom_export.pipeline import Reader, run_loop
from d3tom_export.progress import Progress
from d3tom_export.prompt.pieces import pieces_of, said
from d3tom_export.report.data import Answer, Reductions, Redundancy, Step, Work
from d3tom_export.report.watch import Watched, WatchingBackend
from d3tom_export.version import __version__

_WARM_UP = 2
"""Steps of the first question that are run beforehand: a runtime's first calls take longer."""
_LOOKED_AT = 3
"""Steps of an answer whose redundancy is measured: the first, the last and one between."""
_LOWEST_RATIO = {"adaptive": 50, "fixed": 10}
"""Of the FLOPs' map, in percent: below a half the adaptive schedule's mean stays where it is."""


@dataclass(frozen=True)
class Asked:
    """One question about one picture, or about none."""

    question: str
    picture: Image.Image | None
    name: str
    """What the picture is called."""
    right: str | None = None


Importance = Callable[[Watched], Sequence[NDArray[np.float32] | None]]
"""Of each step of an answer the (V,) scores of its visual tokens; None where nothing was scored."""
Similarities = Callable[[Watched, Sequence[int]], NDArray[np.float32]]
"""(steps, N, V) at the given steps of an answer, counted from 0; fewer where steps do not matter."""


def gather(
    bundle: Bundle,
    backend: Backend,
    reader: Reader,
    asked: Sequence[Asked],
    generation: GenerationConfig,
    merge: MergeConfig,
    progress: Progress,
    importance: Importance | None = None,
    similarities: Similarities | None = None,
) -> tuple[list[Answer], Redundancy | None]:
    """Answer every question on ``backend``, step by step.

    ``importance`` and ``similarities`` are those of the eager model; None leaves them out. Redundancy is None then, or
    where no picture has two visual tokens.
    """
    answers, alike = [], []
    for number, each in enumerate(asked):
        progress("answering", number, len(asked))
        answer, watched = _answer(bundle, backend, reader, each, generation, merge, warm_up=number == 0)
        if importance is not None and answer.visual_tokens:
            progress("asking PyTorch whom the deciders look at", number, len(asked))
            scores = importance(watched)
            steps = [replace(step, importance=each) for step, each in zip(answer.steps, scores, strict=True)]
            answer = replace(answer, steps=steps)
        if similarities is not None and answer.visual_tokens > 1:
            progress("asking PyTorch how alike visual tokens are", number, len(asked))
            alike.append(similarities(watched, _looked_at(len(answer.steps))))
        answers.append(answer)
    progress("answered", len(asked), len(asked))
    return answers, _redundancy(alike)


def _looked_at(steps: int) -> list[int]:
    """The steps whose redundancy is measured, counted from 0; of a short answer some come twice."""
    return [round(place * (steps - 1) / (_LOOKED_AT - 1)) for place in range(_LOOKED_AT)]


def _redundancy(alike: Sequence[NDArray[np.float32]]) -> Redundancy | None:
    if not alike:
        return None
    together = np.concatenate(alike, axis=-1)
    names = ["first step", "middle step", "last step"] if len(together) == _LOOKED_AT else ["prompt"]
    return Redundancy(names, together)


def _answer(
    bundle: Bundle,
    backend: Backend,
    reader: Reader,
    asked: Asked,
    generation: GenerationConfig,
    merge: MergeConfig,
    *,
    warm_up: bool,
) -> tuple[Answer, Watched]:
    watching, pictures = WatchingBackend(backend), [] if asked.picture is None else [asked.picture]
    if warm_up:
        prompt = reader.read(backend, asked.question, pictures, generation)
        mask = reader.config.language.mask_token_id
        for _ in islice(run_loop(backend, prompt, mask, generation, merge), _WARM_UP):
            pass
    read = watching.measure(reader.read, watching, asked.question, pictures, generation)
    prompt, prompt_seconds, prompt_stages = read
    language, visual = reader.config.language, len(prompt.visual_positions)
    records = list(run_loop(watching, prompt, language.mask_token_id, generation, merge))
    watched, effective = watching.watched, merge.in_loop(backend.kv_cache)
    ran = RanSteps(effective)
    for record in records:
        ran.add(record)
    sizes = Workload(prompt.embeddings.shape[1], visual, generation.gen_length)
    vision = reader.config.vision
    answer = Answer(
        question=asked.question,
        picture_name=asked.name,
        picture=asked.picture,
        grids=[] if asked.picture is None or vision is None else token_grids(asked.picture.size, vision),
        text=reader.answer(records[-1], generation).text,
        right=asked.right,
        prompt_tokens=sizes.prompt_tokens,
        visual_tokens=visual,
        prompt_seconds=prompt_seconds,
        prefill_seconds=watched.start_seconds,
        prompt_stages=_sum(prompt_stages, watched.start_stages),
        steps=[_step(number, record, reader, visual, watched) for number, record in enumerate(records)],
        merges=ran.steps,
        work=_work(bundle, sizes, effective, ran.steps, cached=backend.kv_cache),
    )
    return answer, watched


def _sum(*parts: dict[str, float]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


def _step(number: int, record: StepRecord, reader: Reader, visual: int, watched: Watched) -> Step:
    kept = record.result.kept
    return Step(
        number=number + 1,
        merged=record.merged,
        kept=kept[0].tolist() if record.merged and kept is not None else None,
        visual_tokens=visual,
        committed=int(record.transfer[0].sum()),
        pieces=pieces_of(said(record, reader.end_ids), reader.tokenizer, reader.config.language.mask_token_id, "utf-8"),
        seconds=watched.step_seconds[number],
        stages=watched.step_stages[number],
    )


def _work(bundle: Bundle, sizes: Workload, merge: MergeConfig, merges: Sequence[StepMerge], *, cached: bool) -> Work:
    """FLOPs of the steps that ran, and of as many unmerged ones; ``merge`` holds in the loop."""
    language, plan = bundle.config.language, prompt_plan(merge, sizes.visual_tokens)
    stages = answer_stages(language, sizes, merge.layer, merges, cached=cached, prompt=plan)
    unmerged = answer_cost(language, sizes, 0, [StepMerge(None)] * len(merges), cached=cached)
    return Work({stage.stage: stage.cost.flops for stage in stages if stage.cost.flops}, unmerged.flops)


def reductions_of(
    bundle: Bundle, answer: Answer, generation: GenerationConfig, merge: MergeConfig
) -> Reductions | None:
    """FLOPs saved over l* and ratio for an answer of this one's sizes, all its steps run; None where nothing merges."""
    language, visual = bundle.config.language, answer.visual_tokens
    if not visual or merge.schedule == "none" or merge.select != "decider" or language.n_layers < 2:
        return None
    planned = generation if generation.planned else generation.changed(commit="plan")
    sizes = Workload(answer.prompt_tokens, visual, planned.gen_length)
    layers = list(range(language.n_layers))
    ratios = [percent / 100 for percent in range(_LOWEST_RATIO[merge.schedule], 97, 2)]
    saved = reductions(language, sizes, merge, planned, layers, ratios)
    ((here,),) = reductions(language, sizes, merge, planned, [merge.layer], [merge.ratio])
    words = (
        f"{visual:,} visual tokens, {sizes.prompt_tokens:,} of the prompt, {sizes.answer_tokens} of the answer, "
        f"{planned.total_steps} steps, {merge.schedule} ratio"
    )
    return Reductions(layers, ratios, saved, merge.layer, merge.ratio, here, words)


def merging_words(merge: MergeConfig, *, cached: bool) -> str:
    """How visual tokens are merged, in a few words."""
    effective = merge.in_loop(cached)
    if effective.schedule == "none":
        return "nothing merged"
    where = ", once at the prefill" if effective.merge_at == "prefill" else ""
    ratio = f"ratio {effective.ratio:g} {effective.schedule}"
    by = "" if effective.select == "decider" else f", selected by {effective.select}"
    return f"merged at layer {effective.layer}, {ratio}{where}{by}"


def _weights(bundle: Bundle) -> str:
    """Where they came from, and the format of those in few bits."""
    manifest = bundle.manifest
    told = {"checkpoint": "of a checkpoint", "random": "random"}.get(manifest.weights, "all zero")
    if not manifest.formats:
        return told
    inputs = ", what they are multiplied with too" if manifest.rounds_inputs else ""
    return f"{told}, those of products in {', '.join(sorted(manifest.formats))}{inputs}"


_RUNTIMES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx",),
}
_PACKAGES = ("torch", "numpy", "pillow", "tokenizers")


def built_with(
    bundle: Bundle, backend: Backend, generation: GenerationConfig, merge: MergeConfig
) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the bundle is, how it was asked, and what ran it: groups of names and what stands behind them."""
    manifest, language, vision = bundle.manifest, bundle.config.language, bundle.config.vision
    eyes = "none" if vision is None else f"{vision.image_size} px views, {vision.tokens_per_view} tokens each"
    length = f"{generation.gen_length} tokens in blocks of {generation.block}"
    commits = f"at most {generation.total_steps} steps, committed by {generation.commit}"
    model = [
        ("model", manifest.model_name),
        ("family", family_of(bundle.config).title),
        ("weights", _weights(bundle)),
        ("language", f"{language.n_layers} layers, width {language.d_model}, {language.vocab_rows:,} tokens"),
        ("vision", eyes),
    ]
    asked = [
        ("merging", merging_words(merge, cached=backend.kv_cache)),
        ("deciders", merge.deciders),
        ("aggregate", f"{merge.aggregate}, {merge.positions} positions"),
        ("answer", f"{length}, {commits}"),
        ("remasking", f"{generation.remasking}, temperature {generation.temperature:g}, seed {generation.seed}"),
    ]
    made = [
        ("precision", manifest.precision),
        ("loops", ", ".join(manifest.loops)),
        ("opset", str(manifest.opset)),
        *((f"built by {name}", told) for name, told in manifest.created_by.items()),
    ]
    packages = (*_RUNTIMES.get(backend.name.replace(",", " ").split()[0], ()), *_PACKAGES)
    ran = [
        ("backend", f"{backend.name}, {backend.precision}{', KV cache' if backend.kv_cache else ''}"),
        ("d3tom_export", __version__),
        ("Python", platform.python_version()),
        *((name, found) for name in packages if (found := _installed(name)) is not None),
        ("machine", _machine()),
    ]
    return [("Model", model), ("Answers", asked), ("Bundle", made), ("Run", ran)]


def hashes_of(bundle: Bundle, *, cached: bool) -> list[tuple[str, str]]:
    """sha256 of the bundle's manifest, of its weights together, and of the graphs of the loop that ran."""
    files, keys = bundle.files or {}, bundle.stage_keys("cached" if cached else "uncached").values()
    return [
        (MANIFEST_FILE, file_sha256(bundle.folder / MANIFEST_FILE)),
        *([("weights", weights_sha256(files))] if files else []),
        *((name, files[name]["sha256"]) for name in map(stage_file, keys) if name in files),
    ]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """System and processor, no name of a host."""
    processor = platform.processor() or platform.machine()
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    return f"{platform.system()} {platform.machine()}, {named}"
