"""The three fused operations of the denoising loop: what stands between the networks.

crop_upsample   the face, cut out of the latents and up-sampled to the local branch's canvas
relocate_merge  both branches' residuals, placed, averaged, summed and added to the UNet's skips
guide_step      Eq. (8) and the DDIM update

Each file states the operation once, in NumPy: the reference, and what the CPU backend runs.
"""

from .crop_upsample import crop_upsample
from .guide_step import guide_step
from .relocate_merge import relocate_merge

__all__ = ["crop_upsample", "guide_step", "relocate_merge"]
