"""The first bad stage, and the first bad module in it: whatever is changed in a graph is what gets named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import LOOPS, GenerationConfig, Loop
from d3tom_export.diagnosis import stagewise
from d3tom_export.diagnosis.report import Diagnosis
from d3tom_export.diagnosis.stagewise import as_runner, diagnose, first_steps, sampled_steps
from d3tom_export.errors import D3tomError
from d3tom_export.model.lavida import Lavida
from d3tom_export.pipeline import Reader
from d3tom_export.prompt.samples import Sample
from tests.diagnosis.conftest import Edit, Tamper, bump, change_weight, multiply_after

GENERATION = GenerationConfig(gen_length=4)
BLOCKS = "model.transformer.blocks"
TOWER = "model.vision_tower.vision_tower.vision_model"


class Diagnose:
    """Diagnoses a bundle on ONNX Runtime, or on a backend given, against the synthetic checkpoint's eager model."""

    def __init__(self, model: Lavida, reader: Reader, sample: Sample) -> None:
        self._model, self._reader, self._sample = model, reader, sample

    def __call__(
        self, bundle: Bundle, *loops: Loop, backend: Any = None, layers: bool = True, **options: Any
    ) -> Diagnosis:
        backends = {loop: backend or OnnxRuntimeBackend(bundle, loop, device="cpu") for loop in loops}
        merge = bundle.manifest.merge
        return diagnose(
            bundle, self._model, backends, self._reader, [self._sample], GENERATION, merge, layers=layers, **options
        )


@pytest.fixture(scope="module")
def look(eager_model: Lavida, bundle_reader: Reader, sample: Sample) -> Diagnose:
    return Diagnose(eager_model, bundle_reader, sample)


def test_an_intact_bundle_reports_nothing(bundle: Bundle, look: Diagnose) -> None:
    diagnosis = look(bundle, *LOOPS)
    assert diagnosis.passed
    assert (diagnosis.first, diagnosis.descent) == (None, None)
    assert {stage.stage for stage in diagnosis.stages} == set(bundle.manifest.stages)
    for stage in diagnosis.stages:
        assert stage.calls > 0
        assert stage.worst is not None
        assert stage.worst.error < 0.2 * stage.tolerance, stage
    assert diagnosis.cut.steps == 8
    assert diagnosis.lines()[-1] == "Nothing departs."


@pytest.mark.parametrize(
    "settings",
    [{"commit": "threshold", "threshold": 0.5}, {"stop_ids": tuple((token,) for token in range(240))}],
    ids=["a rule", "stops"],
)
def test_an_answer_that_ends_before_its_last_step_is_followed_to_there(
    bundle: Bundle, eager_model: Lavida, bundle_reader: Reader, sample: Sample, settings: dict[str, Any]
) -> None:
    generation = GenerationConfig(gen_length=6, **settings)
    backends = {"uncached": OnnxRuntimeBackend(bundle, device="cpu")}
    given = bundle_reader, [sample], generation, bundle.manifest.merge
    diagnosis = diagnose(bundle, eager_model, backends, *given, layers=False)  # type: ignore[arg-type]
    assert diagnosis.passed
    assert 1 <= diagnosis.cut.steps < 6


WRONG_WEIGHTS = [
    ("vision", "uncached", f"{TOWER}.encoder.layers.1.self_attn.k_proj"),
    ("vision", "uncached", "model.mm_projector.2"),
    ("vision", "uncached", f"{TOWER}.embeddings.position_embedding"),
    ("embed", "uncached", "model.transformer.wte"),
    ("front", "uncached", f"{BLOCKS}.0.q_proj"),
    ("merge", "uncached", f"{BLOCKS}.1.attn_norm"),
    ("merge", "uncached", f"{BLOCKS}.1.ff_proj"),
    ("back", "uncached", f"{BLOCKS}.3.up_proj"),
    ("back", "uncached", "model.transformer.ff_out"),
    ("prefill", "cached", f"{BLOCKS}.2.k_proj"),
    ("prefill", "cached", f"{BLOCKS}.3.v_proj"),
    ("cached_front", "cached", f"{BLOCKS}.0.attn_out"),
    ("decide", "cached", f"{BLOCKS}.1.k_proj"),
    ("cached_merge", "cached", f"{BLOCKS}.1.ff_out"),
    ("cached_back", "cached", f"{BLOCKS}.2.q_proj"),
]


@pytest.mark.parametrize(("key", "loop", "module"), WRONG_WEIGHTS, ids=lambda value: value)
def test_one_wrong_weight_is_found_by_its_name(
    key: str, loop: Loop, module: str, look: Diagnose, tamper: Tamper
) -> None:
    def change(values: NDArray[Any]) -> None:
        values += 0.1 if key == "embed" else 0.0  # which rows of the table are read is up to the tokenizer
        bump(values)

    diagnosis = look(tamper(key, change_weight(f"{module}.weight", change)), loop)
    assert not diagnosis.passed
    assert diagnosis.first is not None
    assert diagnosis.descent is not None
    assert (diagnosis.first.stage, diagnosis.descent.kind, diagnosis.descent.name) == (key, "module", module)
    assert f"{module}.weight" in diagnosis.descent.weights
    assert diagnosis.descent.skipped == {}
    # No other stage is blamed, and nothing in front of the culprit either.
    assert [stage.stage for stage in diagnosis.stages if stage.first] == [key]
    assert diagnosis.descent.layers[-1].name == module
    assert diagnosis.verdict().startswith(f"Culprit: stage {key}, module {module} (weights {module}.weight")


WRONG_OPERATIONS = [
    ("vision", "uncached", multiply_after("Resize", 1.001), "model.mm_projector", "output visual_features"),
    ("front", "uncached", multiply_after("Softmax", 1.01), f"{BLOCKS}.0", f"{BLOCKS}.0.attn_out"),
    ("merge", "uncached", multiply_after("D3ToMMerge", 1.01), f"{BLOCKS}.1", f"{BLOCKS}.1.ff_norm"),
    ("back", "uncached", multiply_after("Softmax", 1.01, nth=1), f"{BLOCKS}.3", f"{BLOCKS}.3.attn_out"),
    ("rotate", "cached", multiply_after("Cos", 1.01), "rotate", "output attention_keys"),
    ("prefill", "cached", multiply_after("Softmax", 1.01, nth=2), f"{BLOCKS}.2", f"{BLOCKS}.2.attn_out"),
    ("decide", "cached", multiply_after("Softmax", 1.01), f"{BLOCKS}.1", f"{BLOCKS}.1.attn_out"),
]


@pytest.mark.parametrize(
    ("key", "loop", "edit", "around", "towards"),
    WRONG_OPERATIONS,
    ids=[f"{key}-{towards}" for key, *_, towards in WRONG_OPERATIONS],
)
def test_what_no_module_does_is_placed_between_them(
    key: str, loop: Loop, edit: Edit, around: str, towards: str, look: Diagnose, tamper: Tamper
) -> None:
    descent = look(tamper(key, edit), loop).descent
    assert descent is not None
    assert (descent.kind, descent.name, descent.towards) == ("operations", around, towards)
    assert "Mul tampered" in descent.nodes


def test_a_cache_that_is_merged_wrongly_is_named_by_its_output(look: Diagnose, tamper: Tamper) -> None:
    """The later layers' caches pass through no module at all."""
    diagnosis = look(tamper("cached_merge", multiply_after("Sin", 1.01, nth=1)), "cached")
    assert diagnosis.first is not None
    assert diagnosis.descent is not None
    assert diagnosis.first.stage == "cached_merge"
    assert list(diagnosis.first.outputs) == ["merged_keys_2", "merged_keys_3"]
    assert diagnosis.descent.towards == "output merged_keys_2"
    assert "Mul tampered" in diagnosis.descent.nodes


def test_nan_is_traced_to_the_node_it_comes_from(look: Diagnose, tamper: Tamper) -> None:
    diagnosis = look(tamper("back", multiply_after("Softmax", float("nan"))), "uncached")
    assert diagnosis.descent is not None
    assert diagnosis.descent.towards == f"{BLOCKS}.2.attn_out"
    assert diagnosis.descent.first_non_finite == "Mul tampered"
    assert "elements are NaN or infinite" in diagnosis.verdict()
    written = json.dumps(diagnosis.to_json(), allow_nan=False)
    assert json.loads(written)["layers"]["first_non_finite"] == "Mul tampered"


def test_without_layers_only_the_stage_is_told(look: Diagnose, tamper: Tamper) -> None:
    bundle = tamper("front", change_weight(f"{BLOCKS}.0.ff_norm.weight", bump))
    diagnosis = look(bundle, "uncached", layers=False)
    assert diagnosis.descent is None
    assert diagnosis.verdict().startswith("First bad stage: front, relative error ")
    assert "in hidden at sample 0, step 0" in diagnosis.verdict()


class Wrapped:
    """ONNX Runtime's stages with something done to what one of them gives, as an engine gone wrong."""

    name = "engine"
    precision = "fp32"
    shares_prefix = False

    def __init__(self, bundle: Bundle, stage: str, change: Any) -> None:
        self._backend, self._stage, self._change = OnnxRuntimeBackend(bundle, device="cpu"), stage, change

    def run_stage(
        self, name: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        found = self._backend.run_stage(name, inputs, outputs)
        return self._change(found) if name == self._stage else found


def test_where_the_graph_is_right_the_engine_is_not(bundle: Bundle, look: Diagnose) -> None:
    engine = Wrapped(bundle, "merge", lambda found: found | {"merged": found["merged"] * np.float32(1.001)})
    diagnosis = look(bundle, "uncached", backend=engine)
    assert diagnosis.descent is not None
    assert (diagnosis.descent.kind, diagnosis.descent.value) == ("backend", "merged")
    assert diagnosis.verdict().startswith("Culprit: what engine made of stage merge, relative error 8.")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: {"hidden": found["hidden"][:, 1:]}, "its shape is"),
        (lambda found: {}, "it is missing"),
        (lambda found: {"hidden": found["hidden"].astype(np.int64)}, "its dtype is int64"),
        (lambda found: {"hidden": np.full_like(found["hidden"], np.nan)}, "NaN or infinite"),
    ],
)
def test_what_an_engine_fails_to_give_departs(bundle: Bundle, look: Diagnose, change: Any, says: str) -> None:
    diagnosis = look(bundle, "uncached", backend=Wrapped(bundle, "front", change))
    assert diagnosis.first is not None
    assert diagnosis.first.stage == "front"
    assert says in str(diagnosis.first.outputs["hidden"].problem)


def test_a_stage_that_the_runtime_refuses_departs(bundle: Bundle, look: Diagnose) -> None:
    def refuse(found: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        raise D3tomError("the engine's profile ends at 64 tokens")

    diagnosis = look(bundle, "uncached", backend=Wrapped(bundle, "back", refuse))
    assert diagnosis.first is not None
    assert diagnosis.first.stage == "back"
    assert "profile ends at 64" in "\n".join(diagnosis.lines())


def test_other_kept_tokens_depart_unless_float32_cannot_tell_them_apart(
    bundle: Bundle, look: Diagnose, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another(found: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        kept = found["kept"].copy()
        absent = np.setdiff1d(np.arange(kept[0, -1] + 2), kept[0])
        if kept.shape[1] < 20:  # the steps that merge
            kept[0, 0] = absent[0]
        return {"merged": found["merged"] + np.float32(1.0), "kept": np.sort(kept)}

    engine = Wrapped(bundle, "merge", another)
    diagnosis = look(bundle, "uncached", backend=engine, layers=False)
    assert diagnosis.first is not None
    assert set(diagnosis.first.outputs) <= {"merged", "kept"}
    only_kept = Wrapped(bundle, "merge", lambda found: found | {"kept": another(found)["kept"]})
    assert not look(bundle, "uncached", backend=only_kept, layers=False).passed
    monkeypatch.setitem(stagewise.TIED_DECISION, "fp32", 2.0)
    tied = look(bundle, "uncached", backend=only_kept, layers=False)
    assert tied.passed
    assert next(stage.near_ties for stage in tied.stages if stage.stage == "merge") > 0


def test_a_wrong_cut_is_told_from_a_wrong_graph(
    bundle: Bundle, look: Diagnose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages that agree with their modules prove nothing if the modules are not the model's."""
    whole = stagewise.PyTorchBackend

    def shifted(model: Lavida, merge: Any, **options: Any) -> PyTorchBackend:
        backend = whole(model, merge, **options)
        start = backend.start

        def start_shifted(embeddings: Any, positions: Any, **more: Any) -> Any:
            return start(embeddings * np.float32(1.05), positions, **more)

        monkeypatch.setattr(backend, "start", start_shifted)
        return backend

    monkeypatch.setattr(stagewise, "PyTorchBackend", shifted)
    diagnosis = look(bundle, "uncached")
    assert diagnosis.first is None
    assert not diagnosis.passed
    assert "the fault is in d3tom_export/stages" in diagnosis.verdict()


def test_a_backend_without_stages_is_refused(eager_model: Lavida, bundle: Bundle) -> None:
    with pytest.raises(D3tomError, match="The pytorch backend cannot run stages one at a time"):
        as_runner(PyTorchBackend(eager_model, bundle.manifest.merge))


def test_steps_looked_at() -> None:
    assert sampled_steps(1) == [0]
    assert sampled_steps(2) == [0, 1]
    assert sampled_steps(32) == [0, 1, 16, 31]
    assert [first_steps(steps) for steps in (1, 32)] == [[0], [0, 1, 2, 3]]
