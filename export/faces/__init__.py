"""Converters of the face models: torch weights and TFLite graphs → ONNX. TensorFlow is not needed."""
