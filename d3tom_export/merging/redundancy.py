"""How alike a picture's visual tokens are, layer by layer: the redundancy that merging lives on (the paper's figure 2).

B batch, L sequence, V visual tokens, N layers, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from d3tom_export.model.llada import Transformer


@torch.inference_mode()
def nearest_similarities(transformer: Transformer, sequence: Tensor, visual_positions: Tensor) -> Tensor:
    """Of every visual token, the cosine similarity to the other that it is most alike, at each layer: (N, V) float32.

    ``sequence`` (1, L, D) are the embeddings of a prompt, or of a prompt and an answer, that runs unmerged through all
    layers. Compared is what a merge compares: the input of a layer's attention, normed (algorithm.md, 4). Of
    ``visual_positions`` (V,) there are at least two.
    """
    x, found = sequence, []
    rotary = transformer.compact_rotary(x)
    for block in transformer.blocks:
        unit = F.normalize(block.attn_norm(x)[0, visual_positions].float(), dim=-1)
        similarity = unit @ unit.T
        found.append(similarity.fill_diagonal_(-1.0).amax(dim=-1))
        x = block(x, rotary)
    return torch.stack(found)
