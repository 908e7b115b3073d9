"""The stages in PyTorch, under the very flow that runs them on ONNX Runtime, open to an observer.

The flow (which stage runs when, and on what) is not written a second time: sessions of the ONNX Runtime backend run on
stages that look like theirs and compute in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.onnxruntime_package import ort
from d3tom_export.backends.onnxruntime_stage import Stage
from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import Loop
from d3tom_export.merging.merge import NearTie, merge_tokens, near_ties, nearest_kept
from d3tom_export.model.lavida import Lavida
from d3tom_export.stages.contract import StageSpec, stage_key
from d3tom_export.stages.cut import stage_modules

Arrays = dict[str, NDArray[Any]]

_MOST_NEAR_TIES = 4
"""Near-ties whose outcomes are each computed apart; beyond, only all of them together."""


class _WatchedMerges(TorchDispatchMode):
    """Notes the near-ties of every merge that a stage runs, and sends the ``turned`` ones the other way.

    ``within`` None looks for none. A tie's ``layer`` is here the number of the merge within the stage.
    """

    def __init__(self, within: float | None, turned: Sequence[NearTie] = ()) -> None:
        super().__init__()
        self._within, self._turned, self._calls = within, turned, 0
        self.found: list[NearTie] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.d3tom_export.merge.default:
            return func(*args, **(kwargs or {}))
        rows, normed, kept = args
        if self._within is not None:
            self.found += near_ties(normed, kept, self._calls, within=self._within)
        turned = [tie for tie in self._turned if tie.layer == self._calls]
        self._calls += 1
        nearest = nearest_kept(normed, kept, turned=turned)
        return [merge_tokens(hidden, normed, kept, nearest=nearest) for hidden in rows]


def _owned(array: NDArray[Any]) -> ort.OrtValue:
    """``array`` as a value with memory of its own: one made on an array's memory gives views that outlive it."""
    value = ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype.type, "cpu", 0)
    value.update_inplace(array)
    return value


class ReferenceStage(Stage):
    """A stage's PyTorch module that takes and gives what a :class:`Stage` does, on the CPU."""

    def __init__(self, spec: StageSpec, module: nn.Module, observe: Callable[[ReferenceStage, Arrays, Arrays], None]):
        self.spec, self.module = spec, module
        self._observe, self._device = observe, "cpu"
        self.types = {}  # the contract's: float32

    def tensors(self, inputs: Mapping[str, NDArray[Any]]) -> list[Tensor]:
        """The module's arguments, defaults filled in; they share memory with ``inputs``."""
        arrays = [
            inputs[spec.name] if spec.name in inputs else np.array([spec.default], dtype=spec.dtype)
            for spec in self.spec.inputs
        ]
        return [torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays]

    def _outputs(
        self, inputs: Mapping[str, NDArray[Any]], within: float | None = None, turned: Sequence[NearTie] = ()
    ) -> tuple[Arrays, list[NearTie]]:
        with torch.inference_mode(), _WatchedMerges(within, turned) as merges:
            result = self.module(*self.tensors(inputs))
        values = result if isinstance(result, tuple) else (result,)
        arrays = {
            spec.name: np.ascontiguousarray(value.numpy())
            for spec, value in zip(self.spec.outputs, values, strict=True)
        }
        return arrays, merges.found

    def outputs(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """What the stage makes of ``inputs``, seen by no observer."""
        return self._outputs(inputs)[0]

    def alternatives(self, inputs: Mapping[str, NDArray[Any]], within: float) -> list[Arrays]:
        """What the outputs are if near-ties of the merge go the other way: first all together, then some alone.

        ``within`` is the difference of similarity that makes a near-tie. Empty where no merge has any. A row that at
        most two of the first four touch is among the outcomes.
        """
        _, ties = self._outputs(inputs, within)
        # A token's ties turn together, whichever layers' caches it ties in.
        tokens = list(dict.fromkeys((tie.row, tie.token) for tie in ties))[:_MOST_NEAR_TIES]
        singles = [[tie for tie in ties if (tie.row, tie.token) == token] for token in tokens]
        return [self._outputs(inputs, turned=turned)[0] for turned in ([ties, *singles] if ties else [])]

    def run(
        self,
        inputs: Mapping[str, ort.OrtValue],
        outputs: Sequence[str] = (),
        *,
        into: Mapping[str, ort.OrtValue] | None = None,
        shrink: bool = False,
    ) -> list[ort.OrtValue]:
        arrays = {name: value.numpy() for name, value in inputs.items()}
        result, _ = self._outputs(arrays)
        self._observe(self, arrays, result)
        for name, value in (into or {}).items():
            value.update_inplace(result[name])
        return [_owned(result[name]) for name in outputs]


class ReferenceBackend(OnnxRuntimeBackend):
    """The bundle's stages as PyTorch modules of ``model``, one loop of them, under ONNX Runtime's flow.

    Args:
        bundle: Whose stages and merging they are; its graphs are not loaded.
        model: The eager model, float32.
        observe: Called after each stage has run, with the stage, its inputs and all of its outputs.
    """

    name = "pytorch stages"

    def __init__(
        self,
        bundle: Bundle,
        loop: Loop,
        model: Lavida,
        observe: Callable[[ReferenceStage, Arrays, Arrays], None],
    ) -> None:
        manifest = bundle.manifest
        modules, loops = stage_modules(model, manifest.merge, [loop], manifest.shares_prefix), manifest.loops

        def reference(name: str, key: str) -> Stage:
            spec = bundle.manifest.stages[key]
            assert key == stage_key(name, spec.loop, loops)
            return ReferenceStage(spec, modules[name], observe)

        self._reference = reference
        super().__init__(bundle, loop, device="cpu")

    def _open(self, name: str, key: str) -> Stage:
        return self._reference(name, key)
