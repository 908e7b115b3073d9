"""What an answer needs of a bundle that is loaded on ONNX Runtime. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from d3tom_export.backends.onnxruntime_package import ort
from d3tom_export.backends.onnxruntime_stage import Stage
from d3tom_export.config import LanguageConfig, MergeConfig
from d3tom_export.stages.contract import EXTERNAL_POLICIES


@dataclass(frozen=True)
class LoadedStages:
    """The stages of one loop, and what is known of them without asking the bundle."""

    stages: Mapping[str, Stage]
    """By the loop's own names."""
    device: str
    """Where their tensors lie, as ONNX Runtime names it."""
    language: LanguageConfig
    merge: MergeConfig
    """What they are cut for."""

    @property
    def needs_selection_scores(self) -> bool:
        """Whether `merge` takes the scores of a policy that is computed outside of the graphs."""
        return self.merge.select in EXTERNAL_POLICIES

    @property
    def keeps_positions(self) -> bool:
        """Whether merged rows keep their rotary positions, which `merge` then tells to `back`."""
        return self.merge.positions == "original"

    def on_device(self, array: NDArray) -> ort.OrtValue:
        """``array`` as a value on the stages' device."""
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def on_host(self, array: NDArray) -> ort.OrtValue:
        """``array`` as a value in the host's memory: an input that is an axis is read there before a kernel runs."""
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
