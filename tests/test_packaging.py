"""What a wheel holds: one top-level name, the command line and plugins inside it, the bundled model whole."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    target = tmp_path_factory.mktemp("wheel")
    # From a copy of what git tracks: an untracked file must not slip in, nor build/ be left in the tree.
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        target,
        source,
    ]
    subprocess.run(command, check=True)
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def test_a_wheel_puts_exactly_one_name_into_site_packages(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    (info,) = (name for name in top if name.endswith(".dist-info"))
    assert top == {"d3tom_export", info}


def test_a_wheel_holds_every_module_and_the_typing_mark(wheel: zipfile.ZipFile) -> None:
    packed = set(wheel.namelist())
    for folder, prefix in (
        ("d3tom_export", "d3tom_export"),
        ("cli", "d3tom_export/cli"),
        ("plugins", "d3tom_export/plugins"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{prefix}/{path.relative_to(ROOT / folder).as_posix()}" in packed
    assert "d3tom_export/py.typed" in packed


def test_a_wheel_holds_what_a_report_is_made_of(wheel: zipfile.ZipFile) -> None:
    assert {f"d3tom_export/report/page.{kind}" for kind in ("html", "css", "js")} <= set(wheel.namelist())


def test_a_wheel_holds_a_model_repositorys_pages(wheel: zipfile.ZipFile) -> None:
    pages = {f"d3tom_export/triton/{path.name}" for path in (ROOT / "d3tom_export" / "triton").glob("*.md")}
    assert len(pages) == 4
    assert pages <= set(wheel.namelist())


def test_a_wheel_holds_the_bundled_model_within_its_size(wheel: zipfile.ZipFile) -> None:
    model = ROOT / "d3tom_export" / "models" / "lavida-tiny"
    packed = {entry.filename: entry.file_size for entry in wheel.infolist()}
    for path in model.iterdir():
        assert f"d3tom_export/models/lavida-tiny/{path.name}" in packed
    size = sum(path.stat().st_size for path in model.iterdir())
    assert 1_000_000 < size <= 12_000_000


def test_the_entry_point_is_the_command(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "d3tom-export = d3tom_export.cli.main:entry" in wheel.read(name).decode()


def test_no_extra_installs_two_owners_of_one_module() -> None:
    """pip unpacks onnxruntime-gpu over onnxruntime, and uninstalling either breaks the other."""
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def owners(requirements: list[str]) -> set[str]:
        found = set()
        for requirement in requirements:
            if requirement.startswith("d3tom-export["):
                for extra in requirement.partition("[")[2].rstrip("]").split(","):
                    found |= owners(extras[extra])
            elif requirement.startswith("onnxruntime"):
                found.add(re.match(r"[\w-]+", requirement)[0])  # type: ignore[index]
        return found

    assert owners(project["dependencies"]) == set()
    found = {extra: owners(requirements) for extra, requirements in extras.items()}
    assert {extra: names for extra, names in found.items() if names} == {
        "cpu": {"onnxruntime"},
        "cuda": {"onnxruntime-gpu"},
        "dev": {"onnxruntime"},
    }
