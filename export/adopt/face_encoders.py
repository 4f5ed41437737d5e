"""The user's face encoder on its way into a checkpoint: weights of torch, which are converted, or an ONNX file."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from realisid_trt.errors import CheckpointError, RequestError
from realisid_trt.files import VerifiedFiles, file_sha256

from ..checkpoint.face_encoder import CONFIG, FILE, OPTIONS, FaceEncoder, check_graph, load_graph
from ..checkpoint.files import readable
from ..faces.arcface_to_onnx import arcface_to_onnx, load_arcface
from .pickles import load_pickle, tensors_of

TORCH = (".pth", ".pt", ".bin")
ADVICE = "Get the file again from where it was published."
COUNTERS = (torch.int64,)  # num_batches_tracked of batch norms
MXNET = (
    re.compile("Sub|_minus"),
    re.compile("Mul|_mul"),
)  # beginnings of names of its first nodes, as InsightFace asks


@dataclass(frozen=True)
class Published:
    """A published encoder. norm: of the embeddings on which the projections that know it were trained; "unit" where it
    gives no others."""

    name: str
    colour: str
    norm: str
    licence: str


# sha256 → encoder. The hashes are those that others list for the published files; no such file was downloaded here.
PUBLISHED = {
    "a035c768259b98ab1ce0e646312f48b9e1e218197a0f80ac6765e88f8b6ddf28": Published(
        "ir_se50", "bgr", "unit", "MIT (code); trained on MS1M, which was withdrawn and is read as research only"
    ),
    "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf": Published(
        "glintr100", "rgb", "raw", "InsightFace, non-commercial research"
    ),
    "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43": Published(
        "w600k_r50", "rgb", "raw", "InsightFace, non-commercial research"
    ),
}


@dataclass(frozen=True)
class EncoderRequest:
    """A face encoder that is asked for.

    file: its weights. colour, norm: as in `FaceEncoder`; None takes what is known of the file.
    """

    file: Path
    colour: str | None = None
    norm: str | None = None

    def check(self) -> Published | None:
        """What is known of the file, by its hash. Raises RequestError or CheckpointError, before anything is
        converted."""
        for flag in ("colour", "norm"):
            value = getattr(self, flag)
            if value not in (None, *OPTIONS[flag]):
                raise RequestError(f"--{flag} is {value!r}, expected {' or '.join(OPTIONS[flag])}.")
        with readable(self.file):
            if not self.file.is_file():
                what = "is a folder" if self.file.is_dir() else "does not exist"
                raise CheckpointError(
                    f"the face encoder {self.file} {what}, expected a file. ID-Patch was trained with ir_se50: "
                    "recognition_arcface_ir_se50.pth, which facexlib's releases on GitHub have (v0.1.0)."
                )
            if self.file.suffix not in (*TORCH, ".onnx"):
                raise CheckpointError(
                    f"the face encoder {self.file} is neither ONNX nor weights of torch: its name ends with "
                    f"{self.file.suffix or 'nothing'}, expected .onnx, {', '.join(TORCH)}. Give such a file."
                )
            with VerifiedFiles() as verified:
                digest = verified.sha256(self.file)
        published = PUBLISHED.get(digest)
        if published and self.colour not in (None, published.colour):
            raise RequestError(
                f"--colour {self.colour}: {self.file} is {published.name}, which was trained on {published.colour}. "
                "Leave --colour out."
            )
        if published and published.norm == "unit":
            self._refuse_raw(published.name)
        missing = [flag for flag in ("colour", "norm") if getattr(self, flag) is None]
        if missing and published is None and self.file.suffix == ".onnx":
            raise RequestError(
                f"{self.file} is not an encoder that is known here (its sha256 is {digest[:16]}…), and an ONNX file "
                f"does not say what it was trained on. Give {' and '.join(f'--{flag}' for flag in missing)}: --colour "
                "rgb for InsightFace's and AuraFace, bgr for ir_se50; --norm unit if the projections were trained on "
                "embeddings of length 1, as ID-Patch's, raw if on the encoder's own output."
            )
        return published

    def write(self, folder: Path, points: str) -> FaceEncoder:
        """The `face_encoder/` folder, checked. points: as in `FaceEncoder`, by the method that uses the embeddings.

        Raises CheckpointError, BuildError.
        """
        published = self.check()
        name, colour, norm, mean, std = self.file.stem, "rgb", "raw", 127.5, 127.5
        folder.mkdir()
        target = folder / FILE
        if self.file.suffix == ".onnx":
            load_graph(self.file)  # before it is copied
            shutil.copyfile(self.file, target)
            mean, std = (0.0, 1.0) if _scales_pixels(self.file) else (mean, std)
        else:
            with readable(self.file):
                values = load_pickle(self.file, ADVICE, whole=True)
                weights = tensors_of(values, str(self.file), ADVICE, COUNTERS)
                architecture, module = load_arcface(weights, str(self.file))
            name = architecture.name
            if architecture.squeezed:
                self._refuse_raw(name)
                colour, norm = "bgr", "unit"
            target.write_bytes(arcface_to_onnx(module, str(self.file)))
        if published:
            name, colour, norm = published.name, published.colour, published.norm
        encoder = FaceEncoder(
            sha256=file_sha256(target), colour=self.colour or colour, norm=self.norm or norm, points=points, name=name,
            licence=published.licence if published else None, mean=mean, std=std,
        )  # fmt: skip
        try:
            check_graph(target, encoder.size, encoder.output_dim, encoder.norm)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(target), str(self.file))) from error
        (folder / CONFIG).write_text(json.dumps(encoder.to_dict(), indent=2) + "\n", encoding="utf-8")
        return encoder

    def unlike(self, name: str) -> str | None:
        """A sentence on a file that has the name of a published encoder, but not its hash; else None."""
        listed = next((digest for digest, published in PUBLISHED.items() if published.name == name), None)
        with readable(self.file), VerifiedFiles() as verified:
            digest = verified.sha256(self.file)
        if listed is None or digest in PUBLISHED:
            return None
        return (
            f"{self.file} is not the published file of {name}: sha256 {digest}, listed as {listed}. Its weights may be "
            "others: use it only if you know where it comes from"
        )

    def _refuse_raw(self, name: str) -> None:
        if self.norm == "raw":
            raise RequestError(
                f"--norm raw: {self.file} is {name}, which normalises by itself: it gives embeddings of length 1. "
                "Leave --norm out."
            )

    @classmethod
    def of(cls, file: str | Path, colour: str | None = None, norm: str | None = None) -> EncoderRequest:
        """The request for a file of the user's. Raises nothing."""
        return cls(Path(os.path.expanduser(file)), colour, norm)


def _scales_pixels(file: Path) -> bool:
    """Whether a graph subtracts and divides by itself, as those that MXNet wrote: it is shown 0…255."""
    names = [node.name for node in load_graph(file).graph.node[:8]]
    return all(any(pattern.match(name) for name in names) for pattern in MXNET)
