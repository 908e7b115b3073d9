"""A byte-level BPE tokenizer of 494 tokens, trained on the chat template and the questions.

Like the released one it has a byte fallback for any text, keeps digits and newlines single, holds the special tokens
behind the ordinary vocabulary, and adds no beginning-of-text token by itself.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from d3tom_export.families.lavida_llada import SYSTEM

from .questions import NOTHING, all_texts

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
HEADER_START, HEADER_END, END_OF_TURN = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIAL_TOKENS = (BOS, EOS, MASK, HEADER_START, HEADER_END, END_OF_TURN)

VOCABULARY_LIMIT = 540
"""Never reached: the corpus has no more pairs to merge after 494 tokens, special ones included."""

_WORDS = r"\p{N}|\n|[^\S\n]?\p{L}+|[^\S\n]?[^\s\p{L}\p{N}]+|\s"

_CHAT_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def train_tokenizer() -> Tokenizer:
    """Build the tokenizer; the same text always gives the same one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Questions are counted often enough to become whole words; the system prompt gets what merges are left.
    corpus = [*[*all_texts(), NOTHING] * 20, *["system", "user", "assistant"] * 20, SYSTEM]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_LIMIT - len(SPECIAL_TOKENS),
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of a special token, which must exist."""
    number = tokenizer.token_to_id(token)
    assert number is not None, token
    return number


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the two files that transformers puts beside it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "padding_side": "right",
        "chat_template": _CHAT_TEMPLATE,
        **special,
    }
    for name, value in (("tokenizer_config.json", settings), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
