"""realisid_trt: packaging. The version stands in realisid_trt/__init__.py."""

import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "realisid_trt/__init__.py").read_text(encoding="utf-8"))[1]

ORT = "onnxruntime>=1.23"  # opset 20 and IR 10 on a CPU
CUDA = ["cuda-core>=1.2,<2", "cuda-bindings>=13,<14"]
PHOTOS = ["pillow-heif>=1.0", "pillow-jxl-plugin>=1.3"]  # HEIC, as telephones write it; JPEG XL
TRAIN = ["accelerate>=1.15,<2", "matplotlib>=3.10", "scipy>=1.15"]
DEBUG = ["polygraphy>=0.53.6,<0.54", "onnx-graphsurgeon>=0.6.1,<0.7"]  # docs/debug.md was tried with these

setup(
    name="realisid_trt",
    version=version,
    description="TensorRT deployment SDK for RealisID and ID-Patch: pictures of given persons, each at a given place",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Environment :: GPU :: NVIDIA CUDA :: 13",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
    packages=[
        "realisid_trt",
        "realisid_trt.backends",
        "realisid_trt.commands",
        "realisid_trt.kernels",
        "realisid_trt.loop",
        "realisid_trt.persons",
        "realisid_trt.persons.faces",
        "export",
        "export.adopt",
        "export.building",
        "export.checkpoint",
        "export.faces",
        "export.miniature",
        "export.truth",
    ],
    entry_points={"console_scripts": ["realisid = export.realisid:script"]},
    package_dir={"realisid_trt.kernels": "kernels"},
    package_data={
        "realisid_trt": ["py.typed"],
        "realisid_trt.kernels": ["*.cu", "*.cuh"],
    },
    install_requires=[
        "numpy>=2",
        "pillow>=11",
        "opencv-python-headless>=4.13,<6",  # 4.12 forces numpy<2.3
        "tokenizers>=0.21",
        "safetensors>=0.5",
        "tqdm>=4.66",
    ],
    extras_require={
        "cpu": [ORT],
        # CUDA 13, as cuda-bindings; releases before 1.25 or so run Resize on the CPU, in every step.
        "gpu": ["onnxruntime-gpu[cuda,cudnn]>=1.31", *CUDA],
        "tensorrt": ["tensorrt>=10.14,<12", *CUDA],  # the first release that reads Attention
        "tensorrt-rtx": ["tensorrt_rtx>=1.7,<2", *CUDA],
        "photos": [*PHOTOS],
        "mediapipe": ["mediapipe>=1.0,<2"],  # brings opencv-contrib, which overwrites opencv-python-headless
        "export": [  # beside cpu or gpu, whose ONNX Runtimes overwrite each other
            "torch>=2.13,<2.14",  # the dynamo exporter's graphs change with every release
            "diffusers>=0.42,<0.43",  # networks.py cuts its UNet and ControlNet
            "transformers>=5.23,<6",
            "onnx>=1.23,<2",
            "onnxscript>=0.7,<0.8",
            "tflite>=2.18",
            CUDA[1],  # with the next: the CUDA kernels are compiled without a toolkit
            "nvidia-cuda-nvrtc>=13,<14",
        ],
        "train": [*TRAIN],
        "debug": [*DEBUG],
        "dev": [
            *CUDA,
            *DEBUG,
            *TRAIN,
            *PHOTOS,
            "tensorrt_rtx>=1.7,<2",  # builds plans without a GPU
            "pytest>=9",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<3",
            "pybind11-stubgen==3.0.0",  # tests/tensorrt_api corrects the text it writes
        ],
    },
)
