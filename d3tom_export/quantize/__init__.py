"""Weights in fewer bits: formats, rounding that looks at what a product sees, and which products are left alone."""
