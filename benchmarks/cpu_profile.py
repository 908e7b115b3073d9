"""Where a step's time goes on ONNX Runtime's CPU: the share of each kind of node, stage by stage.

    python -m benchmarks.cpu_profile [--repeats N] [--json FILE]

LaViDa's proportions in small, in float32 and int8, by ONNX Runtime's own profiler. It takes time itself, a few
microseconds a node: shares count, and milliseconds are those of the nodes added up.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import click
import onnxruntime as ort

from benchmarks.cpu_graphs import bound, stage_inputs
from benchmarks.loops import machine
from benchmarks.proportions import LAVIDA, SMALL, Proportions, build
from d3tom_export.backends.onnxruntime_stage import session_options
from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.config import LOOPS
from d3tom_export.cpu.place import CPU_PRECISIONS, tuned_graph
from d3tom_export.cpu.tune import UNTUNED
from d3tom_export.process import claim

KINDS = {
    "products": ("MatMul", "FusedMatMul", "MatMulIntegerToFloat"),
    "attention": ("Attention",),
    "quantising rows": ("Abs", "ReduceMax", "QuantizeLinear"),
    "moving rows": ("Gather", "GatherND", "GatherElements", "Transpose", "Concat", "Slice", "Pad", "Reshape"),
}
"""Kinds of work by operator; what is in none is "other". Products are those with weights, and at l* and in the merge
those of scores, similarities and sums."""


def node_times(
    bundle: Bundle, key: str, precision: str, sizes: Proportions, repeats: int, scratch: Path
) -> Counter[str]:
    """Milliseconds of one call by operator."""
    options = session_options("cpu", bundle.folder)
    options.enable_profiling = True
    options.profile_file_prefix = str(scratch / f"{precision}-{key}")
    content = tuned_graph(bundle.folder, precision, key).read_bytes()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    spec = bundle.manifest.stages[key]
    binding = bound(session, spec, stage_inputs(spec, sizes))
    for _ in range(repeats):
        session.run_with_iobinding(binding)
    times: Counter[str] = Counter()
    for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["args"]["op_name"]] += event["dur"] / 1000 / repeats
    return times


def by_kind(times: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds by kind of work, "other" last."""
    found = {kind: sum(times.get(name, 0.0) for name in names) for kind, names in KINDS.items()}
    return found | {"other": sum(times.values()) - sum(found.values())}


@click.command()
@click.option("--repeats", type=click.IntRange(min=1), default=10, show_default=True, help="Calls of each stage.")
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that all of it runs, not how fast.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write milliseconds by operator as JSON.")
def main(repeats: int, quick: bool, json_file: Path | None) -> None:
    """Measure and print a Markdown table."""
    sizes = SMALL if quick else LAVIDA
    found: dict[str, dict[str, Counter[str]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        bundle = load_bundle(build(Path(scratch), sizes.merge, sizes.generation, LOOPS, sizes.config))
        for precision in CPU_PRECISIONS:
            for key, spec in bundle.manifest.stages.items():
                if spec.name not in UNTUNED:
                    times = node_times(bundle, key, precision, sizes, repeats, Path(scratch))
                    found.setdefault(precision, {})[key] = times
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": machine(), "ms": found}, indent=2) + "\n", encoding="utf-8")
    click.echo(f"| | stage | ms | {' | '.join([*KINDS, 'other'])} |\n" + "| --- " * (len(KINDS) + 4) + "|")
    for precision, stages in found.items():
        for key, times in stages.items():
            total = sum(times.values())
            shares = " | ".join(f"{part / total:.0%}" for part in by_kind(times).values())
            click.echo(f"| {precision} | `{key}` | {total:.1f} | {shares} |")


if __name__ == "__main__":
    claim()
    main()
