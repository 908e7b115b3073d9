"""``d3tom-export report``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d3tom_export.backends.choice import check_choice

from . import answer_options, common, options
from .sections import Section, heading

if TYPE_CHECKING:
    from d3tom_export.backends.onnxruntime_options import Device
    from d3tom_export.bundle.folder import Bundle, Verify
    from d3tom_export.config import GenerationConfig, MergeConfig
    from d3tom_export.loop.backend import Backend
    from d3tom_export.pipeline import Reader
    from d3tom_export.report.data import Report
    from d3tom_export.report.gather import Asked

_SAMPLES = 3
_PARITY_SAMPLES = 2


@click.command(
    "report", cls=common.Command, first="image prompt samples output evaluation backend provider kv-cache ratio json"
)
@click.argument("bundle_folder", metavar="BUNDLE", type=click.Path(path_type=Path))
@heading(Section.OUTPUT)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default="report.html",
    show_default=True,
    metavar="FILE",
    help="The page to write; one that is there is replaced.",
)
@heading(Section.ASKING)
@click.option(
    "--image",
    "images",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Picture to ask about; give it again for further ones. Each goes with the --prompt in the same place; one of "
    "the two given once goes with all of the other.",
)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Question about a picture.")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=_SAMPLES,
    show_default=True,
    help="Without --prompt: how many of the bundle's own questions are asked, or of made-up pictures.",
)
@click.option(
    "--evaluation",
    "evaluation_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What `evaluate --json FILE` wrote, for the share of right answers over the visual tokens kept.",
)
@heading(Section.CHECKS)
@click.option(
    "--oracle/--no-oracle",
    default=None,
    help="Ask the eager PyTorch model whom the deciders attend to and how alike visual tokens are.  [default: where "
    "torch is installed]",
)
@click.option(
    "--parity/--no-parity",
    default=None,
    help="Hold the backend against the eager PyTorch model, as `validate` does.  [default: where torch is installed]",
)
@click.option(
    "--parity-samples",
    type=click.IntRange(min=1),
    default=_PARITY_SAMPLES,
    show_default=True,
    help="Samples that are compared for it.",
)
@heading(Section.SOURCE)
@click.option(
    "--model",
    "model_folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Checkpoint for the PyTorch oracle.  [default: the one the bundle was built from, where it is there as it "
    "was; else the bundle's own weights]",
)
@options.vision_tower_option
@options.backend_options
@options.verify_option("auto")
@options.loop_option
@options.merge_override_options
@answer_options.generation_options
@answer_options.early_exit_option("on")
@answer_options.wording_options
@common.json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle_folder: Path,
    output: Path,
    images: tuple[Path, ...],
    prompts: tuple[str, ...],
    samples: int,
    evaluation_file: Path | None,
    oracle: bool | None,
    parity: bool | None,
    parity_samples: int,
    model_folder: Path | None,
    vision_tower: Path | None,
    backend: str,
    device: Device,
    provider_cache: Path | None,
    precision: str | None,
    cuda_graphs: bool | None,
    specialization: str | None,
    verify: Verify,
    kv_cache: bool | None,
    early_exit: bool | None,
    system: str | None,
    no_system: bool,
    stops: tuple[str, ...],
    json_file: str | None,
    **settings: Any,
) -> None:
    """Write a page that shows what a bundle does with a few pictures: one HTML file, which needs no network.

    It shows the visual tokens kept at every step, with a slider, and the answer so far; what the deciders attend to;
    how alike visual tokens are; the FLOPs that merging saves over l* and ratio; right answers over tokens kept, of an
    evaluation; time by stage and step; parity with PyTorch; and what the bundle was built with. --json writes the same
    as data. Needs the extra `report`; what the eager model tells is left out where torch is not installed. Exit code
    1, and no page, where anything fails; a parity that does not pass stands in the page.

    \b
    d3tom-export report lavida-tiny-d3tom-l2-r0.9 --output report.html
    d3tom-export report lavida-tiny-d3tom-l2-r0.9 --image digits.png --prompt "What do you see?" --no-parity
    """
    check_choice(backend, device, precision, cuda_graphs, provider_cache, specialization)
    options.check_vision_tower(vision_tower, model_folder)
    pairs = _pairs(images, prompts)
    if pairs and ctx.get_parameter_source("samples") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--samples asks the bundle's own questions, --prompt yours; give one of the two.")
    if model_folder is not None and oracle is False and parity is False:
        raise click.UsageError("--model is for the PyTorch oracle, and --no-oracle --no-parity ask it nothing.")
    from d3tom_export.backends.select import open_backend
    from d3tom_export.bundle.folder import load_bundle
    from d3tom_export.pipeline import Reader
    from d3tom_export.report.evaluation import read_evaluation
    from d3tom_export.report.oracle import has_torch
    from d3tom_export.report.page import need_libraries, write_page

    need_libraries()
    common.check_writable(output, "--output")
    progress = common.ConsoleProgress()
    bundle = load_bundle(bundle_folder, verify, reads_weights=backend not in options.ENGINE_BACKENDS)
    common.warn_of_random_weights(bundle)
    manifest = bundle.manifest
    evaluation, evaluated = None, None
    if evaluation_file is not None:
        evaluation, evaluated = read_evaluation(evaluation_file, (bundle_folder.resolve().name, manifest.model_name))
        if evaluation.other:
            whose = f"of {evaluation.model}" if evaluation.model else "of a model that it does not name"
            common.note(f"{evaluation_file} is {whose}, not of {bundle_folder}; the page says so.")
    generation = answer_options.generation_from(manifest.generation, settings)
    merge = options.merge_from(manifest.merge, settings)
    loop = bundle.choose_loop(kv_cache)
    reader = answer_options.reader_from(Reader.of_bundle(bundle), system, no_system)
    generation = answer_options.generation_for(reader, generation, stops)
    generation = replace(generation, early_exit=early_exit is not False)
    asked = _asked(bundle, reader, pairs, samples, generation)
    engine = options.engine_settings(precision, cuda_graphs, provider_cache, specialization)
    opened = open_backend(backend, bundle, loop, device=device, progress=progress, **engine)
    there = has_torch()
    subject = _Subject(
        bundle,
        opened,
        reader,
        asked,
        generation,
        merge,
        there if oracle is None else oracle,
        parity_samples if (there if parity is None else parity) else 0,
        model_folder,
        vision_tower,
    )
    report = replace(_report(subject, progress), settings=evaluated, evaluation=evaluation)
    progress("drawing", 0, 1)
    page = write_page(_explained(report, subject, there))
    common.write_output(output, page, "--output")
    progress("written", 1, 1)
    common.write_json(json_file, {"output": str(output), "bytes": len(page), **report.to_json()})
    verdict = "" if report.parity is None or report.parity["passed"] else ", whose parity did NOT pass"
    common.say(json_file, f"Wrote {output} ({len(page) / 1e3:,.0f} kB): {len(asked)} answers{verdict}.")


def _pairs(images: Sequence[Path], prompts: Sequence[str]) -> list[tuple[Path | None, str]]:
    """Each question with its picture; none where neither was given."""
    if images and not prompts:
        raise click.UsageError("--image needs a question about it: --prompt TEXT.")
    if not images:
        return [(None, prompt) for prompt in prompts]
    if len(images) > 1 and len(prompts) > 1 and len(images) != len(prompts):
        raise click.UsageError(
            f"{len(images)} times --image and {len(prompts)} times --prompt make no pairs: give as many of both, or "
            "one of the two once."
        )
    count = max(len(images), len(prompts))
    pictures, questions = ([*each, *[each[-1]] * (count - len(each))] for each in (images, prompts))
    return list(zip(pictures, questions, strict=True))


@dataclass(frozen=True)
class _Subject:
    """A bundle that was opened, and what is asked of it."""

    bundle: Bundle
    backend: Backend
    reader: Reader
    asked: list[Asked]
    generation: GenerationConfig
    merge: MergeConfig
    asks_oracle: bool
    parity_samples: int
    """0: parity is left out."""
    model_folder: Path | None
    vision_tower: Path | None


def _asked(
    bundle: Bundle,
    reader: Reader,
    pairs: Sequence[tuple[Path | None, str]],
    samples: int,
    generation: GenerationConfig,
) -> list[Asked]:
    """The questions, found to fit the model."""
    from d3tom_export.errors import D3tomError
    from d3tom_export.pictures.views import open_picture
    from d3tom_export.prompt.samples import Sample, samples_for
    from d3tom_export.report.gather import Asked

    if pairs:
        for path, question in pairs:
            reader.check_text(question, int(path is not None), generation)
        seen = {path: open_picture(path, note=common.note) for path in dict.fromkeys(path for path, _ in pairs) if path}
        asked = [
            Asked(question, None if path is None else seen[path], "" if path is None else path.name)
            for path, question in pairs
        ]
    else:
        found = [each for each in samples_for(bundle.folder, bundle.config, samples) if isinstance(each, Sample)]
        asked = [
            Asked(each.question, each.picture, f"sample {number}", each.answer)
            for number, each in enumerate(found, start=1)
        ]
    if not asked:
        raise D3tomError(
            f"{bundle.folder} is of a language-only model and has no question of its own. Ask it one with --prompt."
        )
    for each in asked:
        reader.check_length(each.question, [] if each.picture is None else [each.picture], generation)
    return asked


def _report(subject: _Subject, progress: common.ConsoleProgress) -> Report:
    from d3tom_export.prompt.samples import samples_for
    from d3tom_export.report import gather as gathering
    from d3tom_export.report.data import Report
    from d3tom_export.report.oracle import Oracle

    bundle, backend, merge = subject.bundle, subject.backend, subject.merge
    oracle = None
    if subject.asks_oracle or subject.parity_samples:
        where = (subject.model_folder, subject.vision_tower)
        oracle = Oracle(bundle, backend, merge, *where, progress)
        if oracle.notice:
            click.echo(oracle.notice, err=True)
    asks = oracle if subject.asks_oracle else None
    answers, redundancy = gathering.gather(
        bundle,
        backend,
        subject.reader,
        subject.asked,
        subject.generation,
        merge,
        progress,
        asks.importance if asks is not None and asks.tells_importance else None,
        None if asks is None else asks.similarities,
    )
    parity: dict[str, Any] | None = None
    lines: list[str] = []
    if oracle is not None and subject.parity_samples:
        samples = samples_for(bundle.folder, bundle.config, subject.parity_samples)
        parity, lines = oracle.parity(subject.reader, samples, subject.generation, progress)
    return Report(
        title=bundle.manifest.model_name,
        backend=backend.name,
        loop="cached" if backend.kv_cache else "uncached",
        precision=backend.precision,
        merging=gathering.merging_words(merge, cached=backend.kv_cache),
        layer=merge.layer,
        merges_others=merge.select == "decider" or merge.in_loop(backend.kv_cache).merge_at == "prefill",
        answers=answers,
        reductions=gathering.reductions_of(bundle, answers[0], subject.generation, merge),
        built=gathering.built_with(bundle, backend, subject.generation, merge),
        hashes=gathering.hashes_of(bundle, cached=backend.kv_cache),
        command=f"d3tom-export report {bundle.folder.name}",
        redundancy=redundancy,
        parity=parity,
        parity_lines=lines,
    )


def _explained(report: Report, subject: _Subject, has_torch: bool) -> Report:
    """``report`` with a sentence for every section that it lacks."""
    name = subject.bundle.folder.name
    install = 'Install torch (`pip install "d3tom-export[build]"`) and write the report anew.'
    ask = "Nobody was asked: leave `--no-oracle` out to have it." if has_torch else install
    if not any(answer.visual_tokens for answer in report.answers):
        ask = "No question had a picture: there are no visual tokens to look at."
    scored = ask
    if subject.merge.select not in ("decider", "fastv"):
        scored = f"The bundle selects visual tokens by {subject.merge.select}, which looks at no attention."
    elif report.redundancy is not None:
        scored = "Nothing was merged, so no token decided."
    return replace(
        report,
        left_out={
            "importance": scored,
            "redundancy": ask,
            "flops": "There is nothing to count where no visual token merges, or where a policy other than the "
            "deciders drops them.",
            "retention": f"Not measured yet: `d3tom-export evaluate {name} --json evaluation.json` counts right "
            "answers over settings, and `report` takes them with `--evaluation evaluation.json`.",
            "parity": f"Not compared here. `d3tom-export validate {name}` holds every step against PyTorch"
            + ("; leave `--no-parity` out to have it in this page." if has_torch else f". {install}"),
        },
    )
