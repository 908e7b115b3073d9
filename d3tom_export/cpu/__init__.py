"""Stage graphs rewritten for ONNX Runtime on the CPU, in float32 or int8; the standard graphs stay as they are."""
