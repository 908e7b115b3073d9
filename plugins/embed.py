"""Writes the kernels that the C++ plugin library carries: ``python -m d3tom_export.plugins.embed --output DIR``.

Two files: ``merge_kernels.bin``, an archive of cubins for the architectures named and of PTX for all later ones, and
``merge_kernels.S``, which puts it into a library as it is. `cpp/CMakeLists.txt` runs this.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from d3tom_export.errors import D3tomError
from d3tom_export.plugins.archive import Kernel, pack
from d3tom_export.plugins.compiled import PORTABLE_SM, PTX_VERSIONS, compile_variant
from d3tom_export.plugins.launch import DTYPES, variants

DEFAULT_SMS = (80, 86, 89, 90, 100, 120)

_ASSEMBLY = """\
/* Written by d3tom_export.plugins.embed. */
    .section .rodata
    .global d3tom_merge_kernels
    .hidden d3tom_merge_kernels
    .global d3tom_merge_kernels_end
    .hidden d3tom_merge_kernels_end
    .balign 64
d3tom_merge_kernels:
    .incbin "{path}"
d3tom_merge_kernels_end:
    .section .note.GNU-stack,"",%progbits
"""


def library_kernels(sms: Iterable[int], portable: bool = True) -> tuple[Kernel, ...]:
    """Every kernel in every precision as cubins for ``sms``, and as PTX for GPUs that none of them fits.

    :raises D3tomError: Triton is missing, or an architecture unknown.
    """
    wanted = sorted({variant for dtype in DTYPES for variant in variants(dtype)})
    kernels = [compile_variant(variant, sm).kernel() for sm in dict.fromkeys(sms) for variant in wanted]
    if portable:
        kernels += [compile_variant(variant, PORTABLE_SM).kernel(portable=True) for variant in wanted]
    return tuple(kernels)


def write_kernels(folder: Path, sms: Iterable[int], portable: bool = True) -> Path:
    """Write both files into ``folder`` and return the assembly's path."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "merge_kernels.bin"
    archive.write_bytes(pack(library_kernels(sms, portable)))
    assembly = folder / "merge_kernels.S"
    path = str(archive.resolve()).replace("\\", "\\\\").replace('"', '\\"')
    assembly.write_text(_ASSEMBLY.format(path=path))
    return assembly


def main() -> int:
    """The command; 0, or 1 where kernels could not be made."""
    parser = argparse.ArgumentParser(prog="python -m d3tom_export.plugins.embed", description="Compile merge kernels.")
    parser.add_argument("--output", type=Path, required=True, help="folder for merge_kernels.bin and merge_kernels.S")
    parser.add_argument(
        "--sm",
        type=int,
        nargs="+",
        action="extend",
        metavar="NN",
        help=f"compute capability without its point, of {', '.join(map(str, PTX_VERSIONS))}; repeatable "
        f"(default: {' '.join(map(str, DEFAULT_SMS))})",
    )
    parser.add_argument("--no-ptx", action="store_true", help="leave out the PTX for later GPUs")
    options = parser.parse_args()
    try:
        assembly = write_kernels(options.output, options.sm or DEFAULT_SMS, not options.no_ptx)
    except (D3tomError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{assembly} and {assembly.with_suffix('.bin')} ({assembly.with_suffix('.bin').stat().st_size} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
