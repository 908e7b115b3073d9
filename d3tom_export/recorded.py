"""Recorded runs of the released behaviour (format: golden/README.md), as cases for ``validate --case``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d3tom_export.checkpoint import read_header
from d3tom_export.config import GenerationConfig, MergeConfig, MergeSchedule, remasking_mode
from d3tom_export.errors import D3tomError, listing
from d3tom_export.trust.documents import read_json

CASE_FILE = "case.json"
TRACE_FILE = "trace.safetensors"

_REQUIRED = ("gen_length", "block_length", "merge_layer", "merge_ratio", "adaptive", "kv_cache", "remasking")


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


def load_recorded_run(folder: Path, n_layers: int | None = None) -> RecordedRun:
    """Read a recorded run. ``n_layers`` tells which merge layers mean "no merging" (the recorder wrote 99)."""
    if not folder.is_dir():
        raise D3tomError(f"{folder} is not a folder. --case takes the folder of a recorded run, with {CASE_FILE}.")
    from safetensors.numpy import load_file

    case = read_json(folder / CASE_FILE)
    missing = [name for name in _REQUIRED if name not in case]
    if missing:
        raise D3tomError(f"{folder / CASE_FILE} lacks {listing(missing)}. A recorded run names all of its settings.")
    read_header(folder / TRACE_FILE)  # names a missing or truncated file in our own words
    trace = load_file(folder / TRACE_FILE)
    absent = [
        name for name in ("inputs_embeds", "visual_token_mask", "tokens", "logits", "transfer") if name not in trace
    ]
    if absent:
        raise D3tomError(f"{folder / TRACE_FILE} lacks {listing(absent)}. Record the run again.")

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
    if odd:
        raise D3tomError(
            f"{folder / TRACE_FILE} does not fit {CASE_FILE}: {'; '.join(odd)}. Record the run again, or correct its "
            "lengths."
        )
    visual_positions = np.flatnonzero(trace["visual_token_mask"][0])
    merges = sorted(int(name.split(".")[1]) for name in trace if name.startswith("merge.") and name.endswith(".keep"))
    if merges != list(range(len(merges))):
        raise D3tomError(f"{folder / TRACE_FILE} numbers its merges {merges}, expected 0, 1, … without a gap.")
    layer = case["merge_layer"]
    if type(layer) is not int:
        raise D3tomError(f"{folder / CASE_FILE} has merge_layer {layer!r}, expected an integer.")
    merges_at_all = layer < (n_layers if n_layers is not None else 99)
    schedule: MergeSchedule = "adaptive" if case["adaptive"] else "fixed"
    return RecordedRun(
        folder=folder,
        name=str(case.get("name", folder.name)),
        prompt_embeddings=trace["inputs_embeds"].astype(np.float32),
        visual_positions=visual_positions,
        generation=GenerationConfig(
            gen_length=case["gen_length"],
            block_length=case["block_length"],
            step_ratio=case.get("step_ratio"),
            schedule=case.get("schedule") or "none",
            shift=case.get("shift", 3.0),
            remasking=remasking_mode(case["remasking"]),
            temperature=case.get("temperature", 0.0),
        ),
        merge=MergeConfig(
            layer=layer if merges_at_all else 0,
            ratio=case["merge_ratio"],
            schedule=schedule if merges_at_all else "none",
        ),
        kv_cache=bool(case["kv_cache"]),
        tokens=trace["tokens"].astype(np.int64),
        transfer=trace["transfer"],
        logits=trace["logits"],
        kept=[
            np.flatnonzero(trace[f"merge.{index}.keep"][: len(trace["visual_token_mask"][0])][visual_positions])
            for index in merges
        ],
        trace=trace,
    )
