"""From a question and pictures to a prompt, and from ids to text; NumPy only.

P prompt tokens, V visual tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from d3tom_export.bundle.folder import Bundle
from d3tom_export.checkpoint.folder import TOKENIZER_FILE
from d3tom_export.config import GenerationConfig, ModelConfig, VisionConfig
from d3tom_export.errors import D3tomError
from d3tom_export.loop.backend import Backend, Prompt
from d3tom_export.loop.denoise import Floats, Ints
from d3tom_export.progress import Note, no_note
from d3tom_export.prompt.canvas import count_visual_tokens
from d3tom_export.prompt.chat import (
    IMAGE_TOKEN_INDEX,
    answer_text,
    chat,
    check_text,
    load_tokenizer,
    raw_text,
    system_text,
    tokenize,
    with_pictures,
)
from d3tom_export.prompt.pictures import Views, open_picture, pack_features, prepare_picture
from d3tom_export.prompt.samples import Sample, TokenSample


def _blind() -> D3tomError:
    return D3tomError("This model is language-only: it has no vision tower to read --image with. Ask in text.")


_CHARACTERS_PER_TOKEN = 256
"""A longer prompt than so many characters for each of the model's positions is not even encoded."""


@dataclass(frozen=True)
class Reader:
    """Turns questions and pictures into prompts, and ids into text, for one model."""

    config: ModelConfig
    tokenizer: Tokenizer
    drop_token_after_image: bool = True
    ignore_orientation: bool = False
    """Whether picture files are shown as stored, whatever their EXIF orientation, as the release does."""

    @classmethod
    def from_folder(cls, folder: Path, config: ModelConfig, *, drop_token_after_image: bool = True) -> Reader:
        """Read the tokenizer of a checkpoint or bundle folder."""
        tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
        tokens, rows = tokenizer.get_vocab_size(with_added_tokens=True), config.language.embedding_size
        if tokens > rows:
            raise D3tomError(
                f"{folder / TOKENIZER_FILE} has {tokens} tokens and the model embeds {rows}. Tokenizer and weights "
                "come from different models; fetch them together."
            )
        return cls(config, tokenizer, drop_token_after_image)

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Reader:
        """The reader a bundle was built with."""
        drop = bundle.manifest.drop_token_after_image
        return cls.from_folder(bundle.folder, bundle.config, drop_token_after_image=drop)

    def see(self, path: Path, note: Note = no_note) -> Views:
        """Views of a picture file for this model, and no more of it in memory.

        Raises :class:`D3tomError` where the model has no eyes, or the file is no picture within the limits.
        """
        if self.config.vision is None:
            raise _blind()
        return prepare_picture(open_picture(path, ignore_orientation=self.ignore_orientation, note=note), self._vision)

    def token_ids(self, question: str, pictures: int) -> list[int]:
        """Ids of the whole conversation, :data:`IMAGE_TOKEN_INDEX` for each picture.

        A question that places no ``<image>`` itself shows its pictures first, each on a line of its own.
        """
        check_text(question, _CHARACTERS_PER_TOKEN * self.config.language.max_sequence_length)
        text = chat(with_pictures(question, pictures), system_text(self.config.vision is not None))
        ids = tokenize(self.tokenizer, text, drop_token_after_image=self.drop_token_after_image)
        rows = self.config.language.vocab_rows
        if not ids:
            raise D3tomError("The model's tokenizer gives no token for this prompt. Fetch the tokenizer again.")
        if max(ids) >= rows:
            raise D3tomError(
                f"The tokenizer gives token {max(ids)} and the model embeds {rows} tokens. Tokenizer and weights come "
                "from different models; fetch them together."
            )
        return ids

    def check_text(self, question: str, pictures: int, generation: GenerationConfig) -> None:
        """Refuse what :meth:`check_length` would whatever the pictures, before any of them is opened."""
        if pictures and self.config.vision is None:
            raise _blind()
        shown = pictures * self._vision.tokens_per_view if pictures else 0
        self._check_length(self.token_ids(question, pictures), pictures, shown, generation, "at least ")

    def check_length(
        self, question: str, pictures: Sequence[Image.Image | Views], generation: GenerationConfig
    ) -> list[int]:
        """Refuse a prompt that does not fit the model together with its answer; no picture is prepared for it.

        Returns the prompt's ids (:meth:`token_ids`). Raises :class:`D3tomError`.
        """
        if pictures and self.config.vision is None:
            raise _blind()
        ids = self.token_ids(question, len(pictures))
        visual = sum(
            picture.packing.visual_tokens
            if isinstance(picture, Views)
            else count_visual_tokens(picture.size, self._vision)
            for picture in pictures
        )
        self._check_length(ids, len(pictures), visual, generation)
        return ids

    def read(
        self, backend: Backend, question: str, pictures: Sequence[Image.Image | Views], generation: GenerationConfig
    ) -> Prompt:
        """Embed a question and its pictures on ``backend``."""
        ids = self.check_length(question, pictures, generation)
        visual = []
        for picture in pictures:
            views = picture if isinstance(picture, Views) else prepare_picture(picture, self._vision)
            visual.append(pack_features(backend.encode_views(views.pixel_values), backend.image_newline, views.packing))
        return splice(backend, ids, visual)

    def _check_length(
        self, ids: list[int], pictures: int, visual: int, generation: GenerationConfig, about: str = ""
    ) -> None:
        length = len(ids) - pictures + visual
        limit = self.config.language.max_sequence_length
        if length + generation.gen_length > limit:
            raise D3tomError(
                f"The prompt has {about}{length} tokens ({visual} of them visual); with {generation.gen_length} answer "
                f"tokens that exceeds this model's limit of {limit}. "
                "Shorten the prompt, show fewer pictures or ask for a shorter answer (--gen-length)."
            )

    def text(self, ids: Ints, *, raw: bool = False) -> str:
        """The answer's text from its ids (G,): up to the first end token, or with ``raw`` of all, as the release."""
        if raw:
            return raw_text(self.tokenizer, ids.tolist())
        return answer_text(self.tokenizer, ids.tolist(), self.config.language.eos_token_ids)

    @property
    def _vision(self) -> VisionConfig:
        assert self.config.vision is not None
        return self.config.vision


def splice(backend: Backend, ids: Sequence[int], visual: Sequence[Floats]) -> Prompt:
    """The prompt of ``ids``, with the visual tokens (V, D) of each picture for its :data:`IMAGE_TOKEN_INDEX`."""
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


def embed_sample(
    backend: Backend, sample: Sample | TokenSample, reader: Reader | None, generation: GenerationConfig
) -> Prompt:
    """A sample's prompt on ``backend``; ``reader`` may be None for a sample of tokens."""
    if isinstance(sample, TokenSample):
        return Prompt(backend.embed_tokens(sample.token_ids), sample.visual_positions)
    assert reader is not None, "a sample with a question needs a tokenizer"
    pictures = [] if sample.picture is None else [sample.picture]
    return reader.read(backend, sample.question, pictures, generation)
