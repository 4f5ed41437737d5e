"""Random weights with stable activations: each tensor has its own stream, and its scale keeps activations in range."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from realisid_trt.machine import available_cores

SHARD_BYTES = 2**30
SILU_GAIN = 1.68  # 1/√E[silu(n)²] for a standard normal n: restores unit variance after a SiLU
CARRY = 1.1  # weight of the carried noise in the prediction; see carry_noise

# Pattern of the key → standard deviation of the matrix's outputs for inputs of unit variance; the first match counts.
# A name instead of a number multiplies branch_gain, the share that a residual branch adds to its stream.
GAINS: tuple[tuple[str, float | str], ...] = (
    (r"^controlnet_(down_blocks\.\d+|mid_block)\.", 0.4),  # "zero" convolutions, not zero: the branches act
    (r"controlnet_cond_embedding\.conv_out\.", 2 * SILU_GAIN),  # drawings are mostly black
    (r"controlnet_cond_embedding\.blocks\.\d+\.", SILU_GAIN),
    (r"attn2\.to_out\.0\.", "double"),  # text and ID tokens act more strongly than the rest
    (r"time_emb_proj\.", 0.5 * SILU_GAIN),
    (r"(time|add)_embedding\.linear_1\.", 1.4),  # sinusoids have a variance of one half
    (r"(time|add)_embedding\.linear_2\.", SILU_GAIN),
    (r"(to_q|to_k|q_proj|k_proj|to_kv)\.", 1.5),  # attention that is not uniform
    (r"decoder\.conv_out\.", 0.5 * SILU_GAIN),  # pictures mostly inside [-1, 1]
    (r"conv_out\.|\.conv1\.", SILU_GAIN),
    (r"\.conv2\.", "silu"),
    (r"(\.to_out(\.0)?|out_proj|fc2|net\.2|attentions\.\d+\.proj_out|layers\.\d+\.1\.3)\.", "branch"),
)
BRANCH_GAINS = {"branch": 1.0, "silu": SILU_GAIN, "double": 2.0}
# Tensors other than matrices, norms and biases: plain noise of this standard deviation.
SPREADS = {
    "token_embedding": 1.0, "position_embedding": 0.3, "class_embedding": 1.0, "latents": 1.0, "null_id_tokens": 1.0,
}  # fmt: skip


CARRY_KEYS = ("block_out_channels", "layers_per_block", "in_channels", "norm_num_groups")  # of the UNet's config


@dataclass(frozen=True)
class Weights:
    """All weights of a checkpoint that `make_checkpoint` makes, each drawn on request.

    seed, branch_gain: as in `draw`.
    dtype:  as the checkpoint stores them.
    unet:   CARRY_KEYS of the UNet's config, where it predicts ε and carries its noise; else None.
    """

    seed: int
    branch_gain: float
    dtype: torch.dtype
    unet: Mapping[str, Any] | None

    def draw(self, component: str, key: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor as it is stored."""
        tensor = draw(self.seed, component, key, shape, self.branch_gain)
        if component == "unet" and self.unet is not None:
            carry_noise(key, tensor, self.unet)
        return tensor.to(self.dtype).contiguous()


@contextmanager
def drawing_threads() -> Iterator[ThreadPoolExecutor]:
    """A pool of one thread per core: NumPy draws without Python's lock. Torch runs on one thread meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(available_cores()) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def draw(seed: int, component: str, key: str, shape: tuple[int, ...], branch_gain: float = 0.5) -> Tensor:
    """One tensor, float32. The same (seed, component, key) gives the same numbers, independent of other draws.

    shape: of the tensor. Matrices and kernels are (out, in, …) and get gain/√fan_in; norms 1 ± 0.05; biases 0 ± 0.05.
    branch_gain: share that a residual branch adds to its stream; smaller for deep nets, which would overflow half
                 precision.
    """
    digest = hashlib.sha256(f"{seed}/{component}/{key}".encode()).digest()
    stream = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
    noise = torch.from_numpy(stream.standard_normal(shape, dtype=np.float32))
    spread = next((spread for name, spread in SPREADS.items() if name in key), None)
    if spread is not None:
        return noise.mul_(spread)
    if len(shape) == 1:
        return noise.mul_(0.05) if key.endswith("bias") else noise.mul_(0.05).add_(1)
    gain = next((gain for pattern, gain in GAINS if re.search(pattern, key)), 1.0)
    if isinstance(gain, str):
        gain = branch_gain * BRANCH_GAINS[gain]
    return noise.mul_(gain / math.sqrt(math.prod(shape[1:])))


def carry_noise(key: str, tensor: Tensor, config: Mapping[str, Any]) -> None:
    """Makes a random ε-UNet predict roughly its own input. In place; changes three tensors, ignores the others.

    If ε ignores z_t, the steps of DDIM multiply the latents by 1/√ᾱ_T ≈ 14, and the conditions have no visible effect.
    Latent channel i is carried as a pair (+z, −z) in channels g·i and g·i + 1, both of norm group i of g channels:
    conv_in → first skip → shortcut of the last resnet → norm → silu(a) − silu(−a) = a → conv_out.
    config: of the UNet.
    """
    widths, layers, latents = config["block_out_channels"], config["layers_per_block"], config["in_channels"]
    last_shortcut = f"up_blocks.{len(widths) - 1}.resnets.{layers}.conv_shortcut.weight"
    group = widths[0] // config["norm_num_groups"]
    for i, (plus, minus) in enumerate((group * i, group * i + 1) for i in range(latents)):
        if key == "conv_in.weight":  # (channels, latents, 3, 3)
            tensor[[plus, minus]] = 0
            tensor[plus, i, 1, 1], tensor[minus, i, 1, 1] = 1, -1
        elif key == last_shortcut:  # (channels, hidden + skip, 1, 1): the skip comes last
            tensor[[plus, minus]] *= 0.3
            tensor[plus, plus - widths[0]] = tensor[minus, minus - widths[0]] = 1
        elif key == "conv_out.weight":  # (latents, channels, 3, 3)
            tensor[i] *= 0.4
            tensor[i, plus, 1, 1] += CARRY
            tensor[i, minus, 1, 1] -= CARRY


def write_weights(
    folder: Path,
    stem: str,
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str, tuple[int, ...]], Tensor],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
    wrote: Callable[[int], object] = lambda size: None,
) -> None:
    """`stem`.safetensors, or shards with their index when the tensors take more than `shard_bytes`.

    shapes: key → shape of every tensor.
    make:   (key, shape) → its values; called by several threads at once. Only one shard is in memory at a time.
    wrote:  called with the bytes of every tensor made, for a progress bar.
    """
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    sizes = {key: math.prod(shape) * dtype.itemsize for key, shape in shapes.items()}
    for key, shape in shapes.items():
        if shards[-1] and sum(sizes[k] for k in shards[-1]) + sizes[key] > shard_bytes:
            shards.append({})
        shards[-1][key] = shape
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
        tensors: dict[str, Tensor] = {}
        with drawing_threads() as pool:
            for key, tensor in zip(shard, pool.map(make, shard, shard.values()), strict=True):
                tensors[key] = tensor.to(dtype).contiguous()
                wrote(sizes[key])
        save_file(tensors, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(folder.stat().st_mode & 0o666)  # safetensors writes files that only their owner may read
        weight_map.update(dict.fromkeys(shard, name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
