"""How a checkpoint of published weights is written: its options, its folder, and what is known when it is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from realisid_trt.errors import DiskError
from realisid_trt.manifest import FACE_ENCODER

from ..checkpoint import Checkpoint
from ..checkpoint.licences import LicenceLine
from ..files import check_space, disk_errors, sync, whole_folder
from ..forms import FLOAT32_NETWORKS
from ..networks import networks
from .nets import Net
from .weights import needed_bytes, write_net

CONFIG = "realisid_config.json"
RESERVE_BYTES = 64 * 2**20  # for everything but weights
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class AdoptOptions:
    """How a checkpoint is written. The command line takes its defaults from here.

    half:    write the new ControlNets and projections in float16, whatever the source has.
    copy:    copy weights instead of linking them.
    variant: of the weight files of nets, base and checkpoint, such as "fp16"; a folder without it uses its plain files.
    """

    half: bool = False
    copy: bool = False
    variant: str | None = None


DEFAULTS = AdoptOptions()


@dataclass(frozen=True)
class Adopted:
    """A published checkpoint.

    branches: names of all rows. licences: of all parts.
    engine_bytes: of an engine built with --fp16 --gpu-only. loop_bytes: of its networks that every step runs, which
                  stay on the GPU.
    """

    path: Path
    branches: tuple[str, ...]
    licences: list[LicenceLine]
    engine_bytes: int
    loop_bytes: int


@contextmanager
def published(target: Path, nets: Sequence[Net], options: AdoptOptions, more_bytes: int) -> Iterator[Path]:
    """The temporary folder of the checkpoint. Published when the block succeeds; the block writes the nets.

    more_bytes: the disk space of what it writes besides the nets. Raises DiskError.
    """
    needed = sum(needed_bytes(net, target, options.half, options.copy) for net in nets) + more_bytes
    check_space(target.parent, needed + RESERVE_BYTES, "the checkpoint")
    try:
        with whole_folder(target) as partial, disk_errors(target.parent):
            yield partial
            for path in (*partial.rglob("*"), partial):
                sync(path)
    except (OSError, SafetensorError) as error:  # errors that disk_errors does not convert; safetensors' have no errno
        raise DiskError(f"{target} could not be written: {error}. Free some space, or choose another --out.") from error


def write_nets(nets: Sequence[Net], partial: Path, options: AdoptOptions, report: Report) -> None:
    """Writes the folders of the nets. Raises CheckpointError for NaN, infinite and too large numbers."""
    for net in nets:
        how = write_net(net, partial / net.component.name, options.half, options.copy)
        report(f"{net.request.name}: {size_text(net.bytes)} of {net.request.folder} {how}")


def checked(partial: Path, base: Path | None, variant: str | None) -> Checkpoint:
    """The new checkpoint, opened as the build opens it. Raises CheckpointError."""
    checkpoint = Checkpoint.open(partial, base_model=base, variant=variant, local_files_only=True)
    checkpoint.check_weights()
    return checkpoint


def adopted_at(target: Path, checkpoint: Checkpoint, lines: list[LicenceLine]) -> Adopted:
    """What was made, and what its engine will weigh."""
    found = networks(checkpoint)
    sizes = {name: net.elements(checkpoint) * (4 if name in FLOAT32_NETWORKS else 2) for name, net in found.items()}
    loop = {name for name in sizes if name.endswith("_branch") or name in ("unet_encoder", "unet_decoder")}
    names = tuple(row.name for row in checkpoint.config.table)
    encoder = checkpoint.face_encoder
    more = (checkpoint.folders[FACE_ENCODER] / encoder.file).stat().st_size if encoder else 0
    return Adopted(target, names, lines, sum(sizes.values()) + more, sum(sizes[name] for name in loop))


def size_text(size: int) -> str:
    """ "2.50 GB", "17.7 MB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file for people."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
