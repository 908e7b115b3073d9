"""A model repository of Triton Inference Server: what is written, and what runs in the server."""
