"""What an answer needs of a bundle whose engines are loaded: their stages, the GPU's queue, and buffers to work in."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from d3tom_export.backends.rtx_runtime import RtxRuntime
from d3tom_export.backends.tensorrt_dtypes import host_dtype, to_engine
from d3tom_export.backends.tensorrt_memory import Workspace
from d3tom_export.backends.tensorrt_runner import Fetch, GraphCounts, Operation, Runner, Upload
from d3tom_export.backends.tensorrt_stage import Axes, Stage, out_of_profile_remedy, tensor_shape
from d3tom_export.config import LanguageConfig, MergeConfig
from d3tom_export.engines.cuda import Device
from d3tom_export.engines.stages import STEP
from d3tom_export.stages.contract import TensorSpec

_MOST_CHECKED = 4096
"""Sizes remembered as fitting the engines."""


class LoadedEngines:
    """The engines of one loop on one GPU.

    Args:
        runtime: TensorRT's runtime, which engines need for as long as they live.
        stages: The engines by name.
        device: The GPU.
        rtx: What TensorRT-RTX keeps beside them; None for TensorRT.
        most_graphs: How many CUDA graphs to hold at most; 0 holds none.
        language: The model's sizes.
        merge: What the stages are cut for.

    Everything on the GPU is given back when the last user of this object, a backend or an answer, is gone.
    """

    def __init__(
        self,
        runtime: Any,
        stages: Mapping[str, Stage],
        device: Device,
        rtx: RtxRuntime | None,
        most_graphs: int,
        language: LanguageConfig,
        merge: MergeConfig,
    ) -> None:
        self._runtime, self.stages, self._device, self._rtx = runtime, stages, device, rtx
        self.language, self.merge = language, merge
        self.needs_selection_scores = any(
            tensor.name == "selection_scores" for stage in stages.values() for tensor in stage.inputs
        )
        self._runner = Runner(device, stages, most_graphs)
        # Stages that run by themselves do not make an answer's buffers grow, which would cost it its graphs.
        self.apart = Workspace(device, self._runner.forget)
        self._workspaces = [self.apart]
        self._idle: list[Workspace] = []
        self._fitting: set[tuple[tuple[str, int], ...]] = set()
        finish = weakref.finalize(self, _close, self._runner, self._workspaces, rtx)
        finish.atexit = False  # the process takes its memory with it,
        if rtx is not None:
            weakref.finalize(self, rtx.save)  # but not what it compiled

    @property
    def graph_counts(self) -> GraphCounts:
        """What became of the steps so far: run plainly, captured, launched as a graph."""
        return self._runner.counts

    def borrow(self, session: object) -> Workspace:
        """A workspace for ``session``, which returns when the session is gone."""
        if not self._idle:
            self._idle.append(Workspace(self._device, self._runner.forget))
            self._workspaces += self._idle
        workspace = self._idle.pop()
        weakref.finalize(session, self._give_back, workspace).atexit = False
        return workspace

    def _give_back(self, workspace: Workspace) -> None:
        """An answer has ended."""
        self._idle.append(workspace)
        if self._rtx is not None:
            self._rtx.save(at_once=False)

    def check(self, axes: Axes, stages: Sequence[str] = (), profile: int = STEP) -> None:
        """Refuse sizes outside ``profile`` of ``stages`` (default: of all), as far as ``axes`` knows them."""
        key = (*axes.items(), (",".join(stages), profile))
        if key in self._fitting:
            return
        checked = [self.stages[name] for name in stages or self.stages]
        outside = set().union(*(stage.misfits(axes, profile) for stage in checked))
        for stage in checked:
            stage.check_fits(axes, out_of_profile_remedy(outside), profile)
        if len(self._fitting) >= _MOST_CHECKED:
            self._fitting.clear()
        self._fitting.add(key)

    def upload(self, workspace: Workspace, name: str, array: NDArray, dtype: str) -> Upload:
        """A copy of ``array``, converted to an engine's ``dtype``, to the device buffer ``name``."""
        data = to_engine(array, dtype)
        pinned = workspace.on_host(f"to {name}", data.shape, data.dtype)
        pinned[...] = data
        return Upload(workspace.on_device(name, data.nbytes), pinned.ctypes.data, data.nbytes)

    def fetch(self, workspace: Workspace, tensor: TensorSpec, axes: Axes) -> tuple[Fetch, NDArray]:
        """A copy of the device buffer of ``tensor``, and the pinned array in which it arrives."""
        pinned = workspace.on_host(f"from {tensor.name}", tensor_shape(tensor, axes), host_dtype(tensor.dtype))
        source = workspace.on_device(tensor.name, pinned.nbytes)
        return Fetch(pinned.ctypes.data, source, pinned.nbytes), pinned

    def run(self, operations: Sequence[Operation], *, recurs: bool = True) -> None:
        """Run ``operations`` and wait for them."""
        self._runner.run(operations, recurs=recurs)
        self._device.synchronize()

    def enqueue(self, operations: Sequence[Operation], *, recurs: bool = True) -> None:
        """Have ``operations`` run, without waiting for them."""
        self._runner.run(operations, recurs=recurs)


def _close(runner: Runner, workspaces: Sequence[Workspace], rtx: RtxRuntime | None) -> None:
    for workspace in workspaces:
        workspace.close()
    if rtx is not None:
        rtx.save()
    runner.close()
    if rtx is not None:
        rtx.close()
