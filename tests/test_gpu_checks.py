"""`make gpu`: every check as a test on a GPU; without one, what it says it would do, and that a fault is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_checks
from benchmarks.gpu_checks import CHECKS, Check, Machine
from d3tom_export.bundle.folder import Bundle
from d3tom_export.engines.cuda import Gpu
from d3tom_export.engines.record import Target
from d3tom_export.engines.toolkit import ToolkitName
from d3tom_export.errors import D3tomError
from tests.backends.fake_cuda import FakeDevice
from tests.backends.fake_engines import ADA, BUNDLED, own_bundle, write_engines
from tests.backends.fake_engines import Machine as FakeMachine


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine.of_this_process(None)


def _named(name: str) -> Check:
    (check,) = (check for check in CHECKS if check.name == name)
    return check


@pytest.mark.slow
@pytest.mark.parametrize("toolkit", ["tensorrt", "tensorrt-rtx"])
def test_what_is_asked_of_engines_runs_on_their_doubles(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toolkit: ToolkitName
) -> None:
    """Of a borrowed GPU's minutes none is to go into a fault of the checks themselves."""
    own = own_bundle(tiny_bundle, tmp_path / "bundle")
    write_engines(own, Target(toolkit, (89,), "fp16"), shapes=BUNDLED)
    here = Machine(ADA, "", own.folder)
    monkeypatch.setattr(Machine, "bundle", own.folder)
    monkeypatch.setattr(Machine, "engines", lambda self, name, precision: None)
    doubles = FakeMachine(monkeypatch)
    kept = _named(f"only keep changes, {toolkit}").run(here)
    assert kept["identical"]
    memory = _named(f"memory stays, {toolkit}")
    monkeypatch.setattr(gpu_checks, "_ANSWERS", 3)
    assert memory.run(here)["grown MiB"] == 0
    # A runtime that takes memory while it runs is found out.
    leaking = lambda device: ((1 << 34) - (len(device.log) << 10), 1 << 34)  # noqa: E731
    monkeypatch.setattr(FakeDevice, "free_memory", leaking)
    with pytest.raises(D3tomError, match="1 answers after the second took"):
        memory.run(here)
    assert doubles.trt is not None


@pytest.mark.slow  # a process of its own
def test_whole_answers_are_asked_of_validate(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very command, but for the device, which is not here."""
    here = Machine(ADA, "", tiny_bundle.folder)
    monkeypatch.setattr(Machine, "bundle", tiny_bundle.folder)
    command = Machine.command

    def on_the_cpu(self: Machine, *arguments: str) -> str:
        given = ["cpu" if argument == "cuda" else argument for argument in arguments]
        given[given.index("--samples") + 1] = "1"
        return command(self, *given)

    monkeypatch.setattr(Machine, "command", on_the_cpu)
    found = _named("answers, onnxruntime, fp32, cached").run(here)
    assert found["steps"] == 2 * 16  # on the CPU both kinds of graphs are asked
    assert found["largest logit difference"] < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_on_a_gpu(check: Check, machine: Machine) -> None:
    if missing := machine.missing(check):
        pytest.skip(missing)
    assert check.run(machine)


def test_without_a_gpu_it_says_what_it_would_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_gpu = Machine(None, "CUDA finds no GPU here", None)
    monkeypatch.setattr(Machine, "of_this_process", classmethod(lambda cls, bundle: no_gpu))
    assert gpu.main(["--output", str(tmp_path / "report.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("No GPU: CUDA finds no GPU here; ")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["check"] for row in report["checks"]] == [check.name for check in CHECKS]
    assert {row["state"] for row in report["checks"]} == {"would run"}
    assert "`merge` with K = 12, 24, 12, 24 and the same shapes" in printed
    assert "keep" in CHECKS[0].name  # what nobody has seen comes first


def test_a_fault_is_told_and_the_rest_still_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Machine) -> dict[str, Any]:
        raise RuntimeError("cudaErrorIllegalAddress")

    here = Machine(Gpu(0, "Fake GPU", 90), "", None)
    checks = (
        Check("breaks", "break", (), fail),
        Check("needs more", "be left out", ("no-such-package",), fail),
        Check("goes on", "go on", (), lambda _: {"seconds": 1.23456}),
    )
    monkeypatch.setattr(Machine, "of_this_process", classmethod(lambda cls, bundle: here))
    monkeypatch.setattr(gpu_checks, "CHECKS", checks)
    assert gpu.main(["--output", str(tmp_path / "report.json")]) == 1
    rows = json.loads((tmp_path / "report.json").read_text())["checks"]
    assert [row["state"] for row in rows] == ["failed", "left out", "passed"]
    assert "cudaErrorIllegalAddress" in rows[0]["why"]
    assert rows[1]["why"] == "no-such-package not installed"
    assert "seconds 1.235" in capsys.readouterr().out
    assert gpu.main(["--minutes", "0"]) == 0
    assert capsys.readouterr().out.count("the 0 minutes are over") == 2


def test_wheels_in_parts_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels, target, installed = tmp_path / "wheels", tmp_path / "target", []
    wheels.mkdir()
    (wheels / "one-1-py3-none-any.whl").write_bytes(b"whole")
    for name, content in (("aa", b"first "), ("ab", b"second")):
        (wheels / f"big-1-py3-none-any.whl.part-{name}").write_bytes(content)
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, check: installed.append(command))
    assert gpu.unpack(wheels, target) == ["one-1-py3-none-any.whl", "big-1-py3-none-any.whl"]
    assert (target / "big-1-py3-none-any.whl").read_bytes() == b"first second"
    ((*_, one, big),) = installed
    assert (one, big) == (str(wheels / "one-1-py3-none-any.whl"), str(target / "big-1-py3-none-any.whl"))
