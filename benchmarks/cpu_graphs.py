"""What each rewrite of the graphs for the CPU gains, stage by stage, at LaViDa's proportions in small.

    python -m benchmarks.cpu_graphs [--repeats N] [--json FILE]

From left to right each column has one rewrite more, in the order in which `build` applies them: the standard graph,
TopK selection, merge sums in sorted blocks, fused norms, fused rotary embedding, fused attention. Then the products:
float32 by the weights as stored (this is cpu/fp32), or int8 (cpu/int8). Last these two where merges are the compiled
library's. The variants of a stage take turns.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from benchmarks.library import merge_library
from benchmarks.loops import machine
from benchmarks.proportions import LAVIDA, SMALL, Proportions, build
from d3tom_export.backends.onnxruntime_stage import session_options
from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.bundle.manifest import stage_file
from d3tom_export.config import LOOPS
from d3tom_export.cpu.fuse import fuse_attention, fuse_norms, fuse_products, fuse_rotary
from d3tom_export.cpu.int8 import quantize_products
from d3tom_export.cpu.merge import inline_merges, select_by_topk
from d3tom_export.cpu.place import CPU_PRECISIONS
from d3tom_export.cpu.tune import OPSET, UNTUNED, has_cache_merges, tune
from d3tom_export.merging.schedule import kept_tokens
from d3tom_export.plugins.cpu_library import give_kernel
from d3tom_export.process import claim
from d3tom_export.stages.contract import StageSpec
from d3tom_export.stages.edit import MICROSOFT, drop_unused

STANDARD, LIBRARY = "standard", "library"


def rewrites(bundle: Bundle) -> dict[str, Callable[[ir.Model], int]]:
    """Each rewrite by name, in order."""
    return {
        "selection": select_by_topk,
        "merge sums": inline_merges,
        "norms": fuse_norms,
        "rotary": fuse_rotary,
        "attention": lambda model: fuse_attention(model, bundle.config.language),
    }


PRODUCTS = {"products": fuse_products, "int8": quantize_products}
"""The last rewrite: one or the other."""


def columns(bundle: Bundle) -> list[str]:
    """Of :func:`table`."""
    return [STANDARD, *rewrites(bundle), *PRODUCTS, *(f"{precision}, {LIBRARY}" for precision in CPU_PRECISIONS)]


def variants(bundle: Bundle, key: str) -> dict[str, ort.InferenceSession]:
    """The stage's graph after each rewrite that finds something in it."""
    model = ir.load(bundle.folder / stage_file(key))
    sessions = {STANDARD: _session(model, bundle)}
    model.graph.opset_imports[""], model.graph.opset_imports[MICROSOFT] = OPSET, 1
    for name, rewrite in rewrites(bundle).items():
        if rewrite(model):
            drop_unused(model)
            sessions[name] = _session(model, bundle)
    for name, rewrite in PRODUCTS.items():
        last = ir.from_proto(ir.to_proto(model))
        assert isinstance(last, ir.Model)
        if rewrite(last):
            drop_unused(last)
            sessions[name] = _session(last, bundle)
    spec, merge = bundle.manifest.stages[key], bundle.manifest.merge
    if has_cache_merges(spec, merge):
        path = bundle.folder / stage_file(key)
        for precision in CPU_PRECISIONS:
            last = tune(path, spec, bundle.config.language, merge, precision, for_library=True)
            sessions[f"{precision}, {LIBRARY}"] = _session(last, bundle, merge_library())
    return sessions


def _session(model: ir.Model, bundle: Bundle, library: Path | None = None) -> ort.InferenceSession:
    content, options = ir.to_proto(model).SerializeToString(), session_options("cpu", bundle.folder)
    if library is not None:
        give_kernel(options, library)
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def stage_inputs(spec: StageSpec, sizes: Proportions) -> dict[str, ort.OrtValue]:
    """Random inputs of a step that keeps what an adaptive answer keeps on average."""
    keep, visual, text = kept_tokens(sizes.visual_tokens, sizes.merge.ratio), sizes.visual_tokens, sizes.text_tokens
    answer = sizes.generation.gen_length
    lengths = {"B": 1, "G": answer, "V": visual, "K": keep, "P": text + visual, "C": text + keep}
    lengths |= {"L": text + visual + answer, "M": text + keep + answer}
    rng = np.random.default_rng(0)
    given = {
        "visual_positions": np.arange(text // 2, text // 2 + visual),
        "keep": np.array([keep]),
        "answer_length": np.array([answer]),
    }
    inputs = {}
    for tensor in spec.inputs:
        shape = [axis if isinstance(axis, int) else lengths[axis] for axis in tensor.axes]
        value = rng.random(shape) < 0.1 if tensor.dtype == "bool" else rng.normal(size=shape).astype(np.float32)
        inputs[tensor.name] = ort.OrtValue.ortvalue_from_numpy(given.get(tensor.name, value))
    return inputs


def bound(session: ort.InferenceSession, spec: StageSpec, inputs: Mapping[str, ort.OrtValue]) -> ort.IOBinding:
    """``session`` ready to run on ``inputs`` as the loop runs it: without logits."""
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    for output in spec.outputs:
        if output.name != "logits":
            binding.bind_output(output.name, "cpu")
    return binding


def measure(bundle: Bundle, sizes: Proportions, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds by stage and rewrite."""
    found: dict[str, dict[str, float]] = {}
    for key, spec in bundle.manifest.stages.items():
        if spec.name in UNTUNED:
            continue
        click.echo(key, err=True)
        inputs = stage_inputs(spec, sizes)
        bindings = {}
        for name, session in variants(bundle, key).items():
            binding = bound(session, spec, inputs)
            session.run_with_iobinding(binding)
            bindings[name] = (session, binding)
        times: dict[str, list[float]] = {name: [] for name in bindings}
        for _ in range(repeats):
            for name, (session, binding) in bindings.items():
                start = time.perf_counter()
                session.run_with_iobinding(binding)
                times[name].append(1000 * (time.perf_counter() - start))
        found[key] = {name: statistics.median(taken) for name, taken in times.items()}
    return found


def table(found: Mapping[str, Mapping[str, float]], names: list[str]) -> str:
    """The medians in Markdown; where a rewrite finds nothing in a stage the cell is empty."""
    lines = [f"| stage, ms | {' | '.join(names)} |", "| --- " * (1 + len(names)) + "|"]
    for key, times in found.items():
        lines.append(f"| `{key}` | " + " | ".join(f"{times[n]:.1f}" if n in times else "" for n in names) + " |")
    return "\n".join(lines)


@click.command()
@click.option("--repeats", type=click.IntRange(min=1), default=15, show_default=True, help="Runs of each variant.")
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that all of it runs, not how fast.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the medians as JSON.")
def main(repeats: int, quick: bool, json_file: Path | None) -> None:
    """Measure and print a Markdown table."""
    sizes = SMALL if quick else LAVIDA
    with tempfile.TemporaryDirectory() as scratch:
        bundle = load_bundle(build(Path(scratch), sizes.merge, sizes.generation, LOOPS, sizes.config))
        found = measure(bundle, sizes, repeats)
        names = columns(bundle)
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": machine(), "ms": found}, indent=2) + "\n", encoding="utf-8")
    click.echo(table(found, names))


if __name__ == "__main__":
    claim()
    main()
