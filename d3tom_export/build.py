"""A checkpoint in, a bundle out: weights once, one graph per stage, manifest last."""

from __future__ import annotations

import json
import math
import platform
import shutil
import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import d3tom_export
from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle import WEIGHTS_FILE, Bundle, Manifest, load_bundle, write_manifest
from d3tom_export.bundled import is_bundled, weights_digest
from d3tom_export.checkpoint import TOKENIZER_FILE, Checkpoint, load_model, read_header
from d3tom_export.config import GenerationConfig, Loop, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.model.lavida import Lavida
from d3tom_export.pipeline import Reader
from d3tom_export.progress import Progress, no_progress
from d3tom_export.samples import SAMPLES_FILE, Sample, TokenSample, load_samples, synthetic_samples
from d3tom_export.stages.contract import stage_specs
from d3tom_export.stages.cut import stage_modules
from d3tom_export.stages.export import OPSET, export_stage
from d3tom_export.validate import validate_backends

COPIED_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    SAMPLES_FILE,
)
"""Files of a checkpoint that a bundle takes along, where they exist."""


def write_safetensors(path: Path, tensors: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]]) -> None:
    """Write float32 ``tensors`` one at a time; ``shapes`` announces all of them, in order.

    Peak memory is one tensor in float32, whatever the model's size.
    """
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, shape in shapes.items():
        length = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + end)
        for name, tensor in tensors:
            file.seek(start + header[name]["data_offsets"][0])
            file.write(tensor.to(torch.float32).contiguous().numpy().data)


def write_stages(
    checkpoint: Checkpoint,
    model: Lavida,
    merge: MergeConfig,
    generation: GenerationConfig,
    folder: Path,
    *,
    loops: Sequence[Loop] = ("uncached",),
    drop_token_after_image: bool = True,
    progress: Progress = no_progress,
) -> Bundle:
    """Fill ``folder`` with a bundle of ``model``, which was loaded from ``checkpoint`` in float32.

    The caller owns the folder's fate (see :func:`d3tom_export.bundle.new_folder`).
    """
    merge.check_layer(checkpoint.config.language.n_layers)
    if "cached" in loops:
        merge.check_cached()
    specs = stage_specs(checkpoint.config, merge, generation.gen_length, loops)
    modules = stage_modules(model, merge, loops)
    total = len(modules) + 1

    progress("writing weights", 0, total)
    for name in COPIED_FILES:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    parameters = dict(model.named_parameters())
    # Vocabulary tensors keep all of their stored rows, so that the folder stays a checkpoint of the same config;
    # the graphs reference the rows in use, which come first.
    shapes = {name: checkpoint.tensors[name].shape for name in parameters}
    write_safetensors(folder / WEIGHTS_FILE, checkpoint.read(list(parameters), clip=False), shapes)
    stored = read_header(folder / WEIGHTS_FILE)
    places = {id(parameter): (name, stored[name]) for name, parameter in parameters.items()}

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
    progress("stages exported", total, total)
    write_manifest(
        folder,
        Manifest(
            model_name=checkpoint.folder.resolve().name,
            bundled_digest=weights_digest(checkpoint.folder) if is_bundled(checkpoint.folder) else None,
            vocab_rows=checkpoint.config.language.vocab_rows,
            merge=merge,
            generation=generation,
            drop_token_after_image=drop_token_after_image,
            precision="fp32",
            loops=tuple(loops),
            opset=OPSET,
            stages=specs,
            stage_weights=stage_weights,
            created_by={
                "d3tom_export": d3tom_export.__version__,
                "python": platform.python_version(),
                **{package: version(package) for package in ("torch", "onnx", "onnxscript", "transformers")},
            },
        ),
    )
    return load_bundle(folder)


def build_bundle(
    checkpoint: Checkpoint,
    merge: MergeConfig,
    generation: GenerationConfig,
    folder: Path,
    *,
    loops: Sequence[Loop] = ("uncached",),
    drop_token_after_image: bool = True,
    self_check: int = 2,
    progress: Progress = no_progress,
) -> dict[str, Any] | None:
    """Build into ``folder`` and validate ``self_check`` samples on ONNX Runtime against the checkpoint's eager model.

    Returns the validation result that was put into the manifest, None where there was nothing to validate.
    """
    samples: list[Sample] | list[TokenSample] = []
    reader = None
    if self_check:
        # Whatever could refuse a sample is asked before minutes go into the export.
        samples, reader = _self_check_samples(checkpoint, generation, self_check, drop_token_after_image)
    model = load_model(checkpoint)
    bundle = write_stages(
        checkpoint,
        model,
        merge,
        generation,
        folder,
        loops=loops,
        drop_token_after_image=drop_token_after_image,
        progress=progress,
    )
    if not samples:
        return None
    pairs = [
        (PyTorchBackend(model, merge, kv_cache=loop == "cached"), OnnxRuntimeBackend(bundle, loop)) for loop in loops
    ]
    report = validate_backends(pairs, bundle.config, reader, samples, generation, merge, progress).to_json()
    write_manifest(folder, replace(bundle.manifest, validation=report))
    return report


def _self_check_samples(
    checkpoint: Checkpoint, generation: GenerationConfig, count: int, drop_token_after_image: bool
) -> tuple[list[Sample] | list[TokenSample], Reader | None]:
    """Samples that fit the model, and their reader where they are questions."""
    config = checkpoint.config
    if config.vision is not None and not (checkpoint.folder / TOKENIZER_FILE).is_file():
        raise D3tomError(
            f"{checkpoint.folder} has no {TOKENIZER_FILE}, so no prompt can be read and nothing self-checked. "
            "Put the model's tokenizer there, or build with --self-check 0 and feed the stages yourself."
        )
    own = checkpoint.folder / SAMPLES_FILE
    if own.is_file():
        samples: list[Sample] | list[TokenSample] = load_samples(own)[:count]
    else:
        samples = synthetic_samples(config, count)
    if config.vision is None:
        return samples, None
    reader = Reader.from_folder(checkpoint.folder, config, drop_token_after_image=drop_token_after_image)
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
