"""The language head in few bits: of the rows in use, which some families cut to the tokenizer's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from d3tom_export.checkpoint.folder import Checkpoint, open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.checkpoint.tensors import LANGUAGE_HEAD, product_shapes
from d3tom_export.config import QuantFormat
from d3tom_export.export.quantized_weights import place_quantized
from d3tom_export.export.weights import demand_of
from d3tom_export.quantize.plan import QuantizeRequest, plan_of
from tests.conftest import Invoke
from tests.families.checkpoints import CONFIGS, LIKE_LLAMA, write_family


def placed(checkpoint: Checkpoint, folder: Path, request: QuantizeRequest) -> Checkpoint:
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint.folder / "config.json").read_bytes())
    place_quantized(checkpoint, folder, plan_of(product_shapes(checkpoint.config, checkpoint.vision_layers), request))
    return open_checkpoint(folder, vocab_rows=checkpoint.config.language.vocab_rows)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("form", ["int4", "int8", "nvfp4"])
def test_a_folder_with_its_head_in_few_bits_is_a_checkpoint(family: str, form: QuantFormat, tmp_path: Path) -> None:
    checkpoint, request = open_checkpoint(write_family(tmp_path / "source", family)), QuantizeRequest(form, head=True)
    language = checkpoint.config.language
    assert (language.head_rows < language.embedding_size) == (family in LIKE_LLAMA)
    again = placed(checkpoint, tmp_path / "placed", request)
    assert again.quantized[LANGUAGE_HEAD].shape == (language.head_rows, language.d_model)
    head, whole = (load_model(each).transformer.ff_out.weight for each in (again, checkpoint))
    assert head.shape == whole.shape
    assert 0 < (head - whole).norm() / whole.norm() < 0.15
    written = sum(path.stat().st_size for path in again.folder.glob("*.safetensors"))
    kinds = len(again.tensors) + 3 * len(again.quantized)
    loops = demand_of(checkpoint, "link", ["uncached"]).disk
    asked = demand_of(checkpoint, "link", ["uncached"], quantize=request).disk - loops
    assert 0 < written - asked < 200 * kinds  # headers: names, dtypes and places


def test_a_head_with_an_odd_number_of_zero_points_stays_as_it_is(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "source", "llada-v")
    checkpoint = open_checkpoint(folder, vocab_rows=261)  # of 272 that are stored
    request = QuantizeRequest("int4", 32, head=True, asymmetric=True)
    plan = plan_of(product_shapes(checkpoint.config, checkpoint.vision_layers), request)
    assert "odd number of zero points" in plan.kept[LANGUAGE_HEAD]
    again = placed(checkpoint, tmp_path / "placed", request)
    ((_, mine),), ((_, other),) = (list(each.read([LANGUAGE_HEAD])) for each in (again, checkpoint))
    assert torch.equal(mine, other)
    even = QuantizeRequest("int4", 16, head=True, asymmetric=True)
    assert LANGUAGE_HEAD in placed(checkpoint, tmp_path / "even", even).quantized


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_a_bundle_with_its_head_in_few_bits_passes_its_self_check(family: str, invoke: Invoke, tmp_path: Path) -> None:
    source, bundle = write_family(tmp_path / "source", family), tmp_path / "bundle"
    made = invoke(
        "build", "--model", source, "--layer", 1, "--ratio", 0.7, "--gen-length", 8, "--self-check", 1,
        "--quantize", "int8", "--quantize-head", "--output", bundle,
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "Self-check passed: " in made.stdout
    shown = invoke("inspect", bundle)
    assert shown.exit_code == 0, shown.output
