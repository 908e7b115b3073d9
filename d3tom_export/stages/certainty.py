"""How certain each answer position is beyond its token's probability: what `margin` and `entropy` rank by.

Stages of their own, which run only where they are asked for: a greedy step pays nothing, and no vocabulary-wide tensor
crosses to the host. B batch, G answer tokens, R rows of the language head, K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d3tom_export.config import LanguageConfig
from d3tom_export.loop.sampling import ENTROPY_EPSILON
from d3tom_export.stages.contract import CANDIDATES
from d3tom_export.stages.ops import Ban


class CertaintyStage(nn.Module):
    """Logits (B, G, R) float32 -> `rest`, `runner_up`, `rest_entropy`, each (B, G) float32.

    With p the softmax over all R rows and p1 its largest, `rest` is (1 - p1) / p1, `runner_up` p2 / p1, and
    `rest_entropy` -sum p log(p + 1e-10) over all rows but that of p1. They are sums of small positive numbers, so
    float32 tells apart what it cannot of probabilities near 1; the host goes on in float64 (sampling.py). Nothing
    overflows: exponents are at most 0. Banned tokens have no probability.
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.ban = Ban(config)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.ban(logits)
        top = logits.argmax(dim=-1)
        relative = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
        others = relative.scatter(-1, top.unsqueeze(-1), 0.0)
        rest = others.sum(dim=-1)
        total = 1.0 + rest
        # Of p = others / total, log(p + e) is log(others + e total) - log(total): a pass less over the vocabulary.
        logs = torch.log(others + (ENTROPY_EPSILON * total).unsqueeze(-1))
        rest_entropy = (rest * torch.log(total) - (others * logs).sum(dim=-1)) / total
        return rest, others.amax(dim=-1), rest_entropy


class CandidatesStage(nn.Module):
    """Logits (B, G, R) float32 -> `likeliest` (B, G, K) and `rest` (B, G), float32.

    `likeliest` are the K largest probabilities, descending, relative to the largest; `rest` is the sum of all but the
    largest, relative to it. Samplers that draw from the likeliest tokens alone rank by them (sampling.py).
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.ban = Ban(config)
        self._count = min(CANDIDATES, config.head_rows)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.ban(logits)
        top = logits.argmax(dim=-1)
        relative = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
        rest = relative.scatter(-1, top.unsqueeze(-1), 0.0).sum(dim=-1)
        return torch.topk(relative, self._count, dim=-1).values, rest
