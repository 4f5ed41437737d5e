"""Ways to spoil a published ID-Patch and its face encoder. Each is refused, with these pieces of the sentence."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.export.adopt.bad_sources import Bad, Runs, Spoil, nothing, replace
from tests.export.adopt.published_idpatch import FOLDER, PICKLE, random_resampler
from tests.export.checkpoint.bad_checkpoints import put
from tests.export.checkpoint.encoders import normalised, random_encoder

LINE = "idpatch --weights ID-Patch --base SDXL --face-encoder arcface.onnx --out OUT"
FLAGS = " --colour bgr --norm unit"
GOOD = LINE + FLAGS


def projections(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """What is in id-patch.bin, changed; a list replaces it."""

    def spoil(here: Path) -> None:
        values = torch.load(here / PICKLE, weights_only=True)
        result = change(values)
        (here / PICKLE).unlink()
        torch.save(result if isinstance(result, list) else values, here / PICKLE)

    return spoil


def resized(name: str, **changes: Any) -> Spoil:
    def change(values: dict[str, Any]) -> None:
        values[name] = dict(random_resampler(name, 3, **changes).state_dict())

    return projections(change)


def encoder(content: bytes, name: str = "arcface.onnx") -> Spoil:
    def spoil(here: Path) -> None:
        (here / name).unlink(missing_ok=True)
        (here / name).write_bytes(content)

    return spoil


def saved(values: Any, **options: Any) -> Spoil:
    return lambda here: torch.save(values, here / "weights.pth", **options)


WITH_PTH = LINE.replace("arcface.onnx", "weights.pth")
IDPATCH: Bad = {
    # the folder
    "idpatch: no folder": (
        nothing,
        GOOD.replace("ID-Patch", "ByteDance/ID-Patch"),
        1,
        (
            "ByteDance/ID-Patch does not exist, expected a folder with ControlNetModel/ and id-patch.bin.",
            "Only --base may be the id of a hub model. Download it first: hf download ByteDance/ID-Patch",
        ),
    ),
    "idpatch: a file": (
        nothing,
        GOOD.replace("--weights ID-Patch", f"--weights {PICKLE}"),
        1,
        ("id-patch.bin is a f",),
    ),
    "idpatch: no pickle": (
        lambda p: (p / PICKLE).unlink(),
        GOOD,
        1,
        ("ID-Patch lacks id-patch.bin, expected ControlNetModel/ and id-patch.bin as ByteDance/ID-Patch publishes",),
    ),
    "idpatch: no net": (
        lambda p: shutil.rmtree(p / FOLDER / "ControlNetModel"),
        GOOD,
        1,
        ("ID-Patch lacks ControlNetModel/, expected",),
    ),
    "idpatch: another family": (
        nothing,
        GOOD.replace("SDXL", "SD15"),
        1,
        ("ID-Patch/ControlNetModel is a ControlNet", "the base model SD15 is"),
    ),
    "idpatch: a grey net": (
        replace(f"{FOLDER}/ControlNetModel", "sdxl", 9, conditioning_channels=1),
        GOOD,
        1,
        ("conditioning_channels is 1, expected 3, since its condition is a drawing with the patches of IDs",),
    ),
    # id-patch.bin
    "idpatch: an extra part": (
        projections(lambda v: v.update(image_proj={})),
        GOOD,
        1,
        ("holds image_proj, patch_proj, prompt_proj, expected exactly patch_proj and prompt_proj. Get the file again",),
    ),
    "idpatch: a part less": (
        projections(lambda v: v.pop("patch_proj")),
        GOOD,
        1,
        ("holds prompt_proj, expected exac",),
    ),
    "idpatch: a list": (projections(lambda v: [1]), GOOD, 1, ("id-patch.bin holds a list, expected exactly",)),
    "idpatch: a flat part": (
        projections(lambda v: v.update(patch_proj=torch.zeros(3))),
        GOOD,
        1,
        ("id-patch.bin: patch_proj holds a Tensor, expected a dict of tensors by name.",),
    ),
    "idpatch: an extra key": (
        projections(lambda v: v["prompt_proj"].update(task_embedding=torch.zeros(4))),
        GOOD,
        1,
        ("id-patch.bin: prompt_proj: the weights are not those of one resampler: 1 unexpected (task_embedding).",),
    ),
    "idpatch: a key less": (
        projections(lambda v: v["patch_proj"].pop("layers.1.0.norm2.bias")),
        GOOD,
        1,
        ("patch_proj: the weights are not those of one resampler: 1 missing (layers.1.0.norm2.bias).",),
    ),
    "idpatch: a layer too far": (
        projections(lambda v: v["patch_proj"].update({"layers.99999999999.x": torch.zeros(1)})),
        GOOD,
        1,
        ("patch_proj is not a resampler of IP-Adapter-plus: latents, proj_in.weight",),
    ),
    "idpatch: no resampler": (
        projections(lambda v: v.update(prompt_proj={"proj.weight": torch.zeros(64, 512)})),
        GOOD,
        1,
        ("prompt_proj is not a resampler of IP-Adapter-plus", "do not give its sizes, with heads of 64."),
    ),
    "idpatch: another shape": (
        projections(lambda v: v["prompt_proj"].update({"norm_out.bias": torch.zeros(3)})),
        GOOD,
        1,
        ("norm_out.bias of shape (3,) instead of (64,).",),
    ),
    "idpatch: NaN": (
        projections(lambda v: v["patch_proj"]["latents"].view(-1)[1:4].fill_(float("nan"))),
        GOOD,
        1,
        ("ID-Patch/id-patch.bin: latents holds 3 NaN or infinite of 192 numbers. Copy the weights again",),
    ),
    "idpatch: too large for half": (
        projections(lambda v: v["prompt_proj"]["proj_out.bias"].fill_(7e4)),
        f"{GOOD} --half",
        1,
        ("id-patch.bin: proj_out.bias holds 70000, and float16 ends at 65504. Leave --half out.",),
    ),
    "idpatch: whole numbers": (
        projections(lambda v: v["patch_proj"].update(latents=torch.zeros(1, 3, 64, dtype=torch.int32))),
        GOOD,
        1,
        ("id-patch.bin: patch_proj: latents holds numbers of the kind int32, expected one of F16",),
    ),
    "idpatch: narrow embeddings": (
        resized("patch_proj", embedding_dim=256),
        GOOD,
        1,
        ("patch_proj reads embeddings of 256 numbers, expected 512, as every ArcFace gives.",),
    ),
    "idpatch: wrong width": (
        resized("prompt_proj", output_dim=96),
        GOOD,
        1,
        ("prompt_proj gives tokens of 96 numbers, and the base model's UNet reads tokens of 64.",),
    ),
    "idpatch: four colours": (
        resized("patch_proj", num_queries=4),
        GOOD,
        1,
        ("patch_proj gives 4 × 256 numbers, expected 3 × a square number: a patch with three colours.",),
    ),
    "idpatch: no square": (resized("patch_proj", output_dim=200), GOOD, 1, ("patch_proj gives 3 × 200 numbers",)),
    "idpatch: a pickle that runs": (
        projections(lambda v: v["prompt_proj"].update(x=Runs())),
        GOOD,
        1,
        ("id-patch.bin holds more than tensors, so torch refuses it (weights_only)", "Get the file again from where"),
    ),
    "idpatch: cut off": (
        lambda p: encoder((p / PICKLE).read_bytes()[:-99], PICKLE)(p),
        GOOD,
        1,
        ("id-patch.bin cannot be read as torch.save's zip format",),
    ),
    # the face encoder
    "encoder: none": (
        nothing,
        GOOD.replace("arcface.onnx", "nowhere.pth"),
        1,
        (
            "the face encoder nowhere.pth does not exist, expected a file.",
            "recognition_arcface_ir_se50.pth, which facexlib's releases on GitHub have",
        ),
    ),
    "encoder: a folder": (
        nothing,
        GOOD.replace("arcface.onnx", "openpose"),
        1,
        ("openpose is a folder, expected a f",),
    ),
    "encoder: another ending": (
        lambda p: put(p / "a.tflite", "x"),
        GOOD.replace("arcface.onnx", "a.tflite"),
        1,
        ("a.tflite is neither ONNX nor weights of torch: its name ends with .tflite, expected .onnx, .pth",),
    ),
    "encoder: no colour": (
        nothing,
        f"{LINE} --norm unit",
        2,
        ("arcface.onnx is not an encoder that is known here", "Give --colour: --colour rgb for InsightFace's and Aura"),
    ),
    "encoder: neither": (
        nothing,
        LINE,
        2,
        ("Give --colour and --norm: --colour rgb", "--norm unit if the projections"),
    ),
    "encoder: raw numbers that there are not": (
        encoder(normalised(random_encoder()).SerializeToString()),
        GOOD.replace("unit", "raw"),
        1,
        ('arcface.onnx gives embeddings of length 1, and norm is "raw"', 'Set norm to "unit".'),
    ),
    "encoder: no ONNX": (encoder(b"neither" * 500), GOOD, 1, ("arcface.onnx is not a valid ONNX file",)),
    "encoder: a detector": (
        encoder(random_encoder(width=256).SerializeToString()),
        GOOD,
        1,
        ("arcface.onnx takes image (·, 3, 112, 112) and gives embedding (·, 256)", "and not a face detector."),
    ),
    "encoder: other weights": (
        saved({"a": torch.zeros(1)}),
        WITH_PTH,
        1,
        ("weights.pth is not a face encoder that is known here: its 1 keys begin with a.", "ir_se50 (3, 4, 14, 3)"),
    ),
    "encoder: wrapped": (
        saved({"state_dict": {"a": torch.zeros(1)}}),
        WITH_PTH,
        1,
        ("weights.pth: 'state_dict' is a dict, expected only tensors by name",),
    ),
    "encoder: a pickle that runs": (
        saved({"a": Runs()}),
        WITH_PTH,
        1,
        ("weights.pth holds more than tensors, so torch refuses it (weights_only)",),
    ),
    "encoder: an old pickle that runs": (
        saved(OrderedDict(a=Runs()), _use_new_zipfile_serialization=False),
        WITH_PTH,
        1,
        ("weights.pth holds more than tensors, so torch refuses it (weights_only)",),
    ),
    "encoder: no pickle": (
        lambda p: put(p / "weights.pth", "neither"),
        WITH_PTH,
        1,
        ("weights.pth",),
    ),
    # where it goes
    "idpatch: into a source": (
        nothing,
        GOOD.replace("OUT", "ID-Patch/OUT"),
        2,
        ("--out ID-Patch/OUT lies in ", "and sources are never written. Choose another --out."),
    ),
    "idpatch: taken": (
        lambda p: (p / "OUT").mkdir() or put(p / "OUT" / "thesis.txt", "years of work"),
        GOOD,
        2,
        ("OUT exists and is not a checkpoint made by export.adopt, so it is never overwritten",),
    ),
    "idpatch: the place of the encoder": (
        lambda p: ((p / "mine").mkdir(), shutil.move(p / "arcface.onnx", p / "mine" / "arcface.onnx")),
        GOOD.replace("arcface.onnx", "mine/arcface.onnx").replace("OUT", "mine"),
        2,
        ("--out mine holds ", "and sources are never written."),
    ),
    "idpatch: --check of a missing photo": (
        nothing,
        f"{GOOD} --check a.jpg b.jpg c.jpg",
        1,
        ("a.jpg",),
    ),
}
