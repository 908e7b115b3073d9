"""A bundle's weights in few bits, quantized layer by layer on their way from the checkpoint's files to its own.

A layer is a shard, and what is in no layer another. Shards that an interrupted build finished are taken over by the
next one that would write the same. Memory holds one weight at a time, in float32, and what choosing its scales takes
beside it; where samples are looked at, one layer and all samples at its input.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from d3tom_export.checkpoint.folder import Checkpoint
from d3tom_export.checkpoint.quantized import part_name, with_quantized
from d3tom_export.checkpoint.stored import INDEX_FILE
from d3tom_export.checkpoint.tensors import LANGUAGE_HEAD, LAYERS
from d3tom_export.errors import D3tomError, listing
from d3tom_export.export.weights import (
    SafetensorsKind,
    dtypes_in_bundle,
    name_in_bundle,
    parts_as,
    used_tensors,
    write_safetensors,
)
from d3tom_export.progress import Progress, no_progress
from d3tom_export.quantize.calibration import Calibration, Seen
from d3tom_export.quantize.matrices import Format, format_for, gptq
from d3tom_export.quantize.plan import QuantizePlan
from d3tom_export.quantize.stored import nearest_parts, read_quantized, to_parts
from d3tom_export.trust.files import write_file
from d3tom_export.trust.replace import try_lock
from d3tom_export.trust.tensors import StoredTensor, read_header
from d3tom_export.version import __version__

_STATE_FILE = "quantizing.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors(\.partial)?")

_Kinds = dict[str, SafetensorsKind]
_Parts = dict[str, Tensor]
"""Of a quantized weight, by the ends of their names."""


def place_quantized(
    checkpoint: Checkpoint,
    folder: Path,
    plan: QuantizePlan,
    *,
    keep: Path | None = None,
    calibration: Calibration | None = None,
    progress: Progress = no_progress,
) -> None:
    """Write the checkpoint's weights into ``folder``, those of ``plan`` quantized and the others as they are stored.

    Args:
        checkpoint: What is quantized.
        folder: Gets shards and their index, and must have none yet.
        plan: What becomes of each weight.
        keep: Where finished shards wait for the others, through an interruption too. It lies in the file system of
            ``folder``, to which they move at the end; it stays for :func:`keeping`. None: nothing outlives an
            interruption.
        calibration: Samples to round by, at the input of the first layer, from which the scales of inputs that ``plan``
            rounds follow too; None: to nearest.
        progress: Called as weights are done.

    Raises :class:`D3tomError` where a file changed since its header was read, and where another process is at ``keep``.
    """
    assert calibration is not None or not plan.inputs, "scales of inputs follow from samples"
    with nullcontext() if keep is None else _alone(keep):
        _place(checkpoint, folder, plan, keep, calibration, progress)


def _place(
    checkpoint: Checkpoint,
    folder: Path,
    plan: QuantizePlan,
    keep: Path | None,
    calibration: Calibration | None,
    progress: Progress,
) -> None:
    work = folder if keep is None else keep
    shards = _shards(checkpoint, plan)
    if keep is not None:
        _continue(keep, _fingerprint(checkpoint, plan, calibration))
    weight_map: dict[str, str] = {}
    total = 0
    for number, (layer, members) in enumerate(shards.items(), start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        what = "copying what stays as it is" if layer is None else f"quantizing layer {layer} to {plan.format}"
        progress(what, number - 1, len(shards))
        kinds = _kinds(checkpoint, plan, members)
        if not (work / file).exists():
            done = _calibrated(checkpoint, plan, calibration) if layer is not None and calibration else {}
            partial = work / f"{file}.partial"
            partial.unlink(missing_ok=True)
            write_safetensors(partial, kinds, _data(checkpoint, plan, members, done))
            partial.rename(work / file)
        elif layer is not None and calibration is not None:
            calibration.pass_layer(_stored_numbers(checkpoint, work / file, members))
        weight_map |= dict.fromkeys(kinds, file)
        total += (work / file).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    if keep is not None:
        for file in sorted(set(weight_map.values())):
            (keep / file).rename(folder / file)
    write_file(folder / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())
    progress("weights in place", len(shards), len(shards))


@contextmanager
def keeping(keep: Path, folder: Path) -> Iterator[None]:
    """Where the block fails, or is interrupted, move the shards in ``folder`` back to ``keep``, for the next build.

    They move and are not linked, for ONNX refuses weights in files that have two names.
    """
    try:
        yield
    except BaseException:
        with suppress(D3tomError, OSError):
            shards = [path for path in folder.iterdir() if _SHARD.fullmatch(path.name)]
            if shards and (keep / _STATE_FILE).is_file():
                with _alone(keep):
                    for path in shards:
                        path.rename(keep / path.name)
        raise


def drop_kept(keep: Path) -> None:
    """Remove ``keep`` once its shards' bundle is in place, unless another process has taken it or strangers' files do.

    Shards that the next build would write anew cost time and no more: nothing is raised.
    """
    with suppress(D3tomError, OSError):
        if keep.is_dir():
            with _alone(keep):
                for path in list(keep.iterdir()):
                    if path.name == _STATE_FILE or _SHARD.fullmatch(path.name):
                        path.unlink()
                keep.rmdir()


@contextmanager
def _alone(keep: Path) -> Iterator[None]:
    """Make the folder ``keep`` where it is not there, and keep other processes out of it.

    The lock is on the folder itself, so that nothing is left behind, and ends with the process, however that ends.
    Where a file system has no locks nobody is kept out. Raises :class:`D3tomError` where somebody is at work there.
    """
    while True:
        with suppress(FileExistsError):
            keep.mkdir()
        try:
            descriptor = os.open(keep, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # whoever was done has just removed it
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            raise D3tomError(
                f"{keep} is where quantized weights wait until all are done, and is no folder. Move it away."
            ) from None
        try:
            if try_lock(descriptor) is False:
                raise D3tomError(
                    f"Another process is quantizing weights in {keep}, for the same output. Wait for it to end, or "
                    "give another --output."
                )
            here = os.fstat(descriptor)
            if keep.is_dir() and os.path.samestat(here, keep.stat()):
                yield
                return
        finally:
            os.close(descriptor)


def _shards(checkpoint: Checkpoint, plan: QuantizePlan) -> dict[int | None, list[str]]:
    """The weights of each shard, by the layer that they are of: its quantized ones. None: all others."""
    shards: dict[int | None, list[str]] = {}
    others = []
    for name in used_tensors(checkpoint):
        if name in plan.blocks and name.startswith(LAYERS):
            shards.setdefault(int(name.removeprefix(LAYERS).split(".")[0]), []).append(name)
        else:
            others.append(name)
    return {**dict(sorted(shards.items(), key=lambda shard: shard[0] or 0)), None: others}


def _continue(keep: Path, fingerprint: str) -> None:
    """Make ``keep`` the place of shards of this ``fingerprint``: those of another one go.

    Raises :class:`D3tomError` where anything else lies there, which is not ours to remove.
    """
    state = keep / _STATE_FILE
    names = sorted(path.name for path in keep.iterdir())
    foreign = [name for name in names if name != _STATE_FILE and not _SHARD.fullmatch(name)]
    if foreign:
        raise D3tomError(
            f"{keep} is where quantized weights wait until all are done, and holds {listing(foreign)}. Move it away."
        )
    if not (state.is_file() and state.read_text(encoding="utf-8") == fingerprint):
        for path in keep.iterdir():
            path.unlink()
    if not state.exists():
        write_file(state, fingerprint.encode())


def _fingerprint(checkpoint: Checkpoint, plan: QuantizePlan, calibration: Calibration | None) -> str:
    """What shards follow from."""
    files = sorted({tensor.source for tensor in checkpoint.tensors.values()})
    content = {
        "version": __version__,
        "config": checkpoint.raw_config,
        "files": [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files],
        "format": plan.format,
        "blocks": plan.blocks,
        "inputs": sorted(plan.inputs),
        "asymmetric": plan.asymmetric,
        "samples": None if calibration is None else calibration.fingerprint,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _kinds(checkpoint: Checkpoint, plan: QuantizePlan, members: list[str]) -> _Kinds:
    """Dtype and shape of what a shard with ``members`` stores, by stored name."""
    used, form = used_tensors(checkpoint), format_for(plan.format, asymmetric=plan.asymmetric)
    dtypes = dtypes_in_bundle(used, "copy")
    kinds: _Kinds = {}
    for name in members:
        stored = name_in_bundle(checkpoint, name)
        if name in plan.blocks:
            shape = (_rows(checkpoint, name), used[name].shape[1])
            for part, kind in _part_kinds(shape, form, plan.blocks[name], name in plan.inputs).items():
                kinds[part_name(stored, form.name, part)] = kind
        else:
            kinds[stored] = dtypes[name], used[name].shape
    return kinds


def _data(
    checkpoint: Checkpoint, plan: QuantizePlan, members: list[str], done: Mapping[str, _Parts]
) -> Iterator[NDArray[Any]]:
    """What :func:`_kinds` promises; ``done`` are the weights that are quantized already."""
    used, form = used_tensors(checkpoint), format_for(plan.format, asymmetric=plan.asymmetric)
    dtypes = dtypes_in_bundle(used, "copy")
    for name in members:
        if name not in plan.blocks:
            yield from parts_as(name, used[name], dtypes[name])
            continue
        if name in done:
            parts = done[name]
        else:
            ((_, weight),) = checkpoint.read([name])
            try:
                parts = nearest_parts(weight, form, plan.blocks[name])
            except ValueError as error:
                raise _not_quantized(checkpoint, name, plan, str(error)) from None
        yield from (part.reshape(-1).view(torch.uint8).numpy() for part in parts.values())


def _calibrated(checkpoint: Checkpoint, plan: QuantizePlan, calibration: Calibration) -> dict[str, _Parts]:
    """The next layer's weights, rounded by what they are multiplied with, by the model's names."""
    done: dict[str, _Parts] = {}
    form, path = format_for(plan.format, asymmetric=plan.asymmetric), f"{LAYERS}{calibration.layer}."

    def quantize(name: str, weight: Tensor, seen: Seen) -> Tensor | None:
        stored = f"{path}{name}.weight"
        if stored not in plan.blocks:
            return None
        if not seen.products.isfinite().all():
            why = "what the samples bring to it is not finite, for which weights up to this layer may be at fault"
            raise _not_quantized(checkpoint, stored, plan, why)
        try:
            matrix = gptq(weight, seen.products, form, plan.blocks[stored])
        except ValueError as error:
            raise _not_quantized(checkpoint, stored, plan, str(error)) from None
        except torch.linalg.LinAlgError:
            why = "what the samples bring to it cannot be inverted; give more samples or none"
            raise _not_quantized(checkpoint, stored, plan, why) from None
        if stored in plan.inputs:
            matrix = matrix._replace(input_scale=seen.input_scale)
        done[stored] = to_parts(matrix, form)
        return matrix.numbers

    calibration.quantize_layer(quantize)
    return done


def _not_quantized(checkpoint: Checkpoint, name: str, plan: QuantizePlan, why: str) -> D3tomError:
    tensor = checkpoint.tensors[name]
    return D3tomError(
        f"{tensor.name} in {tensor.file} cannot be stored in {plan.format}: {why}. Fetch the checkpoint again or mend "
        "it, or build without --quantize."
    )


def _stored_numbers(checkpoint: Checkpoint, path: Path, members: list[str]) -> dict[str, Tensor]:
    """The weights of a shard of one layer, by their products' names in it."""
    stored = with_quantized(read_header(path), path.parent)
    found = {}
    for name in members:
        tensor = stored[name_in_bundle(checkpoint, name)]
        assert not isinstance(tensor, StoredTensor)
        found[name.split(".")[-2]] = read_quantized(tensor)
    return found


def _rows(checkpoint: Checkpoint, name: str) -> int:
    """Outputs of a weight that is quantized: of the head those in use, for a graph can take no part of the codes."""
    return checkpoint.config.language.head_rows if name == LANGUAGE_HEAD else checkpoint.tensors[name].shape[0]


def _part_kinds(shape: tuple[int, int], form: Format, block: int, rounds_input: bool) -> _Kinds:
    """Dtype and shape of the parts that a weight of ``shape`` will have."""
    outputs, inputs = shape
    codes = (inputs, outputs) if form.grid.bits == 8 else (math.prod(shape) // 2,)
    kind = {"int8": "I8", "fp8": "F8_E4M3"}.get(form.name, "U8")
    scales = (inputs // block, outputs) if form.block is not None else (outputs,)
    kinds: _Kinds = {"": (kind, codes)}
    kinds["_scale"] = ("F32" if form.scale_grid is None else "F8_E4M3", scales)
    if form.scale_grid is not None:
        kinds["_whole"] = "F32", ()
    if form.has_zeros:
        kinds["_zero"] = "U8", (math.prod(scales) // 2,)
    if rounds_input:
        kinds["_input"] = "F32", ()
    return kinds
