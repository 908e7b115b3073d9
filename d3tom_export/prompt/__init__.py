"""Questions in, text out: templates, conversations, tokenizers and samples."""

from d3tom_export.front import lazily

__getattr__ = lazily(__name__, {"load_tokenizer": "chat", "tokenize": "chat"})
