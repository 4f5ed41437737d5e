"""The judges' nets. All take (B, 3, S, S) float in [0, 1], RGB."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from realisid_trt.errors import CheckpointError
from realisid_trt.persons.conditions import POSE_STYLES

from ..world import FACTORS, HATS, PLACES, SHIRTS
from ..world.words import MOST_PERSONS

SIZE_PX = 128  # side of the pictures that Attributes and Detector take
FACE_PX = 48  # side of the crops that Recogniser and FacePoints take
FACE_MARGIN = 1.25  # side of a crop over the side of the face square
STRIDE = 4  # px per cell of the Detector's map
# The landmarks that a pose drawing shows, in order, each once.
POINTS: tuple[int, ...] = tuple(
    sorted(
        {index for line in POSE_STYLES["realisid-v1"].lines for index in line.path}
        | {disc.iris[0] for disc in POSE_STYLES["realisid-v1"].discs}
    )
)


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1), nn.GroupNorm(8, outputs), nn.ReLU(),
    )  # fmt: skip


def _trunk(widths: tuple[int, ...]) -> nn.Sequential:
    """Halves the picture at every stage but the first."""
    pairs = zip((3, *widths), widths, strict=False)
    return nn.Sequential(*(_stage(a, b, 1 if a == 3 else 2) for a, b in pairs))


class Recogniser(nn.Module):
    """Identity: crops of FACE_PX → embeddings (B, 96) and factors (B, 27).

    The cosine of two embeddings measures how similar two faces are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _trunk((24, 48, 96, 128))
        self.embed = nn.Linear(128 * 36, 96)
        self.factors = nn.Linear(96, len(FACTORS))

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        embeddings = self.embed(self.trunk(crops * 2 - 1).flatten(1))
        return embeddings, self.factors(embeddings)


class FacePoints(nn.Module):
    """Pose and expression: crops of FACE_PX → (B, len(POINTS), 2) landmarks in [0, 1] of the face square."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _trunk((24, 48, 64, 96))
        self.points = nn.Sequential(nn.Linear(96 * 36, 192), nn.ReLU(), nn.Linear(192, 2 * len(POINTS)))

    def forward(self, crops: Tensor) -> Tensor:
        points: Tensor = self.points(self.trunk(crops * 2 - 1).flatten(1)).unflatten(1, (-1, 2)) + 0.5
        return points


class Attributes(nn.Module):
    """The attributes of a caption: pictures → logits by name, and the features (B, 128) of the Fréchet distance.

    place (B, 8) and persons (B, 3) are one of many; shirts (B, 8) and hats (B, 4) state for each colour whether a
    person wears it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _trunk((16, 32, 64, 96, 128))
        self.features = nn.Linear(128 * 2, 128)
        sizes = {"place": len(PLACES), "persons": MOST_PERSONS, "shirts": len(SHIRTS), "hats": len(HATS)}
        self.heads = nn.ModuleDict({name: nn.Linear(128, size) for name, size in sizes.items()})

    def forward(self, pictures: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        maps = self.trunk(pictures * 2 - 1).flatten(2)
        features = self.features(torch.cat([maps.mean(2), maps.amax(2)], 1))
        return {name: head(features.relu()) for name, head in self.heads.items()}, features


class Detector(nn.Module):
    """Where faces are: pictures → (B, 5, S/4, S/4): a logit "the centre of a face lies here", and its square's edges.

    Channels 1 to 4: left, top, right, bottom distance of the edges from the cell's centre, in cells, as softplus of
    the net's outputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([_stage(3, 16, 1), _stage(16, 32, 2), _stage(32, 64, 2), _stage(64, 96, 2),
                                   _stage(96, 128, 2)])  # fmt: skip
        self.up = nn.ModuleList([_stage(128 + 96, 96, 1), _stage(96 + 64, 64, 1)])
        self.out = nn.Conv2d(64, 5, 3, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        maps = [pictures * 2 - 1]
        for stage in self.down:
            maps.append(stage(maps[-1]))
        found = maps[-1]
        for stage, skip in zip(self.up, (maps[-2], maps[-3]), strict=True):
            found = stage(torch.cat([nn.functional.interpolate(found, scale_factor=2.0), skip], 1))
        output = self.out(found)
        return torch.cat([output[:, :1], nn.functional.softplus(output[:, 1:])], 1)

    @torch.no_grad()
    def boxes(self, pictures: Tensor, most: int = 3, threshold: float = 0.3) -> list[list[tuple[float, ...]]]:
        """Per picture the faces found, best first: (score, x0, y0, x1, y1) px, no two of one face."""
        output = self(pictures)
        found = []
        for scores, edges in zip(output[:, 0].sigmoid(), output[:, 1:], strict=True):
            kept: list[tuple[float, ...]] = []
            for place in scores.flatten().argsort(descending=True)[: 40 * most].tolist():
                row, column = divmod(place, scores.shape[1])
                score = float(scores[row, column])
                if score < threshold or len(kept) == most:
                    break
                left, top, right, bottom = edges[:, row, column].tolist()
                x, y = column + 0.5, row + 0.5
                box = tuple(STRIDE * edge for edge in (x - left, y - top, x + right, y + bottom))
                if all(overlap(box, other[1:]) < 0.45 for other in kept):
                    kept.append((score, *box))
            found.append(kept)
        return found


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0.0) * max(height, 0.0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return both / max(areas - both, 1e-9)


JUDGES: dict[str, type[nn.Module]] = {
    "recogniser": Recogniser, "face-points": FacePoints, "attributes": Attributes, "detector": Detector,
}  # fmt: skip


def load_judge(name: str, folder: Path) -> nn.Module:
    """A trained judge, in evaluation mode. Raises CheckpointError if its weights are not in the folder, or damaged."""
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. Train it: python -m training.train {name} …")
    judge = JUDGES[name]()
    try:
        judge.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} holds no {name} of this version ({error}). Train it again.") from error
    return judge.eval().requires_grad_(False)
