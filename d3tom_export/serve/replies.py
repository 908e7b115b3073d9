"""Answers as OpenAI's chat API gives them: whole, or in chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from d3tom_export.api.answers import Answer
from d3tom_export.serve.stops import StopTexts

END_OF_STREAM = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    """``body`` as an event of a stream."""
    return b"data: " + json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


@dataclass(frozen=True)
class Reply:
    """What one request's response, or all chunks of it, have in common."""

    model: str
    fingerprint: str
    stops: StopTexts
    seed: int
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def text(self, answer: Answer) -> str:
        """What the answer says, up to the request's stops."""
        return self.stops.cut(answer.text)[0]

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The response that has all of it."""
        message = {"role": "assistant", "content": self.text(answer), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._reason(answer)}
        return {**self._head("chat.completion"), "choices": [choice], **self._figures(answer)}

    def chunk(self, text: str | None = None, **figures: Any) -> dict[str, Any]:
        """A chunk with more text; None: with figures of a step alone."""
        return self._chunk({} if text is None else {"content": text}, None, **figures)

    def first_chunk(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""}, None)

    def last_chunks(self, answer: Answer) -> list[dict[str, Any]]:
        """Why the answer ended, and where it was asked for, what it took."""
        figures = self._figures(answer)
        chunks = [self._chunk({}, self._reason(answer), d3tom=figures["d3tom"])]
        if self.include_usage:
            chunks.append({**self._head("chat.completion.chunk"), "choices": [], "usage": figures["usage"]})
        return chunks

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _chunk(self, delta: dict[str, Any], reason: str | None, **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self.include_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **usage, **more}

    def _reason(self, answer: Answer) -> str:
        """ "stop" where it ended by itself or at a stop text; "length" where it fills the room that it had."""
        ended = len(answer.token_ids) < answer.generation.gen_length
        ended = ended or any(token in answer.generation.end_ids for token in answer.token_ids)
        return "stop" if ended or self.stops.cut(answer.text)[1] else "length"

    def _figures(self, answer: Answer) -> dict[str, Any]:
        prompt, said = answer.prompt_tokens, len(answer.token_ids)
        return {
            "usage": {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said},
            "d3tom": {
                "seed": self.seed,
                "gen_length": answer.generation.gen_length,
                "steps": answer.steps,
                "visual_tokens": answer.visual_tokens,
                "mean_kept": round(answer.mean_kept, 4),
                "prompt_seconds": round(answer.prompt_seconds, 4),
                "denoise_seconds": round(answer.denoise_seconds, 4),
            },
        }
