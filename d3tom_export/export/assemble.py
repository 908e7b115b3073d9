"""A checkpoint in, a bundle out: weights once, one graph per stage, manifest last. No weight is loaded for it."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle, listed_files, write_manifest
from d3tom_export.bundle.manifest import Manifest, WeightsOrigin
from d3tom_export.bundled import is_bundled, weights_digest
from d3tom_export.checkpoint.companions import copy_companions
from d3tom_export.checkpoint.folder import Checkpoint, open_checkpoint
from d3tom_export.checkpoint.models import hollow_model, load_model
from d3tom_export.checkpoint.tensors import model_tensors, product_shapes
from d3tom_export.config import CONFIG_FILE, TOKENIZER_FILE, GenerationConfig, Loop
from d3tom_export.cpu.place import CpuPrecision
from d3tom_export.cpu.tune import write_tuned
from d3tom_export.engines.half import write_half
from d3tom_export.errors import D3tomError
from d3tom_export.export.calibrate import calibration_of
from d3tom_export.export.preflight import USUAL_CHECK, SelfCheck
from d3tom_export.export.quantized_weights import place_quantized
from d3tom_export.export.request import RandomWeights, StageRequest, WeightsMode
from d3tom_export.export.weights import place_weights
from d3tom_export.families.registry import family_of
from d3tom_export.parity.agreement import AgreementReport, compare_in_step
from d3tom_export.parity.source import note_source
from d3tom_export.parity.stages import StageProbes
from d3tom_export.parity.validate import Report, validate_backends
from d3tom_export.pipeline import Reader
from d3tom_export.progress import Note, Progress, no_note, no_progress
from d3tom_export.prompt.samples import (
    SAMPLES_FILE,
    Sample,
    TokenSample,
    load_samples,
    synthetic_samples,
    token_samples,
)
from d3tom_export.prompt.settings import PromptSettings
from d3tom_export.prompt.template import prompt_settings
from d3tom_export.prompt.vocabulary import built_tokenizer, has_tokenizer, is_built
from d3tom_export.quantize.calibration import Calibration
from d3tom_export.quantize.plan import QuantizeRequest, plan_of
from d3tom_export.stages.contract import stage_specs
from d3tom_export.stages.cut import stage_modules
from d3tom_export.stages.export import OPSET, export_stage
from d3tom_export.stages.quantized import OPSETS
from d3tom_export.trust.files import find_inside, is_there, write_file
from d3tom_export.version import __version__

_ORIGINS: dict[str, WeightsOrigin] = {"random": "random", "sparse": "zeros"}


def write_stages(
    checkpoint: Checkpoint,
    request: StageRequest,
    generation: GenerationConfig,
    folder: Path,
    *,
    weights: WeightsMode | RandomWeights = "copy",
    model_name: str | None = None,
    prompt: PromptSettings | None = None,
    calibration: Calibration | None = None,
    keep: Path | None = None,
    progress: Progress = no_progress,
) -> Bundle:
    """Fill ``folder`` with a bundle of ``checkpoint``, whose stages are those that ``request`` asks for.

    A ``checkpoint`` that lies in ``folder`` itself is there already, written by
    :func:`~d3tom_export.export.weights.write_geometry`; ``weights`` says what it holds. ``model_name`` None takes the
    checkpoint folder's, ``prompt`` None what the checkpoint itself says
    (:func:`~d3tom_export.prompt.template.prompt_settings`). The caller owns the folder's fate (see
    :func:`d3tom_export.bundle.output.new_folder`).
    """
    merge, loops = request.merge, request.loops
    merge.check_layer(checkpoint.config.language.n_layers)
    if prompt is None:
        prompt = prompt_settings(checkpoint, drop_token_after_image=request.drop_token_after_image)
    specs = stage_specs(checkpoint.config, merge, generation.gen_length, loops, request.share_prefix)
    model = hollow_model(checkpoint)
    modules = stage_modules(model, merge, loops, request.share_prefix)
    total = len(modules) + 1

    if checkpoint.folder != folder:
        in_few_bits = None
        if request.quantize is not None:
            in_few_bits = plan_of(product_shapes(checkpoint.config, checkpoint.vision_layers), request.quantize)
        marks = {}
        if in_few_bits is not None:
            marks[CONFIG_FILE] = in_few_bits.marks(0 if calibration is None else calibration.samples)
        copy_companions(checkpoint.folder, folder, marks)
        family = family_of(checkpoint.config)
        if is_built(checkpoint.folder, family):
            write_file(folder / TOKENIZER_FILE, built_tokenizer(checkpoint.folder, family))
        if in_few_bits is not None:
            place_quantized(checkpoint, folder, in_few_bits, keep=keep, calibration=calibration, progress=progress)
        else:
            assert weights != "random"
            assert weights != "sparse"
            place_weights(checkpoint, folder, weights, progress)
    # Vocabulary tensors keep all of their stored rows, so that the folder stays a checkpoint of the same config; the
    # graphs reference the rows in use, which come first.
    stored = model_tensors(folder, checkpoint.config)
    places = {id(parameter): (name, stored[name]) for name, parameter in model.named_parameters()}

    stage_weights = {}
    for done, (name, module) in enumerate(modules.items(), start=1):
        progress(f"exporting {name}", done, total)
        try:
            stage_weights[name] = export_stage(specs[name], module, folder / f"{name}.onnx", places)
        except torch.onnx.OnnxExporterError as error:
            raise D3tomError(
                f"torch {torch.__version__} cannot export stage {name}: {error}. "
                "Install the torch version that this project pins, or report it with --debug's trace."
            ) from error
    for precision in request.cpu_precisions:
        write_tuned(folder, specs, checkpoint.config.language, merge, precision)
    for half in request.half_precisions:
        write_half(folder, specs, half)
    rounded = weights == "float16"
    manifest = Manifest(
        model_name=model_name or checkpoint.folder.resolve().name,
        bundled_digest=(weights_digest(checkpoint.folder) if is_bundled(checkpoint.folder) and not rounded else None),
        vocab_rows=checkpoint.config.language.vocab_rows,
        weights=_ORIGINS.get(weights, "checkpoint"),
        linked_weights=weights == "link",
        merge=merge,
        generation=generation,
        prompt=prompt,
        precision="fp32",
        loops=loops,
        shares_prefix=request.share_prefix,
        opset=OPSET if request.quantize is None else max(OPSET, OPSETS[request.quantize.format]),
        stages=specs,
        stage_weights=stage_weights,
        created_by={
            "d3tom_export": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "onnx", "onnxscript", "transformers")},
        },
        source=note_source(checkpoint.folder) if _has_source(checkpoint, weights) and not rounded else None,
    )
    progress("hashing files", total, total)
    write_manifest(folder, manifest)
    return Bundle(folder, manifest, checkpoint.config)


def _has_source(checkpoint: Checkpoint, weights: WeightsMode | RandomWeights) -> bool:
    """Whether the bundle's weights are a folder's, or were quantized from them, and that is not the package's own."""
    return checkpoint.tower_folder is None and weights not in _ORIGINS and not is_bundled(checkpoint.folder)


def build_bundle(
    checkpoint: Checkpoint,
    request: StageRequest,
    generation: GenerationConfig,
    folder: Path,
    *,
    weights: WeightsMode | RandomWeights = "copy",
    model_name: str | None = None,
    check: SelfCheck = USUAL_CHECK,
    keep: Path | None = None,
    progress: Progress = no_progress,
    note: Note = no_note,
) -> Bundle:
    """Build into ``folder`` and validate the bundle on ONNX Runtime against the checkpoint's eager model.

    That is on the CPU, with the graphs that were tuned for it and, where ``check`` says so, with those that every other
    backend gets, which take more memory to load. The result goes into the bundle's manifest; int8, where it is built,
    is held to what ``validate`` asks of it and has a report of its own there; half precisions are left to ``validate``.
    What ``generation`` has no stops for ends at those of the family, and its end tokens are the model's; ``note`` is
    told where the checkpoint's own chat template could not be taken over. The other arguments are those of
    :func:`write_stages`.
    """
    merge, family = request.merge, family_of(checkpoint.config)
    prompt = prompt_settings(checkpoint, drop_token_after_image=request.drop_token_after_image, note=note)
    if has_tokenizer(checkpoint.folder, family):
        generation = Reader.from_folder(checkpoint.folder, checkpoint.config, prompt).with_ends(generation)
    else:
        generation = replace(generation, end_ids=tuple(sorted(set(checkpoint.config.language.eos_token_ids))))

    def some_samples(count: int) -> tuple[list[Sample] | list[TokenSample], Reader | None]:
        if weights in _ORIGINS:
            return token_samples(checkpoint.config, count), None
        found, reader = _samples(checkpoint, generation, count, prompt)
        if not found:
            raise D3tomError(
                f"There is no sample in {checkpoint.folder / SAMPLES_FILE}, and a check of nothing passes nothing. Put "
                "questions there or remove the file, or build with --self-check 0 and without --quantize-samples."
            )
        return found, reader

    # Whatever could refuse a sample is asked before minutes go into the export.
    samples, reader = some_samples(check.samples) if check.samples else ([], None)
    calibration = None
    if request.quantize is not None and request.quantize.samples:
        questions, asking = some_samples(request.quantize.samples)
        for sentence in _about(checkpoint, questions, request.quantize, made_up=weights in _ORIGINS):
            note(sentence)
        calibration = calibration_of(checkpoint, questions, asking, generation, progress)
    bundle = write_stages(
        checkpoint,
        request,
        generation,
        folder,
        weights=weights,
        model_name=model_name,
        prompt=prompt,
        calibration=calibration,
        keep=keep,
        progress=progress,
    )
    if not samples:
        return bundle
    own = "float16" if weights == "float16" else request.quantize.format if request.quantize is not None else None
    if own is not None:  # another model by its roundings: its graphs are held to its own weights
        checkpoint = open_checkpoint(folder, vocab_rows=checkpoint.config.language.vocab_rows)
    standard = check.standard and bundle.manifest.standard_on_cpu
    progress("loading model and stages for the self-check", 0, len(samples))
    model = load_model(checkpoint, streamed=check.streamed)

    probes = StageProbes()

    def opened(loop: Loop, precision: CpuPrecision, tuned: bool) -> OnnxRuntimeBackend:
        backend = OnnxRuntimeBackend(bundle, loop, device="cpu", precision=precision, tuned=tuned)
        if precision == "fp32":
            probes.run(bundle, model, backend, loop)
        return backend

    def pairs(precision: CpuPrecision, kinds: Sequence[bool]) -> Iterator[tuple[PyTorchBackend, OnnxRuntimeBackend]]:
        for loop in request.loops:
            oracle = PyTorchBackend(model, merge, kv_cache=loop == "cached")
            for tuned in kinds:  # one backend at a time: nothing here holds on to the last one
                yield oracle, opened(loop, precision, tuned)

    rest = (bundle.config, reader, samples, generation, merge, progress)
    compare = compare_in_step if bundle.manifest.rounds_inputs else validate_backends
    checked: Report | AgreementReport = compare(pairs("fp32", (True, False) if standard else (True,)), *rest)
    probes.note_in(checked.probes, checked.not_probed, checked.problems)
    checked.compared_with = "the weights it was built from" if own is None else f"its own {own} weights"
    checked.graphs = ["tuned", "standard"] if standard else ["tuned"]
    report = checked.to_json()
    report["standard_graphs"] = standard
    if "int8" in request.cpu_precisions:
        int8 = compare_in_step(pairs("int8", (True,)), *rest)
        int8.compared_with = checked.compared_with
        report["int8"] = int8.to_json()
        # Made-up weights leave every token a near-tie: their int8 is only run.
        if weights not in _ORIGINS:
            report["passed"] &= int8.passed
            report["problems"] += [f"int8, {failure}" for failure in int8.failures]
    manifest = replace(bundle.manifest, validation=report)
    write_manifest(folder, manifest, known=listed_files(folder))
    return replace(bundle, manifest=manifest)


def _about(
    checkpoint: Checkpoint, found: Sequence[Sample | TokenSample], request: QuantizeRequest, *, made_up: bool
) -> Iterator[str]:
    """What there is to tell of the samples that weights are rounded by; nothing where the weights are ``made_up``."""
    if made_up:
        return
    if not is_there(checkpoint.folder, SAMPLES_FILE) or isinstance(found[0], TokenSample):
        scales = ", the scales of activations among them" if request.activations else ""
        yield (
            f"weights are rounded by {len(found)} made-up prompts{scales}, which bring other products than real "
            f"questions do: {checkpoint.folder} has no {SAMPLES_FILE} that fits. Put questions there."
        )
    elif len(found) < request.samples:
        yield (
            f"weights are rounded by {len(found)} samples, all that {checkpoint.folder / SAMPLES_FILE} has; "
            f"{request.samples} were asked for."
        )


def _samples(
    checkpoint: Checkpoint, generation: GenerationConfig, count: int, prompt: PromptSettings
) -> tuple[list[Sample] | list[TokenSample], Reader | None]:
    """Samples that fit the model, and their reader where they are questions."""
    config = checkpoint.config
    if config.vision is not None and not has_tokenizer(checkpoint.folder, family_of(config)):
        raise D3tomError(
            f"{checkpoint.folder} has no {TOKENIZER_FILE}, so no prompt can be read and nothing self-checked. "
            "Put the model's tokenizer there, or build with --self-check 0 and feed the stages yourself."
        )
    if is_there(checkpoint.folder, SAMPLES_FILE):
        own = find_inside(checkpoint.folder, SAMPLES_FILE)
        samples: list[Sample] | list[TokenSample] = load_samples(own, count, fewer=True)
    else:
        samples = synthetic_samples(config, count)
    if config.vision is None:
        return samples, None
    reader = Reader.from_folder(checkpoint.folder, config, prompt)
    for sample in samples:
        if isinstance(sample, Sample):
            try:
                reader.check_length(sample.question, [sample.picture] if sample.picture else [], generation)
            except D3tomError as error:
                raise D3tomError(
                    f"The self-check's own question does not fit this model: {error} Build with --self-check 0 and "
                    "validate with samples of yours."
                ) from None
    return samples, reader
