"""Buffers of an answer on the GPU, and page-locked ones for its copies: named, reused, grown, never shrunk."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from d3tom_export.engines.cuda import Device

GRAIN = 512
"""Sizes are rounded up to this many bytes, so that an answer a little longer than the last finds room."""


class _Block(NamedTuple):
    address: int
    size: int


class Workspace:
    """The buffers of one answer at a time.

    An answer's first step needs the most of every buffer (nothing is merged yet), so its later steps allocate nothing;
    the next answer of the same sizes finds every buffer where it was, and with it the CUDA graphs that name it.

    Args:
        device: Where device buffers lie.
        forget: Called with the address of a device buffer or of pinned memory before it is given back.
    """

    def __init__(self, device: Device, forget: Callable[[int], None]) -> None:
        self._device, self._forget = device, forget
        self._on_device: dict[str, _Block] = {}
        self._on_host: dict[str, _Block] = {}

    def on_device(self, name: str, size: int) -> int:
        """Address of the device buffer ``name`` with room for ``size`` bytes; what it held is lost if it grows."""
        return self._block(self._on_device, name, size, self._device.malloc, self._device.free).address

    def on_host(self, name: str, shape: Sequence[int], dtype: DTypeLike) -> NDArray:
        """The pinned buffer ``name`` as an array: valid until the buffer grows, so for the step at hand only."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        block = self._block(self._on_host, name, size, self._device.pin, self._device.unpin)
        pages = (ctypes.c_char * max(size, 1)).from_address(block.address)
        return np.frombuffer(memoryview(pages), dtype, math.prod(shape)).reshape(shape)

    def _block(
        self,
        blocks: dict[str, _Block],
        name: str,
        size: int,
        allocate: Callable[[int], int],
        release: Callable[[int], None],
    ) -> _Block:
        block = blocks.get(name)
        if block is not None and block.size >= size:
            return block
        if block is not None:
            self._give_back(blocks.pop(name), release)  # before the new one is there: the two need not fit together
        size = -(-max(size, 1) // GRAIN) * GRAIN
        blocks[name] = _Block(allocate(size), size)
        return blocks[name]

    def _give_back(self, block: _Block, release: Callable[[int], None]) -> None:
        self._device.synchronize()
        self._forget(block.address)
        release(block.address)

    def close(self) -> None:
        """Give everything back."""
        for blocks, release in ((self._on_device, self._device.free), (self._on_host, self._device.unpin)):
            while blocks:
                self._give_back(blocks.popitem()[1], release)
