"""What TensorRT-RTX makes of the bundled model's stages, read from its plans: kernels, attention, sums, plugins."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.plan_kernels import Program, accumulations, programs
from d3tom_export.bundle.folder import Bundle
from d3tom_export.bundle.manifest import stage_file
from d3tom_export.engines.builder import BuilderSettings, build_plan
from d3tom_export.engines.graph import engine_graph
from d3tom_export.engines.record import EnginePrecision
from d3tom_export.engines.shapes import axis_ranges, default_shapes
from d3tom_export.engines.stages import engine_stages, stage_profiles
from d3tom_export.engines.toolkit import load_toolkit

KERNELS_A_LAYER = 20
"""Of cached stages before attention was joined: `python -m benchmarks.plan_kernels` of a bundle of that time."""


class Plans:
    """Plans for SM89 and SM120 in one, built when asked for."""

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        self._bundle, self._folder, self._found = bundle, folder, dict[tuple[str, str, str], bytes]()
        for path in bundle.folder.glob("*.safetensors"):
            shutil.copy(path, folder)

    def plan(self, key: str, precision: EnginePrecision = "fp16", accumulate: str = "fp32") -> bytes:
        wanted = key, precision, accumulate
        if wanted not in self._found:
            manifest = self._bundle.manifest
            spec = engine_stages(manifest.stages, self._bundle.config, manifest.merge)[key]
            source = self._bundle.folder / stage_file(key)
            graph = engine_graph(source, spec, precision, "onnx", accumulate)  # type: ignore[arg-type]
            path = self._folder / stage_file("-".join(wanted))
            path.write_bytes(graph.model)
            shapes = default_shapes(self._bundle.config, manifest.generation)
            axes = axis_ranges(shapes, manifest.merge, manifest.generation, kv_cache=spec.loop == "cached")
            build_plan(
                load_toolkit("tensorrt-rtx"),
                path,
                stage_profiles(spec, axes),
                (89, 120),
                path.with_suffix(".plan"),
                merge_op="onnx",
                plugin_layers=0,
                settings=BuilderSettings(),
            )
            self._found[wanted] = path.with_suffix(".plan").read_bytes()
        return self._found[wanted]

    def programs(self, key: str, precision: EnginePrecision = "fp16") -> list[Program]:
        return programs(self.plan(key, precision))


@pytest.fixture(scope="module")
def plans(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Plans:
    return Plans(tiny_bundle, tmp_path_factory.mktemp("plans"))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(("key", "layers"), [("cached_front", 2), ("decide", 1), ("cached_back", 9)])
def test_cached_attention_is_one_kernel_a_layer_for_steps_and_for_the_prompt(
    plans: Plans, key: str, layers: int, precision: EnginePrecision
) -> None:
    step, prompt = plans.programs(key, precision)
    assert (step.flash, prompt.flash) == (layers, layers)


@pytest.mark.parametrize("key", ["cached_front", "cached_back"])
def test_a_cached_layer_launches_half_as_many_kernels(plans: Plans, key: str) -> None:
    for program in plans.programs(key):
        assert program.per_layer is not None
        assert 2 * program.per_layer <= KERNELS_A_LAYER


def test_a_step_neither_transposes_nor_pads_a_cache(plans: Plans) -> None:
    """What only moves data there are shapes of one row: the copies of caches are part of the kernel that joins them."""
    for key in ("cached_front", "cached_back"):
        assert plans.programs(key)[0].moves == ()
    assert set(plans.programs("decide")[0].moves) <= {"__myl_Repl", "__myl_Slic"}  # kept indices


def test_products_of_fp16_add_in_float32_unless_left_to_the_builder(plans: Plans) -> None:
    wide, left = accumulations(plans.plan("cached_back")), accumulations(plans.plan("cached_back", accumulate="any"))
    assert wide.keys() == {2}
    assert left.keys() == {0}
    assert wide.total() == left.total()
    assert b"hmma_fp16_traits" not in plans.plan("cached_back")  # of attention
    assert b"hmma_fp16_traits" in plans.plan("cached_back", accumulate="any")
    halves = len(plans.plan("cached_back")) / len(plans.plan("cached_back", accumulate="any"))
    assert halves == pytest.approx(1, abs=0.01)  # the weights stay fp16
