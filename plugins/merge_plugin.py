"""The TensorRT plugin of ``D3ToMMerge`` in Python, for ``tensorrt`` and ``tensorrt_rtx`` alike.

    hidden (B, V, W) T, normed (B, V, D) T, kept (B, K) int64  ->  merged (B, K, W) T     T float32, float16, bfloat16

With the attribute ``rows`` above 1, further row inputs follow, of any widths, and an output for each: who joins whom is
searched once for all. All dimensions may be dynamic; K is that of ``kept``. Built into an engine, the plugin puts its
compiled kernels into the plan, so the machine that runs the engine needs cuda-python, but neither Triton nor torch.
Engines that hold it are deserialized in a process that has called :func:`register_merge_plugin`; where there is no
Python, the library in ``plugins/cpp`` takes its place and reads the same plan.

TensorRT is an argument here, never an import: its classes are base classes, and which package it is, is the caller's
choice. Facts on the interfaces: reference/tensorrt.md, section 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np

from d3tom_export.errors import D3tomError
from d3tom_export.plugins.archive import Kernel, pack, unpack
from d3tom_export.plugins.compiled import check_sm, check_triton, compile_kernels
from d3tom_export.plugins.driver import LoadedKernels, PreparedMerge, cuda_driver, device_sm, shared_kernels
from d3tom_export.plugins.identity import source_hash
from d3tom_export.plugins.launch import MergeSizes, row_names, workspace
from d3tom_export.plugins.merge_op import DOMAIN, OP_TYPE, ROWS

PLUGIN_NAME = OP_TYPE
PLUGIN_NAMESPACE = DOMAIN
"""Also what a node's ``plugin_namespace`` attribute must say for TensorRT to take the plugin, not the function body."""
PLUGIN_VERSION = "1"
KERNELS_FIELD = "kernels"
"""The serialized field that holds an archive of compiled kernels (:mod:`d3tom_export.plugins.archive`)."""

_SOURCES = ("kernels.py", "launch.py", "archive.py", "compiled.py", "driver.py", "identity.py", "merge_plugin.py")
_MOST_PREPARED = 64
"""Sizes whose launches one node keeps: a merging answer of 32 steps has that many, another question others."""
_creators: dict[str, Any] = {}
_present: dict[str, tuple[str, Callable[[], None]]] = {}
"""The form of the plugin in each toolkit's registry, and what takes it out."""


@cache
def plugin_identity() -> str:
    """A content hash of everything that decides what a built plugin holds and does, but for Triton's version."""
    return source_hash(*_SOURCES)


def register_merge_plugin(trt: Any, sm: int | Iterable[int] | None = None) -> Any:
    """Make the Python plugin known to ``trt`` (module ``tensorrt`` or ``tensorrt_rtx``); returns its creator.

    ``sm`` names the GPU architectures that engines built from now on carry kernels for, without the point: 89, or
    (89, 120). None: the GPU at hand, asked only when an engine is built. Calling again changes only that, and a call
    with None keeps what was set, so loading an engine never re-targets a build.

    :raises D3tomError: ``sm`` is given and unknown, or Triton is missing, or TensorRT refuses the plugin.
    """
    sms = () if sm is None else (sm,) if isinstance(sm, int) else tuple(dict.fromkeys(sm))
    for each in sms:
        check_sm(each)
    if sms:
        check_triton()
    # TensorRT keeps a bare pointer to the Python object.
    creator = _creators[trt.__name__] = _creators.get(trt.__name__) or plugin_classes(trt)()

    def enter() -> Callable[[], None]:
        registry = trt.get_plugin_registry()
        if not registry.register_creator(creator, PLUGIN_NAMESPACE):
            raise D3tomError(
                f"{trt.__name__} did not register the plugin {PLUGIN_NAMESPACE}::{PLUGIN_NAME} version "
                f"{PLUGIN_VERSION}: another of that name is registered, such as the C++ library of the same plugin, "
                "loaded by other means than D3TOM_EXPORT_MERGE_LIBRARY. Use one of them in a process."
            )
        return lambda: registry.deregister_creator(creator)

    take_place(trt, PLUGIN_NAME, enter)
    if sms:
        creator.sms = sms
    return creator


def take_place(trt: Any, form: str, enter: Callable[[], Callable[[], None]]) -> None:
    """Have one ``form`` of the plugin in ``trt``'s registry, in the place of any other of this process.

    ``enter`` puts it there and returns what takes it out. Engines that another form made go on with that.
    """
    present, leave = _present.get(trt.__name__, ("", None))
    if present == form:
        return
    if leave is not None:
        leave()
        del _present[trt.__name__]
    _present[trt.__name__] = form, enter()


@cache
def plugin_classes(trt: Any) -> Any:
    """The creator class over ``trt``'s base classes; its instances make the plugin."""
    types = {trt.float32: "float32", trt.float16: "float16", trt.bfloat16: "bfloat16"}

    class MergePlugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        """One merge node. ``kernels`` come from a plan; without them they are compiled for ``sms`` when needed."""

        def __init__(self, rows: int, sms: tuple[int, ...], kernels: tuple[Kernel, ...], driver: Any = None) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.plugin_name = PLUGIN_NAME
            self.plugin_namespace = PLUGIN_NAMESPACE
            self.plugin_version = PLUGIN_VERSION
            self.num_outputs = rows
            self.metadata_string = plugin_identity()
            self.timing_cache_id = plugin_identity()
            self.rows = rows
            self.sms = sms
            self.kernels = kernels
            self.driver = driver
            self.dtype: str | None = None
            self.depth: int | None = None
            self.widths: tuple[int | None, ...] = ()
            self.loaded: LoadedKernels | None = None
            self.prepared: dict[MergeSizes, PreparedMerge] = {}
            """Of the present type; blocks of this instance alone, which one context runs."""
            self.serialized: tuple[Any, ...] = ()

        def get_capability_interface(self, _type: Any) -> Any:
            return self

        def clone(self) -> Any:
            twin = MergePlugin(self.rows, self.sms, self.kernels, self.driver)
            twin.dtype, twin.depth, twin.widths = self.dtype, self.depth, self.widths
            twin.loaded = self.loaded
            return twin

        def destroy(self) -> None:
            # TensorRT's binding never lets go of the Python object: what it holds must go here.
            self.loaded, self.kernels, self.serialized = None, (), ()
            self.prepared.clear()

        # Build time.

        def get_output_data_types(self, input_types: Any) -> Any:
            return [input_types[0]] * self.rows

        def get_output_shapes(self, inputs: Any, _shape_inputs: Any, _builder: Any) -> Any:
            if len(inputs) != self.rows + 2:
                raise D3tomError(
                    f"A {OP_TYPE} node of {self.rows} row inputs (its attribute `{ROWS}`) takes {self.rows + 2} "
                    f"inputs with `normed` and `kept`; found {len(inputs)}. Export the graph again."
                )
            shapes = []
            for hidden in _rows_of(inputs):
                merged = trt.DimsExprs(3)
                merged[0], merged[1], merged[2] = hidden[0], inputs[2][1], hidden[2]
                shapes.append(merged)
            return shapes

        def supports_format_combination(self, pos: int, in_out: Any, _num_inputs: int) -> bool:
            desc = in_out[pos].desc
            if desc.format != trt.TensorFormat.LINEAR:
                return False
            if pos == 2:
                return bool(desc.type == trt.int64)
            return desc.type in types and desc.type == in_out[0].desc.type

        def configure_plugin(self, in_: Any, _out: Any) -> None:
            self.dtype = types[in_[0].desc.type]
            self.depth = _static(in_[1], 2)
            self.widths = tuple(_static(tensor, 2) for tensor in _rows_of(in_))

        def get_workspace_size(self, in_: Any, _out: Any) -> int:
            return workspace(_sizes([tensor.max for tensor in in_])).size

        def get_fields_to_serialize(self) -> Any:
            # TensorRT reads the fields after this returns: they, and the bytes they point to, must outlive the call.
            archive = np.frombuffer(pack(self.compiled()), dtype=np.int8)
            rows = np.array([self.rows], dtype=np.int32)
            fields = [
                trt.PluginField(KERNELS_FIELD, archive, trt.PluginFieldType.INT8),
                trt.PluginField(ROWS, rows, trt.PluginFieldType.INT32),
            ]
            listed = trt.PluginFieldCollection(fields)
            # The list would be converted, which the binding does only for calls that came through it.
            collection = trt.PluginFieldCollection_(listed)
            self.serialized = (archive, rows, fields, listed, collection)
            return collection

        def compiled(self) -> tuple[Kernel, ...]:
            """The kernels of this node, compiled at the first call."""
            if not self.kernels:
                if self.dtype is None:
                    raise D3tomError(
                        "TensorRT asked the merge plugin for its kernels before telling it their type; report this."
                    )
                sms = self.sms or (device_sm(self.driver or cuda_driver()),)
                self.kernels = compile_kernels(self.dtype, sms, self.depth, *self.widths)
            return self.kernels

        # Run time.

        def set_tactic(self, tactic: int) -> None:
            # Called with 0 where a plugin offers no tactics (NvInferRuntime.h, IPluginV3OneRuntime::setTactic).
            if tactic:
                raise D3tomError(
                    f"TensorRT chose tactic {tactic} of the merge plugin, which offers none; 0, its one way to run, "
                    "was expected. The engine is damaged or was built by another version; build it again."
                )

        def on_shape_change(self, in_: Any, _out: Any) -> None:
            dtype = types[in_[0].type]
            if dtype != self.dtype:
                self.prepared.clear()
            self.dtype = dtype

        def attach_to_context(self, _context: Any) -> Any:
            if self.kernels or self.dtype is not None:
                self.load()
            return self.clone()

        def load(self) -> LoadedKernels:
            """The kernels in the current CUDA context, which its plugins share."""
            driver = self.driver = self.driver or cuda_driver()
            self.loaded = shared_kernels(self.compiled(), driver)
            return self.loaded

        def enqueue(
            self, input_desc: Any, _output_desc: Any, inputs: Any, outputs: Any, workspace_address: int, stream: int
        ) -> None:
            sizes = _sizes([desc.dims for desc in input_desc])
            merge = self.prepared.get(sizes)
            if merge is None:
                if len(self.prepared) >= _MOST_PREPARED:
                    self.prepared.clear()
                merge = (self.loaded or self.load()).prepare(sizes, types[input_desc[0].type])
                self.prepared[sizes] = merge
            merge.place((*inputs, *outputs), workspace_address)
            merge.launch(stream)

    class MergePluginCreator(trt.IPluginCreatorV3One):
        """Makes the plugin: at build time for ``sms`` and as the node says, at run time from a plan's fields."""

        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name = PLUGIN_NAME
            self.plugin_namespace = PLUGIN_NAMESPACE
            self.plugin_version = PLUGIN_VERSION
            # TensorRT's binding keeps only pointers to these.
            self.fields = [trt.PluginField(ROWS, np.array([], dtype=np.int32), trt.PluginFieldType.INT32)]
            self.collection = trt.PluginFieldCollection(self.fields)
            self.field_names = self.collection
            self.sms: tuple[int, ...] = ()
            self.driver: Any = None

        def create_plugin(self, _name: str, fields: Any, _phase: Any) -> Any:
            content = {field.name: np.asarray(field.data) for field in fields}
            # Plans and nodes without the field have one row input.
            rows = int(content[ROWS].ravel()[0]) if ROWS in content else 1
            row_names(rows)
            kernels = unpack(content[KERNELS_FIELD].tobytes()) if KERNELS_FIELD in content else ()
            return MergePlugin(rows, self.sms, kernels, self.driver)

    return MergePluginCreator


def _rows_of(inputs: Any) -> list[Any]:
    """The row inputs among a node's inputs: the first, and those behind ``normed`` and ``kept``."""
    return [inputs[0], *(inputs[index] for index in range(3, len(inputs)))]


def _sizes(shapes: Any) -> MergeSizes:
    """The sizes of a merge whose inputs have ``shapes``. By index: iterating over TensorRT's takes 20 times as long."""
    hidden, normed, kept, *further = shapes
    widths = tuple([shape[2] for shape in further])
    return MergeSizes(hidden[0], hidden[1], kept[1], normed[2], hidden[2], widths)


def _static(tensor: Any, axis: int) -> int | None:
    """The size of an axis that no profile changes; None, for which kernels of any width are compiled, otherwise."""
    size = int(tensor.desc.dims[axis])
    return None if size < 0 else size
