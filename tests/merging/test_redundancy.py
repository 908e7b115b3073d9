"""How alike visual tokens are, layer by layer."""

from __future__ import annotations

import numpy as np
import torch

from d3tom_export.merging.redundancy import nearest_similarities
from d3tom_export.model.lavida import Lavida


def test_each_token_is_held_against_all_others_at_every_layer(eager_model: Lavida) -> None:
    transformer = eager_model.transformer
    sequence = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([2, 3, 5, 8, 9])
    found = nearest_similarities(transformer, sequence, positions).numpy()
    assert found.shape == (transformer.config.n_layers, 5)

    x = sequence
    with torch.inference_mode():
        for layer, block in enumerate(transformer.blocks):
            rows = block.attn_norm(x)[0, positions].double().numpy()
            unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            for one in range(5):
                expected = max(float(unit[one] @ unit[other]) for other in range(5) if other != one)
                assert abs(found[layer, one] - expected) < 1e-5
            x = block(x, transformer.compact_rotary(x))


def test_twins_are_alike_and_opposites_are_not(eager_model: Lavida) -> None:
    sequence = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1))
    sequence[0, 1] = sequence[0, 0]
    first = nearest_similarities(eager_model.transformer, sequence, torch.tensor([0, 1]))[0]
    assert torch.allclose(first, torch.ones(2), atol=1e-6)
    sequence[0, 1] = -sequence[0, 0]
    first = nearest_similarities(eager_model.transformer, sequence, torch.tensor([0, 1]))[0]
    assert torch.allclose(first, -torch.ones(2), atol=1e-6)
