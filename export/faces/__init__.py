"""Converters of the face models: torch weights and TFLite graphs → ONNX. They need neither torch nor TensorFlow."""
