"""Folders that are something else than a checkpoint of a whole model: named for what they are, in one paragraph."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.checkpoint.wrappers import check_wrapping, wrapping
from d3tom_export.errors import D3tomError
from d3tom_export.families.registry import FAMILIES
from d3tom_export.model.lavida import Lavida
from tests.conftest import raw_config, write_checkpoint
from tests.families.checkpoints import CONFIGS, write_raw

State = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(checkpoint_folder: Path, tmp_path: Path) -> Path:
    """The synthetic checkpoint without its weights."""
    ignored = shutil.ignore_patterns("*.safetensors", "*.index.json")
    return Path(shutil.copytree(checkpoint_folder, tmp_path / "folder", ignore=ignored))


def _refusal(folder: Path, says: str, **more: Any) -> str:
    with pytest.raises(D3tomError, match=says) as caught:
        open_checkpoint(folder, **more)
    text = str(caught.value)
    assert str(folder) in text
    assert len(text) < 1000
    assert "\x1b" not in text
    assert "missing:" not in text
    return text


def _write(folder: Path, *names: str, content: str = "{}") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_named_with_its_base(folder: Path, with_config: bool, weights: str) -> None:
    if not with_config:
        (folder / "config.json").unlink()
    _write(folder, weights)
    assert "base" in _refusal(folder, r"is a LoRA adapter, and not a model.*merge_and_unload")
    base = json.dumps({"base_model_name_or_path": "GSAI-ML/LLaDA-V\x1b[2J" + "x" * 10_000})
    _write(folder, "adapter_config.json", content=base)
    assert "GSAI-ML/LLaDA-V" in _refusal(folder, "is a LoRA adapter of 'GSAI-ML/LLaDA-V.*characters left out")


def test_an_adapter_beside_a_model_is_read_in_neither_way(folder: Path, state: State) -> None:
    save_file(state, folder / WEIGHTS)
    _write(folder, "adapter_config.json", "adapter_model.safetensors")
    _refusal(folder, r"two ways: as a LoRA adapter \(adapter_config\.json\).* and as the model in model\.safetensors")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["model-Q4_K_M.gguf"], r"model-Q4_K_M\.gguf: GGUF, made for llama\.cpp"),
        (["model.onnx", "model.onnx_data"], r"model\.onnx: graphs or engines"),
        (["rank0.engine"], r"rank0\.engine: graphs or engines"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], "pickles and are never opened"),
        (["checkpoint.pt"], "pickles and are never opened"),
        (["tf_model.h5"], "TensorFlow or Flax"),
        (["model_index.json", "unet/config.json"], "pipeline of diffusers"),
        (["manifest.json"], "is a bundle, or a part of one"),
        (["checkpoint-1000/config.json", "checkpoint-2000/config.json"], "several .*checkpoint-1000, checkpoint-2000"),
        (["final/config.json", "logs/events"], "holds a checkpoint: final"),
        (["snapshots/0123abc/config.json", "refs/main"], "holds a checkpoint: snapshots/0123abc"),
        (["epoch-1/adapter_config.json"], "holds a checkpoint: epoch-1"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_a_folder_without_a_model_is_named_for_what_it_holds(
    folder: Path, files: list[str], says: str, with_config: bool
) -> None:
    if not with_config:
        (folder / "config.json").unlink()
    _write(folder, *files)
    _refusal(folder, says)


def test_which_model_it_is_comes_before_what_form_its_weights_have(folder: Path) -> None:
    _write(folder, "pytorch_model.bin")
    _write(folder, "config.json", content=json.dumps({**raw_config(), "model_type": "mmada"}))
    _refusal(folder, "another architecture than this tool builds: MMaDA")


def test_very_many_checkpoints_are_shortened(tmp_path: Path) -> None:
    _write(tmp_path, *(f"checkpoint-{number}\x1b/config.json" for number in range(300)))
    _refusal(tmp_path, "and 292 more. Name the one")


@pytest.mark.parametrize("file", ["model-00001-of-00004.safetensors", "consolidated.safetensors"])
def test_weights_without_an_index_are_named(folder: Path, file: str) -> None:
    _write(folder, file)
    _refusal(folder, rf"holds {file} and neither model\.safetensors nor model\.safetensors\.index\.json")


def test_what_lies_beside_a_whole_model_does_not_matter(folder: Path, state: State) -> None:
    save_file(state, folder / WEIGHTS)
    _write(folder, "a.gguf", "b.onnx", "pytorch_model.bin", "checkpoint-5/config.json", "model_index.json")
    open_checkpoint(folder)


def _lora(state: State) -> State:
    adapted = {}
    for name, tensor in state.items():
        stem = name.removesuffix(".weight")
        if stem.endswith(".q_proj"):
            adapted |= {f"{stem}.base_layer.weight": tensor, f"{stem}.lora_A.default.weight": torch.zeros(4, 32)}
        else:
            adapted[name] = tensor
    return {f"base_model.model.{name}": tensor for name, tensor in adapted.items()}


def _packed(ends: list[str], dtype: torch.dtype) -> Callable[[State], State]:
    def packed(state: State) -> State:
        made = {}
        for name, tensor in state.items():
            if "_proj.weight" in name and "blocks" in name:
                made |= {f"{name.removesuffix('.weight')}{end}": torch.zeros(2, 2, dtype=dtype) for end in ends}
            else:
                made[name] = tensor
        return made

    return packed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_lora, "LoRA adapter that is not merged .* such as base_model.*merge_and_unload"),
        (_packed([".qweight", ".qzeros", ".scales", ".g_idx"], torch.int32), "quantized: .* are GPTQ's"),
        (_packed([".qweight", ".qzeros", ".scales"], torch.int32), "quantized: .* are AWQ's or GPTQ's"),
        (_packed([".weight", ".SCB"], torch.int8), "quantized: .* bitsandbytes' 8 bits"),
        (_packed([".weight", ".weight.absmax"], torch.uint8), "quantized: .* bitsandbytes' 4 bits"),
        (_packed([".weight_packed", ".weight_scale"], torch.int32), "quantized: .* compressed-tensors'"),
        (_packed([".weight", ".weight_scale_inv"], torch.float8_e4m3fn), "quantized: .* fp8's"),
        (_packed([".weight"], torch.float8_e4m3fn), r"quantized: .* packed integers or numbers of 8 bits.*\(F8_E4M3\)"),
        (_packed([".weight"], torch.int8), r"quantized: .* packed integers or numbers of 8 bits.*\(I8\)"),
    ],
)
def test_weights_that_are_no_whole_models_own_are_named(
    folder: Path, state: State, change: Callable[[State], State], says: str
) -> None:
    save_file({name: tensor.clone() for name, tensor in change(state).items()}, folder / WEIGHTS)
    _refusal(folder, says)
    raw = raw_config(d_model=None)  # what the weights are comes before the config's fields
    (folder / "config.json").write_text(json.dumps(raw))
    _refusal(folder, says)


def test_empty_tensors_are_a_zero3_runs(folder: Path, state: State) -> None:
    save_file(
        {name: tensor if tensor.dim() < 2 else torch.zeros(0) for name, tensor in state.items()}, folder / WEIGHTS
    )
    _refusal(folder, r"weights in .* are empty: 46 of 79 .* is \[0\], expected \[.*ZeRO-3")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "base_model.model.", "_orig_mod.module.", "module.base_model.model.", "model."]
)
def test_a_wrappers_prefix_before_all_names_is_left_out_with_a_word(
    folder: Path, state: State, eager_model: Lavida, prefix: str
) -> None:
    save_file({prefix + name: tensor for name, tensor in state.items()}, folder / WEIGHTS)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.wrapping == prefix
    assert checkpoint.notes == [f"Note: every tensor's name begins with {prefix}, which is left out."]
    loaded, whole = load_model(checkpoint).state_dict(), eager_model.state_dict()
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)


def test_plain_names_are_not_noted(checkpoint_folder: Path) -> None:
    assert open_checkpoint(checkpoint_folder).notes == []


@pytest.mark.parametrize("prefix", ["module.", "model.", "base_model.model."])
def test_so_it_is_with_other_families_names(tmp_path: Path, prefix: str) -> None:
    folder = write_raw(tmp_path / "llada-v", CONFIGS["llada-v"])
    state = load_file(folder / WEIGHTS)
    save_file({prefix + name: tensor for name, tensor in state.items()}, folder / WEIGHTS)
    assert open_checkpoint(folder).wrapping == prefix


def _renamed(rename: Callable[[str], str]) -> Callable[[State], State]:
    return lambda state: {rename(name): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_renamed(lambda name: f"module.{name}" if "tower" in name else name), r"begin with the prefix module\., and"),
        (
            _renamed(lambda name: f"_orig_mod.{'module.' * ('wte' in name)}{name}"),
            r"1 of .* prefix _orig_mod\.module\.",
        ),
        (_renamed(lambda name: f"student.{name}"), r"the prefix student\., which is of no wrapper that is known"),
        (_renamed(lambda name: name.removeprefix("model.")), r"lack the prefix model\.: transformer\.wte\.weight"),
        (_renamed(lambda name: name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module.")), "_fsdp_wrapped_module"),
        (_renamed(lambda name: name.replace("blocks.2.", "blocks.2._orig_mod.")), r"left _orig_mod\. within names"),
    ],
)
def test_names_that_some_wrapper_changed_are_refused_with_the_prefix(
    folder: Path, state: State, change: Callable[[State], State], says: str
) -> None:
    save_file(change(state), folder / WEIGHTS)
    assert "Save the model itself" in _refusal(folder, f"saved from within something else: .*{says}")


def test_a_prefix_of_strangers_is_shown_and_not_obeyed(folder: Path, state: State) -> None:
    save_file({f"\x1b[2J{'x' * 3000}.{name}": tensor for name, tensor in state.items()}, folder / WEIGHTS)
    _refusal(folder, "characters left out")


def test_wrapping_goes_by_the_embedding_table() -> None:
    assert wrapping([]) == ""
    assert wrapping(["model.norm.weight", "model.layers.0.mlp"]) == ""  # no table: `model.` may be its own
    assert wrapping(["module.model.norm.weight"]) == "module."
    assert wrapping(["model.model.embed_tokens.weight", "model.lm_head.weight"]) == "model."
    assert wrapping(["model.embed_tokens.weight", "model.norm.weight"]) == ""


def test_a_family_may_have_names_without_our_field(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bird = replace(FAMILIES["llada"], stored_name=lambda name: name.replace("model.transformer.", "bird."))
    monkeypatch.setitem(FAMILIES, "parrot", bird)
    names = ["bird.wte.weight", "bird.ln_f.weight"]
    check_wrapping(tmp_path, names)
    assert wrapping(names) == ""
    assert wrapping([f"model.{name}" for name in names]) == "model."


def test_eyes_that_the_config_does_not_name(folder: Path, state: State) -> None:
    save_file(state, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(raw_config(mm_vision_tower=None, vision_config=None)))
    _refusal(folder, r"model with eyes .* names no vision tower \(mm_vision_tower\)")


def test_a_whole_folder_of_unreadable_kinds_is_no_crash(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "odd", raw_config(), shards=1)
    os.mkfifo(folder / "adapter_config.json")
    with pytest.raises(D3tomError):
        open_checkpoint(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(D3tomError, match="cannot be read as JSON"):
        open_checkpoint(folder)
