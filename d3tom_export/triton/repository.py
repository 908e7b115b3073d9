"""A bundle becomes a model repository: a folder that a server is started on, whole or not at all.

    REPO/README.md, requirements.txt     how it is started
    REPO/d3tom-export.json               which files it has, and what it was made of
    REPO/answer/config.pbtxt
    REPO/answer/1/model.py               what the server runs
    REPO/answer/1/site-packages.txt      where else it looks for packages
    REPO/answer/1/runtime/d3tom_export   this package
    REPO/answer/1/bundle                 the bundle's files
    REPO/STAGE/config.pbtxt, 1/model.*   with ``stages``, the graphs or plans of one loop

The model's folder has all that the model needs: a server that keeps repositories in an object store fetches it alone.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3tom_export.backends.choice import ENGINE_BACKENDS, check_choice
from d3tom_export.bundle.folder import Bundle, Verify, load_bundle
from d3tom_export.bundle.links import files_once
from d3tom_export.bundle.manifest import MANIFEST_FILE
from d3tom_export.bundle.output import Kind, check_output_folder, new_folder, sweep
from d3tom_export.config import Loop
from d3tom_export.engines.record import built_engines
from d3tom_export.errors import CallError, D3tomError, listing, printable
from d3tom_export.progress import Note, Progress, no_note, no_progress
from d3tom_export.triton.configs import ANSWER, answer_config, runs_on_gpu
from d3tom_export.triton.readme import readme
from d3tom_export.triton.runtime import requirements, runtime_files
from d3tom_export.triton.stage_models import StageModel, stage_models
from d3tom_export.trust.files import copy_file, find_inside, relative_name, write_file
from d3tom_export.version import __version__

RECORD_FILE = "d3tom-export.json"

REPOSITORY = Kind(
    "model repository",
    RECORD_FILE,
    re.compile(r"\.?[^/]+\.(onnx|safetensors|json|zip|plan|cache|py|pbtxt|md|txt)"),
    re.compile(r"(.+/)?__pycache__/[^/]+\.pyc"),  # what serving it leaves there
)

MOST_INSTANCES = 64

_VERSION = re.compile(r"[0-9]+(\.[0-9A-Za-z]+)*(\+[0-9A-Za-z.]+)?", re.ASCII)

_SITE_PACKAGES = """\
# Folders in which this model looks for packages before the server's Python does, a folder a line: whole paths, or from
# here.
"""


@dataclass(frozen=True)
class RepositoryRequest:
    """What is written."""

    bundle: Path
    output: Path
    opening: Mapping[str, Any]
    """Arguments of :func:`d3tom_export.open`; those that are None are left to it."""
    instances: int = 1
    """Of each GPU, or in all where it runs on CPUs."""
    site_packages: Sequence[str] = ()
    """Folders on the server's machine with the packages of requirements.txt."""
    link: bool = False
    """Whether the bundle's files are hard links, not copies."""
    stages: bool = False
    """Whether the loop's stages are models of their own as well."""
    force: bool = False


@dataclass(frozen=True)
class Repository:
    """What was written."""

    folder: Path
    models: tuple[str, ...]
    gpu: bool
    requirements: tuple[str, ...]
    bytes: int
    """On the disk: a file counts once, in however many of its folders it has a name."""
    linked_bytes: int
    """Of these, those of files that other folders have, too."""
    seconds: float


def write_repository(request: RepositoryRequest, progress: Progress = no_progress, note: Note = no_note) -> Repository:
    """Write the repository that ``request`` asks for.

    Raises :class:`~d3tom_export.errors.D3tomError` where there is no bundle, where it has nothing for the backend, or
    where ``output`` is in the way; nothing is left behind then.
    """
    started = time.perf_counter()
    if not 1 <= request.instances <= MOST_INSTANCES:
        raise CallError(f"{request.instances} instances cannot be: 1 to {MOST_INSTANCES}.")
    if not all(
        folder.strip().isprintable() and folder.strip()[:1] not in ("", "#") for folder in request.site_packages
    ):
        raise CallError(f"--site-packages {listing(request.site_packages)} cannot be: a folder is a line of a file.")
    opening = _opening(request.opening)
    for sentence in sweep(request.output, REPOSITORY):
        note(sentence)
    check_output_folder(request.output, request.force, REPOSITORY)
    backend, device = opening["backend"], opening["device"]
    verify: Verify = opening.pop("verify", None) or "auto"
    bundle = load_bundle(request.bundle, verify, reads_weights=True)
    if bundle.manifest.weights_note:
        note(bundle.manifest.weights_note)
    loop = bundle.choose_loop(opening.get("kv_cache"))
    _check_backend(bundle, loop, backend, opening.get("precision"))
    built = _built_version(bundle, loop, backend, opening.get("precision"))
    needed = requirements(backend, device, built)
    gpu = runs_on_gpu(backend, device)
    stages = stage_models(bundle, loop, backend, opening.get("precision"), gpu) if request.stages else []
    models = [ANSWER, *(stage.name for stage in stages)]
    with new_folder(request.output, request.force, REPOSITORY) as folder:
        version = folder / ANSWER / "1"
        _place_bundle(bundle, version / "bundle", request.link, progress)
        for name, source in runtime_files():
            _place(source, version / "runtime" / name)
        _place(Path(__file__).with_name("model.py"), version / "model.py")
        _write(version / "site-packages.txt", _SITE_PACKAGES + "".join(f"{each}\n" for each in request.site_packages))
        _write(folder / ANSWER / "config.pbtxt", answer_config(opening, request.instances))
        _place_stages(stages, folder, note)
        _write(folder / "requirements.txt", "".join(f"{each}\n" for each in needed))
        _write(folder / "README.md", readme(bundle, opening, request.instances, stages, built))
        _record(folder, bundle, models)
        files = files_once(folder)
    progress("repository written", 1, 1)
    size, linked = sum(file.bytes for file in files), sum(file.bytes for file in files if file.elsewhere)
    seconds = time.perf_counter() - started
    return Repository(request.output, tuple(models), gpu, tuple(needed), size, linked, seconds)


def _opening(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, with what "auto" stands for: ONNX Runtime, on the CPU."""
    opening = {"backend": "auto", "device": "auto"} | {k: v for k, v in given.items() if v is not None}
    cache = opening.get("provider_cache")
    check_choice(
        opening["backend"],
        opening["device"],
        opening.get("precision"),
        opening.get("cuda_graphs"),
        None if cache is None else Path(cache),
        opening.get("specialization"),
    )
    if cache is not None and not Path(cache).is_absolute():
        raise CallError(
            f"--provider-cache {cache} counts from the server's folder, wherever that is started: give its whole path "
            "on the server's machine."
        )
    if opening["backend"] == "pytorch":
        raise CallError("--backend pytorch is the oracle, which no server runs; take onnxruntime.")
    if opening["backend"] == "auto":
        opening["backend"] = "onnxruntime"
    if opening["device"] == "auto":
        opening["device"] = "auto" if opening["backend"] in ENGINE_BACKENDS else "cpu"
    return opening


def _check_backend(bundle: Bundle, loop: Loop, backend: str, precision: str | None) -> None:
    """Refuse a backend that the bundle has nothing for, before there is a server to find out."""
    keys = bundle.stage_keys(loop).values()
    if backend in ENGINE_BACKENDS:
        built = [target for target in built_engines(bundle.folder, bundle.files) if target.toolkit == backend]
        if not [target for target in built if precision in (None, target.precision)]:
            found = f"has those of {listing(built)}" if built else "has none"
            in_precision = f" in {precision}" if precision else ""
            raise D3tomError(
                f"{bundle.folder} has no engines of {backend}{in_precision}: it {found}. Build them with `d3tom-export "
                f"build --bundle {bundle.folder} --engine {backend}`, or take another --backend."
            )
    elif precision == "int8" and not any(bundle.has_tuned(key, "int8") for key in keys):
        raise _without(bundle, "int8")
    elif precision in ("fp16", "bf16") and not all(bundle.has_half(key, precision) for key in keys):
        raise _without(bundle, precision)


def _built_version(bundle: Bundle, loop: Loop, backend: str, precision: str | None) -> str | None:
    """The version of TensorRT that built the engines ``answer`` may take; None where it takes none."""
    if backend not in ENGINE_BACKENDS:
        return None
    targets = built_engines(bundle.folder, bundle.files).items()
    found = {
        str(record.content["version"]): target
        for target, records in targets
        if target.toolkit == backend and precision in (None, target.precision)
        for record in records.values()
        if record.loop in (None, loop)
    }
    if len(found) > 1:
        several = listing(f"{version} ({target})" for version, target in found.items())
        raise D3tomError(
            f"{bundle.folder} has engines that several versions of {backend} built: {several}. A server has one of "
            "them, and a plan only runs on the version that built it. Build them anew with one, or choose by "
            "--precision."
        )
    version = next(iter(found), None)
    # A record may be a stranger's, and a requirement is a line that pip obeys.
    if version is not None and not _VERSION.fullmatch(version):
        raise D3tomError(f"{bundle.folder} has engines of {backend} {printable(version, 60)!r}, which is no version.")
    return version


def _without(bundle: Bundle, precision: str) -> D3tomError:
    return D3tomError(
        f"{bundle.folder} has no graphs in {precision}. Add them with `d3tom-export build --bundle {bundle.folder} "
        f"--precision {precision}`, or leave --precision out."
    )


def _place_bundle(bundle: Bundle, target: Path, link: bool, progress: Progress) -> None:
    """Every file that the manifest lists, and the manifest."""
    names = [*(bundle.files or {}), MANIFEST_FILE]
    for done, name in enumerate(names):
        progress(f"{'linking' if link else 'copying'} the bundle", done, len(names))
        source = find_inside(bundle.folder, name)
        if not link:
            _place(source, target / name)
            continue
        try:
            _link(source, target / name)
        except OSError as error:
            raise D3tomError(
                f"{source} cannot be linked into {target} ({error.strerror}): hard links stay on one file system, of "
                "files that you own or may write. Leave --link out."
            ) from None


def _place_stages(stages: Sequence[StageModel], folder: Path, note: Note) -> None:
    """A folder for each, its weights beside its graph: runtimes take them from nowhere else.

    Weights and plans are further names of the bundle's files, or copies on a file system that has no hard links.
    """
    placed = folder / ANSWER / "1" / "bundle"
    refused = ""
    for stage in stages:
        version = folder / stage.name / "1"
        large = {file: file for file in stage.weights}
        if stage.file.endswith(".plan"):
            large[stage.source] = stage.file
        else:
            _place(placed / stage.source, version / stage.file)
        for source, name in large.items():
            try:
                _link(placed / source, version / name)
            except OSError as error:
                refused = error.strerror or str(error)
                _place(placed / source, version / name)
        _write(folder / stage.name / "config.pbtxt", stage.config)
    if refused:
        note(f"Each stage has a copy of its weights: they cannot be linked there ({refused}).")


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    copy_file(source, target)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.link(source, target, follow_symlinks=False)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.encode())


def _record(folder: Path, bundle: Bundle, models: Sequence[str]) -> None:
    """Write what the repository holds."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {relative_name(path, folder): path.stat().st_size for path in paths}
    record = {
        "created_by": {"d3tom_export": __version__},
        "model": bundle.manifest.model_name,
        "models": list(models),
        "files": {name: {"bytes": size} for name, size in sizes.items()},
    }
    _write(folder / RECORD_FILE, json.dumps(record, indent=2) + "\n")
