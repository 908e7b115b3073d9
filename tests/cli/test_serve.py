"""``serve``: what cannot be served ends at once, with a paragraph."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from d3tom_export import doctor
from d3tom_export.bundle.folder import Bundle
from tests.conftest import Invoke


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--port", 70_000], 2, "--port"),
        (["--queue", -1], 2, "--queue"),
        (["--timeout", 0], 2, "--timeout"),
        (["--jobs", 0], 2, "--jobs"),
        (["--system", "x", "--no-system"], 2, "exclude one another"),
        (["--backend", "pytorch", "--provider", "cuda"], 2, "runs on the CPU"),
        (["--threshold", 0.5], 1, "threshold is for commit rule"),
        (["--gen-length", 100_000], 1, "exceeds this model's limit"),
        (["--api-key-file", "absent.txt"], 1, "absent.txt does not exist"),
        (["--host", "192.0.2.1"], 1, "Nothing can listen at 192.0.2.1, port 0"),
    ],
)
def test_what_cannot_be_served(
    bundle: Bundle, tmp_path: Path, arguments: list[object], code: int, says: str, invoke: Invoke
) -> None:
    result = invoke("serve", bundle.folder, "--port", 0, "--json", tmp_path / "o.json", *arguments)
    assert result.exit_code == code, result.output
    assert says in " ".join(result.stderr.split())
    assert not (tmp_path / "o.json").exists()


def test_where_the_json_cannot_go_is_said_before_anything_loads(bundle: Bundle, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("serve", bundle.folder, "--port", 0, "--json", tmp_path / "absent" / "o.json", "--timeout", 5)
    assert result.exit_code == 1
    assert "is no folder. Give --json another path" in " ".join(result.stderr.split())


def test_no_bundle(tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("serve", tmp_path, "--port", 0)
    assert (result.exit_code, "is not a bundle" in result.stderr) == (1, True)


def test_a_port_that_is_taken(bundle: Bundle, invoke: Invoke) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = invoke("serve", bundle.folder, "--port", taken.getsockname()[1])
    assert result.exit_code == 1
    assert "Give --host an address of this machine, and --port" in " ".join(result.stderr.split())


def test_a_model_that_cannot_be_loaded_ends_the_server(bundle: Bundle, invoke: Invoke) -> None:
    result = invoke("serve", bundle.folder, "--port", 0, "--backend", "tensorrt")
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    assert "engine" in result.stderr.lower()


def test_without_the_extra(bundle: Bundle, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("d3tom_export.serve", "uvicorn"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = invoke("serve", bundle.folder)
    assert result.exit_code == 1
    assert 'pip install "d3tom-export[serve]"' in " ".join(result.stderr.split())


def test_doctor_names_what_a_server_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name == "uvicorn" else installed(name))
    row = doctor._serve()
    assert (row.usable, row.remedy) == (False, 'pip install "d3tom-export[serve]"')
    assert row.found.startswith("starlette ")
