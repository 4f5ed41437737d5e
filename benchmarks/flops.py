"""Floating-point operations that were actually requested: rows evaluated × operations per row. A multiply-add is 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from realisid_trt.config import Branch
from realisid_trt.errors import RequestError
from realisid_trt.manifest import Manifest

if TYPE_CHECKING:
    import torch

    from export.checkpoint import Checkpoint

# The work between the networks, of engines and of the baselines: about a thousandth of all.
UNCOUNTED = {"crop_upsample", "relocate_merge", "guide_step", "crop", "merge", "guidance"}


def baseline_parts(table: Sequence[Branch]) -> dict[str, tuple[str, ...]]:
    """diffusers' module → the networks of an engine that do the work of its unmodified forward (DESIGN.md, "Networks").

    table: the branches.
    """
    nets = {
        f"controlnet_{branch.name}": tuple(f"{branch.name}_{part}" for part in ("time", "condition", "branch"))
        for branch in table
    }
    return {"unet": ("unet_time", "unet_encoder", "unet_decoder"), **nets, "vae": ("vae_decoder",)}


def flops_per_row(manifest: Manifest, height: int, width: int, checkpoint: Checkpoint | None) -> dict[str, int]:
    """Network, and module of the baselines → operations of one row at this picture size, px.

    At the model's own size they are in the manifest. At another size they are counted again, on the meta device:
    attention grows with the square of the size, so the counts cannot be scaled. Raises RequestError if they must be
    counted and `checkpoint` is None.
    """
    counts = {name: int(network["flops_per_row"]) for name, network in manifest.values["networks"].items()}
    if (height, width) != (manifest.model.default_size,) * 2:
        if checkpoint is None:
            side = manifest.model.default_size
            raise RequestError(
                f"the operations of a {width}×{height} px picture are counted from the checkpoint's configs; the "
                f"engine states {side}×{side} px only. Give --checkpoint too, or leave --height and --width out."
            )
        counts |= count_networks(checkpoint, height, width)
    modules = baseline_parts(manifest.config.table).items()
    return counts | {name: sum(counts[part] for part in parts) for name, parts in modules}


def count_networks(checkpoint: Checkpoint, height: int, width: int) -> dict[str, int]:
    """Network → operations of one row at this picture size, of those whose inputs depend on it. Reads no weights."""
    import torch

    from export.networks import Size, networks
    from export.truth.flops import flops_per_row as count

    coarsest = checkpoint.vae_scale_factor * 2 ** (checkpoint.levels - 1)
    units = {"height": height // coarsest, "width": width // coarsest}
    return {
        name: count(network, network.module(torch.float32), units)
        for name, network in networks(shapes_only(checkpoint)).items()
        if any(isinstance(size, Size) and size.unit in units for tap in network.inputs for size in tap.shape)
    }


def total_flops(rows: Mapping[str, int], per_row: Mapping[str, int]) -> int:
    """The operations of these rows. Raises KeyError for a network without a count, which would count as zero."""
    return sum(count * per_row[name] for name, count in rows.items() if name not in UNCOUNTED)


def shapes_only(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint; its modules have shapes but no weights."""
    return _Shapes(checkpoint)  # type: ignore[return-value]


class _Shapes:
    """A checkpoint whose modules have shapes but no weights."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def load_unet(self, dtype: torch.dtype) -> torch.nn.Module:
        return self._meta("unet")

    def load_vae(self, dtype: torch.dtype) -> torch.nn.Module:
        return self._meta("vae")

    def load_controlnet(self, which: str, dtype: torch.dtype) -> torch.nn.Module:
        return self._meta(f"controlnet_{which}")

    def _meta(self, component: str) -> torch.nn.Module:
        from export.checkpoint.classes import meta_module

        return meta_module(self._checkpoint.components[component]).eval()
