"""A machine as it is lent: on PYTHONPATH, this is what Python starts with in every process of a rehearsal.

There is no network, no diffusers, no tflite, no TensorRT; torch calls itself 2.11; this package is not installed, so
that only the source tree is there. A package that lies elsewhere than in this environment, such as one out of a kit,
is found. With STAND_IN_SESSIONS, ONNX Runtime's CPU sessions are where its CUDA sessions would be, as in tests/gpu.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import socket
import sys

ABSENT = {"diffusers", "tflite", "tensorrt", "tensorrt_rtx"}
VERSIONS = {"torch": "2.11.0"}
CUDA_SESSIONS = "realisid_trt.backends.onnxruntime_cuda"
HERE = [path for path in sys.path if "site-packages" in path]


def elsewhere() -> list[str]:
    return [path for path in sys.path if path not in HERE]


class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ABSENT:
            if spec := importlib.machinery.PathFinder.find_spec(name, elsewhere()):
                return spec
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


class StandInSessions(importlib.abc.MetaPathFinder):
    """After the module, tests/gpu/conftest.py is loaded, which changes it."""

    def find_spec(self, name, path=None, target=None):
        if name != CUDA_SESSIONS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            importlib.import_module("tests.gpu.conftest")

        spec.loader.exec_module = exec_module
        return spec


def version(name, installed=importlib.metadata.version):
    if name in ABSENT or name.startswith("tensorrt"):
        for found in importlib.metadata.distributions(name=name, path=elsewhere()):
            return found.version
        raise importlib.metadata.PackageNotFoundError(name)
    return VERSIONS.get(name) or installed(name)


def no_network(*arguments):
    raise OSError(101, "Network is unreachable")


importlib.metadata.version = version
socket.socket.connect = no_network
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "").lower()]
sys.meta_path.insert(0, Absent())
if "STAND_IN_SESSIONS" in os.environ:
    sys.meta_path.insert(0, StandInSessions())
