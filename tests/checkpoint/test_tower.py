"""A checkpoint that was saved without its vision tower, and towers from elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.checkpoint.stored import stored_tensors
from d3tom_export.checkpoint.tensors import TOWER
from d3tom_export.cli.main import main
from d3tom_export.errors import D3tomError
from d3tom_export.export.weights import TOWER_FILE, WeightsMode, bytes_to_write, place_weights
from d3tom_export.model.lavida import Lavida
from tests.conftest import raw_config, write_checkpoint
from tests.families.checkpoints import CONFIGS, LIKE_LLAMA, write_raw

State = dict[str, torch.Tensor]
GEOMETRY = raw_config()["vision_config"]
WEIGHTS = "model.safetensors"


@pytest.fixture
def blind(checkpoint_folder: Path, tmp_path: Path) -> Path:
    """The synthetic checkpoint without its tower, in two shards."""
    folder = Path(shutil.copytree(checkpoint_folder, tmp_path / "blind"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if not name.startswith(TOWER)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in folder.glob("*.safetensors"):
        save_file({name: tensor for name, tensor in load_file(path).items() if not name.startswith(TOWER)}, path)
    return folder


def _one_file(blind: Path, prefix: str = "") -> Path:
    state = {prefix + name: tensor for path in blind.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in [*blind.glob("*.safetensors"), blind / "model.safetensors.index.json"]:
        path.unlink()
    save_file(state, blind / WEIGHTS)
    return blind


@pytest.fixture
def siglip(state: State, tmp_path: Path) -> Path:
    """The tower as SigLIP is published: a layer more, a text model and a head, names of its own."""
    folder = tmp_path / "siglip"
    folder.mkdir()
    tower = {f"vision_model.{name[len(TOWER) :]}": tensor for name, tensor in state.items() if name.startswith(TOWER)}
    last = {
        name.replace("layers.1.", "layers.2."): torch.zeros_like(t) for name, t in tower.items() if "layers.1." in name
    }
    others = {
        "text_model.embeddings.token_embedding.weight": torch.zeros(9, 24),
        "text_model.encoder.layers.0.self_attn.k_proj.weight": torch.zeros(24, 24),
        "vision_model.head.probe": torch.zeros(1, 1, 24),
        "logit_scale": torch.zeros(1),
    }
    save_file(tower | last | others, folder / WEIGHTS)
    raw = {"architectures": ["SiglipModel"], "model_type": "siglip", "text_config": {"hidden_size": 9}}
    (folder / "config.json").write_text(json.dumps({**raw, "vision_config": {**GEOMETRY, "layer_norm_eps": 1e-6}}))
    return folder


def test_a_missing_tower_is_said_and_what_to_do(blind: Path) -> None:
    says = r"without its vision tower: .*\(mm_vision_tower 'siglip-test'\).*--vision-tower DIR"
    with pytest.raises(D3tomError, match=says) as caught:
        open_checkpoint(blind)
    assert "encoder.layers" not in str(caught.value)


@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_so_it_is_for_the_other_families(tmp_path: Path, family: str) -> None:
    folder = write_raw(tmp_path / family, CONFIGS[family])
    kept = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if not name.startswith(TOWER)}
    whole = write_raw(tmp_path / "whole", CONFIGS[family])
    save_file(kept, folder / WEIGHTS)
    with pytest.raises(D3tomError, match="without its vision tower"):
        open_checkpoint(folder)
    borrowed, own = open_checkpoint(folder, vision_tower=whole), open_checkpoint(whole)
    unused = own.tensors.keys() - borrowed.tensors.keys()
    assert unused == {"model.vision_tower.vision_tower.vision_model.post_layernorm.weight"}
    assert not borrowed.tensors.keys() - own.tensors.keys()


def test_a_published_tower_takes_its_place_without_its_last_layer(
    blind: Path, siglip: Path, eager_model: Lavida
) -> None:
    checkpoint = open_checkpoint(blind, vision_tower=siglip)
    assert checkpoint.notes == [f"Note: the vision tower is that of {siglip}; {blind} has none."]
    loaded, whole = load_model(checkpoint).state_dict(), eager_model.state_dict()
    assert loaded.keys() == whole.keys()
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)


def test_a_whole_checkpoints_tower_does_too(blind: Path, checkpoint_folder: Path, eager_model: Lavida) -> None:
    model = load_model(open_checkpoint(blind, vision_tower=checkpoint_folder))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), eager_model.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["link", "copy", "float16"])
@pytest.mark.parametrize("form", ["two shards", "one file", "wrapped"])
def test_a_bundle_holds_the_tower_and_is_a_checkpoint(
    blind: Path, siglip: Path, tmp_path: Path, eager_model: Lavida, mode: WeightsMode, form: str
) -> None:
    if form != "two shards":
        _one_file(blind, "module." if form == "wrapped" else "")
    checkpoint = open_checkpoint(blind, vision_tower=siglip)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(blind / name, bundle)
    place_weights(checkpoint, bundle, mode)
    written = [path for path in bundle.glob("*.safetensors") if path.stat().st_nlink == 1]
    header = 12_000  # of names and places, in all files
    assert abs(sum(path.stat().st_size for path in written) - bytes_to_write(checkpoint, mode)) < header
    assert (bundle / TOWER_FILE).exists() == (mode != "float16")
    again = open_checkpoint(bundle)
    assert again.tower_folder is None
    assert again.wrapping == ("module." if form == "wrapped" else "")
    loaded, whole = load_model(again).state_dict(), eager_model.state_dict()
    for name, tensor in whole.items():
        expected = tensor.half().float() if mode == "float16" else tensor
        assert torch.equal(loaded[name], expected), name
    assert not any("text_model" in name for name in stored_tensors(bundle))


def _edit(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["vision_config"] = {k: v for k, v in (raw["vision_config"] | changes).items() if v != "REMOVE"}
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads 4, expected 2"),
        ({"num_attention_heads": "REMOVE"}, "num_attention_heads 12, expected 2"),  # SigLIP's default
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05, expected 1e-06"),
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu', expected 'gelu_pytorch_tanh'"),
        ({"image_size": 56, "patch_size": 8}, "image_size 56, expected 28"),
    ],
)
def test_a_tower_of_another_geometry_is_refused(blind: Path, siglip: Path, changes: dict[str, Any], says: str) -> None:
    _edit(siglip, **changes)
    with pytest.raises(D3tomError, match=f"another than the checkpoint's config describes: .*{says}"):
        open_checkpoint(blind, vision_tower=siglip)


def test_its_tensors_are_held_against_the_config(blind: Path, siglip: Path) -> None:
    state = load_file(siglip / WEIGHTS)
    state["vision_model.embeddings.position_embedding.weight"] = torch.zeros(16, 24)
    state["vision_model.encoder.layers.0.mlp.fc1.bias"] = torch.zeros(40, dtype=torch.int64)
    del state["vision_model.encoder.layers.1.mlp.fc2.bias"]
    save_file(state, siglip / WEIGHTS)
    with pytest.raises(D3tomError) as caught:
        open_checkpoint(blind, vision_tower=siglip)
    text = str(caught.value)
    assert "vision_model.embeddings.position_embedding.weight is [16, 24], expected [49, 24]" in text
    assert "encoder.layers.1.mlp.fc2.bias is missing" in text
    assert "fc1.bias is of I64, expected F64" in text
    save_file({name: tensor for name, tensor in state.items() if "layers.1" not in name}, siglip / WEIGHTS)
    kept = {name: tensor for name, tensor in state.items() if "layers.1" not in name and "layers.2" not in name}
    save_file(kept, siglip / WEIGHTS)
    with pytest.raises(D3tomError, match="has 1 layers, expected 3, or one less"):
        open_checkpoint(blind, vision_tower=siglip)


def test_a_folder_without_a_tower_is_refused(blind: Path, tmp_path: Path) -> None:
    with pytest.raises(D3tomError, match=r"none is not a folder\. --vision-tower"):
        open_checkpoint(blind, vision_tower=tmp_path / "none")
    with pytest.raises(D3tomError, match=r"has no vision tower that can be taken: .* found none"):
        open_checkpoint(blind, vision_tower=blind)


def test_a_tower_goes_with_nothing_that_has_one_or_needs_none(
    checkpoint_folder: Path, siglip: Path, tmp_path: Path
) -> None:
    with pytest.raises(D3tomError, match=r"has a vision tower of its own\. Leave the option out"):
        open_checkpoint(checkpoint_folder, vision_tower=siglip)
    raw = {name: value for name, value in raw_config().items() if "vision" not in name}
    with pytest.raises(D3tomError, match="has no eyes"):
        open_checkpoint(write_checkpoint(tmp_path / "text", raw), vision_tower=siglip)


def test_the_commands_take_it(blind: Path, siglip: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    flops = ["flops", "--model", str(blind), "--layer", "1"]
    assert "--vision-tower DIR" in runner.invoke(main, flops).stderr
    done = runner.invoke(main, [*flops, "--vision-tower", str(siglip)])
    assert done.exit_code == 0, done.output
    assert "the vision tower is that of" in done.stderr
    build = [
        "build",
        "--layer",
        "1",
        "--self-check",
        "0",
        "--max-memory",
        "0.0001",
        "--output",
        str(tmp_path / "never"),
    ]
    done = runner.invoke(main, [*build, "--model", str(blind), "--vision-tower", str(siglip)])
    assert done.exit_code == 1
    assert "--max-memory" in done.stderr  # it got as far as counting memory
    assert "the vision tower is that of" in done.stderr
    done = runner.invoke(main, [*build, "--vision-tower", str(siglip)])
    assert done.exit_code == 2
    assert "give that with --model" in done.stderr
