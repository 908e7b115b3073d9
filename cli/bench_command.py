"""``d3tom-export bench``"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d3tom_export.backends.choice import BUILDING_DEVICES, check_choice

from . import answer_options, common, options
from .sections import Section, heading

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from d3tom_export.backends.onnxruntime_options import Device
    from d3tom_export.bundle.folder import Bundle, Verify
    from d3tom_export.config import GenerationConfig, MergeConfig
    from d3tom_export.cost.bench import Peak, Question
    from d3tom_export.cost.combinations import Combination
    from d3tom_export.loop.backend import Backend
    from d3tom_export.loop.denoise import StepRecord
    from d3tom_export.pipeline import Reader


@click.command(
    "bench", cls=common.Command, first="rounds samples batch backend provider precision ratio gen-length steps json"
)
@click.argument("bundle_folder", metavar="BUNDLE", type=click.Path(path_type=Path))
@options.backend_options
@options.verify_option("auto")
@options.merge_override_options
@answer_options.generation_options
@answer_options.early_exit_option("off")
@answer_options.wording_options
@heading(Section.MEASURING)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Answers per combination.")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    metavar="N",
    help="Answer the bundle's first N samples, once each, in place of --rounds of the first, and count the answers "
    "that are right.",
)
@click.option(
    "--visual-tokens",
    type=click.IntRange(min=1),
    metavar="V",
    help="Answer a prompt of random embeddings with V visual tokens.  [default: the bundle's first sample]",
)
@click.option(
    "--text-tokens",
    type=click.IntRange(min=1),
    default=75,
    show_default=True,
    help="Text tokens beside --visual-tokens.",
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Answers at a time.")
@click.option(
    "--memory/--no-memory",
    default=True,
    show_default=True,
    help="Measure peak memory too, each combination in a process of its own that loads the bundle again. Not of "
    "engines, whose memory is the GPU's.",
)
@heading(Section.OUTPUT)
@click.option(
    "--figure",
    "figure_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="With --samples, also draw right answers against time to FILE.png or FILE.svg; needs the extra `plots`.",
)
@common.json_option
def command(
    bundle_folder: Path,
    backend: str,
    device: Device,
    provider_cache: Path | None,
    precision: str | None,
    cuda_graphs: bool | None,
    specialization: str | None,
    verify: Verify,
    rounds: int,
    samples: int | None,
    figure_file: Path | None,
    visual_tokens: int | None,
    text_tokens: int,
    batch: int,
    memory: bool,
    system: str | None,
    no_system: bool,
    stops: tuple[str, ...],
    json_file: str | None,
    early_exit: bool | None,
    **settings: Any,
) -> None:
    """Time answers with and without KV cache, with and without merging, under a plan and under a commit rule.

    The combinations that a bundle has stages for take turns; ratios are to the first of them, within a round, as
    median and range. Build with --kv-cache both --merge-at prefill for all of them; --commit says which rule stands
    beside the plan, --commit plan leaves rules out. FLOPs are those of the matrix products. Answers have
    all of their steps, whatever ends the model's elsewhere; with --stop they end where such a text comes up, with
    --early-exit where what they say is settled.

    \b
    d3tom-export bench lavida-tiny-d3tom-l2-r0.9-both
    d3tom-export bench lavida-tiny-d3tom-l2-r0.9-both --samples 256 --early-exit --figure front.svg
    d3tom-export bench lavida-both --visual-tokens 1008 --remerge per-block --rounds 9
    """
    from d3tom_export.backends.select import open_backend
    from d3tom_export.bundle.folder import load_bundle
    from d3tom_export.cost.bench import answer_in_turns, on_backend, summarize
    from d3tom_export.cost.combinations import combinations_of
    from d3tom_export.errors import D3tomError

    from .bench_report import table

    check_choice(backend, device, precision, cuda_graphs, provider_cache, specialization)
    options.check_figure(figure_file)
    if figure_file is not None and samples is None:
        raise click.UsageError("--figure draws right answers against time: say of how many questions, --samples N.")
    progress = common.ConsoleProgress()
    bundle = load_bundle(bundle_folder, verify, reads_weights=backend not in options.ENGINE_BACKENDS)
    common.warn_of_random_weights(bundle)
    manifest, language = bundle.manifest, bundle.config.language
    plan, rules = answer_options.plan_and_rules(manifest.generation, settings)
    if visual_tokens is not None and (system is not None or no_system or samples is not None):
        raise click.UsageError(
            "--visual-tokens makes a prompt of random embeddings, which has no system text and no right answer."
        )
    reader = None
    if stops or visual_tokens is None:
        reader = _reader(bundle, system, no_system)
    if stops and reader is None:
        raise click.UsageError("This bundle has no tokenizer to read --stop with.")
    ends: dict[str, Any] = {"stop_ids": () if reader is None else reader.stop_ids(stops)}
    if reader is not None:
        ends["end_ids"] = reader.end_ids
    ends["early_exit"] = bool(early_exit)
    plan, rules = replace(plan, **ends), {rule: replace(each, **ends) for rule, each in rules.items()}
    merge = options.merge_from(manifest.merge, settings)
    if merge.schedule == "none":
        raise D3tomError("bench compares merged answers with unmerged ones; --schedule none leaves nothing to compare.")
    engine = options.engine_settings(precision, cuda_graphs, provider_cache, specialization)
    backends = {
        loop: open_backend(backend, bundle, loop, device=device, progress=progress, **engine) for loop in manifest.loops
    }
    opened = next(iter(backends.values()))
    questions, what = _questions(bundle, opened, plan, visual_tokens, text_tokens, batch, reader, samples)
    combinations = combinations_of(
        manifest.loops,
        at_step=_merges_at_steps(merge),
        at_prefill=manifest.merge.merge_at == "prefill",
        rules=list(rules),
    )
    name, ran = opened.name, opened.precision
    answers = answer_in_turns(
        {each: on_backend(backends[each.loop], language.mask_token_id) for each in combinations},
        questions,
        plan,
        rules,
        merge,
        rounds if samples is None else 1,
        progress,
        bytes_per_element=2 if ran in ("fp16", "bf16") else 4,  # int8 is of weights: activations and caches are float32
    )
    del backends, opened
    peaks = {}
    # It is the process's resident memory, and engines work in the GPU's.
    if memory and backend not in options.ENGINE_BACKENDS and device not in BUILDING_DEVICES:
        peaks = _peaks(bundle_folder, backend, device, combinations, questions[0], plan, merge, precision, progress)

    # Engines hold their weights: the bundle's files need not be there.
    weights = None if backend in options.ENGINE_BACKENDS else common.weights_of(bundle)
    rows = summarize(answers, peaks, language, merge.layer)
    work = next(iter(answers.values()))[0].work
    result = {
        "bundle": str(bundle_folder),
        "backend": name,
        "precision": ran,
        "weights": sorted(manifest.formats),
        "quantization": None if weights is None else weights.to_json(),
        "prompt": what,
        "prompt_tokens": work.prompt_tokens,
        "visual_tokens": work.visual_tokens,
        "answer_tokens": work.answer_tokens,
        "batch": batch,
        "steps": max(row["steps"] for row in rows),
        "rounds": rounds if samples is None else 1,
        "merge": merge.to_json(),
        "generation": plan.to_json(),
        "rules": {rule: each.to_json() | {"words": answer_options.rule_words(each)} for rule, each in rules.items()},
        "rows": rows,
    }
    if figure_file is not None:
        if "exact_match" not in rows[0]:
            raise D3tomError(
                "--figure draws right answers, and no sample of this bundle has a known one. Leave it out."
            )
        from d3tom_export.cost.pareto_figure import draw_front

        draw_front(figure_file, f"{Path(bundle_folder).name}, {name}: {len(questions)} questions", rows)
        result["figure"] = str(figure_file)
    common.write_json(json_file, result)
    common.say(json_file, table(result))


def _merges_at_steps(merge: MergeConfig) -> bool:
    """Whether a cache may be merged at the steps as this configuration has it."""
    from d3tom_export.errors import D3tomError

    try:
        replace(merge, merge_at="step").check_cached()
    except D3tomError:
        return False
    return True


def _peaks(
    folder: Path,
    backend: str,
    device: Device,
    combinations: Sequence[Combination],
    question: Question,
    plan: GenerationConfig,
    merge: MergeConfig,
    precision: str | None,
    progress: common.ConsoleProgress,
) -> dict[Combination, Peak | None]:
    """Peak memory by combination; a commit rule holds what the plan does."""
    from d3tom_export.cost.bench import peak_memory

    planned = [each for each in combinations if each.commit == "plan"]
    found: dict[Combination, Peak | None] = {}
    for done, each in enumerate(planned):
        progress(f"measuring memory, {each.label}", done, len(planned))
        found[each] = peak_memory(folder, backend, device, each, question.prompt, plan, merge, precision)
    progress("memory measured", len(planned), len(planned))
    return {each: found[replace(each, commit="plan")] for each in combinations}


def _reader(bundle: Bundle, system: str | None, no_system: bool) -> Reader | None:
    """Of a bundle that has a tokenizer, with the system text of this run."""
    from d3tom_export.config import TOKENIZER_FILE
    from d3tom_export.pipeline import Reader

    if bundle.file(TOKENIZER_FILE) is None:
        return None
    return answer_options.reader_from(Reader.of_bundle(bundle), system, no_system)


def _questions(
    bundle: Bundle,
    backend: Backend,
    generation: GenerationConfig,
    visual_tokens: int | None,
    text_tokens: int,
    batch: int,
    reader: Reader | None,
    samples: int | None,
) -> tuple[list[Question], str]:
    """The prompts to answer, and what they are."""
    import numpy as np

    from d3tom_export.cost.bench import Question, random_prompt
    from d3tom_export.loop.backend import Prompt
    from d3tom_export.pipeline import embed_sample
    from d3tom_export.prompt.samples import samples_for

    if visual_tokens is not None:
        options.check_length(bundle.config.language, text_tokens, visual_tokens, generation.gen_length)
        made_up = random_prompt(bundle.config.language, text_tokens, visual_tokens, batch)
        return [Question(made_up)], "random embeddings"
    questions = []
    for sample in samples_for(bundle.folder, bundle.config, samples or 1):
        prompt = embed_sample(backend, sample, reader, generation)
        prompt = Prompt(np.repeat(prompt.embeddings, batch, axis=0), prompt.visual_positions)
        questions.append(Question(prompt, _judge(reader, getattr(sample, "answer", None))))
    return questions, "the bundle's first sample" if samples is None else f"the bundle's first {len(questions)} samples"


def _judge(reader: Reader | None, answer: str | None) -> Callable[[StepRecord, GenerationConfig], bool] | None:
    """Whether an answer is word for word ``answer``; None where that is not known."""
    if reader is None or answer is None:
        return None
    return lambda record, generation: reader.answer(record, generation).text == answer
