"""Pictures → latents, once, kept beside the pictures."""

from __future__ import annotations

import math
import os
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from tqdm import tqdm

from export.checkpoint import Checkpoint
from export.files import check_space, disk_errors

from .store import Array, Store, Unmade

BATCH_PIXELS = 2**20  # encoded together


def latents_of(checkpoint: Checkpoint, store: Store, accelerator: Accelerator) -> Array:
    """(N, C, h, w) half precision: the mean of the VAE's posterior of every picture, times its scaling factor.

    Kept in the store, in a file named by the VAE's hash and the precision; it appears whole or not at all. Every
    process does its part. The mean, not a draw: the posteriors of SDXL's VAE, and of ours, are far narrower than the
    noise of the first timestep.
    """
    if isinstance(store, Unmade):
        return cast(Array, _Encoded(checkpoint, store, accelerator))
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    path = store.path / f".latents-{checkpoint.weights_key('vae')[:16]}-{precision}.npy"
    [writer] = broadcast_object_list([os.getpid()])  # of the main process: two runs on one store write two files
    partial = path.with_name(f"{path.name}.{writer}.part")
    rgb = store["rgb"]
    height, width = (side // checkpoint.vae_scale_factor for side in rgb.shape[1:3])
    shape = (len(rgb), checkpoint.latent_channels, height, width)
    missing = not path.is_file()
    accelerator.wait_for_everyone()  # all have looked before one of them writes
    if missing:
        with disk_errors(store.path):
            if accelerator.is_main_process:
                check_space(store.path, math.prod(shape) * 2, "the latents of all pictures")
                open_memmap(partial, mode="w+", dtype=np.float16, shape=shape).flush()
            accelerator.wait_for_everyone()
            latents = np.load(partial, mmap_mode="r+")
            _encode(checkpoint, rgb, latents, accelerator)
            latents.flush()
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                os.replace(partial, path)
            accelerator.wait_for_everyone()
    found: Array = np.load(path, mmap_mode="r")
    return found


class _Encoded:
    """Latents of examples that are made, and encoded, when they are asked for."""

    def __init__(self, checkpoint: Checkpoint, store: Unmade, accelerator: Accelerator) -> None:
        rgb = store["rgb"]
        height, width = (side // checkpoint.vae_scale_factor for side in rgb.shape[1:3])
        self.shape = (len(store), checkpoint.latent_channels, height, width)
        self.checkpoint, self.rgb, self.accelerator = checkpoint, rgb, accelerator
        self.vae: Any = checkpoint.load_vae().to(accelerator.device)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Array:
        latents = _latents(self.vae, self.rgb[index][None], self.accelerator)
        return np.asarray(latents[0].astype(np.float16))


@torch.no_grad()
def _latents(vae: Any, rgb: Array, accelerator: Accelerator) -> NDArray[np.float32]:
    pixels = torch.from_numpy(np.array(rgb)).to(accelerator.device).permute(0, 3, 1, 2)
    with accelerator.autocast():
        means = vae.encode(pixels.float() / 127.5 - 1).latent_dist.mean.float() * vae.config.scaling_factor
    return np.asarray(means.cpu().numpy())


def _encode(checkpoint: Checkpoint, rgb: Array, latents: Array, accelerator: Accelerator) -> None:
    """This process's part of the pictures."""
    device, number = accelerator.device, accelerator.process_index
    vae: Any = checkpoint.load_vae().to(device)
    each = max(1, BATCH_PIXELS // (rgb.shape[1] * rgb.shape[2]))
    starts = range(number * each, len(rgb), accelerator.num_processes * each)
    for first in tqdm(starts, "latents", disable=not accelerator.is_main_process):
        latents[first : first + each] = _latents(vae, rgb[first : first + each], accelerator)
