"""Asks a server over gRPC, as tritonclient does."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import pytest

grpc = pytest.importorskip("tritonclient.grpc", reason="asking a server needs tritonclient and grpcio")

WAIT_SECONDS = 60


@dataclass(frozen=True)
class Reply:
    """One response."""

    text: str
    tokens: tuple[int, ...]
    step: int
    final: bool


class RefusedError(Exception):
    """A request was answered with an error; its words."""


class Client:
    """One stream to a server: requests are answered on it in their order."""

    def __init__(self, port: int) -> None:
        self._client = grpc.InferenceServerClient(f"127.0.0.1:{port}")
        self._replies: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client.start_stream(callback=lambda result, error: self._replies.put((result, error)))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self, *, cancel: bool = False) -> None:
        """End the stream; with ``cancel``, what was asked on it as well."""
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()

    def send(self, **tensors: Sequence[bytes]) -> None:
        """A request of these tensors of BYTES."""
        inputs = []
        for name, values in tensors.items():
            inputs.append(grpc.InferInput(name, [len(values)], "BYTES"))
            inputs[-1].set_data_from_numpy(np.array(values, dtype=np.object_))
        self._client.async_stream_infer("answer", inputs)

    def ask(self, image: bytes | None, prompt: str, **params: Any) -> None:
        tensors: dict[str, Sequence[bytes]] = {"PROMPT": [prompt.encode()]}
        if image is not None:
            tensors["IMAGE"] = [image]
        if params:
            tensors["PARAMS"] = [json.dumps(params).encode()]
        self.send(**tensors)

    def replies(self) -> Iterator[Reply]:
        """Those to the next request, up to the final one."""
        while True:
            result, error = self._replies.get(timeout=WAIT_SECONDS)
            if error is not None:
                raise RefusedError(error.message())
            reply = Reply(
                result.as_numpy("TEXT")[0].decode(),
                tuple(result.as_numpy("TOKENS").tolist()),
                int(result.as_numpy("STEP")[0]),
                bool(result.as_numpy("FINAL")[0]),
            )
            yield reply
            if reply.final:
                return
