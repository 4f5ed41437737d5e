"""Pictures → latents, once, kept beside the pictures."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from tqdm import tqdm

from export.checkpoint import Checkpoint
from export.checkpoint.vae import to_latents
from export.files import check_space, disk_errors, locked
from realisid_trt.errors import RequestError

from .processes import by_one, wait_for_all
from .store import Array, Store

BATCH_PIXELS = 2**20  # encoded together


def latents_of(checkpoint: Checkpoint, store: Store, accelerator: Accelerator) -> Array:
    """(N, C, h, w) half precision: the mean of the VAE's posterior of every picture, times its scaling factor.

    Kept in the store, in a file named by the VAE's hash and the precision, and published atomically. The next run
    continues a stopped one: missing latents are NaN. Leftovers of another VAE are removed. Every process does its part.
    The mean, not a draw: the posteriors of SDXL's VAE, and of ours, are far narrower than
    the noise of the first timestep.

    Raises RequestError if another run is encoding this store's pictures, DiskError.
    """
    if not store.keeps:
        return cast(Array, _Encoded(checkpoint, store, accelerator))
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    path = store.path / f".latents-{checkpoint.weights_key('vae')[:16]}-{precision}.npy"
    partial = path.with_name(f"{path.name}.part")
    rgb = store["rgb"]
    height, width = (side // checkpoint.vae_scale_factor for side in rgb.shape[1:3])
    [missing] = broadcast_object_list([not path.is_file()])  # as the main process sees it, before any process writes
    if missing:
        busy = RequestError(f"another run is encoding the pictures of {store.path}. Wait until it begins to train.")

        def begin(claims: contextlib.ExitStack) -> None:
            claims.enter_context(locked(store.path / ".latents.lock", busy))
            _begin(partial, (len(rgb), checkpoint.latent_channels, height, width))

        with by_one(accelerator, begin), disk_errors(store.path):
            latents = np.load(partial, mmap_mode="r+")
            _encode(checkpoint, rgb, latents, accelerator)
            latents.flush()
            wait_for_all()
            if accelerator.is_main_process:
                os.replace(partial, path)
            wait_for_all()
    found: Array = np.load(path, mmap_mode="r")
    return found


def _begin(partial: Path, shape: tuple[int, ...]) -> None:
    """Creates latents that are all NaN, unless a run has begun them already. Raises DiskError."""
    for stale in set(partial.parent.glob(".latents-*.part")) - {partial}:
        stale.unlink()
    with contextlib.suppress(OSError, ValueError):  # a file that is shorter than its header says is invalid
        if np.load(partial, mmap_mode="r").shape == shape:
            return
    with disk_errors(partial.parent):
        check_space(partial.parent, math.prod(shape) * 2, "the latents of all pictures")
        one = np.full(shape[1:], np.nan, np.float16)
        with partial.open("wb") as file:  # written and not mapped: a full disk then raises an error here
            header = {"descr": np.lib.format.dtype_to_descr(one.dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(shape[0]):
                file.write(one.tobytes())


class _Encoded:
    """Latents of pictures, encoded on request."""

    def __init__(self, checkpoint: Checkpoint, store: Store, accelerator: Accelerator) -> None:
        rgb = store["rgb"]
        height, width = (side // checkpoint.vae_scale_factor for side in rgb.shape[1:3])
        self.shape = (len(store), checkpoint.latent_channels, height, width)
        self.checkpoint, self.rgb, self.accelerator = checkpoint, rgb, accelerator
        self.vae: Any = checkpoint.load_vae().to(accelerator.device)
        self.encoded: Callable[[int], Array] = lru_cache(maxsize=64)(self._encoded)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Array:
        return self.encoded(index)

    def _encoded(self, index: int) -> Array:
        latents = _latents(self.vae, self.rgb[index][None], self.accelerator)
        return np.asarray(latents[0].astype(np.float16))


@torch.no_grad()
def _latents(vae: Any, rgb: Array, accelerator: Accelerator) -> NDArray[np.float32]:
    pixels = torch.from_numpy(np.array(rgb)).to(accelerator.device).permute(0, 3, 1, 2)
    with accelerator.autocast():
        means = to_latents(vae.encode(pixels.float() / 127.5 - 1).latent_dist.mean.float(), vae.config)
    return np.asarray(means.cpu().numpy())


def _encode(checkpoint: Checkpoint, rgb: Array, latents: Array, accelerator: Accelerator) -> None:
    """This process's part of the pictures, where that is not done yet."""
    device, number = accelerator.device, accelerator.process_index
    vae: Any = checkpoint.load_vae().to(device)
    each = max(1, BATCH_PIXELS // (rgb.shape[1] * rgb.shape[2]))
    starts = range(number * each, len(rgb), accelerator.num_processes * each)
    for first in tqdm(starts, "latents", disable=not accelerator.is_main_process):
        if np.isnan(latents[first : first + each]).any():
            latents[first : first + each] = _latents(vae, rgb[first : first + each], accelerator)
