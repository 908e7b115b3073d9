"""The table of released names and shapes against the modules that bear them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from d3tom_export.bundled import bundled_model
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.geometry import GEOMETRIES, raw_geometry
from d3tom_export.checkpoint.tensors import released_shapes
from d3tom_export.config import CONFIG_FILE, TOKENIZER_FILE
from d3tom_export.families.registry import read_config
from d3tom_export.model.lavida import Lavida
from d3tom_export.prompt.chat import load_tokenizer
from tests.conftest import raw_config

CONFIGS: dict[str, dict[str, Any]] = {
    **{name: raw_geometry(name) for name in GEOMETRIES},
    "grouped queries": raw_config(),
    "biases, one key head": raw_config(include_qkv_bias=True, n_kv_heads=None, multi_query_attention=True),
    "no eyes": {name: value for name, value in raw_config().items() if "vision" not in name},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cut", [0, 1])
def test_the_table_is_the_models_state(name: str, cut: int) -> None:
    config = read_config(CONFIGS[name])
    layers = config.vision.num_hidden_layers - cut if config.vision else None
    with torch.device("meta"):
        state = Lavida(config, layers).state_dict()
    assert released_shapes(config, layers) == {key: tuple(tensor.shape) for key, tensor in state.items()}


def test_all_but_the_last_layer_of_the_tower_is_what_releases_store() -> None:
    config = read_config(raw_config())
    assert config.vision is not None
    assert released_shapes(config) == released_shapes(config, config.vision.num_hidden_layers - 1)


def test_a_cut_vocabulary_is_stored_whole(tmp_path: Path) -> None:
    stored = open_checkpoint(bundled_model()).tensors
    raw = json.loads((bundled_model() / CONFIG_FILE).read_text())
    used = load_tokenizer(bundled_model() / TOKENIZER_FILE).get_vocab_size()
    shapes = released_shapes(read_config(raw, vocab_rows=used))
    table = stored["model.transformer.wte.weight"].shape
    assert shapes["model.transformer.wte.weight"] == table == (raw["embedding_size"], raw["d_model"])
    assert table[0] > used
