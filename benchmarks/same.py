"""The conditions of a meaningful ratio: the same weights, the same arithmetic, the same picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from realisid_trt.errors import CheckpointError, RequestError
from realisid_trt.manifest import Manifest

from .measure import Run, relative_rms

if TYPE_CHECKING:
    from export.checkpoint import Checkpoint

# The largest difference of the final latents of two contenders that do the same work, relative RMS.
# float32: half of its digits. float16: each of the two may lie 1e-2 from float32 (2⁻¹¹ per rounding, grown 8.57-fold by
# Eq. (8), over the steps; plain torch's error is up to 7e-3 on the miniatures), so twice that between them. bfloat16
# rounds eight times as coarsely. Another prompt, or a person too few, makes 0.3 or more; another ID makes 0.05 to 0.1,
# which bfloat16 cannot distinguish.
SAME = {"float32": 2.0**-11.5, "float16": 2 * 1e-2, "bfloat16": 2 * 8 * 1e-2}


def open_original(
    manifest: Manifest, path: Path | None, base_model: str | None = None, variant: str | None = None
) -> Checkpoint:
    """The checkpoint that an engine was built from. None for an argument: as at the build. Raises CheckpointError."""
    from export.building.origins import recall
    from export.checkpoint import Checkpoint  # imports torch, which an engine alone does not need

    given = {"path": path, "base_model": base_model, "variant": variant}
    origin: dict[str, Any] = recall(manifest.values) | {key: value for key, value in given.items() if value is not None}
    if "path" not in origin:
        raise CheckpointError(
            f"The path of the checkpoint of {manifest.path} is not known on this machine, and a baseline needs its "
            "weights. Give --checkpoint CKPT, or --baseline none."
        )
    checkpoint = Checkpoint.open(**origin)
    check_same_weights(manifest, checkpoint)
    return checkpoint


def check_same_arithmetic(device: str, precision: str) -> None:
    """Raises RequestError unless a baseline can compute as the engine: in float32 on a CPU, in any precision on a GPU.

    `torch_device.beside` checks whether torch can use that GPU.
    """
    kind = device.partition(":")[0]
    if kind != "cuda" and (kind, precision) != ("cpu", "float32"):
        raise RequestError(
            f"a baseline computes float32 on a CPU, or in the engine's precision on its GPU; this engine computes "
            f"{precision} on {device}: a ratio of the two is meaningless. Measure the engine alone with "
            "--baseline none, or give --device cpu."
        )


def check_same_weights(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError unless the engine was built from exactly these weights and this configuration."""
    listed = manifest.values
    built, now = (vars(config.resolved()) for config in (manifest.config, checkpoint.config))
    different = [key for key, value in now.items() if built[key] != value]
    different += [name for name, key in listed["checkpoint"].items() if checkpoint.weights_key(name) != key]
    if different:
        raise CheckpointError(
            f"{manifest.path} was not built from {checkpoint.path}: {', '.join(different)} differ. A speed ratio "
            "between two models is meaningless. Give the checkpoint that the engine was built from, or build it again."
        )


def check_same_picture(engine: Run, baseline: Run, precision: str = "float32") -> float:
    """The relative RMS difference of the final latents.

    Raises CheckpointError if it is more than this precision explains: then the two did not do the same work.
    """
    difference = relative_rms(engine.latents, baseline.latents)
    if not difference <= SAME[precision]:
        raise CheckpointError(
            f"engine and baseline make different pictures: their final latents differ by {difference:.1e} (relative "
            f"RMS), where {precision} arithmetic leaves less than {SAME[precision]:.1e}. The engine was built from "
            "other weights: give the checkpoint that it was built from, or build it again."
        )
    return difference
