"""SigLIP tower, projector and pooling: views of a picture in, visual tokens out (lavida.md B3 and B4).

The tower is ``transformers``' SigLIP, cut after its last stored layer and without ``post_layernorm``, as in the
release. The projector comes first and the pooling second, also as released (the paper's text has it the other way).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from d3tom_export.config import VisionConfig


class _TowerNames(nn.Module):
    """The two levels of names, ``vision_tower.vision_model``, that the released state dict puts above the tower."""

    def __init__(self, vision_model: nn.Module) -> None:
        super().__init__()
        self.vision_tower = nn.Module()
        self.vision_tower.vision_model = vision_model


def siglip_tower(config: VisionConfig, layers: int) -> nn.Module:
    """A SigLIP vision transformer of ``layers`` layers, wrapped in the released names; random weights."""
    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=config.num_attention_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            layer_norm_eps=config.layer_norm_eps,
            hidden_act="gelu_pytorch_tanh",
            vision_use_head=False,
        )
    )
    # transformers 4 nests the transformer under `vision_model`; 5 does not.
    vision_model = getattr(model, "vision_model", model)
    # Stored in checkpoints, never used by the features: kept out of the module so that nothing depends on it.
    vision_model.post_layernorm = nn.Identity()
    return _TowerNames(vision_model)


def projector(config: VisionConfig, d_model: int) -> nn.Sequential:
    """``mlp2x_gelu``: Linear, exact GELU, Linear."""
    return nn.Sequential(nn.Linear(config.hidden_size, d_model), nn.GELU(), nn.Linear(d_model, d_model))


def tower_features(tower: nn.Module, pixel_values: Tensor) -> Tensor:
    """Hidden states after the last stored layer: (views, 3, S, S) -> (views, patches, hidden)."""
    vision_model: Any = tower.get_submodule("vision_tower.vision_model")
    return vision_model.encoder(inputs_embeds=vision_model.embeddings(pixel_values)).last_hidden_state


def pool(features: Tensor, config: VisionConfig) -> Tensor:
    """2x2 bilinear pooling of each view's token grid: (views, patches, D) -> (views, T, D).

    ``align_corners=False`` without antialias, output side rounded up: 27x27 becomes 14x14. Computed in float32.
    """
    side = config.patches_per_side
    grid = features.float().transpose(1, 2).unflatten(2, (side, side))
    pooled = F.interpolate(grid, size=(config.tokens_per_side,) * 2, mode="bilinear", align_corners=False)
    return pooled.flatten(2).transpose(1, 2).to(features.dtype)
