"""From a question and pictures to an answer, on any backend; NumPy only.

P prompt tokens, V visual tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from d3tom_export.config import GenerationConfig, ModelConfig
from d3tom_export.denoise import Floats, Ints, Session
from d3tom_export.errors import D3tomError
from d3tom_export.pictures import pack_features, prepare_picture
from d3tom_export.prompt import (
    IMAGE_PLACEHOLDER,
    IMAGE_TOKEN_INDEX,
    answer_text,
    chat,
    load_tokenizer,
    tokenize,
)


class Backend(Protocol):
    """What a runtime offers: the two embedding stages, and sessions for the denoising loop."""

    name: str

    def embed_tokens(self, token_ids: Ints) -> Floats:
        """(B, S) int64 -> (B, S, D) float32."""

    def encode_views(self, pixel_values: Floats) -> Floats:
        """(views, 3, S, S) float32 -> (views, T, D) float32."""

    @property
    def image_newline(self) -> NDArray[np.float32]:
        """(D,) the vector that closes every row of a picture's tokens."""

    def start(self, prompt_embeddings: Floats, visual_positions: Ints) -> Session:
        """Begin an answer: (B, P, D) float32 and (V,) ascending int64."""


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the loop."""

    embeddings: Floats
    """(1, P, D)."""
    visual_positions: Ints
    """(V,), ascending."""


@dataclass(frozen=True)
class Reader:
    """Turns questions and pictures into prompts, and ids into text, for one model."""

    config: ModelConfig
    tokenizer: Tokenizer
    drop_token_after_image: bool = True

    @classmethod
    def from_folder(cls, folder: Path, config: ModelConfig, *, drop_token_after_image: bool = True) -> Reader:
        """Read the tokenizer of a checkpoint or bundle folder."""
        return cls(config, load_tokenizer(folder / "tokenizer.json"), drop_token_after_image)

    def token_ids(self, question: str, pictures: int) -> list[int]:
        """Ids of the whole conversation, :data:`IMAGE_TOKEN_INDEX` for each picture.

        A question that places no ``<image>`` itself shows its pictures first, each on a line of its own.
        """
        placed = question.count(IMAGE_PLACEHOLDER)
        if not placed:
            question = f"{IMAGE_PLACEHOLDER}\n" * pictures + question
        elif placed != pictures:
            raise D3tomError(
                f"The prompt places {placed} pictures with {IMAGE_PLACEHOLDER} and {pictures} were given. "
                "Give one --image for each, in order."
            )
        return tokenize(self.tokenizer, chat(question), drop_token_after_image=self.drop_token_after_image)

    def read(
        self, backend: Backend, question: str, pictures: Sequence[Image.Image], generation: GenerationConfig
    ) -> Prompt:
        """Embed a question and its pictures on ``backend``."""
        if pictures and self.config.vision is None:
            raise D3tomError("This model is language-only: it has no vision tower to read --image with. Ask in text.")
        ids = self.token_ids(question, len(pictures))
        visual = []
        for picture in pictures:
            assert self.config.vision is not None
            views = prepare_picture(picture, self.config.vision)
            visual.append(pack_features(backend.encode_views(views.pixel_values), backend.image_newline, views.packing))
        length = len(ids) - len(visual) + sum(len(tokens) for tokens in visual)
        limit = self.config.language.max_sequence_length
        if length + generation.gen_length > limit:
            raise D3tomError(
                f"The prompt has {length} tokens ({sum(len(tokens) for tokens in visual)} of them visual); with "
                f"{generation.gen_length} answer tokens that exceeds this model's limit of {limit}. "
                "Shorten the prompt, show fewer pictures or ask for a shorter answer (--gen-length)."
            )
        text = backend.embed_tokens(np.array([[0 if token == IMAGE_TOKEN_INDEX else token for token in ids]]))[0]
        pieces, positions, remaining = [], [], iter(visual)
        start = 0
        for index, token in enumerate(ids):
            if token == IMAGE_TOKEN_INDEX:
                pieces.append(next(remaining))
                positions.append(np.arange(start, start + len(pieces[-1])))
            else:
                pieces.append(text[index : index + 1])
            start += len(pieces[-1])
        return Prompt(
            np.concatenate(pieces)[None].astype(np.float32),
            np.concatenate(positions).astype(np.int64) if positions else np.zeros(0, dtype=np.int64),
        )

    def text(self, ids: Ints) -> str:
        """The answer's text from its ids (G,)."""
        eos = self.config.language.eos_token_id
        return answer_text(self.tokenizer, ids.tolist(), [] if eos is None else [eos])
