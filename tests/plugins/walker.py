"""The ways of a plugin from its creation to its end, as TensorRT goes them, in the interpreter's worker."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from d3tom_export.plugins.launch import MergeSizes
from d3tom_export.plugins.library import LIBRARY_VARIABLE, register_merge_runtime
from d3tom_export.plugins.merge_plugin import _present
from tests.plugins.harness import (
    LAUNCH,
    Form,
    Launched,
    Libraries,
    Plugin,
    Session,
    name_all,
    places,
    session,
    standard_error,
)


class Walk(NamedTuple):
    """One plugin's way from creation to enqueue, and that of one made from its fields."""

    said: str
    """What has been written to standard error, where both forms put their errors."""
    launched: list[Launched]
    calls: list[str]
    """Driver functions called by enqueue."""
    workspace: int
    merged: list[np.ndarray]
    """As float32, where the launches were run: by the first plugin."""


def walk(
    libraries: Libraries,
    form: Form,
    known: bytes,
    archive: bytes | None,
    sm: int,
    sizes: MergeSizes,
    dtype: str,
    arrays: list[np.ndarray] | None = None,
) -> list[Walk]:
    """A plugin's whole way, and that of one made from its fields; ``archive`` None: the library's own kernels.

    ``arrays``, the inputs as float32 and int64, are merged in the interpreter by the first; other launches are only
    noted. The way ends early where a call fails, with what was said.
    """
    made = session(libraries, form)
    made.drive(known, sm)
    rows = len(sizes.widths)
    found: list[Walk] = []
    with standard_error() as said:
        plugin = made.create(archive, rows if rows > 1 else 0)
        for inputs in (arrays, None):
            if plugin is None:
                return [*found, Walk(said(), [], [], 0, [])]
            if archive is None:
                assert plugin.call("configure", *plugin.described(sizes, dtype)) == 0
            twin = plugin.clone()
            assert twin.call("set_tactic", 0) == 0, said()
            attached = twin.attach()
            if attached is not None:
                assert attached.call("shape", *attached.described(sizes, dtype)) == 0, said()
                found.append(_enqueued(made, attached, sizes, dtype, inputs, said))
                attached.delete()
            else:
                found.append(Walk(said(), [], [], 0, []))
            following = made.again(twin)
            twin.delete()
            plugin.delete()
            plugin = following
        if plugin is not None:
            plugin.delete()
    if made.failures:
        raise made.failures[0]
    assert made.stub.stub_live() == 0, "modules are left"
    return found


def _enqueued(
    made: Session,
    attached: Plugin,
    sizes: MergeSizes,
    dtype: str,
    arrays: list[np.ndarray] | None,
    said: Callable[[], str],
) -> Walk:
    named, held = places(sizes, dtype, arrays)
    made.regions, made.launched = held, []
    name_all(made, sizes, named)
    workspace = attached.call("workspace", *attached.described(sizes, dtype))
    made.calls()
    attached.enqueue(sizes, dtype, named)
    rows = getattr(torch, dtype)
    outputs = held[len(sizes.widths) + 2 : -1]
    merged = [
        torch.from_numpy(array).view(rows).float().numpy().reshape(sizes.batch, sizes.kept, width)
        for array, width in zip(outputs, sizes.widths, strict=False)
    ]
    return Walk(said(), made.launched, made.calls(), workspace, merged)


def walks(libraries: Libraries, form: Form, archives: list[tuple[MergeSizes, str, bytes]], sm: int) -> list[list[Walk]]:
    """:func:`walk` for each of ``archives``, without running anything."""
    return [walk(libraries, form, archive, archive, sm, sizes, dtype) for sizes, dtype, archive in archives]


def tactics(libraries: Libraries, form: Form, archive: bytes) -> tuple[str, tuple[int, int]]:
    """What a plugin says to the tactics 0 and 3, and the codes that it answers."""
    made = session(libraries, form)
    made.drive(archive, 89)
    with standard_error() as said:
        plugin = made.create(archive)
        assert plugin is not None
        codes = plugin.call("set_tactic", 0), plugin.call("set_tactic", 3)
        plugin.delete()
        return said(), codes


def serialized(libraries: Libraries, form: Form, archive: bytes) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The outputs of a plugin made of a plan without the field of rows, its fields, and those of one made from them."""
    made = session(libraries, form)
    made.drive(archive, 89)
    plugin = made.create(archive)
    assert plugin is not None
    again = made.again(plugin)
    assert again is not None
    outputs = plugin.call("outputs")
    fields = [{name: each.field(name) for name in ("kernels", "rows")} for each in (plugin, again)]
    for each in (plugin, again):
        each.delete()
    return outputs, fields[0], fields[1]


def loading(libraries: Libraries, form: Form, one: bytes, two: bytes, sm: int) -> dict[str, int]:
    """How many modules are loaded while plugins of two archives come and go."""
    made = session(libraries, form)
    counts: dict[str, int] = {}

    def attached(archive: bytes, times: int) -> list[Plugin]:
        made.drive(archive, sm)
        plugin = made.create(archive)
        assert plugin is not None
        contexts = [plugin.attach() for _ in range(times)]
        return [plugin, *(context for context in contexts if context is not None)]

    nodes = [attached(one, 1)]
    counts["one node"] = made.stub.stub_live()
    nodes += [attached(one, 2) for _ in range(5)]
    counts["five nodes of two contexts each"] = made.stub.stub_live()
    other = attached(two, 1)
    counts["other kernels"] = made.stub.stub_live()
    for node in (*nodes, other):
        for context in node[1:]:
            context.delete()
    counts["without contexts"] = made.stub.stub_live()
    for plugin in (other[0], *(node[0] for node in nodes[1:])):
        plugin.delete()
    counts["one node left"] = made.stub.stub_live()
    nodes[0][0].delete()
    counts["none left"] = made.stub.stub_live()
    return counts | _loads(made.calls())


def _loads(calls: list[str]) -> dict[str, int]:
    return {
        "loads": calls.count("cuModuleLoadData"),
        "unloads": calls.count("cuModuleUnload"),
        "bad unloads": calls.count("none"),
    }


def contexts(libraries: Libraries, form: Form, archive: bytes, sm: int) -> dict[str, int]:
    """How many modules are loaded while CUDA contexts come and go."""
    made = session(libraries, form)
    made.drive(archive, sm)
    counts: dict[str, int] = {}

    def attached(context: int) -> tuple[Plugin, Plugin]:
        made.stub.stub_context(context)
        plugin = made.create(archive)
        assert plugin is not None
        twin = plugin.attach()
        assert twin is not None
        return plugin, twin

    def close(plugins: tuple[Plugin, Plugin]) -> None:
        for plugin in reversed(plugins):
            plugin.delete()

    first, second = attached(1), attached(2)
    counts["two contexts"] = made.stub.stub_live()
    close(first)
    counts["closed in the other"] = made.stub.stub_live()
    made.stub.stub_destroy(2)
    counts["context destroyed"] = made.stub.stub_live()
    made.calls()
    following = attached(10)
    counts["loads in its place"] = _loads(made.calls())["loads"]
    close(second)
    counts["after its plugin"] = made.stub.stub_live()
    close(following)
    counts["none left"] = made.stub.stub_live()
    counts["bad unloads"] = _loads(made.calls())["bad unloads"]
    made.stub.stub_context(1)
    return counts


def runtimes(libraries: Libraries, archive: bytes, named: list[str]) -> list[tuple[str, bool, int]]:
    """What :func:`register_merge_runtime` registers as each of ``named`` is the library's name, one after another.

    Of each: the path it answers, whether the registry's creator is written in Python, and the launches of one merge by
    it. A plugin made by the first goes on to the end.
    """
    made = session(libraries, None)
    made.drive(archive, 89)
    found, kept = [], []
    sizes = MergeSizes(1, 70, 7, 48, 64, (64,))
    for name in named:
        os.environ[LIBRARY_VARIABLE] = name
        path = register_merge_runtime(made.trt)
        made.find()
        plugin = made.create(archive, 2)
        assert plugin is not None
        twin = plugin.attach()
        assert twin is not None
        kept.append((plugin, twin))
        found.append((str(path or ""), bool(made.harness.harness_is_python(made.creator)), 0))
    named_buffers, _ = places(sizes, "float16", None)
    name_all(made, sizes, named_buffers)
    for index, (plugin, twin) in enumerate(kept):
        made.launched = []
        assert twin.call("shape", *twin.described(sizes, "float16")) == 0
        assert twin.enqueue(sizes, "float16", named_buffers) >= 0
        found[index] = (*found[index][:2], len(made.launched))
        twin.delete()
        plugin.delete()
    del os.environ[LIBRARY_VARIABLE]
    # Out again, for the forms that the other tests put there.
    _present.pop(made.trt.__name__)[1]()
    return found


def by_turns(
    libraries: Libraries, form: Form, archive: bytes, sm: int, turns: list[MergeSizes]
) -> list[list[Launched]]:
    """What is launched for each of ``turns`` by two plugins of one node in turn, at other addresses every time."""
    made = session(libraries, form)
    made.drive(archive, sm)
    plugin = made.create(archive, len(turns[0].widths))
    assert plugin is not None
    twins = [plugin.attach(), plugin.attach()]
    found = []
    for turn, sizes in enumerate(turns):
        twin = twins[turn % 2]
        assert twin is not None
        named = {name: address + (turn << 20) for name, address in places(sizes, "float16", None)[0].items()}
        name_all(made, sizes, named)
        made.launched = []
        assert twin.call("shape", *twin.described(sizes, "float16")) == 0
        assert twin.enqueue(sizes, "float16", named) >= 0
        found.append(made.launched)
    for each in (*twins, plugin):
        assert each is not None
        each.delete()
    if made.failures:
        raise made.failures[0]
    return found


def host_cost(libraries: Libraries, form: Form, archive: bytes, sizes: MergeSizes, dtype: str) -> float:
    """Microseconds of host time of one enqueue: the least mean of sixty times a hundred, the driver doing nothing."""
    made = session(libraries, form)
    made.drive(archive, 89)
    made.stub.stub_install(89, *made.alive[:3], LAUNCH())
    plugin = made.create(archive, len(sizes.widths))
    assert plugin is not None
    twin = plugin.attach()
    assert twin is not None
    assert twin.call("shape", *twin.described(sizes, dtype)) == 0
    named, _ = places(sizes, dtype, None)
    made.stub.stub_note(0)
    cost = min(twin.enqueue(sizes, dtype, named, 100) for _ in range(60))
    made.stub.stub_note(1)
    twin.delete()
    plugin.delete()
    return cost
