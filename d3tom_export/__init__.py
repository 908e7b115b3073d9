"""Export, optimise and run diffusion multimodal LLMs patched with D3ToM token merging (arXiv 2511.12280).

    import d3tom_export as d3

    d3.build(layer=2, ratio=0.9, output="bundle")
    with d3.open("bundle") as model:
        print(model.answer("digits.png", "Which digits do you see?").text)

Names are imported when they are first asked for: neither torch, onnx, a runtime nor NumPy is needed to import this.
docs/api.md is their page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3tom_export.front import lazily
from d3tom_export.version import __version__

if TYPE_CHECKING:
    from d3tom_export.api.answers import Answer, Description, Request, Step
    from d3tom_export.api.building import build
    from d3tom_export.api.model import Model, Steps
    from d3tom_export.api.opening import open
    from d3tom_export.api.pictures import Pictures
    from d3tom_export.api.settings import Settings
    from d3tom_export.errors import D3tomError
    from d3tom_export.export.build import BuildResult

__all__ = [
    "Answer",
    "BuildResult",
    "D3tomError",
    "Description",
    "Model",
    "Pictures",
    "Request",
    "Settings",
    "Step",
    "Steps",
    "__version__",
    "build",
    "open",
]

__getattr__ = lazily(
    __name__,
    {
        **dict.fromkeys(("Answer", "Description", "Request", "Step"), "api.answers"),
        **dict.fromkeys(("Model", "Steps"), "api.model"),
        "BuildResult": "export.build",
        "D3tomError": "errors",
        "Pictures": "api.pictures",
        "Settings": "api.settings",
        "build": "api.building",
        "open": "api.opening",
    },
)


def __dir__() -> list[str]:
    return __all__
