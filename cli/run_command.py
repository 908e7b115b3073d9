"""``d3tom-export run``"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d3tom_export.trust.terminal import legible

from . import answer_options, common, options

if TYPE_CHECKING:
    from d3tom_export.backends.onnxruntime_options import Device
    from d3tom_export.bundle.folder import Verify


@click.command("run", cls=common.Command)
@click.argument("bundle_folder", metavar="BUNDLE", type=click.Path(path_type=Path))
@answer_options.prompt_options
@click.option(
    "--raw-text",
    is_flag=True,
    help='Give the text of all token ids as the release does: special tokens skipped, leading "!" stripped.  [default: '
    "up to the first end token]",
)
@options.backend_options
@options.verify_option("auto")
@options.loop_option
@options.merge_override_options
@answer_options.generation_options
@common.json_option
def command(
    bundle_folder: Path,
    images: tuple[Path, ...],
    prompt: str | None,
    prompt_file: Path | None,
    system: str | None,
    no_system: bool,
    stops: tuple[str, ...],
    suffix: str | None,
    ignore_orientation: bool,
    raw_text: bool,
    backend: str,
    device: Device,
    provider_cache: Path | None,
    precision: str | None,
    cuda_graphs: bool | None,
    specialization: str | None,
    verify: Verify,
    kv_cache: bool | None,
    ratio: float | None,
    schedule: str | None,
    remerge: str | None,
    cached_adaptive: bool | None,
    merge_at: str | None,
    keep_multiple: int | None,
    json_file: str | None,
    **generation_options: Any,
) -> None:
    """Answer a question about a picture with a bundle.

    The answer goes to standard output, everything else to standard error. Merge ratio, its schedule and all settings
    of the denoising loop may differ from those the bundle was built with.

    The answer ends at its first end token, --raw-text gives what the release prints; token_ids of --json has all ids
    up to the first stop text, and those of --suffix. A --prompt-file holds a conversation of several turns. Picture
    files are turned upright, and a JPEG of more than 179 megapixels is scaled down while it is read.

    \b
    d3tom-export run lavida-tiny-d3tom-l2-r0.9 --image digits.png --prompt "Read the digits."
    d3tom-export run llada --prompt-file conversation.json --system "Answer in one word." --stop "<|eot_id|>"
    """
    from d3tom_export.backends.select import open_backend
    from d3tom_export.bundle.folder import load_bundle
    from d3tom_export.pipeline import Reader, run_loop

    options.check_device(backend, device, precision, cuda_graphs, provider_cache, specialization)
    question = answer_options.question_from(prompt, prompt_file)
    started = time.perf_counter()
    progress = common.ConsoleProgress()
    bundle = load_bundle(bundle_folder, verify, reads_weights=backend not in options.ENGINE_BACKENDS)
    common.warn_of_random_weights(bundle)
    manifest = bundle.manifest
    generation = answer_options.generation_from(manifest.generation, generation_options)
    merge = options.merge_from(manifest.merge, ratio, schedule, remerge, cached_adaptive, merge_at, keep_multiple)
    loop = bundle.choose_loop(kv_cache)
    reader = replace(Reader.of_bundle(bundle), ignore_orientation=ignore_orientation)
    reader = answer_options.reader_from(reader, question, system, no_system)
    generation = answer_options.generation_for(reader, generation, stops, suffix)
    reader.check_text(question, len(images), generation)
    pictures = reader.see(images, common.note)
    reader.check_length(question, pictures, generation)
    engine = options.engine_settings(precision, cuda_graphs, provider_cache, specialization)
    runtime = open_backend(backend, bundle, loop, device=device, progress=progress, **engine)
    loaded = time.perf_counter()
    ready = reader.read(runtime, question, pictures, generation)
    embedded = time.perf_counter()
    records = []
    steps = generation.total_steps
    mask_token_id = bundle.config.language.mask_token_id
    for record in run_loop(runtime, ready, mask_token_id, generation, merge):
        records.append(record)
        progress("denoising", len(records), steps)
    finished = time.perf_counter()

    token_ids, answer = reader.answer(records[-1], generation, raw=raw_text)
    result = {
        "text": answer,
        "answer": answer,
        "token_ids": token_ids,
        "backend": runtime.name,
        "kv_cache": runtime.kv_cache,
        "merge": merge.to_json(),
        "generation": generation.to_json(),
        "prompt_tokens": ready.embeddings.shape[1],
        "visual_tokens": len(ready.visual_positions),
        "kept": [record.keep for record in records],
        "kept_per_step": [record.keep for record in records],
        "steps": len(records),
        "seconds": {
            "load": round(loaded - started, 4),
            "prompt": round(embedded - loaded, 4),
            "denoise": round(finished - embedded, 4),
        },
    }
    common.write_json(json_file, result)
    if json_file != "-":
        click.echo(_shown(answer))
    kept = [record.keep for record in records if record.merged]
    where = f"{runtime.name}{', KV cache' if runtime.kv_cache else ''}"
    merging = f"{min(kept)} to {max(kept)} of {len(ready.visual_positions)} kept" if kept else "nothing merged"
    click.echo(
        f"{len(records)} steps on {where} in {finished - embedded:.2f} s "
        f"(load {loaded - started:.2f} s, prompt {embedded - loaded:.2f} s); visual tokens: {merging}.",
        err=True,
    )


def _shown(answer: str) -> str:
    """``answer`` as standard output takes it: a terminal obeys nothing in it, a file gets every character there is."""
    if sys.stdout.isatty():
        answer = legible(answer)
    encoding = sys.stdout.encoding or "utf-8"
    return answer.encode(encoding, "backslashreplace").decode(encoding)
