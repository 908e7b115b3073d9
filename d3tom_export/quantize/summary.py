"""What of a folder's weights is stored in few bits, for those who look at it. Imports no framework."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from d3tom_export.checkpoint.folder import Checkpoint
from d3tom_export.config import QuantFormat
from d3tom_export.quantize.plan import plan_of, quantization_of


@dataclass(frozen=True)
class WeightsSummary:
    """A model's weights by how they are stored."""

    format: QuantFormat
    weights: int
    """In the format."""
    block: int | None
    """Inputs that share a scale, at most; None: all of an output's."""
    zero_points: bool
    """Whether each block has one."""
    rounded_inputs: int
    """Weights whose other side is rounded too."""
    bits: float
    """That a weight takes, its share of the scales included."""
    bytes: int
    """Of the weights in the format."""
    whole_bytes: int
    """Of the others."""
    whole: Mapping[str, int]
    """How many others there are, by the reason."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> tuple[str, str]:
        """What is in few bits, and what is not."""
        scales = "a scale for each output" if self.block is None else f"a scale for {self.block} inputs"
        zeros = " and a zero point" if self.zero_points else ""
        inputs = f", inputs of {self.rounded_inputs} in {self.format} too" if self.rounded_inputs else ""
        total = self.bytes + self.whole_bytes
        few = (
            f"{self.weights} in {self.format}, {scales}{zeros}{inputs}: {self.bits:.2f} bits a weight, "
            f"{self.bytes / 1e6:,.2f} of {total / 1e6:,.2f} MB"
        )
        return few, "; ".join(f"{count} {reason}" for reason, count in self.whole.items())


def summary_of(checkpoint: Checkpoint) -> WeightsSummary | None:
    """Of a folder, read from its headers; None where no weight of it is quantized."""
    request = quantization_of(checkpoint.quantized)
    if request is None:
        return None
    quantized = checkpoint.quantized.values()
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    shapes |= {name: tensor.shape for name, tensor in checkpoint.quantized.items()}
    kept = plan_of(shapes, request).kept
    reasons = Counter(kept.get(name, "stored so") for name in checkpoint.tensors)
    size, numbers = sum(tensor.length for tensor in quantized), sum(math.prod(tensor.shape) for tensor in quantized)
    blocked = any(len(tensor.scale.shape) == 2 for tensor in quantized)
    return WeightsSummary(
        format=request.format,
        weights=len(checkpoint.quantized),
        block=max(tensor.block for tensor in quantized) if blocked else None,
        zero_points=request.asymmetric,
        rounded_inputs=sum(tensor.input_scale is not None for tensor in quantized),
        bits=8 * size / numbers,
        bytes=size,
        whole_bytes=sum(tensor.length for tensor in checkpoint.tensors.values()),
        whole=dict(reasons.most_common()),
    )
