"""Checkpoint folders: every defect named, nothing guessed."""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import empty_model, load_model
from d3tom_export.checkpoint.stored import read_array, stored_tensors
from d3tom_export.errors import D3tomError
from d3tom_export.model.lavida import Lavida
from tests.conftest import byte_tokenizer, raw_config, write_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(checkpoint_folder: Path, tmp_path: Path) -> Path:
    """A copy of the synthetic checkpoint to damage."""
    return Path(shutil.copytree(checkpoint_folder, tmp_path / "damaged"))


def _edit_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in raw.items() if value != "REMOVE"}))


def test_loads_shards_and_clips_the_vocabulary(checkpoint_folder: Path, eager_model: Lavida) -> None:
    shards = [load_file(path) for path in sorted(checkpoint_folder.glob("*.safetensors"))]
    assert len(shards) == 2
    stored = shards[0] | shards[1]
    rows = byte_tokenizer().get_vocab_size()
    loaded = eager_model.state_dict()
    assert loaded["model.transformer.wte.weight"].shape == (rows, 32)
    assert loaded["model.transformer.ff_out.weight"].shape == (272, 32)  # the release does not cut the head
    for name, tensor in loaded.items():
        assert torch.equal(tensor, stored[name][: len(tensor)]), name


def test_full_vocabulary_on_request(checkpoint_folder: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_folder, clip_vocabulary=False)
    assert checkpoint.config.language.vocab_rows == checkpoint.config.language.head_rows == 272
    transformer = load_model(checkpoint).transformer
    assert transformer.wte.weight.shape[0] == transformer.ff_out.weight.shape[0] == 272


def test_the_head_is_cut_with_the_table_where_config_json_unties_them(checkpoint_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "untied"
    shutil.copytree(checkpoint_folder, folder)
    _edit_config(folder, tie_word_embeddings=False)
    transformer = load_model(open_checkpoint(folder)).transformer
    assert transformer.wte.weight.shape == transformer.ff_out.weight.shape == (262, 32)


def test_a_single_file_loads_the_same_model(tmp_path: Path, eager_model: Lavida) -> None:
    single = load_model(open_checkpoint(write_checkpoint(tmp_path / "single", raw_config(), shards=1)))
    for name, tensor in eager_model.state_dict().items():
        assert torch.equal(tensor, single.state_dict()[name])


def test_bfloat16_loads_as_float32(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "bf16", raw_config(), shards=1)
    state = load_file(folder / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, folder / "model.safetensors")
    weight = load_model(open_checkpoint(folder)).transformer.blocks[0].q_proj.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, weight.bfloat16().float())


def test_the_tower_may_be_stored_with_or_without_its_last_layer(tmp_path: Path) -> None:
    tower = raw_config()["vision_config"]
    write_checkpoint(tmp_path / "cut", raw_config())
    raw = raw_config(vision_config=tower | {"num_hidden_layers": 2})
    shutil.copytree(tmp_path / "cut", tmp_path / "whole")
    (tmp_path / "whole" / "config.json").write_text(json.dumps(raw))
    picture = torch.randn(2, 3, 28, 28)
    features = [load_model(open_checkpoint(tmp_path / name)).encode_views(picture) for name in ("cut", "whole")]
    assert torch.equal(*features)


def test_a_language_only_checkpoint_loads(tmp_path: Path) -> None:
    raw = {k: v for k, v in raw_config().items() if "vision" not in k and "image" not in k}
    model = load_model(open_checkpoint(write_checkpoint(tmp_path / "text", raw)))
    assert not hasattr(model.model, "vision_tower")


def test_every_wrong_tensor_is_named_at_once(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    state = load_file(path)
    names = sorted(name for name in state if "blocks" in name)
    removed, reshaped = names[0], names[1]
    del state[removed]
    state[reshaped] = torch.zeros(3, 5)
    state["model.transformer.blocks.0.surprise"] = torch.zeros(2)
    save_file(state, path)
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    del index["weight_map"][removed]
    index_path.write_text(json.dumps(index))
    with pytest.raises(D3tomError) as caught:
        empty_model(open_checkpoint(folder))
    text = str(caught.value)
    assert f"missing: {removed}" in text
    assert "unexpected: model.transformer.blocks.0.surprise" in text
    assert f"misshapen: {reshaped} is [3, 5], expected" in text


def test_a_missing_layer_of_the_tower_is_named(folder: Path) -> None:
    _edit_config(folder, vision_config=raw_config()["vision_config"] | {"num_hidden_layers": 5})
    with pytest.raises(D3tomError, match=r"missing: .*encoder\.layers\.3\.layer_norm1\.weight"):
        empty_model(open_checkpoint(folder))


def test_a_missing_shard_and_a_truncated_one_are_both_named(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1000])
    with pytest.raises(D3tomError) as caught:
        open_checkpoint(folder)
    assert f"{first} does not exist" in str(caught.value)
    assert f"{second} is truncated" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, b"\xff" * 64, b"\x10" + b"\x00" * 7 + b"not json at all!"])
def test_a_file_that_is_not_safetensors_is_refused(folder: Path, content: bytes) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(content)
    with pytest.raises(D3tomError, match=path.name):
        open_checkpoint(folder)


def test_an_index_of_another_save_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(D3tomError, match=r"promises tensors .* model\.extra\.weight"):
        open_checkpoint(folder)


def test_shards_outside_the_folder_are_not_followed(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../outside.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(D3tomError, match=r"outside its folder: \.\./outside"):
        open_checkpoint(folder)


def test_the_index_decides_which_shard_a_tensor_comes_from(folder: Path, eager_model: Lavida) -> None:
    first, second = sorted(folder.glob("*.safetensors"))
    name = "model.transformer.blocks.0.q_proj.weight"
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    other = second if weight_map[name] == first.name else first
    save_file(load_file(other) | {name: torch.zeros(32, 32)}, other)
    assert torch.equal(load_model(open_checkpoint(folder)).state_dict()[name], eager_model.state_dict()[name])


@pytest.mark.parametrize(
    "entry",
    ["[1]", '{"a": "b"}', '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 3]}}', '{"a": {"dtype": null}}'],
)
def test_a_header_that_makes_no_sense_is_refused(folder: Path, entry: str) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(struct.pack("<Q", len(entry)) + entry.encode() + b"\0" * 64)
    with pytest.raises(D3tomError, match=f"{path.name} has a safetensors header"):
        open_checkpoint(folder)


def test_harmless_buffers_are_passed_over_and_integer_weights_are_not(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    tower = "model.vision_tower.vision_tower.vision_model.embeddings.position_ids"
    extra = {tower: torch.arange(49), "model.transformer.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(path) | extra, path)
    load_model(open_checkpoint(folder))
    name = next(name for name in load_file(path) if name.endswith("_proj.weight"))
    save_file({n: t.bool() if n == name else t for n, t in load_file(path).items()}, path)
    with pytest.raises(D3tomError, match=rf"not F64, F32, F16 or BF16: {name} \(BOOL\)"):
        empty_model(open_checkpoint(folder))


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw_config()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(D3tomError, match="pickles and are never opened"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"d_model": "REMOVE"}, "required field d_model is missing"),
        ({"rope_theta": "REMOVE", "n_layers": "REMOVE"}, "n_layers is missing; required field rope_theta is missing"),
        ({"rope": False}, "rope is False"),
        ({"weight_tying": True}, "weight_tying is True"),
        ({"d_model": 33}, "does not split into 4 heads"),
        ({"n_kv_heads": 3}, "not a multiple of n_kv_heads 3"),
        ({"n_layers": 0}, "n_layers is 0, expected a positive integer"),
        ({"n_layers": True}, "n_layers is True, expected a positive integer"),
        ({"rope_theta": "abc", "rms_norm_eps": [1]}, "rope_theta is 'abc', expected a positive number; rms_norm_eps"),
        ({"mask_token_id": "258"}, "mask_token_id is '258', expected a token id"),
        ({"eos_token_id": ["x"]}, "expected a token id"),
        ({"max_sequence_length": "640"}, "max_sequence_length is '640'"),
        ({"vision_config": [1]}, "expected an object with the tower's geometry"),
        ({"vision_config": raw_config()["vision_config"] | {"image_size": "28"}}, r"vision_config\.image_size is '28'"),
        ({"vision_config": raw_config()["vision_config"] | {"hidden_act": "relu"}}, "hidden_act is 'relu'"),
        ({"mask_token_id": 5000}, "mask_token_id 5000 lies outside"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"vision_config": "REMOVE"}, "no vision_config gives its geometry"),
        ({"image_grid_pinpoints": "REMOVE"}, "image_grid_pinpoints is missing"),
        ({"image_grid_pinpoints": [[30, 56]]}, "in multiples of 28"),
        ({"image_grid_pinpoints": [[5600, 5600]]}, "the largest of 31,360,000 pixels"),
        ({"n_layers": 10**9}, "n_layers is 1,000,000,000, expected a positive integer of at most 1,024"),
        ({"d_model": 10**12}, "d_model is 1,000,000,000,000, expected a positive integer of at most"),
        ({"vocab_size": 10**9}, "vocab_size 1,000,000,000 exceeds embedding_size 272"),
        ({"max_sequence_length": 10**9}, "max_sequence_length is 1,000,000,000, expected .* of at most 16,777,216"),
        ({"rope_theta": 1e-300}, r"rope_theta is 1e-300, expected a positive number from 1 to 1e\+12"),
        ({"rope_theta": 1e300}, r"rope_theta is 1e\+300, expected a positive number from 1 to 1e\+12"),
        ({"rms_norm_eps": 1e39}, r"rms_norm_eps is 1e\+39, expected a positive number from 1e-30 to 1"),
        ({"rope": 1}, "rope is 1, supported: True"),
        ({"include_qkv_bias": "false"}, "include_qkv_bias is 'false', expected true or false"),
        ({"eos_token_id": [257] * 10_000}, "eos_token_id has 10,000 ids, at most 64"),
        ({"eos_token_id": -1}, "expected a token id"),
        ({"vision_config": raw_config()["vision_config"] | {"num_hidden_layers": 10**9}}, "at most 1,024"),
        ({"vision_config": raw_config()["vision_config"] | {"image_size": 10**9}}, "in multiples of 1,000,000,000"),
        ({"vision_config": raw_config()["vision_config"] | {"patch_size": 29}}, "patch_size 29 exceeds image_size 28"),
        ({"image_aspect_ratio": "REMOVE"}, "required field image_aspect_ratio is missing"),
        ({"mm_patch_merge_type": "REMOVE"}, "required field mm_patch_merge_type is missing"),
        ({"mm_spatial_pool_mode": None}, "required field mm_spatial_pool_mode is missing"),
        ({"mm_projector_type": "REMOVE"}, "required field mm_projector_type is missing"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type is 'qformer', supported: None"),
    ],
)
def test_a_config_that_cannot_be_built_says_why(folder: Path, changes: dict[str, Any], says: str) -> None:
    _edit_config(folder, **changes)
    with pytest.raises(D3tomError, match=says) as caught:
        open_checkpoint(folder)
    assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"d_model": 10**9}, r"misshapen: .* is \[32\], expected \[1000000000\]"),
        ({"mlp_hidden_size": 10**9}, r"is \[32, 48\], expected \[32, 1000000000\]"),
        ({"vocab_size": 10**9, "embedding_size": 10**9}, r"wte\.weight is \[272, 32\], expected \[1000000000, 32\]"),
        ({"vision_config": raw_config()["vision_config"] | {"intermediate_size": 10**9}}, "expected .1000000000"),
        ({"n_layers": 1000}, r"missing: model\.transformer\.blocks\.10\.attn_norm.* and 8944 more"),
        ({"include_qkv_bias": True}, r"missing: model\.transformer\.blocks\.0\.k_proj\.bias"),
    ],
)
def test_sizes_are_held_against_the_tensors_before_any_module_is_made(
    folder: Path, changes: dict[str, Any], says: str
) -> None:
    _edit_config(folder, **changes)
    with pytest.raises(D3tomError, match=rf"do not fit its config\.json; .*{says}"):
        open_checkpoint(folder)


def test_broken_json_and_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(D3tomError, match="is not a folder"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(D3tomError, match=r"config\.json does not exist"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(D3tomError, match="cannot be read as JSON"):
        open_checkpoint(tmp_path)


def _edit_index(folder: Path, **shards: Any) -> None:
    """Rename shards in the index; the first tensor's shard where the name of a shard is ``first``."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if "first" in shards:
        index["weight_map"][next(iter(index["weight_map"]))] = shards.pop("first")
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("shard", "says"),
    [
        ("embed.onnx", r"'embed\.onnx' does not end in \.safetensors"),
        ("w1.dat", r"'w1\.dat' does not end in \.safetensors"),
        (".safetensors", r"does not end in"),
        ("a\x1b[2J.safetensors", "no plain name"),
        ("a\ud800.safetensors", "no plain name"),
        ("..", "outside its folder"),
        ("cpu/fp32/back.safetensors", "outside its folder"),
        ("/etc/passwd", "outside its folder"),
        ("a\\b.safetensors", "outside its folder"),
        ("x" * 300 + ".safetensors", "no plain name"),
        ("Model-00001-of-00002.safetensors", "some file systems take for the same file"),
        (7, "no names of files: 7"),
        (None, "no names of files: None"),
        ({"a": 1}, "no names of files"),
        ("none.safetensors", r"none\.safetensors does not exist"),
    ],
)
def test_shards_are_named_as_files_of_weights_are(folder: Path, shard: Any, says: str) -> None:
    _edit_index(folder, first=shard)
    with pytest.raises(D3tomError, match=says) as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 1000


def test_an_index_of_very_many_shards_or_tensors_is_answered_briefly(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {f"t{number}": f"{number}.safetensors" for number in range(5000)}}))
    with pytest.raises(D3tomError, match="names 5,000 shards, at most 1,000"):
        open_checkpoint(folder)
    shard = sorted(folder.glob("*.safetensors"))[0].name
    path.write_text(json.dumps({"weight_map": {f"tensor-{number}" * 3: shard for number in range(200_000)}}))
    with pytest.raises(D3tomError, match=r"promises tensors .* and 199988 more"):
        open_checkpoint(folder)


def test_names_of_very_many_tensors_do_not_flood_a_message(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "single", raw_config(), shards=1)
    state = load_file(folder / "model.safetensors")
    more = {f"\x1b[2J surprise {number}" * 5: torch.zeros(0) for number in range(30_000)}
    save_file(state | more, folder / "model.safetensors")
    with pytest.raises(D3tomError, match=r"unexpected: .* and 29980 more") as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 4100
    assert "\x1b" not in str(caught.value)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _secret(path: Path) -> None:
    (path.parent.parent / "secret").write_bytes(b"private")
    path.symlink_to("../secret")


@pytest.mark.parametrize("make", [_pipe, _device, _secret, os.mkdir])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "tokenizer.json"]
)
def test_only_regular_files_of_the_folder_are_opened(folder: Path, name: str, make: Any) -> None:
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(D3tomError, match=f"{name} is a "):
        open_checkpoint(folder)


def test_one_file_is_taken_before_an_index_whose_shards_are_gone(folder: Path) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    save_file(
        {name: tensor for path in shards for name, tensor in load_file(path).items()}, folder / "model.safetensors"
    )
    with pytest.raises(
        D3tomError, match=r"two saves of a model: model\.safetensors, and model\.safetensors\.index\.json"
    ):
        open_checkpoint(folder)
    shards[0].unlink()
    assert {tensor.file.name for tensor in stored_tensors(folder).values()} == {"model.safetensors"}
    open_checkpoint(folder)
    _edit_index(folder, first="../outside.safetensors")  # nobody knows what such an index is for
    with pytest.raises(D3tomError, match="outside its folder"):
        open_checkpoint(folder)


def test_an_index_may_name_the_one_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "single", raw_config(), shards=1)
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")})
    )
    assert open_checkpoint(folder).tensors.keys() == names.keys()


def test_weights_that_changed_since_their_headers_were_read_are_not(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    newline = checkpoint.tensors["model.image_newline"]
    with newline.file.open("ab") as file:
        file.write(b"x")
    with pytest.raises(D3tomError, match="was changed while it was in use"):
        read_array(newline)
    with pytest.raises(D3tomError, match="was changed while it was in use"):
        load_model(checkpoint)


def test_only_vectors_of_floats_are_read_whole(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    save_file({"model.image_newline": torch.arange(32)}, path)
    with pytest.raises(D3tomError, match="of I64 where a vector of F64, F32, F16 or BF16 is expected"):
        read_array(stored_tensors_of(path)["model.image_newline"])


def stored_tensors_of(path: Path) -> Any:
    from d3tom_export.trust.tensors import read_header

    return read_header(path)


_numbers = st.one_of(st.integers(-(2**64), 2**64), st.integers(0, 300), st.floats(), st.booleans(), st.none())
_json = st.recursive(
    st.one_of(_numbers, st.text(max_size=5), st.sampled_from([10**9, 10**400, 1e308, 1e-308])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_config_or_index_is_a_model_or_an_error_of_ours(checkpoint_folder: Path, data: st.DataObject) -> None:
    folder = checkpoint_folder.parent / "changed"  # the shards are linked; config and index are written anew
    if not folder.exists():
        shutil.copytree(checkpoint_folder, folder, copy_function=os.link)
    raw, original = copy.deepcopy(raw_config()), json.loads((checkpoint_folder / INDEX).read_text())
    index = copy.deepcopy(original)
    for _ in range(data.draw(st.integers(1, 2))):
        where = data.draw(st.sampled_from(["config", "tower", "index", "weight_map"]))
        target: Any = {"config": raw, "tower": raw.get("vision_config"), "index": index}.get(
            where, index.get("weight_map")
        )
        if isinstance(target, dict) and target:
            target[data.draw(st.sampled_from(sorted(target)))] = data.draw(_json)
    for name, content in (("config.json", raw), (INDEX, index)):
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(content))
    with suppress(D3tomError):
        empty_model(open_checkpoint(folder))
