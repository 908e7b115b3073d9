"""``d3tom-export bench``"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import answer_options, common, options

if TYPE_CHECKING:
    from d3tom_export.backends.onnxruntime_options import Device
    from d3tom_export.bundle.folder import Bundle, Verify
    from d3tom_export.config import GenerationConfig
    from d3tom_export.loop.backend import Backend, Prompt
    from d3tom_export.pipeline import Reader


@click.command("bench", cls=common.Command)
@click.argument("bundle_folder", metavar="BUNDLE", type=click.Path(path_type=Path))
@options.backend_options
@options.verify_option("auto")
@options.merge_override_options
@answer_options.generation_options
@answer_options.early_exit_option("off")
@answer_options.wording_options
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Answers per combination.")
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
    """Time answers with and without KV cache, with and without merging.

    The combinations that a bundle has stages for take turns; ratios are to the first of them, within a round, as
    median and range. Build with --kv-cache both for all four. FLOPs are those of the matrix products. Answers have
    all of their steps, whatever ends the model's elsewhere; with --stop they end where such a text comes up, with
    --early-exit where what they say is settled.

    \b
    d3tom-export bench lavida-tiny-d3tom-l2-r0.9-both
    d3tom-export bench lavida-both --visual-tokens 1008 --remerge per-block --rounds 9
    """
    from d3tom_export.backends.select import open_backend
    from d3tom_export.bundle.folder import load_bundle
    from d3tom_export.cost.bench import combinations_of, peak_memory, summarize, time_combinations
    from d3tom_export.cost.flops import Workload
    from d3tom_export.errors import D3tomError

    options.check_device(backend, device, precision, cuda_graphs, provider_cache, specialization)
    progress = common.ConsoleProgress()
    bundle = load_bundle(bundle_folder, verify, reads_weights=backend not in options.ENGINE_BACKENDS)
    common.warn_of_random_weights(bundle)
    manifest, language = bundle.manifest, bundle.config.language
    generation = answer_options.generation_from(manifest.generation, settings)
    if visual_tokens is not None and (system is not None or no_system):
        raise click.UsageError("--visual-tokens makes a prompt of random embeddings, which has no system text.")
    reader = None
    if stops or visual_tokens is None:
        reader = _reader(bundle, system, no_system)
    if stops and reader is None:
        raise click.UsageError("This bundle has no tokenizer to read --stop with.")
    stop_ids = () if reader is None else reader.stop_ids(stops)
    generation = replace(generation, stop_ids=stop_ids, early_exit=bool(early_exit))
    merge = options.merge_from(manifest.merge, settings)
    if merge.schedule == "none":
        raise D3tomError("bench compares merged answers with unmerged ones; --schedule none leaves nothing to compare.")
    engine = options.engine_settings(precision, cuda_graphs, provider_cache, specialization)
    backends = {
        loop: open_backend(backend, bundle, loop, device=device, progress=progress, **engine) for loop in manifest.loops
    }
    prompt, what = _prompt(bundle, next(iter(backends.values())), generation, visual_tokens, text_tokens, batch, reader)

    combinations = combinations_of(manifest.loops)
    timings = time_combinations(
        backends, combinations, prompt, language.mask_token_id, generation, merge, rounds, progress
    )
    name, ran = next((opened.name, opened.precision) for opened in backends.values())
    del backends
    peaks = {}
    if backend in options.ENGINE_BACKENDS or device in options.BUILDING_DEVICES:
        memory = False  # it is the process's resident memory, and engines work in the GPU's
    for done, combination in enumerate(combinations if memory else []):
        progress(f"measuring memory, {combination.label}", done, len(combinations))
        peaks[combination] = peak_memory(
            bundle_folder, backend, device, combination, prompt, generation, merge, precision
        )
    if memory:
        progress("memory measured", len(combinations), len(combinations))

    item = 2 if ran in ("fp16", "bf16") else 4  # int8 is of weights: activations and caches are float32
    work = Workload(prompt.embeddings.shape[1], len(prompt.visual_positions), generation.gen_length, batch, item)
    rows = summarize(timings, peaks, language, work, generation, merge)
    steps = max(row["steps"] for row in rows)
    result = {
        "bundle": str(bundle_folder),
        "backend": name,
        "precision": ran,
        "prompt": what,
        "prompt_tokens": work.prompt_tokens,
        "visual_tokens": work.visual_tokens,
        "answer_tokens": work.answer_tokens,
        "batch": batch,
        "steps": steps,
        "rounds": rounds,
        "merge": merge.to_json(),
        "generation": generation.to_json(),
        "rows": rows,
    }
    common.write_json(json_file, result)
    common.say(json_file, _table(result))


def _reader(bundle: Bundle, system: str | None, no_system: bool) -> Reader | None:
    """Of a bundle that has a tokenizer, with the system text of this run."""
    from d3tom_export.config import TOKENIZER_FILE
    from d3tom_export.pipeline import Reader

    if bundle.file(TOKENIZER_FILE) is None:
        return None
    return answer_options.reader_from(Reader.of_bundle(bundle), "", system, no_system)


def _prompt(
    bundle: Bundle,
    backend: Backend,
    generation: GenerationConfig,
    visual_tokens: int | None,
    text_tokens: int,
    batch: int,
    reader: Reader | None,
) -> tuple[Prompt, str]:
    """The prompt to answer, and what it is."""
    import numpy as np

    from d3tom_export.cost.bench import random_prompt
    from d3tom_export.loop.backend import Prompt
    from d3tom_export.pipeline import embed_sample
    from d3tom_export.prompt.samples import samples_for

    if visual_tokens is not None:
        options.check_length(bundle.config.language, text_tokens, visual_tokens, generation.gen_length)
        return random_prompt(bundle.config.language, text_tokens, visual_tokens, batch), "random embeddings"
    (sample,) = samples_for(bundle.folder, bundle.config, 1)
    prompt = embed_sample(backend, sample, reader, generation)
    repeated = Prompt(np.repeat(prompt.embeddings, batch, axis=0), prompt.visual_positions)
    return repeated, "the bundle's first sample"


def _table(result: dict[str, Any]) -> str:
    merge = result["merge"]
    batch = "" if result["batch"] == 1 else f"batch {result['batch']}, "
    lines = [
        f"{result['bundle']} on {result['backend']} ({result['precision']}), {result['rounds']} rounds; "
        f"{result['prompt']}: {batch}"
        f"{result['prompt_tokens']} prompt tokens ({result['visual_tokens']} visual), {result['answer_tokens']} answer "
        f"tokens in {result['steps']} steps; l* = {merge['layer']}, ratio {merge['ratio']:g} {merge['schedule']}"
        f"{_of_the_cache(result)}",
        "",
        f"{'':18} {'answer, ms':>21} {'first':>8} {'step':>8} {'tokens/s':>9} {'GFLOP':>9} {'speed-up':>18} "
        f"{'ideal':>6} {'of it':>6} {'peak MiB':>9}",
    ]
    for row in result["rows"]:
        answer, speedup, peak = row["answer_seconds"], row["speedup"], row["peak_bytes"]
        time = f"{_ms(answer['median'])} ({_ms(answer['min'])}-{_ms(answer['max'])})"
        ratio = f"{speedup['median']:.2f} ({speedup['min']:.2f}-{speedup['max']:.2f})"
        memory = "-" if peak is None else f"+{peak['added'] / 2**20:.0f}"
        lines.append(
            f"{row['combination']:18} {time:>21} {_ms(row['first_token_seconds']['median']):>8} "
            f"{_ms(row['step_seconds']['median']):>8} {row['tokens_per_second']:>9.1f} {row['flops'] / 1e9:>9.2f} "
            f"{ratio:>18} {row['flop_ideal_speedup']:>6.2f} {row['of_flop_ideal']:>6.0%} {memory:>9}"
        )
    for row in result["rows"]:
        if "cache_bytes" in row:
            size = {name: f"{value / 2**20:.2f} MiB" for name, value in row["cache_bytes"].items()}
            lines.append(
                f"{row['combination']}: full cache {size['full']}, merged {size['merged']}; a step reads "
                f"{size['read_per_step']} and writes {size['written_per_step']} of keys and values"
            )
    lines.append("peak MiB: resident memory that an answer adds to the loaded model's")
    return "\n".join(lines)


def _of_the_cache(result: dict[str, Any]) -> str:
    """How a cache is merged, where one is."""
    if not any(row["loop"] == "cached" for row in result["rows"]):
        return ""
    merge = result["merge"]
    at_prefill = merge["merge_at"] == "prefill"
    fixed = merge["schedule"] == "adaptive" and (at_prefill or not merge["cache"]["adaptive"])
    rhythm = "at the prefill" if at_prefill else merge["cache"]["remerge"]
    return f"{', fixed with a cache' if fixed else ''}; cache merged {rhythm}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}" if seconds < 1 else f"{1000 * seconds:.0f}"
