"""What is stored of a quantized weight says all of it: written, found by name, read, and refused where it is broken."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from d3tom_export.checkpoint.quantized import QuantizedTensor, part_name, with_quantized
from d3tom_export.errors import D3tomError
from d3tom_export.quantize.matrices import FORMATS, Format, QuantizedMatrix, format_for, round_to_nearest
from d3tom_export.quantize.stored import (
    from_parts,
    nearest_parts,
    numbers_of,
    read_input_scale,
    read_quantized,
    to_parts,
)
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


@pytest.mark.parametrize("outputs", [33, 34])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_pieces_are_the_whole(name: str, asymmetric: bool, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if asymmetric and name != "int4":
        return
    form = format_for(name, asymmetric=asymmetric)  # type: ignore[arg-type]
    weight = weight_of(outputs, 256).bfloat16()
    block = 16 if name == "int4" else block_of(form, 256)
    matrix = round_to_nearest(weight.float(), form, block)
    whole = to_parts(matrix, form)
    for at_once in (7 * 256, 1 << 22):
        monkeypatch.setattr("d3tom_export.quantize.stored._AT_ONCE", at_once)
        for parts in (to_parts(matrix, form), nearest_parts(weight, form, block)):
            assert parts.keys() == whole.keys()
            assert all(
                torch.equal(part.reshape(-1).view(torch.uint8), whole[end].reshape(-1).view(torch.uint8))
                for end, part in parts.items()
            )
        assert torch.equal(numbers_of(whole, form), matrix.numbers)


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_not_rounded(number: float) -> None:
    weight = weight_of(8, 64)
    weight[3, 5] = number
    for form in FORMATS.values():
        with pytest.raises(ValueError, match="not finite"):
            nearest_parts(weight, form, block_of(form, 64))


def peak_of(call: Callable[[], object]) -> int:
    """Bytes that ``call`` took at its largest beyond what the process held before, its result's among them."""

    def held(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))

    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    call()
    return held("VmHWM") - before


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no largest memory is told here")
@pytest.mark.parametrize("name", ["int4", "nvfp4"])
def test_memory_holds_little_more_than_codes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An 8B model's head has half a billion numbers: 2 bytes each are a gibibyte."""
    monkeypatch.setattr("d3tom_export.quantize.stored._AT_ONCE", 1 << 18)
    form, weight = FORMATS[name], torch.ones(1 << 11, 1 << 12).bfloat16()  # type: ignore[index]
    block = block_of(form, 1 << 12)
    nearest_parts(weight[:64], form, block)
    assert peak_of(lambda: nearest_parts(weight, form, block)) < 3 * weight.numel()
    parts = nearest_parts(weight, form, block)
    assert peak_of(lambda: numbers_of(parts, form)) < 6 * weight.numel()


@pytest.mark.parametrize(
    ("name", "end", "number"),
    [
        ("int4", "_scale", float("nan")),
        ("int8", "_scale", float("inf")),
        ("int8", "_scale", 3e38),
        ("fp8", "_scale", -1.0),
        ("fp8", "", float("nan")),
        ("nvfp4", "_scale", float("nan")),
        ("nvfp4", "_whole", -1.0),
    ],
)
def test_parts_that_stand_for_no_number_are_refused(name: str, end: str, number: float, tmp_path: Path) -> None:
    form = FORMATS[name]  # type: ignore[index]
    part = to_parts(quantized(form), form)[end]
    part.view(-1)[0] = number
    tensor = stored(tmp_path, form, **{end: part})[NAME]
    with pytest.raises(D3tomError, match=rf"q_proj\.weight \({name}\) .* stand for no number"):
        read_quantized(tensor)


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf")])
def test_a_scale_of_inputs_is_above_zero(scale: float, tmp_path: Path) -> None:
    tensor = stored(tmp_path, FORMATS["fp8"], _input=torch.tensor(scale))[NAME]
    with pytest.raises(D3tomError, match="expected a number above 0"):
        read_input_scale(tensor)
