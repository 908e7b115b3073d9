"""What a model's products are multiplied with: samples on their way through its blocks as these are quantized.

One block's weights are in memory at a time, and what all samples are at its input. A later block sees what the
quantized ones before it make, so that it can make up for them. L rows of a sample, D width, K inputs of a product.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d3tom_export.model.llada import LladaBlock, Transformer

ReadLayer = Callable[[int], Mapping[str, Tensor]]
"""Gives a block's tensors by the names that they have in it."""

_HEADROOM = 2.0
"""How many times the largest number that was seen still fits: other questions have larger ones. A power of two, which
takes no digit from a float; only the smallest numbers, below 2 ** -16 of the largest, lose some."""

_SMALLEST_SCALE = torch.finfo(torch.float16).tiny
"""Engines in fp16 hold scales in that: below, they would lose digits, or become 0."""

_SAME_INPUTS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "ff_proj"}
"""Products that are multiplied with what another one is."""


class Seen(NamedTuple):
    """What a product was multiplied with, over all rows x of all samples."""

    products: Tensor
    """(K, K) float32, the sum of x x^T"""
    largest: Tensor
    """() float32, of |x|"""

    @property
    def input_scale(self) -> Tensor:
        """() float32, at which float8 (e4m3) holds numbers up to twice the largest.

        The largest, and no percentile below it: float8 has as many digits for small numbers as for large ones, so what
        is cut off gains nothing, and the few large inputs of a transformer carry much of its sums.
        """
        limit = torch.finfo(torch.float8_e4m3fn).max
        return (self.largest * _HEADROOM / limit).clamp_min(_SMALLEST_SCALE)


class Calibration:
    """Samples at the input of a layer, from the first on.

    Args:
        transformer: For its sizes and angles; its weights are not looked at.
        read: Where a layer's weights come from.
        rows: The samples' embedded sequences, each (1, L, D) float32.
    """

    def __init__(self, transformer: Transformer, read: ReadLayer, rows: Sequence[Tensor]) -> None:
        self._transformer, self._read, self._rows = transformer, read, list(rows)
        self.layer = 0
        """The next one."""
        self.samples = len(rows)
        self.fingerprint = hashlib.sha256(b"".join(each.numpy().tobytes() for each in rows)).hexdigest()
        """Of the samples."""

    @torch.inference_mode()
    def quantize_layer(self, quantize: Callable[[str, Tensor, Seen], Tensor | None]) -> None:
        """Quantize the next layer's products and take the samples through what comes of it.

        ``quantize`` is given a product's name in its block, its weight (N, K) and what it is multiplied with, and
        returns what the quantized weight stands for, or None for what stays as it is. Inputs are not rounded on the
        way, whatever becomes of the weights.
        """
        block = self._block()
        seen = self._seen(block)
        for name, linear in _linears(block):
            numbers = quantize(name, linear.weight, seen[_SAME_INPUTS.get(name, name)])
            if numbers is not None:
                linear.weight = nn.Parameter(numbers, requires_grad=False)  # one of both is in memory
        del seen
        self._advance(block, {})

    @torch.inference_mode()
    def pass_layer(self, weights: Mapping[str, Tensor]) -> None:
        """Take the samples through the next layer, whose products were quantized before: ``weights`` by name."""
        self._advance(self._block(), weights)

    def _block(self) -> LladaBlock:
        with torch.device("meta"):
            block = LladaBlock(self._transformer.config)
        block.load_state_dict({name: tensor.float() for name, tensor in self._read(self.layer).items()}, assign=True)
        return block.eval().requires_grad_(False)

    def _seen(self, block: LladaBlock) -> dict[str, Seen]:
        """What every product is multiplied with that has inputs of its own, by name."""
        found: dict[str, Seen] = {}

        def note(name: str, rows: Tensor) -> None:
            flat = rows.flatten(0, -2)
            largest = flat.abs().max()
            if name not in found:
                found[name] = Seen(flat.T @ flat, largest)
                return
            before = found[name]
            before.products.addmm_(flat.T, flat)
            found[name] = before._replace(largest=torch.maximum(before.largest, largest))

        hooks = [
            linear.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
            for name, linear in _linears(block)
            if name not in _SAME_INPUTS
        ]
        for rows in self._rows:
            block(rows, self._transformer.compact_rotary(rows))
        for hook in hooks:
            hook.remove()
        return found

    def _advance(self, block: LladaBlock, weights: Mapping[str, Tensor]) -> None:
        for name, linear in _linears(block):
            if name in weights:
                linear.weight = nn.Parameter(weights[name], requires_grad=False)
        self._rows = [block(rows, self._transformer.compact_rotary(rows)) for rows in self._rows]
        self.layer += 1


def _linears(block: LladaBlock) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in block.named_children() if isinstance(module, nn.Linear)]
