"""What one enqueue of the merge plugin costs the host, in both forms; no GPU is needed.

    python -m benchmarks.merge_enqueue [--json FILE]

The plugin comes out of TensorRT-RTX's own registry and is called through NVIDIA's C++ interface, Python's binding
included; the driver is a stub whose launches do nothing. Needs g++, TensorRT's headers and Triton, as the tests in
tests/plugins do. At LaViDa's size with a cache: 1120 rows of 4096 numbers onto 700, compared by 128.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click

from d3tom_export.plugins.archive import pack
from d3tom_export.plugins.compiled import compile_kernels
from d3tom_export.plugins.launch import MergeSizes
from tests.plugins import building, harness, walker

ROWS = {"one row input": (), "keys and values": (4096,)}


def measure(folder: Path) -> list[dict[str, object]]:
    """A row for each form and number of row inputs: microseconds, and launches."""
    libraries = building.build(folder)
    rows: list[dict[str, object]] = []
    for form in harness.FORMS:
        for name, further in ROWS.items():
            sizes = MergeSizes(1, 1120, 700, 128, 4096, further)
            archive = pack(compile_kernels("float16", (building.SMS[0],), sizes.depth, *sizes.widths))
            cost = walker.host_cost(libraries, form, archive, sizes, "float16")
            rows.append({"form": form, "node": name, "launches": 3 + len(further), "microseconds": round(cost, 2)})
    return rows


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(json_file: Path | None) -> None:
    """Measure and print a Markdown table; microseconds."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(Path(folder))
    except building.MissingError as missing:
        raise click.ClickException(
            f"This benchmark builds the plugin's library and a stub driver, and {missing}."
        ) from None
    click.echo("| form | node | launches | enqueue, us |\n| --- | --- | --- | --- |")
    for row in rows:
        click.echo("| " + " | ".join(map(str, row.values())) + " |")
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
