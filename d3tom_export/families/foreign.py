"""Models that are not built here, by what their ``config.json`` says: what each is, why not, and what to do instead.

They are asked before the families are: several borrow LLaDA's keys or LLaVA's, and would otherwise be taken for a
damaged model of a family that is built. Facts: backbones.md, 1. Imports no framework.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from d3tom_export.config import QUANT_METHOD
from d3tom_export.errors import D3tomError
from d3tom_export.families.family import Raw, architectures
from d3tom_export.trust.fields import shown


@dataclass(frozen=True)
class Foreign:
    """A kind of model that no family here is."""

    title: str
    """As a sentence names it, with its article where it has one."""
    names: str
    """What its ``architectures`` and ``model_type`` look like: a pattern for the whole of one, in lower case and
    without punctuation."""
    why: str
    """Goes on a sentence about it."""
    instead: str
    keys: tuple[str, ...] = ()
    """Keys that nothing else has, where its names are borrowed."""


_CODES = (
    "reads and draws pictures as codes of a VQ tokenizer, a model of its own, and has no vision tower whose tokens "
    "could merge"
)
_ONCE = (
    "answers block by block from left to right, with what it saw kept in a cache: visual tokens are computed once, and "
    "merging them at every step saves little"
)
_WAYS = "Give a LaViDa, LLaDA-V or LLaDA checkpoint"
_ELSEWHERE = "Serve it with an engine that has it, such as SGLang or vLLM"

FOREIGN = (
    Foreign("MMaDA", r"mmada.*", _CODES, _WAYS, keys=("num_vq_tokens",)),
    Foreign("Lumina-DiMOO", r"lladaformultimodalgeneration|luminadimoo.*", _CODES, _WAYS),
    Foreign(
        "LaViDa-O (or Sparse-LaViDa)",
        r"(sparse)?lavidao?",
        "has a second branch of layers and a VQ tokenizer for drawing pictures",
        "Give LaViDa itself, which answers questions about pictures",
        keys=("d_model_gen", "mlp_hidden_size_gen", "mm_vqvae"),
    ),
    Foreign(
        "Dream-VL",
        r"dreamvla?(model|for.*)?",
        "has Qwen2-VL's vision tower and its rotary positions in three axes (M-RoPE)",
        "Give LaViDa-Dream, which has the same language model",
    ),
    Foreign(
        "Dimple",
        r"dimple.*",
        "has Qwen2-VL's vision tower and its rotary positions in three axes (M-RoPE)",
        "Give LaViDa-Dream, which has the same language model",
    ),
    Foreign(
        "Dream without eyes (as are DiffuCoder and Dream-Coder)",
        r"dream(model|for.*)?",
        "takes no pictures, and of the models that take none only LLaDA is built",
        "Give LaViDa-Dream, or LLaDA",
    ),
    Foreign(
        "LLaDA2", r"llada2.*", f"is a mixture of experts that {_ONCE}", f"{_ELSEWHERE}, or give LLaDA or LLaDA 1.5"
    ),
    Foreign(
        "LLaDA-MoE", r"lladamoe.*", "is a mixture of experts, and its layers are not built", "Give LLaDA or LLaDA 1.5"
    ),
    Foreign("SDAR (or SDAR-VL)", r"(llava)?sdar.*", _ONCE, _ELSEWHERE),
    Foreign("Fast-dVLM (or Fast-dLLM v2)", r"fastd[lv]lm.*", _ONCE, _ELSEWHERE),
    Foreign("DiffusionVL", r"diffusionvl.*", _ONCE, _ELSEWHERE),
    Foreign(
        "DiffusionGemma",
        r"diffusiongemma.*",
        "keeps prompt and pictures in an encoder's cache, and starts from random tokens, not from masks: merging at "
        "every step saves nothing",
        _ELSEWHERE,
    ),
    Foreign("a diffusion model of Nemotron-Labs", r"nemotron.*diffusion.*", _ONCE, _ELSEWHERE),
    Foreign(
        "a vision tower alone",
        r"(siglip|clip)2?(vision|text)?(model.*|for.*)?|vitfor.*|vitmodel",
        "sees and says nothing",
        "If a LaViDa or LLaDA-V checkpoint was saved without its tower, give that with --model, and this folder with "
        "--vision-tower",
    ),
    Foreign(
        "LLaVA",
        r"(video|mobile|tiny)?llava(?!llada|dream|sdar).*",
        "is autoregressive: it has no denoising steps over which to merge",
        "Give a model of masked diffusion, as LaViDa and LLaDA-V are",
    ),
    Foreign(
        "an autoregressive model",
        r".*forcausallm|.*lmheadmodel|(qwen|internvl|paligemma|mllama|idefics|gemma|pixtral|mistral)[a-z0-9]*"
        r"forconditionalgeneration|llama[0-9]*|(qwen|gemma|mistral|mixtral|phi|gpt|deepseek|internvl|falcon)[a-z0-9]*",
        "has no denoising steps over which to merge",
        "Give a model of masked diffusion, as LaViDa, LLaDA-V and LLaDA are",
    ),
)
"""In the order in which they are asked."""


def _names(raw: Raw) -> Iterator[str]:
    """Everything that names an architecture: its own, and those of its language model."""
    text = raw.get("text_config")
    for part in (raw, text if isinstance(text, dict) else {}):
        yield from architectures(part)
        if isinstance(part.get("model_type"), str):
            yield part["model_type"]


def foreign_model(raw: Raw) -> Foreign | None:
    """What ``raw``, a ``config.json``, describes, where that is known and not built here."""
    spelt = {re.sub(r"[^a-z0-9]", "", name.lower()[:200]) for name in _names(raw)}
    for kind in FOREIGN:
        keyed = any(raw.get(key) is not None for key in kind.keys)
        if keyed or any(re.fullmatch(kind.names, name) for name in spelt):
            return kind
    return None


def told_names(raw: Raw) -> str:
    """What ``raw`` calls itself, for a message."""
    named = {key: raw.get(key) for key in ("architectures", "model_type")}
    return ", ".join(f"{key} {shown(value)}" for key, value in named.items() if value is not None)


def refuse_foreign(raw: Raw, source: str) -> None:
    """Refuse ``raw``, a ``config.json`` that messages call ``source``, if its model is known and not built here.

    Raises :class:`D3tomError` with what it is, why it is not built, and what to do.
    """
    kind = foreign_model(raw)
    if kind is None:
        return
    told = told_names(raw) or f"it has the key {next(key for key in kind.keys if raw.get(key) is not None)}"
    raise D3tomError(
        f"{source} is of another architecture than this tool builds: {kind.title} ({told}), which {kind.why}. "
        f"{kind.instead}."
    )


def refuse_quantized(raw: Raw, source: str) -> None:
    """Refuse ``raw``, a ``config.json``, if it says that the weights are quantized. Raises :class:`D3tomError`."""
    key = next((key for key in ("quantization_config", "compression_config") if raw.get(key)), None)
    if key is None:
        return
    said = raw[key]
    if not isinstance(said, dict):
        raise D3tomError(
            f"{source} has a {key} that is {shown(said)}: expected none. Give the checkpoint with its weights as "
            "float32, float16 or bfloat16."
        )
    loads = {4: said.get("load_in_4bit"), 8: said.get("load_in_8bit")}
    if said.get("quant_method") in (None, "bitsandbytes") and False in loads.values() and True not in loads.values():
        return  # what bitsandbytes writes for a model that it leaves as it is
    if said.get("quant_method") == QUANT_METHOD:
        return  # the weights' names tell the rest
    method = said.get("quant_method") or ("bitsandbytes" if True in loads.values() else None)
    given = next((said[name] for name in ("bits", "w_bit", "num_bits") if type(said.get(name)) is int), None)
    bits = given or next((count for count, on in loads.items() if on is True), None)
    how = ", ".join(
        [
            f"method {shown(method)}" if method is not None else "by a method that it does not name",
            *([f"{shown(bits)} bits"] if bits is not None else []),
        ]
    )
    raise D3tomError(
        f"{source} says that the checkpoint's weights are quantized ({key}: {how}), and only float32, float16 and "
        "bfloat16 weights are read. Give the checkpoint that it was quantized from; --precision int8 quantizes a "
        f"bundle's graphs. If the weights are in fact not quantized, remove {key} from the file."
    )
