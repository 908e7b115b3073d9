"""Export, optimise and run diffusion multimodal LLMs patched with D3ToM token merging (arXiv 2511.12280)."""

__version__ = "0.1.0"
