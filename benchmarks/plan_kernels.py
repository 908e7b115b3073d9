"""Kernels of TensorRT-RTX's plans, by stage and per layer: `python -m benchmarks.plan_kernels BUNDLE [BUNDLE ...]`.

A plan of TensorRT-RTX holds its program as readable text, one for each optimization profile. A launch in it is a matrix
product (`fully_connected`), one with neighbours fused in (`runtime_fusion`), a generated or library kernel (`function`)
or a plugin (`custom_layer`). "A layer" is the span between two neighbouring kernels of a kind of which each layer has
one: its attention's, or where that is not one kernel its second norm's; the median of those spans.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median_low

_TEXT = re.compile(rb"[\t\x20-\x7e]{4,}")
_LAUNCH = re.compile(r"^ +(fully_connected|runtime_fusion|function|custom_layer)=\{ name=\"?([^\s\"]+)")
_ACCUMULATION = re.compile(r"^ +fully_connected=.* accumulation_type=(\d)")
_MOVES = re.compile(r"^__myl_(?:Tran|Move|Repl|Conc|Resh|Slic)+$")
FLASH = "_gemm_mha"
"""In the names of attention kernels that hold no probabilities."""
_NORM = re.compile(r"^__myl_\w*MeanAddSqrt")


@dataclass(frozen=True)
class Program:
    """What one optimization profile of a plan launches."""

    launches: tuple[str, ...]
    """Names of its kernels in order."""
    custom_layers: int

    @property
    def flash(self) -> int:
        """Fused attention kernels."""
        return sum(FLASH in name for name in self.launches)

    @property
    def moves(self) -> tuple[str, ...]:
        """Kernels that compute nothing and only move data."""
        return tuple(name for name in self.launches if _MOVES.match(name))

    @property
    def per_layer(self) -> int | None:
        """Kernels of a middle layer; None where there are not two layers."""
        at = [index for index, name in enumerate(self.launches) if FLASH in name]
        if len(at) < 2:  # two norms a layer
            at = [index for index, name in enumerate(self.launches) if _NORM.match(name)][1::2]
        spans = [after - before for before, after in pairwise(at)]
        return median_low(spans) if spans else None


def programs(plan: bytes) -> list[Program]:
    """The programs in ``plan``, one for each optimization profile; none where it holds no text."""
    found: list[Program] = []
    launches: list[tuple[str, str]] | None = None
    for piece in _TEXT.findall(plan):
        line = piece.decode("ascii")
        if line.startswith("main {"):
            launches = []
        elif line.startswith(("shape_main {", "header {")):
            # What is fused around a product is compiled from a program of its own, which has no shapes to compute.
            if launches and line.startswith("shape_main {"):
                custom = sum(kind == "custom_layer" for kind, _ in launches)
                found.append(Program(tuple(name for _, name in launches), custom))
            launches = None
        elif launches is not None and (match := _LAUNCH.match(line)):
            launches.append((match[1], match[2]))
    return found


def accumulations(plan: bytes) -> Counter[int]:
    """How many products of ``plan`` have which `accumulation_type`: 2 is float32 over fp16, 0 the operands' own."""
    lines = (piece.decode("ascii") for piece in _TEXT.findall(plan))
    return Counter(int(match[1]) for line in lines if (match := _ACCUMULATION.match(line)))


def table(bundle: Path) -> list[str]:
    """A row for each program of each of the bundle's plans, in Markdown."""
    rows = ["| stage | profile | kernels | a layer | fused attention | plugins | only move data | float32 sums |"]
    rows.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for path in sorted(bundle.glob("engines/*/*.plan")):
        plan = path.read_bytes()
        sums = accumulations(plan)
        found = programs(plan)
        for index, program in enumerate(found):
            profile = ("step", "prompt")[index] if len(found) == 2 else ""
            moves = ", ".join(f"{count} x {name[6:]}" for name, count in Counter(program.moves).items())
            rows.append(
                f"| `{path.stem}` | {profile} | {len(program.launches)} | {program.per_layer or ''} | {program.flash} "
                f"| {program.custom_layers} | {moves} | {sums[2]} of {sums.total()} |"
            )
    return rows


def main(arguments: Sequence[str]) -> None:
    """Print a table for each bundle."""
    for argument in arguments:
        for folder in sorted(Path(argument).glob("engines/*/")):
            print(f"{argument}, {folder.name}:\n")
        print("\n".join(table(Path(argument))), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
