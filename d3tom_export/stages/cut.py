"""The model cut into stages: those that both loops share, and the modules of each loop by name.

B batch, S rows of a call, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from d3tom_export.config import Loop, MergeConfig
from d3tom_export.model.lavida import Lavida
from d3tom_export.stages import cached, uncached
from d3tom_export.stages.certainty import CandidatesStage, CertaintyStage
from d3tom_export.stages.contract import candidates_stage, stage_key


class EmbedStage(nn.Module):
    """Token ids (B, S) -> embeddings (B, S, D). The only stage that holds the embedding table."""

    def __init__(self, model: Lavida) -> None:
        super().__init__()
        self.wte = model.transformer.wte

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.wte(token_ids)


class VisionStage(nn.Module):
    """Views (W, 3, S, S) -> pooled, projected features (W, T, D)."""

    LAYERS = "lavida.model.vision_tower.vision_tower.vision_model.encoder.layers"

    def __init__(self, model: Lavida) -> None:
        super().__init__()
        self.lavida = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.lavida.encode_views(pixel_values)


def stage_modules(
    model: Lavida, merge: MergeConfig, loops: Sequence[Loop], shares_prefix: bool = False
) -> dict[str, nn.Module]:
    """The modules of every stage of a bundle for ``loops``, by key; they share their parameters with ``model``."""
    transformer = model.transformer
    modules: dict[str, nn.Module] = {} if model.config.vision is None else {"vision": VisionStage(model)}
    modules["embed"] = EmbedStage(model)
    for loop in loops:
        if loop == "cached":
            stages = cached.loop_modules(transformer, merge, shares_prefix)
        else:
            stages = uncached.loop_modules(transformer, merge)
        modules |= {stage_key(name, loop, loops): module for name, module in stages.items()}
    modules["certainty"] = CertaintyStage(transformer.config)
    if candidates_stage(model.config) is not None:
        modules["candidates"] = CandidatesStage(transformer.config)
    return modules
