"""How weights get into a bundle, and what a build needs: links, copies, conversions, random ones, the preflight."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.checkpoint.companions import copy_companions
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.geometry import GEOMETRIES, geometry_config, raw_geometry
from d3tom_export.checkpoint.models import empty_model, load_model
from d3tom_export.checkpoint.stored import read_array, stored_tensors
from d3tom_export.checkpoint.tensors import released_shapes
from d3tom_export.config import LOOPS
from d3tom_export.errors import D3tomError
from d3tom_export.export import weights as weights_module
from d3tom_export.export.preflight import GIB, Demand, SelfCheck, demand, free_memory, plan
from d3tom_export.export.request import WeightsMode
from d3tom_export.export.weights import (
    bytes_to_write,
    check_linkable,
    demand_of,
    files_of,
    place_weights,
    used_tensors,
    write_geometry,
)
from d3tom_export.families.registry import recognise


def test_linked_weights_are_the_checkpoints_own_files(checkpoint_folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_folder)
    place_weights(checkpoint, tmp_path, "link")
    for name, tensor in checkpoint.tensors.items():
        assert stored_tensors(tmp_path)[name].file.samefile(tensor.file)
    assert bytes_to_write(checkpoint, "link") == 0
    copied = tmp_path / "copied"
    copied.mkdir()
    place_weights(checkpoint, copied, "copy")
    sizes = sum(path.stat().st_size for path in copied.glob("*.safetensors"))
    assert bytes_to_write(checkpoint, "copy") == sizes
    assert not any(path.stat().st_nlink > 1 for path in copied.iterdir())


def hub_cache(checkpoint: Path, root: Path) -> Path:
    """``checkpoint`` as a hub's client keeps it: blobs by sha256, and a snapshot of links to them. -> the snapshot"""
    blobs, snapshot = root / "blobs", root / "snapshots" / ("0c" * 20)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in checkpoint.iterdir():
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        (blobs / blob).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def test_a_checkpoint_in_a_hubs_cache_is_linked_and_copied(checkpoint_folder: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(checkpoint_folder, tmp_path / "models--lavida")
    for mode in ("link", "copy"):
        folder = tmp_path / mode
        folder.mkdir()
        place_weights(open_checkpoint(snapshot), folder, mode)  # type: ignore[arg-type]
        copy_companions(snapshot, folder)
        assert {path.name for path in folder.iterdir()} == {path.name for path in checkpoint_folder.iterdir()}
        for path in folder.iterdir():
            assert path.read_bytes() == (checkpoint_folder / path.name).read_bytes()
            assert not path.is_symlink()
            linked = mode == "link" and path.suffix == ".safetensors"
            assert path.samefile(snapshot / path.name) == linked
    assert open_checkpoint(tmp_path / "link").tensors.keys() == open_checkpoint(snapshot).tensors.keys()


@pytest.mark.parametrize("mode", ["link", "copy", "float16"])
def test_what_is_there_is_never_written(checkpoint_folder: Path, tmp_path: Path, mode: WeightsMode) -> None:
    checkpoint = open_checkpoint(checkpoint_folder)
    (tmp_path / "theirs").write_bytes(b"precious")
    for name in ("model.safetensors", *files_of(checkpoint)):
        (tmp_path / name).symlink_to("theirs")
    with pytest.raises((FileExistsError, D3tomError), match="File exists"):
        place_weights(checkpoint, tmp_path, mode)
    assert (tmp_path / "theirs").read_bytes() == b"precious"


@pytest.mark.parametrize("mode", ["link", "copy"])
@pytest.mark.parametrize("change", ["longer", "link"])
def test_files_that_changed_since_they_were_checked_are_refused(
    checkpoint_folder: Path, tmp_path: Path, mode: WeightsMode, change: str
) -> None:
    source = Path(shutil.copytree(checkpoint_folder, tmp_path / "source"))
    checkpoint, folder = open_checkpoint(source), tmp_path / "bundle"
    folder.mkdir()
    shard = source / next(iter(files_of(checkpoint)))
    (tmp_path / "theirs").write_bytes(b"private")
    if change == "longer":
        shard.write_bytes(shard.read_bytes() + b"x")
    else:
        shard.unlink()
        shard.symlink_to("../theirs")
    with pytest.raises(D3tomError, match="was changed while it was in use"):
        place_weights(checkpoint, folder, mode)
    assert not any(path.read_bytes() == b"private" for path in folder.iterdir() if not path.is_symlink())


def test_float64_is_converted_into_one_file(checkpoint_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "double"
    source.mkdir()
    (source / "config.json").write_bytes((checkpoint_folder / "config.json").read_bytes())
    state = {k: v for path in checkpoint_folder.glob("*.safetensors") for k, v in load_file(path).items()}
    half = "model.transformer.ln_f.weight"
    save_file({k: v.half() if k == half else v.double() for k, v in state.items()}, source / "model.safetensors")
    checkpoint, folder = open_checkpoint(source), tmp_path / "bundle"
    folder.mkdir()
    place_weights(checkpoint, folder, "link")
    stored = stored_tensors(folder)
    assert {name: tensor.dtype for name, tensor in stored.items() if tensor.dtype != "F32"} == {half: "F16"}
    for name, tensor in stored.items():
        np.testing.assert_array_equal(read_array(tensor), state[name].half().float() if name == half else state[name])
    written = sum(tensor.length for tensor in stored.values())
    assert bytes_to_write(checkpoint, "link") == written


def test_float16_is_made_of_any_dtype_part_by_part(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "_PART", 100)  # most tensors take several
    source = tmp_path / "mixed"
    source.mkdir()
    (source / "config.json").write_bytes((checkpoint_folder / "config.json").read_bytes())
    state = {k: v for path in checkpoint_folder.glob("*.safetensors") for k, v in load_file(path).items()}
    kinds = [torch.bfloat16, torch.float32, torch.float16, torch.float64]
    state = {k: v.to(kinds[index % 4]) for index, (k, v) in enumerate(state.items())}
    save_file(state, source / "model.safetensors")
    checkpoint, folder = open_checkpoint(source), tmp_path / "bundle"
    folder.mkdir()
    place_weights(checkpoint, folder, "float16")
    stored = stored_tensors(folder)
    assert {tensor.dtype for tensor in stored.values()} == {"F16"}
    for name, tensor in stored.items():
        np.testing.assert_array_equal(read_array(tensor), state[name].half().float())
    assert bytes_to_write(checkpoint, "float16") == sum(tensor.length for tensor in stored.values())


def test_numbers_beyond_float16_are_refused_by_name(checkpoint_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "large"
    source.mkdir()
    (source / "config.json").write_bytes((checkpoint_folder / "config.json").read_bytes())
    state = {k: v for path in checkpoint_folder.glob("*.safetensors") for k, v in load_file(path).items()}
    state["model.transformer.ln_f.weight"][3] = -70000.0
    save_file(state, source / "model.safetensors")
    with pytest.raises(D3tomError, match=r"ln_f\.weight holds numbers that float16 does not \(largest size 7e\+04\)"):
        place_weights(open_checkpoint(source), tmp_path, "float16")


def test_a_streamed_model_is_the_same_model(checkpoint_folder: Path, eager_model) -> None:  # type: ignore[no-untyped-def]
    streamed = load_model(open_checkpoint(checkpoint_folder), streamed=True)
    pixels, ids = torch.randn(2, 3, 28, 28), torch.arange(6)[None]
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(streamed.encode_views(pixels), eager_model.encode_views(pixels))
            hidden = streamed.embed_tokens(ids)
            block, same = streamed.transformer.blocks[0], eager_model.transformer.blocks[0]
            rotary = eager_model.transformer.compact_rotary(hidden)
            assert torch.equal(block(hidden, rotary), same(hidden, rotary))
    left = {name for name, tensor in streamed.named_parameters() if not tensor.is_meta}
    assert left == {"model.image_newline"}


def test_geometries_are_configurations_of_their_names() -> None:
    billions = {}
    for name in GEOMETRIES:
        assert geometry_config(name).family == recognise(raw_geometry(name)).name
        billions[name] = sum(np.prod(shape) for shape in released_shapes(geometry_config(name)).values()) / 1e9
    assert billions["lavida-8b"] == pytest.approx(8.4348, abs=1e-3)  # lavida.md A3, without the unused post_layernorm
    assert 2.0 < billions["lavida-2b"] < 2.6
    with pytest.raises(D3tomError, match="no geometry that this tool knows"):
        raw_geometry("lavida-9b")


@pytest.mark.parametrize("weights", ["random", "sparse"])
def test_a_geometry_is_a_checkpoint_of_the_released_format(weights, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    checkpoint = write_geometry(tmp_path, "lavida-tiny", weights)
    empty_model(checkpoint)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"BF16"}
    projection = read_array(checkpoint.tensors["model.transformer.blocks.0.q_proj.weight"])
    norm = read_array(checkpoint.tensors["model.transformer.ln_f.weight"])
    if weights == "random":
        assert projection.std() == pytest.approx(128**-0.5, rel=0.05)
        assert (norm == 1).all()
    else:
        assert not projection.any()


def test_the_sparse_8b_geometry_takes_no_disk(tmp_path: Path) -> None:
    checkpoint = write_geometry(tmp_path, "lavida-8b", "sparse")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 4
    assert sum(path.stat().st_size for path in files) > 16.8e9
    assert sum(path.stat().st_blocks * 512 for path in files) < 1e6
    assert len(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]) == len(
        checkpoint.tensors
    )
    needs = demand_of(checkpoint, "link", ["uncached"])
    assert needs.export <= 6 * GIB
    assert needs.disk < 0.01 * 16.8e9
    assert needs.self_check > 60 * GIB  # ONNX Runtime's copy and the eager model's, in float32


def test_the_preflight_refuses_what_does_not_fit(tmp_path: Path) -> None:
    needs = demand({"model.transformer.blocks.0.q_proj.weight": (4, 4)}, 1, ["uncached"], 0)
    assert plan(needs, tmp_path / "out", None, 2).check.samples
    with pytest.raises(D3tomError, match=r"GiB of memory and 0.5 GiB are allowed by --max-memory"):
        plan(needs, tmp_path / "out", GIB // 2, None)
    with pytest.raises(D3tomError, match=r"[GM]B of disk and .* [GM]B are free"):
        plan(replace(needs, disk=10**18), tmp_path / "out", None, None)


def test_the_preflight_leaves_the_self_check_out_only_where_nobody_asked_for_it(tmp_path: Path) -> None:
    needs = Demand(export=GIB, runtime=3 * GIB, standard=2 * GIB, eager=5 * GIB, eager_streamed=GIB, disk=0)
    whole, streamed, none = (plan(needs, tmp_path / "out", limit * GIB, None) for limit in (9, 5, 2))
    assert whole.check == SelfCheck(2, streamed=False, standard=False)
    assert (streamed.check.samples, streamed.check.streamed) == (2, True)
    assert [each.check.standard for each in (whole, plan(needs, tmp_path / "out", 10 * GIB, None))] == [False, True]
    assert not none.check.samples
    assert none.lacking == "4.0 GiB of memory"
    assert none.describe().endswith("No self-check: that needs 4.0 GiB of memory.")
    unasked = plan(needs, tmp_path / "out", 2 * GIB, 0)
    assert (unasked.check.samples, unasked.lacking) == (0, None)
    with pytest.raises(D3tomError, match=r"4.0 GiB of memory for --self-check"):
        plan(needs, tmp_path / "out", 2 * GIB, 2)


def test_the_preflight_counts_what_the_sessions_hold(bundle: Bundle) -> None:
    """Weights of a loop's stages in float32, but the embedding table, whose rows are read from the file."""
    checkpoint = open_checkpoint(bundle.folder)
    for loop in LOOPS:
        names = [
            name
            for key, stage in bundle.manifest.stages.items()
            if stage.loop in (None, loop)
            for name in bundle.manifest.stage_weights[key]
            if key != "embed"
        ]
        held = sum(4 * math.prod(checkpoint.tensors[name].shape) for name in names)
        needs = demand_of(checkpoint, "link", [loop])
        eager = sum(4 * math.prod(tensor.shape) for tensor in used_tensors(checkpoint).values())
        assert held <= needs.self_check - eager - 3 * GIB <= 1.25 * held
    both = demand_of(checkpoint, "link", LOOPS)
    assert both.self_check == needs.self_check  # one loop after the other
    engines = demand_of(checkpoint, "link", LOOPS, [4, 2])
    assert engines.disk - both.disk >= 1.5 * held


_MEMINFO = "MemTotal: 64000000 kB\nMemAvailable: 16777216 kB\n"
_FILE_CACHE = "anon 5\ninactive_file {0}\nactive_file {0}\ntotal_inactive_file {0}\ntotal_active_file {0}\n"


@pytest.mark.parametrize(
    ("groups", "free"),
    [
        ({}, 16),
        ({"": ("max", 9, 0)}, 16),
        ({"": (24, 23, 4)}, 9),  # what a finished download left in the page cache makes room
        ({"pod": (12, 5, 0), "pod/job": ("max", 3, 0)}, 7),  # the limit of a group around it
        ({"pod": (12, 2, 0), "pod/job": (8, 2, 0)}, 6),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_what_control_groups_leave(
    tmp_path: Path, groups: dict[str, tuple[int | str, int, int]], free: int, version: int
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(_MEMINFO)
    lines = {1: "9:cpu,cpuacct:/\n4:memory:/pod/job\n0::/other\n", 2: "0::/pod/job\n"}
    (tmp_path / "proc/self/cgroup").write_text(lines[version])
    top = tmp_path / ("sys/fs/cgroup/memory" if version == 1 else "sys/fs/cgroup")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    for group, (limit, used, cached) in groups.items():
        folder = top / group
        folder.mkdir(parents=True, exist_ok=True)
        unlimited = str(2**63 - 4096) if version == 1 else "max"
        (folder / names[0]).write_text(unlimited if limit == "max" else f"{int(limit) * GIB}\n")
        (folder / names[1]).write_text(f"{used * GIB}\n")
        (folder / "memory.stat").write_text(_FILE_CACHE.format(cached * GIB))
    assert free_memory(tmp_path) == free * GIB
    assert free_memory(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EXDEV, "Write the bundle to the checkpoint's file system, or copy"),
        (errno.EPERM, "links only files that you own or may write.*--weights copy"),
        (errno.EMLINK, "Copy the weights with --weights copy"),
    ],
)
def test_files_that_cannot_be_linked_are_refused_before_any_work(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    checkpoint, output = open_checkpoint(checkpoint_folder), tmp_path / "missing" / "bundle"
    check_linkable(checkpoint, output)

    def refuse(source: Path, target: Path, **_: bool) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(D3tomError, match=f"cannot be linked into {re.escape(str(tmp_path))} .*{says}"):
        check_linkable(checkpoint, output)
    assert list(tmp_path.iterdir()) == []


def test_weights_stored_in_bfloat16_run_as_the_same_model(tiny_bundle: Bundle) -> None:
    stored = stored_tensors(tiny_bundle.folder)
    assert {tensor.dtype for tensor in stored.values()} == {"BF16"}
    assert load_bundle(tiny_bundle.folder).manifest.weights == "checkpoint"
    report = tiny_bundle.manifest.validation
    assert report is not None
    assert report["passed"]
