"""What each reader of strangers' files must do with any bytes: give a result, or one :class:`D3tomError`."""

from __future__ import annotations

import base64
import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from d3tom_export.bundle.folder import load_bundle
from d3tom_export.bundle.manifest import MANIFEST_FILE
from d3tom_export.checkpoint.folder import open_checkpoint
from d3tom_export.checkpoint.models import empty_model
from d3tom_export.checkpoint.stored import INDEX_FILE
from d3tom_export.config import CONFIG_FILE, GenerationConfig
from d3tom_export.errors import D3tomError
from d3tom_export.pictures.views import open_picture
from d3tom_export.prompt.chat import load_tokenizer, tokenize
from d3tom_export.prompt.samples import SAMPLES_FILE, load_samples
from d3tom_export.quality.dataset import Item, open_data
from d3tom_export.quality.results import Answered, Binding, Results
from d3tom_export.quality.settings import Setting
from d3tom_export.serve.failures import RequestError
from d3tom_export.serve.limits import Limits
from d3tom_export.serve.requests import read_chat
from d3tom_export.trust.tensors import read_header

from .mutate import Choices, edited, edited_bytes

Target = Callable[[bytes], None]
"""Runs one input; whatever it raises is a finding."""


def _document_target(path: Path, read: Callable[[], object]) -> Target:
    """Mutates the JSON document at ``path``, mostly as a document, sometimes as bytes, and reads it."""
    content = path.read_bytes()
    document: dict[str, Any] = json.loads(content)

    def run(data: bytes) -> None:
        choices = Choices(data)
        kind = choices.below(8)
        changed = (
            choices.rest()
            if kind == 0
            else (edited_bytes(content, choices) if kind == 1 else edited(document, choices))
        )
        path.write_bytes(changed)
        with suppress(D3tomError):
            read()

    return run


def header(folder: Path) -> Target:
    """A safetensors file: its header as a document, its length, its data. What we take the library takes too."""
    from safetensors import safe_open

    path = sorted(folder.glob("*.safetensors"))[0]
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    document, stored = json.loads(content[8 : 8 + length]), content[8 + length :]

    def run(data: bytes) -> None:
        choices = Choices(data)
        kind = choices.below(8)
        if kind == 0:
            changed = choices.rest()
        elif kind == 1:
            changed = edited_bytes(content, choices)
        else:
            text = edited(document, choices)
            claimed = len(text) if kind > 2 else choices.below(1 << 24)
            changed = struct.pack("<Q", claimed) + text + (stored if kind > 3 else edited_bytes(stored, choices))
        path.write_bytes(changed)
        try:
            read_header(path)
        except D3tomError:
            return
        with safe_open(path, "numpy"):
            pass

    return run


def config(folder: Path) -> Target:
    """A checkpoint's config.json, down to the comparison with the stored tensors."""
    empty_model(open_checkpoint(folder))  # imports torch, which is none of the first input's time
    return _document_target(folder / CONFIG_FILE, lambda: empty_model(open_checkpoint(folder)))


def index(folder: Path) -> Target:
    """A checkpoint's index of shards."""
    return _document_target(folder / INDEX_FILE, lambda: open_checkpoint(folder))


def manifest(bundle: Path) -> Target:
    """A bundle's manifest."""
    return _document_target(bundle / MANIFEST_FILE, lambda: load_bundle(bundle))


def tokenizer(folder: Path) -> Target:
    """A checkpoint's tokenizer.json, and what it makes of a question."""
    path = folder / "tokenizer.json"
    return _document_target(
        path, lambda: tokenize(load_tokenizer(path), "How many <image>digits?", bos="<|startoftext|>")
    )


def samples(folder: Path) -> Target:
    """A sample set: the zip as bytes, its lines as documents."""
    path = folder / SAMPLES_FILE
    picture = io.BytesIO()
    Image.new("RGB", (8, 6), (9, 90, 200)).save(picture, "png")
    line = {"prompt": "Which colour?", "image": "a.png", "answer": "blue", "kind": "colour"}

    def archive(text: bytes, image: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("a.png", image)
            file.writestr("samples.jsonl", text)
        return buffer.getvalue()

    whole = archive(json.dumps(line).encode(), picture.getvalue())

    def run(data: bytes) -> None:
        choices = Choices(data)
        kind = choices.below(4)
        if kind == 0:
            changed = edited_bytes(whole, choices)
        elif kind == 1:
            changed = archive(json.dumps(line).encode(), edited_bytes(picture.getvalue(), choices))
        else:
            changed = archive(edited(line, choices), picture.getvalue())
        path.write_bytes(changed)
        with suppress(D3tomError):
            load_samples(path)

    return run


def picture(folder: Path) -> Target:
    """Pictures of every kind that is read, as bytes."""
    path = folder / "picture"
    whole = []
    for kind in ("png", "jpeg", "webp", "bmp", "gif", "tiff", "ppm"):
        buffer = io.BytesIO()
        Image.radial_gradient("L").resize((24, 16)).convert("RGB").save(buffer, kind)
        whole.append(buffer.getvalue())

    def run(data: bytes) -> None:
        choices = Choices(data)
        path.write_bytes(edited_bytes(whole[choices.below(len(whole))], choices))
        with suppress(D3tomError):
            open_picture(path)

    return run


def questions(folder: Path) -> Target:
    """Lines of questions with the pictures they name, of our own format and of lmms-eval's."""
    lines: list[dict[str, Any]] = [
        {
            "image": ["a/x.png", "y.jpg"],
            "question": "What?",
            "answers": ["a", 2.5, {"answer": "b"}],
            "kind": "k",
            "id": 3,
        },
        {"doc_id": 7, "target": "['x', \"y\"]", "arguments": [["Which?", {}]], "filtered_resps": ["z"]},
    ]
    path = folder / "2025_samples_task.jsonl"

    def run(data: bytes) -> None:
        choices = Choices(data)
        line = edited(lines[choices.below(len(lines))], choices)
        path.write_bytes(edited_bytes(line, choices) if choices.below(4) == 0 else line)
        with suppress(D3tomError):
            found = open_data(path)
            for item in found.items:
                found.decode(item, found.contents(item))

    return run


def answers(folder: Path) -> Target:
    """A file of answers: what is taken of it is answers, and what is not ours stays as it was."""
    path, binding = folder / "answers.jsonl", Binding("m", "d", "w", "b", "p", "v")
    item, setting = Item(0, "1", "?", ("x",), "", ()), Setting("uncached", None, GenerationConfig(gen_length=4))
    path.unlink(missing_ok=True)
    with Results(path, binding) as results:
        results.know(item, "key")
        results.add(setting, Answered(setting.id, 0, "x", 2, (3, 1), 9, 3, 100, 0.5))
    whole = path.read_bytes().splitlines(keepends=True)

    def run(data: bytes) -> None:
        choices = Choices(data)
        place = choices.below(len(whole))
        line = edited(json.loads(whole[place]), choices) + b"\n"
        changed = b"".join([*whole[:place], line, *whole[place + 1 :]])
        changed = edited_bytes(changed, choices) if choices.below(4) == 0 else changed
        path.write_bytes(changed)
        try:
            with Results(path, binding) as results:
                assert all(each.steps >= 1 for each in results.answers.values())
        except D3tomError:
            assert path.read_bytes() == changed

    return run


def chat(folder: Path) -> Target:
    """The body of a request to `serve`, with a picture in it."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (9, 90, 200)).save(buffer, "png")

    def document(content: bytes) -> dict[str, Any]:
        shown = {"url": f"data:image/png;base64,{base64.b64encode(content).decode()}", "detail": "low"}
        parts = [{"type": "image_url", "image_url": shown}, {"type": "text", "text": "Which <image>?"}]
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
        numbers = {"max_tokens": 4, "seed": 1, "temperature": 0.5, "top_p": 1, "n": 1}
        others = {"stream_options": {"include_usage": True}, "d3tom": {"steps": 2, "drafts": True}, "user": None}
        return {"model": "m", "messages": messages, "stop": ["a"], "stream": True, **numbers, **others}

    def run(data: bytes) -> None:
        choices = Choices(data)
        kind = choices.below(8)
        if kind == 0:
            changed = edited_bytes(json.dumps(document(buffer.getvalue())).encode(), choices)
        elif kind < 3:
            changed = json.dumps(document(edited_bytes(buffer.getvalue(), choices))).encode()
        else:
            changed = edited(document(buffer.getvalue()), choices)
        with suppress(RequestError):
            read_chat(changed, Limits(pixels=1000, pictures=2))

    return run


TARGETS: dict[str, Callable[[Path], Target]] = {
    each.__name__: each
    for each in (header, config, index, manifest, tokenizer, samples, picture, questions, answers, chat)
}
"""Each takes a scratch folder, a copy of a checkpoint or (manifest) of a bundle, which it may write to."""


def scratch_of(name: str, checkpoint: Path, bundle: Path, folder: Path) -> Path:
    """A copy, in ``folder``, of what target ``name`` works on."""
    return Path(shutil.copytree(bundle if name == "manifest" else checkpoint, folder / name))
