"""A double of ONNX Runtime's builds for GPUs: providers that a session gets or not, and memory on a GPU.

Its sessions are real ones on the CPU, with the graphs they are given. What is bound is noted by the device it is on:
values made for "cuda" lie in the host's memory, and are told apart by having been made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT, RTX = "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"

_Session, _Value, _Options = ort.InferenceSession, ort.OrtValue, ort.SessionOptions


class FakeOnnxRuntime:
    """What a build of ONNX Runtime offers and gives.

    Args:
        offered: What ``get_available_providers`` lists.
        given: Of those, what a session really gets; None: all.
        lost: Sessions, by their number, that do not get theirs.
        cpu_nodes: Whether a session's nodes all go to the CPU though it has its provider.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        offered: Sequence[str],
        given: Sequence[str] | None = None,
        lost: Sequence[int] = (),
        cpu_nodes: bool = False,
    ) -> None:
        from d3tom_export.backends import onnxruntime_providers

        self.offered, self.given = list(offered), list(offered if given is None else given)
        self.lost, self.cpu_nodes = lost, cpu_nodes
        self.sessions: list[FakeSession] = []
        self.plugin_devices: list[Any] = []
        self.on_gpu: set[int] = set()
        """Values on the GPU, by their identity."""
        self._kept: list[Any] = []
        double = self

        class Value:
            """``OrtValue``; of a GPU's it notes that."""

            @staticmethod
            def ortvalue_from_numpy(array: np.ndarray, device: str = "cpu", index: int = 0) -> Any:
                return double.placed(_Value.ortvalue_from_numpy(array), device)

            @staticmethod
            def ortvalue_from_shape_and_type(shape: list[int], kind: Any, device: str = "cpu", index: int = 0) -> Any:
                return double.placed(_Value.ortvalue_from_shape_and_type(shape, kind), device)

        class Options(_Options):
            """``SessionOptions``, which know of a plugin's devices."""

            def add_provider_for_devices(self, devices: Sequence[Any], options: dict[str, str]) -> None:
                self.plugin = (list(devices), options)

        monkeypatch.setattr(ort, "get_available_providers", lambda: self.offered)
        monkeypatch.setattr(ort, "InferenceSession", lambda *a, **k: FakeSession(self, *a, **k))
        monkeypatch.setattr(ort, "OrtValue", Value)
        monkeypatch.setattr(ort, "SessionOptions", Options)
        monkeypatch.setattr(ort, "get_ep_devices", lambda: self.plugin_devices)
        for cached in ("problem_of", "_preload", "_rtx_devices"):
            # Nothing that a double made is remembered, nor what the real one said forgotten.
            function = getattr(onnxruntime_providers, cached)
            monkeypatch.setattr(onnxruntime_providers, cached, function.__wrapped__)

    def placed(self, value: Any, device: str) -> Any:
        if device != "cpu":
            self.on_gpu.add(id(value))
            self._kept.append(value)  # as long as it lives, nothing else has its identity
        return value

    @property
    def stages(self) -> list[FakeSession]:
        """The sessions of stages, without the tiny one that is made to see whether there is a provider."""
        return [session for session in self.sessions if session.inputs != {"x"}]


class FakeSession:
    """A session on the CPU that says it has other providers, and notes where what is bound to it lies."""

    def __init__(
        self,
        double: FakeOnnxRuntime,
        graph: bytes,
        options: Any,
        providers: Sequence[tuple[str, dict[str, str]]] | None = None,
        enable_fallback: int = 1,
    ) -> None:
        assert not enable_fallback, "ONNX Runtime would print, and make another session"
        self._double, self.graph, self.options, self.providers = double, graph, options, providers
        wanted = [name for name, _ in providers] if providers is not None else [RTX, CPU]
        lost = len(double.sessions) in double.lost
        self.has = [name for name in wanted if name == CPU or (name in (*double.given, RTX) and not lost)]
        self._real = _Session(graph, options, providers=[CPU])
        self.inputs = {each.name for each in self._real.get_inputs()}
        self.bound: dict[str, str] = {}
        """Where each input was that was bound last: "cpu" or "cuda"."""
        double.sessions.append(self)

    def get_providers(self) -> list[str]:
        return self.has

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [SimpleNamespace(ep_name=CPU if self._double.cpu_nodes else self.has[0])]

    def get_inputs(self) -> Any:
        return self._real.get_inputs()

    def get_outputs(self) -> Any:
        return self._real.get_outputs()

    def io_binding(self) -> Any:
        return _Binding(self, self._real.io_binding())

    def run_with_iobinding(self, binding: _Binding, options: Any = None) -> None:
        self._real.run_with_iobinding(binding.real, None)

    def note(self, name: str, value: Any) -> None:
        self.bound[name] = "cuda" if id(value) in self._double.on_gpu else "cpu"


class _Binding:
    def __init__(self, session: FakeSession, real: Any) -> None:
        self._session, self.real = session, real
        self._devices: list[str] = []

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self._session.note(name, value)
        self.real.bind_ortvalue_input(name, value)

    def bind_output(self, name: str, device: str) -> None:
        self._devices.append(device)
        self.real.bind_output(name, "cpu")

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        self.real.bind_ortvalue_output(name, value)

    def get_outputs(self) -> list[Any]:
        double = self._session._double
        values = self.real.get_outputs()
        return [
            double.placed(value, device)
            for value, device in zip(values, [*self._devices, *["cpu"] * len(values)], strict=False)
        ]
