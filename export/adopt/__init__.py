"""Published ControlNets → a checkpoint that `python -m export.build` accepts.

    python -m export.adopt controlnet --net openpose=FOLDER --base SDXL --out CKPT

A published ControlNet becomes a row of the checkpoint's table of branches. Its sources are only read; its weights are
linked, copied or converted, and the base model is referred to.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from realisid_trt.config import FACE_STYLES, Branch, RealisIDConfig
from realisid_trt.errors import CheckpointError, DiskError, RequestError

from ..checkpoint import Checkpoint
from ..checkpoint.checks import check_all
from ..checkpoint.classes import full_config
from ..checkpoint.files import BRANCH, PICKLES, read_json
from ..checkpoint.licences import LicenceLine, read_licences
from ..files import check_space, disk_errors, sync, whole_folder
from ..forms import FLOAT32_NETWORKS
from ..networks import networks
from .licences import licence_line, source_name
from .nets import Net, NetRequest
from .places import INDEX, MADE_BY, Base, free_target
from .schedule import FILE, ddim_schedule
from .weights import link_or_copy, needed_bytes, same_disk, write_net

__all__ = ["AdoptOptions", "Adopted", "NetRequest", "add_controlnets", "adopt_controlnets", "adopt_mediapipe_face"]

CONFIG = "realisid_config.json"
ZEROS = "force_zeros_for_empty_prompt"
RESERVE_BYTES = 64 * 2**20  # for everything but weights
SD15_FOLDER = "diffusion_sd15"  # of CrucibleAI/ControlNetMediaPipeFace, whose root is a net of SD 2.1
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class AdoptOptions:
    """How a checkpoint is written. The command line takes its defaults from here.

    half:    write the new ControlNets in float16, whatever the source has.
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
    report:   called with a line for each net.

    Raises RequestError, CheckpointError or DiskError; nothing is published then.
    """
    _check_names(requests, ())
    found = Base.find(base, options.variant)
    nets = [Net.open(request, options.variant) for request in requests]
    target = free_target(out, [found.folder, *(request.folder for request in requests)])
    schedule = ddim_schedule(found.folder / "scheduler")
    parts = {name: full_config(component) for name, component in found.parts.items()}
    pooled = "per_row" if parts["unet"]["addition_embed_type"] else "zeros"
    # SDXL says that zeros stand for an absent prompt; SD 1.5 says nothing, and means the empty text
    values = {"method": "controlnet", "branches": _rows(nets, pooled), ZEROS: bool(found.index.get(ZEROS, False))}
    config = RealisIDConfig.from_dict(values, "the new checkpoint")
    _check_fit(nets, parts, config, found.texts, base)
    lines = [_line(net) for net in nets]
    lines.append(licence_line("base_model", base if found.is_hub else source_name(found.folder), [found.folder]))
    with _published(target, nets, options, 0, report) as partial:
        (partial / "scheduler").mkdir()
        _write(partial / "scheduler" / FILE, schedule)
        _write(partial / CONFIG, config.to_dict())
        index = {"base_model": found.reference(target), **_entries(nets), "scheduler": ["diffusers", "DDIMScheduler"]}
        _write(partial / INDEX, {"_class_name": "RealisIDPipeline", "_made_by": MADE_BY, **index, "licences": lines})
        adopted = _adopted(target, _checked(partial, found.folder, options.variant), lines)
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
    """The same checkpoint with more rows. Everything else, such as its scheduler, stays as it is.

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
    if config.id_input != "none":
        file = given.folders["feature_extractor"] / "preprocessor_config.json"
        parts["feature_extractor"] = read_json(file, "it says how photos are normalised")
    _check_fit(nets, parts, config, given.text_encoder_names, str(checkpoint))
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
    with _published(target, nets, options, copied, report) as partial:
        for name, file in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, partial / name, options.copy or file.suffix != ".safetensors")
        _write(partial / CONFIG, values)
        index = read_json(source / INDEX, "it lists the checkpoint's parts")
        index.pop("_recipe", None)
        if reference := index.get("base_model"):
            index["base_model"] = _moved(str(reference), source, target)
        _write(partial / INDEX, {**index, "_made_by": MADE_BY, **_entries(nets), "licences": lines})
        adopted = _adopted(target, _checked(partial, given.base, options.variant), lines)
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


def _check_fit(
    nets: Sequence[Net], parts: Mapping[str, Any], config: RealisIDConfig, texts: tuple[str, ...], base: str
) -> None:
    """Raises CheckpointError unless the nets belong to the base model, as their configs say it."""
    for net in nets:
        net.check_family(parts["unet"], base)
    configs = {**parts, **{net.component.name: net.config for net in nets}}
    try:
        check_all(configs, config, texts)
    except (TypeError, KeyError, IndexError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"a config.json of {', '.join(str(net.request.folder) for net in nets)} or of {base} has a value of an "
            f"impossible kind ({type(error).__name__}: {error}). Compare them with what was published."
        ) from error


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


@contextmanager
def _published(
    target: Path, nets: Sequence[Net], options: AdoptOptions, more_bytes: int, report: Report
) -> Iterator[Path]:
    """The temporary folder of the checkpoint, with the nets in it. Published when the block succeeds."""
    needed = sum(needed_bytes(net, target, options.half, options.copy) for net in nets) + more_bytes
    check_space(target.parent, needed + RESERVE_BYTES, "the checkpoint")
    try:
        with whole_folder(target) as partial, disk_errors(target.parent):
            for net in nets:
                how = write_net(net, partial / net.component.name, options.half, options.copy)
                report(f"{net.request.name}: {size_text(net.bytes)} of {net.request.folder} {how}")
            yield partial
            for path in (*partial.rglob("*"), partial):
                sync(path)
    except (OSError, SafetensorError) as error:  # errors that disk_errors does not convert; safetensors' have no errno
        raise DiskError(f"{target} could not be written: {error}. Free some space, or choose another --out.") from error


def _checked(partial: Path, base: Path | None, variant: str | None) -> Checkpoint:
    checkpoint = Checkpoint.open(partial, base_model=base, variant=variant, local_files_only=True)
    checkpoint.check_weights()
    return checkpoint


def _adopted(target: Path, checkpoint: Checkpoint, lines: list[LicenceLine]) -> Adopted:
    found = networks(checkpoint)
    sizes = {name: net.elements(checkpoint) * (4 if name in FLOAT32_NETWORKS else 2) for name, net in found.items()}
    loop = {name for name in sizes if name.endswith("_branch") or name in ("unet_encoder", "unet_decoder")}
    names = tuple(row.name for row in checkpoint.config.table)
    return Adopted(target, names, lines, sum(sizes.values()), sum(sizes[name] for name in loop))


def size_text(size: int) -> str:
    """ "2.50 GB", "17.7 MB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
