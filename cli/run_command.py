"""``d3tom-export run``"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d3tom_export.trust.terminal import legible

from . import answer_options, common, options
from .sections import Section, heading

if TYPE_CHECKING:
    from d3tom_export.api.answers import Answer, Step
    from d3tom_export.api.model import Steps
    from d3tom_export.backends.onnxruntime_options import Device
    from d3tom_export.backends.rtx_runtime import Specialization
    from d3tom_export.bundle.folder import Verify


@click.command(
    "run", cls=common.Command, first="image prompt backend provider kv-cache ratio gen-length steps live json"
)
@click.argument("bundle_folder", metavar="BUNDLE", type=click.Path(path_type=Path))
@answer_options.prompt_options
@heading(Section.OUTPUT)
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
    specialization: Specialization | None,
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
    d3tom-export run lavida-tiny-d3tom-l2-r0.9 --image digits.png --prompt "What do you see?"
    d3tom-export run lavida-tiny-d3tom-l2-r0.9 --live --image digits.png --prompt "Which?" --prompt "How many?"
    d3tom-export run llada --prompt-file conversation.json --system "Answer in one word." --stop "<|eot_id|>"
    """
    from d3tom_export.api.opening import open

    if share_prefix:
        options.check_sharing(backend, kv_cache)
    questions = answer_options.questions_from(prompts, prompt_file)
    # Of several, none is a conversation with a system turn of its own.
    answer_options.check_system(questions[0], system, no_system)
    answer_options.check_stops(stops)
    started = time.perf_counter()
    progress = common.ConsoleProgress()
    model = open(
        bundle_folder,
        backend=backend,
        device=device,
        kv_cache=kv_cache,
        precision=precision,
        verify=verify,
        provider_cache=provider_cache,
        cuda_graphs=cuda_graphs,
        specialization=specialization,
        ignore_orientation=ignore_orientation,
        load=False,
        progress=progress,
        note=common.note,
    )
    given = answer_options.settings_from(settings, system, no_system, stops, suffix, early_exit)
    given |= {"raw_text": raw_text, "share_prefix": share_prefix}
    for question in questions:
        model.check(len(images), question, **given)
    pictures = model.see(images)
    for question in questions:
        model.check(pictures, question, **given)
    model.load()
    load = time.perf_counter() - started
    results = []
    for number, question in enumerate(questions):
        shown = _LiveOrBar(progress, live)
        with model.steps(pictures, question, **given) as steps:
            answer = shown.watch(steps)
        result = answer.to_json()
        results.append(result | {"seconds": {"load": round(load, 4), **result["seconds"]}})
        if json_file != "-":
            click.echo(_shown(answer.text))
        click.echo(_summary(answer, shown.merged, load if number == 0 else None), err=True)
    common.write_json(json_file, results[0] if len(results) == 1 else _together(results))


class _LiveOrBar:
    """Shows how far an answer is: drawn, or as a bar."""

    def __init__(self, progress: common.ConsoleProgress, live: bool) -> None:
        self._progress, self._live = progress, live
        self.merged: list[int] = []
        """K of the steps that merged."""

    def watch(self, steps: Steps) -> Answer:
        """The answer, whose steps run now."""
        if self._live:
            from .live import LiveAnswer

            with LiveAnswer(steps.start, self._progress.seconds) as draw:
                for step in steps:
                    self._count(step)
                    draw(step)
            return steps.answer
        for step in steps:
            self._count(step)
            self._progress("denoising", step.number, step.total)
        self._progress.close()  # an early exit leaves the bar open
        return steps.answer

    def _count(self, step: Step) -> None:
        if step.merged:
            self.merged.append(step.kept)


def _summary(answer: Answer, merged: Sequence[int], load: float | None) -> str:
    """A line for people; ``load`` where it was for this question that the backend was opened."""
    where = f"{answer.backend}{', KV cache' if answer.kv_cache else ''}"
    merging = f"{min(merged)} to {max(merged)} of {answer.visual_tokens} kept" if merged else "nothing merged"
    loading = "" if load is None else f"load {load:.2f} s, "
    return (
        f"{answer.steps} steps on {where} in {answer.denoise_seconds:.2f} s "
        f"({loading}prompt {answer.prompt_seconds:.2f} s); visual tokens: {merging}."
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
