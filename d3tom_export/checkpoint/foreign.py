"""Folders that are no checkpoint of a whole model, by their files and tensors' names: what they are, and the way out.

What a folder is comes before what is wrong with it: an adapter or a quantized model has every tensor "missing" and
every other "unexpected", which helps nobody. Looks at names of files, an adapter's config and headers of safetensors;
opens nothing else. Imports no framework.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path

from d3tom_export.checkpoint.stored import INDEX_FILE, SINGLE_FILE
from d3tom_export.checkpoint.wrappers import check_wrapping
from d3tom_export.config import CONFIG_FILE
from d3tom_export.errors import D3tomError, listing, printable
from d3tom_export.trust.documents import read_json
from d3tom_export.trust.fields import shown
from d3tom_export.trust.files import find_inside
from d3tom_export.trust.tensors import StoredTensor

_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MERGE = (
    "merge it into its base model with peft (model = PeftModel.from_pretrained(base, folder).merge_and_unload(), then "
    "model.save_pretrained(...)) and give the merged folder."
)
_SAVE = "Save the model with save_pretrained(..., safe_serialization=True) and give that folder."
_MOST_LOOKED_AT = 1000
"""Folders within a folder that are looked into for checkpoints."""

_LORA = (".lora_", ".base_layer.", ".modules_to_save.", ".lora_magnitude_vector")
"""Parts of names that PEFT gives to a layer that it adapts."""

_QUANTIZED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("GPTQ's", (".g_idx",)),
    ("AWQ's or GPTQ's", (".qweight", ".qzeros", ".scales")),
    ("bitsandbytes' 8 bits", (".SCB", ".weight_format")),
    ("bitsandbytes' 4 bits", (".absmax", ".quant_map", ".nested_absmax")),
    ("compressed-tensors'", (".weight_packed", ".weight_shape", ".weight_zero_point")),
    ("fp8's or another with scales beside the weights", (".weight_scale", ".weight_scale_inv", ".input_scale")),
)
"""Ends of names of tensors that only quantized layers have, by what makes them; the first that fits is named."""

_PACKED_DTYPES = ("I4", "U4", "I8", "U8", "I32", "U32", "F4", "F6_", "F8_")
"""Beginnings of the dtypes that quantized weights are packed into."""


def check_folder(folder: Path) -> None:
    """Refuse an adapter's folder, and one without a config whose files say that it is something else.

    Says nothing where they do not: that a file is missing, or damaged, is for its reader to say. Raises
    :class:`D3tomError`.
    """
    names = set(os.listdir(folder))
    if _ADAPTER_CONFIG in names or names & set(_ADAPTER_WEIGHTS):
        raise D3tomError(_adapter(folder, {SINGLE_FILE, INDEX_FILE} & names))
    if CONFIG_FILE not in names:
        _name_it(folder, names)


def check_weights(folder: Path) -> None:
    """Refuse a folder with a config whose weights are there in a form that is not read: what they are, and the way out.

    The config was looked at: which model it is matters more. Raises :class:`D3tomError`.
    """
    names = set(os.listdir(folder))
    if not {SINGLE_FILE, INDEX_FILE} & names:
        _name_it(folder, names)


def _name_it(folder: Path, names: Collection[str]) -> None:
    for is_it, told in _OTHERS:
        if is_it(folder, names):
            raise D3tomError(f"{folder} {told(folder, names)}")


def _adapter(folder: Path, weights: Collection[str]) -> str:
    base = None
    if (folder / _ADAPTER_CONFIG).is_file():
        base = read_json(find_inside(folder, _ADAPTER_CONFIG)).get("base_model_name_or_path")
    of = f" of {shown(base)}" if isinstance(base, str) and base else ""
    if weights:
        return (
            f"{folder} can be read in two ways: as a LoRA adapter{of} ({_ADAPTER_CONFIG}), which is how transformers "
            f"reads it, and as the model in {listing(sorted(weights))}. If that model is the merged one, move the "
            f"adapter's files out of the folder. If not, {_MERGE}"
        )
    return f"{folder} is a LoRA adapter{of}, and not a model: it holds changes to one. To use it, {_MERGE}"


def _files(names: Collection[str], *patterns: str) -> list[str]:
    return sorted(name for name in names if any(fnmatch(name.lower(), pattern) for pattern in patterns))


def _has(*patterns: str) -> _Test:
    return lambda folder, names: bool(_files(names, *patterns))


def _bundle(folder: Path, names: Collection[str]) -> str:
    return (
        "is a bundle, or a part of one: it has a manifest.json, and the checkpoint's files that a bundle holds are not "
        "all there. A bundle is run (`d3tom-export run`), and not built again; give the checkpoint it was built from."
    )


def _pipeline(folder: Path, names: Collection[str]) -> str:
    return (
        "is a pipeline of diffusers (model_index.json), which draws pictures: it holds several models and answers "
        "nothing. Give a language model of masked diffusion."
    )


def _gguf(folder: Path, names: Collection[str]) -> str:
    return (
        f"holds {listing(_files(names, '*.gguf'), 4)}: GGUF, made for llama.cpp, mostly quantized. Give the checkpoint "
        "that it was converted from, with config.json and safetensors."
    )


def _graphs(folder: Path, names: Collection[str]) -> str:
    kinds = listing(_files(names, "*.onnx", "*.engine", "*.plan", "*.trt"), 4)
    return (
        f"holds {kinds}: graphs or engines that were exported already, which cannot be cut at a layer. Give the "
        "checkpoint that they were made from, with config.json and safetensors."
    )


def _pickles(folder: Path, names: Collection[str]) -> str:
    kinds = listing(_files(names, *_PICKLES), 4)
    return f"holds {kinds}, which are pickles and are never opened: loading one runs what its author put in it. {_SAVE}"


def _other_frameworks(folder: Path, names: Collection[str]) -> str:
    kinds = listing(_files(names, "tf_model*.h5", "flax_model*.msgpack"), 4)
    return f"holds {kinds}: weights for TensorFlow or Flax. Load them with transformers. {_SAVE}"


def _shards_alone(folder: Path, names: Collection[str]) -> str:
    return (
        f"holds {listing(_files(names, '*.safetensors'), 4)} and neither {SINGLE_FILE} nor {INDEX_FILE}, which says "
        f"what of it is the model. Fetch {INDEX_FILE}, or name a single file {SINGLE_FILE}."
    )


def _checkpoints(folder: Path, names: Collection[str]) -> str:
    within = checkpoints_within(folder)
    what = "a checkpoint" if len(within) == 1 else "several checkpoints, each in a folder of its own"
    return f"is no checkpoint but holds {what}: {listing(within, 8)}. Name the one that is meant."


_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.distcp")
_Test = Callable[[Path, Collection[str]], bool]
_Told = Callable[[Path, Collection[str]], str]
_OTHERS: tuple[tuple[_Test, _Told], ...] = (
    (_has("manifest.json"), _bundle),
    (_has("model_index.json"), _pipeline),
    (lambda folder, names: bool(checkpoints_within(folder)), _checkpoints),
    (lambda folder, names: CONFIG_FILE in names and bool(_files(names, "*.safetensors")), _shards_alone),
    (_has("*.gguf"), _gguf),
    (_has("*.onnx", "*.engine", "*.plan", "*.trt"), _graphs),
    (_has(*_PICKLES), _pickles),
    (_has("tf_model*.h5", "flax_model*.msgpack"), _other_frameworks),
)
"""What a folder that lacks config or weights may be instead, in the order in which it is asked."""


def checkpoints_within(folder: Path) -> list[str]:
    """Names of the folders in ``folder`` that have a config, or an adapter's: where a run keeps its checkpoints."""
    snapshots = folder / "snapshots"  # of a model in a hub's cache
    within = sorted(path for path in (snapshots if snapshots.is_dir() else folder).iterdir() if path.is_dir())
    return [
        path.relative_to(folder).as_posix()
        for path in within[:_MOST_LOOKED_AT]
        if any((path / name).is_file() for name in (CONFIG_FILE, _ADAPTER_CONFIG))
    ]


def check_names(folder: Path, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse tensors whose names or dtypes say that they are no whole model's own weights.

    Those of an adapter that was not merged, of quantized layers, of wrappers. Raises :class:`D3tomError`.
    """
    adapted = [name for name in stored if any(mark in f".{name}" for mark in _LORA)]
    if adapted:
        raise D3tomError(
            f"The weights in {folder} hold a LoRA adapter that is not merged into them: {len(adapted):,} of "
            f"{len(stored):,} tensors are PEFT's, such as {printable(adapted[0], 120)}. Merge it (model = "
            "model.merge_and_unload(), then model.save_pretrained(...)) and give the merged folder."
        )
    _check_quantized(folder, stored)
    check_wrapping(folder, stored)


def _check_quantized(folder: Path, stored: Mapping[str, StoredTensor]) -> None:
    of_kinds = {kind: [name for name in stored if name.endswith(ends)] for kind, ends in _QUANTIZED}
    of_kinds["packed integers or numbers of 8 bits"] = [
        name
        for name, tensor in stored.items()
        if name.endswith(".weight") and tensor.dtype.upper().startswith(_PACKED_DTYPES)
    ]
    kind, found = next(((kind, found) for kind, found in of_kinds.items() if found), ("", []))
    if found:
        raise D3tomError(
            f"The weights in {folder} are quantized: {len(found):,} of {len(stored):,} tensors are {kind}, such as "
            f"{printable(found[0], 120)} ({printable(stored[found[0]].dtype, 20)}). Only float32, float16 and bfloat16 "
            "weights are read. Give the checkpoint that they were quantized from; --precision int8 quantizes a "
            "bundle's graphs."
        )
