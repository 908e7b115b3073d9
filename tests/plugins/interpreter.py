"""The merge kernels on the CPU: Triton's interpreter in a process of its own.

``TRITON_INTERPRET`` must be set before Triton is first imported, and where it is, nothing can be compiled. So the
interpreter lives in one worker process, and the tests here, which also compile, send it their cases as NumPy arrays.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from d3tom_export.plugins import launch
from d3tom_export.plugins.launch import MergeSizes, launches, row_names, spec

Interpret = Callable[..., Any]


class Interpreted(NamedTuple):
    """What the kernels wrote; merged widened to float32."""

    merged: np.ndarray
    order: np.ndarray
    starts: np.ndarray
    further: tuple[np.ndarray, ...] = ()
    """Of the row inputs after the first."""


@contextmanager
def interpreter() -> Iterator[Interpret]:
    """A callable that runs a function of this module in the worker and returns its result."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    context = multiprocessing.get_context("spawn")
    try:
        pool = ProcessPoolExecutor(1, mp_context=context)
        pool.submit(_one_thread).result()  # the worker takes over the environment as it starts
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    with pool:
        yield lambda function, *arguments, **options: pool.submit(function, *arguments, **options).result()


def _one_thread() -> None:
    torch.set_num_threads(1)


def _constants(variant: launch.Variant) -> dict[str, int]:
    constants = dict(spec(variant).constants)
    if "WIDEN" in constants and variant.dtype == "bfloat16":
        constants["WIDEN"] = 1  # the interpreter's dot takes bfloat16 for integers
    return constants


def merge(
    hidden: np.ndarray, normed: np.ndarray, kept: np.ndarray, dtype: str, wide: bool = False, *further: np.ndarray
) -> Interpreted:
    """One merge of float32 arrays, rounded to ``dtype`` first, by the launch plan; ``wide`` forces the large tiles."""
    from d3tom_export.plugins import kernels

    widths = tuple(rows.shape[2] for rows in further)
    sizes = MergeSizes(*normed.shape[:2], kept.shape[1], normed.shape[2], hidden.shape[2], widths)
    before = launch.WIDE_PROGRAMS
    launch.WIDE_PROGRAMS = 0 if wide else before
    plan = launches.__wrapped__(sizes, dtype)
    launch.WIDE_PROGRAMS = before
    rows = getattr(torch, dtype)
    batch, visual, keep, *_ = sizes
    poison = 7  # every entry must be written: none is left as it was
    blocks = plan[0].grid[1]
    buffers = {
        "normed": torch.from_numpy(normed).to(rows),
        "kept": torch.from_numpy(kept),
        "scores": torch.full((batch, blocks, visual), torch.nan),
        "slots": torch.full((batch, blocks, visual), poison, dtype=torch.int32),
        "order": torch.full((batch, visual), -poison, dtype=torch.int32),
        "starts": torch.full((batch, keep), -poison, dtype=torch.int32),
    }
    names = row_names(1 + len(further))
    for (name, result), array in zip(names, (hidden, *further), strict=True):
        buffers[name] = torch.from_numpy(array).to(rows)
        buffers[result] = torch.full((batch, keep, array.shape[2]), torch.nan, dtype=rows)
    for step in plan:
        arguments = [buffers[each] if isinstance(each, str) else each for each in step.arguments]
        getattr(kernels, spec(step.variant).function)[step.grid](*arguments, **_constants(step.variant))
    first, *others = (buffers[result].float().numpy() for _, result in names)
    return Interpreted(first, buffers["order"].numpy(), buffers["starts"].numpy(), tuple(others))


class Step(NamedTuple):
    """One kernel of a chain of plugins: named buffers around the sizes, and what it creates."""

    variant: launch.Variant
    grid: tuple[int, int, int]
    inputs: tuple[str, ...]
    sizes: tuple[int, ...]
    outputs: dict[str, tuple[tuple[int, ...], str]]
    """Shape and type of each."""


def chain(
    steps: list[Step], hidden: np.ndarray, normed: np.ndarray, kept: np.ndarray, dtype: str, *further: np.ndarray
) -> list[np.ndarray]:
    """``steps`` one after another on float32 arrays rounded to ``dtype``: what is merged, as float32."""
    from d3tom_export.plugins import kernels

    rows = getattr(torch, dtype)
    names = row_names(1 + len(further))
    buffers = {"normed": torch.from_numpy(normed).to(rows), "kept": torch.from_numpy(kept)}
    for (name, _), array in zip(names, (hidden, *further), strict=True):
        buffers[name] = torch.from_numpy(array).to(rows)
    for step in steps:
        for name, (shape, kind) in step.outputs.items():
            buffers[name] = torch.full(shape, -9, dtype=getattr(torch, kind))
        arguments = [buffers[name] for name in step.inputs] + list(step.sizes)
        arguments += [buffers[name] for name in step.outputs]
        getattr(kernels, spec(step.variant).function)[step.grid](*arguments, **_constants(step.variant))
    return [buffers[result].float().numpy() for _, result in names]


def run_launch(
    variant: launch.Variant,
    grid: tuple[int, ...],
    sizes: list[int],
    addresses: list[int],
    regions: list[np.ndarray],
) -> None:
    """Run one kernel on this process's memory: its buffers lie at ``addresses``, each within one of ``regions``."""
    from d3tom_export.plugins import kernels

    plan = spec(variant)
    rows = getattr(torch, variant.dtype or "float32")
    types = {"hidden": rows, "normed": rows, "merged": rows, "kept": torch.int64, "scores": torch.float32}
    buffers = iter(addresses)
    numbers = iter(sizes)
    values = [
        next(numbers) if name in plan.sizes else _tensor(next(buffers), types.get(name, torch.int32), regions)
        for name in plan.arguments
    ]
    getattr(kernels, plan.function)[grid](*values, **_constants(variant))


def _tensor(address: int, dtype: torch.dtype, regions: list[np.ndarray]) -> torch.Tensor:
    """The memory from ``address`` to the end of the region that holds it."""
    for region in regions:
        start, size = region.ctypes.data, region.nbytes
        if start <= address < start + size:
            left = start + size - address
            held = torch.frombuffer((ctypes.c_char * left).from_address(address), dtype=torch.uint8)
            return held[: left // dtype.itemsize * dtype.itemsize].view(dtype)
    raise AssertionError(f"{address:#x} lies in no buffer")
