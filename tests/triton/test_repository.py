"""What ``d3tom-export triton`` writes: the files, the configurations as protobuf reads them, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from google.protobuf import text_format

from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.bundle.output import sweep
from d3tom_export.config import LOOPS, Loop
from d3tom_export.engines.record import Target
from d3tom_export.engines.shapes import SHAPE_INPUTS
from d3tom_export.errors import CallError, D3tomError
from d3tom_export.triton.configs import answer_config
from d3tom_export.triton.readme import IMAGE, IMAGE_FOR_PLUGINS, readme
from d3tom_export.triton.repository import REPOSITORY, RepositoryRequest, write_repository
from d3tom_export.triton.runtime import requirements, runtime_files
from d3tom_export.triton.stage_models import stage_models
from d3tom_export.triton.text_format import string_map, to_text
from tests.backends.fake_engines import VERSION, own_bundle, write_engines
from tests.conftest import Invoke

model_config_pb2 = pytest.importorskip(
    "tritonclient.grpc.model_config_pb2", reason="reading a server's configuration needs tritonclient and grpcio"
)

CPU = {"backend": "onnxruntime", "device": "cpu"}


def _parsed(text: str) -> Any:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def _tensors(fields: Any) -> dict[str, tuple[str, list[int], bool]]:
    kinds = model_config_pb2.DataType
    return {
        each.name: (kinds.Name(each.data_type), list(each.dims), getattr(each, "optional", False)) for each in fields
    }


def test_protobuf_reads_any_text_back() -> None:
    odd = 'quotes " and \\ and \n\t\x00\x7f, é and 猫 and \U0001f600'
    config = _parsed(to_text({"name": odd, "parameters": string_map({odd: odd, "empty": ""})}))
    assert config.name == odd
    assert {key: value.string_value for key, value in config.parameters.items()} == {odd: odd, "empty": ""}


def test_the_answers_configuration() -> None:
    config = _parsed(answer_config({**CPU, "kv_cache": True, "precision": "int8"}, 3))
    assert (config.name, config.backend, config.max_batch_size) == ("answer", "python", 0)
    assert config.model_transaction_policy.decoupled
    assert _tensors(config.input) == {
        "IMAGE": ("TYPE_STRING", [-1], True),
        "PROMPT": ("TYPE_STRING", [1], False),
        "PARAMS": ("TYPE_STRING", [1], True),
    }
    assert _tensors(config.output) == {
        "TEXT": ("TYPE_STRING", [1], False),
        "TOKENS": ("TYPE_INT32", [-1], False),
        "STEP": ("TYPE_INT32", [1], False),
        "FINAL": ("TYPE_BOOL", [1], False),
    }
    (group,) = config.instance_group
    assert (group.kind, group.count) == (model_config_pb2.ModelInstanceGroup.KIND_CPU, 3)
    assert {name: value.string_value for name, value in config.parameters.items()} == {
        "backend": "onnxruntime", "device": "cpu", "kv_cache": "true", "precision": "int8",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "device"),
    [("onnxruntime", "cuda"), ("onnxruntime", "tensorrt"), ("tensorrt", "auto"), ("tensorrt-rtx", "cuda")],
)
def test_work_of_a_gpu_has_instances_on_each(backend: str, device: str) -> None:
    (group,) = _parsed(answer_config({"backend": backend, "device": device}, 2)).instance_group
    assert (group.kind, group.count) == (model_config_pb2.ModelInstanceGroup.KIND_GPU, 2)


@pytest.mark.parametrize("loop", LOOPS)
def test_every_stage_has_a_configuration(bundle: Bundle, loop: Loop) -> None:
    keys = bundle.stage_keys(loop)
    models = stage_models(bundle, loop, "onnxruntime", None, gpu=False)
    assert [model.name for model in models] == list(keys)
    for model in models:
        spec, config = bundle.manifest.stages[keys[model.name]], _parsed(model.config)
        assert (config.name, config.backend, config.max_batch_size) == (model.name, "onnxruntime", 0)
        assert [each.name for each in config.input] == [each.name for each in spec.inputs if each.default is None]
        for each, tensor in zip(config.output, spec.outputs, strict=True):
            assert each.name == tensor.name
            assert list(each.dims) == [-1 if isinstance(axis, str) else axis for axis in tensor.axes]


def test_engines_become_plans(bundle: Bundle, tmp_path: Path) -> None:
    """Of doubles of TensorRT's plans: a server looks at their tensors, and nothing here does."""
    target = Target("tensorrt", (89,), "bf16")
    own = own_bundle(bundle, tmp_path / "bundle")
    write_engines(own, target, plugin="identity")
    output = tmp_path / "models"
    opening = {"backend": "tensorrt", "kv_cache": True}
    written = write_repository(RepositoryRequest(own.folder, output, opening, stages=True))
    assert written.gpu
    assert "prefill" not in written.models
    config = _parsed((output / "front" / "config.pbtxt").read_text())
    (group,) = config.instance_group
    assert (config.backend, group.kind) == ("tensorrt", model_config_pb2.ModelInstanceGroup.KIND_GPU)
    assert list(group.profile) == ["0", "1"]
    assert "TYPE_BF16" in {kind for kind, _, _ in _tensors(config.input).values()}
    merge = _parsed((output / "merge" / "config.pbtxt").read_text())
    assert {each.name for each in merge.input if each.is_shape_tensor} <= set(SHAPE_INPUTS)
    plan = output / "front" / "1" / "model.plan"
    assert plan.samefile(output / "answer" / "1" / "bundle" / target.folder / "cached_front.plan")
    assert written.linked_bytes == 0, "plans lie in two folders of the repository, and nowhere else"
    assert f"tensorrt=={VERSION}" in (output / "requirements.txt").read_text().splitlines()
    page = (output / "README.md").read_text()
    assert "--gpus all" in page
    assert f"in the TensorRT that built it, {VERSION}," in page
    assert "--backend-config=tensorrt,plugins=" in page

    write_engines(own, Target("tensorrt", (89,), "fp32"))
    several = RepositoryRequest(own.folder, tmp_path / "other", opening, stages=True)
    with pytest.raises(D3tomError, match="Choose by --precision"):
        write_repository(several)
    write_engines(own, Target("tensorrt-rtx", (89,), "fp32"))
    with pytest.raises(D3tomError, match="loads no plans of tensorrt-rtx"):
        write_repository(replace(several, opening={"backend": "tensorrt-rtx", "kv_cache": True}))
    with pytest.raises(D3tomError, match="has no engines of tensorrt in fp16: it has those of tensorrt, SM89, "):
        write_repository(replace(several, opening=opening | {"precision": "fp16"}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "models"]


def test_requirements_name_the_version_that_built_the_engines(bundle: Bundle, tmp_path: Path) -> None:
    own = own_bundle(bundle, tmp_path / "bundle")
    request = RepositoryRequest(own.folder, tmp_path / "models", {"backend": "tensorrt-rtx"}, link=True)

    def told(precision: str) -> list[str]:
        opening = {**request.opening, "precision": precision}
        write_repository(replace(request, opening=opening, force=True))
        return (request.output / "requirements.txt").read_text().splitlines()

    write_engines(own, Target("tensorrt-rtx", (89,), "fp32"), version="1.7.1.116")
    assert "tensorrt-rtx==1.7.1.116" in told("fp32")
    write_engines(own, Target("tensorrt-rtx", (89,), "bf16"), version="1.6.1.120")
    write_engines(own, Target("tensorrt", (89,), "bf16"), version="10.8.0.43")
    assert "tensorrt-rtx==1.6.1.120" in told("bf16")
    assert "tensorrt-rtx==1.7.1.116" in told("fp32")
    with pytest.raises(D3tomError, match=r"several versions of tensorrt-rtx built: 1\.6.*bf16.*1\.7.*fp32"):
        write_repository(replace(request, force=True))
    write_engines(own, Target("tensorrt-rtx", (89,), "fp16"), version="1.7\n--index-url=http://evil")
    with pytest.raises(D3tomError, match="which is no version"):
        told("fp16")
    assert "tensorrt-rtx==1.7.1.116" in (request.output / "requirements.txt").read_text().splitlines()


def test_copies_are_on_the_disk_and_counted_once(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that were copied, then linked beside each graph, are as fresh as the graphs."""
    synced, fsync = set(), os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", noted)
    notes: list[str] = []
    request = RepositoryRequest(bundle.folder, tmp_path / "models", {}, stages=True)
    written = write_repository(request, note=notes.append)
    files = [path for path in request.output.rglob("*") if path.is_file()]
    sizes = {path.stat().st_ino: path.stat().st_size for path in files}
    assert len(sizes) < len(files)
    assert sizes.keys() <= synced
    assert (written.bytes, written.linked_bytes) == (sum(sizes.values()), 0)
    assert not [told for told in notes if "copy" in told]
    # Links to files of the bundle need no sync, and are not all that a repository has.
    synced.clear()
    linked = write_repository(replace(request, output=tmp_path / "linked", link=True))
    bundled = {path.stat().st_ino: path.stat().st_size for path in bundle.folder.rglob("*") if path.is_file()}
    taken = {path.stat().st_ino for path in linked.folder.rglob("*") if path.is_file()} & bundled.keys()
    assert not synced & taken
    assert linked.linked_bytes == sum(bundled[each] for each in taken)


def test_stages_on_a_file_system_without_hard_links(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    notes: list[str] = []
    request = RepositoryRequest(bundle.folder, tmp_path / "models", {"kv_cache": False}, stages=True)
    written = write_repository(request, note=notes.append)
    assert notes[-1].startswith("Each stage has a copy of its weights: they cannot be linked there (")
    assert written.bytes == sum(path.stat().st_size for path in request.output.rglob("*") if path.is_file())
    for name in bundle.stage_keys("uncached"):
        onnxruntime.InferenceSession(request.output / name / "1" / "model.onnx")
    with pytest.raises(D3tomError, match="Leave --link out"):  # who asked for links is told
        write_repository(replace(request, output=tmp_path / "linked", link=True))


@pytest.fixture(scope="module")
def repository(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With everything: linked, with stages, of two instances. Tests only read from it."""
    output = tmp_path_factory.mktemp("triton") / "models"
    request = RepositoryRequest(
        bundle.folder, output, {"kv_cache": False}, 2, ("/opt/packages",), link=True, stages=True
    )
    written = write_repository(request)
    assert written.models == ("answer", *bundle.stage_keys("uncached"))
    assert not written.gpu
    return output


def test_a_repository_is_whole(repository: Path, bundle: Bundle) -> None:
    version = repository / "answer" / "1"
    assert {path.name for path in repository.iterdir()} == {
        "README.md", "requirements.txt", "d3tom-export.json", "answer", *bundle.stage_keys("uncached"),
    }  # fmt: skip
    assert {path.name for path in version.iterdir()} == {"model.py", "site-packages.txt", "runtime", "bundle"}
    assert load_bundle(version / "bundle", "full").manifest == bundle.manifest
    for name in bundle.files or {}:
        assert (version / "bundle" / name).samefile(bundle.folder / name)
    lines = (version / "site-packages.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["/opt/packages"]
    runtime = {path.relative_to(version / "runtime").as_posix() for path in (version / "runtime").rglob("*.py")}
    assert runtime == dict(runtime_files()).keys()
    assert {"d3tom_export/__init__.py", "d3tom_export/triton/serving.py", "d3tom_export/plugins/kernels.py"} <= runtime
    assert not [name for name in runtime if name.startswith(("d3tom_export/cli", "d3tom_export/models/"))]
    compile((version / "model.py").read_text(), "model.py", "exec")
    listed = json.loads((repository / "d3tom-export.json").read_text())["files"]
    found = {path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()}
    assert listed.keys() == found - {"d3tom-export.json"}


def test_stages_load_from_their_own_folders(repository: Path, bundle: Bundle) -> None:
    for name, key in bundle.stage_keys("uncached").items():
        config = _parsed((repository / name / "config.pbtxt").read_text())
        session = onnxruntime.InferenceSession(repository / name / "1" / "model.onnx")
        # What the server's backend holds a configuration against: inputs with a default are not among them.
        assert [each.name for each in config.input] == [each.name for each in session.get_inputs()]
        assert [each.name for each in config.output] == [each.name for each in session.get_outputs()]
        assert bundle.manifest.stages[key].name == name


def test_what_a_server_needs_is_listed(repository: Path) -> None:
    told = (repository / "requirements.txt").read_text().splitlines()
    assert "numpy>=1.26,<2" in told
    assert {line.split(">=")[0] for line in told} == {
        "msgspec", "numpy", "onnxruntime", "pillow", "safetensors", "tokenizers",
    }  # fmt: skip
    assert any(line.startswith("onnxruntime-gpu[") for line in requirements("onnxruntime", "cuda"))
    engines = {line.split(">=")[0] for line in requirements("tensorrt", "auto")}
    assert {"cuda-bindings", "tensorrt"} <= engines
    assert not engines & {"triton", "click", "onnxruntime"}
    assert "onnxruntime-ep-nv-tensorrt-rtx" in requirements("onnxruntime", "nv-tensorrt-rtx")


def test_the_page_says_how_to_start_it(repository: Path, bundle: Bundle) -> None:
    page = (repository / "README.md").read_text()
    assert "2 instances" in page
    assert "tritonserver --model-repository /models" in page
    assert "--gpus" not in page
    assert f"{', '.join(f'`{name}`' for name in bundle.stage_keys('uncached'))} are" in page
    assert "{" not in page.replace('{"PROMPT": "What is in the picture?"', "").replace('%s"}', "")
    assert "--gpus all" in readme(bundle, {"backend": "tensorrt", "device": "auto"}, 1, [])
    assert "3.11 or later" not in page
    plugin = readme(bundle, {"backend": "onnxruntime", "device": "nv-tensorrt-rtx"}, 1, [])
    assert IMAGE in page
    assert plugin.count(IMAGE_FOR_PLUGINS) == page.count(IMAGE) > 0
    assert IMAGE not in plugin
    assert "It must be 3.11 or later" in plugin


def test_the_command_writes_and_replaces_it(bundle: Bundle, tmp_path: Path, invoke: Invoke) -> None:
    output = tmp_path / "models"
    asked = ["triton", bundle.folder, "--output", output]
    result = invoke(*asked, "--json", "-")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["models"], told["gpu"], told["linked_bytes"]) == (["answer"], False, 0)
    copied = output / "answer" / "1" / "bundle" / "manifest.json"
    assert not copied.samefile(bundle.folder / "manifest.json")

    again = invoke(*asked)
    assert (again.exit_code, "--force to replace it" in " ".join(again.stderr.split())) == (1, True)
    cache = output / "answer" / "1" / "runtime" / "d3tom_export" / "__pycache__"
    cache.mkdir()
    (cache / "errors.cpython-311.pyc").write_bytes(b"what serving it leaves")
    (output / "answer" / "config.pbtxt").write_text("what its user changed")
    replaced = invoke(*asked, "--force", "--instances", 4)
    assert replaced.exit_code == 0, replaced.output
    assert "README.md says how" in replaced.stdout
    assert _parsed((output / "answer" / "config.pbtxt").read_text()).instance_group[0].count == 4
    assert not cache.exists()

    (output / "answer" / "mine.txt").write_text("somebody's")
    kept = invoke(*asked, "--force")
    assert (kept.exit_code, "is not a model repository" in " ".join(kept.stderr.split())) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


def test_a_bundle_is_no_repository_to_replace(bundle: Bundle, tmp_path: Path) -> None:
    request = RepositoryRequest(bundle.folder, bundle.folder, {}, force=True)
    with pytest.raises(D3tomError, match="is not a model repository"):
        write_repository(request)
    assert load_bundle(bundle.folder)


def test_what_a_killed_command_left_is_cleared_away(bundle: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "models"
    host = "0123abcd"
    left = tmp_path / f".models.partial-{host}-4194305-89abcdef"
    for name in ("lock", "new/README.md", "new/answer/config.pbtxt", "new/answer/1/model.py"):
        (left / name).parent.mkdir(parents=True, exist_ok=True)
        (left / name).touch()
    assert "on another machine" in sweep(output, REPOSITORY)[0]
    (left / "new" / "answer" / "picture.png").touch()
    assert "holds new/answer/picture.png" in sweep(output, REPOSITORY)[0]


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--backend", "tensorrt"], 1, "has no engines of tensorrt: it has none."),
        (["--backend", "tensorrt-rtx", "--precision", "fp16"], 1, "has no engines of tensorrt-rtx in fp16"),
        (["--precision", "int8"], 1, "has no graphs in int8"),
        (["--provider", "cuda", "--precision", "bf16"], 1, "has no graphs in bf16"),
        (["--backend", "pytorch"], 2, "is the oracle, which no server runs"),
        (["--precision", "int8", "--provider", "cuda"], 2, "--precision int8 is for the CPU"),
        (["--instances", 0], 2, "--instances"),
        (["--site-packages", "one\ntwo"], 2, "a folder is a line of a file"),
        (["--specialization", "eager"], 2, "--specialization is TensorRT-RTX's"),
        (["--provider", "tensorrt", "--provider-cache", "cache"], 2, "counts from the server's folder"),
    ],
)
def test_what_cannot_be_served_leaves_nothing(
    bundle: Bundle, tmp_path: Path, invoke: Invoke, options: list[Any], code: int, says: str
) -> None:
    result = invoke("triton", bundle.folder, "--output", tmp_path / "models", *options)
    assert (result.exit_code, result.stdout) == (code, "")
    assert says in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_only_bundles_are_served(tmp_path: Path, bundle: Bundle, invoke: Invoke) -> None:
    result = invoke("triton", tmp_path, "--output", tmp_path / "models")
    assert result.exit_code == 1
    assert "is not a bundle: it has no manifest.json" in " ".join(result.stderr.split())
    with pytest.raises(CallError, match="65 instances"):
        write_repository(RepositoryRequest(bundle.folder, tmp_path / "models", {}, 65))
    assert not list(tmp_path.iterdir())
