"""TensorRT's C++ interface to both forms of the plugin, in the interpreter's worker and without a GPU.

The creator comes out of the real registry of TensorRT-RTX; each call is the harness's (cpp/harness.cpp). CUDA's driver
is the stub (cpp/cuda_stub.cpp), for cuda-python and the library alike: it notes what is loaded, and every launch, which
the interpreter can run.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from d3tom_export.engines.toolkit import load_toolkit
from d3tom_export.plugins import launch
from d3tom_export.plugins.archive import unpack
from d3tom_export.plugins.launch import DTYPES, MergeSizes, Variant, buffer_names, spec
from d3tom_export.plugins.merge_plugin import PLUGIN_NAMESPACE, plugin_classes
from tests.plugins.interpreter import run_launch

Form = Literal["python", "library"]
FORMS: tuple[Form, ...] = ("python", "library")
STREAM = 4321

_LOAD = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)
_SYMBOL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_char_p)
_SHARED = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_int)
LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
)
_POINTERS = ("creator", "create", "again", "clone", "attach", "field")


class Libraries(NamedTuple):
    """Paths of what the tests build."""

    plugin: Path
    autoload: Path
    """The same, registering itself when it is opened."""
    stub: Path
    """Its soname is libcuda.so.1: once loaded, it is what both forms find."""
    harness: Path


class Launched(NamedTuple):
    """A launch as the driver saw it."""

    variant: Variant
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int | None
    arguments: tuple[str | int, ...]
    """The parameters: 8 bytes that are a buffer's address, by its name; 4 bytes of a size; 8 bytes of scratch."""


@contextmanager
def standard_error() -> Iterator[Callable[[], str]]:
    """What the process writes to standard error meanwhile, C++ included."""
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)

        def text() -> str:
            file.seek(0)
            return file.read().decode()

        try:
            yield text
        finally:
            os.dup2(before, 2)
            os.close(before)


class Session:
    """The worker's TensorRT, with one form of the plugin at a time in its registry."""

    def __init__(self, libraries: Libraries) -> None:
        ctypes.CDLL(str(libraries.stub), mode=ctypes.RTLD_GLOBAL)
        self.stub = ctypes.CDLL(str(libraries.stub))
        self.stub.stub_calls.restype = ctypes.c_char_p
        self.stub.stub_context.argtypes = self.stub.stub_destroy.argtypes = [ctypes.c_uint64]
        self.trt = load_toolkit("tensorrt-rtx").trt
        self.libraries = libraries
        self.registry = self.trt.get_plugin_registry()
        self.form: Form | None = None
        self.handle: Any = None
        self.creator = ctypes.c_void_p()
        self.harness = ctypes.CDLL(str(libraries.harness))
        for name in _POINTERS:
            getattr(self.harness, f"harness_{name}").restype = ctypes.c_void_p
        self.harness.harness_workspace.restype = ctypes.c_int64
        self.harness.harness_enqueue.restype = ctypes.c_double
        self.harness.harness_names.restype = ctypes.c_char_p
        self.alive: Any = None
        self.failures: list[BaseException] = []
        self.launched: list[Launched] = []
        self.names: dict[int, str] = {}
        self.regions: list[np.ndarray] = []
        """Memory that launches are run on; where it is none, they are only noted."""

    def use(self, form: Form | None) -> None:
        """Put ``form`` into the registry, in the other's place; None: only take the other out."""
        if form == self.form:
            return
        if self.form == "python":
            assert self.registry.deregister_creator(self.handle)
        elif self.form == "library":
            self.registry.deregister_library(self.handle)
        self.form = form
        if form is None:
            return
        if form == "python":
            self.handle = plugin_classes(self.trt)()
            assert self.registry.register_creator(self.handle, PLUGIN_NAMESPACE)
        else:
            self.handle = self.registry.load_library(str(self.libraries.plugin))
            # Its errors then go to standard error, not into TensorRT's log.
            ctypes.CDLL(str(self.libraries.plugin)).setLoggerFinder(None)
        self.find()

    def find(self) -> None:
        """Take the creator out of the registry."""
        self.creator = ctypes.c_void_p(self.harness.harness_creator(_runtime_library().encode()))
        assert self.creator.value
        assert self.harness.harness_names(self.creator) == b"d3tom_export::D3ToMMerge 1 rows"

    def drive(self, known: bytes, sm: int) -> None:
        """Make the stub a driver of a GPU of ``sm`` that takes the kernels of ``known``."""
        # The shortest first: no more is read of an image than it has.
        kernels = sorted(unpack(known), key=lambda kernel: len(kernel.image))
        shared = dict.fromkeys((kernel.variant for kernel in kernels), 48 * 1024)
        self.failures, self.launched = [], []

        def load(image: int) -> int:
            return next(
                (
                    number
                    for number, kernel in enumerate(kernels, start=1)
                    if ctypes.string_at(image, len(kernel.image)) == kernel.image
                ),
                0,
            )

        def launched(number: int, numbers: Any, stream: int | None, parameters: Any) -> None:
            try:
                kernel = kernels[number - 1]
                plan = spec(kernel.variant)
                arguments: list[str | int] = []
                for place, name in enumerate((*plan.arguments, *[""] * kernel.scratch)):
                    cell = parameters[place]
                    assert cell is not None
                    if name in plan.sizes:
                        arguments.append(ctypes.c_int32.from_address(cell).value)
                    else:
                        address = ctypes.c_uint64.from_address(cell).value
                        arguments.append(self.names[address] if name else address)
                grid, block = tuple(numbers[:3]), tuple(numbers[3:6])
                assert numbers[6] <= shared[kernel.variant]
                self.launched.append(Launched(kernel.variant, grid, block, numbers[6], stream, tuple(arguments)))
                if self.regions:
                    by_name = {name: address for address, name in self.names.items()}
                    addresses = [by_name[name] for name in arguments[: len(plan.arguments)] if isinstance(name, str)]
                    sizes = [size for size in arguments[: len(plan.arguments)] if isinstance(size, int)]
                    run_launch(kernel.variant, grid, sizes, addresses, self.regions)
            except BaseException as error:  # ctypes would only print it
                self.failures.append(error)

        self.alive = (
            _LOAD(load),
            _SYMBOL(lambda number, symbol: kernels[number - 1].symbol.encode() == symbol),
            _SHARED(lambda number, size: shared.update({kernels[number - 1].variant: size})),
            LAUNCH(launched),
        )
        self.stub.stub_install(sm, *self.alive)

    def calls(self) -> list[str]:
        """The driver functions called since the last time."""
        text: bytes = self.stub.stub_calls()
        return text.decode().split()

    def create(self, archive: bytes | None, rows: int = 0) -> Plugin | None:
        """A plugin from a plan's fields, or from a node's without an archive; ``rows`` 0: without that field."""
        return self._made(self.harness.harness_create(self.creator, archive, len(archive or b""), rows))

    def again(self, plugin: Plugin) -> Plugin | None:
        """A plugin from the fields that ``plugin`` serializes."""
        return self._made(self.harness.harness_again(self.creator, plugin.pointer))

    def _made(self, pointer: int | None) -> Plugin | None:
        return Plugin(self, ctypes.c_void_p(pointer)) if pointer else None


class Plugin:
    """A plugin of either form."""

    def __init__(self, session: Session, pointer: ctypes.c_void_p) -> None:
        self.session, self.pointer = session, pointer

    def call(self, name: str, *arguments: Any) -> Any:
        return getattr(self.session.harness, f"harness_{name}")(self.pointer, *arguments)

    def clone(self) -> Plugin:
        made = self.session._made(self.call("clone"))
        assert made is not None
        return made

    def attach(self) -> Plugin | None:
        return self.session._made(self.call("attach"))

    def field(self, name: str) -> bytes | None:
        length = ctypes.c_int64()
        found = self.call("field", name.encode(), ctypes.byref(length))
        return ctypes.string_at(found, length.value) if found else None

    def delete(self) -> None:
        self.call("outputs")  # TensorRT asks every plugin for an interface; its binding counts on that
        self.call("delete")

    def described(self, sizes: MergeSizes, dtype: str) -> tuple[Any, ...]:
        numbers = (*sizes[:4], *sizes.widths)
        code = DTYPES.index(dtype)  # type: ignore[arg-type]
        return code, (ctypes.c_int64 * len(numbers))(*numbers), len(sizes.widths)

    def enqueue(self, sizes: MergeSizes, dtype: str, named: dict[str, int], times: int = 1) -> float:
        """Microseconds of one enqueue, negative where it failed; ``named`` has every buffer's address."""
        rows = len(sizes.widths)
        names = buffer_names(rows)
        addresses = [named[name] for name in names]
        return self.call(  # type: ignore[no-any-return]
            "enqueue",
            *self.described(sizes, dtype),
            (ctypes.c_void_p * (rows + 2))(*addresses[: rows + 2]),
            (ctypes.c_void_p * rows)(*addresses[rows + 2 :]),
            ctypes.c_void_p(named["workspace"]),
            ctypes.c_void_p(STREAM),
            times,
        )


@cache
def _runtime_library() -> str:
    import tensorrt_rtx_libs

    return str(Path(next(iter(tensorrt_rtx_libs.__path__))) / "libtensorrt_rtx.so.1")


_session: list[Session] = []


def session(libraries: Libraries, form: Form | None) -> Session:
    """The worker's session with ``form`` registered; one for all tests, as the driver is opened once a process."""
    if not _session:
        _session.append(Session(libraries))
    _session[0].use(form)
    assert _session[0].stub.stub_live() == 0
    _session[0].calls()
    return _session[0]


def places(sizes: MergeSizes, dtype: str, arrays: list[np.ndarray] | None) -> tuple[dict[str, int], list[np.ndarray]]:
    """Addresses of a merge's buffers: of real memory with ``arrays`` in it, or made up, beyond 32 bits."""
    names = (*buffer_names(len(sizes.widths)), "workspace")
    if arrays is None:
        return {name: (index + 1) << 36 for index, name in enumerate(names)}, []
    rows = getattr(torch, dtype)

    def raw(values: torch.Tensor) -> np.ndarray:
        return values.contiguous().view(torch.uint8).numpy()

    held = [array if array.dtype == np.int64 else raw(torch.from_numpy(array).to(rows)) for array in arrays]
    shape = (sizes.batch, sizes.kept)
    held += [raw(torch.full((*shape, width), torch.nan, dtype=rows)) for width in sizes.widths]
    held.append(np.full(launch.workspace(sizes).size, 0xA5, dtype=np.uint8))
    return {name: array.ctypes.data for name, array in zip(names, held, strict=True)}, held


def name_all(made: Session, sizes: MergeSizes, named: dict[str, int]) -> None:
    """Have ``made`` tell launches' addresses by their buffers' names."""
    made.names = {address: name for name, address in named.items() if name != "workspace"}
    made.names |= {named["workspace"] + at: name for name, at in launch.workspace(sizes).offsets.items()}
