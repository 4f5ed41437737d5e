"""python -m training.paper_metrics: the paper's own metrics, for pictures of a real checkpoint.

CLIP-T and CLIP-I by transformers' CLIPModel, FaceNet by any face recogniser as ONNX, the aesthetic score by LAION's
linear head on CLIP's image embedding. All weights come from paths that the user gives; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from export.checkpoint.classes import quiet
from realisid_trt.commands.command_line import Outcome, execute, run
from realisid_trt.errors import CheckpointError, PhotoError, RequestError
from realisid_trt.files import file_sha256
from realisid_trt.persons.containers import suffixes
from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.faces.squares import as_box, crop_square
from realisid_trt.persons.photo import load_photo

from .pictures import captions_of
from .statistics import Sample, estimate

Floats = NDArray[np.float64]
Names = NDArray[np.str_]
Item = TypeVar("Item")
BATCH = 16
CPU = torch.device("cpu")


class Clip:
    """A CLIP model in transformers' layout. The paper does not name one; the aesthetic head reads ViT-L/14."""

    def __init__(self, folder: Path, device: torch.device = CPU) -> None:
        """Raises CheckpointError if the folder is not a CLIP model in safetensors."""
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        try:
            with quiet():
                model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
                self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
                self.processor: Any = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # a library's exception for a folder that it cannot use
            raise CheckpointError(
                f"{folder} is not a CLIP model: {error}. Give a whole model folder, with its weights in safetensors."
            ) from error

        self.model, self.device = model.to(device), device

    @torch.no_grad()
    def images(self, pictures: Sequence[Path]) -> Floats:
        """(N, D), of length 1; a few are in memory at a time. Raises PhotoError."""
        found = []
        for several in _batches(pictures):
            opened = [Image.fromarray(load_photo(path).rgb) for path in several]
            pixels = self.processor(opened, return_tensors="pt").pixel_values.to(self.device)
            found.append(self.model.visual_projection(self.model.vision_model(pixels).pooler_output).cpu())
        return _unit(torch.cat(found).double().numpy())

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Floats:
        """(N, D), of length 1."""
        found = []
        for several in _batches(texts):
            ids = self.tokenizer(list(several), padding=True, truncation=True, return_tensors="pt").to(self.device)
            found.append(self.model.text_projection(self.model.text_model(**ids).pooler_output).cpu())
        return _unit(torch.cat(found).double().numpy())


class Aesthetic(nn.Module):
    """LAION's "improved aesthetic predictor": CLIP ViT-L/14's image embedding, of length 1 → a mark from 1 to 10.

    Its weights under their published names (layers.0, 2, 4, 6 and 7), as safetensors. Source:
    christophschuhmann/improved-aesthetic-predictor; the package that contains it requires an older transformers.
    """

    def __init__(self, file: Path) -> None:
        """Raises CheckpointError for other weights than these."""
        super().__init__()
        try:
            weights = load_file(file)
            width = weights["layers.0.weight"].shape[1]
            sizes = [(0, width, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)]
            self.layers = nn.ModuleDict({str(number): nn.Linear(a, b) for number, a, b in sizes})
            self.load_state_dict({key: value.float() for key, value in weights.items()})
        except Exception as error:  # safetensors' exceptions, KeyError, RuntimeError for other shapes
            raise CheckpointError(
                f"{file} is not the aesthetic head in safetensors: {error}. Convert it again."
            ) from error

    @torch.no_grad()
    def marks(self, embeddings: Floats) -> Floats:
        """(N,) of (N, D) embeddings."""
        values = torch.from_numpy(embeddings).float()
        for layer in self.layers.values():
            values = layer(values)
        return np.asarray(values[:, 0].double().numpy())


class Faces:
    """A face recogniser as ONNX, (N, 3, S, S) RGB → (N, D), on faces that our own front end finds.

    Pixels are scaled as (x − 127.5) / 128 for FaceNet (facenet-pytorch's InceptionResnetV1, which takes 160 px).
    """

    def __init__(self, file: Path, face_models: Path) -> None:
        """Raises CheckpointError if the file is not such a network, EngineDamaged for the face models."""
        import onnxruntime

        from realisid_trt.backends.sessions import session_options

        try:
            self.session: Any = onnxruntime.InferenceSession(
                str(file), session_options(), providers=["CPUExecutionProvider"]
            )
            self.input: str = self.session.get_inputs()[0].name
            self.size = int(self.session.get_inputs()[0].shape[-1])
        except Exception as error:  # ONNX Runtime's exceptions, or int's for a dynamic side
            raise CheckpointError(
                f"{file} is not a face recogniser as ONNX, (N, 3, S, S) with a fixed S → (N, D): {error}."
            ) from error
        self.finder = FaceFinder.load(face_models)

    def embeddings(self, pictures: Sequence[Path]) -> Floats:
        """(N, D), of length 1; NaN for a picture in which no face, or no single one, can be chosen."""
        found: list[Floats | None] = []
        for path in pictures:
            try:
                photo = load_photo(path)
                face = self.finder.find(photo, path.name)
            except PhotoError:
                found.append(None)
                continue
            turned = photo.turned(face.turns)
            crop, _ = crop_square(turned.rgb, as_box(np.array(face.square) / turned.scale), self.size)
            pixels = ((crop.astype(np.float32) - 127.5) / 128).transpose(2, 0, 1)[None]
            found.append(np.asarray(self.session.run(None, {self.input: pixels})[0][0], np.float64))
        width = next((len(one) for one in found if one is not None), 1)
        return _unit(np.stack([np.full(width, np.nan) if one is None else one for one in found]))


def measure(
    pictures: Path, references: Path, clip: Clip | None, aesthetic: Aesthetic | None, faces: Faces | None
) -> tuple[dict[str, Floats], Names]:
    """Metric → one number per picture of the folder, in the order of names; and the person in every picture.

    pictures:   NAME.png with its prompt in NAME.txt (or a metadata.jsonl). references: the ID photo of each, by NAME.
    clip_t: cosine of picture and prompt. clip_i, facenet: cosine of picture and ID photo. aesthetic: 1 to 10.

    A person is named by the hash of the ID photo, since the same photo under several names is one person.
    """
    captions = captions_of(str(pictures))
    made = [pictures / name for name, _ in captions]
    photos = [_reference(references, name) for name, _ in captions]
    who = np.array([file_sha256(photo) for photo in photos])
    _, first, whose = np.unique(who, return_index=True, return_inverse=True)
    persons = [photos[index] for index in first]
    found: dict[str, Floats] = {}
    if clip is not None:
        embedded = clip.images(made)
        found["clip_t"] = (embedded * clip.texts([text for _, text in captions])).sum(1)
        found["clip_i"] = (embedded * clip.images(persons)[whose]).sum(1)
        if aesthetic is not None:
            found["aesthetic"] = aesthetic.marks(embedded)
    if faces is not None:
        found["facenet"] = (faces.embeddings(made) * faces.embeddings(persons)[whose]).sum(1)
    return found, who


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 bad usage."""
    given = _parser().parse_args(arguments)
    return run(lambda: _measured(given), given.json)


def _measured(given: argparse.Namespace) -> Outcome:
    if given.clip is None and given.facenet is None:
        raise RequestError("no metric is chosen. Give --clip, --facenet, or both.")
    if given.aesthetic is not None and given.clip is None:
        raise RequestError("--aesthetic reads CLIP's embedding. Give --clip (ViT-L/14) too.")
    if given.facenet is not None and given.face_models is None:
        raise RequestError("--facenet needs the faces of the pictures. Give --face-models engines/NAME/faces too.")
    device = _device(given.device)
    clip = None if given.clip is None else Clip(given.clip, device)
    aesthetic = None if given.aesthetic is None else Aesthetic(given.aesthetic)
    faces = None if given.facenet is None else Faces(given.facenet, given.face_models)
    found, who = measure(given.pictures, given.references, clip, aesthetic, faces)
    values: dict[str, Any] = {}
    lines = []
    for name, numbers in found.items():
        usable = np.isfinite(numbers)
        missing = int((~usable).sum())
        values[name] = {"values": [float(n) if ok else None for n, ok in zip(numbers, usable, strict=True)]}
        if usable.any():
            mean = estimate(Sample(numbers, who, np.arange(len(numbers))))
            values[name] |= {"mean": mean.mean, "interval95": [mean.low, mean.high] if np.isfinite(mean.low) else None}
            lines.append(f"{name:10} {mean}" + (f", {missing} of {len(numbers)} without a face" if missing else ""))
        else:
            lines.append(f"{name:10} no face in any of {len(numbers)} pictures")
    return Outcome(values, lines)


def _reference(folder: Path, name: str) -> Path:
    """The ID photo of a picture: its name, perhaps with another ending. Raises RequestError."""
    stem = str(Path(name).with_suffix(""))
    for suffix in sorted(suffixes()):
        if (folder / (stem + suffix)).is_file():
            return folder / (stem + suffix)
    raise RequestError(f"{folder} holds no ID photo {stem} ({', '.join(sorted(suffixes()))}).")


def _device(asked: str | None) -> torch.device:
    """cpu, cuda or cuda:N; a GPU if there is one and nothing is asked. Raises RequestError if this torch lacks it."""
    device = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise RequestError(f"device {device!r} is unknown, expected cpu, cuda or cuda:N.")
    if device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise RequestError(
            f"torch {torch.__version__} finds {torch.cuda.device_count()} GPUs here, and --device is {device}. "
            "Install a CUDA build of torch, or give --device cpu."
        )
    return torch.device(device)


def _batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    return (items[first : first + BATCH] for first in range(0, len(items), BATCH))


def _unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.paper_metrics",
        description="CLIP-T, CLIP-I, FaceNet similarity and aesthetic score of pictures, with weights of your own.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m training.paper_metrics --pictures out/mine --references photos --clip clip-vit-large-patch14
  python -m training.paper_metrics --pictures out/mine --references photos --facenet facenet.onnx \\
    --face-models engines/mine/faces --json""",
    )
    add = parser.add_argument
    add("--pictures", required=True, type=Path, metavar="DIR", help="NAME.png with their prompts, NAME.txt")
    add("--references", required=True, type=Path, metavar="DIR", help="the ID photo of each, by the same NAME")
    add("--clip", type=Path, metavar="DIR", help="a CLIP model in transformers' layout")
    add("--aesthetic", type=Path, metavar="FILE", help="LAION's linear head, as safetensors")
    add("--facenet", type=Path, metavar="FILE", help="a face recogniser as ONNX")
    add("--face-models", type=Path, metavar="DIR", help="the faces/ of an engine")
    add("--device", help="of CLIP: cpu, cuda, cuda:1 (default: a GPU if there is one); faces are found on the CPU")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(execute(main))
