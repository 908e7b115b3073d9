"""``d3tom-export run``"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d3tom_export.trust.terminal import legible

from . import answer_options, common, options

if TYPE_CHECKING:
    from d3tom_export.backends.onnxruntime_options import Device
    from d3tom_export.bundle.folder import Verify
    from d3tom_export.config import GenerationConfig, MergeConfig
    from d3tom_export.loop.backend import Backend, Prompt
    from d3tom_export.loop.denoise import StepRecord
    from d3tom_export.pictures.seen import SeenPictures
    from d3tom_export.pictures.views import Views
    from d3tom_export.pipeline import Answer, Question, Reader


@click.command("run", cls=common.Command)
@click.argument("bundle_folder", metavar="BUNDLE", type=click.Path(path_type=Path))
@answer_options.prompt_options
@click.option(
    "--raw-text",
    is_flag=True,
    help='Give the text of all token ids as the release does: special tokens skipped, leading "!" stripped.  [default: '
    "up to the first end token]",
)
@click.option(
    "--live",
    is_flag=True,
    help="Draw the answer on standard error while it is denoised: masks as blocks, what was just committed in bold. "
    "Where that is no terminal, print a line for every step.",
)
@options.backend_options
@options.verify_option("auto")
@options.loop_option
@options.share_prefix_option
@options.merge_override_options
@answer_options.generation_options
@answer_options.early_exit_option("on, but for --raw-text")
@common.json_option
def command(
    bundle_folder: Path,
    images: tuple[Path, ...],
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    system: str | None,
    no_system: bool,
    stops: tuple[str, ...],
    suffix: str | None,
    ignore_orientation: bool,
    raw_text: bool,
    live: bool,
    backend: str,
    device: Device,
    provider_cache: Path | None,
    precision: str | None,
    cuda_graphs: bool | None,
    specialization: str | None,
    verify: Verify,
    kv_cache: bool | None,
    share_prefix: bool,
    json_file: str | None,
    early_exit: bool | None,
    **settings: Any,
) -> None:
    """Answer questions about a picture with a bundle.

    The answer goes to standard output, everything else to standard error. Merge ratio, its schedule and all settings
    of the denoising loop may differ from those the bundle was built with.

    The answer ends at its first end token, and once its text is settled no more steps are run; --raw-text gives what
    the release prints, after all steps. token_ids of --json has the ids up to the end of the answer, and those of
    --suffix. A --prompt-file holds a conversation of several turns. Picture
    files are turned upright, and a JPEG of more than 179 megapixels is scaled down while it is read.

    With --prompt several times the pictures are read and encoded once, and the answers come in order, each on a line
    of its own; --json then has an object for each under "answers". With --share-prefix their prefill is shared too.

    \b
    d3tom-export run lavida-tiny-d3tom-l2-r0.9 --image digits.png --prompt "Read the digits."
    d3tom-export run lavida-tiny-d3tom-l2-r0.9 --live --image digits.png --prompt "Which?" --prompt "How many?"
    d3tom-export run llada --prompt-file conversation.json --system "Answer in one word." --stop "<|eot_id|>"
    """
    from d3tom_export.backends.select import open_backend
    from d3tom_export.bundle.folder import load_bundle
    from d3tom_export.pictures.seen import SeenPictures
    from d3tom_export.pipeline import Reader

    options.check_device(backend, device, precision, cuda_graphs, provider_cache, specialization)
    if share_prefix:
        options.check_sharing(backend, kv_cache)
    questions = answer_options.questions_from(prompts, prompt_file)
    started = time.perf_counter()
    progress = common.ConsoleProgress()
    bundle = load_bundle(bundle_folder, verify, reads_weights=backend not in options.ENGINE_BACKENDS)
    common.warn_of_random_weights(bundle)
    manifest = bundle.manifest
    generation = answer_options.generation_from(manifest.generation, settings)
    merge = options.merge_from(manifest.merge, settings)
    loop = bundle.choose_loop(kv_cache)
    if share_prefix:
        manifest.check_shares_prefix()
        if loop != "cached":
            raise click.UsageError("--share-prefix concerns the loop with a KV cache; add --kv-cache.")
    reader = replace(Reader.of_bundle(bundle), ignore_orientation=ignore_orientation)
    # Of several, none is a conversation with a system turn of its own.
    reader = answer_options.reader_from(reader, questions[0], system, no_system)
    generation = answer_options.generation_for(reader, generation, stops, suffix)
    if raw_text and early_exit:
        raise click.UsageError("--raw-text is of all tokens as the release makes them; --early-exit leaves some out.")
    generation = replace(generation, early_exit=not raw_text if early_exit is None else early_exit)
    for question in questions:
        reader.check_text(question, len(images), generation)
    pictures = reader.see(images, common.note)
    for question in questions:
        reader.check_length(question, pictures, generation)
    engine = options.engine_settings(precision, cuda_graphs, provider_cache, specialization)
    runtime = open_backend(backend, bundle, loop, device=device, progress=progress, **engine)
    load = time.perf_counter() - started
    seen = SeenPictures() if len(questions) > 1 else None
    run = _Run(reader, runtime, pictures, seen, generation, merge, share_prefix, progress, live, raw_text)
    results = []
    for number, question in enumerate(questions):
        answered = run.answer(question)
        results.append(answered.to_json(run, load))
        if json_file != "-":
            click.echo(_shown(answered.answer.text))
        click.echo(answered.summary(run, load if number == 0 else None), err=True)
    common.write_json(json_file, results[0] if len(results) == 1 else _together(results))


@dataclass(frozen=True)
class _Run:
    """What all questions of a run have in common."""

    reader: Reader
    runtime: Backend
    pictures: Sequence[Views]
    seen: SeenPictures | None
    generation: GenerationConfig
    merge: MergeConfig
    share_prefix: bool
    progress: common.ConsoleProgress
    live: bool
    raw_text: bool

    def answer(self, question: Question) -> _Answered:
        started = time.perf_counter()
        prompt = self.reader.read(self.runtime, question, self.pictures, self.generation, self.seen)
        embedded = time.perf_counter()
        records = self._denoise(prompt)
        finished = time.perf_counter()
        answer = self.reader.answer(records[-1], self.generation, raw=self.raw_text)
        return _Answered(answer, prompt, records, embedded - started, finished - embedded)

    def _denoise(self, prompt: Prompt) -> list[StepRecord]:
        from d3tom_export.pipeline import run_loop

        mask_token_id = self.reader.config.language.mask_token_id
        shares = self.share_prefix
        loop = run_loop(self.runtime, prompt, mask_token_id, self.generation, self.merge, share_prefix=shares)
        records = []
        if self.live:
            from .live import LiveAnswer

            visual_tokens, seconds = len(prompt.visual_positions), self.progress.seconds
            with LiveAnswer(self.reader, self.generation, visual_tokens, raw=self.raw_text, seconds=seconds) as show:
                for record in loop:
                    records.append(record)
                    show(record)
            return records
        for record in loop:
            records.append(record)
            self.progress("denoising", len(records), self.generation.total_steps)
        self.progress.close()  # an early exit leaves the bar open
        return records


@dataclass(frozen=True)
class _Answered:
    """What became of one question."""

    answer: Answer
    prompt: Prompt
    records: list[StepRecord]
    prompt_seconds: float
    denoise_seconds: float

    def to_json(self, run: _Run, load: float) -> dict[str, Any]:
        """The result; ``load`` are the seconds until the backend was there, the same for all questions."""
        kept = [record.keep for record in self.records]
        return {
            "text": self.answer.text,
            "answer": self.answer.text,
            "token_ids": self.answer.token_ids,
            "backend": run.runtime.name,
            "kv_cache": run.runtime.kv_cache,
            "merge": run.merge.to_json(),
            "generation": run.generation.to_json(),
            "prompt_tokens": self.prompt.embeddings.shape[1],
            "visual_tokens": len(self.prompt.visual_positions),
            "shared_tokens": self.prompt.shared_rows if run.share_prefix else 0,
            "kept": kept,
            "kept_per_step": kept,
            "steps": len(self.records),
            "seconds": {
                "load": round(load, 4),
                "prompt": round(self.prompt_seconds, 4),
                "denoise": round(self.denoise_seconds, 4),
            },
        }

    def summary(self, run: _Run, load: float | None) -> str:
        """A line for people; ``load`` where it was for this question that the backend was opened."""
        kept = [record.keep for record in self.records if record.merged]
        where = f"{run.runtime.name}{', KV cache' if run.runtime.kv_cache else ''}"
        visual = len(self.prompt.visual_positions)
        merging = f"{min(kept)} to {max(kept)} of {visual} kept" if kept else "nothing merged"
        loading = "" if load is None else f"load {load:.2f} s, "
        return (
            f"{len(self.records)} steps on {where} in {self.denoise_seconds:.2f} s "
            f"({loading}prompt {self.prompt_seconds:.2f} s); visual tokens: {merging}."
        )


def _together(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results of several questions: loading was once, the rest adds up."""
    seconds = {part: round(sum(result["seconds"][part] for result in results), 4) for part in ("prompt", "denoise")}
    return {"answers": list(results), "seconds": {"load": results[0]["seconds"]["load"], **seconds}}


def _shown(answer: str) -> str:
    """``answer`` as standard output takes it: a terminal obeys nothing in it, a file gets every character there is."""
    if sys.stdout.isatty():
        answer = legible(answer)
    encoding = sys.stdout.encoding or "utf-8"
    return answer.encode(encoding, "backslashreplace").decode(encoding)
