"""A double of the CUDA surface (d3tom_export.engines.cuda.Device): strict, on host memory, with deferred work.

What it proves: which copies and launches the backend asks for, in which order, on which addresses; that nothing reads
memory that was freed, never written or too small; that results are read only after a synchronization, and pinned memory
is not overwritten before one; that graphs replay what they captured. Device addresses are no host addresses here, so
code that touched device memory from the host would crash.

What it cannot prove: that CUDA behaves so, anything about time, and anything about several streams, of which the
backend uses one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from d3tom_export.engines.cuda import Gpu

DEVICE_BASE = 1 << 56
"""Where device addresses begin: beyond what a 64-bit processor maps, so that following one is a crash."""
POISON = 0xA5


class Misuse(Exception):  # noqa: N818
    """The backend did what real CUDA or TensorRT would answer with an error, garbage or undefined behaviour."""


def demand(condition: object, message: str) -> None:
    if not condition:
        raise Misuse(message)


@dataclass
class _Memory:
    """Live blocks of one kind of memory by address."""

    kind: str
    blocks: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    allocated: int = 0
    """How often."""
    freed: int = 0

    def view(self, address: int, size: int) -> NDArray[np.uint8]:
        for start, block in self.blocks.items():
            if start <= address and address + size <= start + len(block):
                return block[address - start : address - start + size]
        raise Misuse(f"{size} bytes at {address:#x} are not within live {self.kind} memory")


Work = Callable[[], None]


class FakeDevice:
    """One GPU, one stream. Work runs at :meth:`synchronize`, in order, and not before."""

    stream = 0x57EA
    memory = 24 << 30
    """Bytes, all of them free."""

    def __init__(self, gpu: Gpu) -> None:
        self.name, self.sm = gpu.name, gpu.sm
        self.device, self.pinned = _Memory("device"), _Memory("pinned")
        self.copies: list[tuple[str, int]] = []
        """Direction and bytes of every copy that was asked for, graphs' included."""
        self.log: list[str] = []
        """Stages and graphs in the order they were enqueued."""
        self.synchronizations = 0
        self.graphs: dict[int, list[Work]] = {}
        self.closed = False
        self._next_address = DEVICE_BASE
        self._pending: list[Work] = []
        self._capture: list[Work] | None = None
        self._graph_count = 0

    # Memory

    def free_memory(self) -> tuple[int, int]:
        return self.memory, self.memory

    def malloc(self, size: int) -> int:
        demand(self._capture is None, "malloc during a capture")
        address = self._next_address
        self._next_address += size + 4096 - size % 256  # never adjacent: an overrun is not another buffer
        self.device.blocks[address] = np.full(size, POISON, dtype=np.uint8)
        self.device.allocated += 1
        return address

    def free(self, address: int) -> None:
        demand(not self._pending and self._capture is None, "memory freed while work is pending")
        demand(address in self.device.blocks, f"free of {address:#x}, which is not allocated")
        del self.device.blocks[address]
        self.device.freed += 1

    def pin(self, size: int) -> int:
        demand(self._capture is None, "pin during a capture")
        block = np.full(size, POISON, dtype=np.uint8)
        self.pinned.blocks[block.ctypes.data] = block
        self.pinned.allocated += 1
        return block.ctypes.data

    def unpin(self, address: int) -> None:
        demand(not self._pending and self._capture is None, "pinned memory freed while work is pending")
        demand(address in self.pinned.blocks, f"unpin of {address:#x}, which is not pinned")
        self.pinned.blocks.pop(address)[:] = POISON
        self.pinned.freed += 1

    # Work

    def enqueue(self, work: Work) -> None:
        (self._pending if self._capture is None else self._capture).append(work)

    @property
    def capturing(self) -> bool:
        return self._capture is not None

    def to_device(self, to: int, source: int, size: int) -> None:
        self.pinned.view(source, size)
        self.device.view(to, size)

        def work() -> None:
            self.copies.append(("up", size))
            self.device.view(to, size)[:] = self.pinned.view(source, size)

        self.enqueue(work)

    def to_host(self, to: int, source: int, size: int) -> None:
        self.pinned.view(to, size)
        self.device.view(source, size)

        def begin() -> None:
            self.pinned.view(to, size)[:] = POISON  # anything may be there until the stream was waited for

        def work() -> None:
            self.copies.append(("down", size))
            self.pinned.view(to, size)[:] = self.device.view(source, size)

        if self._capture is None:
            begin()
        work.begin = begin  # type: ignore[attr-defined]
        self.enqueue(work)

    def synchronize(self) -> None:
        demand(self._capture is None, "synchronize during a capture")
        self.synchronizations += 1
        pending, self._pending = self._pending, []
        for work in pending:
            work()

    # Graphs

    def begin_capture(self) -> None:
        demand(self._capture is None, "a capture within a capture")
        self._capture = []

    def end_capture(self) -> int:
        demand(self._capture is not None, "the end of no capture")
        assert self._capture is not None
        self._graph_count += 1
        self.graphs[self._graph_count], self._capture = self._capture, None
        return self._graph_count

    def launch(self, graph: int) -> None:
        demand(graph in self.graphs, "launch of a graph that was dropped")
        demand(self._capture is None, "a graph launched during a capture")
        self.log.append("graph")
        for work in self.graphs[graph]:
            for early in (getattr(work, "begin", None), getattr(work, "check", None)):
                if early is not None:
                    early()
            self._pending.append(work)

    def drop_graph(self, graph: int) -> None:
        demand(graph in self.graphs, "a graph dropped twice")
        demand(not self._pending, "a graph dropped while work is pending")
        del self.graphs[graph]

    def close(self) -> None:
        demand(not self._pending and not self.graphs, "closed with work pending or graphs left")
        demand(not self.device.blocks and not self.pinned.blocks, "closed with memory left")
        self.closed = True


def host_int64(address: int) -> int:
    """The int64 at a host ``address``, as TensorRT reads a shape tensor."""
    demand(0 < address < DEVICE_BASE, f"a shape tensor at {address:#x}, which is no host memory")
    return ctypes.c_int64.from_address(address).value
