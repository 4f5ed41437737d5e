"""ID-Patch as it is published (ByteDance/ID-Patch) → a checkpoint.

ControlNetModel/ ─► controlnet_id_patch/ · id-patch.bin ─► id_projection/, id_patch_projection/ · FILE ─► face_encoder/
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import CheckpointError
from realisid_trt.files import VerifiedFiles
from realisid_trt.manifest import FACE_ENCODER

from ..checkpoint.classes import full_config
from ..checkpoint.face_encoder import WIDTH, FaceEncoder
from ..checkpoint.files import ID_PATCH_PICKLE, readable, stem_of
from ..checkpoint.folders import HUB_ID
from ..checkpoint.licences import LicenceLine
from .face_encoders import EncoderRequest
from .licences import licence_line, source_name
from .nets import Net, NetRequest, check_fit
from .places import INDEX, MADE_BY, Base, free_target
from .projections import Projection, read_projections
from .publishing import (
    CONFIG,
    DEFAULTS,
    Adopted,
    AdoptOptions,
    Report,
    adopted_at,
    checked,
    published,
    size_text,
    write_json,
    write_nets,
)
from .same_person import check_same_person, lines_of
from .schedule import FILE, read_schedule
from .weights import common_dtype, write_tensors

NET = "ControlNetModel"  # its folder
ROW = "id_patch"
ENCODER = "ir_se50"  # that the published projections were trained with
POINTS = "mtcnn-whole"  # the five points by which its training aligned faces
RESTRICTED = "openrail"  # licences whose restrictions of use travel with copies


def adopt_idpatch(
    weights: str | Path,
    base: str,
    out: str | Path,
    face_encoder: str | Path,
    colour: str | None = None,
    norm: str | None = None,
    check: Sequence[str | Path] | None = None,
    options: AdoptOptions = DEFAULTS,
    report: Report = lambda line: None,
) -> Adopted:
    """A checkpoint of ID-Patch: pictures of given persons, each where its patch is.

    weights:      folder with ControlNetModel/ and id-patch.bin. base: as in `adopt_controlnets`, a model of SDXL.
    face_encoder: weights of ir_se50 (.pth), or an ONNX file, for which colour ("rgb" or "bgr") and norm ("unit" or
                  "raw") must be given unless its hash is known.
    check:        three photos, two of one person and one of another; the encoder must tell them apart.
    options:      `half` converts the projections too.

    Raises RequestError, CheckpointError, PhotoError, BuildError or DiskError; nothing is published then.
    """
    folder = Path(os.path.expanduser(weights))
    _check_folder(folder)
    request = EncoderRequest.of(face_encoder, colour, norm)
    request.check()
    found = Base.find(base, options.variant)
    net = Net.open(NetRequest(ROW, folder / NET, {}), options.variant)
    parts = {name: full_config(component) for name, component in found.parts.items()}
    net.check_family(parts["unet"], base)
    projections = read_projections(folder / ID_PATCH_PICKLE, parts["unet"]["cross_attention_dim"], WIDTH)
    target = free_target(out, [found.folder, folder, request.file])
    schedule = read_schedule(found.folder / "scheduler")
    patch_px = math.isqrt(projections[1].config["output_dim"])
    values: dict[str, Any] = {"method": "idpatch", **schedule.config}
    if patch_px != RealisIDConfig.from_dict(values).patch_px:
        values["patch_px"] = patch_px
    config = RealisIDConfig.from_dict(values, "the new checkpoint")
    more = sum(projection.numbers * _dtype(projection, options).itemsize for projection in projections)
    with published(target, [net], options, more + request.file.stat().st_size) as partial:
        encoder = request.write(partial / FACE_ENCODER, POINTS)
        _report_encoder(encoder, request, report)
        configs = {projection.part: projection.config for projection in projections}
        check_fit([net], {**parts, **configs}, config, found.texts, base, encoder)
        if check is not None:
            tested = check_same_person(partial / FACE_ENCODER, encoder, check)
            for said in lines_of(tested, encoder):
                report(said)
            patches = [projections[1](torch.from_numpy(embedding)) for embedding in tested.embeddings]
            ranges = ", ".join(f"{float(each.min()):.2f} … {float(each.max()):.2f}" for each in patches)
            report(f"check: patches of the three photos from {ranges} (a drawing has 0 … 1; they are not clipped)")
        for projection in projections:
            _write_projection(projection, partial, options, folder, report)
        write_nets([net], partial, options, report)
        _report_hashes([*net.component.files, folder / ID_PATCH_PICKLE, request.file], report)
        (partial / "scheduler").mkdir()
        write_json(partial / "scheduler" / FILE, schedule.scheduler)
        write_json(partial / CONFIG, values)
        lines = _licences(folder, encoder, request, base if found.is_hub else source_name(found.folder), found.folder)
        index = {
            "base_model": found.reference(target),
            net.component.name: ["diffusers", net.component.class_name],
            "scheduler": ["diffusers", "DDIMScheduler"],
        }
        write_json(
            partial / INDEX, {"_class_name": "RealisIDPipeline", "_made_by": MADE_BY, **index, "licences": lines}
        )
        adopted = adopted_at(target, checked(partial, found.folder, options.variant), lines)
    for said in schedule.said:
        report(said)
    for source, licence in dict.fromkeys((line["source"], line["licence"] or "") for line in lines):
        if RESTRICTED in licence.lower().replace(" ", ""):
            report(
                f"{source}: the restrictions of use in its licence ({licence}) travel with every copy of the weights, "
                "also inside of the checkpoint and of engines"
            )
    return adopted


def _check_folder(folder: Path) -> None:
    """Raises CheckpointError unless the folder holds what ID-Patch publishes."""
    with readable(folder):
        if not folder.is_dir():
            hint = "Download it first: hf download ByteDance/ID-Patch --local-dir FOLDER."
            what = "is a file" if folder.exists() else "does not exist"
            named = " Only --base may be the id of a hub model." if HUB_ID.fullmatch(str(folder)) else ""
            raise CheckpointError(
                f"{folder} {what}, expected a folder with {NET}/ and {ID_PATCH_PICKLE}.{named} {hint}"
            )
        lacking = [
            name for name, is_there in ((f"{NET}/", (folder / NET).is_dir()),
                                        (ID_PATCH_PICKLE, (folder / ID_PATCH_PICKLE).is_file())) if not is_there
        ]  # fmt: skip
        if lacking:
            raise CheckpointError(
                f"{folder} lacks {' and '.join(lacking)}, expected {NET}/ and {ID_PATCH_PICKLE} as ByteDance/ID-Patch "
                "publishes them. Download the whole folder again, or name the folder that holds them."
            )


def _dtype(projection: Projection, options: AdoptOptions) -> torch.dtype:
    return common_dtype({tensor.dtype for tensor in projection.tensors.values()}, options.half)


def _write_projection(
    projection: Projection, partial: Path, options: AdoptOptions, folder: Path, report: Report
) -> None:
    """One folder, and lines on shapes and on what an embedding of zeros gives."""
    config, tensors = projection.config, projection.tensors
    source = folder / ID_PATCH_PICKLE
    write_tensors(partial / projection.part, stem_of(projection.part), config, tensors, options.half, source)
    report(
        f"{projection.part}: {len(tensors)} tensors, {projection.numbers / 1e6:.2f} M numbers, "
        f"{size_text(projection.numbers * _dtype(projection, options).itemsize)}; embedding of "
        f"{config['embedding_dim']} → {config['num_queries']} × {config['output_dim']} (dim {config['dim']}, depth "
        f"{config['depth']}, {config['heads']} heads of {config['dim_head']})"
    )
    nobody = projection.of_zeros()
    report(
        f"{projection.part} of an embedding of zeros: mean {float(nobody.mean()):.4f}, standard deviation "
        f"{float(nobody.std()):.4f}, from {float(nobody.min()):.2f} to {float(nobody.max()):.2f}"
    )


def _report_encoder(encoder: FaceEncoder, request: EncoderRequest, report: Report) -> None:
    report(
        f"face encoder: {encoder.name} of {request.file}; colours {encoder.colour}, embeddings {encoder.norm}, input "
        f"(x - {encoder.mean:g})/{encoder.std:g}, points {encoder.points}, sha256 {encoder.sha256}"
    )
    if unlike := request.unlike(encoder.name):
        report(f"note: {unlike}")
    if encoder.name != ENCODER:
        report(
            f"note: the published ID-Patch was trained with {ENCODER}. {encoder.name} gives {encoder.output_dim} "
            "numbers too, and they mean other faces: keep it only if these weights were trained with it"
        )


def _report_hashes(files: Sequence[Path], report: Report) -> None:
    with VerifiedFiles() as verified:
        for file in files:
            report(f"sha256 of {file}: {verified.sha256(file)}")


def _licences(
    folder: Path, encoder: FaceEncoder, request: EncoderRequest, base: str, base_folder: Path
) -> list[LicenceLine]:
    name = source_name(Path(os.path.abspath(folder)))
    parts: Mapping[str, list[Path]] = {
        f"controlnet_{ROW}": [folder / NET, folder], "id_projection": [folder], "id_patch_projection": [folder],
    }  # fmt: skip
    lines = [licence_line(part, name, folders) for part, folders in parts.items()]
    lines.append({"part": FACE_ENCODER, "licence": encoder.licence, "source": f"{encoder.name}, {request.file.name}"})
    return [*lines, licence_line("base_model", base, [base_folder])]
