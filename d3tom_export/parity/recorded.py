"""Recorded runs of the released behaviour (format: golden/README.md), as cases for ``validate --case``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from d3tom_export.config import GenerationConfig, MergeConfig, MergeSchedule, remasking_mode
from d3tom_export.errors import D3tomError, listing, printable
from d3tom_export.families.registry import FAMILIES, RELEASED
from d3tom_export.trust.documents import read_json
from d3tom_export.trust.fields import shown
from d3tom_export.trust.files import find_inside
from d3tom_export.trust.tensors import check_unchanged, read_header

CASE_FILE = "case.json"
TRACE_FILE = "trace.safetensors"
VISION_FILE = "vision.safetensors"

_MODEL_KEYS = ("mask_token_id", "suppressed_token_ids")

_REQUIRED = ("gen_length", "block_length", "merge_layer", "merge_ratio", "adaptive", "kv_cache", "remasking")

_FLOATS, _INTEGERS, _TRUTH = ("F32", "F16", "F64"), ("I64", "I32"), ("BOOL",)
_DTYPES = {
    "inputs_embeds": _FLOATS,
    "visual_token_mask": _TRUTH,
    "tokens": _INTEGERS,
    "transfer": _TRUTH,
    "logits": _FLOATS,
}
"""What every trace holds, and as what."""

_KEEP = re.compile(r"merge\.(0|[1-9]\d{0,5})\.keep")

_LARGEST_TRACE = 2 << 30
"""Bytes of a trace, which is read whole. 64 tokens of the 8B model in 32 steps take 1 GB of logits."""


class RecordedPicture(NamedTuple):
    """A picture that a run was asked about, and what the original made of it."""

    path: Path
    prompt_ids: tuple[int, ...]
    """The prompt's ids, with -200 for the picture."""
    pixel_values: NDArray[np.float32]
    """(views, 3, S, S), of the first views."""
    features: NDArray[np.float32]
    """(views, patches, D), projected and not yet pooled, of all of them."""


@dataclass(frozen=True)
class RecordedRun:
    """One recorded run: what was asked and, step by step (S steps), what came out."""

    folder: Path
    name: str
    prompt_embeddings: NDArray[np.float32]
    """(1, P, D)."""
    visual_positions: NDArray[np.int64]
    """(V,), ascending."""
    generation: GenerationConfig
    merge: MergeConfig
    kv_cache: bool
    tokens: NDArray[np.int64]
    """(S, G) after each step."""
    transfer: NDArray[np.bool_]
    """(S, G)."""
    logits: NDArray[np.float32]
    """(S, G, vocabulary)."""
    kept: list[NDArray[np.int64]]
    """Per merge, indices into the visual tokens."""
    trace: dict[str, NDArray[Any]]
    """Everything recorded, by its name in the trace."""
    returned: tuple[int, ...] | None = None
    """What the original returned in the end: up to a stop sequence, with the suffix."""
    picture: RecordedPicture | None = None


def _load_trace(folder: Path) -> dict[str, NDArray[Any]]:
    """Everything in the folder's trace, of the dtypes that the format has."""
    from safetensors.numpy import load_file

    path, source = folder / TRACE_FILE, find_inside(folder, TRACE_FILE)
    stored = read_header(path, source)
    absent = [name for name in _DTYPES if name not in stored]
    if absent:
        raise D3tomError(f"{path} lacks {listing(absent)}. Record the run again.")
    odd = [
        f"{name} of {tensor.dtype}"
        for name, tensor in stored.items()
        if tensor.dtype not in _DTYPES.get(name, (*_FLOATS, *_INTEGERS, *_TRUTH))
    ]
    size = source.stat().st_size
    if odd or size > _LARGEST_TRACE:
        found = listing(odd) if odd else f"{size:,} bytes, at most {_LARGEST_TRACE:,} are read"
        raise D3tomError(f"{path} holds {found}, which is none of the format. Record the run again.")
    check_unchanged(stored.values())
    return load_file(source)


class CaseModel(NamedTuple):
    """What a case says of the model that its folder holds."""

    family: str | None
    """The case's ``backbone``; None: it names none, as those of LaViDa-LLaDA do."""
    config: dict[str, Any]
    """Keys that take the place of the ``config.json``'s: ids that the original has as constants, and the recorder
    changed to fit a small vocabulary."""


def case_model(folder: Path) -> CaseModel:
    """What a recorded run says of its model. Raises :class:`D3tomError` where its family is none that is known."""
    case = _read_case(folder)
    family = case.get("backbone")
    if family is not None and (not isinstance(family, str) or family not in FAMILIES):
        raise D3tomError(
            f"{folder / CASE_FILE} has backbone {shown(family)}, which is no family that this tool knows: expected one "
            f"of {listing(FAMILIES)}."
        )
    changed = {} if family is None else {key: case[key] for key in _MODEL_KEYS if key in case}
    return CaseModel(family, changed)


def _read_case(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise D3tomError(f"{folder} is not a folder. --case takes the folder of a recorded run, with {CASE_FILE}.")
    return read_json(find_inside(folder, CASE_FILE))


def load_recorded_run(folder: Path, n_layers: int | None = None) -> RecordedRun:
    """Read a recorded run. ``n_layers`` tells which merge layers mean "no merging" (the recorder wrote 99)."""
    family, _ = case_model(folder)
    own = (RELEASED if family is None else FAMILIES[family]).generation
    case = _read_case(folder)
    missing = [name for name in _REQUIRED if name not in case]
    if missing:
        raise D3tomError(f"{folder / CASE_FILE} lacks {listing(missing)}. A recorded run names all of its settings.")
    odd = [
        f"{name} is {shown(case[name])}, expected true or false"
        for name in ("adaptive", "kv_cache")
        if type(case[name]) is not bool
    ]
    if not isinstance(case.get("name", ""), str):
        odd.append(f"name is {shown(case['name'])}, expected text")
    if odd:
        raise D3tomError(f"{folder / CASE_FILE} has {'; '.join(odd)}. Correct it, or record the run again.")
    trace = _load_trace(folder)

    steps, answer = trace["tokens"].shape if trace["tokens"].ndim == 2 else (0, 0)
    shapes = {
        "inputs_embeds": (1, case.get("prompt_length", trace["visual_token_mask"].shape[-1]), None),
        "visual_token_mask": (1, trace["inputs_embeds"].shape[1] if trace["inputs_embeds"].ndim == 3 else -1),
        "tokens": (steps, case["gen_length"]),
        "transfer": (steps, answer),
        "logits": (steps, answer, None),
    }
    odd = [
        f"{name} is {list(trace[name].shape)}"
        for name, shape in shapes.items()
        if len(trace[name].shape) != len(shape)
        or any(want is not None and want != size for want, size in zip(shape, trace[name].shape, strict=True))
    ]
    if not steps or not answer or not trace["inputs_embeds"].size:
        odd.append("there is no step, no prompt or no answer in it")
    if odd:
        raise D3tomError(
            f"{folder / TRACE_FILE} does not fit {CASE_FILE}: {'; '.join(odd)}. Record the run again, or correct its "
            "lengths."
        )
    visual_positions = np.flatnonzero(trace["visual_token_mask"][0])
    merges = sorted(int(found[1]) for found in map(_KEEP.fullmatch, trace) if found)
    if merges != list(range(len(merges))):
        raise D3tomError(f"{folder / TRACE_FILE} numbers its merges {listing(merges)}, expected 0, 1, … without a gap.")
    prompt = trace["visual_token_mask"].shape[1]
    for index in merges:
        keep = trace[f"merge.{index}.keep"]
        if keep.dtype != np.bool_ or keep.ndim != 1 or len(keep) < prompt:
            raise D3tomError(
                f"{folder / TRACE_FILE} has merge.{index}.keep of {keep.dtype} {list(keep.shape)}, expected a mask of "
                f"at least the {prompt} prompt tokens. Record the run again."
            )
    layer = case["merge_layer"]
    if type(layer) is not int or layer < 0:
        raise D3tomError(f"{folder / CASE_FILE} has merge_layer {shown(layer)}, expected an integer.")
    merges_at_all = layer < (n_layers if n_layers is not None else 99)
    schedule: MergeSchedule = "adaptive" if case["adaptive"] else "fixed"
    try:
        ratio = case.get("step_ratio")
        generation = GenerationConfig(
            gen_length=case["gen_length"],
            block_length=case["block_length"],
            steps=case.get("steps_asked", case.get("steps") if ratio is None else None),
            step_ratio=ratio,
            # None is the original's own plan.
            schedule=case.get("schedule") or ("vanilla" if own.schedule == "vanilla" else "none"),
            shift=3.0 if case.get("shift") is None else case["shift"],
            remasking=remasking_mode(case["remasking"]),
            temperature=case.get("temperature", 0.0),
            top_k=case.get("top_k"),
            top_p=case.get("top_p"),
            rank_drawn=own.rank_drawn,
            stop_ids=_sequences(case.get("stop_sequences")),
            suffix_ids=_sequence(case.get("suffix_ids")),
        )
        merge = MergeConfig(
            layer=layer if merges_at_all else 0,
            ratio=case["merge_ratio"],
            schedule=schedule if merges_at_all else "none",
        )
    except D3tomError as error:
        raise D3tomError(
            f"{folder / CASE_FILE} cannot be followed. {error} Correct it, or record the run again."
        ) from None
    return RecordedRun(
        folder=folder,
        name=printable(case.get("name", folder.name), 200),
        prompt_embeddings=trace["inputs_embeds"].astype(np.float32),
        visual_positions=visual_positions,
        generation=generation,
        merge=merge,
        kv_cache=case["kv_cache"],
        tokens=trace["tokens"].astype(np.int64),
        transfer=trace["transfer"],
        logits=trace["logits"],
        kept=[
            np.flatnonzero(trace[f"merge.{index}.keep"][: len(trace["visual_token_mask"][0])][visual_positions])
            for index in merges
        ],
        trace=trace,
        returned=_optional(case.get("returned")),
        picture=_read_picture(folder, case),
    )


def _sequence(ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, (list, type(None))):
        raise D3tomError(f"{shown(ids)} is no list of token ids.")
    return tuple(ids or ())


def _sequences(lists: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(lists, (list, type(None))):
        raise D3tomError(f"{shown(lists)} is no list of lists of token ids.")
    return tuple(map(_sequence, lists or ()))


def _optional(ids: Any) -> tuple[int, ...] | None:
    return None if ids is None else _sequence(ids)


def _read_picture(folder: Path, case: dict[str, Any]) -> RecordedPicture | None:
    """The picture that a case was asked about, and what the original made of it."""
    from safetensors.numpy import load_file

    if case.get("picture") is None:
        return None
    name, ids = case["picture"], case.get("prompt_ids")
    if not isinstance(name, str) or not isinstance(ids, list) or any(type(token) is not int for token in ids):
        raise D3tomError(f"{folder / CASE_FILE} has a picture and no prompt_ids to show it in. Record the run again.")
    path, source = folder / VISION_FILE, find_inside(folder, VISION_FILE)
    stored = read_header(path, source)
    odd = [key for key in ("pixel_values", "features") if key not in stored or stored[key].dtype not in _FLOATS]
    if odd or source.stat().st_size > _LARGEST_TRACE:
        raise D3tomError(f"{path} lacks {listing(odd) or 'nothing, but is too large'}. Record the run again.")
    check_unchanged(stored.values())
    found = load_file(source)
    return RecordedPicture(find_inside(folder, name), tuple(ids), found["pixel_values"], found["features"])
