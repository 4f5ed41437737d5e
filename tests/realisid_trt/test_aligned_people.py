"""Persons of an engine with a face encoder and ID patches: embeddings, identities, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realisid_trt.branches import Branch
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import EngineMismatch, NumericsError, RequestError
from realisid_trt.loop.controls import with_patches
from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.faces.face_encoder import FaceEncoder, in_norm
from realisid_trt.persons.identities import POINTS_OF_THE_MESH
from realisid_trt.persons.identity import Identity
from realisid_trt.persons.people import People
from realisid_trt.persons.person import Person, placeholder
from realisid_trt.persons.photo import LoadedPhoto
from tests.realisid_trt.aligned import (
    BODY,
    CONFIG,
    EMBEDDING,
    GRID,
    PICTURE,
    Projections,
    encoder_in,
    people_of,
    prepared,
    seen,
)


@pytest.fixture
def projections() -> Projections:
    return Projections()


@pytest.fixture
def encoder(tmp_path: Path) -> FaceEncoder:
    return encoder_in(tmp_path / "face_encoder")


@pytest.fixture
def people(projections: Projections, finder: FaceFinder, encoder: FaceEncoder) -> People:
    return people_of(projections, finder, encoder)


# -- from a photo to tokens and patch ----------------------------------------------------------------------------------


def test_a_photo_becomes_an_embedding_and_that_tokens_and_a_patch(
    people: People, projections: Projections, encoder: FaceEncoder, finder: FaceFinder, hopper: LoadedPhoto, photos: Any
) -> None:
    face = finder.find(hopper)
    identity = people.look(photos.hopper)
    assert isinstance(identity, Identity) and projections.runs == 0  # no network of the engine runs
    assert identity.embedding is not None and identity.embedding.tobytes() == encoder(hopper, face).tobytes()
    assert abs(np.linalg.norm(identity.embedding) - 1) < 1e-6
    assert identity.mask_source == "aligned" and identity.notes == () and identity.id_encoder_key == "e" * 64
    assert identity.keypoints is not None and np.array_equal(identity.keypoints, face.keypoints)
    assert np.array_equal(identity.landmarks, face.landmarks) and identity.box == face.square
    person = prepared(people, Person(photos.hopper, at=(60, 70)))
    np.testing.assert_allclose(person.id_tokens.ravel(), identity.embedding @ projections.tokens, rtol=1e-5)
    np.testing.assert_allclose(person.id_patch.ravel(), identity.embedding @ projections.patch, rtol=1e-5)
    assert person.id_patch.shape == (3, 8, 8) and person.mask_source == "aligned"
    assert person.anchor.tolist() == [60, 70] and person.face_box is None


def test_what_is_remembered(people: People, projections: Projections, photos: Any, tmp_path: Path) -> None:
    """A photo, its identity, the stored one, its embedding and a copy are one run of the ID encoder."""
    identity = people.look(photos.hopper)
    assert isinstance(identity, Identity) and people.look(photos.hopper.read_bytes()) is identity
    identity.save(tmp_path / "hopper.safetensors")
    persons = [
        Person(photos.hopper, at=(60, 70)),
        Person(identity, at=(60, 70)),
        Person(identity=pickle.loads(pickle.dumps(identity)), at=(60, 70)),
        Person(tmp_path / "hopper.safetensors", at=(60, 70)),
        Person(embedding=identity.embedding, at=(60, 70)),
    ]
    first, *others = [prepared(people, person) for person in persons]
    assert projections.runs == 1
    assert all(other.id_tokens is first.id_tokens and other.id_patch is first.id_patch for other in others)
    with pytest.raises(ValueError, match="read-only"):
        first.id_patch[0] = 0


def test_a_given_box_is_aligned_by_the_mesh_and_says_so(people: People, photos: Any) -> None:
    given = people.look(photos.hopper, box=(160, 110, 350, 345))
    assert isinstance(given, Identity) and given.notes == (POINTS_OF_THE_MESH,) and given.keypoints is not None
    points = np.array(given.box[:2]) + given.landmarks[[468, 473, 4, 61, 291]] * (given.box[2] - given.box[0])
    np.testing.assert_allclose(given.keypoints, points, atol=1e-9)
    assert "without box= the identity is closer" in prepared(people, Person(given, at=(9, 9))).notes[0]
    with pytest.raises(RequestError, match="are one point, so the face cannot be aligned"):
        people.look(photos.hopper, box=(160, 110, 350, 345), landmarks=np.full((478, 2), 0.5))


def test_an_aligned_face_of_the_callers_own(
    people: People, encoder: FaceEncoder, finder: FaceFinder, hopper: LoadedPhoto
) -> None:
    aligned = encoder.alignment(hopper, finder.find(hopper))
    own, found = people.look(hopper.rgb, crop=aligned), people.look(hopper.rgb)
    assert isinstance(own, Identity) and isinstance(found, Identity) and own is not found
    assert own.mask_source == "own" and own.notes == () and np.array_equal(own.embedding, found.embedding)  # type: ignore[arg-type]
    grey = people.look(hopper.rgb, crop=np.full((50, 50, 3), 90, np.uint8))
    assert isinstance(grey, Identity) and not np.allclose(grey.embedding, found.embedding)  # type: ignore[arg-type]


def test_numbers_that_overflowed(people: People, projections: Projections) -> None:
    projections.factor = np.float32(np.inf)
    with pytest.raises(NumericsError, match="id_tokens of person 1 holds"):
        prepared(people, Person(embedding=EMBEDDING, at=(60, 70)))


# -- embeddings of the caller's own ------------------------------------------------------------------------------------


def test_embeddings_get_the_norm_of_the_encoder(
    people: People, projections: Projections, finder: FaceFinder, tmp_path: Path
) -> None:
    unit = in_norm(EMBEDDING.astype(np.float32), "unit")
    person = prepared(people, Person(embedding=EMBEDDING, at=(60, 70)))
    np.testing.assert_allclose(person.id_patch.ravel(), unit @ projections.patch, rtol=1e-5)
    assert prepared(people, Person(embedding=unit, at=(1, 2))).id_patch is person.id_patch
    raw = people_of(projections, finder, encoder_in(tmp_path / "raw", norm="raw"))
    longer = prepared(raw, Person(embedding=EMBEDDING, at=(60, 70)))
    np.testing.assert_allclose(longer.id_patch, person.id_patch * np.linalg.norm(EMBEDDING), rtol=1e-4)
    with pytest.raises(RequestError, match="the embedding of person 1 looks normalised"):
        prepared(raw, Person(embedding=unit, at=(60, 70)))
    with pytest.raises(RequestError, match=r"the embedding of person 1 has shape \(500,\), expected \(512,\)"):
        prepared(people, Person(embedding=EMBEDDING[:500], at=(60, 70)))
    with pytest.raises(RequestError, match="the embedding of person 1 is all zeros"):
        prepared(people, Person(embedding=np.zeros(512), at=(60, 70)))


def test_persons_own_their_arrays(people: People) -> None:
    values, keypoints = EMBEDDING.copy(), np.full((5, 2), 0.5)
    person = Person(embedding=values, at=np.array([3, 4]), keypoints=keypoints)  # type: ignore[arg-type]
    values[:], keypoints[:] = 0, 0
    for found in (person, pickle.loads(pickle.dumps(person))):
        assert found.embedding.any() and (found.keypoints == 0.5).all() and found.at == (3.0, 4.0)
        for array in (found.embedding, found.keypoints):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"photo": "a.jpg", "embedding": EMBEDDING},
            "one of photo, identity, id_tokens and embedding; got photo",
        ),
        ({"embedding": [EMBEDDING]}, r"embedding has shape \(1, 512\), expected \(512,\)"),
        ({"embedding": np.full(512, np.nan)}, "embedding holds NaN or infinity"),
        ({"photo": "a.jpg", "at": (1, 2, 3)}, r"at is \(1, 2, 3\), expected x, y in px of the output"),
        ({"photo": "a.jpg", "at": "left"}, r"at is not an array of numbers. Expected x, y in px .*: at=\(312, 240\)"),
        ({"photo": "a.jpg", "at": "3,4"}, r"at is not an array of numbers. Expected x, y in px .*: at=\(312, 240\)"),
        ({"photo": "a.jpg", "at": (1, np.inf)}, "at holds NaN or infinity"),
        ({"photo": "a.jpg", "at": (0.5, 0.25)}, r"at is \(0.5, 0.25\), expected px of the output. Multiply x by"),
        ({"photo": "a.jpg", "keypoints": np.ones((4, 2))}, r"keypoints has shape \(4, 2\), expected \(5, 2\)"),
        ({"photo": "a.jpg", "keypoints": np.full((5, 2), 90)}, "keypoints run from 90 to 90, expected about 0 to 1"),
        (
            {"photo": "a.jpg", "keypoints": np.ones((5, 2)), "pose": "b.jpg"},
            "at most one of pose, landmarks, pose_image and keypoints; got pose and keypoints",
        ),
    ],
)
def test_persons_that_cannot_be_meant(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Person(**given)


def test_what_gives_no_patch_is_refused(people: People, projections: Projections, finder: FaceFinder) -> None:
    tokens = Person(id_tokens=np.zeros((4, 12)), body=BODY)
    with pytest.raises(RequestError, match="person 1 has id_tokens, and no ID patch can be made of them. Give a photo"):
        seen(people, tokens)
    with pytest.raises(RequestError, match="person 1 needs exactly one of photo, identity and embedding; got none"):
        seen(people, Person(body=BODY))
    with pytest.raises(RequestError, match="person 1 needs exactly one of photo, identity and embedding; got none"):
        seen(people, Person(landmarks=np.full((478, 2), 0.5), box=(0, 0, 64, 64)))
    realisid = RealisIDConfig(branch_pooled_text="zeros")
    cropping = people_of(projections, finder, None, realisid)
    with pytest.raises(RequestError, match="person 1 has an embedding, and this engine has no face encoder"):
        cropping.see(Person(embedding=EMBEDDING, at=(9, 9)), GRID, [], alone=True, name="person 1")
    row = {"name": "pose", "condition": "image", "style": "openpose-mmpose", "tokens": "text", "pooled": "per_row"}
    nobody = people_of(projections, finder, None, RealisIDConfig.from_dict({"method": "controlnet", "branches": [row]}))
    with pytest.raises(RequestError, match="person 1 has embedding, and this engine has no identities"):
        nobody.see(Person(embedding=EMBEDDING, at=(9, 9)), GRID, [], alone=True, name="person 1")


def test_identities_of_the_other_kind_and_of_another_encoder(
    people: People, projections: Projections, finder: FaceFinder, photos: Any
) -> None:
    embedded = people.look(photos.hopper)
    assert isinstance(embedded, Identity)
    kept = (embedded.landmarks, embedded.box, embedded.photo_size)
    tokens = Identity(np.zeros((4, 12)), *kept, "e" * 64, "hull")
    with pytest.raises(EngineMismatch, match="of person 1 holds ID tokens, and this engine needs an embedding"):
        seen(people, Person(tokens, at=(60, 70)), image=PICTURE)
    cropping = people_of(projections, finder, None, RealisIDConfig(branch_pooled_text="zeros"))
    with pytest.raises(EngineMismatch, match="of person 1 holds an embedding, and this engine needs ID tokens"):
        cropping.see(Person(embedded, box=(0, 0, 64, 64)), GRID, [], alone=True, name="person 1")
    other = Identity(None, *kept, "0" * 64, "aligned", (), embedded.embedding, embedded.keypoints)
    with pytest.raises(EngineMismatch, match="identity of person 1 was made by another ID encoder"):
        seen(people, Person(other, at=(60, 70)), image=PICTURE)


# -- beside other branches ---------------------------------------------------------------------------------------------


def test_keypoints_are_no_landmarks(projections: Projections, finder: FaceFinder, photos: Any) -> None:
    people = people_of(projections, finder, None, RealisIDConfig(branch_pooled_text="zeros"))
    local: list[Branch] = [RealisIDConfig(branch_pooled_text="zeros").table[0]]
    person = Person(id_tokens=np.zeros((4, 12)), box=(0, 0, 64, 64), keypoints=np.full((5, 2), 0.5))
    with pytest.raises(RequestError, match="person 1 has keypoints, and the branch local draws 478 landmarks"):
        people.see(person, GRID, local, alone=True, name="person 1")


def test_placeholders_have_all(people: People) -> None:
    person = placeholder(64, (4, 12), 512)
    for image in (None, PICTURE):
        found, shown = seen(people, person, person, image=image)
        ready = [people.prepare(each) for each in found]
        [painted] = with_patches(CONFIG.table, shown, ready)["id_patch"]
        assert painted.shape == (3, 256, 192) and ready[0].anchor.tolist() == [32, 32]
    assert placeholder(64, (4, 12)).id_tokens is not None and placeholder(64, (4, 12)).embedding is None
    assert placeholder(64, None).id_tokens is None
