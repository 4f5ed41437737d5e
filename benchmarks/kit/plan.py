"""The inputs and the items of a kit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# In order of importance. They fill the parts in this order.
ITEMS = {
    "cubins": "the kernels, compiled for the far machine's GPU",
    "cuda-python": "wheels: cuda-core, cuda-bindings, cuda-pathfinder",
    "photos": "the two photographs of the tests",
    "miniature": "an engine of the trained miniature, float32 and float16",
    "diffusers": "a wheel: for the baselines",
    "sdxl": "a full-size engine in float16, without its weights",
    "sdxl-checkpoint": "the checkpoint that it was built from, without its weights: for the baselines",
    "onnxruntime-gpu": "a wheel: ONNX Runtime for CUDA",
}


@dataclass(frozen=True)
class Plan:
    """The inputs of a kit. The command line takes its defaults from here.

    folder:       KIT.
    items:        of ITEMS, to be in it; empty: all.
    part_mib:     the most that a part takes, MiB. A part of 32 fits into 64 MiB together with the source tree.
    python:       of the far machine. architecture: of its GPU.
    engine, sdxl: engine directories of the miniature and of full size; built first if they are not there. The full-size
                  checkpoint is the folder `sdxl`-checkpoint.
    """

    folder: Path
    items: tuple[str, ...] = ()
    part_mib: int = 32
    python: str = "3.12"
    architecture: str = "sm_90"
    engine: Path = Path("engines/miniature-fp16")
    sdxl: Path = Path("engines/sdxl-fp16")

    @property
    def sdxl_checkpoint(self) -> Path:
        return self.sdxl.with_name(f"{self.sdxl.name}-checkpoint")
