"""A real server: Triton Inference Server as the package nvidia-pytriton carries it, with its Python backend.

The environment is made once and kept in ``.triton-server`` at the repository's root, which git ignores.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
PLACE = ROOT / ".triton-server"
SERVER = "nvidia-pytriton==0.7.0"
"""tritonserver 2.51, without the backends of ONNX Runtime and TensorRT."""
NUMPY = "numpy==1.26.4"
_START_SECONDS = 120


@dataclass(frozen=True)
class Environment:
    """A server's programs, and a folder with what a repository requires."""

    program: Path
    backends: Path
    packages: Path


def _pip(*arguments: object) -> str:
    """What pip says on its failure; empty where it is none."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, text=True, capture_output=True)
    return (done.stderr.strip() or "pip failed")[-400:] if done.returncode else ""


def environment(requirements: Path) -> Environment:
    """The environment for repositories with these requirements, in the versions of constraints.txt where they allow.

    Skips, with the reason, where a package cannot be had or this system's Python is none that the server embeds.
    """
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("numpy==")]
    text = "\n".join([SERVER, NUMPY, sys.version.split()[0], requirements.read_text(), *pins])
    folder = PLACE / hashlib.sha256(text.encode()).hexdigest()[:16]
    PLACE.mkdir(exist_ok=True)
    with FileLock(PLACE / "lock"):
        if not folder.exists():
            partial = PLACE / "partial"
            shutil.rmtree(partial, ignore_errors=True)
            _make(partial, requirements, pins)
            partial.rename(folder)
    triton = folder / "server" / "pytriton" / "tritonserver"
    stub = triton / "backends" / "python" / "triton_python_backend_stub"
    linked = subprocess.run(["ldd", stub], text=True, capture_output=True).stdout
    if "not found" in linked:
        pytest.skip(f"the server's Python backend lacks a library here: {linked}")
    return Environment(triton / "bin" / "tritonserver", triton / "backends", folder / "packages")


def _make(folder: Path, requirements: Path, pins: list[str]) -> None:
    folder.mkdir()
    if told := _pip("download", "--no-deps", "--dest", folder, SERVER):
        pytest.skip(f"{SERVER} cannot be had: {told}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        wanted = [name for name in archive.namelist() if "/tritonserver/" in name or ".libs/" in name]
        archive.extractall(folder / "server", wanted)
    wheel.unlink()
    triton = folder / "server" / "pytriton" / "tritonserver"
    version = ".".join(map(str, sys.version_info[:2]))
    stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        pytest.skip(f"{SERVER} embeds no Python {version}")
    shutil.copy(stub, triton / "backends" / "python")
    for program in (triton / "bin" / "tritonserver", triton / "backends" / "python" / stub.name):
        program.chmod(0o755)
    (folder / "constraints.txt").write_text("\n".join([*pins, NUMPY]))
    constraints, target = folder / "constraints.txt", folder / "packages"
    if told := _pip("install", "--no-compile", "--target", target, "-r", requirements, "-c", constraints):
        pytest.skip(f"the repository's requirements cannot be installed: {told}")


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class Server:
    """A server on a repository, on ports of its own, whose log goes to a file."""

    def __init__(self, made: Environment, repository: Path, log: Path) -> None:
        self.http, self.grpc = _free_ports(2)
        self.log = log
        command = [
            made.program, "--model-repository", repository, "--backend-directory", made.backends,
            "--http-address", "127.0.0.1", "--http-port", self.http,
            "--grpc-address", "127.0.0.1", "--grpc-port", self.grpc,
            "--allow-metrics", "false", "--exit-timeout-secs", "5",
        ]  # fmt: skip
        with log.open("wb") as file:
            self.process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def ready(self) -> Server:
        """Wait until every model is loaded. Fails where the server ends before."""
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, self.said()[-4000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/v2/health/ready", timeout=5):
                    return self
            except (OSError, urllib.error.HTTPError):
                time.sleep(0.05)
        raise AssertionError(self.said()[-4000:])

    def instances(self) -> list[int]:
        """Processes of the models' instances."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = {int(each) for each in children.read_text().split()}
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            found |= {int(each) for each in (task / "children").read_text().split()}
        return sorted(found)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End it as a power cut does, its instances too: left alone, one that is busy may not notice for minutes."""
        instances = self.instances() if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        for each in instances:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        end = time.monotonic() + 20
        while any(_lives(each) for each in instances) and time.monotonic() < end:
            time.sleep(0.05)
        assert not [each for each in instances if _lives(each)]


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
