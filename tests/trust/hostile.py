"""What strangers may put in a checkpoint, a bundle, a picture or a prompt: one function a row of docs/trust.md.

Each changes a copy and returns the command line to try; the row says what the user must see, and the exit code.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Scratch:
    """Copies that a case may change, and a private file outside of them."""

    checkpoint: Path
    bundle: Path
    private: Path
    """A readable file of the user's that no checkpoint or bundle has any business with."""

    @property
    def output(self) -> Path:
        return self.checkpoint.parent / "output"

    def build(self, *options: object) -> list[object]:
        return ["build", "--model", self.checkpoint, "--layer", 1, "--self-check", 0, "--output", self.output, *options]

    def run(self, *options: object) -> list[object]:
        return ["run", self.bundle, "--prompt", "Which colours?", *options]

    def edit_json(self, path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
        raw = json.loads(path.read_text())
        edit(raw)
        path.write_text(json.dumps(raw))

    def edit_manifest(self, edit: Callable[[dict[str, Any]], object]) -> None:
        self.edit_json(self.bundle / "manifest.json", edit)

    def list_again(self, name: str) -> None:
        """Mend the manifest's hash of a file, as whoever writes a bundle can."""
        content = (self.bundle / name).read_bytes()
        entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        self.edit_manifest(lambda raw: raw["files"].update({name: entry}))

    def edit_header(self, edit: Callable[[dict[str, Any]], object]) -> None:
        """Change the header of the first shard."""
        path = self.checkpoint / SHARD
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


Case = Callable[[Scratch], Sequence[object]]
CASES: dict[str, Case] = {}


def case(title: str) -> Callable[[Case], Case]:
    def register(function: Case) -> Case:
        CASES[title] = function
        return function

    return register


def _rename_shard(scratch: Scratch, name: str) -> Sequence[object]:
    def rename(raw: dict[str, Any]) -> None:
        raw["weight_map"] = {key: name if file == SHARD else file for key, file in raw["weight_map"].items()}

    scratch.edit_json(scratch.checkpoint / INDEX, rename)
    if "/" not in name:
        (scratch.checkpoint / SHARD).rename(scratch.checkpoint / name)
    return scratch.build()


@case("A shard named like one of our files, `embed.onnx`")
def _(scratch: Scratch) -> Sequence[object]:
    return _rename_shard(scratch, "embed.onnx")


@case("A shard outside the folder, `../private.safetensors`")
def _(scratch: Scratch) -> Sequence[object]:
    return _rename_shard(scratch, "../private.safetensors")


@case("A shard that is a link to a file of the user's")
def _(scratch: Scratch) -> Sequence[object]:
    (scratch.checkpoint / SHARD).unlink()
    (scratch.checkpoint / SHARD).symlink_to(scratch.private)
    return scratch.build()


@case("A copied file that is a link to a private one")
def _(scratch: Scratch) -> Sequence[object]:
    (scratch.checkpoint / "special_tokens_map.json").symlink_to(scratch.private)
    return scratch.build()


def _pipe(scratch: Scratch, name: str) -> Sequence[object]:
    (scratch.checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(scratch.checkpoint / name)
    return scratch.build()


@case("A named pipe as config.json")
def _(scratch: Scratch) -> Sequence[object]:
    return _pipe(scratch, "config.json")


@case("A named pipe as a shard")
def _(scratch: Scratch) -> Sequence[object]:
    return _pipe(scratch, SHARD)


@case("A named pipe as tokenizer.json")
def _(scratch: Scratch) -> Sequence[object]:
    return _pipe(scratch, "tokenizer.json")


@case("config.json a link to /dev/zero")
def _(scratch: Scratch) -> Sequence[object]:
    (scratch.checkpoint / "config.json").unlink()
    (scratch.checkpoint / "config.json").symlink_to("/dev/zero")
    return scratch.build()


@case("A header of 5 GiB in a sparse file")
def _(scratch: Scratch) -> Sequence[object]:
    with (scratch.checkpoint / SHARD).open("wb") as file:
        file.write(struct.pack("<Q", 5 * 2**30))
        file.truncate(5 * 2**30 + 8)
    return scratch.build()


@case("Tensors that overlap in a shard")
def _(scratch: Scratch) -> Sequence[object]:
    def overlap(header: dict[str, Any]) -> None:
        norms = [name for name, entry in header.items() if entry.get("shape") == [32]]
        header[norms[1]]["data_offsets"] = header[norms[0]]["data_offsets"]

    scratch.edit_header(overlap)
    return scratch.build()


@case("A billion layers in config.json")
def _(scratch: Scratch) -> Sequence[object]:
    scratch.edit_json(scratch.checkpoint / "config.json", lambda raw: raw.update(n_layers=10**9))
    return scratch.build()


@case("A billion layers in the vision tower")
def _(scratch: Scratch) -> Sequence[object]:
    scratch.edit_json(
        scratch.checkpoint / "config.json", lambda raw: raw["vision_config"].update(num_hidden_layers=10**9)
    )
    return scratch.build()


@case("JSON a hundred thousand levels deep")
def _(scratch: Scratch) -> Sequence[object]:
    (scratch.checkpoint / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    return scratch.build()


@case("A number of 5,000 digits")
def _(scratch: Scratch) -> Sequence[object]:
    path = scratch.checkpoint / "config.json"
    path.write_text(path.read_text().replace('"n_layers": 4', '"n_layers": ' + "9" * 5000))
    return scratch.build()


@case("Fields that the release would read otherwise, left out")
def _(scratch: Scratch) -> Sequence[object]:
    scratch.edit_json(scratch.checkpoint / "config.json", lambda raw: raw.pop("mm_patch_merge_type"))
    return scratch.build()


@case("Tensor names that send commands to the terminal")
def _(scratch: Scratch) -> Sequence[object]:
    name = "model.image_newline"

    def rename(raw: dict[str, Any]) -> None:
        raw["\x1b[2J\nSelf-check passed: 2 answers"] = raw.pop(name)

    scratch.edit_header(rename)
    scratch.edit_json(scratch.checkpoint / INDEX, lambda raw: rename(raw["weight_map"]))
    return scratch.build()


@case("A tokenizer whose expression needs a panic")
def _(scratch: Scratch) -> Sequence[object]:
    pattern = {"type": "Split", "pattern": {"Regex": r"(\w+\s?)+$\d"}, "behavior": "Isolated", "invert": False}
    scratch.edit_json(scratch.checkpoint / "tokenizer.json", lambda raw: raw.update(pre_tokenizer=pattern))
    return scratch.build("--self-check", 2)


@case("A tokenizer whose merges end the process that loads them")
def _(scratch: Scratch) -> Sequence[object]:
    model = {"type": "BPE", "vocab": {"a": 0, "é": 1}, "merges": [["a", "é"]], "continuing_subword_prefix": "x"}
    scratch.edit_json(scratch.checkpoint / "tokenizer.json", lambda raw: raw.update(model=model))
    return scratch.build("--self-check", 2)


@case("A tokenizer that makes a text billions of times longer")
def _(scratch: Scratch) -> Sequence[object]:
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    longer = {"type": "Sequence", "pretokenizers": [step] * 30}
    scratch.edit_json(scratch.checkpoint / "tokenizer.json", lambda raw: raw.update(pre_tokenizer=longer))
    return scratch.build("--self-check", 2)


def _samples(scratch: Scratch, files: dict[str, bytes]) -> Sequence[object]:
    with zipfile.ZipFile(scratch.checkpoint / "samples.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return scratch.build("--self-check", 2)


@case("An empty sample set, which would leave nothing to check")
def _(scratch: Scratch) -> Sequence[object]:
    return _samples(scratch, {"samples.jsonl": b""})


@case("PostScript as a picture of a sample set")
def _(scratch: Scratch) -> Sequence[object]:
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    return _samples(scratch, {"x": script, "samples.jsonl": b'{"prompt": "a", "image": "x"}'})


@case("A sample of wrong kinds")
def _(scratch: Scratch) -> Sequence[object]:
    return _samples(scratch, {"samples.jsonl": b'{"prompt": 7, "image": {}}'})


@case("PostScript called photo.jpg")
def _(scratch: Scratch) -> Sequence[object]:
    photo = scratch.checkpoint.parent / "photo.jpg"
    photo.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    return scratch.run("--image", photo)


@case("A picture of 1 by 85 million")
def _(scratch: Scratch) -> Sequence[object]:
    photo = scratch.checkpoint.parent / "photo.png"
    Image.new("1", (1, 85_000_000)).save(photo)
    return scratch.run("--image", photo)


@case("A named pipe as --image")
def _(scratch: Scratch) -> Sequence[object]:
    os.mkfifo(scratch.checkpoint.parent / "photo.png")
    return scratch.run("--image", scratch.checkpoint.parent / "photo.png")


@case("A picture cut short")
def _(scratch: Scratch) -> Sequence[object]:
    whole = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(whole, "jpeg")
    photo = scratch.checkpoint.parent / "photo.jpg"
    photo.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    return scratch.run("--image", photo)


@case("A prompt of a million words")
def _(scratch: Scratch) -> Sequence[object]:
    return ["run", scratch.bundle, "--prompt", "word " * 10**6]


@case("A manifest that names a stage outside, `../c/front`")
def _(scratch: Scratch) -> Sequence[object]:
    def move(raw: dict[str, Any]) -> None:
        raw["stages"]["../c/front"] = raw["stages"].pop("front")
        raw["files"]["../c/front.onnx"] = raw["files"]["front.onnx"]

    scratch.edit_manifest(move)
    return scratch.run()


@case("A manifest that lists /etc/passwd")
def _(scratch: Scratch) -> Sequence[object]:
    content = Path("/etc/passwd").read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    scratch.edit_manifest(lambda raw: raw["files"].update({"/etc/passwd": entry}))
    return scratch.run()


@case("A manifest of wrong kinds")
def _(scratch: Scratch) -> Sequence[object]:
    scratch.edit_manifest(lambda raw: raw["merge"].update(layer="x"))
    return scratch.run()


@case("A manifest without one of its stages")
def _(scratch: Scratch) -> Sequence[object]:
    scratch.edit_manifest(lambda raw: raw["stages"].pop("front"))
    return scratch.run()


@case("A shard dropped from the manifest, and changed")
def _(scratch: Scratch) -> Sequence[object]:
    scratch.edit_manifest(lambda raw: raw["files"].pop(SHARD))
    path = scratch.bundle / SHARD
    path.write_bytes(path.read_bytes()[:-64] + bytes(64))
    return scratch.run()


@case("A tokenizer.json that the manifest does not list")
def _(scratch: Scratch) -> Sequence[object]:
    scratch.edit_manifest(lambda raw: raw["files"].pop("tokenizer.json"))
    return scratch.run()


def _graph(scratch: Scratch, edit: Callable[[Any], object]) -> Sequence[object]:
    import onnx

    name = "cpu/fp32/front.onnx"
    model = onnx.load(scratch.bundle / name, load_external_data=False)
    edit(model)
    (scratch.bundle / name).write_bytes(model.SerializeToString())
    scratch.list_again(name)
    return scratch.run()


@case("A graph with an endless loop")
def _(scratch: Scratch) -> Sequence[object]:
    import onnx

    def loop(model: Any) -> None:
        body = onnx.helper.make_graph(
            [onnx.helper.make_node("Identity", ["c"], ["d"])],
            "body",
            [
                onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []),
                onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []),
            ],
            [onnx.helper.make_tensor_value_info("d", onnx.TensorProto.BOOL, [])],
        )
        model.graph.node.insert(0, onnx.helper.make_node("Loop", ["", ""], [], body=body))

    return _graph(scratch, loop)


@case("A graph with an operator of nobody's")
def _(scratch: Scratch) -> Sequence[object]:
    import onnx

    def custom(model: Any) -> None:
        model.graph.node.insert(0, onnx.helper.make_node("Shell", [], ["unused"], domain="com.example"))

    return _graph(scratch, custom)


@case("A graph whose weights lie outside, `../private`")
def _(scratch: Scratch) -> Sequence[object]:
    def move(model: Any) -> None:
        weight = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        next(entry for entry in weight.external_data if entry.key == "location").value = "../private"

    return _graph(scratch, move)


@case("Weights linked to a checkpoint that was fine-tuned in place")
def _(scratch: Scratch) -> Sequence[object]:
    path = scratch.bundle / SHARD
    os.link(path, scratch.checkpoint.parent / "source.safetensors")
    scratch.edit_manifest(lambda raw: raw["model"].update(linked_weights=True))
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"tune")
    return scratch.run()


@case("An output folder that is no bundle, with --force")
def _(scratch: Scratch) -> Sequence[object]:
    scratch.output.mkdir()
    (scratch.output / "thesis.tex").write_text("years of work")
    return scratch.build("--force")
