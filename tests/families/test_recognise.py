"""A config is named for what it is before its fields are listed; absent is never taken for what is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.geometry import GEOMETRIES, raw_geometry
from d3tom_export.checkpoint.models import load_model
from d3tom_export.cli.main import main
from d3tom_export.errors import D3tomError
from d3tom_export.families.foreign import FOREIGN, foreign_model
from d3tom_export.families.registry import FAMILIES, read_config, recognise
from tests.conftest import raw_config
from tests.families.checkpoints import CONFIGS, LIKE_LLAMA, write_raw

LLADA_KEYS = raw_geometry("llada-8b")

# architectures, model_type, further keys: as the models' own files have them (backbones.md, 1).
FOREIGN_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "MMaDA": ({**LLADA_KEYS, "architectures": ["MMadaModelLM"], "model_type": "mmada"}, "MMaDA .*VQ tokenizer"),
    "MMaDA as llada": ({**LLADA_KEYS, "num_vq_tokens": 1024, "codebook_size": 8192}, "MMaDA .*VQ tokenizer"),
    "Lumina": ({**LLADA_KEYS, "architectures": ["LLaDAForMultiModalGeneration"]}, "Lumina-DiMOO"),
    "LaViDa-O": ({**raw_geometry("lavida-8b"), "d_model_gen": 2048, "mm_vqvae": "x"}, "LaViDa-O .*second branch"),
    "Dream-VL": ({"architectures": ["DreamVLModel"], "model_type": "dreamvl"}, "Dream-VL .*M-RoPE"),
    "Dimple": ({"model_type": "dimple", "hidden_size": 3584}, "Dimple .*M-RoPE"),
    "Dream": ({"architectures": ["DreamModel"], "model_type": "Dream", "hidden_size": 3584}, "Dream without eyes"),
    "LLaDA2": ({"architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe"}, "LLaDA2 .*mixture of experts"),
    "LLaDA-MoE": ({"architectures": ["LLaDAMoEModelLM"], "model_type": "llada"}, "LLaDA-MoE"),
    "SDAR-VL": (
        {"architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "sdar_v"},
        "SDAR .*computed once",
    ),
    "SDAR in text_config": (
        {"model_type": "llava_onevision", "text_config": {"model_type": "sdar", "architectures": ["SDAR"]}},
        "SDAR",
    ),
    "Fast-dVLM": ({"architectures": ["Fast_dVLMForConditionalGeneration"]}, "Fast-dVLM"),
    "DiffusionGemma": ({"architectures": ["DiffusionGemmaForBlockDiffusion"]}, "DiffusionGemma"),
    "Nemotron": ({"architectures": ["NemotronLabsDiffusionVLMModel"]}, "a diffusion model of Nemotron-Labs"),
    "LLaVA": ({"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama"}, "LLaVA .*autoregressive"),
    "Qwen2-VL": (
        {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"},
        "an autoregressive model",
    ),
    "LLaMA": ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "an autoregressive model"),
    "SigLIP": ({"architectures": ["SiglipModel"], "model_type": "siglip"}, "a vision tower alone .*--vision-tower"),
}


@pytest.mark.parametrize("name", FOREIGN_CONFIGS)
def test_a_model_that_is_not_built_is_named_for_what_it_is(name: str) -> None:
    raw, says = FOREIGN_CONFIGS[name]
    with pytest.raises(D3tomError, match=f"another architecture than this tool builds: {says}") as caught:
        read_config(raw, source="there/config.json")
    text = str(caught.value)
    assert text.startswith("there/config.json")
    assert "missing" not in text
    assert len(text) < 800


def test_every_kind_of_foreign_model_has_a_test() -> None:
    assert {foreign_model(raw) for raw, _ in FOREIGN_CONFIGS.values()} >= {
        kind for kind in FOREIGN if kind.title != "DiffusionVL"
    }


@pytest.mark.parametrize("name", GEOMETRIES)
def test_our_own_are_not_foreign(name: str) -> None:
    assert foreign_model(raw_geometry(name)) is None


@pytest.mark.parametrize("odd", [5, None, "LLaDAModelLM", [7, None], {"a": 1}, ["x" * 100_000], True])
@pytest.mark.parametrize("key", ["architectures", "model_type", "text_config"])
def test_odd_names_are_answered(key: str, odd: Any) -> None:
    with pytest.raises(D3tomError, match="another architecture") as caught:
        recognise({key: odd})
    assert len(str(caught.value)) < 600
    assert recognise({**LLADA_KEYS, key: odd}).name == "llada"


def test_an_unknown_architecture_is_told_as_it_calls_itself() -> None:
    with pytest.raises(D3tomError, match=r"it says architectures \['T5Model'\].*Known are .*LLaDA-V"):
        recognise({"architectures": ["T5Model"]})


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "method 'gptq', 4 bits"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "method 'awq', 4 bits"),
        ({"load_in_4bit": True, "load_in_8bit": False}, "method 'bitsandbytes', 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "method 'bitsandbytes', 8 bits"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "method 'fp8'"),
        ({"quant_method": "\x1b[2J" + "x" * 10_000}, "characters left out"),
        ({"group_size": 3}, "by a method that it does not name"),
        ("gptq", "expected none"),
    ],
)
@pytest.mark.parametrize("name", ["lavida-8b", "llada-v-8b", "lavida-dream-7b", "llada-8b"])
def test_a_quantized_checkpoint_is_refused_by_its_method(name: str, quantization: Any, says: str) -> None:
    raw = {**raw_geometry(name), "quantization_config": quantization}
    raw.pop("d_model", None)  # what it is comes before its fields
    with pytest.raises(D3tomError, match=says) as caught:
        read_config(raw)
    assert "\x1b" not in str(caught.value)
    assert "missing" not in str(caught.value)


@pytest.mark.parametrize(
    "quantization", [None, {}, {"load_in_4bit": False, "load_in_8bit": False, "quant_method": "bitsandbytes"}]
)
def test_a_note_of_no_quantization_is_none(quantization: Any) -> None:
    assert read_config({**LLADA_KEYS, "quantization_config": quantization}).family == "llada"


# What each original makes of a config without the key (its class's default), where that is another model.
ABSENT = {
    "llada-8b": [
        *("d_model", "n_layers", "n_heads", "mlp_hidden_size", "vocab_size", "mask_token_id", "rope_theta"),
        *("rms_norm_eps", "max_sequence_length", "rope", "block_type", "activation_type", "layer_norm_type"),
        *("weight_tying", "include_bias"),
    ],
    "llada-v-8b": [
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "rope_theta"),
        *("rms_norm_eps", "max_position_embeddings", "image_aspect_ratio", "mm_patch_merge_type", "mm_projector_type"),
    ],
    "lavida-dream-7b": [
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
        *("vocab_size", "mask_token_id", "rope_theta", "rms_norm_eps", "max_position_embeddings"),
        *("image_aspect_ratio", "mm_patch_merge_type", "mm_projector_type", "mm_spatial_pool_mode"),
    ],
}
ABSENT["lavida-8b"] = [
    *ABSENT["llada-8b"],
    *("image_aspect_ratio", "mm_patch_merge_type", "mm_projector_type", "mm_spatial_pool_mode"),
]
# And where the class's default is what is built.
MAY_BE_ABSENT = {
    "llada-8b": ["n_kv_heads", "include_qkv_bias", "attention_layer_norm", "embedding_size"],
    "lavida-8b": ["n_kv_heads", "include_qkv_bias", "attention_layer_norm", "mm_hidden_size"],
    "llada-v-8b": ["num_key_value_heads", "hidden_act", "attention_bias", "tie_word_embeddings", "rope_scaling"],
    "lavida-dream-7b": ["hidden_act", "tie_word_embeddings", "rope_scaling", "mm_vision_tower"],
}


@pytest.mark.parametrize("value", ["absent", None])
@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in ABSENT.items() for key in keys])
def test_what_the_original_reads_otherwise_must_be_there(name: str, key: str, value: str | None) -> None:
    raw = dict(raw_geometry(name)) | {key: value}
    if value == "absent":
        del raw[key]
    family = recognise(raw) if key not in ("d_model", "hidden_size", "mm_projector_type") else None
    with pytest.raises(D3tomError, match=key):
        read_config(raw, family=read_config(raw_geometry(name)).family if family is None else None)


@pytest.mark.parametrize(("name", "key"), [(name, keys) for name, keys in MAY_BE_ABSENT.items() for keys in keys])
def test_what_is_the_originals_default_may_be_absent(name: str, key: str) -> None:
    whole = raw_geometry(name)
    assert read_config({each: value for each, value in whole.items() if each != key}) == read_config(whole)


def test_a_tower_that_llada_v_does_not_name_is_missed() -> None:
    raw = {key: value for key, value in raw_geometry("llada-v-8b").items() if key != "mm_vision_tower"}
    assert read_config(raw).vision is None  # a language model; weights with eyes will not fit it


# What was case 10 of shared/cases when neither was built: their config keys are those of its case.py.


@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_llada_v_and_lavida_dream_are_read_and_counted(tmp_path: Path, family: str) -> None:
    folder = write_raw(tmp_path / family, CONFIGS[family])
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.family == family
    assert checkpoint.config.language.row_shift == (family == "lavida-dream")
    assert load_model(checkpoint).transformer.blocks[0].q_proj.weight.shape == (32, 32)
    done = CliRunner().invoke(main, ["flops", "--model", str(folder), "--layer", "1", "--json", "-"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["layers"] == 3


@pytest.mark.parametrize("family", LIKE_LLAMA)
@pytest.mark.parametrize("key", ["rope_theta", "image_aspect_ratio", "max_position_embeddings"])
def test_what_they_lack_is_named(tmp_path: Path, family: str, key: str) -> None:
    folder = write_raw(tmp_path / family, CONFIGS[family])
    (folder / "config.json").write_text(json.dumps({k: v for k, v in CONFIGS[family].items() if k != key}))
    done = CliRunner().invoke(main, ["flops", "--model", str(folder)])
    assert done.exit_code == 1
    assert f"required field {key} is missing" in done.stderr
    assert FAMILIES[family].title in done.stderr


@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_another_familys_weights_are_named_as_such(tmp_path: Path, family: str) -> None:
    folder = write_raw(tmp_path / family, CONFIGS[family])
    other = raw_config()
    write_raw(tmp_path / "other", other)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").hardlink_to(tmp_path / "other" / "model.safetensors")
    with pytest.raises(D3tomError, match="two models' files") as caught:
        open_checkpoint(folder)
    assert FAMILIES[family].title in str(caught.value)
    assert "LaViDa-LLaDA" in str(caught.value)
    assert len(str(caught.value)) < 600
