"""torch → ONNX → plans: the tools that turn a RealisID checkpoint into an engine directory."""
