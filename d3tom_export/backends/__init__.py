"""Runtimes that answer the denoising loop's calls, each with the same fields."""
