"""Faults in a bundle's files: its weights, its config.json, its manifest, whole files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d3tom_export.checkpoint.stored import read_array, stored_tensors
from d3tom_export.trust.tensors import StoredTensor
from tests.mutation.fault import FEWER, Fault, Kind, edit_json

UNCACHED = ("--no-kv-cache", "--graphs", "tuned")
CACHED = ("--kv-cache", "--graphs", "tuned")
BLOCK = "model.transformer.blocks.{}.{}.weight"
TOWER = "model.vision_tower.vision_tower.vision_model"

Numbers = NDArray[np.float32]


def _write(tensor: StoredTensor, numbers: Numbers) -> None:
    """Put ``numbers`` where ``tensor`` lies, in its dtype."""
    if tensor.dtype == "BF16":
        raw = (np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        assert tensor.dtype == "F32"
        raw = np.ascontiguousarray(numbers, dtype=np.float32)
    with tensor.file.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(raw.tobytes())


def tensor(name: str, change: Callable[[Numbers], Numbers | None]) -> Callable[[Path], None]:
    """One tensor of the bundle's weights, changed in place or anew."""

    def apply(folder: Path) -> None:
        place = stored_tensors(folder)[name]
        numbers = read_array(place).astype(np.float32)
        changed = change(numbers)
        _write(place, numbers if changed is None else changed)

    return apply


def row(index: int, factor: float) -> Callable[[Numbers], None]:
    def change(numbers: Numbers) -> None:
        numbers[index] *= factor

    return change


def layers_exchanged(folder: Path) -> None:
    places = stored_tensors(folder)
    for name in [name for name in places if ".blocks.2." in name]:
        first, second = places[name], places[name.replace(".blocks.2.", ".blocks.3.")]
        numbers = read_array(first).copy(), read_array(second).copy()
        _write(first, numbers[1])
        _write(second, numbers[0])


def truncated_to_bfloat16(folder: Path) -> None:
    for place in stored_tensors(folder).values():
        numbers = np.ascontiguousarray(read_array(place), dtype=np.float32)
        _write(place, (numbers.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))


def shard_of_another_seed(folder: Path) -> None:
    """The second shard holds other random numbers under the same names."""
    rng = np.random.default_rng(1)
    for place in stored_tensors(folder).values():
        if place.file.name.startswith("model-00002"):
            numbers = read_array(place)
            _write(place, numbers.ravel()[rng.permutation(numbers.size)].reshape(numbers.shape))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda raw: raw.update(changes))


def eyes(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda raw: raw["vision_config"].update(changes))


def manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "manifest.json", change)


def setting(section: str, **changes: Any) -> Callable[[Path], None]:
    def change(raw: dict[str, Any]) -> None:
        assert changes.keys() <= raw[section].keys()
        raw[section].update(changes)

    return manifest(change)


def cache_setting(**changes: Any) -> Callable[[Path], None]:
    return manifest(lambda raw: raw["merge"]["cache"].update(changes))


def without_stage(raw: dict[str, Any]) -> None:
    del raw["stages"]["back"]


def renamed_output(raw: dict[str, Any]) -> None:
    raw["stages"]["back"]["outputs"][1]["name"] = "certainty"


def exchanged(first: str, second: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = (folder / first).read_bytes()
        shutil.copyfile(folder / second, folder / first)
        (folder / second).write_bytes(held)

    return apply


def flipped_bit(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (folder / name).write_bytes(raw)

    return apply


def cut_short(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-64])  # type: ignore[func-returns-value]


def _fault(kind: Kind, name: str, place: str, apply: Callable[[Path], None], **rest: Any) -> Fault:
    options = rest.pop("options", UNCACHED)
    return Fault(name, kind, place, apply, options=options if rest.get("reason") else (*options, *FEWER), **rest)


def _weights(name: str, place: str, apply: Callable[[Path], None], **rest: Any) -> Fault:
    return _fault("weights", name, place, apply, **rest)


def _config(name: str, place: str, apply: Callable[[Path], None], **rest: Any) -> Fault:
    return _fault("config", name, f"config.json, {place}", apply, **{"caught_by": None, **rest})


def _manifest(name: str, place: str, apply: Callable[[Path], None], **rest: Any) -> Fault:
    return _fault("manifest", name, f"manifest.json, {place}", apply, **{"caught_by": None, **rest})


def _files(name: str, place: str, apply: Callable[[Path], None], **rest: Any) -> Fault:
    return _fault("files", name, place, apply, caught_by="opening", **rest)


_SAME_FILE = "the oracle can but read the bundle's own files, and the report says so"
_SETTING = "it is a setting of a run, which both sides follow; --model's files say nothing of it"

NEWLINE, POSITIONS = "model.image_newline", f"{TOWER}.embeddings.position_embedding.weight"
WTE, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"

FAULTS: list[Fault] = [
    _weights("times 1.1", "layer 2 v_proj", tensor(BLOCK.format(2, "v_proj"), lambda x: x * 1.1), review=True),
    _weights("times 2", "layer 0 ff_out", tensor(BLOCK.format(0, "ff_out"), lambda x: x * 2), review=True),
    _weights("negated", "layer 1 q_proj", tensor(BLOCK.format(1, "q_proj"), lambda x: -x), options=CACHED),
    _weights("transposed", "layer 3 attn_out", tensor(BLOCK.format(3, "attn_out"), lambda x: x.T.copy())),
    _weights("one number 1 % off", "final norm", tensor("model.transformer.ln_f.weight", row(5, 1.01))),
    _weights("rows reversed", "head", tensor(HEAD, lambda x: x[::-1].copy()), review=True),
    _weights("times 1.1", "head", tensor(HEAD, lambda x: x * 1.1), review=True),
    _weights("one row times 2", "head", tensor(HEAD, row(100, 2.0))),
    _weights("one row NaN", "head", tensor(HEAD, row(100, np.nan))),
    _weights("the mask token's row times 1.1", "embedding table", tensor(WTE, row(258, 1.1))),
    _weights("row of a token in no sample negated", "embedding table", tensor(WTE, row(3, -1.0)), review=True),
    _weights("row of a token in no sample NaN", "embedding table", tensor(WTE, row(0, np.nan))),
    _weights("layers 2 and 3 exchanged", "decoder", layers_exchanged),
    _weights("truncated to bfloat16", "all tensors", truncated_to_bfloat16),
    _weights("of another model", "second shard", shard_of_another_seed),
    _weights("zeroed", "newline", tensor(NEWLINE, lambda x: x * 0), review=True),
    _weights("one row zeroed", "position embedding", tensor(POSITIONS, row(24, 0.0)), review=True),
    _weights(
        "times 1.1", "tower layer 1", tensor(f"{TOWER}.encoder.layers.1.mlp.fc2.weight", lambda x: x * 1.1), review=True
    ),
    _weights("bias zeroed", "projector", tensor("model.mm_projector.2.bias", lambda x: x * 0)),
    _weights(
        "negated",
        "layer 5 v_proj of the bundled model",
        tensor(BLOCK.format(5, "v_proj"), lambda x: -x),
        subject="bundled",
    ),
    _weights(
        "negated, checkpoint gone",
        "layer 2 v_proj",
        tensor(BLOCK.format(2, "v_proj"), lambda x: -x),
        oracle="own",
        review=True,
        reason=_SAME_FILE,
    ),
    _weights(
        "rows reversed, checkpoint gone",
        "head",
        tensor(HEAD, lambda x: x[::-1].copy()),
        oracle="own",
        review=True,
        reason=_SAME_FILE,
    ),
    _weights("negated, no --model", "layer 2 v_proj", tensor(BLOCK.format(2, "v_proj"), lambda x: -x), oracle="noted"),
    _weights("rows reversed, no --model", "head", tensor(HEAD, lambda x: x[::-1].copy()), oracle="noted"),
    _config("another token, no --model", "mask_token_id", config(mask_token_id=256), oracle="noted"),
    _config("fewer, no --model", "image_grid_pinpoints", config(image_grid_pinpoints=[[28, 56]]), oracle="noted"),
    _config("11000, checkpoint gone", "rope_theta", config(rope_theta=11000.0), oracle="own", review=True),
    _config("11000", "rope_theta", config(rope_theta=11000.0)),
    _config("1e-2, checkpoint gone", "rms_norm_eps", config(rms_norm_eps=1e-2), oracle="own"),
    _config("8 for 4, checkpoint gone", "n_heads", config(n_heads=8), oracle="own"),
    _config("4 for 2, checkpoint gone", "n_kv_heads", config(n_kv_heads=4), oracle="own"),
    _config("1e-2, checkpoint gone", "vision layer_norm_eps", eyes(layer_norm_eps=1e-2), oracle="own"),
    _config("4 for 2, checkpoint gone", "vision num_attention_heads", eyes(num_attention_heads=4), oracle="own"),
    _config("another token", "mask_token_id", config(mask_token_id=256), review=True),
    _config("fewer", "image_grid_pinpoints", config(image_grid_pinpoints=[[28, 56]]), review=True),
    _config(
        "another token, checkpoint gone",
        "mask_token_id",
        config(mask_token_id=256),
        oracle="own",
        review=True,
        reason=_SAME_FILE,
    ),
    _config(
        "fewer, checkpoint gone",
        "image_grid_pinpoints",
        config(image_grid_pinpoints=[[28, 56]]),
        oracle="own",
        review=True,
        reason=_SAME_FILE,
    ),
    _manifest("2 for 1", "merge.layer", setting("merge", layer=2), review=True),
    _manifest("mean for sum", "merge.aggregate", setting("merge", aggregate="mean"), review=True),
    _manifest("fastv for decider", "merge.select", setting("merge", select="fastv"), review=True),
    _manifest("original for compact", "merge.positions", setting("merge", positions="original")),
    _manifest(
        "false for true", "merge.cache.restore_norm", cache_setting(restore_norm=False), options=CACHED, review=True
    ),
    _manifest("false for true", "merge.cache.text_targets", cache_setting(text_targets=False), options=CACHED),
    _manifest("a ratio of 0.5 for 0.7", "merge.ratio", setting("merge", ratio=0.5), reason=_SETTING),
    _manifest("8 for 1", "merge.keep_multiple", setting("merge", keep_multiple=8), review=True, reason=_SETTING),
    _manifest("4 tokens for 8", "generation.gen_length", setting("generation", gen_length=4), caught_by="opening"),
    _manifest(
        "false for true",
        "prompt.drop_token_after_image",
        setting("prompt", drop_token_after_image=False),
        review=True,
        reason=_SETTING,
    ),
    _manifest(
        "fp16 for fp32",
        "precision",
        manifest(lambda raw: raw.update(precision="fp16")),
        reason="graphs more exact than the manifest says are held to what it says",
    ),
    _manifest("200 for 262", "model.vocab_rows", setting("model", vocab_rows=200)),
    _manifest("of the stage back is missing", "stages", manifest(without_stage)),
    _manifest("an output has another name", "stages.back", manifest(renamed_output)),
    _files(
        "a bit flipped, hash as it was", "first shard", flipped_bit("model-00001-of-00002.safetensors"), signed=False
    ),
    _files("a bit flipped, hash as it was", "standard merge", flipped_bit("merge.onnx"), signed=False),
    _files("a bit flipped, hash as it was", "tuned back", flipped_bit("cpu/fp32/back.onnx"), signed=False),
    _files("cut short, hash as it was", "second shard", cut_short("model-00002-of-00002.safetensors"), signed=False),
    _files(
        "exchanged, hashes mended",
        "the two shards",
        exchanged("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    ),
    _files(
        "of two loops exchanged, hashes mended",
        "tuned back",
        exchanged("cpu/fp32/back.onnx", "cpu/fp32/cached_back.onnx"),
    ),
    _files("removed, hashes mended", "standard merge", lambda folder: (folder / "merge.onnx").unlink()),
]
