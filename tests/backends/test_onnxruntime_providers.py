"""Providers that ONNX Runtime has, says it has, or lost: on doubles of its builds for GPUs, and on the real one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from d3tom_export import doctor
from d3tom_export.backends import onnxruntime_package, onnxruntime_providers
from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.onnxruntime_options import Device, profile_strings
from d3tom_export.backends.onnxruntime_providers import choose_provider, problem_of, remedy_of
from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import Loop
from d3tom_export.engines.shapes import SHAPE_INPUTS, stage_profile
from d3tom_export.errors import D3tomError
from d3tom_export.loop.denoise import denoise
from tests.backends.fake_onnxruntime import CPU, CUDA, RTX, TENSORRT, FakeOnnxRuntime

FakeBuild = Callable[..., FakeOnnxRuntime]


@pytest.fixture
def build_of(monkeypatch: pytest.MonkeyPatch) -> FakeBuild:
    """A double of a build of ONNX Runtime; there is a driver, and it is new enough."""
    monkeypatch.setattr(onnxruntime_providers, "driver_version", lambda: (13, 1))

    def make(offered: tuple[str, ...] = (CUDA, CPU), **given: Any) -> FakeOnnxRuntime:
        return FakeOnnxRuntime(monkeypatch, offered, **given)

    return make


def _finding(name: str) -> doctor.Finding:
    """One row of the doctor's; the others import torch and TensorRT."""
    return next(check() for row, check, _ in doctor._CHECKS if row == name)


def _answer(backend: OnnxRuntimeBackend) -> list[int]:
    rng = np.random.default_rng(0)
    prompt = rng.standard_normal((1, 30, backend.language.d_model)).astype(np.float32)
    session = backend.start(prompt, np.arange(4, 24))
    merge, generation = backend._bundle.manifest.merge, backend._bundle.manifest.generation
    mask = backend.language.mask_token_id
    steps = denoise(session, batch=1, visual_tokens=20, mask_token_id=mask, generation=generation, merge=merge)
    return list(steps)[-1].tokens[0].tolist()


def test_a_provider_that_is_listed_and_not_given_is_noticed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof of the review, on the real ONNX Runtime: with CUDA listed, as in every build for GPUs without a GPU."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime_providers, "problem_of", problem_of.__wrapped__)
    monkeypatch.setattr(onnxruntime_providers, "driver_version", lambda: None)
    said: list[str] = []
    backend = OnnxRuntimeBackend(bundle, device="auto", progress=lambda what, *_: said.append(what))
    assert (backend.provider, backend.device, backend.name) == ("cpu", "cpu", "onnxruntime")
    assert said[0] == ("running on the CPU, since the CUDA provider does not work here: there is no NVIDIA driver here")
    assert backend.embed_tokens(np.zeros((1, 3), np.int64)).shape == (1, 3, 32)
    with pytest.raises(D3tomError, match=r"no NVIDIA driver here\. Remedy: an NVIDIA GPU with its driver .*--provider"):
        OnnxRuntimeBackend(bundle, device="cuda")
    finding = _finding("onnxruntime (cuda)")
    assert (finding.usable, finding.found) == (False, "there is no NVIDIA driver here")


def test_auto_takes_cuda_where_a_session_gets_it(bundle: Bundle, build_of: FakeBuild) -> None:
    double = build_of()
    backend = OnnxRuntimeBackend(bundle, device="auto")
    assert (backend.provider, backend.device, backend.name) == ("cuda", "cuda", "onnxruntime (cuda)")
    assert {tuple(session.providers) for session in map(_hashable, double.stages)} == {
        ((CUDA, (("use_tf32", "0"),)), (CPU, ()))
    }
    finding = _finding("onnxruntime (cuda)")
    assert (finding.usable, finding.remedy) == (True, "")


def _hashable(session: Any) -> Any:
    return SimpleNamespace(providers=[(name, tuple(options.items())) for name, options in session.providers])


@pytest.mark.parametrize("loop", ["uncached", "cached"])
def test_on_a_gpu_shape_inputs_stay_on_the_host_and_everything_else_does_not(
    bundle: Bundle, build_of: FakeBuild, loop: Loop
) -> None:
    expected = _answer(OnnxRuntimeBackend(bundle, loop, device="cpu", tuned=False))
    double = build_of()
    backend = OnnxRuntimeBackend(bundle, loop, device="cuda")
    assert _answer(backend) == expected
    bound = {name: where for session in double.stages for name, where in session.bound.items()}
    shape_inputs = SHAPE_INPUTS.keys() & bound.keys()
    assert "keep" in shape_inputs
    assert {name for name, where in bound.items() if where == "cpu"} == shape_inputs
    assert {"hidden", "deciders", "visual_positions", "token_ids"} <= bound.keys() - shape_inputs
    backend.run_stage("embed", {"token_ids": np.zeros((1, 2), np.int64)}, ["embeddings"])
    assert double.stages[1].bound == {"token_ids": "cuda"}


def test_a_stage_that_falls_back_alone_is_named(bundle: Bundle, build_of: FakeBuild) -> None:
    build_of(lost=(3,))  # the first is the tiny one
    with pytest.raises(D3tomError, match=rf"Stage front of .* does not run on cuda: .* with {CPU}, without {CUDA}"):
        OnnxRuntimeBackend(bundle, device="cuda")


def test_a_session_whose_nodes_all_went_to_the_cpu_has_no_provider(bundle: Bundle, build_of: FakeBuild) -> None:
    build_of(cpu_nodes=True)
    assert problem_of.__wrapped__("cuda").startswith("a session does not get it (CUDAExecutionProvider takes none of")
    with pytest.raises(D3tomError, match="CUDAExecutionProvider does not work here"):
        OnnxRuntimeBackend(bundle, device="cuda")


def test_cudas_libraries_are_loaded_before_the_first_session_and_nothing_is_printed(
    build_of: FakeBuild, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    double = build_of()
    sessions_before: list[int] = []

    def preload() -> None:
        sessions_before.append(len(double.sessions))
        print("Failed to load libcublasLt.so.13")

    monkeypatch.setattr(ort, "preload_dlls", preload)
    assert choose_provider("cuda") == ("cuda", "")
    assert sessions_before == [0]
    assert capsys.readouterr() == ("", "")
    monkeypatch.delattr(ort, "preload_dlls")  # before 1.21
    assert choose_provider("cuda") == ("cuda", "")


def test_a_driver_older_than_onnxruntimes_cuda_is_named_with_the_package_that_fits(
    build_of: FakeBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_of(given=())
    monkeypatch.setattr(onnxruntime_providers, "driver_version", lambda: (12, 4))
    monkeypatch.setattr(ort, "cuda_version", "13.0", raising=False)
    with pytest.raises(
        D3tomError, match=r"serves CUDA 12\.4, and this onnxruntime .* is made for CUDA 13.*"
    ) as refusal:
        choose_provider("cuda")
    assert '"onnxruntime-gpu[cuda,cudnn]<1.27"' in str(refusal.value)
    assert "onnxruntime-ep-nv-tensorrt-rtx-cu12" in remedy_of("nv-tensorrt-rtx", "")


@pytest.mark.parametrize(
    ("says", "problem", "remedy"),
    [
        (
            "libcublasLt.so.13: cannot open shared object file: No such file or directory",
            "its library needs libcublasLt.so.13, which cannot be loaded",
            'pip install "d3tom-export[cuda]"',
        ),
        (
            "x.so: undefined symbol: cuTensorMapEncodeTiled",
            "its library needs cuTensorMapEncodeTiled, which the NVIDIA driver here does not have",
            "update the driver",
        ),
        (
            "x.so: undefined symbol: Provider_GetHost",
            f"a session does not get it (ONNX Runtime made a session with {CPU}, without {CUDA})",
            'pip install "d3tom-export[cuda]"',
        ),
    ],
)
def test_a_library_that_is_missing_is_named(
    build_of: FakeBuild, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, says: str, problem: str, remedy: str
) -> None:
    build_of(given=())
    (tmp_path / "capi").mkdir()
    name = "onnxruntime_providers_cuda.dll" if sys.platform == "win32" else "libonnxruntime_providers_cuda.so"
    (tmp_path / "capi" / name).write_bytes(b"")
    monkeypatch.setattr(ort, "__file__", str(tmp_path / "__init__.py"))

    def load(path: str) -> None:
        assert path == str(tmp_path / "capi" / name)
        raise OSError(says)

    monkeypatch.setattr(onnxruntime_providers.ctypes, "CDLL", load)
    assert onnxruntime_providers.problem_of("cuda") == problem
    assert remedy in remedy_of("cuda", problem)
    if "driver" not in problem:
        assert "tensorrt-cu13<11" in remedy_of("tensorrt", problem)


@pytest.mark.parametrize("provider", ["tensorrt", "nv-tensorrt-rtx"])
def test_what_this_onnxruntime_has_not_is_said(provider: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    if provider == "tensorrt" and TENSORRT in ort.get_available_providers():
        pytest.skip("this onnxruntime has a TensorRT provider")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    monkeypatch.setattr(onnxruntime_providers, "_rtx_devices", onnxruntime_providers._rtx_devices.__wrapped__)
    monkeypatch.setattr(onnxruntime_providers, "problem_of", problem_of.__wrapped__)
    with pytest.raises(D3tomError) as refusal:
        choose_provider(provider)
    wanted = {
        "tensorrt": ("has no TensorrtExecutionProvider (it offers ", 'pip install "d3tom-export[cuda]"'),
        "nv-tensorrt-rtx": ("cannot be imported", 'pip install "onnxruntime>=1.24" onnxruntime-ep-nv-tensorrt-rtx'),
    }[provider]
    for text in (*wanted, "--provider cpu"):
        assert text in str(refusal.value)


def test_two_packages_that_own_the_module_are_said_and_how_to_get_one(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(onnxruntime_package.installed_packages()) == 1
    found = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.0"}
    monkeypatch.setattr(onnxruntime_package, "installed_packages", lambda: found)
    said: list[str] = []
    OnnxRuntimeBackend(bundle, device="cpu", progress=lambda what, *_: said.append(what))
    assert said[0].startswith("onnxruntime 1.31.1, onnxruntime-gpu 1.31.0 are installed over one another")
    finding = _finding("onnxruntime (cpu)")
    assert finding.found == said[0]
    assert finding.remedy.startswith('pip uninstall onnxruntime onnxruntime-gpu, then pip install "d3tom-export[cuda]"')
    assert remedy_of("cuda", "there is no NVIDIA driver here") == finding.remedy


def test_without_onnxruntime_one_line_says_what_to_install(bundle: Bundle) -> None:
    script = f"""
import sys
sys.modules["onnxruntime"] = None
from d3tom_export import doctor
from d3tom_export.cli.main import main
doctor._CHECKS = doctor._CHECKS[:1]  # the others import torch and TensorRT
for arguments in (["run", {str(bundle.folder)!r}, "--prompt", "?"], ["doctor"]):
    try:
        main(arguments)
    except SystemExit as stop:
        print("exit code", stop.code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit code")]
    assert codes == ["exit code 1", "exit code 0"]
    paragraph = next(line for line in done.stderr.splitlines() if line.startswith("Error: "))
    assert 'Install it with `pip install "d3tom-export[cpu]"`, or for an NVIDIA GPU with' in paragraph
    assert 'pip install "d3tom-export[cpu]"' in done.stdout


# Providers that build engines


def _profiles(bundle: Bundle, backend: OnnxRuntimeBackend, prefix: str) -> list[dict[str, str]]:
    assert backend._axes is not None
    keys = bundle.stage_keys("cached" if backend.kv_cache else "uncached").values()
    spelled = [profile_strings(stage_profile(bundle.manifest.stages[key], backend._axes)) for key in keys]
    return [{f"{prefix}_profile_{which}_shapes": text for which, text in each.items()} for each in spelled]


def test_tensorrts_provider_gets_each_stages_profile_cache_and_real_inputs(
    bundle: Bundle, build_of: FakeBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _answer(OnnxRuntimeBackend(bundle, device="cpu", tuned=False))
    double = build_of((TENSORRT, CUDA, CPU))
    backend = OnnxRuntimeBackend(bundle, device="tensorrt", provider_cache=tmp_path / "kept")
    given = [dict(session.providers) for session in double.stages]
    profiles = _profiles(bundle, backend, "trt")
    caches = [Path(each[TENSORRT]["trt_engine_cache_path"]) for each in given]
    assert [{k: v for k, v in each[TENSORRT].items() if "profile" in k} for each in given] == profiles
    assert all(list(each) == [TENSORRT, CUDA, CPU] for each in given)
    assert len(set(caches)) == len(given)
    assert all(cache.is_dir() and cache.parent == tmp_path / "kept" for cache in caches)
    # No initializer stands for an input: TensorRT would take the default for a constant.
    for session in double.stages:
        graph = onnx.load_from_string(session.graph).graph
        assert not {value.name for value in graph.input} & {tensor.name for tensor in graph.initializer}
    names = list(backend.stages)
    assert "answer_length" in double.stages[names.index("back")].inputs
    assert _answer(backend) == expected
    assert backend.name == "onnxruntime (tensorrt)"
    # Stages alone get the defaults that their graphs no longer have.
    inputs = {"merged": np.zeros((1, 20, 32), np.float32)}
    assert backend.run_stage("back", inputs, ["token"])["token"].shape == (1, 8)


def test_sizes_beyond_a_profile_are_refused_before_the_provider_sees_them(bundle: Bundle, build_of: FakeBuild) -> None:
    build_of((TENSORRT, CUDA, CPU))
    backend = OnnxRuntimeBackend(bundle, device="tensorrt")
    with pytest.raises(D3tomError, match=r"Stage embed of .* of shape \(1\.\.2, .*needs \(3, 2\)\. Run it with"):
        backend.embed_tokens(np.zeros((3, 2), np.int64))
    backend.check({"B": 2, "P": 40, "V": 20, "G": 7})
    with pytest.raises(D3tomError, match="built for B of 1 to 2, and this needs 3"):
        backend.check({"B": 3, "P": 40, "V": 20, "G": 7})
    OnnxRuntimeBackend(bundle, device="cpu").check({"B": 3})


@pytest.fixture
def rtx_plugin(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The plugin's package, and what was registered."""
    registered: list[tuple[str, str]] = []
    plugin = ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    plugin.get_library_path = lambda: "/packages/libonnxruntime_providers_nv_tensorrt_rtx.so"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda *a: registered.append(a))
    return registered


def test_tensorrt_rtxs_plugin_is_registered_and_its_devices_are_given_each_stages_profile(
    bundle: Bundle, build_of: FakeBuild, rtx_plugin: list[tuple[str, str]]
) -> None:
    expected = _answer(OnnxRuntimeBackend(bundle, device="cpu", tuned=False))
    double = build_of((CPU,))
    device, second = SimpleNamespace(ep_name=RTX), SimpleNamespace(ep_name=RTX)
    double.plugin_devices = [SimpleNamespace(ep_name=CPU), device, second]
    backend = OnnxRuntimeBackend(bundle, device="nv-tensorrt-rtx")
    assert rtx_plugin[0] == (RTX, "/packages/libonnxruntime_providers_nv_tensorrt_rtx.so")
    assert (backend.name, backend.device) == ("onnxruntime (nv-tensorrt-rtx)", "cpu")
    assert all(session.providers is None for session in double.stages)
    assert all(session.options.plugin[0][0] is device for session in double.stages)
    assert [session.options.plugin for session in double.stages] == [
        ([device], profile) for profile in _profiles(bundle, backend, "nv")
    ]
    assert _answer(backend) == expected


def test_a_plugin_without_driver_or_gpu_says_so(
    build_of: FakeBuild, rtx_plugin: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_of((CPU,))
    assert "finds no GPU that it knows" in onnxruntime_providers.problem_of("nv-tensorrt-rtx")

    def fail(*_: str) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Failed to load library x.so with error: libcuda.so.1: lost")

    monkeypatch.setattr(ort, "register_execution_provider_library", fail)
    assert onnxruntime_providers.problem_of("nv-tensorrt-rtx") == "its library cannot be loaded: libcuda.so.1: lost"
    monkeypatch.setattr(onnxruntime_providers, "driver_version", lambda: None)
    assert onnxruntime_providers.problem_of("nv-tensorrt-rtx") == "there is no NVIDIA driver here"
    monkeypatch.delattr(ort, "register_execution_provider_library")
    assert "takes no provider plugins, 1.24 and later do" in onnxruntime_providers.problem_of("nv-tensorrt-rtx")


def test_float32_stays_float32_in_a_process_that_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(onnxruntime_providers.os, "environ", environment)
    monkeypatch.setattr(onnxruntime_providers, "claimed", lambda: False)
    onnxruntime_providers.keep_float32()
    assert not environment
    monkeypatch.setattr(onnxruntime_providers, "claimed", lambda: True)
    onnxruntime_providers.keep_float32()
    assert environment == {"NVIDIA_TF32_OVERRIDE": "0"}


def test_the_tiny_model_is_one_that_onnx_accepts() -> None:
    onnx.checker.check_model(onnx.load_from_string(onnxruntime_providers._tiny_model()))
    assert problem_of("cpu") == ""


def test_providers_are_asked_after_a_process_of_ours_shares_its_threads() -> None:
    """ONNX Runtime then refuses sessions with threads of their own, the tiny one among them."""
    script = """
from d3tom_export.backends.onnxruntime_providers import problem_of
from d3tom_export.backends.onnxruntime_stage import session_options
from d3tom_export.process import claim
claim()
session_options("cpu")
print([problem_of("cpu")])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['']"
