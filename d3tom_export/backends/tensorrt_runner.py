"""Runs steps on the GPU's stream: copies and launches in order, as CUDA graphs once they recur.

A step is a sequence of operations that names every shape and address, so equal sequences are the same work and a
captured graph is found by its sequence. Sequences differ in K (and in V, G, B and where buffers lie), hence "a graph
for each K".

* A sequence seen for the first time runs on the stages' common contexts: most of an adaptive schedule's K do not recur
  within an answer, and a capture costs more than it saves then.
* The second time it gets contexts of its own and runs on them once: at a first launch TensorRT moves what follows from
  the shapes to the device, which must not fall into a capture. Then it is captured.
* From then on it is one launch of the graph.

The contexts are the graph's alone, since a graph refers to its contexts' state: NVIDIA leaves undefined what a graph
does after its context was changed. So a stage occurs at most once in a sequence that may recur. All contexts share one
block of activations, as stages and steps run one after another. Graphs, and with them contexts, are bounded: the one
that was not used for longest goes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from d3tom_export.backends.tensorrt_stage import Launch, Stage, StageContext
from d3tom_export.engines.cuda import Device
from d3tom_export.errors import D3tomError

MOST_GRAPHS = 32
"""Graphs held at a time. A block of 32 steps with an adaptive schedule has 31 different K."""
_MOST_SIGHTINGS = 1024
"""Sequences remembered as seen once."""


@dataclass(frozen=True)
class Upload:
    """A copy from pinned host memory."""

    to: int
    source: int
    size: int


@dataclass(frozen=True)
class Fetch:
    """A copy to pinned host memory."""

    to: int
    source: int
    size: int


Operation = Upload | Fetch | Launch


@dataclass
class GraphCounts:
    """What became of the sequences."""

    plain: int = 0
    """Run operation by operation."""
    captured: int = 0
    launched: int = 0
    evicted: int = 0
    """Given up for a newer one, or because a buffer they name moved."""


_Contexts = dict[tuple[str, int], StageContext]
"""By stage and profile."""


@dataclass
class _Graph:
    handle: Any
    contexts: _Contexts
    addresses: frozenset[int]


def _addresses(operations: Sequence[Operation]) -> frozenset[int]:
    found: set[int] = set()
    for operation in operations:
        if isinstance(operation, Launch):
            found.update(address for _, address in operation.addresses)
        else:
            found.update((operation.to, operation.source))
    return frozenset(found)


class Runner:
    """Enqueues operations on the device's stream.

    Args:
        device: The GPU.
        stages: Its engines by name.
        graphs: How many CUDA graphs to hold at most; 0 runs everything operation by operation.
    """

    def __init__(self, device: Device, stages: Mapping[str, Stage], graphs: int) -> None:
        self._device, self._stages, self._most = device, stages, graphs
        size = max(256, *(stage.activation_bytes for stage in stages.values()))
        self._activation = (device.malloc(size), size)
        self._common: _Contexts = {}
        self._graphs: OrderedDict[tuple[Operation, ...], _Graph] = OrderedDict()
        self._seen: OrderedDict[tuple[Operation, ...], None] = OrderedDict()
        self.counts = GraphCounts()

    def run(self, operations: Sequence[Operation], *, recurs: bool = True) -> None:
        """Enqueue ``operations`` in order; nothing waits for them.

        ``recurs`` tells that the like of them may come again, so that a graph may pay.
        """
        key = tuple(operations)
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            self._device.launch(graph.handle)
            self.counts.launched += 1
            return
        self.counts.plain += 1
        if not recurs or not self._most or key not in self._seen:
            self._enqueue(key, self._common)
            if recurs and self._most:
                self._seen[key] = None
                if len(self._seen) > _MOST_SIGHTINGS:
                    self._seen.popitem(last=False)
            return
        self._capture(key)

    def _capture(self, key: tuple[Operation, ...]) -> None:
        """Run ``key`` on contexts of its own, and record it for the next time."""
        while len(self._graphs) >= self._most:
            self._drop(next(iter(self._graphs)))
        contexts: _Contexts = {}
        try:
            self._enqueue(key, contexts)
            self._device.begin_capture()
            try:
                self._enqueue(key, contexts)
            except BaseException:
                with suppress(D3tomError):  # leaves capture mode; the failure's own error is the one to tell
                    self._device.drop_graph(self._device.end_capture())
                raise
            try:
                handle = self._device.end_capture()
            except D3tomError as error:
                raise D3tomError(f"{error} An engine here cannot be captured: run with --no-cuda-graphs.") from None
        except BaseException:
            with suppress(D3tomError):  # the plain run goes on until here, on these contexts
                self._device.synchronize()
            _close(contexts)
            raise
        self._graphs[key] = _Graph(handle, contexts, _addresses(key))
        self._seen.pop(key, None)
        self.counts.captured += 1

    def _enqueue(self, operations: Sequence[Operation], contexts: _Contexts) -> None:
        device = self._device
        for operation in operations:
            if isinstance(operation, Upload):
                device.to_device(operation.to, operation.source, operation.size)
            elif isinstance(operation, Fetch):
                device.to_host(operation.to, operation.source, operation.size)
            else:
                key = operation.stage, operation.profile
                if key not in contexts:
                    stage = self._stages[operation.stage]
                    contexts[key] = stage.new_context(self._activation, device, operation.profile)
                contexts[key].enqueue(operation, device.stream)

    def forget(self, address: int) -> None:
        """Drop what refers to ``address``, which is about to be given back; nothing is pending."""
        for key in [key for key, graph in self._graphs.items() if address in graph.addresses]:
            self._drop(key)
        # Another buffer may come to lie there: equal sequences would still be equal work, but have not run before.
        for key in [key for key in self._seen if address in _addresses(key)]:
            del self._seen[key]

    def _drop(self, key: tuple[Operation, ...]) -> None:
        graph = self._graphs.pop(key)
        self._device.synchronize()
        self._device.drop_graph(graph.handle)
        _close(graph.contexts)
        self.counts.evicted += 1

    def close(self) -> None:
        """Drop every graph and context, and give the activations and the stream back."""
        self._device.synchronize()
        while self._graphs:
            self._drop(next(iter(self._graphs)))
        _close(self._common)
        self._seen.clear()
        self._device.free(self._activation[0])
        self._device.close()


def _close(contexts: _Contexts) -> None:
    while contexts:
        contexts.popitem()[1].close()
