"""torch → ONNX → plans: the tools that turn a checkpoint into an engine directory."""
