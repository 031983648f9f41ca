"""Where the model computes: ONNX Runtime, and the memory of its caches."""
