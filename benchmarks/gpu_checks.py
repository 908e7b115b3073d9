"""The checks of `make gpu` (:mod:`benchmarks.gpu`), what each needs, and the machine they run on.

First what nobody has seen on a GPU yet and the code relies on, then the kernels, then whole answers on every backend.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from d3tom_export.engines.cuda import Gpu, gpus
from d3tom_export.errors import D3tomError

ROOT = Path(__file__).parents[1]
_COMMAND = (
    "import sys, d3tom_export; d3tom_export.__path__.append(sys.argv.pop(1)); "
    "from d3tom_export.cli.main import main; main()"
)
"""The command line, where the package need not be installed."""
_PACKAGES = ("torch", "triton", "tensorrt", "tensorrt-rtx", "onnxruntime-gpu", "onnx-ir", "cuda-bindings")
_ANSWERS = 20
_KEPT = (12, 24, 12, 24)
_HOST_CALLS = 2000


@dataclass(frozen=True)
class Check:
    """One thing to find out."""

    name: str
    what: str
    needs: tuple[str, ...]
    """Packages, and "bundle" for a bundle of the bundled model for both loops."""
    run: Callable[[Machine], dict[str, Any]]
    """Its figures; raises where it fails."""


class Machine:
    """The machine at hand: its GPU, packages and the bundle to run."""

    def __init__(self, gpu: Gpu | None, problem: str, bundle: Path | None) -> None:
        self.gpu, self._problem, self._given = gpu, problem, bundle

    @classmethod
    def of_this_process(cls, bundle: Path | None) -> Machine:
        """With the first GPU that CUDA shows."""
        try:
            return cls(gpus()[0], "", bundle)
        except D3tomError as error:
            return cls(None, str(error).split(". ", 1)[0], bundle)

    def packages(self) -> dict[str, str]:
        """Versions of the packages that checks need."""
        found = {}
        for name in _PACKAGES:
            with suppress(PackageNotFoundError):
                found[name] = version(name)
        return found

    def to_json(self) -> dict[str, Any]:
        gpu = None if self.gpu is None else {"name": self.gpu.name, "sm": self.gpu.sm}
        return {"gpu": gpu, "problem": self._problem, "packages": self.packages()}

    def __str__(self) -> str:
        here = str(self.gpu) if self.gpu else f"No GPU: {self._problem}"
        return f"{here}; {', '.join(f'{name} {found}' for name, found in self.packages().items()) or 'no packages'}"

    def missing(self, check: Check) -> str:
        """Why ``check`` cannot run here; empty if it can."""
        if self.gpu is None:
            return self._problem
        packages = self.packages()
        if lacking := [need for need in check.needs if need != "bundle" and need not in packages]:
            return f"{' and '.join(lacking)} not installed"
        for toolkit in {"tensorrt", "tensorrt-rtx"} & set(check.needs):
            from d3tom_export.backends.tensorrt_engines import check_architecture
            from d3tom_export.engines.toolkit import load_toolkit

            try:
                check_architecture(load_toolkit(toolkit), self.gpu)  # type: ignore[arg-type]
            except D3tomError as error:
                return str(error).split(". ", 1)[0]
        if "bundle" in check.needs and self._given is None and not importlib.util.find_spec("onnxscript"):
            return "no --bundle given, and onnxscript is not here to make one"
        return ""

    @cached_property
    def _room(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="d3tom-export-gpu-"))

    @cached_property
    def bundle(self) -> Path:
        """A bundle of the bundled model for both loops, which checks may add engines to."""
        own = self._room / "bundle"
        if self._given is not None:
            shutil.copytree(self._given, own)
        else:
            options = ("--layer", "2", "--ratio", "0.9", "--kv-cache", "both", "--self-check", "0")
            self.command("build", *options, "--output", str(own))
        return own

    def command(self, *arguments: str) -> str:
        """What a command of `d3tom-export` prints; raises with its error where it fails."""
        run = subprocess.run(
            [sys.executable, "-c", _COMMAND, str(ROOT), *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            raise D3tomError(f"`d3tom-export {' '.join(arguments)}` ended with {run.returncode}: {run.stderr[-1500:]}")
        return run.stdout

    def engines(self, toolkit: str, precision: str) -> None:
        """Give the bundle engines for this GPU; those that are there are kept."""
        assert self.gpu is not None
        target = ("--engine", toolkit, "--sm", str(self.gpu.sm), "--precision", precision)
        self.command("build", "--bundle", str(self.bundle), *target)


def _merge_inputs(machine: Machine) -> tuple[dict[str, Any], int]:
    """Inputs of the uncached `merge` stage but for `keep`, and V."""
    from d3tom_export.bundle.folder import load_bundle

    width = load_bundle(machine.bundle).config.language.d_model
    visual, answer = 48, 16
    rng = np.random.default_rng(0)
    deciders = np.zeros((1, answer), dtype=np.bool_)
    deciders[0, :3] = True
    hidden = rng.standard_normal((1, 80 + answer, width), dtype=np.float32)
    return {"hidden": hidden, "deciders": deciders, "visual_positions": np.arange(8, 8 + visual)}, visual


def _only_keep_changes(toolkit: str) -> Callable[[Machine], dict[str, Any]]:
    """K changes while no input's shape does: with graphs and without, the same comes out."""

    def run(machine: Machine) -> dict[str, Any]:
        from d3tom_export.backends.tensorrt import TensorRTBackend
        from d3tom_export.bundle.folder import load_bundle

        machine.engines(toolkit, "fp16")
        inputs, _ = _merge_inputs(machine)
        found = {}
        for graphs in (True, False):
            backend = TensorRTBackend(
                load_bundle(machine.bundle),
                "uncached",
                toolkit,
                precision="fp16",
                cuda_graphs=graphs,  # type: ignore[arg-type]
            )
            for _ in range(3):  # a graph is captured when a launch recurs
                found[graphs] = [
                    backend.run_stage("merge", {**inputs, "keep": np.array([kept])}, ["merged", "kept"])
                    for kept in _KEPT
                ]
        for kept, with_graphs, without in zip(_KEPT, found[True], found[False], strict=True):
            for name, array in with_graphs.items():
                if array.shape != without[name].shape or not np.array_equal(array, without[name]):
                    raise D3tomError(f"with CUDA graphs `merge` gives another {name} for keep = {kept} than without")
        return {"kept": list(_KEPT), "identical": True}

    return run


def _memory_stays(toolkit: str) -> Callable[[Machine], dict[str, Any]]:
    """Device memory that answers take beyond what the backend allocates."""

    def run(machine: Machine) -> dict[str, Any]:
        from d3tom_export.backends.tensorrt import TensorRTBackend
        from d3tom_export.bundle.folder import load_bundle
        from d3tom_export.pipeline import Reader, embed_sample, run_loop
        from d3tom_export.prompt.samples import SAMPLES_FILE, load_samples

        machine.engines(toolkit, "fp16")
        bundle = load_bundle(machine.bundle)
        backend = TensorRTBackend(bundle, "uncached", toolkit, precision="fp16")  # type: ignore[arg-type]
        manifest = bundle.manifest
        sample = load_samples(machine.bundle / SAMPLES_FILE)[0]
        prompt = embed_sample(backend, sample, Reader.of_bundle(bundle), manifest.generation)
        free = []
        for _ in range(_ANSWERS):
            mask = bundle.config.language.mask_token_id
            for _ in run_loop(backend, prompt, mask, manifest.generation, manifest.merge):
                pass
            free.append(backend.device.free_memory()[0])
        grown = free[1] - free[-1]
        if grown > 0:
            raise D3tomError(f"{_ANSWERS - 2} answers after the second took {grown / 2**20:.1f} MiB more of the device")
        return {"answers": _ANSWERS, "first answer took MiB": (free[0] - free[1]) / 2**20, "grown MiB": -grown / 2**20}

    return run


def _kernels(dtype: str) -> Callable[[Machine], dict[str, Any]]:
    """The merge kernels against PyTorch, and their time against the memory floor, at LaViDa's size."""

    def run(_: Machine) -> dict[str, Any]:
        import torch

        from benchmarks.merge_kernels import KEPT, VISUAL, WIDTH, copy_bandwidth, measure
        from d3tom_export.plugins.launch import MergeSizes

        torch.zeros(1, device="cuda")
        bandwidth = copy_bandwidth()
        figures: dict[str, Any] = {"copies GB/s": bandwidth / 1e9}
        for kept in KEPT:
            row = measure(MergeSizes(1, VISUAL, kept, WIDTH, WIDTH), dtype, bandwidth, 15)
            ours, floor = row["times"]["kernels"]["median_us"], row["floor_us"]
            figures |= {f"K={kept} us": ours, f"K={kept} over floor": ours / floor}
            figures[f"K={kept} PyTorch over ours"] = row["times"]["pytorch"]["median_us"] / ours
        return figures

    return run


def _launch_cost(_: Machine) -> dict[str, Any]:
    """Host time of putting one merge on a stream through the real driver."""
    import torch

    from benchmarks.merge_kernels import Inputs
    from d3tom_export.plugins.compiled import compile_kernels
    from d3tom_export.plugins.driver import LoadedKernels, cuda_driver, device_sm
    from d3tom_export.plugins.launch import MergeSizes

    torch.zeros(1, device="cuda")
    driver, sizes = cuda_driver(), MergeSizes(1, 1008, 100, 4096, 4096)
    kernels = LoadedKernels(compile_kernels("float16", (device_sm(driver),), sizes.depth, sizes.width), driver)
    inputs, stream = Inputs(sizes, "float16", 0), int(torch.cuda.current_stream().cuda_stream)
    seconds = 0.0
    for _ in range(_HOST_CALLS // 100):
        started = time.perf_counter()
        for _ in range(100):
            kernels.enqueue(sizes, "float16", inputs.addresses, stream)
        seconds += time.perf_counter() - started
        torch.cuda.synchronize()  # a full queue would be waited for
    return {"us a merge": seconds / _HOST_CALLS * 1e6}


def _answers(backend: str, precision: str, cached: bool) -> Callable[[Machine], dict[str, Any]]:
    """`validate` on the bundled model, and what a step takes."""

    def run(machine: Machine) -> dict[str, Any]:
        if backend.startswith("tensorrt"):
            machine.engines(backend, precision)
        elif precision != "fp32":
            machine.command("build", "--bundle", str(machine.bundle), "--precision", precision)
        choice = ["--backend", backend, "--kv-cache" if cached else "--no-kv-cache"]
        choice += ["--precision", precision] if precision != "fp32" or backend != "onnxruntime" else []
        choice += ["--provider", "cuda"] if backend == "onnxruntime" else []
        report = json.loads(machine.command("validate", str(machine.bundle), *choice, "--samples", "4", "--json", "-"))
        if not report["passed"]:
            raise D3tomError(f"validate did not pass: {json.dumps(report)[:1500]}")
        return {"steps": report["steps"], "largest logit difference": report["max_abs_logit_error"]}

    return run


_TOOLKITS = ("tensorrt-rtx", "tensorrt")

CHECKS: tuple[Check, ...] = (
    *(
        Check(
            f"only keep changes, {toolkit}",
            "`merge` with K = 12, 24, 12, 24 and the same shapes, with CUDA graphs and without, must give the same",
            (toolkit, "cuda-bindings", "onnx-ir", "bundle"),
            _only_keep_changes(toolkit),
        )
        for toolkit in _TOOLKITS
    ),
    *(
        Check(
            f"memory stays, {toolkit}",
            f"{_ANSWERS} answers must take no device memory beyond what the first two did",
            (toolkit, "cuda-bindings", "onnx-ir", "bundle"),
            _memory_stays(toolkit),
        )
        for toolkit in _TOOLKITS
    ),
    *(
        Check(
            f"merge kernels, {dtype}",
            "the kernels against PyTorch at LaViDa's size, and their time against the memory floor",
            ("torch", "triton", "cuda-bindings"),
            _kernels(dtype),
        )
        for dtype in ("float32", "float16", "bfloat16")
    ),
    Check(
        "a launch's host time",
        "microseconds of Python for one merge's launches",
        ("torch", "triton", "cuda-bindings"),
        _launch_cost,
    ),
    *(
        Check(
            f"answers, {backend}, {precision}, {'cached' if cached else 'uncached'}",
            "whole answers of the bundled model against PyTorch, bounds as `validate` has them",
            (package, "cuda-bindings", "torch", "onnx-ir", "bundle"),
            _answers(backend, precision, cached),
        )
        for backend, package, precisions in (
            ("tensorrt", "tensorrt", ("fp32", "bf16", "fp16")),
            ("tensorrt-rtx", "tensorrt-rtx", ("fp32", "bf16", "fp16")),
            ("onnxruntime", "onnxruntime-gpu", ("fp32", "fp16", "bf16")),
        )
        for precision in precisions
        for cached in (False, True)
    ),
)
"""In the order in which they are run."""
