"""The denoising loop: NumPy state, one step at a time, on any backend."""
