"""What a bundle's ``manifest.json`` says: its fields and their kinds, and that its stages are those of its model."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from d3tom_export.checkpoint.quantized import format_of, part_name
from d3tom_export.checkpoint.stored import INDEX_FILE, SINGLE_FILE
from d3tom_export.config import (
    CONFIG_FILE,
    LOOPS,
    TOKENIZER_FILE,
    GenerationConfig,
    Loop,
    MergeConfig,
    ModelConfig,
    QuantFormat,
)
from d3tom_export.errors import D3tomError, listing
from d3tom_export.families.family import ROLES, Role
from d3tom_export.prompt.settings import PromptSettings
from d3tom_export.stages.contract import StageSpec, TensorSpec, stage_specs
from d3tom_export.trust.files import check_name
from d3tom_export.trust.schema import Count, Fields, Sha256, Text, check_kinds, fields_of

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 6
ENGINES_FOLDER = "engines"
"""Where a bundle keeps engines (engines/record.py)."""

READ_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "samples.zip",
    INDEX_FILE,
    SINGLE_FILE,
)
"""What is read of a bundle, or may be, if it lies there: it must be listed then. What nobody reads may lie around."""

_MOST_FILES = 20_000
"""Of a manifest: the engines of one GPU in one precision are 36 files at most."""

_MOST_STOPS = 64
"""Texts that end an answer."""

_MOST_STOP_IDS = 4096
"""Of one of those texts, and of what stands behind an answer."""

WeightsOrigin = Literal["checkpoint", "random", "zeros"]


class TensorFields(Fields, frozen=True):
    """A tensor of a stage in a manifest or an engine's record."""

    name: Text
    dtype: Text
    axes: Annotated[list[Text | Count], Meta(max_length=8)]
    default: int | None


class _StageFields(Fields, frozen=True):
    file: Text
    name: Text
    loop: Loop | None
    inputs: list[TensorFields]
    outputs: list[TensorFields]
    weights: list[Text]


class _SourceFields(Fields, frozen=True):
    folder: Text
    fingerprint: Sha256


class _ModelFields(Fields, frozen=True):
    name: Text
    bundled_digest: Sha256 | None
    vocab_rows: Annotated[int, Meta(ge=1, le=2**31)]
    weights: WeightsOrigin
    linked_weights: bool
    source: _SourceFields | None


_LongText = Annotated[str, Meta(max_length=1 << 16)]
"""What a template or a system text says: the longest of a released model has some hundred characters."""


class _TemplateFields(Fields, frozen=True):
    start: _LongText
    before_system: _LongText | None
    after_system: _LongText | None
    to_assistant: _LongText
    to_user: _LongText | None
    to_answer: _LongText | None
    strips: Annotated[list[Role], Meta(max_length=len(ROLES))]


class _PromptFields(Fields, frozen=True):
    template: _TemplateFields
    system: _LongText | None
    bos: Text | None
    end_tokens: Annotated[list[Text], Meta(max_length=64)]
    stop: Annotated[list[Text], Meta(max_length=_MOST_STOPS)]
    drop_token_after_image: bool


class _FileFields(Fields, frozen=True):
    bytes: Count
    sha256: Sha256


class _ReportFields(Fields, frozen=True, forbid_unknown_fields=False):
    """What is shown of a validation; its other fields are for whoever reads the report."""

    passed: bool
    samples: Count
    max_abs_logit_error: float | None


_FilesFields = Annotated[dict[Text, _FileFields], Meta(max_length=_MOST_FILES)]


class _ManifestFields(Fields, frozen=True):
    schema_version: int
    model: _ModelFields
    merge: fields_of(MergeConfig)  # type: ignore[valid-type]
    generation: fields_of(GenerationConfig)  # type: ignore[valid-type]
    prompt: _PromptFields
    precision: Literal["fp32", "fp16", "bf16"]
    kv_cache: bool | Literal["both"]
    shares_prefix: bool
    opset: Annotated[int, Meta(ge=1, le=1000)]
    stages: Annotated[dict[Text, _StageFields], Meta(min_length=1, max_length=64)]
    created_by: Annotated[dict[Text, Text], Meta(max_length=64)]
    validation: _ReportFields | None
    files: _FilesFields


AGAIN = "Fetch the bundle again from where it was built, or rebuild it."
"""What to do about a bundle that is not as a build writes it."""


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` holds; see :meth:`Manifest.to_json` for its spelling."""

    model_name: str
    bundled_digest: str | None
    """Of the packaged model's weights, where the bundle was built from it (:mod:`d3tom_export.bundled`)."""
    vocab_rows: int
    weights: WeightsOrigin
    """Where the weights came from: a checkpoint, or a geometry's random or zero ones, whose answers mean nothing."""
    linked_weights: bool
    """Whether the weight files were put into the bundle as hard links to the checkpoint's own."""
    merge: MergeConfig
    generation: GenerationConfig
    prompt: PromptSettings
    """How it is asked, and where its answers end."""
    precision: str
    loops: tuple[Loop, ...]
    """The loops it has stages for; ``kv_cache`` false, true or "both" in the file."""
    shares_prefix: bool
    """Whether the loop with a KV cache can keep what stands before a question, for further ones (`extend`)."""
    opset: int
    stages: dict[str, StageSpec]
    stage_weights: dict[str, list[str]]
    created_by: dict[str, str]
    validation: dict[str, Any] | None = None
    source: dict[str, str] | None = None
    """The checkpoint it was built from, where that is a folder of the user's: ``folder`` and ``fingerprint``
    (:mod:`d3tom_export.parity.source`)."""

    @property
    def formats(self) -> frozenset[QuantFormat]:
        """Those of the weights in few bits that its graphs read; none where all are as a checkpoint has them."""
        names = {name for weights in self.stage_weights.values() for name in weights}
        return frozenset(form for name in names if (form := format_of(name)) is not None)

    @property
    def standard_on_cpu(self) -> bool:
        """Whether ONNX Runtime's CPU has kernels for the standard graphs: it has none for float4."""
        return "nvfp4" not in self.formats

    @property
    def rounds_inputs(self) -> bool:
        """Whether products round what their weights are multiplied with to float8."""
        return any(
            name.endswith(part_name("", "fp8", "_input")) for names in self.stage_weights.values() for name in names
        )

    @property
    def weights_note(self) -> str:
        """What there is to say of weights that are not a trained model's; empty where they are."""
        if self.weights == "checkpoint":
            return ""
        what = "random" if self.weights == "random" else "all zero"
        return f"the weights of {self.model_name} are {what}; its answers mean nothing."

    def check_shares_prefix(self) -> None:
        """Refuse questions that share a picture's prefill where there is no stage for it, with what to do."""
        if not self.shares_prefix:
            raise D3tomError(
                f"This bundle of {self.model_name} was built without the stage by which questions share a picture's "
                "prefill. Build it anew with --kv-cache and --share-prefix, or leave --share-prefix out."
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "model": {
                "name": self.model_name,
                "bundled_digest": self.bundled_digest,
                "vocab_rows": self.vocab_rows,
                "weights": self.weights,
                "linked_weights": self.linked_weights,
                "source": self.source,
            },
            "merge": self.merge.to_json(),
            "generation": self.generation.to_json(),
            "prompt": self.prompt.to_json(),
            "precision": self.precision,
            "kv_cache": "both" if len(self.loops) > 1 else "cached" in self.loops,
            "shares_prefix": self.shares_prefix,
            "opset": self.opset,
            "stages": {
                key: {
                    "file": stage_file(key),
                    "name": spec.name,
                    "loop": spec.loop,
                    "inputs": [asdict(tensor) for tensor in spec.inputs],
                    "outputs": [asdict(tensor) for tensor in spec.outputs],
                    "weights": self.stage_weights[key],
                }
                for key, spec in self.stages.items()
            },
            "created_by": self.created_by,
            "validation": self.validation,
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Manifest:
        """The manifest in ``raw``, whose fields were found to be there and of their kinds (:func:`load_bundle`)."""
        return cls(
            model_name=raw["model"]["name"],
            bundled_digest=raw["model"]["bundled_digest"],
            vocab_rows=raw["model"]["vocab_rows"],
            weights=raw["model"]["weights"],
            linked_weights=raw["model"]["linked_weights"],
            merge=MergeConfig.from_json(raw["merge"]),
            generation=GenerationConfig.from_json(raw["generation"]),
            prompt=PromptSettings.from_json(raw["prompt"]),
            precision=raw["precision"],
            loops=LOOPS if raw["kv_cache"] == "both" else ("cached",) if raw["kv_cache"] else ("uncached",),
            shares_prefix=raw["shares_prefix"],
            opset=raw["opset"],
            stages={
                key: StageSpec(
                    entry["name"], tensor_specs(entry["inputs"]), tensor_specs(entry["outputs"]), entry["loop"]
                )
                for key, entry in raw["stages"].items()
            },
            stage_weights={key: entry["weights"] for key, entry in raw["stages"].items()},
            created_by=raw["created_by"],
            validation=raw["validation"],
            source=raw["model"]["source"],
        )


def tensor_specs(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    """Tensors from their fields (:class:`TensorFields`)."""
    return tuple(TensorSpec(i["name"], i["dtype"], tuple(i["axes"]), i["default"]) for i in items)


Files = dict[str, dict[str, Any]]
"""What a manifest lists: ``bytes`` and ``sha256`` by path within the bundle."""


def stage_file(key: str) -> str:
    return f"{key}.onnx"


def weight_files(files: Files) -> list[str]:
    """Names of the weight files among ``files``."""
    return sorted(name for name in files if name.endswith(".safetensors") and "/" not in name)


def weights_sha256(files: Files) -> str:
    """One sha256 for all weights of a bundle: of its only file, or of the list of its shards and theirs."""
    shards = {name: files[name]["sha256"] for name in weight_files(files)}
    if len(shards) == 1:
        return next(iter(shards.values()))
    return hashlib.sha256("".join(f"{sha}  {name}\n" for name, sha in shards.items()).encode()).hexdigest()


def checked_files(path: Path, files: Any) -> Files:
    check_kinds(files, _FilesFields, f"{path}, files", AGAIN)
    for name in files:
        try:
            check_name(name)
        except D3tomError as error:
            raise D3tomError(f"{path} lists {error} {AGAIN}") from None
    return dict(files)


def check_schema(path: Path, raw: dict[str, Any]) -> None:
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION or type(version) is not int:
        newer = type(version) is int and version > SCHEMA_VERSION
        raise D3tomError(
            f"{path.parent} has manifest schema version {version!r}, this tool reads {SCHEMA_VERSION}. "
            + (
                "Use the newer d3tom-export that built it."
                if newer
                else "Rebuild it with this version of d3tom-export."
            )
        )
    check_kinds(raw, _ManifestFields, str(path), AGAIN)


def check_token_ids(path: Path, generation: GenerationConfig, vocab_rows: int) -> None:
    """Refuse stops, a suffix and end tokens that are none of the model's tokens, or endless."""
    sequences = (*generation.stop_ids, generation.suffix_ids, generation.end_ids)
    if len(sequences) > _MOST_STOPS + 2 or any(len(ids) > _MOST_STOP_IDS for ids in sequences):
        raise D3tomError(
            f"{path} has {len(generation.stop_ids):,} stops, and of those, a suffix and the end tokens the longest has "
            f"{max(map(len, sequences)):,} tokens; at most {_MOST_STOPS} of {_MOST_STOP_IDS:,} each are usual. {AGAIN}"
        )
    largest = max((token for ids in sequences for token in ids), default=0)
    if largest >= vocab_rows:
        raise D3tomError(
            f"{path} has token {largest:,} in a stop, a suffix or the ends of answers, and the model {vocab_rows:,} "
            f"tokens. {AGAIN}"
        )


def check_stages(path: Path, raw: dict[str, Any], manifest: Manifest, config: ModelConfig) -> None:
    """Refuse stages that are not those of the model, its merging and its loops."""
    weights = sum(map(len, manifest.stage_weights.values()))
    if config.language.n_layers > weights:  # a billion layers would take a while to compare
        raise D3tomError(
            f"{path} lists {weights} weights of stages, which cannot be those of a model of "
            f"{config.language.n_layers:,} layers. {AGAIN}"
        )
    wanted = stage_specs(config, manifest.merge, manifest.generation.gen_length, manifest.loops, manifest.shares_prefix)
    if list(wanted) != list(manifest.stages):
        raise D3tomError(f"{path} has the stages {listing(manifest.stages)}, expected {listing(wanted)}. {AGAIN}")
    for key, spec in wanted.items():
        found, file = manifest.stages[key], raw["stages"][key]["file"]
        if found == spec and file == stage_file(key):
            continue
        pairs = zip((*found.inputs, *found.outputs), (*spec.inputs, *spec.outputs), strict=False)
        told = next((f"{_shown(mine)} for {_shown(made)}" for mine, made in pairs if mine != made), None)
        told = told or f"name {found.name!r}, loop {found.loop}, file {file!r}, {len(found.inputs)} inputs"
        raise D3tomError(
            f"{path} describes stage {key} otherwise than the model and its merging make it: it has {told}. {AGAIN}"
        )


def _shown(tensor: TensorSpec) -> str:
    default = "" if tensor.default is None else f" by default {tensor.default}"
    return f"{tensor.name} {tensor.dtype} ({', '.join(map(str, tensor.axes))}){default}"
