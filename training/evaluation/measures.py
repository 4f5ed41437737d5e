"""The judges' measures of pictures, one number per picture (or per person) and measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from realisid_trt.errors import RequestError
from realisid_trt.persons.faces.squares import as_box, crop_square, grown
from realisid_trt.persons.mesh import INNER_LIPS

from ..judges import Attributes, Detector, FacePoints, Recogniser, load_judge
from ..judges.nets import FACE_MARGIN, FACE_PX, POINTS, SIZE_PX, overlap
from ..stages.judges import caption_labels
from ..statistics import Sample
from ..world import draw
from .cases import FIRST_SCENE, GALLERY_VIEWS, NUM_DISTRACTORS, Case, Casting

Rgb = NDArray[np.uint8]
Floats = NDArray[np.float64]
BATCH = 64
GALLERY_CAPTION = "a person in a white shirt in a studio"
NEAR_COLOR = 0.15  # a colour is right if every channel, 0..1, differs by less
NUM_SIBLINGS = 3
FOUND_IOU = 0.3  # the least overlap of a found face with the box of the requested one
MEASURES = (
    "similarity", "rank1", "sibling", "neighbour", "iou", "found", "number", "landmarks", "mouth", "brow", "harmony",
    "neck", "shirt", "drawn", "drawn_similarity", "drawn_rank1", "drawn_harmony", "place", "text",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Judgement:
    """Measures of N persons in pictures (one row each), in the order of the cases and, inside them, from the left.

    people: (N,) number of the person asked for; pictures: (N,) seed of the picture they are in.
    values: measure → (N,), NaN where there is none. A value of a whole picture stands at its first person only.

    Identity, in a crop of the requested box only:
      similarity: cosine of the recogniser's embedding to the person's own gallery.
      rank1:      1 if none of eight random people's galleries is nearer (none of them is in the picture).
      sibling:    1 if none of three siblings' galleries is nearer. Siblings share skin, hair and beard.
      neighbour:  1 if no gallery of the other people in the picture is nearer.
    Location:
      iou:        of the requested box with the face found there, 0 if there is none; no face counts for two boxes.
      found:      1 where that is at least 0.3. number: 1 if as many faces are found as were requested.
    Pose, in a crop of the face found, NaN where `found` is 0; errors are divided by the side of the face:
      landmarks:  mean distance of the points. mouth: error of its opening. brow: error of the height over the eyes.
    Appearance and text:
      neck, shirt: 1 where the picture has the right median colour at the pixels of the truth's neck or shirt.
                  A neck has the colour of the face, so a face that is drawn too low passes for a neck.
      harmony:    the mean of neck and shirt, or the one that is visible.
      drawn:      1 where a face was found for the person anywhere: the one that overlaps the box most, or else the
                  nearest. No face counts for two persons.
      drawn_similarity, drawn_rank1, drawn_harmony: similarity, rank1 and harmony at that face; NaN where there is
                  none. They measure a person who stands elsewhere.
      place, text: place is 1 where the attribute classifier finds the place. text is 1 where it finds the place, the
                  number of people and every colour of shirts and hats in the caption, whoever wears them.
    features: (pictures, 128) of that classifier.
    """

    people: Floats
    pictures: Floats
    values: dict[str, Floats]
    features: Floats

    def __getitem__(self, measure: str) -> Sample:
        return Sample(self.values[measure], self.people, self.pictures)

    @property
    def cast(self) -> Floats:
        """(pictures, persons): the people of each picture. All pictures of an experiment have equally many."""
        return self.people.reshape(len(np.unique(self.pictures)), -1)


class Judges:
    """The four judges, and galleries of the people that they recognise."""

    def __init__(self, folder: Path, casting: Casting, device: torch.device | None = None) -> None:
        """Raises CheckpointError for weights that are missing, RequestError for pictures of another size."""
        if casting.size_px != SIZE_PX:
            raise RequestError(f"the judges take pictures of {SIZE_PX} px, these are of {casting.size_px} px.")
        self.casting, self.device = casting, device or torch.device("cpu")
        judges = {name: load_judge(name, folder).to(self.device) for name in ("recogniser", "face-points", "attributes",
                                                                             "detector")}  # fmt: skip
        self.recogniser: Any = judges["recogniser"]
        self.face_points: Any = judges["face-points"]
        self.attributes: Any = judges["attributes"]
        self.detector: Any = judges["detector"]
        self._gallery = lru_cache(maxsize=4096)(self._make_gallery)

    def judge(self, cases: Sequence[Case], pictures: Rgb) -> Judgement:
        """The measures of pictures (N, S, S, 3) uint8, one per case. No two cases have the same seed."""
        people = np.array([identity for case in cases for identity in case.identities], np.float64)
        seeds = np.array([case.seed for case in cases for _ in case.identities], np.float64)
        values = {name: np.full(len(people), np.nan) for name in MEASURES}
        crops = [face_crop(rgb, box) for case, rgb in zip(cases, pictures, strict=True) for box in case.picture.boxes]
        embeddings = self._embed(np.stack(crops))
        found = [box for some in _batches(pictures) for box in self.detector.boxes(self._tensor(some), most=5)]
        said, features = self._attributes(pictures)
        faces: list[tuple[int, Case, int, Rgb]] = []  # that were drawn for a person: row, case, person, crop
        row = 0
        for number, (case, rgb) in enumerate(zip(cases, pictures, strict=True)):
            boxes = [box[1:] for box in found[number]]
            values["place"][row], values["text"][row] = _text_scores(
                case, {name: logits[number] for name, logits in said.items()}
            )
            values["number"][row] = float(len(boxes) == len(case.identities))
            matched = match(case.picture.boxes, boxes)
            for person, identity in enumerate(case.identities):
                self._recognise(values, row, embeddings[row], identity, case.identities)
                iou, box = matched[person]
                values["iou"][row], values["found"][row] = iou, float(iou >= FOUND_IOU)
                values["drawn"][row] = float(box is not None)
                if box is not None:
                    faces.append((row, case, person, face_crop(rgb, np.array(box))))
                    under = [right_color(case, person, rgb, part, box) for part in ("neck", "shirt")]
                    values["drawn_harmony"][row] = _harmony(under)
                for part in ("neck", "shirt"):
                    values[part][row] = right_color(case, person, rgb, part)
                row += 1
        self._look_at(values, faces)
        values["harmony"] = np.array([_harmony(pair) for pair in zip(values["neck"], values["shirt"], strict=True)])
        return Judgement(people, seeds, values, features)

    def features(self, pictures: Rgb) -> Floats:
        """(N, 128) of the attribute classifier."""
        return self._attributes(pictures)[1]

    def _look_at(self, values: dict[str, Floats], faces: Sequence[tuple[int, Case, int, Rgb]]) -> None:
        """Measures the identity of faces drawn for a person, and the pose of those that are at the requested place."""
        if not faces:
            return
        crops = np.stack([crop for *_, crop in faces])
        for (row, case, person, _), face, points in zip(faces, self._embed(crops), self._points(crops), strict=True):
            who = case.identities[person]
            values["drawn_similarity"][row], values["drawn_rank1"][row] = self._likeness(face, who, case.identities)
            if values["found"][row]:
                truth = case.picture.landmarks[person][list(POINTS)]
                values["landmarks"][row] = np.linalg.norm(points - truth, axis=1).mean()
                for name, read in (("mouth", mouth_opening), ("brow", brow_height)):
                    values[name][row] = abs(read(points) - read(truth))

    def _recognise(
        self, values: dict[str, Floats], row: int, face: Floats, identity: int, present: Sequence[int]
    ) -> None:
        values["similarity"][row], values["rank1"][row] = self._likeness(face, identity, present)
        siblings = [self._gallery(identity, sibling) for sibling in range(NUM_SIBLINGS)]
        neighbours = [self._gallery(who) for who in present if who != identity]
        values["sibling"][row] = self._first(face, identity, siblings)
        if neighbours:
            values["neighbour"][row] = self._first(face, identity, neighbours)

    def _likeness(self, face: Floats, identity: int, present: Sequence[int]) -> tuple[float, float]:
        """similarity and rank1 of a face's embedding."""
        first = self._first(face, identity, self._distractors(identity, present))
        return float(self._gallery(identity) @ face), first

    def _first(self, face: Floats, identity: int, others: Sequence[Floats]) -> float:
        """1 if no other gallery is as near as the person's own."""
        return float(all(self._gallery(identity) @ face > other @ face for other in others))

    def _distractors(self, identity: int, present: Sequence[int]) -> list[Floats]:
        """Galleries of eight random other people, the same for a person unless one of them is in the picture."""
        rng = np.random.Generator(np.random.Philox(key=[8, identity]))
        others = [int(who) for who in rng.permutation(1000) if who != identity and who not in present]
        return [self._gallery(who) for who in others[:NUM_DISTRACTORS]]

    def _make_gallery(self, identity: int, sibling: int | None = None) -> Floats:
        """The mean embedding of true renders of a person (or a sibling of theirs) in other scenes, of length 1."""
        world, crops = self.casting.world, []
        person = world.identity(identity, "unseen")
        if sibling is not None:
            person = world.sibling(person, sibling)
        for view in range(GALLERY_VIEWS):
            number = FIRST_SCENE + 10_000_000 + identity * GALLERY_VIEWS + view
            scene = world.scene(number, face=(1 / 3, 1 / 2), identities=[person], caption=GALLERY_CAPTION)
            picture = draw(scene, self.casting.size_px)
            crops.append(face_crop(picture.rgb, picture.boxes[0]))
        mean: Floats = self._embed(np.stack(crops)).mean(0)
        return mean / np.linalg.norm(mean)

    @torch.no_grad()
    def _embed(self, crops: Rgb) -> Floats:
        assert isinstance(self.recogniser, Recogniser)
        found = [self.recogniser(self._tensor(some))[0] for some in _batches(crops)]
        return _array(torch.nn.functional.normalize(torch.cat(found), dim=-1))

    @torch.no_grad()
    def _points(self, crops: Rgb) -> Floats:
        assert isinstance(self.face_points, FacePoints)
        return _array(torch.cat([self.face_points(self._tensor(some)) for some in _batches(crops)]))

    @torch.no_grad()
    def _attributes(self, pictures: Rgb) -> tuple[dict[str, Floats], Floats]:
        assert isinstance(self.attributes, Attributes) and isinstance(self.detector, Detector)
        predictions = [self.attributes(self._tensor(some)) for some in _batches(pictures)]
        logits = {name: _array(torch.cat([one[name] for one, _ in predictions])) for name in predictions[0][0]}
        return logits, _array(torch.cat([features for _, features in predictions]))

    def _tensor(self, pictures: Rgb) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(pictures)).to(self.device).permute(0, 3, 1, 2).float() / 255


def match(asked: Floats, found: Sequence[tuple[float, ...]]) -> list[tuple[float, tuple[float, ...] | None]]:
    """For every requested box, the overlap and the box of the found face that overlaps it most, or else lies nearest.

    Each face goes to one box; (0, None) where none is left.
    """
    pairs = [
        (-overlap(tuple(box), face), _apart(box, face), person, number)
        for person, box in enumerate(asked)
        for number, face in enumerate(found)
    ]
    best: list[tuple[float, tuple[float, ...] | None]] = [(0.0, None)] * len(asked)
    taken: set[int] = set()
    for minus_iou, _, person, number in sorted(pairs):
        if best[person][1] is None and number not in taken:
            best[person] = -minus_iou, tuple(found[number])
            taken.add(number)
    return best


def _apart(box: Sequence[float], other: Sequence[float]) -> float:
    """Twice the distance of their centres."""
    return math.dist(*((x0 + x1, y0 + y1) for x0, y0, x1, y1 in (box, other)))


def face_crop(rgb: Rgb, box: Floats) -> Rgb:
    """(FACE_PX, FACE_PX, 3): the face square and a quarter more, as the recogniser was trained on."""
    x0, y0, x1, y1 = (float(value) for value in box)
    return crop_square(np.ascontiguousarray(rgb), grown(as_box((x0, y0, x1, y1)), FACE_MARGIN), FACE_PX)[0]


_WHERE = {index: place for place, index in enumerate(POINTS)}
_UPPER_LIP, _LOWER_LIP = 13, 14
_BROWS, _EYES = (105, 334), (159, 386)  # middle of the brows' upper edge, upper lids


def mouth_opening(points: Floats) -> float:
    """Distance of the inner lips, of (len(POINTS), 2) landmarks."""
    assert _UPPER_LIP in INNER_LIPS and _LOWER_LIP in INNER_LIPS
    return float(np.linalg.norm(points[_WHERE[_LOWER_LIP]] - points[_WHERE[_UPPER_LIP]]))


def brow_height(points: Floats) -> float:
    """Mean distance of the brows from the upper lids."""
    return float(np.mean([np.linalg.norm(points[_WHERE[b]] - points[_WHERE[e]]) for b, e in zip(_BROWS, _EYES)]))  # noqa: B905


def right_color(case: Case, person: int, rgb: Rgb, part: str, face: Sequence[float] | None = None) -> float:
    """1 if the truth's `part`, in a window under the face, has its colour; NaN if the part is not visible there.

    The window is about as wide and as high as the face square. Posture and gesture, which no request states, lie
    outside of it.
    face: (x0, y0, x1, y1) px, where the face is; the truth is moved and scaled to it. None: in the requested box.
    """
    x0, y0, x1, y1 = case.picture.boxes[person]
    window = np.zeros(rgb.shape[:2], bool)
    window[int(y1 - 0.1 * (y1 - y0)) : int(y1 + (y1 - y0)), int(x0) : int(x1)] = True
    shown = case.picture.shows(part, person) & window
    if face is not None:
        shown = moved(shown, case.picture.boxes[person], face)
    if shown.sum() < 6:
        return float("nan")
    found = np.median(rgb[shown].astype(np.float64), axis=0) / 255
    return float(np.abs(found - case.picture.color(part, person) / 255).max() < NEAR_COLOR)


def moved(mask: NDArray[np.bool_], box: Sequence[float], to: Sequence[float]) -> NDArray[np.bool_]:
    """The mask (H, W), moved and scaled as `box` is onto `to`, both (x0, y0, x1, y1) px; zero from outside."""
    scale = [(to[axis + 2] - to[axis]) / (box[axis + 2] - box[axis]) for axis in (0, 1)]
    # OpenCV counts from the middle of the first pixel, boxes from its edge
    shift = [to[axis] - scale[axis] * box[axis] + (scale[axis] - 1) / 2 for axis in (0, 1)]
    matrix = np.array([(scale[0], 0, shift[0]), (0, scale[1], shift[1])])
    there = cv2.warpAffine(mask.astype(np.uint8), matrix, mask.shape[::-1], flags=cv2.INTER_NEAREST)
    return np.asarray(there > 0)


def _harmony(pair: Sequence[float]) -> float:
    """The mean of neck and shirt, or the one that is visible; NaN if neither is."""
    seen = [value for value in pair if np.isfinite(value)]
    return float(np.mean(seen)) if seen else float("nan")


def _text_scores(case: Case, logits: dict[str, Floats]) -> tuple[float, float]:
    """(is the place right, is everything right) by the attribute classifier."""
    true = {name: value.numpy() for name, value in caption_labels(case.scene.caption).items()}
    right = {name: float(logits[name].argmax() == true[name]) for name in ("place", "persons")}
    right |= {name: float(((logits[name] > 0) == (true[name] > 0.5)).all()) for name in ("shirts", "hats")}
    return right["place"], float(all(right.values()))


def _batches(pictures: Rgb) -> list[Rgb]:
    return [pictures[first : first + BATCH] for first in range(0, len(pictures), BATCH)]


def _array(tensor: torch.Tensor) -> Floats:
    return np.asarray(tensor.float().cpu().numpy(), np.float64)
