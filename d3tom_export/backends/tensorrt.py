"""A bundle's engines on an NVIDIA GPU, through TensorRT or TensorRT-RTX. Imports neither torch nor onnx.

What has been executed so far is this code on a double of TensorRT's runtime and of CUDA (tests/backends): every call in
its order, every address, shape and copy, parity with PyTorch. No engine has been run on a GPU by the tests' authors;
docs/tensorrt_backend.md says what that leaves open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d3tom_export.backends.rtx_runtime import RtxRuntime, Specialization, kernels_file
from d3tom_export.backends.tensorrt_cached import CachedSession, engines_of
from d3tom_export.backends.tensorrt_dtypes import from_engine
from d3tom_export.backends.tensorrt_engines import checked_engines, choose_target
from d3tom_export.backends.tensorrt_loaded import LoadedEngines
from d3tom_export.backends.tensorrt_runner import MOST_GRAPHS, GraphCounts, Operation
from d3tom_export.backends.tensorrt_sessions import UncachedSession
from d3tom_export.backends.tensorrt_stage import Axes, Stage, deserialize
from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import Loop
from d3tom_export.engines.cuda import CudaDevice, Device, Gpu, gpus
from d3tom_export.engines.log import log_of
from d3tom_export.engines.memory import GIB, engines_memory
from d3tom_export.engines.record import EngineRecord
from d3tom_export.engines.shapes import SHAPE_INPUTS
from d3tom_export.engines.stages import PROMPT, PROMPT_DECIDERS, STEP, buffers, engine_tensors, prompt_sizes
from d3tom_export.engines.toolkit import ToolkitName, load_toolkit
from d3tom_export.errors import D3tomError, listing
from d3tom_export.loop.denoise import Floats, Ints, PromptMerge, Session
from d3tom_export.progress import Progress, no_progress
from d3tom_export.stages.contract import StageSpec


class TensorRTBackend:
    """A bundle on TensorRT.

    Args:
        bundle: A verified bundle with engines for this GPU.
        loop: Which of the bundle's loops to load.
        toolkit: "tensorrt" or "tensorrt-rtx": whose engines.
        precision: "fp32", "fp16" or "bf16", where the bundle has engines in several; None: the only one it has.
        cuda_graphs: Replay steps that recur as CUDA graphs.
        most_graphs: How many of them to hold at most.
        specialization: How TensorRT-RTX compiles kernels for shapes it has not run yet (:data:`Specialization`).
        progress: Called as each engine is loaded.

    Buffers stay allocated from one answer to the next. Use it in the thread that made it. Raises :class:`D3tomError`
    where TensorRT, the driver or a GPU is missing, and for engines that do not fit (tensorrt_engines).
    """

    shares_prefix = False
    """There are no engines of `extend`."""

    def __init__(
        self,
        bundle: Bundle,
        loop: Loop = "uncached",
        toolkit: ToolkitName = "tensorrt",
        *,
        precision: str | None = None,
        cuda_graphs: bool = True,
        most_graphs: int = MOST_GRAPHS,
        specialization: Specialization = "lazy",
        progress: Progress = no_progress,
    ) -> None:
        self.name: str = toolkit
        self.kv_cache = loop == "cached"
        self._bundle = bundle
        self._language = bundle.config.language
        loaded = load_toolkit(toolkit)
        gpu, target = choose_target(bundle, loaded, self._gpus(), precision)
        self.precision: str = target.precision
        engines = checked_engines(bundle, loop, target, loaded)
        self.device = self._open(gpu)
        self._check_memory([record for record, _ in engines.values()])
        log = log_of(loaded.trt)
        runtime = loaded.trt.Runtime(log.logger)
        records = [record for record, _ in engines.values()]
        rtx: RtxRuntime | None = None
        if loaded.name == "tensorrt-rtx":
            rtx = RtxRuntime(
                loaded,
                kernels_file(loaded, target, gpu.name, records),
                own_graphs=cuda_graphs,
                specialization=specialization,
                note=lambda sentence: progress(sentence, len(engines), len(engines)),
            )
        self.stages: dict[str, Stage] = {}
        for done, (name, (record, path)) in enumerate(engines.items()):
            progress(f"loading {name} on {gpu}", done, len(engines))
            engine = deserialize(loaded, runtime, path, log)
            self.stages[name] = Stage(record, engine, loaded, log, rtx)
        progress("engines loaded", len(engines), len(engines))
        most = most_graphs if cuda_graphs and rtx is None else 0
        merge = bundle.manifest.merge
        self._loaded = LoadedEngines(runtime, self.stages, self.device, rtx, most, self._language, merge)

    def _gpus(self) -> list[Gpu]:
        return gpus()

    def _check_memory(self, records: Sequence[EngineRecord]) -> None:
        """Refuse engines that do not fit into the GPU's free memory, before any is loaded."""
        need = engines_memory(records, self._language)
        held = need.weights + need.cache + need.buffers  # of what is inside stages, TensorRT alone knows
        free, whole = self.device.free_memory()
        if held > free:
            lower = "" if self.precision != "fp32" else " Engines of --precision fp16 or bf16 need half of it."
            raise D3tomError(
                f"{self.device.name} has {free / GIB:.1f} of its {whole / GIB:.1f} GiB free, and these engines need "
                f"{held / GIB:.1f} GiB: {need.weights / GIB:.1f} for their weights, {need.cache / GIB:.1f} for keys "
                f"and values and {need.buffers / GIB:.1f} for other tensors of an answer of the usual length. Close "
                f"other programs on the GPU (`nvidia-smi` lists them), or run on a larger one.{lower}"
            )

    def _open(self, gpu: Gpu) -> Device:
        return CudaDevice(gpu)

    @property
    def graph_counts(self) -> GraphCounts:
        """What became of the steps so far: run plainly, captured, launched as a graph."""
        return self._loaded.graph_counts

    def check(self, axes: Axes) -> None:
        """Refuse sizes that an engine is not built for, as far as ``axes`` knows them."""
        self._loaded.check(axes)

    def run_stage(
        self, name: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        loop: Loop = "cached" if self.kv_cache else "uncached"
        contract = self._bundle.manifest.stages[self._bundle.stage_keys(loop)[name]]
        axes = self._axes_of(contract, inputs)
        runs = engines_of(name, list(self.stages)) if contract.loop == "cached" else [(name, STEP)]
        workspace = self._loaded.apart
        operations: list[Operation] = []
        for tensor in engine_tensors(contract.inputs, self.precision):
            if tensor.name not in SHAPE_INPUTS:
                operations.append(self._loaded.upload(workspace, tensor.name, inputs[tensor.name], tensor.dtype))
        sizes: Mapping[str, int] = axes
        if name in ("prefill", "prompt_front"):
            sizes = self._prompt_alone(axes, operations)
        elif name == "prompt_back":  # its C rows are a prompt's, over no cache
            sizes = prompt_sizes({**axes, "P": axes["C"]})
        for engine, profile in runs:
            self._loaded.check(sizes, [engine], profile)
            stage = self.stages[engine]
            # Alone, `embed` is not there for `front`: its output bears its own name.
            places: dict[str, str] = {}
            if contract.loop == "cached":
                places = buffers(stage.record.spec, profile, merges_prompt=name in ("prompt_front", "prompt_back"))
            if profile == PROMPT:
                places["token"] = "first_token"  # of the one row that the head runs on
            operations.append(stage.launch(sizes, partial(self._place_apart, places), profile))
        tensors = {tensor.name: tensor for tensor in engine_tensors(contract.outputs, self.precision)}
        fetched = {output: self._loaded.fetch(workspace, tensors[output], axes) for output in outputs}
        operations += [fetch for fetch, _ in fetched.values()]
        self._loaded.run(operations, recurs=False)
        return {output: from_engine(array, tensors[output].dtype) for output, (_, array) in fetched.items()}

    def _place_apart(self, places: Mapping[str, str], tensor: str, size: int) -> int:
        return self._loaded.apart.on_device(places.get(tensor, tensor), size)

    def _prompt_alone(self, axes: Axes, operations: list[Operation]) -> dict[str, int]:
        """Sizes of `prefill`, which knows of no visual tokens; uploads what engines want to be there all the same."""
        fewest = self.stages["decide"].record.profiles[PROMPT]["visual_positions"][0][0]
        nobody = np.zeros((axes["B"], axes["P"]), dtype=np.bool_)
        operations.append(self._loaded.upload(self._loaded.apart, PROMPT_DECIDERS, nobody, "bool"))
        operations.append(self._loaded.upload(self._loaded.apart, "visual_positions", np.arange(fewest), "int64"))
        return prompt_sizes({**axes, "V": fewest})

    def _axes_of(self, stage: StageSpec, inputs: Mapping[str, NDArray[Any]]) -> dict[str, int]:
        """The dynamic axes' sizes that ``inputs`` have, and those that follow from them."""
        axes: dict[str, int] = {}
        for tensor in stage.inputs:
            array = inputs.get(tensor.name)
            if tensor.name in SHAPE_INPUTS and tensor.default is not None and array is None:
                axes[SHAPE_INPUTS[tensor.name]] = tensor.default  # engines know no optional inputs
                continue
            if array is None:
                raise D3tomError(
                    f"Stage {stage.name} was given {listing(inputs)} and needs {tensor.name} too. "
                    "This is a defect of d3tom-export; please report it."
                )
            if tensor.name in SHAPE_INPUTS:
                axes[SHAPE_INPUTS[tensor.name]] = int(array.reshape(-1)[0])
            else:
                axes |= {a: size for a, size in zip(tensor.axes, array.shape, strict=True) if isinstance(a, str)}
        if {"P", "G"} <= axes.keys():
            axes.setdefault("L", axes["P"] + axes["G"])
        if {"V", "K"} <= axes.keys():
            merged_away = axes["V"] - axes["K"]
            for rows, merged in (("L", "M"), ("P", "C")):
                if rows in axes:
                    axes.setdefault(merged, axes[rows] - merged_away)
        if stage.loop == "cached" and "G" in axes:
            axes["S"] = axes["G"]
        return axes

    def embed_tokens(self, token_ids: Ints) -> Floats:
        return self.run_stage("embed", {"token_ids": token_ids}, ["embeddings"])["embeddings"]

    def encode_views(self, pixel_values: Floats) -> Floats:
        return self.run_stage("vision", {"pixel_values": pixel_values}, ["visual_features"])["visual_features"]

    @property
    def image_newline(self) -> NDArray[np.float32]:
        return self._bundle.image_newline()

    def start(
        self,
        prompt_embeddings: Floats,
        visual_positions: Ints,
        *,
        merges: bool = True,
        prompt_merge: PromptMerge | None = None,
        shared_rows: int = 0,
    ) -> Session:
        if shared_rows:
            raise D3tomError(
                f"Engines of {self.name} do not share a picture's prefill between questions. Leave --share-prefix out, "
                "or run the bundle's graphs with --backend onnxruntime."
            )
        if self.kv_cache:
            return CachedSession(self._loaded, prompt_embeddings, visual_positions, prompt_merge)
        return UncachedSession(self._loaded, prompt_embeddings, visual_positions)
