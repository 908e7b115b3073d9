"""The kernel of a cache's merge for ONNX Runtime on the CPU: compiling it, and giving it to sessions.

Bundles have graphs for it, in which such a merge is a node (:mod:`d3tom_export.cpu.cache_merge`). A library is code
that a process takes in, so none is looked for and none is compiled unasked: the environment variable names it.
ONNX Runtime's headers are not needed (``cpu/onnxruntime_abi.h``).

    python -m d3tom_export.plugins.cpu_library --output libd3tom_merge_cpu.so
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from d3tom_export.errors import D3tomError

if TYPE_CHECKING:
    import onnxruntime as ort

LIBRARY_VARIABLE = "D3TOM_EXPORT_CPU_MERGE_LIBRARY"
"""Names the library; not set or empty: ONNX Runtime's own operators merge caches."""

SOURCE = Path(__file__).parent / "cpu" / "merge.cpp"
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fvisibility=hidden")
_COMPILERS = ("c++", "g++", "clang++")
_MOST_WORDS = 2000
"""Of what a compiler says."""


def named_library() -> Path | None:
    """The library that :data:`LIBRARY_VARIABLE` names.

    :raises D3tomError: it is no file.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if not named:
        return None
    library = Path(named).absolute()
    if not library.is_file():
        raise _misfit(library, "is no file")
    return library


def give_kernel(options: ort.SessionOptions, library: Path) -> None:
    """Have the sessions made with ``options`` run the nodes of merges by the kernel of ``library``.

    :raises D3tomError: ONNX Runtime does not take it.
    """
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # ONNX Runtime raises a family of unrelated types
        raise _misfit(library, f"is refused by ONNX Runtime ({error})") from None


def _misfit(library: Path, what: str) -> D3tomError:
    return D3tomError(
        f"The merge's library {library}, which {LIBRARY_VARIABLE} names, {what}. Compile it on this machine with "
        f"`python -m d3tom_export.plugins.cpu_library --output {library}`, or unset {LIBRARY_VARIABLE}: ONNX Runtime's "
        "own operators then compute the merges."
    )


def _compiler() -> list[str]:
    """The command of a C++ compiler: what CXX says, or else the first of the usual names that is installed."""
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    found = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if found is None:
        raise D3tomError(
            f"No C++ compiler is installed here ({', '.join(_COMPILERS)}): install one, or name yours by CXX. Without "
            "the library nothing is missing but its speed."
        )
    return [found]


def compile_library(output: Path, march: str = "native") -> None:
    """Compile the library to ``output``, whole or not at all.

    ``march`` is the compiler's name of the processors that it is for: a library for "native" may end a process on an
    older machine.

    :raises D3tomError: there is no compiler, or it fails.
    """
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        partial = Path(folder) / output.name
        command = [*_compiler(), *_FLAGS, f"-march={march}", str(SOURCE), "-o", str(partial)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise D3tomError(f"The compiler {command[0]} cannot be run: {error}.") from None
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()[-_MOST_WORDS:]
            raise D3tomError(f"The compiler failed (exit code {done.returncode}): {shlex.join(command)}\n{said}")
        partial.replace(output)


def main() -> int:
    """The command; 0, or 1 where the library could not be made."""
    parser = argparse.ArgumentParser(
        prog="python -m d3tom_export.plugins.cpu_library",
        description="Compile the merge's kernel for ONNX Runtime on the CPU.",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the library to write")
    parser.add_argument(
        "--march",
        default="native",
        metavar="NAME",
        help="processors that it is for, as the compiler names them, x86-64-v3 or armv8.2-a say (default: this one)",
    )
    options = parser.parse_args()
    try:
        compile_library(options.output, options.march)
    except (D3tomError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output} ({options.output.stat().st_size} bytes)")
    print(f"export {LIBRARY_VARIABLE}={shlex.quote(str(options.output.absolute()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
