"""Ways to spoil a published folder. Each is refused, with these pieces of the sentence that helps."""

from __future__ import annotations

import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.export.adopt.published import STEM, random_net, save
from tests.export.checkpoint.bad_checkpoints import edit, put

WEIGHTS = f"{STEM}.safetensors"
ONE = "controlnet --net openpose=openpose --base SDXL --out OUT"
CANNY = "controlnet --net canny=canny --base SDXL --out OUT"
ADD = "add --checkpoint CKPT --net openpose=openpose --out OUT"
FACE = "mediapipe-face --weights face --base SD15 --variant fp16 --out OUT"
Spoil = Callable[[Path], object]
Bad = dict[str, tuple[Spoil, str, int, tuple[str, ...]]]


def nothing(here: Path) -> None:
    pass


def config(**changes: Any) -> Spoil:
    return lambda here: edit(here / "openpose" / "config.json", **changes)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(here: Path) -> None:
        file = here / "openpose" / WEIGHTS
        tensors = load_file(file)
        change(tensors)
        file.unlink()
        save_file(tensors, file)

    return spoil


def pickled(values: Any, **options: Any) -> Spoil:
    """canny as a pickle alone; values: what is in it, or what becomes of its tensors."""

    def spoil(here: Path) -> None:
        file = here / "canny" / f"{STEM}.bin"
        tensors = torch.load(file, weights_only=True)
        for weight in [*(here / "canny").glob("*.safetensors"), file]:
            weight.unlink()
        torch.save(values(tensors) if callable(values) else values, file, **options)

    return spoil


class Runs:
    """An object whose pickle runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def index(name: str) -> Spoil:
    """openpose in one shard, of which its index says that it lies elsewhere."""

    def spoil(here: Path) -> None:
        file = here / "openpose" / WEIGHTS
        keys = load_file(file)
        file.rename(here / "openpose" / "a.safetensors")
        weight_map = dict.fromkeys(keys, name)
        put(here / "openpose" / f"{WEIGHTS}.index.json", json.dumps({"metadata": {}, "weight_map": weight_map}))

    return spoil


def replace(name: str, *given: Any, **changes: Any) -> Spoil:
    def spoil(here: Path) -> None:
        shutil.rmtree(here / name)
        save(random_net(*given, **changes), here / name)

    return spoil


def broken_link(here: Path) -> None:
    (here / "openpose" / WEIGHTS).unlink()
    (here / "openpose" / WEIGHTS).symlink_to("../../blobs/0f")


# name → (what is done to good folders, command, exit status, pieces of the error)
SOURCES: Bad = {
    # the folder
    "no such folder": (nothing, ONE.replace("=openpose", "=nowhere"), 1, ("nowhere does not exist", "Only --base may")),
    "a hub id": (
        nothing,
        ONE.replace("=openpose", "=xinsir/openpose"),
        1,
        (
            "Only --base may be the id of a hub model.",
            "Download it first: hf download xinsir/openpose --local-dir FOLDER.",
        ),
    ),
    "a name no disk can hold": (
        nothing,
        ONE.replace("=openpose", f"={'a' * 300}"),
        1,
        ("aaa cannot be read (File name too long)",),
    ),
    "a base that no disk can hold": (nothing, ONE.replace("SDXL", "a" * 300), 1, ("cannot be read (File name too",)),
    "one file": (
        nothing,
        ONE.replace("=openpose", f"=openpose/{WEIGHTS}"),
        1,
        ("safetensors is a file, expected a ControlNet's folder", "C.from_single_file(sys.argv[1])"),
    ),
    "no config": (
        lambda p: (p / "openpose" / "config.json").unlink(),
        ONE,
        1,
        ("openpose/config.json is missing: it describes the ControlNet. Copy it from the same place.",),
    ),
    "a folder too high": (
        lambda p: (p / "face" / "config.json").unlink(),
        ONE.replace("=openpose", "=face"),
        1,
        ("face/config.json is missing", "Name one of its folders: diffusion_sd15."),
    ),
    "no JSON": (lambda p: put(p / "openpose" / "config.json", "{"), ONE, 1, ("cannot be read as JSON",)),
    "union": (
        config(_class_name="ControlNetUnionModel"),
        ONE,
        1,
        ("ControlNetUnionModel is a union net", "xinsir's union and promax", "not supported yet", "of one condition"),
    ),
    "union by its key": (config(num_control_type=6), ONE, 1, ("ControlNetModel is a union net",)),
    "another class": (
        config(_class_name="T2IAdapter"),
        ONE,
        1,
        ("openpose/config.json names the class T2IAdapter, expected ControlNetModel. Take a ControlNet of SDXL",),
    ),
    "impossible": (config(block_out_channels=8), ONE, 1, ("is not a config of ControlNetModel", "that of the base")),
    "channel order": (
        config(controlnet_conditioning_channel_order="bgr"),
        ONE,
        1,
        ("controlnet_openpose/config.json: controlnet_conditioning_channel_order is 'bgr', expected 'rgb'",),
    ),
    "two channels": (
        replace("openpose", "sdxl", 9, conditioning_channels=2),
        ONE,
        1,
        ("openpose/config.json: conditioning_channels is 2, expected 1 or 3: a grey or a coloured picture.",),
    ),
    # the weights
    "no weights": (lambda p: (p / "openpose" / WEIGHTS).unlink(), ONE, 1, ("holds no weights, expected",)),
    "a broken link": (broken_link, ONE, 1, ("is a link to ../../blobs/0f, which is not there. Download the model",)),
    "another variant": (
        lambda p: (p / "openpose" / WEIGHTS).rename(p / "openpose" / f"{STEM}.fp16.safetensors"),
        ONE,
        1,
        (
            f"openpose holds {STEM}.fp16.safetensors, expected {WEIGHTS}.",
            "Take the weights that are there: --variant fp16.",
        ),
    ),
    "another variant beside a pickle": (
        nothing,
        FACE.replace(" --variant fp16", ""),
        1,
        ("diffusion_sd15 holds", "--variant fp16."),
    ),
    "git-lfs": (
        lambda p: put(p / "openpose" / WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ONE,
        1,
        ("is a git-lfs pointer",),
    ),
    "cut off": (
        lambda p: put(p / "openpose" / WEIGHTS, (p / "openpose" / WEIGHTS).read_bytes()[:-9]),
        ONE,
        1,
        ("it was cut off or altered. Copy it again",),
    ),
    "a shard above": (index("../a.safetensors"), ONE, 1, ("names the shard '../a.safetensors', expected the name of",)),
    "a shard anywhere": (index("/etc/passwd"), ONE, 1, ("names the shard '/etc/passwd'", "points elsewhere")),
    "a shard that is missing": (index("b.safetensors"), ONE, 1, ("names 1 shards, of which b.safetensors is missing",)),
    "surplus": (
        weights(lambda w: w.update(task_embedding=torch.zeros(6, 16))),
        ONE,
        1,
        ("openpose: the weights are not those of the ControlNetModel", "1 unexpected (task_embedding)"),
    ),
    "missing": (weights(lambda w: w.pop("conv_in.bias")), ONE, 1, ("1 missing (conv_in.bias)",)),
    "shape": (
        weights(lambda w: w.update({"conv_in.bias": torch.zeros(9)})),
        ONE,
        1,
        ("1 of another shape (conv_in.bias: (9,) in the file, (16,) expected)",),
    ),
    "whole numbers": (
        weights(lambda w: w.update({"conv_in.bias": torch.zeros(16, dtype=torch.int8)})),
        ONE,
        1,
        ("conv_in.bias holds numbers of the kind I8, expected one of F16, BF16, F32, F64.",),
    ),
    "NaN": (
        weights(lambda w: w["conv_in.weight"].view(-1)[3:5].fill_(float("nan"))),
        ONE,
        1,
        ("openpose: conv_in.weight holds 2 NaN or infinite of 576 numbers. Copy the weights again",),
    ),
    "too large for half": (
        weights(lambda w: w.update({key: tensor.float() for key, tensor in w.items()}) or w["conv_in.bias"].fill_(7e4)),
        f"{ONE} --half",
        1,
        ("openpose: conv_in.bias holds 70000, and float16 ends at 65504. Leave --half out.",),
    ),
    # pickles
    "a pickle that runs": (
        pickled({"conv_in.bias": Runs()}),
        CANNY,
        1,
        (
            f"canny/{STEM}.bin holds more than tensors, so torch refuses it (weights_only)",
            "Take the model's safetensors",
        ),
    ),
    "an old pickle": (
        pickled(OrderedDict, _use_new_zipfile_serialization=False),
        CANNY,
        1,
        ("cannot be read as torch.save's zip format", "older than torch 1.6"),
    ),
    "a list": (pickled([torch.zeros(1)]), CANNY, 1, ("holds a list, expected a dict of tensors by name",)),
    "a nested pickle": (
        lambda p: pickled(lambda w: {"state_dict": w})(p),
        CANNY,
        1,
        ("'state_dict' is a dict, expected only tensors by name",),
    ),
    "a pickle of whole numbers": (
        pickled(lambda w: {**w, "conv_in.bias": torch.zeros(16, dtype=torch.int32)}),
        CANNY,
        1,
        ("conv_in.bias holds numbers of the kind int32, expected one of F16, BF16, F32, F64.",),
    ),
    "a sparse pickle": (
        pickled(lambda w: {**w, "conv_in.bias": torch.zeros(16).to_sparse()}),
        CANNY,
        1,
        (
            f"canny/{STEM}.bin: conv_in.bias is a tensor of the layout torch.sparse_coo, expected torch.strided, with",
            "Take the model's safetensors",
        ),
    ),
    "a pickle with more": (pickled(lambda w: {**w, "x": torch.zeros(1)}), CANNY, 1, ("1 unexpected (x)",)),
    "a pickle with NaN": (
        pickled(lambda w: {**w, "conv_in.bias": torch.full((16,), float("inf"))}),
        CANNY,
        1,
        ("canny: conv_in.bias holds 16 NaN or infinite of 16 numbers",),
    ),
}


def prepare(here: Path) -> None:
    """root: the net in the root of the face's folder, alone."""
    (here / "root").mkdir()
    for name in ("config.json", WEIGHTS):
        os.link(here / "face" / name, here / "root" / name)
