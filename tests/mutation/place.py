"""Where a fault is put: which file of a bundle, and what of ``validate`` looks at it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from d3tom_export.cpu.place import tuned_graph
from tests.mutation.fault import FEWER, Fault, Precision, Subject
from tests.mutation.graph import Change, opened

Graphs = Literal["standard", "tuned"]
BOTH: tuple[Graphs, ...] = ("standard", "tuned")

_CACHED = ("prefill", "rotate", "decide")
_UNTUNED = ("vision", "embed")


def in_graphs(
    name: str,
    stages: str | Sequence[str],
    change: Change,
    *,
    graphs: Sequence[Graphs] = BOTH,
    precision: Precision = "fp32",
    subject: Subject = "small",
    samples: int | None = None,
    **rest: Any,
) -> list[Fault]:
    """A fault in the graphs of one stage or several: one :class:`Fault` for the standard ones, one for the tuned.

    ``make test`` puts those of the fidelity review into both kinds, others into the tuned graphs where they are in
    both; ``make slow`` has the rest.

    ``validate`` is asked for the loop and the graphs that have it. A fault that may pass must pass all samples that
    validate takes by default; one that must be caught is caught by :data:`FEWER`, unless ``samples`` says otherwise.
    """
    stages = (stages,) if isinstance(stages, str) else tuple(stages)
    cached = any(stage.startswith("cached_") or stage in _CACHED for stage in stages)
    faults = []
    for kind in graphs:
        options = ["--kv-cache" if cached else "--no-kv-cache"]
        options += ["--precision", "int8"] if precision == "int8" else ["--graphs", kind]
        if samples is not None:
            options += ["--samples", str(samples)]
        elif rest.get("reason") is None:
            options += FEWER
        of = "bundled model, " if subject == "bundled" and precision == "fp32" else ""
        where = "shared" if stages[0] in _UNTUNED else kind
        where = "int8" if precision == "int8" else where
        faults.append(
            Fault(
                name,
                "graph",
                f"{where} {of}{'+'.join(stages)}",
                _apply(stages, change, kind, precision),
                subject=subject,
                precision=precision,
                options=tuple(options),
                slow=kind == "standard" and len(graphs) > 1 and not rest.get("review"),
                **rest,
            )
        )
    return faults


def _apply(stages: Sequence[str], change: Change, kind: Graphs, precision: Precision) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for stage in stages:
            standard = kind == "standard" or stage in _UNTUNED
            path = folder / f"{stage}.onnx" if standard else tuned_graph(folder, precision, stage)
            with opened(path, folder) as graph:
                change(graph)

    return apply
