"""What a build will need of memory and disk, and whether that is there: known before any work starts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from d3tom_export.config import Loop
from d3tom_export.errors import D3tomError

GIB = 2**30

_EXPORT_MEMORY = 3 * GIB // 2
"""torch, the exporter and the graph of one stage; weights are never loaded. Measured on lavida-8b: 0.74 GiB
(docs/scale.md), and 1.31 GiB where all layers of a stage had to be traced."""

_GRAPH_BYTES_PER_LAYER = 2**20
"""Upper bound of what a layer's nodes take in all of a loop's graphs on disk (lavida-8b: 0.2 MiB)."""

_RUNTIME_MEMORY = 3 * GIB
"""Runtime, activations and caches of the self-check, and weights on their way from the file, beside the weights: on
lavida-2b 1.9 to 2.8 GiB (docs/scale.md)."""

_EMBEDDINGS = "model.transformer.wte.weight"
_BLOCKS = "model.transformer.blocks."


@dataclass(frozen=True)
class Demand:
    """What a build needs, in bytes."""

    export: int
    """Memory of the export itself."""
    self_check: int
    """Memory of the self-check: every stage's weights in float32 on ONNX Runtime, and the eager model."""
    self_check_streamed: int
    """The same with the eager model reading its weights layer by layer."""
    disk: int


def demand(shapes: Mapping[str, tuple[int, ...]], n_layers: int, loops: Sequence[Loop], weight_bytes: int) -> Demand:
    """The demand of a model with tensors of ``shapes``, of which ``weight_bytes`` have to be written."""
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    # The embedding table stays in its file, only rows of it are read. With a cache, prefill has all blocks as well.
    blocks = sum(size for name, size in sizes.items() if name.startswith(_BLOCKS))
    others = sum(size for name, size in sizes.items() if not name.startswith(_BLOCKS) and name != _EMBEDDINGS)
    runtime = others + blocks * sum(2 if loop == "cached" else 1 for loop in loops) + _RUNTIME_MEMORY
    return Demand(
        export=_EXPORT_MEMORY,
        self_check=runtime + sum(sizes.values()),
        self_check_streamed=runtime + max(sizes.values()),
        disk=weight_bytes + (n_layers + 32) * len(loops) * _GRAPH_BYTES_PER_LAYER,
    )


def free_memory() -> int | None:
    """Memory that a process may still take, in bytes: of the machine and of its control group; None where unknown."""
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        maximum = (group / "memory.max").read_text(encoding="ascii").strip()
        if maximum != "max":
            limits.append(int(maximum) - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass
    return min(limits, default=None)


def free_disk(output: Path) -> int:
    """Free bytes of the file system that ``output`` will be written to."""
    return shutil.disk_usage(next(parent for parent in output.absolute().parents if parent.exists())).free


@dataclass(frozen=True)
class Plan:
    """What a build will do, given what is there."""

    needs: Demand
    memory: int | None
    """Free memory, or what ``--max-memory`` allows of it; None where unknown."""
    disk: int
    """Free disk."""
    self_check: bool
    streamed: bool
    """Whether the self-check's eager model is read layer by layer."""

    def describe(self) -> str:
        """One line for the user."""
        memory = self.needs.export
        if self.self_check:
            memory = max(memory, self.needs.self_check_streamed if self.streamed else self.needs.self_check)
        have = "unknown" if self.memory is None else f"{self.memory / GIB:.1f} GiB"
        return (
            f"Needs up to {memory / GIB:.1f} GiB of memory ({have} free or allowed) and {self.needs.disk / 1e9:.2f} GB "
            f"of disk ({self.disk / 1e9:.1f} GB free)."
        )


def plan(needs: Demand, output: Path, max_memory: int | None, self_check: int | None) -> Plan:
    """Hold ``needs`` against what is free and against ``max_memory`` (bytes).

    ``self_check`` is the number of samples asked for; None: as many as usual where memory allows. Raises
    :class:`D3tomError` where something is missing.
    """
    limits = [limit for limit in (free_memory(), max_memory) if limit is not None]
    memory, disk = min(limits, default=None), free_disk(output)
    allowed = "free" if max_memory is None or memory != max_memory else "allowed by --max-memory"
    problems = []
    if needs.disk > disk:
        problems.append(f"{needs.disk / 1e9:.1f} GB of disk and {disk / 1e9:.1f} GB are free for {output}")
    if memory is not None and needs.export > memory:
        problems.append(f"{needs.export / GIB:.1f} GiB of memory and {memory / GIB:.1f} GiB are {allowed}")
    fits = memory is None or needs.self_check <= memory
    fits_streamed = memory is None or needs.self_check_streamed <= memory
    if self_check and not fits_streamed and memory is not None:
        problems.append(
            f"{needs.self_check_streamed / GIB:.1f} GiB of memory for --self-check, which runs the model in float32, "
            f"and {memory / GIB:.1f} GiB are {allowed}"
        )
    if problems:
        raise D3tomError(
            f"This build needs {'; and '.join(problems)}. Nothing was written. Make room, leave the self-check to a "
            "larger machine with --self-check 0, or keep weights linked with --weights link."
        )
    return Plan(needs, memory, disk, self_check != 0 and fits_streamed, not fits)
