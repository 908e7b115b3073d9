"""The merge kernels compiled ahead of time, for a named GPU architecture and without a GPU.

Triton brings its own assembler, so neither a CUDA toolkit nor a driver is needed. Compiling leaves out line
information: it would name this machine's paths, and equal sources are to give equal bytes.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from d3tom_export.errors import D3tomError, listing
from d3tom_export.plugins.archive import Kernel
from d3tom_export.plugins.launch import ALIGNMENT, Spec, Variant, spec, variants

PTX_VERSIONS = {80: 80, 86: 80, 87: 80, 89: 80, 90: 80, 100: 86, 103: 88, 120: 87, 121: 88}
"""The architectures kernels are made for and the PTX ISA written for each: the oldest that has it, so that older
drivers can still translate it. Triton's compiler ends the whole process at a pair it does not know."""
PORTABLE_SM = 80
"""The architecture whose PTX stands in for GPUs that no cubin was made for: the oldest with bfloat16 tensor cores."""

_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_ROWS = ("normed", "hidden", "merged")
_POINTERS = {"kept": "*i64", "scores": "*fp32", "slots": "*i32", "order": "*i32", "starts": "*i32"}
_PARAMETER = re.compile(r"\.param\s+\.(?:align\s+\d+\s+)?\.?(\w+)\b")


@dataclass(frozen=True)
class Compiled:
    """One variant compiled for one architecture."""

    variant: Variant
    sm: int
    symbol: str
    ptx: str
    cubin: bytes
    threads: int
    shared: int
    """Dynamic shared memory in bytes."""
    parameters: tuple[str, ...]
    """PTX types of the entry's parameters, as the PTX declares them: ``u64`` for buffers, ``u32`` for sizes."""

    @property
    def scratch(self) -> int:
        """Pointers after the kernel's own parameters: Triton's scratch memory, of which these kernels use none."""
        return len(self.parameters) - len(spec(self.variant).arguments)

    def kernel(self, portable: bool = False) -> Kernel:
        """As an archive entry: the cubin, or the PTX where ``portable``."""
        image = self.ptx.encode() + b"\0" if portable else self.cubin  # the driver takes PTX as a C string
        return Kernel(self.variant, self.sm, portable, self.symbol, self.threads, self.shared, self.scratch, image)


def check_triton() -> None:
    """Raises :class:`D3tomError` where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise D3tomError(
            "The merge plugin's kernels are compiled by Triton, which is not installed here. Install it with `pip "
            "install triton`, or build with `--merge-op onnx`, which needs no plugin. Running a finished engine needs "
            "no Triton: its kernels are inside."
        )


def check_sm(sm: int) -> None:
    """Raises :class:`D3tomError` for an architecture the kernels are not made for."""
    if sm not in PTX_VERSIONS:
        raise D3tomError(
            f"The merge plugin's kernels are made for the compute capabilities {listing(PTX_VERSIONS)} (without their "
            f"point); found {sm}. Name one of these, or build with `--merge-op onnx`, which runs on every GPU."
        )


@cache
def compile_variant(variant: Variant, sm: int) -> Compiled:
    """``variant`` compiled for ``sm``; takes about half a second, and less from Triton's cache on disk.

    :raises D3tomError: Triton is missing, or refuses the architecture.
    """
    check_triton()
    check_sm(sm)
    try:
        from triton import knobs
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.compiler import compile as compile_source

        from d3tom_export.plugins import kernels
    except ImportError as error:
        raise D3tomError(
            f"The merge plugin's kernels need Triton 3.6 or later; the one installed here does not fit ({error}). "
            "Install it with `pip install -U triton`, or build with `--merge-op onnx`."
        ) from None

    plan = spec(variant)
    function = getattr(kernels, plan.function)
    signature = {name: _type(name, variant) for name in plan.arguments} | dict.fromkeys(plan.constants, "constexpr")
    divisible = {(function.arg_names.index(name),): [["tt.divisibility", ALIGNMENT]] for name in plan.divisible}
    source = ASTSource(function, signature, dict(plan.constants), divisible)
    options = {
        "num_warps": plan.warps,
        "num_stages": plan.stages,
        "enable_fp_fusion": True,
        "ptx_version": PTX_VERSIONS[sm],
    }
    try:
        with knobs.compilation.scope():
            knobs.compilation.disable_line_info = True
            built = compile_source(source, target=GPUTarget("cuda", sm, 32), options=options)
    except Exception as error:  # Triton's own errors share no base class
        raise D3tomError(
            f"Triton could not compile the merge kernel `{variant.name}` for compute capability {sm}: "
            f"{' '.join(str(error).split())[:400] or type(error).__name__}. Use an architecture this Triton knows, "
            "a newer Triton, or `--merge-op onnx`."
        ) from error
    ptx = built.asm["ptx"]
    symbol, parameters = entry(ptx)
    _check_parameters(variant, plan, parameters, built.metadata)
    threads = 32 * built.metadata.num_warps
    return Compiled(variant, sm, symbol, ptx, built.asm["cubin"], threads, built.metadata.shared, parameters)


def compile_kernels(dtype: str, sms: Iterable[int], depth: int | None, *widths: int | None) -> tuple[Kernel, ...]:
    """Cubins of every variant that merges of ``dtype`` need on ``sms``; D and W as for :func:`launch.variants`."""
    return tuple(compile_variant(variant, sm).kernel() for sm in sms for variant in variants(dtype, depth, *widths))


def entry(ptx: str) -> tuple[str, tuple[str, ...]]:
    """The name of the one kernel in ``ptx`` and the PTX types of the parameters it declares."""
    found = re.findall(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)", ptx, re.DOTALL)
    if len(found) != 1:
        names = listing(name for name, _ in found) or "none"
        raise D3tomError(f"A compiled merge kernel should hold one entry, found {names}; report this as a bug.")
    name, declared = found[0]
    return name, tuple(_PARAMETER.findall(declared))


def _type(argument: str, variant: Variant) -> str:
    if argument in _ROWS:
        return f"*{_TYPES[variant.dtype]}"
    return _POINTERS.get(argument, "i32")


def _check_parameters(variant: Variant, plan: Spec, parameters: tuple[str, ...], metadata: Any) -> None:
    """Holds the compiled entry to the launch plan: a mismatch would be read by the GPU as addresses."""
    wanted = ["u32" if name in plan.sizes else "u64" for name in plan.arguments]
    extra = list(parameters[len(wanted) :])
    scratch = metadata.global_scratch_size + getattr(metadata, "profile_scratch_size", 0)
    if list(parameters[: len(wanted)]) != wanted or set(extra) - {"u64"} or scratch:
        raise D3tomError(
            f"This Triton compiles the merge kernel `{variant.name}` to parameters {listing(parameters)} with "
            f"{scratch} bytes of scratch memory, where {listing(wanted)} and none were expected. Use Triton 3.6 to "
            "3.9, or `--merge-op onnx`."
        )
