"""Stages one by one: outputs that nobody reads, `decide`'s choice and inputs left out are held to PyTorch too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import LOOPS, Loop
from d3tom_export.model.lavida import Lavida
from d3tom_export.parity.stages import StageProbes

Arrays = dict[str, NDArray[Any]]


def _no_change(name: str, arrays: Arrays) -> Arrays:
    return arrays


class _Faulty(OnnxRuntimeBackend):
    """ONNX Runtime with a fault in one stage, before it runs or after."""

    before: Callable[[str, Arrays], Arrays] = staticmethod(_no_change)
    after: Callable[[str, Arrays], Arrays] = staticmethod(_no_change)

    def run_stage(self, name: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        return self.after(name, super().run_stage(name, self.before(name, dict(inputs)), outputs))


def _half_confidence(name: str, arrays: Arrays) -> Arrays:
    return arrays | ({"confidence": arrays["confidence"] / 2} if name == "back" else {})


def _all_decide(name: str, arrays: Arrays) -> Arrays:
    return arrays | ({"deciders": np.ones_like(arrays["deciders"])} if name == "decide" else {})


def _other_default(name: str, arrays: Arrays) -> Arrays:
    return {"answer_length": np.array([7])} | arrays if name == "back" else arrays


def _half(output: str) -> Callable[[str, Arrays], Arrays]:
    return lambda name, arrays: arrays | {each: arrays[each] / 2 for each in arrays if each == output}


def _run(bundle: Bundle, model: Lavida, loop: Loop, **faults: Any) -> StageProbes:
    backend = _Faulty(bundle, loop, device="cpu")
    for name, fault in faults.items():
        setattr(backend, name, fault)
    probes = StageProbes()
    probes.run(bundle, model, backend, loop)
    return probes


@pytest.mark.parametrize("loop", LOOPS)
def test_right_stages_pass(bundle: Bundle, eager_model: Lavida, loop: Loop) -> None:
    probes = _run(bundle, eager_model, loop)
    assert (probes.probed, probes.problems) == ([f"stages one by one [onnxruntime, {loop}]"], [])


@pytest.mark.parametrize(
    ("loop", "faults", "named"),
    [
        ("uncached", {"after": _half_confidence}, "stage back"),
        ("cached", {"after": _half_confidence}, "stage cached_back"),
        ("cached", {"before": _all_decide}, "stage decide"),
        ("uncached", {"before": _other_default}, "stage back"),
        *(("cached", {"after": _half(name)}, "stage certainty") for name in ("rest", "runner_up", "rest_entropy")),
    ],
    ids=[
        "confidence",
        "cached confidence",
        "decide's deciders",
        "answer_length's default",
        "rest",
        "runner_up",
        "rest_entropy",
    ],
)
def test_each_fault_is_seen(
    bundle: Bundle, eager_model: Lavida, loop: Loop, faults: dict[str, Any], named: str
) -> None:
    (problem,) = _run(bundle, eager_model, loop, **faults).problems
    assert named in problem


def test_a_backend_without_stages_says_why_they_are_not_probed(bundle: Bundle, eager_model: Lavida) -> None:
    probes = StageProbes()
    probes.run(bundle, eager_model, PyTorchBackend(eager_model, bundle.manifest.merge), "uncached")
    assert probes.not_probed == [
        "stages one by one [pytorch, uncached]: pytorch cannot run stages one at a time",
    ]
    assert (probes.probed, probes.problems) == ([], [])
