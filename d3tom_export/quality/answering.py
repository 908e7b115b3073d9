"""Questions answered in many settings, sample by sample: what is there is paired at every moment. NumPy only."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from d3tom_export.config import GenerationConfig
from d3tom_export.cost.flops import Workload
from d3tom_export.cost.ran import RanSteps, ran_flops
from d3tom_export.errors import D3tomError
from d3tom_export.loop.backend import Backend, Prompt
from d3tom_export.pipeline import Reader, run_loop
from d3tom_export.progress import Progress, no_progress
from d3tom_export.quality.dataset import DataSet, Item
from d3tom_export.quality.results import Answered, Results
from d3tom_export.quality.settings import Setting

Runtime = Callable[[Setting], Backend]
"""The backend that runs a setting. Those of all settings embed a prompt equally."""


def sample_seed(seed: int, sample: int) -> int:
    """The seed of a sample's noise, 32 bits: of ``seed`` and the sample's place alone, so that order is nothing."""
    return int(np.random.SeedSequence([seed, sample]).generate_state(1)[0])


def answer_once(
    backend: Backend, reader: Reader, prompt: Prompt, setting: Setting, item: Item, generation: GenerationConfig
) -> Answered:
    """Answer ``prompt`` as ``setting`` says, with the noise of ``item``."""
    language, merge = reader.config.language, setting.effective
    seeded = replace(generation, seed=sample_seed(generation.seed, item.index))
    ran, kept = RanSteps(merge), []
    started = time.perf_counter()
    last = None
    for record in run_loop(backend, prompt, language.mask_token_id, seeded, merge):
        ran.add(record)
        kept.append(record.keep)
        last = record
    seconds = time.perf_counter() - started
    assert last is not None  # an answer has a step
    work = Workload(prompt.embeddings.shape[1], len(prompt.visual_positions), generation.gen_length)
    return Answered(
        setting=setting.id,
        sample=item.index,
        text=reader.answer(last, generation).text,
        steps=len(kept),
        kept=tuple(kept),
        prompt_tokens=work.prompt_tokens,
        visual_tokens=work.visual_tokens,
        flops=ran_flops(language, work, merge, ran.steps, cached=setting.loop == "cached"),
        seconds=round(seconds, 6),
    )


def answer_all(
    runtime: Runtime,
    reader: Reader,
    data: DataSet,
    items: Sequence[Item],
    settings: Sequence[Setting],
    results: Results,
    progress: Progress = no_progress,
) -> None:
    """Answer every one of ``items`` in every setting that ``results`` has no answer of yet.

    A prompt is embedded once for all settings. Raises :class:`D3tomError` for a picture that cannot be read and a
    prompt that does not fit the model; what was answered until then is kept.
    """
    total = len(items) * len(settings)
    done = sum(results.has(setting, item) for setting in settings for item in items)
    for item in items:
        missing = [setting for setting in settings if not results.has(setting, item)]
        progress("answering", done, total)
        contents = data.contents(item)
        results.know(item, data.key(item, contents))
        if not missing:
            continue
        prompt = _prompt(runtime, reader, data, item, contents, missing)
        for setting in missing:
            answered = answer_once(runtime(setting), reader, prompt, setting, item, setting.generation)
            results.add(setting, answered)
            done += 1
            progress("answering", done, total)


def warm_up(runtime: Runtime, reader: Reader, data: DataSet, item: Item, settings: Sequence[Setting]) -> None:
    """Answer ``item`` in every setting and forget it, so that nothing is loaded for the first time while time counts.

    Raises as :func:`answer_all` does.
    """
    prompt = _prompt(runtime, reader, data, item, data.contents(item), settings)
    for setting in settings:
        answer_once(runtime(setting), reader, prompt, setting, item, setting.generation)


def _prompt(
    runtime: Runtime, reader: Reader, data: DataSet, item: Item, contents: Sequence[bytes], settings: Sequence[Setting]
) -> Prompt:
    try:
        pictures = data.decode(item, contents)
        longest = max((setting.generation for setting in settings), key=lambda each: each.gen_length)
        return reader.read(runtime(settings[0]), item.question, pictures, longest)
    except D3tomError as error:
        raise D3tomError(f"Question {item.id} of {data.name} cannot be asked. {error}") from None
