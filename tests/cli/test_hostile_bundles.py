"""Bundles of strangers: whatever is wrong with manifest, files or graphs is one paragraph and exit code 1."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.bundle.manifest import MANIFEST_FILE, stage_file
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.stored import INDEX_FILE
from d3tom_export.config import LOOPS, Loop
from d3tom_export.cpu.tune import write_tuned
from d3tom_export.errors import D3tomError
from tests.conftest import Invoke

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the bundle to change."""
    return Path(shutil.copytree(bundle.folder, tmp_path / "copy"))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((folder / MANIFEST_FILE).read_text())
    change(raw)
    (folder / MANIFEST_FILE).write_text(json.dumps(raw))


def rehash(folder: Path, name: str) -> None:
    """List ``name`` as it is now: whoever changes a file can do that too."""
    content = (folder / name).read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(folder, lambda raw: raw["files"].update({name: entry}))


def refused(invoke: Invoke, folder: Path, says: str, *command: object) -> None:
    result = invoke(*(command or ("inspect", folder)))
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert "defect" not in result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("[")]
    assert len(lines) == 1, lines
    assert len(lines[0]) < 5000
    assert says in lines[0], lines[0]


def _drop(*path: str) -> Callable[[dict[str, Any]], object]:
    def change(raw: dict[str, Any]) -> None:
        for name in path[:-1]:
            raw = raw[name]
        del raw[path[-1]]

    return change


def _set(value: Any, *path: Any) -> Callable[[dict[str, Any]], object]:
    def change(raw: Any) -> None:
        for name in path[:-1]:
            raw = raw[name]
        raw[path[-1]] = value

    return change


def _swap_names(raw: dict[str, Any]) -> None:
    stages = raw["stages"]
    stages["front"]["name"], stages["back"]["name"] = "back", "front"


def _rename_stage(raw: dict[str, Any]) -> None:
    raw["stages"]["../c/front"] = raw["stages"].pop("front")
    raw["files"]["../c/front.onnx"] = raw["files"]["front.onnx"]


ENTRY = {"bytes": 1, "sha256": "0" * 64}

MANIFESTS = [
    (_set("abc", "files"), "files: expected object, got str"),
    (_set([], "files"), "files: expected object, got array"),
    (_set(-1, "files", "back.onnx", "bytes"), "bytes: expected"),
    (_set(True, "files", "back.onnx", "bytes"), "expected int, got bool"),
    (_set(1.5, "files", "back.onnx", "bytes"), "expected int, got float"),
    (_set("x" * 64, "files", "back.onnx", "sha256"), "expected str matching regex"),
    (_set("0" * 64 + "\n", "files", "back.onnx", "sha256"), "expected str matching regex"),
    (_set(ENTRY, "files", "../secret"), "'../secret' is no plain name"),
    (_set(ENTRY, "files", "/etc/passwd"), "'/etc/passwd' is no plain name"),
    (_set(ENTRY, "files", "a//b"), "is no plain name"),
    (_set(ENTRY, "files", "a\x1b[2Jb"), "is no plain name"),
    (_drop("files", "config.json"), "config.json is not listed"),
    (_drop("files", "tokenizer.json"), "holds tokenizer.json, which its manifest.json does not list"),
    (_drop("files", SHARD), f"holds {SHARD}, which its manifest.json does not list"),
    (_drop("files", INDEX_FILE), f"holds {INDEX_FILE}, which"),
    (_set("6", "schema_version"), "schema version '6'"),
    (_set(True, "schema_version"), "schema version True"),
    (_set(7, "schema_version"), "newer d3tom-export"),
    (_set(5, "schema_version"), "Rebuild it with this version"),
    (_drop("merge"), "missing required field merge"),
    (_drop("merge", "layer"), "missing required field layer"),
    (_set("x", "merge", "layer"), "merge.layer: expected int, got str"),
    (_set(-1, "merge", "layer"), "merge layer -1 is outside"),
    (_set(10**15, "merge", "layer"), "is outside this model"),
    (_set("0.9", "merge", "ratio"), "merge.ratio: expected float, got str"),
    (_set(7, "merge", "ratio"), "merge ratio 7 is outside"),
    (_set("mystery", "merge", "select"), "invalid enum value 'mystery'"),
    (_set(1, "merge", "surprise"), "surprise"),
    (_set(None, "merge", "cache"), "expected object, got null"),
    (_set(0, "generation", "gen_length"), "answer length is 0"),
    (_set(10**12, "generation", "gen_length"), "describes stage back otherwise"),
    (_set([], "generation", "gen_length"), "expected int, got array"),
    (_set("x", "model", "vocab_rows"), "model.vocab_rows: expected int, got str"),
    (_set(0, "model", "vocab_rows"), "model.vocab_rows"),
    (_set(261, "model", "vocab_rows"), "its embedding table has the shape (262, 32), and the manifest has 261 tokens"),
    (_set(5, "model", "name"), "model.name: expected str, got int"),
    (_set("n" * 5000, "model", "name"), "model.name"),
    (_set("fp8", "precision"), "invalid enum value 'fp8'"),
    (_set("maybe", "kv_cache"), "invalid enum value 'maybe'"),
    (_set(1, "prompt", "drop_token_after_image"), "expected bool, got int"),
    (_set(None, "prompt", "template"), "expected object, got null"),
    (_set("x" * 70_000, "prompt", "template", "start"), "prompt.template.start: expected str of length <= 65536"),
    (_set(None, "prompt", "template", "to_assistant"), "expected str, got null"),
    (_set(["tool"], "prompt", "template", "strips"), "invalid enum value 'tool'"),
    (_set(7, "prompt", "system"), "prompt.system: expected str | null, got int"),
    (_set(["x"] * 65, "prompt", "stop"), "prompt.stop: expected array of length <= 64"),
    (_set([[1]] * 66, "generation", "stop_ids"), "has 66 stops"),
    (
        _set([[262]], "generation", "stop_ids"),
        "has token 262 in a stop, a suffix or the ends of answers, and the model 262 tokens",
    ),
    (_set([10**9], "generation", "suffix_ids"), "has token 1,000,000,000 in a stop, a suffix"),
    (_set(5, "validation"), "validation: expected object | null, got int"),
    (_set({"passed": 1}, "validation"), "expected bool, got int"),
    (_set({}, "validation"), "missing required field passed"),
    (_set([], "created_by"), "created_by: expected object, got array"),
    (_set({"torch": 2}, "created_by"), "expected str, got int"),
    (_drop("stages", "front"), "has the stages"),
    (_drop("stages"), "missing required field stages"),
    (_set({}, "stages"), "stages"),
    (_set("uncached", "stages", "back", "loop"), None),
    (_set("cached", "stages", "back", "loop"), "describes stage back otherwise"),
    (_set("../back.onnx", "stages", "back", "file"), "describes stage back otherwise"),
    (_set("float16", "stages", "back", "outputs", 0, "dtype"), "describes stage back otherwise"),
    (_set(["B"], "stages", "back", "outputs", 0, "axes"), "describes stage back otherwise"),
    (_set([{}], "stages", "back", "axes"), "axes"),
    (_set(7, "stages", "back", "weights"), "expected array, got int"),
    (_swap_names, "describes stage front otherwise"),
    (_rename_stage, "'../c/front.onnx' is no plain name"),
    (_set(False, "kv_cache"), "has the stages"),
]


@pytest.mark.parametrize(
    ("change", "says"), MANIFESTS, ids=[f"{n}-{says}"[:48] for n, (_, says) in enumerate(MANIFESTS)]
)
def test_a_manifest_of_wrong_kinds(
    copy: Path,
    invoke: Invoke,
    change: Callable[[dict[str, Any]], object],
    says: str | None,
) -> None:
    edit_manifest(copy, change)
    if says is None:  # what the mutations start from passes
        assert invoke("inspect", copy).exit_code == 0
    else:
        refused(invoke, copy, says)


def _index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        raw = json.loads((folder / INDEX_FILE).read_text())
        change(raw["weight_map"])
        (folder / INDEX_FILE).write_text(json.dumps(raw))
        rehash(folder, INDEX_FILE)

    return damage


def _replace(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def _unlist(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        edit_manifest(folder, lambda raw: raw["files"].pop(name, None))
        _replace(name, make)(folder)

    return damage


FILES = [
    ("a pipe for a tokenizer", _unlist("tokenizer.json", os.mkfifo), "holds tokenizer.json, which"),
    ("a listed pipe", _replace("tokenizer.json", os.mkfifo), "is a named pipe, expected a regular file"),
    ("samples that nobody listed", lambda f: (f / "samples.zip").write_bytes(b"PK"), "holds samples.zip, which"),
    ("a second set of weights", lambda f: (f / "model.safetensors").write_bytes(b""), "holds model.safetensors, which"),
    ("a broken link", lambda f: (f / "samples.zip").symlink_to("nowhere"), "holds samples.zip, which"),
    ("a link that leads out", _replace("config.json", lambda p: p.symlink_to("/etc/hostname")), "leads out of its"),
    ("a folder", _replace("config.json", Path.mkdir), "is a folder, expected a regular file"),
    ("a manifest that is a pipe", _replace(MANIFEST_FILE, os.mkfifo), "is a named pipe"),
    ("a manifest elsewhere", _replace(MANIFEST_FILE, lambda p: p.symlink_to("/etc/hostname")), "leads out of its"),
    ("an index that is a device", _replace(INDEX_FILE, lambda p: p.symlink_to("/dev/zero")), "leads out of its"),
    ("a shard outside", _index(lambda m: m.update(x="../x.safetensors")), "is no plain name"),
    ("a shard that is a graph", _index(lambda m: m.update(x="back.onnx")), "does not end in .safetensors"),
    ("a shard that is no name", _index(lambda m: m.update(x=5)), "names a shard: 5 is no name"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), [pytest.param(*rest, id=what) for what, *rest in FILES])
def test_files_that_are_not_what_they_should_be(
    copy: Path,
    invoke: Invoke,
    damage: Callable[[Path], object],
    says: str,
) -> None:
    damage(copy)
    refused(invoke, copy, says)


def test_what_nobody_reads_may_lie_around(copy: Path, invoke: Invoke) -> None:
    (copy / "README.md").write_text("mine")
    (copy / "notes.onnx").write_bytes(b"?")
    os.mkfifo(copy / "pipe")
    assert invoke("inspect", copy).exit_code == 0


Model = onnx.ModelProto


def _loop(model: Model) -> None:
    """An endless loop before the stage."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Identity", ["x"], ["y"])],
        "body",
        [
            helper.make_tensor_value_info("n", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.INT64, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.INT64, None),
        ],
    )
    model.graph.node.insert(0, helper.make_node("Loop", ["", "yes", "token_ids"], ["looped"], body=body))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))


def _node(*arguments: Any, **attributes: Any) -> Callable[[Model], object]:
    def change(model: Model) -> None:
        domain = attributes.get("domain", "")
        if domain:
            model.opset_import.append(helper.make_opsetid(domain, 1))
        model.graph.node.append(helper.make_node(*arguments, **attributes))

    return change


def _external(**entries: str) -> Callable[[Model], object]:
    """Other places of the first weight; None removes one."""

    def change(model: Model) -> None:
        weight = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        places = {entry.key: entry.value for entry in weight.external_data} | entries
        del weight.external_data[:]
        for key, value in places.items():
            weight.external_data.add(key=key, value=value)

    return change


def _giant(model: Model) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([700_000_000], dtype=np.int64), "size"))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["size"], ["giant"]))


def _range(model: Model) -> None:
    for name, value in (("from", 0), ("to", 10**10), ("by", 1)):
        model.graph.node.append(helper.make_node("Constant", [], [name], value_int=value))
    model.graph.node.append(helper.make_node("Range", ["from", "to", "by"], ["giant"]))


def _function(model: Model) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    model.functions.append(
        helper.make_function("d3tom_export", "Other", ["x"], ["y"], [node], [helper.make_opsetid("", 20)])
    )


def _recursion(model: Model) -> None:
    node = helper.make_node("D3ToMMerge", ["x", "x", "x"], ["y"], domain="d3tom_export")
    opsets = [helper.make_opsetid("", 20)]
    model.functions.append(helper.make_function("d3tom_export", "D3ToMMerge", ["x"], ["y"], [node], opsets))


def _rename_output(model: Model) -> None:
    model.graph.output[0].name = "other"


def _widen(model: Model) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 64


def _retype(model: Model) -> None:
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def _sparse(model: Model) -> None:
    values, indices = (
        numpy_helper.from_array(np.ones(1, np.float32), "s"),
        numpy_helper.from_array(np.zeros(1, np.int64)),
    )
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [10**12]))


GRAPHS: list[tuple[str, Callable[[Model], object], str]] = [
    ("an endless loop", _loop, "is of Loop, an operator that no stage of ours has"),
    ("a condition", _node("If", ["yes"], ["z"]), "is of If, an operator"),
    ("a hidden graph", _node("Cast", ["x"], ["z"], body=helper.make_graph([], "g", [], [])), "holds a graph inside"),
    ("unknown sizes", _node("NonZero", ["x"], ["z"]), "is of NonZero, an operator"),
    ("a foreign domain", _node("Steal", ["x"], ["z"], domain="evil"), "imports operators of the domain 'evil'"),
    ("a foreign kernel", _node("BifurcationDetector", ["x"], ["z"], domain="com.microsoft"), "that no stage"),
    ("another function", _function, "defines the function 'd3tom_export.Other'"),
    ("a function that calls itself", _recursion, "is of d3tom_export.D3ToMMerge, an operator"),
    ("a giant tensor", _giant, "larger than the 67,108,864 elements"),
    ("a giant range", _range, "larger than the 67,108,864 elements"),
    ("a sparse tensor", _sparse, "has a field 15"),
    ("training", lambda m: m.training_info.add(), "has a field 20"),
    ("weights in passwords", _external(location="/etc/passwd"), "lies in '/etc/passwd', which is no listed"),
    ("weights above", _external(location="../x.safetensors"), "which is no listed weight file"),
    ("weights in a graph", _external(location="back.onnx"), "which is no listed weight file"),
    ("weights beyond the end", _external(offset=str(10**12)), "ends beyond the"),
    ("a negative offset", _external(offset="-8"), "has '-8' for a place"),
    ("an endless offset", _external(offset="9" * 5000), "for a place in a file"),
    ("another length", _external(length="4"), "takes 4 bytes of a file, expected"),
    ("an unknown note", _external(checksum="0"), "lies outside the graph in a way"),
    ("another name", _rename_output, "its outputs are not those of stage embed"),
    ("another shape", _widen, "its outputs are not those of stage embed"),
    ("another dtype", _retype, "data type 11"),
    ("no output", lambda m: m.graph.output.pop(), "its outputs are not those"),
    ("a further input", lambda m: m.graph.input.append(m.graph.output[0]), "its inputs are not those"),
    ("no graph", lambda m: m.ClearField("graph"), "it holds no graph"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "says"), [pytest.param(*rest, id=what) for what, *rest in GRAPHS])
def test_a_graph_that_is_none_of_ours(
    copy: Path,
    invoke: Invoke,
    change: Callable[[Model], object],
    says: str,
) -> None:
    model = onnx.load(copy / "embed.onnx", load_external_data=False)
    change(model)
    (copy / "embed.onnx").write_bytes(model.SerializeToString())
    rehash(copy, "embed.onnx")
    refused(invoke, copy, says)
    with pytest.raises(D3tomError, match=r"The graph .*embed\.onnx is refused"):
        OnnxRuntimeBackend(load_bundle(copy), device="cpu")


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"\xff" * 40, b"\x08\x0a", os.urandom(4000), b"\x3a\xff\xff\xff\xff\x7f"]
)
def test_what_is_no_graph(copy: Path, invoke: Invoke, content: bytes) -> None:
    (copy / "embed.onnx").write_bytes(content)
    rehash(copy, "embed.onnx")
    refused(invoke, copy, "embed.onnx is refused")


def test_another_stages_graph(copy: Path, invoke: Invoke) -> None:
    for folder in (copy / "cpu/fp32", copy):
        shutil.copy(folder / "back.onnx", folder / "front.onnx")
        rehash(copy, (folder / "front.onnx").relative_to(copy).as_posix())
        refused(invoke, copy, "are not those of stage front")


def test_a_graph_that_changes_after_it_was_verified_is_not_opened(copy: Path) -> None:
    bundle = load_bundle(copy)
    (copy / "embed.onnx").write_bytes((copy / "embed.onnx").read_bytes() + b"\x32\x01x")
    with pytest.raises(D3tomError, match=r"embed\.onnx does not match its sha256"):
        OnnxRuntimeBackend(bundle, device="cpu")
    (copy / "pictures.txt").write_text("")
    with pytest.raises(D3tomError, match=r"holds pictures\.txt, which"):
        bundle.file("pictures.txt")
    assert bundle.file("samples.zip") is None
    assert bundle.file("tokenizer.json") == (copy / "tokenizer.json").resolve()


def test_linked_weights_that_changed_are_told_from_damage(copy: Path, tmp_path: Path) -> None:
    """A bundle's weights are the checkpoint's own files, and somebody goes on training it."""
    edit_manifest(copy, _set(True, "model", "linked_weights"))
    source = tmp_path / SHARD
    os.link(copy / SHARD, source)
    whole = source.read_bytes()
    load_bundle(copy)
    with source.open("r+b") as file:  # same size
        file.seek(-1, os.SEEK_END)
        file.write(bytes([whole[-1] ^ 1]))
    with pytest.raises(D3tomError, match=r"sha256. The weights in it are hard links.*changed there.*--weights copy"):
        load_bundle(copy)
    os.truncate(source, len(whole) - 4)
    with pytest.raises(D3tomError, match=r"expected [\d,]+\. The weights in it are hard links"):
        load_bundle(copy)
    source.write_bytes(whole)
    load_bundle(copy)
    (tmp_path / "other").write_bytes(b"new weights")
    (tmp_path / "other").replace(source)  # the way careful writers save: the bundle keeps its file
    load_bundle(copy)
    (copy / SHARD).write_bytes(b"damaged")
    with pytest.raises(D3tomError, match=r"expected [\d,]+\. Copy it again"):
        load_bundle(copy)


def hub_cache(plain: Path, hub: Path) -> Path:
    """``plain`` as a hub's cache holds it: a snapshot of links into blobs."""
    for file in (path for path in plain.rglob("*") if path.is_file()):
        blob = hub / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link = hub / "snapshots" / "0123abc" / file.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return hub / "snapshots" / "0123abc"


@pytest.mark.parametrize("loop", LOOPS)
def test_a_bundle_in_a_hubs_cache_runs_as_the_plain_one(
    copy: Path,
    tmp_path: Path,
    loop: Loop,
    bundle: Bundle,
    invoke: Invoke,
) -> None:
    write_tuned(copy, bundle.manifest.stages, bundle.config.language, bundle.manifest.merge, "int8")
    for path in (copy / "cpu/int8").iterdir():
        rehash(copy, f"cpu/int8/{path.name}")
    snapshot = hub_cache(copy, tmp_path / "hub")
    assert invoke("inspect", snapshot).exit_code == 0
    plain, linked = load_bundle(copy), load_bundle(snapshot)
    ids = np.arange(8)[None] % 7
    for options in ({}, {"tuned": False}, {"precision": "int8"}):
        first, second = (OnnxRuntimeBackend(b, loop, device="cpu", **options) for b in (plain, linked))  # type: ignore[arg-type]
        embedded = first.embed_tokens(ids)
        np.testing.assert_array_equal(embedded, second.embed_tokens(ids))
        if loop == "cached":
            name, inputs, output = "prefill", {"prompt_embeddings": embedded}, "keys_3"
        else:
            name, inputs, output = "front", {"prompt_embeddings": embedded, "answer_embeddings": embedded}, "hidden"
        results = [each.run_stage(name, inputs, [output])[output] for each in (first, second)]
        np.testing.assert_array_equal(*results)
    np.testing.assert_array_equal(plain.image_newline(), linked.image_newline())
    open_checkpoint(snapshot)
    assert stage_file("embed") in (linked.files or {})
