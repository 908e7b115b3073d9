"""What is stored of a quantized weight says all of it: written, found by name, read, and refused where it is broken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from d3tom_export.checkpoint.quantized import QuantizedTensor, part_name, with_quantized
from d3tom_export.errors import D3tomError
from d3tom_export.quantize.matrices import FORMATS, Format, QuantizedMatrix, format_for, round_to_nearest
from d3tom_export.quantize.stored import from_parts, read_input_scale, read_quantized, to_parts
from d3tom_export.trust.tensors import read_header
from tests.quantize.test_matrices import block_of, weight_of

NAME = "model.transformer.blocks.0.q_proj.weight"


def quantized(form: Format, outputs: int = 33) -> QuantizedMatrix:
    return round_to_nearest(weight_of(outputs, 64), form, block_of(form, 64))


def stored(folder: Path, form: Format, **changed: Tensor | None) -> dict[str, QuantizedTensor]:
    parts = to_parts(quantized(form), form) | changed
    tensors = {part_name(NAME, form.name, part): tensor for part, tensor in parts.items() if tensor is not None}
    save_file(tensors | {"other": torch.zeros(3)}, folder / "model.safetensors")
    found = with_quantized(read_header(folder / "model.safetensors"), folder)
    assert found.keys() == {NAME, "other"}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, QuantizedTensor)}


@pytest.mark.parametrize("name", FORMATS)
def test_parts_are_all_there_is_to_know(name: str, tmp_path: Path) -> None:
    form = FORMATS[name]  # type: ignore[index]
    matrix = quantized(form)
    again = from_parts(to_parts(matrix, form), form)
    for mine, other in zip(matrix[:3], again[:3], strict=True):
        assert torch.equal(mine, other)
    assert again.input_scale is None
    tensor = stored(tmp_path, form)[NAME]
    assert (tensor.format, tensor.shape, tensor.block) == (name, (33, 64), (form.block and min(form.block, 64)) or 64)
    assert tensor.name == NAME
    assert torch.equal(read_quantized(tensor), matrix.numbers)
    bits = 8 * (tensor.length - tensor.scale.length - (4 if tensor.whole else 0)) / (33 * 64)
    assert bits == form.grid.bits


def test_the_scale_of_inputs_is_stored_with_the_weight(tmp_path: Path) -> None:
    form = FORMATS["fp8"]
    matrix = quantized(form)._replace(input_scale=torch.tensor(0.25))
    assert from_parts(to_parts(matrix, form), form).input_scale == 0.25
    tensor = stored(tmp_path, form, _input=torch.tensor(0.25))[NAME]
    assert read_input_scale(tensor) == 0.25
    assert torch.equal(read_quantized(tensor), matrix.numbers)
    assert read_input_scale(stored(tmp_path, form)[NAME]) is None


def test_zero_points_are_stored_with_the_scales(tmp_path: Path) -> None:
    form = format_for("int4", asymmetric=True)
    matrix = round_to_nearest(weight_of(33, 128), form, 64)
    again = from_parts(to_parts(matrix, form), form)
    assert matrix.zeros is not None
    assert again.zeros is not None
    assert torch.equal(again.zeros, matrix.zeros)
    tensors = {part_name(NAME, "int4", part): tensor for part, tensor in to_parts(matrix, form).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tensor,) = with_quantized(read_header(tmp_path / "model.safetensors"), tmp_path).values()
    assert isinstance(tensor, QuantizedTensor)
    assert tensor.zero is not None
    assert torch.equal(read_quantized(tensor), matrix.numbers)


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        ("int4", {"_scale": None}, "lacks int4_scale"),
        ("nvfp4", {"_whole": None}, "lacks nvfp4_whole"),
        ("int4", {"_whole": torch.ones(())}, "has int4_whole too"),
        ("int4", {"": torch.zeros(33 * 64, dtype=torch.uint8).view(torch.int8)}, "codes of I8"),
        ("int4", {"": torch.zeros(33 * 31 + 1, dtype=torch.uint8)}, "has scales of F32 and shape"),
        ("int4", {"_scale": torch.ones(7, 33)}, "has scales of F32 and shape [7, 33]"),
        ("int4", {"_scale": torch.ones(8, 33)}, "has scales of F32 and shape [8, 33]"),
        ("int4", {"_zero": torch.zeros(17, dtype=torch.uint8)}, "has zero points of U8 and shape [17]"),
        ("fp8", {"_zero": torch.zeros(17, dtype=torch.uint8)}, "has fp8_zero too"),
        ("int8", {"_scale": torch.ones(34)}, "has scales of F32 and shape [34]"),
        ("fp8", {"_input": torch.ones(2)}, "not one float32 number"),
        ("nvfp4", {"_scale": torch.ones(4, 33)}, "has scales of F32"),
    ],
)
def test_broken_parts_are_refused(name: str, changed: dict[str, Tensor | None], says: str, tmp_path: Path) -> None:
    with pytest.raises(D3tomError) as refusal:
        stored(tmp_path, FORMATS[name], **changed)  # type: ignore[index]
    assert says in str(refusal.value)
    assert NAME in str(refusal.value)


def test_a_weight_is_there_once(tmp_path: Path) -> None:
    tensors = {
        part_name(NAME, form.name, part): tensor
        for form in (FORMATS["int8"], FORMATS["fp8"])
        for part, tensor in to_parts(quantized(form), form).items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(D3tomError, match="is there as fp8, int8"):
        with_quantized(read_header(tmp_path / "model.safetensors"), tmp_path)
