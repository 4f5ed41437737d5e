"""From a requested person to conditions: caches, crops and poses of the caller's own, and errors for bad ones.

The face models are the real ones; the image encoder is a projection of the crop's means, so that nothing is built.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import BoxError, EngineMismatch, NumericsError, PhotoError, RequestError
from realisid_trt.persons.boxes import Grid
from realisid_trt.persons.conditions import pose_image
from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.identity import Identity
from realisid_trt.persons.people import People
from realisid_trt.persons.person import Person
from realisid_trt.persons.photo import LoadedPhoto, load_photo
from tests.realisid_trt.faces.photographs import beside, enlarged, refusal

MODEL = SimpleNamespace(
    num_id_tokens=4,
    cross_attention_dim=12,
    image_size=64,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    id_encoder_key="e" * 64,
    default_size=128,
)
GRID = Grid(128, 128, 4, 3, 4)
BOX = (10, 10, 80, 80)
CONFIG = RealisIDConfig(branch_pooled_text="zeros")
TABLE = CONFIG.table


class Encoder:
    """id_pixels (1, 3, 64, 64) → id_tokens (1, 4, 12): means of 16 × 16 px, four rows of tokens. Counts its runs."""

    def __init__(self) -> None:
        self.runs = 0
        self.factor = np.float32(1)

    def put(self, array: Any, for_networks: bool = False) -> Any:
        return array

    def get(self, tensor: Any) -> Any:
        return tensor.copy()

    def run(self, network: str, inputs: dict[str, Any]) -> dict[str, Any]:
        assert network == "id_encoder"
        self.runs += 1
        means = inputs["id_pixels"].reshape(1, 3, 4, 16, 4, 16).mean((3, 5))
        return {"id_tokens": means.transpose(0, 2, 3, 1).reshape(1, 4, 12) * self.factor}


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


@pytest.fixture
def people(encoder: Encoder, finder: FaceFinder) -> People:
    return People(encoder, finder, MODEL, CONFIG)  # type: ignore[arg-type]


def embed(people: People, photo: Any, *arguments: Any, **options: Any) -> Identity:
    found = people.look(photo, *arguments, **options)
    return found if isinstance(found, Identity) else people.encode(found)


def drawing(person: Any) -> Any:
    return person.pose_images["realisid-v1"]


def prepare(people: People, person: Person, name: str = "person 1") -> Any:
    return people.prepare(people.see(person, GRID, TABLE, alone=True, name=name))


def see_all(people: People, *persons: Person) -> Any:
    return people.see_all(persons, GRID, [TABLE] * len(persons))


# -- photos and caches -------------------------------------------------------------------------------------------------


def test_boxes_and_size_are_those_of_the_upright_original(people: People, hopper: LoadedPhoto) -> None:
    """A box drawn by hand on a photo of 5400 px is in its pixels, and a reported box can be given again."""
    small = embed(people, hopper.rgb, box=(160, 110, 350, 345))
    large = embed(people, enlarged(hopper, 9), box=np.array((160, 110, 350, 345)) * 9)
    assert large.photo_size == (5400, 4608) and small.photo_size == (600, 512)
    np.testing.assert_allclose(np.array(large.box) / 9, small.box)
    assert np.abs(large.landmarks - small.landmarks).max() < 0.03
    assert np.abs(large.id_tokens - small.id_tokens).max() < 0.1 * np.abs(small.id_tokens).max()
    placed = [prepare(people, Person(identity)).face_box.px for identity in (small, large)]
    assert placed[0] == placed[1]


def test_photo_size_is_that_of_the_turned_photo(people: People, hopper: LoadedPhoto) -> None:
    lying = embed(people, hopper.turned(1).rgb)
    assert lying.photo_size == (600, 512) and lying.box == embed(people, hopper.rgb).box
    assert "of the turned photo" in lying.notes[0]


def test_what_is_remembered_names_no_photo(people: People, encoder: Encoder, photos: Any, tmp_path: Path) -> None:
    """The same pixels under another name are the same identity: its notes must not say another photo's name."""
    copy = Path(shutil.copy(photos.hopper, tmp_path / "copy.jpg"))
    first = prepare(people, Person(photos.hopper, box=BOX), "person 1")
    again = prepare(people, Person(copy, box=BOX), "person 2")
    assert encoder.runs == 1
    assert again.notes == first.notes and again.notes[0].startswith("background removed by")
    for name in ("hopper", "person", "photo:"):
        assert name not in again.notes[0].replace("the person mask", "").replace("and person mask", "")


def test_what_is_remembered_cannot_be_written(people: People, photos: Any) -> None:
    identity = embed(people, photos.hopper)
    for array in (identity.id_tokens, identity.landmarks):
        with pytest.raises(ValueError, match="read-only"):
            array *= 2
    assert embed(people, photos.hopper) is identity


def test_the_note_on_the_background_is_that_of_the_crop(people: People, astronaut: LoadedPhoto) -> None:
    """Noise with a box by hand: the net sees no person, so the mask is the hull alone, and the note says that."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    identity = embed(people, noise, box=(64, 64, 192, 192), landmarks=embed(people, astronaut.rgb).landmarks)
    assert identity.mask_source == "hull"
    assert "mesh hull alone" in identity.notes[0] and "person mask finds no person" in identity.notes[0]


@pytest.mark.parametrize("face", [True, [0], 1.5, "left"])
def test_a_wrong_face_is_refused_whatever_is_remembered(people: People, photos: Any, face: Any) -> None:
    """As a key of a cache, True equals 1, and a list is not a valid key."""
    embed(people, photos.hopper, face=0)
    embed(people, photos.hopper, face=np.int64(0))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="expected a whole number"):
        embed(people, photos.hopper, face=face)


def test_a_wrong_box_is_refused_whatever_is_remembered(people: People, photos: Any) -> None:
    embed(people, photos.hopper, box=(160, 110, 350, 345))
    for box in (((160, 110), (350, 345)), "left", (160, 110, 350)):
        with pytest.raises(RequestError, match="four finite numbers"):
            embed(people, photos.hopper, box=box)  # type: ignore[arg-type]


def test_tokens_that_overflowed_are_an_error_of_numbers(people: People, encoder: Encoder, photos: Any) -> None:
    encoder.factor = np.float32(np.inf)
    with pytest.raises(NumericsError, match="id_tokens of .*hopper.jpg holds"):
        embed(people, photos.hopper)


# -- crops of the caller's own -----------------------------------------------------------------------------------------


def test_own_crop_is_what_the_encoder_sees(people: People, finder: FaceFinder, hopper: LoadedPhoto) -> None:
    face = finder.find(hopper)
    found = embed(people, hopper.rgb)
    crop, _ = finder.crop(hopper, face, MODEL.image_size)
    own = embed(people, hopper.rgb, crop=crop)
    np.testing.assert_array_equal(own.id_tokens, found.id_tokens)
    np.testing.assert_array_equal(own.landmarks, found.landmarks)
    assert own.mask_source == "own" and own.box == found.box and own.notes == ()
    large = Image.fromarray(finder.crop(hopper, face, 160)[0])
    reduced = large.resize((64, 64), Image.Resampling.BILINEAR)
    tokens = [embed(people, hopper.rgb, crop=picture).id_tokens for picture in (large, reduced)]
    np.testing.assert_array_equal(*tokens)
    other = embed(people, hopper.rgb, crop=np.full((64, 64, 3), 200, np.uint8))  # remembered separately
    assert np.abs(other.id_tokens - found.id_tokens).max() > 0.1 and embed(people, hopper.rgb) is found


def test_own_crop_of_a_drawing(people: People, astronaut: LoadedPhoto) -> None:
    """Nothing of a drawing needs to be found: box, landmarks and crop are the caller's."""
    landmarks = embed(people, astronaut.rgb).landmarks
    drawing = np.full((300, 300, 3), 230, np.uint8)
    identity = embed(people, drawing, box=(60, 60, 240, 240), landmarks=landmarks, crop=np.zeros((99, 99, 3), np.uint8))
    np.testing.assert_array_equal(identity.id_tokens, -1)
    np.testing.assert_array_equal(identity.landmarks, landmarks)


def test_own_crop_that_is_none(people: People, photos: Any) -> None:
    with pytest.raises(RequestError, match=r"the crop of .*hopper.jpg is 80×90, expected a square \(S, S, 3\)"):
        embed(people, photos.hopper, crop=np.zeros((90, 80, 3), np.uint8))
    assert "uint8" in refusal("dtype", people.look, photos.hopper, crop=np.zeros((90, 90, 3), np.float32))


# -- identities --------------------------------------------------------------------------------------------------------


def by_hand(identity: Identity, **changes: Any) -> Identity:
    fields = ("id_tokens", "landmarks", "box", "photo_size", "id_encoder_key", "mask_source")
    return Identity(**{name: getattr(identity, name) for name in fields} | changes)


def test_identity_of_other_tokens_is_refused(people: People, photos: Any) -> None:
    """It used to end in NumPy's "all input arrays must have the same shape"."""
    identity = embed(people, photos.hopper)
    wrong = by_hand(identity, id_tokens=np.zeros((5, 12)))
    with pytest.raises(
        RequestError, match=r"id_tokens of the identity of person 1 has shape \(5, 12\), expected \(4, 12\)"
    ):
        prepare(people, Person(wrong))
    with pytest.raises(EngineMismatch, match="the identity of person 1"):
        prepare(people, Person(by_hand(identity, id_encoder_key="0" * 64)))


def test_stored_identity_stands_for_the_photo(people: People, photos: Any, tmp_path: Path) -> None:
    identity = embed(people, photos.hopper)
    identity.save(tmp_path / "hopper.safetensors")
    expected = prepare(people, Person(photos.hopper))
    for person in (Person(tmp_path / "hopper.safetensors"), Person(identity), Person(identity=identity)):
        prepared = prepare(people, person)
        np.testing.assert_array_equal(prepared.id_tokens, expected.id_tokens)
        np.testing.assert_array_equal(drawing(prepared), drawing(expected))
        assert prepared.face_box == expected.face_box and prepared.mask_source == "hull+person"
        assert prepared.notes == expected.notes
    with pytest.raises(RequestError, match="face=1 of person 1 chooses among the faces of a photo, but an identity"):
        prepare(people, Person(str(tmp_path / "hopper.safetensors"), face=1))


# -- poses -------------------------------------------------------------------------------------------------------------


def test_landmarks_in_pixels_are_refused_not_drawn_black(people: People, finder: FaceFinder, photos: Any) -> None:
    identity = embed(people, photos.hopper)
    pixels = identity.landmarks * 200 + 100
    with pytest.raises(RequestError, match="landmarks of person 1 run from .*divide by its side"):
        prepare(people, Person(identity, landmarks=pixels))
    with pytest.raises(RequestError, match="landmarks of person 1 run from .*divide by its side"):
        prepare(people, Person(identity, pose=by_hand(identity, landmarks=pixels)))
    drawn = prepare(people, Person(identity, landmarks=identity.landmarks.astype(np.float32)[::-1][::-1]))
    assert drawing(drawn).max() == 1
    own = prepare(people, Person(identity, landmarks=np.asfortranarray(identity.landmarks)))
    np.testing.assert_array_equal(drawing(own), pose_image(identity.landmarks, 128))


def test_pose_photo_with_several_faces_says_how_to_choose(
    people: People, photos: Any, hopper: LoadedPhoto, astronaut: LoadedPhoto, tmp_path: Path
) -> None:
    """face= of a person belongs to its ID photo."""
    group = tmp_path / "group.png"
    Image.fromarray(beside(hopper, hopper).rgb).save(group)
    text = refusal("many_faces", prepare, people, Person(photos.astronaut, pose=group))
    assert "group.png: 2 faces" in text and "Choose one with pose=engine.embed(photo, face=0…1)" in text
    chosen = prepare(people, Person(photos.astronaut, pose=embed(people, group, face=1)))
    np.testing.assert_array_equal(drawing(chosen), pose_image(embed(people, group, face=1).landmarks, 128))
    id_text = refusal("many_faces", prepare, people, Person(group))
    assert "Choose one with face=0…1" in id_text


def test_what_was_decided_about_the_pose_photo_is_said(people: People, photos: Any, astronaut: LoadedPhoto) -> None:
    prepared = prepare(people, Person(photos.hopper, pose=astronaut.turned(1).rgb))
    assert [note.startswith("pose photo: the photo was turned by ") for note in prepared.notes] == [False, True]


def test_poses_that_are_none(people: People, photos: Any) -> None:
    with pytest.raises(PhotoError, match="nowhere.jpg: no such file"):
        prepare(people, Person(photos.hopper, pose="nowhere.jpg"))
    with pytest.raises(PhotoError, match="the pose of person 1: a int is not a photo"):
        prepare(people, Person(photos.hopper, pose=7))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"pose_image of person 1 reaches from 0 to 255, expected \[0, 1\]"):
        prepare(people, Person(photos.hopper, pose_image=np.tile([0.0, 255.0], (3, 128, 64))))


def test_own_tokens_are_checked_and_copied(people: People, photos: Any) -> None:
    tokens, landmarks = np.ones((4, 12)), embed(people, photos.hopper).landmarks
    prepared = prepare(people, Person(id_tokens=tokens, box=BOX, landmarks=landmarks))
    tokens[:] = 2
    assert (prepared.id_tokens == 1).all() and prepared.mask_source is None and prepared.notes == ()
    with pytest.raises(RequestError, match=r"id_tokens of person 1 has shape \(5, 12\), expected \(4, 12\)"):
        prepare(people, Person(id_tokens=np.ones((5, 12)), box=BOX, landmarks=landmarks))


def test_load_photo_is_what_embed_takes(people: People, photos: Any) -> None:
    identities = [
        embed(people, source) for source in (photos.hopper, photos.hopper.read_bytes(), load_photo(photos.hopper).rgb)
    ]
    assert all(identity is identities[0] for identity in identities)


# -- places ------------------------------------------------------------------------------------------------------------


def notes_of(people: People, *persons: Person) -> list[tuple[str, ...]]:
    return [person.notes for person in see_all(people, *persons)]


def test_what_became_of_boxes_is_told(people: People, photos: Any) -> None:
    [own] = notes_of(people, Person(photos.hopper, box=BOX))
    [moved] = notes_of(people, Person(photos.hopper, box=(-40, 10, 40, 90)))
    assert [note for note in moved if note not in own] == [
        "the picture is 128×128 px and the box reached out of it: it was moved to (0, 12, 80, 92)."
    ]
    with pytest.raises(BoxError, match="outside the picture, which is 128×128 px"):
        see_all(people, Person(photos.hopper, box=(600, 200, 800, 400)))


def test_two_in_one_place_are_told(people: People, photos: Any) -> None:
    """README's boxes for 1024 px, both shrunk to the whole of a picture of 128."""
    both = [Person(photos.hopper, box=(0, 0, 120, 120)), Person(photos.astronaut, box=(10, 0, 128, 118))]
    for index, notes in enumerate(notes_of(people, *both)):
        assert any(note.startswith(f"stands nearly where person {2 - index} stands: ") for note in notes)
    apart = [Person(photos.hopper, box=(0, 0, 60, 60)), Person(photos.astronaut, box=(60, 0, 120, 60))]
    assert not any("stands nearly" in note for notes in notes_of(people, *apart) for note in notes)


def test_a_face_at_the_end_of_a_wide_photo(people: People, hopper: LoadedPhoto) -> None:
    wide = np.full((600, 2400, 3), 128, np.uint8)
    wide[:, :512] = hopper.rgb
    [notes] = notes_of(people, Person(wide))
    assert any("has its face at or beyond the border: the face was put at" in note for note in notes)


def test_a_small_face_is_told_in_the_photo_s_terms(people: People, hopper: LoadedPhoto) -> None:
    large = np.full((2000, 2000, 3), 128, np.uint8)
    large[700:1300, 744:1256] = hopper.rgb
    with pytest.raises(BoxError, match=r"the face of person 1 would be \d+ px wide if the photo covered the picture"):
        see_all(people, Person(large))
