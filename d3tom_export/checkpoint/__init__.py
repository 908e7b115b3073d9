"""Checkpoint folders in: their files, their tensors, and the eager models made of them."""

from d3tom_export.front import lazily

__getattr__ = lazily(__name__, {"open_checkpoint": "folder", "read_header": "stored", "stored_tensors": "stored"})
