"""What TensorRT says while it builds and runs."""

from __future__ import annotations

from collections import deque
from functools import cache
from typing import Any

from d3tom_export.errors import listing


class TensorRTLog:
    """What TensorRT says: errors are kept, to be told with the failure they explain; the rest is dropped.

    Take :func:`log_of`: TensorRT goes on using the first logger that a process gave it.
    """

    def __init__(self, trt: Any) -> None:
        self._errors: deque[str] = deque(maxlen=3)
        errors, worst = self._errors, (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                if severity in worst:
                    errors.append(text.strip())

        self.logger = Logger()

    def said(self) -> str:
        """The last errors, which are forgotten."""
        text = listing(self._errors) or "it gave no reason"
        self.forget()
        return text

    def forget(self) -> None:
        """Drop the errors of earlier work."""
        self._errors.clear()


@cache
def log_of(trt: Any) -> TensorRTLog:
    """The one log of a TensorRT module, kept for as long as the process lives."""
    return TensorRTLog(trt)
