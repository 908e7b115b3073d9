"""TensorRT engines from a bundle's stages: precision, shapes, build, and what identifies an engine."""
