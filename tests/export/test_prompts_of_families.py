"""What a build stores of how a model is asked: stops as ids, its own template, a tokenizer that was built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from d3tom_export.bundle.manifest import MANIFEST_FILE
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.export import assemble
from d3tom_export.export.preflight import SelfCheck
from d3tom_export.export.request import StageRequest
from d3tom_export.families import lavida_dream, llada_v
from d3tom_export.families.registry import family_of, read_config
from d3tom_export.pipeline import Reader
from d3tom_export.prompt.settings import PromptSettings
from tests.conftest import byte_tokenizer, random_state
from tests.prompt.test_template import CHATML
from tests.prompt.test_vocabulary import ADDED, TRAINED, WHOLE, write_slow

ROWS = TRAINED.get_vocab_size() + len(ADDED)

LLADA_V = {
    "architectures": ["LlavaLLaDAModelLM"], "model_type": "llava_llada", "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 272,
    "tie_word_embeddings": False, "eos_token_id": 257, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 640, "mask_token_id": 258, "suppressed_token_ids": [256, 257],
}  # fmt: skip
DREAM = LLADA_V | {
    "architectures": ["LlavaDreamForMaskedDiffusion"], "model_type": "llava_dream", "vocab_size": ROWS + 9,
    "mask_token_id": ROWS - 1, "eos_token_id": TRAINED.get_vocab_size(),
}  # fmt: skip

Build = Callable[..., dict[str, Any]]


def _checkpoint(folder: Path, raw: dict[str, Any]) -> Path:
    folder.mkdir()
    config = read_config(raw)
    name = family_of(config).stored_name
    save_file({name(key): tensor for key, tensor in random_state(config).items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Build:
    """Builds a checkpoint but for its graphs, and gives the manifest."""
    monkeypatch.setattr(assemble, "export_stage", lambda spec, module, path, places: path.touch() or [])
    monkeypatch.setattr(assemble, "write_tuned", lambda *arguments: None)

    def run(folder: Path, generation: GenerationConfig, name: str = "bundle") -> dict[str, Any]:
        target = tmp_path / name
        target.mkdir()
        request = StageRequest(MergeConfig(1, 0.7))
        assemble.build_bundle(open_checkpoint(folder), request, generation, target, check=SelfCheck(0))
        return json.loads((target / MANIFEST_FILE).read_text())

    return run


def test_a_familys_stops_are_ids_unless_others_are_given(built: Build, tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path / "llada-v", LLADA_V)
    without = built(folder, GenerationConfig(8), "without")  # no tokenizer: nobody is asked in text
    assert without["generation"]["stop_ids"] == []
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    manifest = built(folder, GenerationConfig(8), "own")
    assert manifest["generation"]["stop_ids"] == [[tokenizer.token_to_id("<|eot_id|>")]]
    assert PromptSettings.from_json(manifest["prompt"]) == PromptSettings.of_family(llada_v.FAMILY)
    other = built(folder, GenerationConfig(8, stop_ids=((1, 2),)), "other")
    assert other["generation"]["stop_ids"] == [[1, 2]]


def test_a_slow_tokenizer_becomes_the_bundles(built: Build, tmp_path: Path) -> None:
    folder = write_slow(_checkpoint(tmp_path / "dream", DREAM), chat_template=CHATML, bos_token="<|beginoftext|>")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.language.vocab_rows == ROWS
    assert open_checkpoint(folder, clip_vocabulary=False).config.language.vocab_rows == ROWS + 9
    manifest = built(folder, GenerationConfig(8))
    assert manifest["model"]["vocab_rows"] == ROWS
    settings = PromptSettings.from_json(manifest["prompt"])
    assert settings == PromptSettings.of_family(lavida_dream.FAMILY)
    bundle = tmp_path / "bundle"
    assert "tokenizer.json" in manifest["files"]
    assert not (bundle / "vocab.json").exists()
    reader = Reader.from_folder(bundle, checkpoint.config, settings)
    asked = f"<|im_start|>system\n{settings.system}<|im_end|>\n<|im_start|>user\nIs it?<|im_end|>\n"
    assert reader.token_ids("Is it?", 0) == WHOLE.encode(f"{asked}<|im_start|>assistant\n").ids


def test_a_tokenizer_of_fewer_rows_than_the_mask_is_refused(tmp_path: Path) -> None:
    folder = write_slow(_checkpoint(tmp_path / "dream", DREAM | {"mask_token_id": ROWS}))
    with pytest.raises(D3tomError, match=f"mask_token_id {ROWS} lies outside the {ROWS} usable vocabulary rows"):
        open_checkpoint(folder)
