"""Whether TensorRT-RTX's parser takes a bundle's graphs with weights where they lie, and what that costs.

    python -m benchmarks.parse_graphs BUNDLE [--precision bf16]

Parses the graphs that engines are built from, the merge as standard layers, and builds nothing.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click

from d3tom_export.bundle.folder import load_bundle
from d3tom_export.bundle.manifest import stage_file
from d3tom_export.engines.graph import engine_graph
from d3tom_export.engines.log import log_of
from d3tom_export.engines.record import PRECISIONS
from d3tom_export.engines.toolkit import load_toolkit
from d3tom_export.export.preflight import GIB
from d3tom_export.process import peak_memory


@click.command()
@click.argument("folder", metavar="BUNDLE", type=click.Path(path_type=Path, exists=True))
@click.option("--precision", type=click.Choice(PRECISIONS), default="bf16", show_default=True)
def main(folder: Path, precision: str) -> None:
    """Parse every stage and print what came of it."""
    bundle, trt = load_bundle(folder), load_toolkit("tensorrt-rtx").trt
    before = peak_memory()
    for key, spec in bundle.manifest.stages.items():
        graph = engine_graph(folder / stage_file(key), spec, precision, "onnx")  # type: ignore[arg-type]
        # External data are looked for beside the graph.
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".onnx") as file:
            file.write(graph.model)
            file.flush()
            started = time.perf_counter()
            network = trt.Builder(log_of(trt).logger).create_network(0)
            parser = trt.OnnxParser(network, log_of(trt).logger)
            if not parser.parse_from_file(file.name):
                raise click.ClickException(f"{key}: {[parser.get_error(i).desc() for i in range(parser.num_errors)]}")
            click.echo(f"{key}: {network.num_layers} layers in {time.perf_counter() - started:.2f} s")
    after = peak_memory()
    if before is not None and after is not None:
        click.echo(f"peak memory {after / GIB:.2f} GiB, {before / GIB:.2f} GiB of it before parsing")


if __name__ == "__main__":
    main()
