"""LaViDa: the SigLIP tower and projector in front of the LLaDA transformer, named as in released checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d3tom_export.config import ModelConfig
from d3tom_export.model.llada import Transformer
from d3tom_export.model.vision import pool, projector, siglip_tower, tower_features


class _Model(nn.Module):
    """What released tensor names call ``model``."""

    def __init__(self, config: ModelConfig, vision_layers: int) -> None:
        super().__init__()
        self.transformer = Transformer(config.language)
        if config.vision is not None:
            self.vision_tower = siglip_tower(config.vision, vision_layers)
            self.mm_projector = projector(config.vision, config.language.d_model)
            self.image_newline = nn.Parameter(torch.zeros(config.language.d_model))


class Lavida(nn.Module):
    """The eager model. ``state_dict()`` keys are exactly the checkpoint's tensor names.

    Args:
        config: Geometry.
        vision_layers: Tower layers to build; defaults to all but the last of the tower, as the release keeps.
    """

    def __init__(self, config: ModelConfig, vision_layers: int | None = None) -> None:
        super().__init__()
        self.config = config
        if vision_layers is None and config.vision is not None:
            vision_layers = config.vision.num_hidden_layers - 1
        self.model = _Model(config, vision_layers or 0)

    @property
    def transformer(self) -> Transformer:
        return self.model.transformer

    def encode_views(self, pixel_values: Tensor) -> Tensor:
        """Visual features of a picture's views: (views, 3, S, S) -> (views, T, D), projected, then pooled if at all."""
        assert self.config.vision is not None, "a language-only model has no vision tower"
        features = self.model.mm_projector(tower_features(self.model.vision_tower, pixel_values))
        return pool(features, self.config.vision) if self.config.vision.pooled else features

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Rows of the embedding table: (B, S) int64 -> (B, S, D)."""
        return self.transformer.wte(token_ids)
