"""python -m tests.benchmarks.rehearsal: benchmarks.latency on the stand-in for a GPU, torch on the CPU in its place.

What tests/gpu rehearse their tests with stands in for ONNX Runtime's CUDA sessions, here and in the processes that
measure memory.
"""

from __future__ import annotations

import sys

import torch

import tests.gpu.conftest  # noqa: F401
from benchmarks import torch_device
from benchmarks.latency import main

torch_device.beside = lambda device: torch.device("cpu")

if __name__ == "__main__":
    sys.exit(main())
