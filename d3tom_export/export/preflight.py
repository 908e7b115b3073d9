"""What a build will need of memory and disk, and whether that is there: known before any work starts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from d3tom_export.checkpoint.tensors import EMBEDDING_TABLE, LAYERS
from d3tom_export.config import Loop
from d3tom_export.errors import D3tomError

GIB = 2**30

_EXPORT_MEMORY = 3 * GIB // 2
"""torch, the exporter and the graph of one stage; weights are never loaded. Measured on lavida-8b: 0.74 GiB
(docs/scale.md), and 1.31 GiB where all layers of a stage had to be traced."""

_LIBRARIES = GIB // 2
"""torch and the rest of the process while weights are quantized."""

_PIECE = GIB // 4
"""What a piece of a weight takes on its way into few bits, and back."""

_SAMPLE_ROWS = 2048
"""Upper bound of a sample's rows: LaViDa's largest picture with its question and answer has 1,200."""

_GRAPH_BYTES_PER_LAYER = 2**20
"""Upper bound of what a layer's nodes take in all of a loop's graphs on disk (lavida-8b: 0.2 MiB)."""

RUNTIME_MEMORY = 3 * GIB
"""Runtime, activations and caches of the self-check, and weights on their way from the file, beside the weights: on
lavida-2b 1.9 to 2.8 GiB (docs/scale.md)."""


@dataclass(frozen=True)
class Demand:
    """What a build needs, in bytes."""

    export: int
    """Memory of the export itself."""
    runtime: int
    """Memory of the stages of one loop on ONNX Runtime, which keeps every weight in float32, and of running them."""
    standard: int
    """Memory on top of that while the standard graphs are loaded: ONNX Runtime folds their transposed weights into
    copies before it lets the weights go."""
    eager: int
    """Memory of the eager model in float32."""
    eager_streamed: int
    """The same where it reads its weights layer by layer."""
    disk: int

    @property
    def self_check(self) -> int:
        """Memory of the self-check."""
        return self.runtime + self.eager

    @property
    def self_check_streamed(self) -> int:
        """The same with the eager model reading its weights layer by layer."""
        return self.runtime + self.eager_streamed


def demand(
    shapes: Mapping[str, tuple[int, ...]],
    n_layers: int,
    loops: Sequence[Loop],
    weight_bytes: int,
    engine_item_sizes: Sequence[int] = (),
    *,
    shares_prefix: bool = False,
    quantizing: int = 0,
) -> Demand:
    """The demand of a model with tensors of ``shapes``, of which ``weight_bytes`` have to be written.

    ``engine_item_sizes`` are the bytes of a weight in each set of engines to be built, plans hold weights of their own.
    ``shares_prefix`` tells whether there is `extend`. ``quantizing`` is the memory of quantizing
    (:func:`quantizing_memory`).
    """
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    # The embedding table stays in its file, only rows of it are read. With a cache, prefill has all blocks as well, and
    # layer l* is in two of the other stages; `extend` has all blocks once more. The self-check opens one loop's stages
    # after the other's.
    blocks = sum(size for name, size in sizes.items() if name.startswith(LAYERS))
    others = sum(size for name, size in sizes.items() if not name.startswith(LAYERS) and name != EMBEDDING_TABLE)
    copies = {"uncached": 1.0, "cached": 2 + 1 / n_layers + shares_prefix}
    stages = [math.ceil(others + blocks * copies[loop]) for loop in loops]
    # Engines hold the embedding table, and every block once for each loop (engines.stages).
    engines = sizes.get(EMBEDDING_TABLE, 0) + len(loops) * (others + blocks)
    return Demand(
        export=max(_EXPORT_MEMORY, quantizing),
        runtime=max(stages) + RUNTIME_MEMORY,
        standard=blocks,
        eager=sum(sizes.values()),
        eager_streamed=max(sizes.values()),
        disk=weight_bytes
        + (n_layers + 32) * len(loops) * _GRAPH_BYTES_PER_LAYER
        + engines // 4 * sum(engine_item_sizes),
    )


def quantizing_memory(shapes: Mapping[str, tuple[int, ...]], blocks: Collection[str], samples: int) -> int:
    """Bytes of memory that storing the weights named ``blocks`` in few bits takes, one weight or layer at a time.

    A weight has one byte a number for its codes, and half of one more where two of them are packed. Where ``samples``
    are looked at a layer is there in float32 and in codes; the largest sum of products (K, K) is there three times, the
    others of its layer once; and all samples are at its input and its output.
    """
    codes = max((math.prod(shapes[name]) * 3 // 2 for name in blocks), default=0)
    needed = _LIBRARIES + _PIECE + codes
    layer = [name for name in blocks if name.startswith(f"{LAYERS}0.")]
    if not samples or not layer:
        return needed
    numbers = sum(math.prod(shapes[name]) for name in layer)
    largest = max(layer, key=lambda name: math.prod(shapes[name]))
    inputs = {name: shapes[name][1] for name in layer}
    width, inner = min(inputs.values()), max(inputs.values())
    products = 3 * inner**2 + 3 * width**2
    # GPTQ's own copy of a weight, its errors, and what it stands for once it is done.
    copies = 3 * math.prod(shapes[largest])
    rows = 2 * samples * _SAMPLE_ROWS * width + 4 * _SAMPLE_ROWS * inner
    return max(needed, _LIBRARIES + _PIECE + numbers + 4 * (numbers + products + copies + rows))


def free_memory(root: Path = Path("/")) -> int | None:
    """Memory that a process may still take, in bytes: of the machine and of its control groups; None where unknown.

    ``root`` is where ``proc`` and ``sys`` are mounted.
    """
    limits = [_group_memory(group, names) for group, names in _control_groups(root)]
    with suppress(OSError):
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    return min((limit for limit in limits if limit is not None), default=None)


_GROUP_FILES = {
    "": ("memory.max", "memory.current", ("inactive_file", "active_file")),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}
"""By controller, as ``/proc/self/cgroup`` lists them (version 2 names none): limit, use, and what of it is cache."""


def _control_groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, tuple[str, ...]]]]:
    """The process's memory control groups, with those around them; a container may see only the outermost."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in set(controllers.split(",")) & _GROUP_FILES.keys():
            top = root / "sys/fs/cgroup" / controller
            inner = PurePosixPath(path.lstrip("/"))
            for group in (inner, *inner.parents):
                yield top / group, _GROUP_FILES[controller]


def _group_memory(group: Path, names: tuple[str, str, tuple[str, ...]]) -> int | None:
    """What is left of a control group's limit. Cached files count as used there, but make room when asked to."""
    limit_name, usage_name, caches = names
    try:
        limit = (group / limit_name).read_text(encoding="ascii").strip()
        usage = int((group / usage_name).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        return None if limit == "max" else int(limit) - usage + sum(int(stat.get(name, 0)) for name in caches)
    except (OSError, ValueError):
        return None


def nearest_folder(output: Path) -> Path:
    """The folder that is there and that ``output`` will be made in."""
    return next(parent for parent in output.absolute().parents if parent.exists())


def free_disk(output: Path) -> int:
    """Free bytes of the file system that ``output`` will be written to."""
    return shutil.disk_usage(nearest_folder(output)).free


@dataclass(frozen=True)
class SelfCheck:
    """How a bundle is held against PyTorch before it is declared done."""

    samples: int = 2
    """0: not at all."""
    streamed: bool = False
    """Whether the eager model reads its weights layer by layer at every step, for want of memory
    (:func:`~d3tom_export.checkpoint.models.load_model`)."""
    standard: bool = True
    """Whether the standard graphs are run too, beside those for the CPU."""


USUAL_CHECK = SelfCheck()
"""Where memory allows, and nobody asks for another number of samples."""


@dataclass(frozen=True)
class Plan:
    """What a build will do, given what is there."""

    needs: Demand
    memory: int | None
    """Free memory, or what ``--max-memory`` says; None where unknown."""
    disk: int
    """Free disk."""
    check: SelfCheck
    lacking: str | None = None
    """The memory that the self-check would need, where it is left out for want of that."""

    def describe(self) -> str:
        """One line for the user."""
        memory = self.needs.export
        if self.check.samples:
            memory = max(memory, self.needs.self_check_streamed if self.check.streamed else self.needs.self_check)
            memory += self.needs.standard if self.check.standard else 0
        have = "unknown" if self.memory is None else f"{self.memory / GIB:.1f} GiB"
        line = (
            f"Needs up to {memory / GIB:.1f} GiB of memory ({have} free or allowed) and {_size(self.needs.disk)} "
            f"of disk ({_size(self.disk)} free)."
        )
        return f"{line} No self-check: that needs {self.lacking}." if self.lacking else line


def _size(count: int) -> str:
    """Bytes of disk for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def plan(
    needs: Demand,
    output: Path,
    max_memory: int | None,
    self_check: int | None,
    *,
    held: int = 0,
    quantizes: bool = False,
) -> Plan:
    """Hold ``needs`` against ``max_memory`` (bytes), or what is free where that is None, and the free disk.

    ``self_check`` is the number of samples asked for; None: as many as usual where memory allows. ``held`` are bytes of
    disk that an interrupted build left, which this one takes over or frees; ``quantizes`` tells whether weights are
    quantized, and cannot be linked. Raises :class:`D3tomError` where something is missing.
    """
    memory, disk = free_memory() if max_memory is None else max_memory, free_disk(output)
    allowed = "free" if max_memory is None else "allowed by --max-memory"
    problems, remedies = [], []
    if needs.disk > disk + held:
        problems.append(f"{_size(needs.disk - held)} of disk and {_size(disk)} are free for {output}")
        linking = "" if quantizes else "--weights link for a checkpoint, "
        remedies.append(f"Make room, or write less: {linking}--weights sparse for a --geometry.")
    if memory is not None and needs.export > memory:
        problems.append(f"{needs.export / GIB:.1f} GiB of memory and {memory / GIB:.1f} GiB are {allowed}")
        remedies.append("Make room, or say with --max-memory what there is.")
    fits = memory is None or needs.self_check <= memory
    fits_streamed = memory is None or needs.self_check_streamed <= memory
    if self_check and not fits_streamed and memory is not None:
        problems.append(
            f"{needs.self_check_streamed / GIB:.1f} GiB of memory for --self-check, which runs the model in float32, "
            f"and {memory / GIB:.1f} GiB are {allowed}"
        )
        remedies.append("Leave the self-check to a larger machine, with --self-check 0.")
    if problems:
        raise D3tomError(f"This build needs {'; and '.join(problems)}. Nothing was written. {' '.join(remedies)}")
    lacking = (
        f"{needs.self_check_streamed / GIB:.1f} GiB of memory" if self_check is None and not fits_streamed else None
    )
    checked = needs.self_check if fits else needs.self_check_streamed
    standard = memory is None or checked + needs.standard <= memory
    samples = USUAL_CHECK.samples if self_check is None else self_check
    return Plan(needs, memory, disk, SelfCheck(samples if fits_streamed else 0, not fits, standard), lacking)
