"""The head's padding rows against a statement in NumPy, written from lavida.md A4, A5 and D alone.

The synthetic checkpoint stores 272 rows of table and head; its tokenizer has 262 ids. The release cuts the table.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import GenerationConfig, MergeConfig
from d3tom_export.families.registry import read_config
from d3tom_export.loop.backend import Prompt
from d3tom_export.loop.denoise import StepRecord
from d3tom_export.model.lavida import Lavida
from d3tom_export.model.llada import Transformer
from d3tom_export.pipeline import run_loop
from d3tom_export.stages.ops import Head
from tests.conftest import raw_config

TOKENS, MASK, PROMPT, ANSWER = 262, 258, 21, 8
UNMERGED = MergeConfig(layer=1, ratio=0.7, schedule="none")


class Statement:
    """A plain LLaDA in float64 on stored tensors, uncached and unmerged: (L, D) -> logits of the answer's rows."""

    def __init__(self, stored: dict[str, np.ndarray]) -> None:
        prefix = "model.transformer."
        self.tensors = {n.removeprefix(prefix): t.astype(np.float64) for n, t in stored.items() if n.startswith(prefix)}

    def logits(self, prompt: np.ndarray, answer: np.ndarray) -> np.ndarray:
        w = self.tensors
        x = np.concatenate([prompt.astype(np.float64), w["wte.weight"][answer]])
        for layer in range(4):
            block = {n.removeprefix(f"blocks.{layer}."): t for n, t in w.items() if n.startswith(f"blocks.{layer}.")}
            normed = _norm(x, block["attn_norm.weight"])
            queries, keys, values = (
                (normed @ block[f"{name}_proj.weight"].T).reshape(len(x), -1, 8).swapaxes(0, 1) for name in "qkv"
            )
            scores = _rotated(queries) @ _rotated(keys).repeat(2, axis=0).swapaxes(1, 2) / np.sqrt(8)
            mixed = _softmax(scores) @ values.repeat(2, axis=0)
            x = x + mixed.swapaxes(0, 1).reshape(len(x), -1) @ block["attn_out.weight"].T
            normed = _norm(x, block["ff_norm.weight"])
            gate = normed @ block["ff_proj.weight"].T
            gated = gate / (1 + np.exp(-gate)) * (normed @ block["up_proj.weight"].T)
            x = x + gated @ block["ff_out.weight"].T
        return _norm(x[-len(answer) :], w["ln_f.weight"]) @ w["ff_out.weight"].T


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _rotated(x: np.ndarray) -> np.ndarray:
    angles = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(0, 8, 2) / 8)
    cos, sin = np.tile(np.cos(angles), 2), np.tile(np.sin(angles), 2)
    return x * cos + np.concatenate([-x[..., 4:], x[..., :4]], -1) * sin


def _confidence(logits: np.ndarray, token: np.ndarray, remasking: str) -> np.ndarray:
    p = _softmax(logits)
    if remasking == "margin":
        return np.diff(np.sort(p, -1)[:, -2:], axis=-1)[:, 0]
    if remasking == "entropy":
        return (p * np.log(p + 1e-10)).sum(-1)
    return np.take_along_axis(p, token[:, None], -1)[:, 0]


@pytest.fixture(scope="module")
def stored(bundle: Bundle) -> dict[str, np.ndarray]:
    return {name: tensor for path in bundle.folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _answer(backend: PyTorchBackend | OnnxRuntimeBackend, prompt: np.ndarray, remasking: str) -> list[StepRecord]:
    generation = GenerationConfig(gen_length=ANSWER, step_ratio=0.5, remasking=remasking)  # type: ignore[arg-type]
    ready = Prompt(prompt[None], np.zeros(0, dtype=np.int64))
    return list(run_loop(backend, ready, MASK, generation, UNMERGED, logits=True))


@pytest.mark.parametrize("remasking", ["low_confidence", "margin", "entropy"])
@pytest.mark.parametrize("runtime", ["pytorch", "onnxruntime"])
def test_answers_are_the_statements(
    runtime: str, remasking: str, oracle: PyTorchBackend, ort_backend: OnnxRuntimeBackend, stored: dict
) -> None:
    backend = {"pytorch": oracle, "onnxruntime": ort_backend}[runtime]
    statement, padded, changed = Statement(stored), 0, 0.0
    for seed in range(4):
        prompt = np.random.default_rng(seed).normal(size=(PROMPT, 32)).astype(np.float32)
        answer = np.full(ANSWER, MASK)
        for record in _answer(backend, prompt, remasking):
            logits = statement.logits(prompt, answer)
            assert logits.shape == (ANSWER, 272)
            token = logits[:, :TOKENS].argmax(-1)
            confidence = _confidence(logits, token, remasking)
            masked = answer == MASK
            taken = np.argsort(-np.where(masked, confidence, -np.inf), kind="stable")[: int(record.transfer.sum())]
            answer[taken] = token[taken]
            result = record.result
            assert result.logits is not None
            np.testing.assert_allclose(result.logits[0], logits, atol=1e-3)
            assert np.array_equal(result.token[0], token)
            np.testing.assert_allclose(result.confidence[0], _confidence(logits, token, "low_confidence"), rtol=5e-3)
            assert np.array_equal(record.tokens[0], answer)
            padded += int((logits.argmax(-1) >= TOKENS).sum())
            cut = _confidence(logits[:, :TOKENS], token, remasking)
            changed = max(changed, float(np.abs(confidence - cut).max()))
    assert padded > 3, "no padding row was ever the largest: the choice is not put to the test"
    assert changed > 0.1, "the padding rows do not move the confidences"


def _head(vocab_rows: int, stored_rows: int) -> Head:
    raw = raw_config(vocab_size=stored_rows, embedding_size=stored_rows, mask_token_id=1)
    transformer = Transformer(read_config(raw, vocab_rows).language)
    with torch.no_grad():
        transformer.ff_out.weight.copy_(torch.randn(stored_rows, 32, generator=torch.Generator().manual_seed(1)) * 2)
    return Head(transformer)


@torch.no_grad()
def test_doubt_is_exact_beside_a_larger_padding_row() -> None:
    head = _head(vocab_rows=20, stored_rows=60)
    x = torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(2))
    token, confidence, doubt, logits = head(x)
    assert (logits.argmax(-1) >= 20).any()
    assert torch.equal(token, logits[..., :20].argmax(-1))
    exact = torch.softmax(logits.double(), -1).gather(-1, token[..., None])[..., 0]
    torch.testing.assert_close(1 / (1 + doubt.double()), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(confidence.double(), exact, rtol=1e-5, atol=0)


@torch.no_grad()
def test_a_padding_row_far_above_leaves_a_confidence_of_zero_and_no_nan() -> None:
    head = _head(vocab_rows=20, stored_rows=21)
    head.ff_out.weight[20] = 1000 * head.ln_f.weight
    token, confidence, doubt, _ = head(torch.ones(1, 1, 32))
    assert token.item() < 20
    assert (confidence.item(), doubt.item()) == (0.0, float("inf"))


def test_the_model_of_a_checkpoint_has_the_rows(eager_model: Lavida) -> None:
    assert eager_model.transformer.wte.weight.shape[0] == TOKENS
    assert eager_model.transformer.ff_out.weight.shape[0] == 272
