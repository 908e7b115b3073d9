"""A bundle as a model of Triton Inference Server's Python backend: ``answer/1/model.py`` of a model repository.

Beside it lie ``bundle``, ``runtime`` (the package that wrote the repository) and ``site-packages.txt``. The server
embeds a Python of its own that knows no virtual environment and reads no PYTHONPATH, and imports NumPy right after this
file: so where packages are is settled first. Every instance is a process, which nobody else uses.
"""

from __future__ import annotations

import json
import os
import site
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def _find_packages() -> None:
    """Put the runtime first and the folders of site-packages.txt second on the path, before the Python's own."""
    before = list(sys.path)
    for folder in (HERE / "site-packages.txt").read_text(encoding="utf-8").splitlines():
        if folder.strip() and not folder.startswith("#"):
            site.addsitedir(str(HERE / folder.strip()))
    sys.path[:] = [str(HERE / "runtime"), *(path for path in sys.path if path not in before), *before]


_find_packages()
try:
    import numpy as np
    import triton_python_backend_utils as pb_utils

    import d3tom_export as d3
    from d3tom_export.triton import asking, serving
except ImportError as error:
    raise ImportError(
        f"{error}. Install the repository's requirements.txt for the server's own Python, {sys.version.split()[0]}, or "
        f"name the folder where it is installed in {HERE / 'site-packages.txt'}, a folder a line."
    ) from error


class TritonPythonModel:
    """One instance: a bundle that is open, and one request at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle as the parameters of config.pbtxt say. Fails, and the model with it, with a sentence."""
        try:
            serving.check_tensors(pb_utils.Tensor)
            config = json.loads(args["model_config"])
            serving.claim_share(args, config)
            self._model = d3.open(HERE / "bundle", note=pb_utils.Logger.log_warn, **serving.opening(config))
        except (d3.D3tomError, ImportError) as error:
            raise pb_utils.TritonModelException(str(error)) from None
        about = self._model.describe()
        pb_utils.Logger.log_info(f"{about.model} on {about.backend}, {about.precision}, in process {os.getpid()}")

    def execute(self, requests: list[Any]) -> None:
        """Answer requests one after the other: a response for each step, and a last one for the answer."""
        for request in requests:
            sender, final = request.get_response_sender(), pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            try:
                last = self._answer(request, sender)
            except Exception as error:  # whatever a request does, the next one is answered
                last = pb_utils.InferenceResponse(error=self._error(error))
            try:
                sender.send(last, flags=final) if last is not None else sender.send(flags=final)
            except Exception as error:  # whoever asked is gone
                pb_utils.Logger.log_warn(f"A response could not be sent: {error}")

    def finalize(self) -> None:
        self._model.close()

    def _answer(self, request: Any, sender: Any) -> Any:
        """The last response to ``request``; None where it was cancelled."""
        asked = asking.asked(*(_elements(request, name) for name in ("IMAGE", "PROMPT", "PARAMS")))
        if sender.is_cancelled():
            return self._cancelled(0)
        with self._model.steps(asked.image, asked.question, **asked.settings) as steps:
            for step in steps:
                if sender.is_cancelled():
                    return self._cancelled(step.number)
                if asked.stream:
                    sender.send(_response(step.text, step.token_ids, step.number, False))
            answer = steps.answer
        return _response(answer.text, answer.token_ids, answer.steps, True)

    @staticmethod
    def _cancelled(step: int) -> None:
        pb_utils.Logger.log_info(f"A request was cancelled; steps that it had: {step}")

    @staticmethod
    def _error(error: Exception) -> Any:
        if isinstance(error, d3.D3tomError):
            return pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
        pb_utils.Logger.log_error(f"A request failed: {type(error).__name__}: {error}")
        return pb_utils.TritonError(serving.unexpected(error), pb_utils.TritonError.INTERNAL)


def _elements(request: Any, name: str) -> list[bytes]:
    """The elements of a tensor of BYTES; none where the request lacks it."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return [] if tensor is None else [bytes(each) for each in tensor.as_numpy().reshape(-1)]


def _response(text: str, token_ids: tuple[int, ...], step: int, final: bool) -> Any:
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor("TEXT", np.array([text.encode()], dtype=np.object_)),
            pb_utils.Tensor("TOKENS", np.array(token_ids, dtype=np.int32)),
            pb_utils.Tensor("STEP", np.array([step], dtype=np.int32)),
            pb_utils.Tensor("FINAL", np.array([final], dtype=np.bool_)),
        ]
    )
