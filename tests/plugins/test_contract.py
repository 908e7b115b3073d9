"""The plugin's contract through NVIDIA's C++ interface: both forms, out of TensorRT-RTX's registry, on a stub driver.

What each launch was given is held, bit for bit, to the launch plan; where the interpreter runs it, to the merge.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest

from d3tom_export.plugins.archive import Kernel, pack, select, unpack
from d3tom_export.plugins.compiled import compile_kernels
from d3tom_export.plugins.launch import DTYPES, MergeSizes, launches, workspace
from tests.plugins import interpreter, walker
from tests.plugins.building import SMS
from tests.plugins.harness import FORMS, STREAM, Form, Launched, Libraries
from tests.plugins.interpreter import Interpret
from tests.plugins.walker import Walk

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX, whose registry is asked, is not installed here")
pytest.importorskip("triton", reason="the kernels are compiled by Triton, which is not installed here")

SM = SMS[0]
SHAPES = [
    MergeSizes(1, 70, 7, 48, 64),
    MergeSizes(2, 41, 5, 33, 50),
    MergeSizes(1, 1120, 700, 128, 4096, (4096,)),
    MergeSizes(3, 65, 1, 16, 48, (1,)),
    MergeSizes(2, 320, 320, 144, 272, (33, 272)),
]


@cache
def _archive(dtype: str, depth: int, *widths: int) -> bytes:
    return pack(compile_kernels(dtype, (SM,), depth, *widths))


def _expected(sizes: MergeSizes, dtype: str, kernels: tuple[Kernel, ...]) -> list[Launched]:
    """What the launch plan says that a driver is given."""
    chosen = select(kernels, SM)
    planned = []
    for step in launches(sizes, dtype):
        kernel = chosen[step.variant]
        block = (kernel.threads, 1, 1)
        arguments = (*step.arguments, *[0] * kernel.scratch)
        planned.append(Launched(step.variant, step.grid, block, kernel.shared, STREAM, arguments))
    return planned


def _check(walks: list[Walk], sizes: MergeSizes, dtype: str, archive: bytes) -> None:
    expected = _expected(sizes, dtype, unpack(archive))
    # The plugin of the plan, and the one made from its fields.
    assert len(walks) == 2
    for walk in walks:
        assert walk.said == ""
        assert walk.launched == expected
        # Nothing but the launches: no allocation, no copy, no waiting, no question.
        assert walk.calls == ["cuLaunchKernel"] * len(expected)
        assert walk.workspace == workspace(sizes).size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_the_whole_way_launches_what_is_planned(
    interpret: Interpret, libraries: Libraries, form: Form, dtype: str
) -> None:
    cases = [(sizes, dtype, _archive(dtype, sizes.depth, *sizes.widths)) for sizes in SHAPES]
    for (sizes, _, archive), walks in zip(cases, interpret(walker.walks, libraries, form, cases, SM), strict=True):
        _check(walks, sizes, dtype, archive)


CASES = [
    ("float32", MergeSizes(2, 40, 9, 33, 50)),
    ("float16", MergeSizes(1, 65, 1, 16, 16, (16,))),
    ("bfloat16", MergeSizes(1, 40, 40, 64, 144, (3,))),
]


def _arrays(sizes: MergeSizes) -> list[np.ndarray]:
    """A merge's inputs in the node's order."""
    rng = np.random.default_rng(sizes.visual)
    rows = [rng.normal(size=(*sizes[:2], width)).astype(np.float32) for width in (*sizes.widths, sizes.depth)]
    kept = np.stack([np.sort(rng.permutation(sizes.visual)[: sizes.kept]) for _ in range(sizes.batch)])
    return [rows[0], rows[-1], kept, *rows[1:-1]]


@pytest.mark.parametrize("form", [*FORMS, "library's own"])
@pytest.mark.parametrize(("dtype", "sizes"), CASES, ids=str)
def test_what_is_launched_is_the_merge(
    interpret: Interpret, libraries: Libraries, library_kernels: bytes, dtype: str, sizes: MergeSizes, form: str
) -> None:
    own = form == "library's own"
    archive = _archive(dtype, sizes.depth, *sizes.widths)
    known = library_kernels if own else archive
    hidden, normed, kept, *further = arrays = _arrays(sizes)
    walks = interpret(
        walker.walk,
        libraries,
        "library" if own else form,
        known,
        None if own else archive,
        SM,
        sizes,
        dtype,
        arrays,
    )
    _check(walks, sizes, dtype, known)
    merge = interpret(interpreter.merge, hidden, normed, kept, dtype, False, *further)
    for found, expected in zip(walks[0].merged, (merge.merged, *merge.further), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("form", FORMS)
def test_only_tactic_zero_is_taken(interpret: Interpret, libraries: Libraries, form: Form) -> None:
    said, (none, other) = interpret(walker.tactics, libraries, form, _archive("float16", 48, 64))
    assert none == 0
    assert other == -1
    assert "tactic 3" in said
    assert "offers none" in said


@pytest.mark.parametrize("form", FORMS)
def test_a_plan_of_older_fields_is_read_and_written_anew(
    interpret: Interpret, libraries: Libraries, form: Form
) -> None:
    archive = _archive("float16", 48, 64)
    outputs, fields, again = interpret(walker.serialized, libraries, form, archive)
    assert outputs == 1
    assert fields == again == {"kernels": archive, "rows": (1).to_bytes(4, "little")}


@pytest.mark.parametrize("form", FORMS)
def test_equal_kernels_are_loaded_once_and_unloaded_with_their_last_plugin(
    interpret: Interpret, libraries: Libraries, form: Form
) -> None:
    one, two = _archive("float16", 48, 64), _archive("float32", 48, 64)
    counts = interpret(walker.loading, libraries, form, one, two, SM)
    kernels = {archive: len(unpack(archive)) for archive in (one, two)}
    assert counts["one node"] == kernels[one]
    assert counts["five nodes of two contexts each"] == kernels[one]
    assert counts["other kernels"] == kernels[one] + kernels[two]
    assert counts["without contexts"] == kernels[one] + kernels[two]
    assert counts["one node left"] == kernels[one]
    assert counts["none left"] == 0
    assert counts["bad unloads"] == 0
    assert counts["loads"] == counts["unloads"] == kernels[one] + kernels[two]


@pytest.mark.parametrize("form", FORMS)
def test_each_cuda_context_has_its_own(interpret: Interpret, libraries: Libraries, form: Form) -> None:
    archive = _archive("float16", 48, 64)
    counts = interpret(walker.contexts, libraries, form, archive, SM)
    kernels = len(unpack(archive))
    assert counts["two contexts"] == 2 * kernels
    # Unloading goes to the context that holds them, whichever is current.
    assert counts["closed in the other"] == kernels
    # A context that is gone took its modules along; one in its place, with its handle, is another.
    assert counts["context destroyed"] == 0
    assert counts["loads in its place"] == kernels
    assert counts["after its plugin"] == kernels
    assert counts["none left"] == 0
    assert counts["bad unloads"] == 0


@pytest.mark.parametrize("form", FORMS)
def test_what_it_cannot_run_it_names(interpret: Interpret, libraries: Libraries, form: Form) -> None:
    archive = _archive("float16", 16, 16)

    def said(data: bytes, sm: int, sizes: MergeSizes) -> str:
        walks = interpret(walker.walk, libraries, form, archive, data, sm, sizes, "float16")
        text = walks[0].said
        assert isinstance(text, str)
        return text

    sizes = MergeSizes(1, 4, 2, 16, 16)
    assert "compute capability 120" in said(archive, 120, sizes)
    assert "holds no kernel `sum-ragged`" in said(archive, 89, sizes._replace(width=3))
    assert "another version" in said(b"X" + archive[1:], 89, sizes)
    assert any(word in said(archive[:-40], 89, sizes) for word in ("cut short", "it ends within"))
    assert "1 to 8 row inputs by one search" in said(archive, 89, sizes._replace(further=(16,) * 8))
    assert re.search("4 of 3|3 tokens of width 16 into 4", said(archive, 89, MergeSizes(1, 3, 4, 16, 16)))


@pytest.mark.parametrize("form", FORMS)
def test_blocks_made_once_are_given_each_calls_addresses(
    interpret: Interpret, libraries: Libraries, form: Form
) -> None:
    """Two sizes by turns, and buffers that move: two contexts' plugins do not share what they write."""
    one, two = MergeSizes(1, 70, 7, 48, 64, (64,)), MergeSizes(2, 40, 40, 48, 64, (64,))
    archive = _archive("float16", 48, 64, 64)
    for index, launched in enumerate(
        interpret(walker.by_turns, libraries, form, archive, SM, [one, two, one, one, two])
    ):
        assert launched == _expected((one, two, one, one, two)[index], "float16", unpack(archive)), index


@pytest.mark.parametrize("form", FORMS)
def test_the_hosts_cost_is_measured(interpret: Interpret, libraries: Libraries, form: Form) -> None:
    sizes = SHAPES[2]
    archive = _archive("float16", sizes.depth, *sizes.widths)
    assert 0 < interpret(walker.host_cost, libraries, form, archive, sizes, "float16") < 10_000
