"""What a model's products are multiplied with: samples on their way through its blocks as these are quantized.

One block's weights are in memory at a time, and what all samples are at its input. A later block sees what the
quantized ones before it make, so that it can make up for them. L rows of a sample, D width, K inputs of a product.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from d3tom_export.model.llada import LladaBlock, Transformer
from d3tom_export.quantize.matrices import QuantizedMatrix

ReadLayer = Callable[[int], Mapping[str, Tensor]]
"""Gives a block's tensors by the names that they have in it."""

_SAME_INPUTS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "ff_proj"}
"""Products that are multiplied with what another one is."""


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
        self.fingerprint = hashlib.sha256(b"".join(each.numpy().tobytes() for each in rows)).hexdigest()
        """Of the samples."""

    @torch.inference_mode()
    def quantize_layer(
        self, quantize: Callable[[str, Tensor, Tensor], QuantizedMatrix | None]
    ) -> dict[str, QuantizedMatrix]:
        """Quantize the next layer's products and take the samples through what comes of it.

        ``quantize`` is given a product's name in its block, its weight (N, K) and the sum of x x^T (K, K) over all rows
        x that it is multiplied with, and returns None for what stays as it is.
        """
        block = self._block()
        products = self._products(block)
        found: dict[str, QuantizedMatrix] = {}
        for name, linear in _linears(block):
            matrix = quantize(name, linear.weight, products[_SAME_INPUTS.get(name, name)])
            if matrix is not None:
                found[name] = matrix
        self._advance(block, {name: matrix.numbers for name, matrix in found.items()})
        return found

    @torch.inference_mode()
    def pass_layer(self, weights: Mapping[str, Tensor]) -> None:
        """Take the samples through the next layer, whose products were quantized before: ``weights`` by name."""
        self._advance(self._block(), weights)

    def _block(self) -> LladaBlock:
        with torch.device("meta"):
            block = LladaBlock(self._transformer.config)
        block.load_state_dict({name: tensor.float() for name, tensor in self._read(self.layer).items()}, assign=True)
        return block.eval().requires_grad_(False)

    def _products(self, block: LladaBlock) -> dict[str, Tensor]:
        """The sums of x x^T of every product that has inputs of its own, by name."""
        sums: dict[str, Tensor] = {}

        def seen(name: str, rows: Tensor) -> None:
            flat = rows.flatten(0, -2)
            added = flat.T @ flat
            sums[name] = added if name not in sums else sums[name] + added

        hooks = [
            linear.register_forward_pre_hook(lambda _, inputs, name=name: seen(name, inputs[0]))
            for name, linear in _linears(block)
            if name not in _SAME_INPUTS
        ]
        for rows in self._rows:
            block(rows, self._transformer.compact_rotary(rows))
        for hook in hooks:
            hook.remove()
        return sums

    def _advance(self, block: LladaBlock, weights: Mapping[str, Tensor]) -> None:
        for name, linear in _linears(block):
            if name in weights:
                linear.weight = nn.Parameter(weights[name], requires_grad=False)
        self._rows = [block(rows, self._transformer.compact_rotary(rows)) for rows in self._rows]
        self.layer += 1


def _linears(block: LladaBlock) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in block.named_children() if isinstance(module, nn.Linear)]
