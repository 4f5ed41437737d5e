"""Floating-point operations that were actually requested: rows evaluated × operations per row. A multiply-add is 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from realisid_trt.branches import Branch
from realisid_trt.errors import RequestError
from realisid_trt.manifest import Manifest

if TYPE_CHECKING:
    import torch

    from export.checkpoint import Checkpoint

PHASES = ("without_id", "with_id")
PerRow = Mapping[str, Mapping[str, int]]  # operations by phase, then by network
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


class Operations:
    """The operations of one row of every network, and of every module of the baselines, at one picture size.

    Where rows read the text and the IDs, they depend on the number of tokens too: before the ID is switched on a row
    may have fewer of them, and later it has more for every person.
    """

    def __init__(self, manifest: Manifest, height: int, width: int, checkpoint: Checkpoint | None) -> None:
        """height, width: px. checkpoint: counts what the manifest does not state."""
        self._manifest, self._size, self._checkpoint = manifest, (height, width), checkpoint
        self._counted: dict[int | None, dict[str, int]] = {}

    def of(self, persons: int) -> PerRow:
        """ "without_id" and "with_id" → network → operations of a row in such a step. Raises RequestError."""
        found = {}
        for phase in PHASES:
            tokens = tokens_of(self._manifest, persons, phase == "with_id")
            if tokens not in self._counted:
                self._counted[tokens] = flops_per_row(self._manifest, *self._size, self._checkpoint, tokens)
            found[phase] = self._counted[tokens]
        return found


def tokens_of(manifest: Manifest, persons: int, with_id: bool) -> int | None:
    """Tokens of a row that reads the text and the IDs of these persons; None for an engine without such rows."""
    config, model = manifest.config, manifest.model
    if config.unet_tokens != "text_and_id":
        return None
    absent = not with_id and config.delayed_id == "absent"
    length: int = next(iter(model.tokenizers.values())).max_length
    return length + (0 if absent else persons * model.num_id_tokens)


def flops_per_row(
    manifest: Manifest, height: int, width: int, checkpoint: Checkpoint | None, tokens: int | None = None
) -> dict[str, int]:
    """Network, and module of the baselines → operations of one row at this picture size, px.

    tokens: of rows that read the text and the IDs; None takes those of one person.

    At the model's own size and for one person they are in the manifest. Others are counted again, on the meta device:
    attention grows with the square of the size, so the counts cannot be scaled. Raises RequestError if they must be
    counted and `checkpoint` is None.
    """
    counts = {name: int(network["flops_per_row"]) for name, network in manifest.values["networks"].items()}
    listed = tokens_of(manifest, 1, with_id=True)
    side, stated = manifest.model.default_size, ""
    if (height, width) != (side, side):
        stated = f"of a {width}×{height} px picture are counted from the checkpoint's configs; the engine states "
        stated += f"{side}×{side} px only. Give --checkpoint too, or leave --height and --width out"
    elif tokens not in (None, listed):
        stated = f"of rows of {tokens} tokens are counted from the checkpoint's configs; the engine states those of "
        stated += f"{listed} tokens only. Give --checkpoint too"
    if stated:
        if checkpoint is None:
            raise RequestError(f"the operations {stated}.")
        counts |= count_networks(checkpoint, height, width, tokens)
    modules = baseline_parts(manifest.config.table).items()
    return counts | {name: sum(counts[part] for part in parts) for name, parts in modules}


def count_networks(checkpoint: Checkpoint, height: int, width: int, tokens: int | None = None) -> dict[str, int]:
    """Network → operations of one row at this picture size, of those whose inputs depend on it. Reads no weights.

    tokens: of rows that read the text and the IDs; None takes those of one person.
    """
    import torch

    from export.networks import Size, networks
    from export.truth.flops import flops_per_row as count

    coarsest = checkpoint.vae_scale_factor * 2 ** (checkpoint.levels - 1)
    units = {"height": height // coarsest, "width": width // coarsest}
    units["tokens"] = checkpoint.max_length + checkpoint.num_id_tokens if tokens is None else tokens
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
