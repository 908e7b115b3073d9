"""Which backends there are by name, and what goes with each. Imports no runtime."""

from __future__ import annotations

from pathlib import Path

from d3tom_export.errors import CallError, listing

BACKENDS = ("auto", "pytorch", "onnxruntime", "tensorrt", "tensorrt-rtx")
ENGINE_BACKENDS = ("tensorrt", "tensorrt-rtx")
DEVICES = ("auto", "cpu", "cuda", "tensorrt", "nv-tensorrt-rtx")
BUILDING_DEVICES = ("tensorrt", "nv-tensorrt-rtx")
ENGINE_PRECISIONS = ("fp32", "fp16", "bf16")
CPU_PRECISIONS = ("fp32", "int8")
PRECISIONS = (*ENGINE_PRECISIONS, "int8")
SPECIALIZATIONS = ("lazy", "eager", "none")


def check_choice(
    backend: str,
    device: str = "auto",
    precision: str | None = None,
    cuda_graphs: bool | None = None,
    provider_cache: Path | None = None,
    specialization: str | None = None,
) -> None:
    """Refuse what there is not, and what the backend would ignore: :class:`CallError` in the words of the options."""
    for name, value, known in (
        ("--backend", backend, BACKENDS),
        ("--provider", device, DEVICES),
        ("--precision", precision, (None, *PRECISIONS)),
        ("--specialization", specialization, (None, *SPECIALIZATIONS)),
    ):
        if value not in known:
            raise CallError(f"{name} {value!r} is none of {listing(each for each in known if each)}.")
    if specialization is not None and backend != "tensorrt-rtx":
        raise CallError("--specialization is TensorRT-RTX's; add --backend tensorrt-rtx.")
    if backend == "pytorch" and device not in ("auto", "cpu"):
        raise CallError("--provider chooses where onnxruntime runs; the pytorch oracle runs on the CPU.")
    if provider_cache is not None and (backend not in ("auto", "onnxruntime") or device not in BUILDING_DEVICES):
        raise CallError(
            "--provider-cache is for --backend onnxruntime with --provider tensorrt or nv-tensorrt-rtx; others build "
            "nothing while they load."
        )
    if precision == "int8" and (backend in (*ENGINE_BACKENDS, "pytorch") or device not in ("auto", "cpu")):
        raise CallError("--precision int8 is for the CPU; take --backend onnxruntime.")
    if backend in ENGINE_BACKENDS:
        _check_engines(backend, device)
        return
    own = PRECISIONS if backend != "pytorch" else ("fp32",)
    given = ["--precision"] if precision is not None and precision not in own else []
    given += [] if cuda_graphs is None else ["--cuda-graphs" if cuda_graphs else "--no-cuda-graphs"]
    if given:
        raise CallError(
            f"{' and '.join(given)} concern{'s' if len(given) == 1 else ''} engines; add --backend tensorrt or "
            "--backend tensorrt-rtx."
        )


def _check_engines(backend: str, device: str) -> None:
    if device == "cpu":
        raise CallError("Engines run on NVIDIA GPUs; for the CPU take --backend onnxruntime.")
    if device in BUILDING_DEVICES:
        raise CallError(
            f"--provider {device} is ONNX Runtime's way to TensorRT; --backend {backend} runs engines that `build "
            "--engine` made. Take --backend onnxruntime, or leave --provider out."
        )
