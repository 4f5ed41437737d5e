"""`inspect`: what an engine holds, and what is found in a photo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .conditions import pose_image
from .drawing import side_by_side, with_boxes, with_points
from .errors import PhotoError
from .faces import FaceFinder
from .manifest import Axis, Manifest
from .photo import load_photo
from .picture import to_pil

SHEET_PX = 512


def inspect_engine(path: str) -> tuple[dict[str, Any], list[str]]:
    """Networks, shapes, sizes, precision and parity of an engine directory, as JSON values and as lines."""
    manifest = Manifest.read(path)
    manifest.check_files()
    values, model = manifest.values, manifest.model
    files = values["files"]
    lines = [
        f"{manifest.path}: {values['name']}, {sum(f['bytes'] for f in files.values()) / 1e6:.1f} MB in {len(files)} "
        "files, every hash verified",
        f"pictures of {model.default_size} px by default, VAE factor {model.vae_scale_factor}, {model.levels} levels, "
        f"{len(model.residual_levels)} residuals, {model.num_id_tokens} ID tokens",
        "realisid_config: " + ", ".join(f"{key}={value}" for key, value in values["realisid_config"].items()),
        f"scheduler: DDIM, {values['scheduler']['prediction_type']}, {values['scheduler']['timestep_spacing']} spacing",
        "made by: " + ", ".join(f"{name} {version}" for name, version in values["made_by"].items()),
    ]
    for backend, facts in values["backends"].items():
        lines += ["", f"{backend}: " + ", ".join(f"{key} {value}" for key, value in facts.items())]
        lines.append(f"{'network':<18}{'precision':<10}{'MB':>8}{'GFLOP/row':>11}{'parity':>9}  inputs → outputs")
        for name, network in manifest.networks(backend).items():
            build = values["networks"][name]["builds"][backend]
            size = sum(f["bytes"] for file, f in files.items() if file.startswith(build["file"])) / 1e6
            ports = [
                ", ".join(f"{p.name}{p}" for p in side[:4]) + (", …" if len(side) > 4 else "")
                for side in (network.inputs, network.outputs)
            ]
            lines.append(
                f"{name:<18}{build['precision']:<10}{size:>8.2f}"
                f"{values['networks'][name]['flops_per_row'] / 1e9:>11.3f}"
                f"{build['parity']['ratio']:>8.2f}×  {' → '.join(ports)}"
            )
        ranges = {
            str(size)
            for n in manifest.networks(backend).values()
            for p in n.inputs
            for size in p.shape
            if isinstance(size, Axis)
        }
        lines.append("ranges: " + "; ".join(sorted(ranges)))
    lines.append("parity: RMS error over that of the torch module in the same precision, both against float64")
    if verified := values["verified"]:
        lines.append(
            f"whole engine: final latents of two persons err {verified['ratio']:.2f} times what float32 torch errs"
        )
    return {key: value for key, value in values.items() if key != "seal"}, lines


def inspect_photo(path: str, engine: str, face: int | None) -> tuple[dict[str, Any], list[str], Image.Image]:
    """Every face of a photo numbered from the left, and the chosen one's landmarks, crop and pose, on one sheet."""
    manifest = Manifest.read(engine)
    manifest.check_files()
    finder = FaceFinder.load(manifest.path / "faces")
    rgb = load_photo(path, path)
    try:
        found = finder.find(rgb, path, face=face)
    except PhotoError as error:
        boxes = finder.detector.detect(rgb).boxes
        if not len(boxes):
            raise
        boxes = boxes[np.argsort(boxes[:, 0])]
        photo = with_boxes(Image.fromarray(rgb), boxes.tolist(), first=0)
        return (
            {"faces": boxes.tolist(), "chosen": None, "why": str(error)},
            [str(error)],
            side_by_side([photo], SHEET_PX),
        )
    turned = np.ascontiguousarray(np.rot90(rgb, found.turns))
    boxes = finder.detector.detect(turned).boxes
    boxes = boxes[np.argsort(boxes[:, 0])]
    crop, mask_source = finder.crop(rgb, found, SHEET_PX, manifest.config.face_margin)
    x0, y0, x1, _ = found.square
    photo = with_points(Image.fromarray(turned), found.landmarks * (x1 - x0) + (x0, y0))
    photo = with_boxes(photo, boxes.tolist(), first=0)
    pose = pose_image(found.landmarks, SHEET_PX, manifest.config.pose_style).transpose(1, 2, 0)
    sheet = side_by_side([photo, Image.fromarray(crop), to_pil(pose)], SHEET_PX)
    result = {
        "faces": boxes.tolist(),
        "chosen": {"box": found.box, "square": found.square, "turns": found.turns},
        "mask_source": mask_source,
        "models": finder.model_id,
        "notes": found.notes,
    }
    lines = [
        f"{Path(path).name}: {len(boxes)} face{'s' * (len(boxes) != 1)}; taken: the one at "
        f"({', '.join(f'{v:.1f}' for v in found.box)}) px, background removed by {mask_source}",
        *(f"note: {note}" for note in found.notes),
    ]
    return result, lines, sheet
