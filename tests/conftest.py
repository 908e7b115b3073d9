"""Shared fixtures: recorded runs, synthetic checkpoints in the released format, bundles built once a session."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from filelock import FileLock, Timeout
from onnxscript._framework_apis import torch_2_5
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle, listed_files, load_bundle, write_manifest
from d3tom_export.bundle.manifest import stage_file
from d3tom_export.bundled import bundled_model
from d3tom_export.checkpoint.folder import default_generation, open_checkpoint
from d3tom_export.checkpoint.models import load_model
from d3tom_export.cli.main import main
from d3tom_export.config import LOOPS, GenerationConfig, Loop, MergeConfig, ModelConfig
from d3tom_export.cpu.tune import write_tuned
from d3tom_export.engines.graph import engine_graph
from d3tom_export.export import assemble
from d3tom_export.export.preflight import SelfCheck
from d3tom_export.export.request import StageRequest
from d3tom_export.families.registry import read_config
from d3tom_export.model.lavida import Lavida
from d3tom_export.pipeline import Reader, run_loop
from d3tom_export.quality.settings import NO_MERGE
from d3tom_export.quantize.plan import QuantizeRequest
from tests.traces import Traces, kept_folder

# Exports make millions of objects that stay or go without the collector; it would look through all of them every time.
gc.set_threshold(100_000, 20, 50)

# The suite shares two cores with whatever else runs, its other processes first; more threads than cores only add noise.
torch.set_num_threads(max(1, min(2, os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

# Reading the signatures of torchlib's thousand functions anew for every export takes half a second.
torch_2_5.get_torchlib_ops = functools.cache(torch_2_5.get_torchlib_ops)

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

OWN_GOLDEN = Path(__file__).parent / "golden"
OWN_FAMILIES = Path(__file__).parent / "golden-families"
_SHARED = Path(__file__).parents[2] / "shared"


def recorded_runs() -> list[Path]:
    """Folders of LaViDa-LLaDA's recorded runs: all of them where the shared folder is there, else our own."""
    shared = _SHARED / "golden"
    return sorted(path.parent for path in (shared if shared.is_dir() else OWN_GOLDEN).glob("*/case.json"))


def recorded_runs_of_families() -> list[Path]:
    """Those of the other families, likewise."""
    shared = _SHARED / "golden-families"
    return sorted(path.parent for path in (shared if shared.is_dir() else OWN_FAMILIES).glob("*/*/case.json"))


SPECIAL_TOKENS = [
    "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip


def byte_tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges, with the released special tokens: 262 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def raw_config(**changes: Any) -> dict[str, Any]:
    """A small config in the released spelling; ``None`` removes a field."""
    raw = {
        "d_model": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 48, "rope": True,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "max_sequence_length": 640, "include_bias": False,
        "include_qkv_bias": False, "vocab_size": 270, "embedding_size": 272, "weight_tying": False,
        "mask_token_id": 258, "eos_token_id": 257, "pad_token_id": 257, "block_type": "llama",
        "activation_type": "silu", "layer_norm_type": "rms", "model_type": "llava_llada",
        "mm_vision_tower": "siglip-test", "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu", "mm_spatial_pool_mode": "bilinear",
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
        "vision_config": {
            "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 4,
        },
    } | changes  # fmt: skip
    return {name: value for name, value in raw.items() if value is not None}


def random_state(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights large enough that attention is sharp and near-ties are rare, under the released names."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in Lavida(config).state_dict().items():
        if tensor.dim() > 1:
            scale = 1.5 * tensor[0].numel() ** -0.5
            state[name] = torch.randn(tensor.shape, generator=generator) * scale
        else:
            around = 1.0 if name.endswith(".weight") else 0.0  # the norms' weights; the rest are biases
            state[name] = around + 0.1 * torch.randn(tensor.shape, generator=generator)
    for name in ("model.transformer.wte.weight", "model.transformer.ff_out.weight"):
        rows = config.language.embedding_size
        state[name] = torch.randn(rows, config.language.d_model, generator=generator)
    return state


def write_checkpoint(folder: Path, raw: dict[str, Any], shards: int = 2, seed: int = 0) -> Path:
    """A checkpoint folder in the released format, with a tokenizer where the model has eyes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = read_config(raw)
    state = random_state(config, seed)
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 8, "step_ratio": 1.0}))
    if config.vision is not None:
        byte_tokenizer().save(str(folder / "tokenizer.json"))
        name = "model.vision_tower.vision_tower.vision_model.post_layernorm.weight"
        state[name] = torch.ones(config.vision.hidden_size)  # stored by releases, used by nothing
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        members = {name: state[name] for name in sorted(state)[shard::shards]}
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file(members, folder / file)
        weight_map |= dict.fromkeys(members, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of smooth seeded colour."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


Shared = Callable[..., Path]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Fills a folder once for all processes of the suite: exports take seconds each. Tests only read from it.

    A process that finds another one at it does ``meanwhile`` before it waits.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers' folders

    def folder(name: str, fill: Callable[[Path], object], meanwhile: Callable[[], object] = lambda: None) -> Path:
        path = root / "shared" / hashlib.sha256(name.encode()).hexdigest()[:16]
        path.parent.mkdir(exist_ok=True)
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            meanwhile()
            lock.acquire()
        try:
            if not path.exists():
                partial = path.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                fill(partial)
                partial.rename(path)
        finally:
            lock.release()
        return path

    return folder


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the suite's own: the user's is neither read nor written."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def traces() -> Iterator[Traces]:
    """Builds of this process take graphs that were traced before, in whichever process, for the same stage."""
    traces = Traces(kept_folder())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "export_stage", traces.export_stage)
        yield traces


@pytest.fixture(scope="session")
def checkpoint_folder(shared: Shared) -> Path:
    """A synthetic multimodal checkpoint: 4 layers, grouped queries, sharded, clipped vocabulary."""
    return shared("checkpoint", lambda folder: write_checkpoint(folder / "synthetic", raw_config())) / "synthetic"


@pytest.fixture(scope="session")
def eager_model(checkpoint_folder: Path) -> Lavida:
    """The synthetic checkpoint's eager model."""
    return load_model(open_checkpoint(checkpoint_folder))


BuildBundle = Callable[..., Bundle]


@pytest.fixture(scope="session")
def build_bundle(checkpoint_folder: Path, shared: Shared, traces: Traces) -> BuildBundle:
    """Builds bundles of the synthetic checkpoint, each merge configuration once."""

    def build(
        merge: MergeConfig,
        loops: Sequence[Loop] = ("uncached",),
        share_prefix: bool = False,
        quantize: QuantizeRequest | None = None,
    ) -> Bundle:
        checkpoint, generation = open_checkpoint(checkpoint_folder), GenerationConfig(gen_length=8)

        def fill(folder: Path) -> None:
            request = StageRequest(merge, tuple(loops), share_prefix=share_prefix, quantize=quantize)
            assemble.write_stages(checkpoint, request, generation, folder)

        def help_along() -> None:
            if quantize is None:  # else weights lie where only the builder knows
                traces.help_with(checkpoint, merge, generation, loops, share_prefix)

        return load_bundle(shared(f"bundle {merge} {loops} {share_prefix} {quantize}", fill, help_along))

    return build


@pytest.fixture(scope="session")
def bundle(build_bundle: BuildBundle) -> Bundle:
    """The synthetic checkpoint cut at layer 1, ratio 0.7, for both loops."""
    return build_bundle(MergeConfig(layer=1, ratio=0.7), LOOPS)


@pytest.fixture(scope="session")
def prefill_bundle(build_bundle: BuildBundle) -> Bundle:
    """As ``bundle``, but its cached loop merges the prompt at its prefill."""
    return build_bundle(MergeConfig(layer=1, ratio=0.7, merge_at="prefill"), LOOPS)


@pytest.fixture(scope="session")
def sharing_bundle(build_bundle: BuildBundle) -> Bundle:
    """As ``bundle``, but its cached loop can share a picture's prefill between questions."""
    return build_bundle(MergeConfig(layer=1, ratio=0.7), LOOPS, share_prefix=True)


@pytest.fixture(scope="session")
def sharing_prefill_bundle(build_bundle: BuildBundle) -> Bundle:
    """As ``prefill_bundle``, and sharing."""
    return build_bundle(MergeConfig(layer=1, ratio=0.7, merge_at="prefill"), LOOPS, share_prefix=True)


@pytest.fixture(scope="session")
def ort_backend(bundle: Bundle) -> OnnxRuntimeBackend:
    """``bundle`` on ONNX Runtime, CPU."""
    return OnnxRuntimeBackend(bundle, device="cpu")


@pytest.fixture(scope="session")
def oracle(bundle: Bundle, eager_model: Lavida) -> PyTorchBackend:
    """The eager model merging as ``bundle`` does."""
    return PyTorchBackend(eager_model, bundle.manifest.merge)


@pytest.fixture(scope="session")
def questions(shared: Shared, checkpoint_folder: Path, eager_model: Lavida) -> Path:
    """Six questions of two kinds in a folder; with ``--no-normalize`` the synthetic model is right about five."""

    def fill(folder: Path) -> None:
        backend = PyTorchBackend(eager_model, NO_MERGE)
        reader = Reader.from_folder(checkpoint_folder, eager_model.config)
        generation = reader.with_ends(default_generation(reader.config, checkpoint_folder))
        lines = []
        for number in range(6):
            image, question = picture(60 + 10 * number, 50, number), f"What is number {number}?"
            image.save(folder / f"{number}.png")
            prompt = reader.read(backend, question, [image], generation)
            *_, last = run_loop(backend, prompt, reader.config.language.mask_token_id, generation, NO_MERGE)
            answer = reader.answer(last, generation).text if number else "something else"
            kind = ("even", "odd")[number % 2]
            lines.append({"image": f"{number}.png", "question": question, "answer": answer, "kind": kind})
        (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))

    return shared("questions", fill)


TINY_MERGE = MergeConfig(layer=2, ratio=0.9)
"""What ``d3tom-export build --layer 2 --ratio 0.9`` builds."""


@pytest.fixture(scope="session")
def tiny_bundle(shared: Shared, traces: Traces) -> Bundle:
    """The bundled model's bundle for both loops. Tests that write into it take a copy."""
    checkpoint = open_checkpoint(bundled_model())
    generation = default_generation(checkpoint.config, checkpoint.folder)

    def fill(folder: Path) -> None:
        assemble.build_bundle(checkpoint, StageRequest(TINY_MERGE, LOOPS), generation, folder, check=SelfCheck(1))

    def help_along() -> None:
        traces.help_with(checkpoint, TINY_MERGE, generation, LOOPS)

    return load_bundle(shared("tiny", fill, help_along))


def write_int8(bundle: Bundle, folder: Path) -> None:
    """A copy of ``bundle`` with graphs in int8."""
    shutil.copytree(bundle.folder, folder, dirs_exist_ok=True)
    manifest = bundle.manifest
    write_tuned(folder, manifest.stages, bundle.config.language, manifest.merge, "int8")
    write_manifest(folder, manifest, listed_files(folder))


@pytest.fixture(scope="session")
def int8_bundle(tiny_bundle: Bundle, shared: Shared) -> Bundle:
    """``tiny_bundle`` with graphs in int8."""
    return load_bundle(shared("tiny with int8", lambda folder: write_int8(tiny_bundle, folder)))


@pytest.fixture(scope="session")
def half_bundle(tiny_bundle: Bundle, shared: Shared) -> Bundle:
    """The bundled model's graphs in fp16, as an engine would compute them, under the stages' own names."""

    def fill(folder: Path) -> None:
        for path in filter(Path.is_file, tiny_bundle.folder.iterdir()):
            if path.suffix != ".onnx":
                shutil.copy(path, folder)
        for key, spec in tiny_bundle.manifest.stages.items():
            graph = engine_graph(tiny_bundle.folder / stage_file(key), spec, "fp16", "onnx")
            (folder / stage_file(key)).write_bytes(graph.model)

    return Bundle(shared("half", fill), replace(tiny_bundle.manifest, precision="fp16"), tiny_bundle.config)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What became of the faults that the mutation suite put in, of all workers."""
    from tests.mutation.table import PROPERTY, summary

    reports = [report for kind in ("passed", "failed", "xfailed") for report in terminalreporter.getreports(kind)]
    properties = [pair for report in reports if report.when == "call" for pair in report.user_properties]
    if any(name == PROPERTY for name, _ in properties):
        terminalreporter.write_sep("-", f"mutation suite: {summary(properties)}")


Invoke = Callable[..., Result]


@pytest.fixture(scope="session")
def invoke() -> Invoke:
    """``d3tom-export`` with the given arguments, in this process; a failure is a result, not an exception."""

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return call
