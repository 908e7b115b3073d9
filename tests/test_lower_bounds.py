"""pyproject.toml's lower bounds are versions that work: installed together in a fresh environment, they build and run.

Large: torch comes from PyPI as a CUDA build, 7 GB installed with what it needs. Where pip is configured with
an index of CPU wheels, those are taken instead.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

from d3tom_export.doctor import OLDEST_TORCH

ROOT = Path(__file__).parents[1]
ROOM = 12e9
"""Bytes that have to be free."""


def _lowest() -> dict[str, str]:
    """The lower bound of every package that building and running need, as pyproject.toml gives it."""
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {}
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *extras["build"], *extras["cpu"]]:
        match = re.fullmatch(r"([\w.-]+)>=([\d.]+)(?:,.*)?", requirement)
        assert match, f"{requirement} has no lower bound"
        bounds[match[1]] = match[2]
    return bounds


def test_doctor_and_pyproject_agree_on_the_oldest_torch() -> None:
    assert _lowest()["torch"] == ".".join(map(str, OLDEST_TORCH))


def _run(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.mark.scheduled
def test_the_lowest_versions_build_check_and_answer(tmp_path: Path) -> None:
    bounds = _lowest()
    free = shutil.disk_usage(tmp_path).free
    if free < ROOM:
        pytest.skip(f"{free / 1e9:.0f} GB are free in {tmp_path}, and the lowest versions take up to {ROOM / 1e9:.0f}")
    if sys.version_info >= (3, 13):
        pytest.skip(f"numpy {bounds['numpy']} has no wheels for Python {sys.version.split()[0]}: use 3.11 or 3.12")
    begun = time.monotonic()
    venv.create(tmp_path / "environment", with_pip=True)
    python, command = (tmp_path / "environment" / "bin" / name for name in ("python", "d3tom-export"))
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
    probe = subprocess.run([*pip, "download", "--no-deps", "--dest", tmp_path, f"click=={bounds['click']}"], text=True,
                           capture_output=True)  # fmt: skip
    if probe.returncode:
        pytest.skip(f"no package index can be reached: {probe.stderr.strip()[-300:]}")

    _run(*pip, "install", "--no-compile", *(f"{name}=={version}" for name, version in bounds.items()), cwd=tmp_path)
    source = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    _run(*pip, "install", "--no-compile", "--no-deps", source, cwd=tmp_path)
    _run(*pip, "check", cwd=tmp_path)
    size = sum(path.lstat().st_size for path in (tmp_path / "environment").rglob("*"))
    installed = time.monotonic()

    built = _run(command, "build", "--layer", 2, "--ratio", 0.9, "--kv-cache", "both", "--output", "b", cwd=tmp_path)
    assert "Self-check passed" in built
    assert "PASSED" in _run(command, "validate", "b", "--samples", 2, cwd=tmp_path)
    for backend in ("pytorch", "onnxruntime"):
        case = ROOT / "tests" / "golden" / "plain-adaptive"
        assert "PASSED" in _run(command, "validate", "--case", case, "--backend", backend, cwd=tmp_path)
    picture = ROOT / "examples" / "lavida_tiny" / "pictures" / "digits.png"
    question = "What do you see?"
    assert _run(command, "run", "b", "--image", picture, "--prompt", question, cwd=tmp_path).strip()
    versions = ", ".join(f"{name} {version}" for name, version in bounds.items())
    print(
        f"\n{versions}: installed in {(installed - begun) / 60:.1f} min, {size / 1e6:,.0f} MB; "
        f"built, checked and run in {(time.monotonic() - installed) / 60:.1f} min"
    )
