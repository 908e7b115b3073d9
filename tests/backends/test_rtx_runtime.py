"""What TensorRT-RTX compiles at run time is kept from process to process, on the doubles; and how it compiles."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from click.testing import CliRunner

from d3tom_export.backends import rtx_runtime
from d3tom_export.backends.rtx_runtime import Specialization, kernels_file
from d3tom_export.backends.tensorrt import TensorRTBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.cli.main import main
from d3tom_export.cli.options import BACKENDS
from d3tom_export.engines.cuda import Gpu
from d3tom_export.engines.record import Target, built_engines
from d3tom_export.engines.toolkit import Toolkit
from tests.backends.fake_engines import ADA, VERSION, Machine, own_bundle, write_engines
from tests.backends.test_tensorrt import prompt_of
from tests.backends.test_tensorrt_conduct import _steps

RTX = Target("tensorrt-rtx", (89,), "fp32")


@pytest.fixture(scope="module")
def rtx(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The synthetic bundle with engines of TensorRT-RTX."""
    own = own_bundle(bundle, tmp_path_factory.mktemp("rtx"))
    write_engines(own, RTX)
    return own


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "d3tom-export" / "tensorrt-rtx"


def _kernels(kept: Path) -> set[str]:
    (file,) = kept.iterdir()
    return set(json.loads(file.read_bytes())["kernels"])


def _compiled(machine: Machine, backend: TensorRTBackend) -> int:
    """How often an answer compiled."""
    assert machine.trt is not None
    before = machine.trt.compiled
    list(_steps(backend))
    return machine.trt.compiled - before


_ANSWER = """
import sys
from pathlib import Path
import numpy as np
import pytest
from d3tom_export.bundle.folder import load_bundle
from d3tom_export.config import GenerationConfig
from d3tom_export.loop.backend import Prompt
from d3tom_export.pipeline import run_loop
from tests.backends.fake_engines import Machine
machine = Machine(pytest.MonkeyPatch())
bundle = load_bundle(Path(sys.argv[1]))
backend = machine.backend(bundle, toolkit="tensorrt-rtx")
prompt = Prompt(np.zeros((1, 40, 32), np.float32), np.arange(3, 34))
records = run_loop(backend, prompt, 258, GenerationConfig(gen_length=6), bundle.manifest.merge)
next(records)
print(machine.trt.compiled)
"""


def test_a_process_that_ends_in_the_middle_leaves_what_it_compiled_for_the_next(
    rtx: Bundle, kept: Path, machine: Machine
) -> None:
    """It neither finishes the answer nor closes the backend: the file is written as the process ends."""
    command = [sys.executable, "-c", _ANSWER, str(rtx.folder)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ended.stderr == ""
    assert len(_kernels(kept)) == int(ended.stdout) == 4  # a first step's stages
    backend = machine.backend(rtx, toolkit="tensorrt-rtx")
    first = next(_steps(backend, prompt_of(1, 40, range(3, 34))))
    assert first.result.token.shape == (1, 6)
    assert machine.trt is not None
    assert machine.trt.compiled == 0


def test_an_answer_s_kernels_are_kept_at_its_end_and_the_rest_when_the_backend_goes(
    rtx: Bundle, kept: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = machine.backend(rtx, toolkit="tensorrt-rtx")
    assert _compiled(machine, backend) > 3
    after_one = _kernels(kept)
    assert after_one
    written = next(kept.iterdir()).stat().st_mtime_ns
    list(_steps(backend))  # the same shapes: nothing new
    list(_steps(backend, prompt_of(1, 44, range(3, 40))))  # others, but too soon after the last time
    gc.collect()
    assert (next(kept.iterdir()).stat().st_mtime_ns, _kernels(kept)) == (written, after_one)
    monkeypatch.setattr(rtx_runtime, "_BETWEEN_SAVES", 0.0)
    list(_steps(backend, prompt_of(1, 45, range(3, 40))))
    gc.collect()
    after_three = _kernels(kept)
    assert after_three > after_one
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept.parents[1]))
    list(_steps(backend, prompt_of(1, 46, range(3, 40))))
    del backend
    gc.collect()
    assert machine.device.closed
    assert _kernels(kept) > after_three


def test_the_next_backend_compiles_nothing(rtx: Bundle, machine: Machine) -> None:
    assert _compiled(machine, machine.backend(rtx, toolkit="tensorrt-rtx")) > 3
    assert _compiled(machine, machine.backend(rtx, toolkit="tensorrt-rtx")) == 0


@pytest.mark.parametrize("content", [b"garbage", b'{"gpu": "Another RTX", "kernels": []}', b""])
def test_kernels_that_do_not_fit_are_dropped_with_a_word_and_made_anew(
    rtx: Bundle, kept: Path, machine: Machine, content: bytes
) -> None:
    list(_steps(machine.backend(rtx, toolkit="tensorrt-rtx")))
    gc.collect()
    (file,), whole = kept.iterdir(), _kernels(kept)
    file.write_bytes(content)
    said: list[str] = []
    backend = machine.backend(rtx, toolkit="tensorrt-rtx", progress=lambda what, done, total: said.append(what))
    assert _compiled(machine, backend) == len(whole)
    gc.collect()
    assert [what for what in said if "kernels" in what] == [
        f"kernels kept in {file} do not fit here: they are compiled anew"
    ]
    assert _kernels(kept) == whole


def test_without_a_cache_folder_answers_are_the_same(
    rtx: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [record.tokens.tolist() for record in _steps(machine.backend(rtx, toolkit="tensorrt-rtx"))]
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    backend = machine.backend(rtx, toolkit="tensorrt-rtx")
    assert [record.tokens.tolist() for record in _steps(backend)] == expected
    del backend
    gc.collect()


def test_tensorrt_has_no_such_cache(engines: Bundle, kept: Path, machine: Machine) -> None:
    list(_steps(machine.backend(engines)))
    gc.collect()
    assert not kept.exists()


def test_kernels_are_told_apart_by_engines_gpu_and_version(rtx: Bundle) -> None:
    toolkit = Toolkit("tensorrt-rtx", None, VERSION)
    records = list(built_engines(rtx.folder)[RTX].values())

    def names() -> Iterator[str]:
        yield kernels_file(toolkit, RTX, ADA.name, records)
        yield kernels_file(toolkit, RTX, Gpu(0, "Fake L4", 89).name, records)
        yield kernels_file(replace(toolkit, version="2.0"), RTX, ADA.name, records)
        yield kernels_file(toolkit, replace(RTX, sms=(120,)), ADA.name, records)
        yield kernels_file(toolkit, RTX, ADA.name, records[1:])

    assert len(set(names())) == 5
    assert kernels_file(toolkit, RTX, ADA.name, records[::-1]) == next(names())
    assert next(names()).startswith(f"tensorrt-rtx-sm89-fp32-{VERSION}-")


@pytest.mark.parametrize("specialization", get_args(Specialization))
def test_the_strategy_for_new_shapes_is_the_user_s(rtx: Bundle, machine: Machine, specialization: str) -> None:
    list(_steps(machine.backend(rtx, toolkit="tensorrt-rtx", specialization=specialization)))
    assert machine.trt is not None
    assert [each.name for each in machine.trt.specializations] == [specialization.upper()]


def test_the_strategy_is_refused_where_it_would_do_nothing(rtx: Bundle) -> None:
    for backend in set(BACKENDS) - {"tensorrt-rtx"}:
        for command in ("run", "bench", "validate"):
            question = ["--prompt", "What?"] if command == "run" else []
            call = [command, str(rtx.folder), *question, "--backend", backend, "--specialization", "eager"]
            result = CliRunner().invoke(main, call)
            assert result.exit_code == 2
            assert "--specialization is TensorRT-RTX's" in result.stderr
