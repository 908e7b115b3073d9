"""Quantized weights on their way into a bundle: by samples or not, killed and taken up again, in what memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d3tom_export.checkpoint.folder import Checkpoint, open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.checkpoint.quantized import part_name
from d3tom_export.checkpoint.tensors import released_shapes
from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.errors import D3tomError
from d3tom_export.export import quantized_weights
from d3tom_export.export.build import build
from d3tom_export.export.calibrate import calibration_of
from d3tom_export.export.quantized_weights import drop_kept, place_quantized
from d3tom_export.export.request import BuildRequest, ModelSource, StageRequest
from d3tom_export.export.weights import demand_of
from d3tom_export.model.llada import LladaBlock
from d3tom_export.pipeline import Reader
from d3tom_export.progress import no_progress
from d3tom_export.prompt.samples import Sample
from d3tom_export.quantize.calibration import Calibration, Seen
from d3tom_export.quantize.matrices import FORMATS
from d3tom_export.quantize.plan import QuantizePlan, QuantizeRequest, plan_of
from d3tom_export.quantize.stored import nearest_parts
from tests.conftest import picture


@pytest.fixture(scope="module")
def checkpoint(checkpoint_folder: Path) -> Checkpoint:
    return open_checkpoint(checkpoint_folder)


def plan_for(checkpoint: Checkpoint, **asked: object) -> QuantizePlan:
    request = QuantizeRequest("int4", **asked)  # type: ignore[arg-type]
    return plan_of(released_shapes(checkpoint.config, checkpoint.vision_layers), request)


def by_samples(checkpoint: Checkpoint, count: int = 6) -> Calibration:
    reader = Reader.from_folder(checkpoint.folder, checkpoint.config)
    samples = [Sample(f"What is number {number}?", picture(60, 40, number), "A square.") for number in range(count)]
    return calibration_of(checkpoint, samples, reader, GenerationConfig(gen_length=8), no_progress)


def placed(checkpoint: Checkpoint, folder: Path, **options: object) -> Checkpoint:
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint.folder / "config.json").read_bytes())
    place_quantized(checkpoint, folder, plan_for(checkpoint), **options)  # type: ignore[arg-type]
    if isinstance(keep := options.get("keep"), Path):
        drop_kept(keep)  # as a build does once its bundle is in place
    return open_checkpoint(folder, vocab_rows=checkpoint.config.language.vocab_rows)


def numbers(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return dict(checkpoint.read(list(checkpoint.quantized)))


@torch.inference_mode()
def lost(checkpoint: Checkpoint, quantized: Checkpoint) -> float:
    """How far the last layer's output is from the unquantized model's, on rows that nothing was quantized by."""
    rows = torch.from_numpy(
        np.concatenate([each.numpy() for each in by_samples(checkpoint, 9)._rows[6:]], axis=1)  # three further samples
    )
    outputs = []
    for each in (checkpoint, quantized):
        transformer = load_model(each).transformer
        x, rotary = rows, transformer.compact_rotary(rows)
        for block in transformer.blocks:
            x = block(x, rotary)
        outputs.append(x)
    return ((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item()


def test_rounding_by_samples_loses_less(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plain = placed(checkpoint, tmp_path / "plain")
    better = placed(checkpoint, tmp_path / "better", calibration=by_samples(checkpoint))
    assert numbers(plain).keys() == numbers(better).keys()
    assert lost(checkpoint, better) < 0.9 * lost(checkpoint, plain)


@pytest.mark.parametrize("samples", [0, 3])
def test_what_was_killed_is_taken_up_again(
    samples: int, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calibration() -> Calibration | None:
        return by_samples(checkpoint, samples) if samples else None

    keep = tmp_path / "keep"
    whole = placed(checkpoint, tmp_path / "whole", calibration=calibration())
    written: list[str] = []
    write = quantized_weights.write_safetensors

    def until(stop: int) -> Callable[..., None]:
        def noting(path: Path, *arguments: object) -> None:
            if len(written) == stop:
                raise KeyboardInterrupt
            written.append(path.name)
            write(path, *arguments)  # type: ignore[arg-type]

        return noting

    monkeypatch.setattr(quantized_weights, "write_safetensors", until(2))
    with pytest.raises(KeyboardInterrupt):
        placed(checkpoint, tmp_path / "killed", keep=keep, calibration=calibration())
    monkeypatch.setattr(quantized_weights, "write_safetensors", until(100))
    again = placed(checkpoint, tmp_path / "again", keep=keep, calibration=calibration())
    assert len(written) == len(set(written)) == checkpoint.config.language.n_layers + 1
    assert not keep.exists()
    for mine, other in zip(numbers(again).values(), numbers(whole).values(), strict=True):
        assert torch.equal(mine, other)


def test_shards_of_other_settings_are_not_taken(checkpoint: Checkpoint, tmp_path: Path) -> None:
    keep, request = tmp_path / "keep", plan_for(checkpoint, block=16)
    (tmp_path / "folder").mkdir()

    class StopError(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise StopError

    with pytest.raises(StopError):
        place_quantized(checkpoint, tmp_path / "folder", request, keep=keep, progress=stop)
    assert len(list(keep.glob("*.safetensors"))) == 2
    again = placed(checkpoint, tmp_path / "again", keep=keep)
    plain = placed(checkpoint, tmp_path / "plain")
    assert all(torch.equal(mine, numbers(plain)[name]) for name, mine in numbers(again).items())


def test_what_is_not_ours_is_not_removed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "letter.txt").write_text("mine")
    with pytest.raises(D3tomError, match=r"letter\.txt"):
        placed(checkpoint, tmp_path / "folder", keep=keep)
    assert (keep / "letter.txt").read_text() == "mine"


def test_two_builds_of_one_output_do_not_write_into_each_other(checkpoint: Checkpoint, tmp_path: Path) -> None:
    keep = tmp_path / "keep"
    refusals: list[str] = []

    def meanwhile(what: str, done: int, total: int) -> None:
        if done == 1:
            (tmp_path / "second").mkdir()
            # Locks are of open files: a second one of the same process is kept out as another process's is.
            with pytest.raises(D3tomError, match="Another process is quantizing") as refusal:
                place_quantized(checkpoint, tmp_path / "second", plan_for(checkpoint), keep=keep)
            refusals.append(str(refusal.value))

    placed(checkpoint, tmp_path / "first", keep=keep, progress=meanwhile)
    assert refusals
    assert str(keep) in refusals[0]
    assert not list((tmp_path / "second").iterdir())
    assert not keep.exists()
    assert numbers(placed(checkpoint, tmp_path / "third", keep=keep))  # the lock went with its holder


@pytest.mark.parametrize("link", [True, False])
def test_a_place_that_is_no_folder_is_refused(link: bool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    keep, elsewhere = tmp_path / "keep", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if link:
        keep.symlink_to(elsewhere)
    else:
        keep.write_text("mine")
    with pytest.raises(D3tomError, match="is no folder"):
        placed(checkpoint, tmp_path / "folder", keep=keep)
    assert not list(elsewhere.iterdir())
    assert keep.is_symlink() == link


def test_the_disk_that_is_asked_for_is_what_is_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    placed(checkpoint, tmp_path / "folder")
    written = sum(path.stat().st_size for path in (tmp_path / "folder").glob("*.safetensors"))
    plain = demand_of(checkpoint, "link", ["uncached"])
    asked = demand_of(checkpoint, "link", ["uncached"], quantize=QuantizeRequest("int4"))
    headers = written - (asked.disk - plain.disk)
    entries = len(checkpoint.tensors) + len(plan_for(checkpoint).blocks)
    assert 0 < headers < 200 * entries  # their names, dtypes and places


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_shards_outlive_what_fails_after_the_last_of_them(
    error: type[BaseException], checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two builds that end at their first graph: the second one writes no weight anew."""
    written: list[str] = []
    write = quantized_weights.write_safetensors

    def noting(path: Path, *arguments: object) -> None:
        written.append(path.name)
        write(path, *arguments)  # type: ignore[arg-type]

    def until(what: str, done: int, total: int) -> None:
        if what.startswith("exporting"):
            raise error

    monkeypatch.setattr(quantized_weights, "write_safetensors", noting)
    stages, output = StageRequest(MergeConfig(1, 0.7), quantize=QuantizeRequest("int4")), tmp_path / "out"
    request = BuildRequest(ModelSource(checkpoint.folder), stages, output, self_check=0)
    for _ in range(2):
        with pytest.raises(error):
            build(request, until)
        assert [path.name for path in tmp_path.iterdir()] == [".out.quantizing"]
        kept = list((tmp_path / ".out.quantizing").glob("*.safetensors"))
        assert len(kept) == len(written) == checkpoint.config.language.n_layers + 1
        assert {path.stat().st_nlink for path in kept} == {1}


def test_what_is_not_ours_stays_when_shards_are_dropped(tmp_path: Path) -> None:
    drop_kept(tmp_path / "none")
    (tmp_path / "keep").mkdir()
    for name in ("letter.txt", "model-00001-of-00002.safetensors"):
        (tmp_path / "keep" / name).write_text("mine")
    drop_kept(tmp_path / "keep")
    assert [path.name for path in (tmp_path / "keep").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("samples", [0, 2])
def test_a_weight_that_is_not_finite_is_named(
    samples: int, number: float, checkpoint_folder: Path, tmp_path: Path
) -> None:
    source, name = tmp_path / "source", "model.transformer.blocks.1.up_proj.weight"
    shutil.copytree(checkpoint_folder, source)
    (file,) = [path for path in source.glob("*.safetensors") if name in load_file(path)]
    tensors = load_file(file)
    tensors[name][3, 5] = number
    save_file(tensors, file)
    broken = open_checkpoint(source)
    calibration = by_samples(broken, samples) if samples else None
    with pytest.raises(
        D3tomError, match=r"blocks\.1\.up_proj\.weight in .* int4: it holds numbers that are not finite"
    ):
        placed(broken, tmp_path / "placed", calibration=calibration)


@pytest.mark.parametrize(
    ("spoilt", "says"), [(float("nan"), "bring to it is not finite"), (-1.0, "bring to it cannot be inverted")]
)
def test_samples_that_no_weight_can_be_rounded_by_are_told(
    spoilt: float, says: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration, seen = by_samples(checkpoint, 1), Calibration._seen

    def spoiling(self: Calibration, block: LladaBlock) -> dict[str, Seen]:
        return {name: each._replace(products=each.products * spoilt) for name, each in seen(self, block).items()}

    monkeypatch.setattr(Calibration, "_seen", spoiling)
    with pytest.raises(D3tomError, match=rf"blocks\.0\.q_proj\.weight in .* {says}"):
        placed(checkpoint, tmp_path / "placed", calibration=calibration)


@pytest.mark.parametrize(
    ("name", "rounds", "says"),
    [
        ("model.transformer.wte.weight", False, r"wte\.weight is quantized, .* embedding table"),
        ("model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight", False, "is quantized, "),
        ("model.mm_projector.0.weight", True, r"projector\.0\.weight has a scale of inputs"),
        ("model.transformer.ff_out.weight", True, r"ff_out\.weight has a scale of inputs"),
    ],
)
def test_what_no_build_quantizes_is_refused_so(
    name: str, rounds: bool, says: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    ((_, weight),) = checkpoint.read([name], clip=False)
    form, folder = FORMATS["fp8"], tmp_path / "folder"
    parts = nearest_parts(weight, form, weight.shape[1]) | ({"_input": torch.tensor(0.5)} if rounds else {})
    tensors = {each: tensor.clone() for each, tensor in checkpoint.read(list(checkpoint.tensors), clip=False)}
    del tensors[name]
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint.folder / "config.json").read_bytes())
    save_file(
        tensors | {part_name(name, "fp8", part): each for part, each in parts.items()}, folder / "model.safetensors"
    )
    with pytest.raises(D3tomError, match=says):
        open_checkpoint(folder)
