"""`inspect PHOTO`: the faces of a photo with the numbers that choose them, and the inputs made from the chosen one."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..errors import PhotoError
from ..loop.picture import to_pil
from ..manifest import Manifest
from ..persons.conditions import pose_image
from ..persons.faces import FaceFinder
from ..persons.faces.alignment import Alignment
from ..persons.photo import LoadedPhoto, load_photo
from .command_line import Outcome
from .drawing import side_by_side, with_boxes, with_points

SHEET_PX = 512


def inspect_photo(path: str, engine: str, face: int | None = None) -> tuple[Outcome, Image.Image]:
    """The faces that an engine's models find in a photo, and a sheet that shows them. See `found_in`."""
    photo = load_photo(path)  # first: a mistyped name is reported before a missing engine
    manifest = Manifest.read(engine)
    manifest.check_files()
    finder = FaceFinder.load(manifest.path / "faces", files=manifest.files_in("faces"))
    encoder, config = manifest.model.face_encoder, manifest.config
    alignment = None if encoder is None else Alignment.of(encoder)
    return found_in(photo, path, finder, face, config.face_margin, config.pose_style, alignment)


def found_in(
    photo: LoadedPhoto,
    path: str,
    finder: FaceFinder,
    face: int | None,
    face_margin: float,
    pose_style: str,
    alignment: Alignment | None = None,
) -> tuple[Outcome, Image.Image]:
    """Every face of a photo numbered from the left, and of the chosen one landmarks, crop and pose.

    path:      of the photo, for messages.
    face:      which one, counted from the left from 0; None takes the only or the clearly largest one.
    alignment: of an engine with a face encoder: the sheet has the five points, and the aligned face for the crop.

    Returns the outcome, boxes in photo px of the photo turned by `turns`, and the sheet. If there are faces but none
    can be taken, the sheet is the photo with their numbers, `why` holds the reason, and the status is 1, but 0 if only
    a choice is missing (many_faces). Raises PhotoError if no face is found.
    """
    seen = finder.see(photo)
    numbered = with_boxes(Image.fromarray(seen.photo.rgb), seen.detections.boxes.tolist(), first=0)
    values = {"faces": seen.boxes.tolist(), "turns": seen.turns, "photo_size": seen.photo.size}
    try:
        found = finder.find(photo, path, face=face)
    except PhotoError as error:
        if not len(seen.detections):
            raise
        outcome = Outcome(
            values | {"chosen": None, "why": str(error)}, [str(error)], status=int(error.code != "many_faces")
        )
        return outcome, side_by_side([numbered], SHEET_PX)
    points = found.points_px
    if alignment is None:
        crop, mask_source = finder.crop(photo, found, SHEET_PX, face_margin)
        how = f"background removed by {mask_source}"
    else:
        crop, mask_source, points = alignment(photo, found), "aligned", found.keypoints
        how = "aligned by its eyes, nose and mouth"
    marked = with_points(Image.fromarray(seen.photo.rgb), points / photo.scale)
    marked = with_boxes(marked, seen.detections.boxes.tolist(), first=0)
    pose = pose_image(found.landmarks, SHEET_PX, pose_style).transpose(1, 2, 0)
    notes = [*found.notes, *finder.notes_on(mask_source)]
    values |= {
        "chosen": {
            "box": found.box,
            "square": found.square,
            "keypoints": found.keypoints.tolist(),
            "turns": found.turns,
            "score": found.score,
        },
        "mask_source": mask_source,
        "models": finder.model_id,
        "notes": notes,
    }
    count = len(seen.detections)
    lines = [
        f"{Path(path).name}: {count} face{'s' * (count != 1)}; taken: the one at "
        f"({', '.join(f'{v:.1f}' for v in found.box)}) px, {how}",
        *(f"note: {note}" for note in notes),
    ]
    return Outcome(values, lines), side_by_side([marked, Image.fromarray(crop), to_pil(pose)], SHEET_PX)
