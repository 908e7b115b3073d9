"""The commands that build an engine again without this tool, with NVIDIA's own."""

from __future__ import annotations

import shlex
from pathlib import Path

from d3tom_export.engines.record import EngineRecord, graph_file

_PLUGIN_LIBRARY = "libd3tom_merge_plugin.so"
"""The merge plugin's C++ library (plugins/cpp): these programs know nothing of the Python one."""


def commands(bundle: Path, record: EngineRecord) -> list[str]:
    """Shell commands that repeat the build of ``record``: Polygraphy's, then trtexec's (``tensorrt_rtx`` for RTX)."""
    target = record.target
    rtx = target.toolkit == "tensorrt-rtx"
    graph = str(bundle / graph_file(record.key, target, record.content["merge_op"]))
    plugin = [_PLUGIN_LIBRARY] if record.needs_plugin else []
    capabilities = [f"{sm // 10}.{sm % 10}" for sm in target.sms]

    polygraphy = ["polygraphy", "convert", graph, "--convert-to", "trt"]
    for profile in record.profiles:
        for which, index in (("min", 0), ("opt", 1), ("max", 2)):
            polygraphy += [f"--trt-{which}-shapes"]
            polygraphy += [f"{name}:[{','.join(map(str, sizes[index]))}]" for name, sizes in profile.items()]
    polygraphy += ["--compute-capabilities", *capabilities] if rtx else ["--strongly-typed"]
    polygraphy += ["--plugins", *plugin] if plugin else []
    polygraphy += ["--output", f"{record.key}.plan"]

    trtexec = ["tensorrt_rtx" if rtx else "trtexec", f"--onnx={graph}"]
    for number, profile in enumerate(record.profiles):
        trtexec += [f"--profile={number}"] if len(record.profiles) > 1 else []
        for which, index in (("min", 0), ("opt", 1), ("max", 2)):
            shapes = ",".join(f"{name}:{'x'.join(map(str, sizes[index]))}" for name, sizes in profile.items())
            trtexec.append(f"--{which}Shapes={shapes}")
    trtexec += [f"--computeCapabilities={','.join(map(str, target.sms))}"] if rtx else ["--stronglyTyped", "--noTF32"]
    trtexec += [f"--dynamicPlugins={library}" for library in plugin]
    trtexec += ["--skipInference", f"--saveEngine={record.key}.plan"]

    environment = "POLYGRAPHY_USE_TENSORRT_RTX=1 " if rtx else ""
    return [environment + shlex.join(polygraphy), shlex.join(trtexec)]
