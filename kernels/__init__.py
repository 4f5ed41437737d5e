"""The three fused operations of the denoising loop, which run between the networks.

crop_upsample   the face, cut out of the latents and up-sampled to the local branch's canvas
relocate_merge  the residuals of all branches, placed, summed or averaged, and added to the UNet's skips
guide_step      Eq. (8) and one step of a sampler

NAME.py states the operation once, in NumPy: the reference, which the CPU backend runs. NAME.cuh is the same in CUDA
C++; kernels.cu lists the entry points, compile.py compiles them for GPUs, launch.py launches them, host.h builds them
for a CPU. rows.cuh gathers rows into the networks' inputs, and checks for NaN and infinity.
"""

from .crop_upsample import crop_upsample
from .guide_step import guide_step
from .relocate_merge import EVERYWHERE, INSIDE, RELOCATED, relocate_merge

__all__ = ["EVERYWHERE", "INSIDE", "RELOCATED", "crop_upsample", "guide_step", "relocate_merge"]
