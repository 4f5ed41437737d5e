"""Published weights → a checkpoint that `python -m export.build` accepts.

    python -m export.adopt controlnet --net openpose=FOLDER --base SDXL --out CKPT
    python -m export.adopt idpatch --weights ID-Patch --base SDXL --face-encoder FILE --out CKPT

A published ControlNet becomes a row of the checkpoint's table of branches. ID-Patch has projections and a face encoder
besides (idpatch.py). Sources are only read; weights are linked, copied or converted, and the base model is referred to.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from realisid_trt.branches import FACE_STYLES, Branch
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import CheckpointError, RequestError

from ..checkpoint import Checkpoint
from ..checkpoint.classes import full_config
from ..checkpoint.files import BRANCH, PICKLES, read_json
from ..checkpoint.licences import LicenceLine, read_licences
from .idpatch import adopt_idpatch
from .licences import licence_line, source_name
from .nets import Net, NetRequest, check_fit
from .places import INDEX, MADE_BY, Base, free_target
from .publishing import (
    CONFIG,
    DEFAULTS,
    Adopted,
    AdoptOptions,
    Report,
    adopted_at,
    checked,
    published,
    write_json,
    write_nets,
)
from .schedule import FILE, read_schedule
from .weights import link_or_copy, same_disk

__all__ = [
    "AdoptOptions",
    "Adopted",
    "NetRequest",
    "add_controlnets",
    "adopt_controlnets",
    "adopt_idpatch",
    "adopt_mediapipe_face",
]

ZEROS = "force_zeros_for_empty_prompt"
SD15_FOLDER = "diffusion_sd15"  # of CrucibleAI/ControlNetMediaPipeFace, whose root is a net of SD 2.1


def adopt_controlnets(
    requests: Sequence[NetRequest],
    base: str,
    out: str | Path,
    options: AdoptOptions = DEFAULTS,
    report: Report = lambda line: None,
) -> Adopted:
    """A checkpoint of text and controls, without identities.

    requests: the rows of its table, in this order. base: folder of a model in diffusers' layout, or the id of a hub
              model in this machine's cache; it is referred to, not copied.
    report:   called with a line for each net, and with what is said of the sampler.

    Raises RequestError, CheckpointError or DiskError; nothing is published then.
    """
    _check_names(requests, ())
    found = Base.find(base, options.variant)
    nets = [Net.open(request, options.variant) for request in requests]
    target = free_target(out, [found.folder, *(request.folder for request in requests)])
    schedule = read_schedule(found.folder / "scheduler")
    parts = {name: full_config(component) for name, component in found.parts.items()}
    pooled = "per_row" if parts["unet"]["addition_embed_type"] else "zeros"
    # SDXL says that zeros stand for an absent prompt; SD 1.5 says nothing, and means the empty text
    values = {"method": "controlnet", "branches": _rows(nets, pooled), ZEROS: bool(found.index.get(ZEROS, False))}
    values |= schedule.config
    config = RealisIDConfig.from_dict(values, "the new checkpoint")
    check_fit(nets, parts, config, found.texts, base)
    lines = [_line(net) for net in nets]
    lines.append(licence_line("base_model", base if found.is_hub else source_name(found.folder), [found.folder]))
    with published(target, nets, options, 0) as partial:
        write_nets(nets, partial, options, report)
        (partial / "scheduler").mkdir()
        write_json(partial / "scheduler" / FILE, schedule.scheduler)
        write_json(partial / CONFIG, config.to_dict())
        index = {"base_model": found.reference(target), **_entries(nets), "scheduler": ["diffusers", "DDIMScheduler"]}
        write_json(
            partial / INDEX, {"_class_name": "RealisIDPipeline", "_made_by": MADE_BY, **index, "licences": lines}
        )
        adopted = adopted_at(target, checked(partial, found.folder, options.variant), lines)
    for said in schedule.said:
        report(said)
    return adopted


def adopt_mediapipe_face(
    weights: str | Path,
    base: str,
    out: str | Path,
    options: AdoptOptions = DEFAULTS,
    report: Report = lambda line: None,
) -> Adopted:
    """A checkpoint that draws faces with a MediaPipe mesh as CrucibleAI/ControlNetMediaPipeFace reads it.

    weights: its folder, or the folder of the SD 1.5 net inside. The rest as in `adopt_controlnets`.
    """
    folder = Path(os.path.expanduser(weights))
    if os.path.isfile(folder / SD15_FOLDER / "config.json"):
        folder /= SD15_FOLDER
    return adopt_controlnets([NetRequest("face", folder, {"style": "mediapipe-face"})], base, out, options, report)


def add_controlnets(
    requests: Sequence[NetRequest],
    checkpoint: str | Path,
    out: str | Path,
    options: AdoptOptions = DEFAULTS,
    report: Report = lambda line: None,
) -> Adopted:
    """The same checkpoint with more rows. Everything else, such as its schedule and its sampler, stays as it is.

    report, and what is raised: as in `adopt_controlnets`.
    """
    source = Path(os.path.abspath(os.path.expanduser(checkpoint)))
    given = Checkpoint.open(source, variant=options.variant, local_files_only=True)
    given.check_weights()
    _check_names(requests, [row.name for row in given.config.table])
    nets = [Net.open(request, options.variant) for request in requests]
    bases = [given.base] if given.base else []
    target = free_target(out, [source, *bases, *(request.folder for request in requests)])
    values = read_json(source / CONFIG, "it says what the weights were trained with")
    values.pop("branch_pooled_text", None)  # each row says it
    rows = [dataclasses.asdict(row) for row in given.config.table]
    values["branches"] = [*rows, *_rows(nets, "per_row" if given.has_added_conditions else "zeros")]
    config = RealisIDConfig.from_dict(values, str(source / CONFIG))
    values["branches"] = [dataclasses.asdict(row) for row in config.table]
    parts = {name: full_config(component) for name, component in given.components.items()}
    if config.id_input == "face_crop":
        file = given.folders["feature_extractor"] / "preprocessor_config.json"
        parts["feature_extractor"] = read_json(file, "it says how photos are normalised")
    check_fit(nets, parts, config, given.text_encoder_names, str(checkpoint), given.face_encoder)
    lines = read_licences(source)
    if not lines:
        lines = [licence_line("checkpoint", source_name(source), [source])]
        lines += [licence_line("base_model", source_name(base), [base]) for base in bases]
    lines = [*lines, *map(_line, nets)]
    files = dict(_files(source))
    if taken := {f"{BRANCH}{net.request.name}" for net in nets} & {name.parts[0] for name in files}:
        raise CheckpointError(
            f"{source / min(taken)} is there already, and no row of {CONFIG} names it. Remove the folder from the "
            "checkpoint, or give the net another name."
        )
    copied = sum(file.stat().st_size for file in files.values() if options.copy or not same_disk(file, target.parent))
    with published(target, nets, options, copied) as partial:
        write_nets(nets, partial, options, report)
        for name, file in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, partial / name, options.copy or file.suffix != ".safetensors")
        write_json(partial / CONFIG, values)
        index = read_json(source / INDEX, "it lists the checkpoint's parts")
        index.pop("_recipe", None)
        if reference := index.get("base_model"):
            index["base_model"] = _moved(str(reference), source, target)
        write_json(partial / INDEX, {**index, "_made_by": MADE_BY, **_entries(nets), "licences": lines})
        adopted = adopted_at(target, checked(partial, given.base, options.variant), lines)
    return adopted


def _check_names(requests: Sequence[NetRequest], rows: Sequence[str]) -> None:
    names = [request.name for request in requests]
    for name in names:
        if name in rows:
            raise RequestError(
                f"the checkpoint has a branch {name} already (its branches: {', '.join(rows)}). Give the net another "
                "name."
            )
        if names.count(name) > 1:
            raise RequestError(f"two nets are named {name}. Give each its own name.")


def _rows(nets: Sequence[Net], pooled: str) -> list[dict[str, Any]]:
    """The rows of the nets. Raises RequestError for a setting that a row cannot have."""
    rows = [net.request.row(net.config["conditioning_channels"], pooled) for net in nets]
    for row in rows:
        try:
            Branch.from_dict(row, FACE_STYLES[0], f"--net {row['name']}", "Give another value.")
        except CheckpointError as error:
            raise RequestError(str(error)) from error
    return rows


def _line(net: Net) -> LicenceLine:
    folder = Path(os.path.abspath(net.request.folder))
    inside = folder.name == SD15_FOLDER
    name = source_name(folder.parent if inside else folder)
    return licence_line(net.component.name, name, [folder, *([folder.parent] if inside else [])])


def _entries(nets: Sequence[Net]) -> dict[str, list[str]]:
    """Entries of model_index.json."""
    return {net.component.name: ["diffusers", net.component.class_name] for net in nets}


def _files(checkpoint: Path, below: tuple[Path, ...] = ()) -> Iterator[tuple[Path, Path]]:
    """(name in the checkpoint, file) of everything that it holds but hidden files, pickles and the two JSON files that
    are written anew. Links are followed."""
    for path in sorted(checkpoint.iterdir()):
        real = Path(os.path.realpath(path))
        if path.name.startswith(".") or real in below:
            continue
        if path.is_dir():
            yield from ((Path(path.name) / name, file) for name, file in _files(path, (*below, real)))
        elif path.is_file() and path.suffix not in PICKLES and (below or path.name not in (INDEX, CONFIG)):
            yield Path(path.name), real


def _moved(reference: str, source: Path, target: Path) -> str:
    """`base_model` of a checkpoint at `source`, as a checkpoint at `target` says it."""
    folder = Path(os.path.normpath(source / os.path.expanduser(reference)))
    return os.path.relpath(os.path.realpath(folder), target) if folder.is_dir() else reference
