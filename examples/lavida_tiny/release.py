"""Writing a trained model as a released checkpoint is laid out: bf16, sharded, with the tensors nothing reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from d3tom_export.config import ModelConfig
from d3tom_export.families.registry import read_config
from d3tom_export.model.lavida import Lavida

from .batches import ANSWER_TOKENS, STEP_RATIO
from .geometry import EMBEDDING_ROWS, config_json
from .tokenizer import EOS, MASK, save_tokenizer, special_id

_SHARDS = 2
_VOCABULARY_TENSORS = ("model.transformer.wte.weight", "model.transformer.ff_out.weight")
_POST_LAYERNORM = "model.vision_tower.vision_tower.vision_model.post_layernorm."

_PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def raw_config(tokenizer: Tokenizer) -> dict[str, object]:
    """The checkpoint's config.json."""
    eos = special_id(tokenizer, EOS)
    return config_json(mask_id=special_id(tokenizer, MASK), eos_id=eos, pad_id=eos)


def model_config(tokenizer: Tokenizer) -> ModelConfig:
    """The checkpoint's geometry with table and head cut to the tokenizer's length, as it is trained."""
    return read_config(raw_config(tokenizer), vocab_rows=tokenizer.get_vocab_size())


def _stored_tensors(model: Lavida) -> dict[str, Tensor]:
    """All tensors of the checkpoint in bf16: the model's, vocabulary rows nothing uses, and the unused norm."""
    tensors = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    for name in _VOCABULARY_TENSORS:
        used = tensors[name]
        unused = torch.zeros(EMBEDDING_ROWS - len(used), used.shape[1], dtype=used.dtype)
        tensors[name] = torch.cat([used, unused])
    assert model.config.vision is not None
    width = model.config.vision.hidden_size
    tensors[f"{_POST_LAYERNORM}weight"] = torch.ones(width, dtype=torch.bfloat16)
    tensors[f"{_POST_LAYERNORM}bias"] = torch.zeros(width, dtype=torch.bfloat16)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_checkpoint(model: Lavida, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config.json, the shards with their index, and the tokenizer's and processor's files into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _stored_tensors(model)
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if len(shards) < _SHARDS and sum(held.nbytes for held in shards[-1].values()) >= total / _SHARDS:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, str(folder / file), metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors creates files that only their owner may read
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)
    config = raw_config(tokenizer)
    _write_json(folder / "config.json", config)
    assert model.config.vision is not None
    side = {"height": model.config.vision.image_size, "width": model.config.vision.image_size}
    _write_json(folder / "preprocessor_config.json", _PREPROCESSOR | {"size": side, "crop_size": side})
    generation = {"max_new_tokens": ANSWER_TOKENS, "step_ratio": STEP_RATIO, "schedule": "none"}
    _write_json(folder / "generation_config.json", generation)
    save_tokenizer(tokenizer, folder)
