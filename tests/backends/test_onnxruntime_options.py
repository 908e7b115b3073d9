"""What ONNX Runtime's providers are told about a stage: profiles, caches, the order of preference."""

from __future__ import annotations

from pathlib import Path

import pytest

from d3tom_export.backends import choice
from d3tom_export.backends.onnxruntime_options import (
    DEVICES,
    ORT_NAMES,
    PROVIDERS,
    Provider,
    cache_folder,
    profile_strings,
    provider_axes,
    providers_for,
)
from d3tom_export.bundle.folder import Bundle
from d3tom_export.engines.shapes import SHAPE_INPUTS, Profile, check_fits, stage_profile

PROFILE: Profile = {
    "hidden": ((1, 10, 32), (1, 20, 32), (2, 40, 32)),
    "visual_positions": ((1,), (9,), (30,)),
    "keep": ((1,), (4,), (30,)),
}


def test_profiles_are_spelled_as_onnxruntime_reads_them() -> None:
    """A shape input has its value; its opt is its max, since ONNX Runtime mistakes one for the other."""
    assert profile_strings(PROFILE) == {
        "min": "hidden:1x10x32,visual_positions:1,keep:1",
        "opt": "hidden:1x20x32,visual_positions:9,keep:30",
        "max": "hidden:2x40x32,visual_positions:30,keep:30",
    }


def _parsed(spelled: str) -> dict[str, tuple[int, ...]]:
    pairs = (entry.split(":") for entry in spelled.split(","))
    return {name: tuple(map(int, sizes.split("x"))) for name, sizes in pairs}


@pytest.mark.parametrize("kv_cache", [False, True])
def test_every_input_of_every_stage_has_its_sizes(bundle: Bundle, kv_cache: bool) -> None:
    manifest = bundle.manifest
    axes = provider_axes(bundle.config, manifest.merge, manifest.generation, kv_cache=kv_cache)
    seen = set()
    for key in bundle.stage_keys("cached" if kv_cache else "uncached").values():
        spec = manifest.stages[key]
        profile = stage_profile(spec, axes)
        found = {which: _parsed(spelled) for which, spelled in profile_strings(profile).items()}
        for sizes in found.values():
            assert list(sizes) == [tensor.name for tensor in spec.inputs]
            check_fits(key, profile, sizes, "")
        seen |= SHAPE_INPUTS.keys() & found["min"].keys()
    assert seen == ({"keep"} if kv_cache else set(SHAPE_INPUTS))
    # A batch of two and shorter answers than usual are served: `validate` asks for both.
    assert (axes["B"].max, axes["G"].min) == (2, 1)
    assert axes["G"].max >= manifest.generation.gen_length


def test_the_order_of_preference_and_the_options_of_each() -> None:
    cache = Path("/kept/merge")
    assert providers_for("cpu") == [("CPUExecutionProvider", {})]
    assert providers_for("cuda") == [("CUDAExecutionProvider", {"use_tf32": "0"}), ("CPUExecutionProvider", {})]
    spelled = profile_strings(PROFILE)
    profiles = {f"trt_profile_{which}_shapes": text for which, text in spelled.items()}
    assert providers_for("tensorrt", PROFILE) == [
        ("TensorrtExecutionProvider", profiles),
        ("CUDAExecutionProvider", {"use_tf32": "0"}),
        ("CPUExecutionProvider", {}),
    ]
    kept = {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": "/kept/merge",
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": "/kept/merge",
    }
    assert providers_for("tensorrt", PROFILE, cache)[0][1] == profiles | kept
    rtx = {f"nv_profile_{which}_shapes": text for which, text in spelled.items()}
    assert providers_for("nv-tensorrt-rtx", PROFILE) == [
        ("NvTensorRTRTXExecutionProvider", rtx),
        ("CPUExecutionProvider", {}),
    ]
    large = providers_for("nv-tensorrt-rtx", PROFILE, cache, weight_bytes=3 << 30)[0][1]
    assert large == rtx | {"nv_runtime_cache_path": "/kept/merge", "nv_use_external_data_initializer": "1"}


def test_a_cache_never_serves_another_graph_or_other_weights() -> None:
    cache = Path("/kept")
    folders = {cache_folder(cache, "merge", graph, sha) for graph in (b"a", b"b") for sha in ("1" * 64, "2" * 64)}
    assert len(folders) == 4
    assert all(folder.parent == cache and folder.name.startswith("merge-") for folder in folders)
    assert cache_folder(cache, "merge", b"a", "1" * 64) in folders


def test_the_command_line_offers_every_provider() -> None:
    assert set(ORT_NAMES) == set(PROVIDERS)
    assert choice.DEVICES == DEVICES == ("auto", *PROVIDERS)
    building: list[Provider] = [name for name in PROVIDERS if name not in ("cpu", "cuda")]
    assert list(choice.BUILDING_DEVICES) == building
