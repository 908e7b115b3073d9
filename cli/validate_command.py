"""``d3tom-export validate``"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from d3tom_export.backends.choice import check_choice

from . import answer_options, common, options, quantize_loss
from .sections import Section, heading
from .validate_subject import Subject

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from d3tom_export.backends.onnxruntime_options import Device
    from d3tom_export.backends.select import Graphs
    from d3tom_export.bundle.folder import Verify
    from d3tom_export.checkpoint.folder import Checkpoint
    from d3tom_export.config import Loop
    from d3tom_export.diagnosis.report import Diagnosis
    from d3tom_export.loop.backend import Backend
    from d3tom_export.parity.agreement import AgreementReport
    from d3tom_export.parity.validate import Report

GraphsChoice = Literal["standard", "tuned", "both"]


@click.command(
    "validate",
    cls=common.Command,
    first="samples backend provider precision kv-cache model graphs first-bad-stage case json",
)
@click.argument("bundle_folder", metavar="[BUNDLE]", required=False, type=click.Path(path_type=Path))
@heading(Section.CHECKS)
@click.option(
    "--case",
    "case_folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Validate against a recorded run (config.json, model.safetensors, case.json, trace.safetensors).",
)
@options.backend_options
@options.verify_option("full")
@heading(Section.CHECKS)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Samples to run: the bundle's own where it has any, else made-up pictures in several sizes.",
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
@heading(Section.CHECKS)
@click.option(
    "--graphs",
    type=click.Choice(["standard", "tuned", "both"]),
    help="On the CPU with onnxruntime: the standard graphs, which every other backend gets, those tuned for the CPU, "
    "or both one after the other.  [default: both where memory allows]",
)
@click.option(
    "--first-bad-stage",
    is_flag=True,
    help="Instead of whole answers, compare every stage with its PyTorch module on the same inputs, at four steps of "
    "an answer (of as many as --samples says, if it is given), and name the first that departs.",
)
@click.option(
    "--layers", is_flag=True, help="As --first-bad-stage, and find the first layer and module inside that departs."
)
@click.option(
    "--save-inputs",
    "inputs_folder",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="With --first-bad-stage or --layers: write there what the stage was called with, for Polygraphy.",
)
@quantize_loss.option
@options.loop_option
@options.share_prefix_option
@options.merge_override_options
@answer_options.generation_options
@common.json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle_folder: Path | None,
    case_folder: Path | None,
    backend: str,
    device: Device,
    provider_cache: Path | None,
    precision: str | None,
    cuda_graphs: bool | None,
    specialization: str | None,
    verify: Verify,
    samples: int,
    model_folder: Path | None,
    vision_tower: Path | None,
    graphs: GraphsChoice | None,
    first_bad_stage: bool,
    layers: bool,
    inputs_folder: Path | None,
    quantization_loss: bool,
    kv_cache: bool | None,
    share_prefix: bool,
    json_file: str | None,
    **settings: Any,
) -> None:
    """Prove a backend against PyTorch: same tokens, same commits, same kept sets, logits within tolerance.

    Runs the whole denoising loop on both sides and compares every step, and probes what samples leave out. With --case
    it compares against a recorded run instead. Of a bundle built for both loops both are proven. In fp16, bf16 and int8
    it bounds how far both may be apart by what the precision itself does to the model. With --share-prefix both sides
    prefill what questions share by itself, in the loop with a KV cache. Exit code 1 if anything departs.
    Where it does, --layers finds out in which module.

    With --quantization-loss nothing is proven: it tells what weights in few bits cost in quality.

    \b
    d3tom-export validate lavida-tiny-d3tom-l2-r0.9 --samples 64
    d3tom-export validate lavida-tiny-d3tom-l2-r0.9 --layers
    d3tom-export validate --case golden/plain-adaptive --backend pytorch
    """
    from d3tom_export.backends.select import has_both_graphs

    if (bundle_folder is None) == (case_folder is None):
        raise click.UsageError("Give either a BUNDLE or --case DIR.")
    check_choice(backend, device, precision, cuda_graphs, provider_cache, specialization)
    diagnoses = first_bad_stage or layers
    if inputs_folder is not None and not diagnoses:
        raise click.UsageError("--save-inputs goes with --first-bad-stage or --layers.")
    if precision == "int8" and (case_folder is not None or diagnoses):
        raise click.UsageError(
            "--precision int8 is held against float32 by bounds on its answers; --case, --first-bad-stage and --layers "
            "are for the other precisions."
        )
    if case_folder is not None and precision not in (None, "fp32"):
        raise click.UsageError(f"--case holds float32 against a recorded run; validate a BUNDLE with {precision}.")
    if backend not in options.ENGINE_BACKENDS and (layers or (diagnoses and precision == "bf16")):
        _check_diagnosis(precision)
    if share_prefix:
        options.check_sharing(backend, kv_cache)
        if diagnoses:
            raise click.UsageError(
                "--first-bad-stage and --layers look at every stage, also at that of --share-prefix where the bundle "
                "has it; leave the option out."
            )
    if graphs is not None and not has_both_graphs(backend, device, precision):
        raise click.UsageError(
            "--graphs chooses between the two kinds of float32 graphs that ONNX Runtime runs on the CPU. Leave it out, "
            "or take --backend onnxruntime --device cpu without --precision."
        )
    if graphs == "both" and diagnoses:
        raise click.UsageError(
            "--first-bad-stage and --layers look into one kind of graphs: --graphs standard or tuned."
        )
    if quantization_loss and (case_folder is not None or diagnoses or share_prefix or graphs == "both"):
        raise click.UsageError(
            "--quantization-loss compares answers of a BUNDLE in one kind of graphs: it does not go with --case, "
            "--first-bad-stage, --layers, --share-prefix or --graphs both."
        )
    samples_given = ctx.get_parameter_source("samples") is click.core.ParameterSource.COMMANDLINE
    progress = common.ConsoleProgress()
    if case_folder is not None:
        if backend in options.ENGINE_BACKENDS:
            raise click.UsageError(
                "--case runs on pytorch or onnxruntime; build engines of a BUNDLE and validate that."
            )
        if diagnoses:
            raise click.UsageError("--first-bad-stage and --layers look into a BUNDLE; build one of the case's folder.")
        fixed = {"model": model_folder, "vision_tower": vision_tower, "kv_cache": kv_cache, "graphs": graphs} | settings
        given = [f"--{name.replace('_', '-')}" for name, value in fixed.items() if value is not None]
        given += [name for name, said in (("--share-prefix", share_prefix), ("--samples", samples_given)) if said]
        if ctx.get_parameter_source("verify") is click.core.ParameterSource.COMMANDLINE:
            given.append("--verify")
        if given:
            raise click.UsageError(
                f"--case takes its settings from the recorded run; {', '.join(given)} cannot change."
            )
        report: Report | AgreementReport = _validate_case(case_folder, backend, device, provider_cache, progress)
    else:
        assert bundle_folder is not None
        count = samples if samples_given or not diagnoses else 1
        engine = options.engine_settings(precision, cuda_graphs, provider_cache, specialization)
        options.check_vision_tower(vision_tower, model_folder)
        subject = _open(
            bundle_folder,
            backend,
            {"device": device} | engine,
            count,
            model_folder,
            vision_tower,
            kv_cache,
            settings,
            progress,
            graphs or ("tuned" if diagnoses or quantization_loss else None),
            verify,
            one_by_one=not diagnoses,
            layers=layers,
            share_prefix=share_prefix,
            unquantized=quantization_loss,
        )
        if quantization_loss:
            loss = quantize_loss.measure(subject, progress)
            common.write_json(json_file, loss.to_json())
            common.say(json_file, "\n".join(loss.lines()))
            return
        if diagnoses:
            diagnosis = _diagnose(subject, layers, progress)
            common.write_json(json_file, diagnosis.to_json())
            common.say(json_file, "\n".join([*diagnosis.lines(), *_by_hand(diagnosis, inputs_folder)]))
            if not diagnosis.passed:
                ctx.exit(1)
            return
        report = _validate_bundle(subject, progress)
    common.write_json(json_file, report.to_json())
    common.say(json_file, "\n".join(report.lines()))
    if not report.passed:
        ctx.exit(1)


def _check_diagnosis(precision: str | None) -> None:
    """Refuse to look where ONNX Runtime shows nothing."""
    if precision == "fp16":
        raise click.UsageError(
            "--layers looks into float32 graphs and into engines; on onnxruntime --first-bad-stage names the stage."
        )
    if precision == "bf16":
        raise click.UsageError(
            "--first-bad-stage and --layers look into bf16 in engines alone: NumPy has none to give to onnxruntime. "
            "Take --backend tensorrt or tensorrt-rtx, or --precision fp16."
        )


def _validate_case(
    folder: Path, backend: str, device: Device, provider_cache: Path | None, progress: common.ConsoleProgress
) -> Report:
    from d3tom_export.checkpoint.folder import open_checkpoint
    from d3tom_export.parity.recorded import case_model, load_recorded_run
    from d3tom_export.parity.replay import validate_recorded
    from d3tom_export.parity.validate import BACKEND_TOLERANCE, FAMILIES_TOLERANCE, ORACLE_TOLERANCE

    family, changed = case_model(folder)
    checkpoint = open_checkpoint(folder, family=family, changed=changed)
    language = checkpoint.config.language
    run = load_recorded_run(folder, language.n_layers)
    progress("loading torch and the checkpoint", 0, 1)
    from d3tom_export.backends.pytorch import PyTorchBackend
    from d3tom_export.checkpoint.models import load_model

    if backend == "pytorch":
        oracle = PyTorchBackend(load_model(checkpoint), run.merge, kv_cache=run.kv_cache)
        tolerance = ORACLE_TOLERANCE if family is None else FAMILIES_TOLERANCE
        return validate_recorded(run, oracle, checkpoint.config, tolerance)

    from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
    from d3tom_export.export.assemble import write_stages
    from d3tom_export.export.request import StageRequest

    loop: Loop = "cached" if run.kv_cache else "uncached"
    with tempfile.TemporaryDirectory(prefix="d3tom-case-") as scratch:
        folder = Path(scratch)
        stages = StageRequest(run.merge, (loop,))
        bundle = write_stages(checkpoint, stages, run.generation, folder, progress=progress)
        runtime = OnnxRuntimeBackend(bundle, loop, device=device, provider_cache=provider_cache, progress=progress)
        return validate_recorded(run, runtime, checkpoint.config, BACKEND_TOLERANCE)


def _open(
    folder: Path,
    backend: str,
    backend_options: dict[str, Any],
    count: int,
    model_folder: Path | None,
    vision_tower: Path | None,
    kv_cache: bool | None,
    settings: dict[str, Any],
    progress: common.ConsoleProgress,
    graphs: GraphsChoice | None,
    verify: Verify,
    *,
    one_by_one: bool,
    layers: bool,
    share_prefix: bool,
    unquantized: bool,
) -> Subject:
    from d3tom_export.bundle.folder import load_bundle
    from d3tom_export.checkpoint.folder import open_checkpoint
    from d3tom_export.errors import D3tomError
    from d3tom_export.parity.source import check_same_config, find_source
    from d3tom_export.pipeline import Reader
    from d3tom_export.prompt.samples import Sample, samples_for

    bundle = load_bundle(folder, verify)
    common.warn_of_random_weights(bundle)
    manifest = bundle.manifest
    if manifest.rounds_inputs and not one_by_one:
        raise click.UsageError(
            f"Products of {folder} round their inputs to float8, and a number next to a boundary may go either way: no "
            "stage of it can be held to float32's last digits. Leave --first-bad-stage and --layers out, or look into "
            "a bundle that was built without --quantize-activations."
        )
    generation = answer_options.generation_from(manifest.generation, settings)
    merge = options.merge_from(manifest.merge, settings)
    loops = manifest.loops if kv_cache is None else (bundle.choose_loop(kv_cache),)
    if share_prefix:
        manifest.check_shares_prefix()
    samples = samples_for(folder, bundle.config, count)
    if not samples:
        raise D3tomError(
            f"{folder} has a set of samples without any, and a check of nothing passes nothing. Build the bundle anew, "
            "from a checkpoint with questions or without samples.zip."
        )
    reader = None
    if isinstance(samples[0], Sample):
        reader = Reader.of_bundle(bundle)
    if unquantized:
        model_folder = quantize_loss.unquantized_folder(bundle, model_folder)
    source = find_source(bundle, model_folder)
    if source.notice:
        click.echo(source.notice, err=True)
    checkpoint = open_checkpoint(source.folder, vocab_rows=manifest.vocab_rows, vision_tower=vision_tower)
    common.tell_notes(checkpoint)
    check_same_config(bundle, checkpoint)
    if unquantized:
        quantize_loss.check_unquantized(checkpoint)
    progress("loading torch and the checkpoint", 0, 1)
    from d3tom_export.backends.select import has_both_graphs, open_backend
    from d3tom_export.checkpoint.models import load_model

    both_kinds = has_both_graphs(backend, backend_options["device"], backend_options["precision"])
    if both_kinds and layers and not manifest.standard_on_cpu:
        raise click.UsageError(
            f"--layers looks into the standard graphs, and those of {folder} hold weights in nvfp4, for which ONNX "
            "Runtime has no CPU kernels. --first-bad-stage names the stage."
        )
    if both_kinds and not manifest.standard_on_cpu and graphs in ("standard", "both"):
        raise click.UsageError(
            f"The standard graphs of {folder} hold weights in nvfp4, and ONNX Runtime has no CPU kernels for floats of "
            "four bits: they are for engines. Take --graphs tuned, whose graphs have the same numbers as integers."
        )
    # Engines keep their weights on the GPU. What is in half precision is compared with a model in the same, which must
    # be whole.
    on_cpu = backend in ("auto", "onnxruntime", "pytorch") and backend_options["precision"] in (None, "fp32", "int8")
    streamed, room = _memory(checkpoint, loops, one_by_one, manifest.shares_prefix)
    chosen: Sequence[Graphs] = ("tuned",)
    if graphs is not None:
        chosen = ("tuned", "standard") if graphs == "both" else (graphs,)
    elif both_kinds and room and manifest.standard_on_cpu:
        chosen = ("tuned", "standard")
    model = load_model(checkpoint, streamed=on_cpu and streamed)

    def opened(loop: Loop, kind: Graphs) -> Backend:
        return open_backend(backend, bundle, loop, progress=progress, graphs=kind, **backend_options)

    told = source.described
    return Subject(
        bundle, model, opened, loops, chosen, both_kinds, told, reader, samples, generation, merge, share_prefix
    )


def _memory(checkpoint: Checkpoint, loops: Sequence[Loop], one_by_one: bool, shares_prefix: bool) -> tuple[bool, bool]:
    """Whether the oracle is to read its weights layer by layer, and whether memory holds the standard graphs besides.

    Says so where memory may not do even for the first. ``one_by_one`` tells whether the loops are opened one after
    another, not together.
    """
    from d3tom_export.export.preflight import GIB, RUNTIME_MEMORY, free_memory
    from d3tom_export.export.weights import demand_of

    needs = [demand_of(checkpoint, "link", [loop], shares_prefix=shares_prefix) for loop in loops]
    free = free_memory()
    if free is None:
        return False, True
    stages = max(each.runtime for each in needs)
    if not one_by_one:
        stages = sum(each.runtime for each in needs) - (len(needs) - 1) * RUNTIME_MEMORY
    streamed = stages + needs[0].eager > free
    used = stages + (needs[0].eager_streamed if streamed else needs[0].eager)
    if used > free:
        less = "" if len(needs) == 1 else " One loop (--kv-cache or --no-kv-cache) takes less."
        click.echo(
            f"This may need {used / GIB:.1f} GiB of memory, and {free / GIB:.1f} GiB are free: where it is not enough, "
            f"the system ends the process.{less}",
            err=True,
        )
    return streamed, used + needs[0].standard <= free


def _validate_bundle(subject: Subject, progress: common.ConsoleProgress) -> Report | AgreementReport:
    from d3tom_export.backends.pytorch import PRECISIONS, PyTorchBackend
    from d3tom_export.parity.agreement import compare_in_step
    from d3tom_export.parity.stages import StageProbes
    from d3tom_export.parity.validate import validate_backends

    first = subject.open(subject.loops[0], subject.graphs[0])
    precision, probes, model = first.precision, StageProbes(), subject.model
    if precision not in ("fp32", "int8"):  # int8 is held against float32
        model = model.to(PRECISIONS[precision])
    ready = [first]
    del first

    def opened(loop: Loop, kind: Graphs) -> Backend:
        backend = ready.pop() if ready else subject.open(loop, kind)
        probes.run(subject.bundle, model, backend, loop)
        return backend

    def pairs() -> Iterator[tuple[PyTorchBackend, Backend]]:
        for loop in subject.loops:
            oracle = PyTorchBackend(model, subject.merge, kv_cache=loop == "cached")
            for kind in subject.graphs:  # one backend at a time: nothing here holds on to the last one
                yield oracle, opened(loop, kind)

    bundle, reader, samples, generation, merge = (
        subject.bundle,
        subject.reader,
        subject.samples,
        subject.generation,
        subject.merge,
    )
    arguments = (pairs(), bundle.config, reader, samples, generation, merge, progress)
    exact = precision == "fp32" and not subject.bundle.manifest.rounds_inputs
    compare = validate_backends if exact else compare_in_step
    report: Report | AgreementReport = compare(*arguments, share_prefix=subject.share_prefix)
    probes.note_in(report.probes, report.not_probed, report.problems)
    report.compared_with = subject.compared_with
    if subject.both_kinds:
        report.graphs = list(subject.graphs)
        if len(subject.graphs) == 1:
            other = "standard" if "tuned" in subject.graphs else "tuned"
            why = "--graphs both runs them too, in more memory"
            if not bundle.manifest.standard_on_cpu:
                why = "ONNX Runtime has no CPU kernels for weights in nvfp4"
            report.not_probed.append(f"the {other} graphs ({why})")
    return report


def _diagnose(subject: Subject, layers: bool, progress: common.ConsoleProgress) -> Diagnosis:
    from d3tom_export.diagnosis.stagewise import diagnose

    backends = {loop: subject.open(loop, subject.graphs[0]) for loop in subject.loops}
    rest = (subject.reader, subject.samples, subject.generation, subject.merge)
    return diagnose(subject.bundle, subject.model, backends, *rest, layers=layers, progress=progress)


def _by_hand(diagnosis: Diagnosis, inputs_folder: Path | None) -> list[str]:
    """What repeats the diagnosis with NVIDIA's tools."""
    from d3tom_export.diagnosis.by_hand import polygraphy_command, save_inputs

    loader = None if inputs_folder is None else save_inputs(diagnosis, inputs_folder)
    lines = [] if loader is None else [f"The inputs of the stage, for Polygraphy's --data-loader-script: {loader}"]
    command = polygraphy_command(diagnosis, loader)
    if command is not None:
        lines += ["By hand, with Polygraphy (--save-inputs DIR writes its inputs):", f"  {command}"]
    return lines
