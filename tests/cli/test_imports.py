"""Help and `inspect` import no heavy package, and help takes less than 0.3 s of work."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from d3tom_export.bundle.folder import Bundle
from d3tom_export.cli.main import COMMANDS

HEAVY = {"torch", "onnx", "onnxscript", "onnxruntime", "transformers", "tokenizers", "safetensors", "numpy", "PIL"}


def _imported(arguments: list[str]) -> set[str]:
    """The modules of a process in which the command line was run with ``arguments``."""
    script = (
        "import sys\nfrom d3tom_export.cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print('imported:', *sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.rsplit("imported:", 1)[1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=str)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert not _imported(arguments) & HEAVY


def test_inspecting_a_bundle_imports_nothing_heavy(bundle: Bundle) -> None:
    assert not _imported(["inspect", str(bundle.folder)]) & HEAVY


@pytest.mark.parametrize("name", COMMANDS)
def test_help_takes_less_than_a_third_of_a_second_of_work(name: str) -> None:
    # Seconds of the processor, the fewest of several: what is judged is the command, not what else the machine does.
    def worked() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    taken: list[float] = []
    while len(taken) < 5 and min(taken, default=1.0) >= 0.3:
        before = worked()
        subprocess.run([sys.executable, "-m", "d3tom_export", name, "--help"], capture_output=True, check=True)
        taken.append(worked() - before)
    assert min(taken) < 0.3
