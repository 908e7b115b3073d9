"""Checkpoint folders in: their files, their tensors, and the eager models made of them."""

from d3tom_export.checkpoint.stored import stored_tensors

__all__ = ["stored_tensors"]
