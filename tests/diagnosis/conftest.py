"""Bundles gone wrong on purpose: copies of a good one with one thing changed in one graph."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from d3tom_export.bundle.folder import Bundle, load_bundle, write_manifest
from d3tom_export.checkpoint.stored import read_array, stored_tensors
from d3tom_export.cpu.place import CPU_FOLDER
from d3tom_export.pipeline import Reader
from d3tom_export.prompt.samples import Sample
from tests.conftest import picture

Edit = Callable[[onnx.ModelProto, Path], None]
Tamper = Callable[[str, Edit], Bundle]


def change_weight(name: str, change: Callable[[NDArray[Any]], None]) -> Edit:
    """One weight as the graph sees it; the bundle's weights file, and so the reference, keep it as it was."""

    def edit(model: onnx.ModelProto, folder: Path) -> None:
        (place,) = (index for index, tensor in enumerate(model.graph.initializer) if tensor.name == name)
        initializer = model.graph.initializer[place]
        values = read_array(stored_tensors(folder)[name])[: initializer.dims[0]].copy()
        change(values)
        initializer.CopyFrom(numpy_helper.from_array(values, name))

    return edit


def bump(values: NDArray[Any]) -> None:
    """One element of a weight off by as much as the others are large."""
    values[(2,) * values.ndim] += 0.5


def multiply_after(operator: str, factor: float, nth: int = 0) -> Edit:
    """The output of the ``nth`` node of a kind multiplied by a factor, which is no module's doing."""

    def edit(model: onnx.ModelProto, folder: Path) -> None:
        graph = model.graph
        place = [index for index, node in enumerate(graph.node) if node.op_type == operator][nth]
        node = graph.node[place]
        output = node.output[0]
        node.output[0] = f"{output}_right"
        graph.initializer.append(numpy_helper.from_array(np.array(factor, dtype=np.float32), "factor"))
        graph.node.insert(place + 1, helper.make_node("Mul", [f"{output}_right", "factor"], [output], name="tampered"))

    return edit


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Torch's threads wait by spinning; beside ONNX Runtime's own, on two cores, that takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tamper(bundle: Bundle, tmp_path: Path) -> Tamper:
    """Copies the bundle, edits the graph of one stage and signs the copy."""

    def change(key: str, edit: Edit) -> Bundle:
        folder = Path(shutil.copytree(bundle.folder, tmp_path / f"tampered-{len(list(tmp_path.iterdir()))}"))
        path = folder / f"{key}.onnx"
        model = onnx.load(path, load_external_data=False)
        edit(model, folder)
        onnx.save(model, path)
        shutil.rmtree(folder / CPU_FOLDER)  # the CPU's own graphs were made before the edit
        write_manifest(folder, bundle.manifest)
        return load_bundle(folder)

    return change


@pytest.fixture(scope="session")
def bundle_reader(bundle: Bundle) -> Reader:
    return Reader.of_bundle(bundle)


@pytest.fixture(scope="session")
def sample() -> Sample:
    """Five views: 76 visual tokens, of which merging keeps from a few to some twenty."""
    return Sample("What is it?", picture(70, 50))
