"""The procedural world: same numbers, same bytes; boxes and landmarks are where the drawing is."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import cv2
import numpy as np
import pytest

from realisid_trt.persons.boxes import Grid, snap_box
from realisid_trt.persons.conditions import YELLOW
from realisid_trt.persons.mesh import (
    INNER_LIPS,
    JAW,
    LEFT_BROW,
    LEFT_EYE,
    LEFT_IRIS,
    NOSE_RIDGE,
    OUTER_LIPS,
    RIGHT_BROW,
    RIGHT_EYE,
    RIGHT_IRIS,
    checked_landmarks,
)
from tests.training.support import WORLD, bare, portrait, same
from training.world import (
    FACTORS,
    PARTS,
    PLACED,
    POSE_LIMITS,
    REGULAR,
    SMALL,
    Picture,
    Pose,
    World,
    draw,
    face_masks,
    landmarks,
)
from training.world.heads import FOREHEAD, OUTLINE_STEPS, Heads

# -- the same numbers, the same bytes ---------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_in_any_order() -> None:
    first = [draw(World(7).scene(index), 64) for index in range(6)]
    order = [4, 1, 5, 0, 3, 2]
    world = World(7)
    again = {index: draw(world.scene(index), 64) for index in order}
    assert all(same(first[index], again[index]) for index in order)


def test_a_known_person() -> None:
    """Guards the stream of random numbers: trained weights and published tables depend on it."""
    person = World(0).identity(0)
    assert person.name == ("train", 0) and person.factors.shape == (len(FACTORS),)
    np.testing.assert_array_equal(person.factors[:4], KNOWN)
    assert World(0).scene(0).caption == KNOWN_CAPTION


KNOWN = [0.3414751651830509, 0.947616052657659, 0.6808197951310229, 0.11815082767133578]
KNOWN_CAPTION = "a person in a yellow shirt at the beach"


def test_no_two_seeds_and_no_two_numbers_are_alike() -> None:
    pictures = [draw(World(seed).scene(index, split), 32).rgb.tobytes()
                for seed in range(4) for split in ("train", "unseen") for index in range(8)]  # fmt: skip
    assert len(set(pictures)) == len(pictures)


def test_what_is_asked_moves_nothing_else() -> None:
    free = WORLD.scene(5, persons=2)
    asked = WORLD.scene(5, persons=2, caption="two people in a green shirt and a red hat at the beach")
    assert asked.caption == "two people in a green shirt and a red hat at the beach" != free.caption
    for one, other in zip(free.actors, asked.actors, strict=True):
        assert (one.identity, one.pose, one.square) == (other.identity, other.pose, other.square)


# -- boxes and faces --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("face", [REGULAR, SMALL])
def test_the_face_square_is_the_squared_bounding_box_of_the_face(face: tuple[float, float]) -> None:
    size_px = 256
    for index in range(20):
        scene = WORLD.scene(index, face=face, persons=1 + index % 2 * (face == SMALL))
        for mask, box in zip(face_masks(scene, size_px), scene.boxes(size_px), strict=True):
            (left, right), (top, bottom) = (np.flatnonzero((mask >= 128).any(axis=axis))[[0, -1]] for axis in (0, 1))
            drawn = np.array([left, top, right + 1, bottom + 1])
            long, short = (0, 1) if right - left >= bottom - top else (1, 0)
            # the face fills the square to the pixel along its longer edge, and is centred along the other
            assert np.array_equal(drawn[[long, long + 2]], box[[long, long + 2]])
            assert abs(drawn[[short, short + 2]].mean() - box[[short, short + 2]].mean()) <= 0.5


def test_skin_of_the_face_is_seen_inside_its_square_only() -> None:
    for index in range(10):
        picture = draw(WORLD.scene(index), 256)
        for person, (x0, y0, x1, y1) in enumerate(picture.boxes.astype(int)):
            seen = picture.shows("face", person)
            assert seen.sum() == seen[y0:y1, x0:x1].sum() > 0.1 * (y1 - y0) * (x1 - x0)


@pytest.mark.parametrize(("grid", "size_px", "snap_px"), [(64, 256, 4), (32, 128, 4), (128, 1024, 8)])
def test_boxes_are_whole_pixels_which_the_runtime_leaves_where_they_are(grid: int, size_px: int, snap_px: int) -> None:
    world = World(1, grid)
    for index in range(20):
        for box in world.scene(index).boxes(size_px):
            assert np.array_equal(box, box.round())
            assert snap_box(box, Grid(size_px, size_px, 4, 3, snap_px)).px == tuple(box)


@pytest.mark.parametrize("face", [REGULAR, SMALL, (0.2, 0.2)])
def test_faces_have_the_size_asked_for(face: tuple[float, float]) -> None:
    sides = [actor.square[2] / 64 for index in range(40) for actor in WORLD.scene(index, persons=1, face=face).actors]
    assert face[0] - 1 / 128 <= min(sides) <= max(sides) <= face[1] + 1 / 128
    assert face[0] == face[1] or len(set(sides)) > 2


def test_apart_no_face_is_hidden_and_overlapping_squares_overlap() -> None:
    for index in range(12):
        number = 2 + index % 2
        for layout, meet in (("apart", False), ("overlap", True)):
            scene = WORLD.scene(index, persons=number, layout=layout)
            assert len({actor.identity for actor in scene.actors}) == number
            squares = [actor.square for actor in scene.actors]
            assert squares == sorted(squares)
            for (x, _, side), (next_x, _, _) in itertools.pairwise(squares):
                assert (next_x < x + side) == meet
            picture = draw(scene, 256)
            for person, mask in enumerate(face_masks(scene, 256)):
                seen = (picture.owners[mask == 255] == person + 1).mean()
                assert seen > 0.5 if meet else seen == 1


# -- landmarks --------------------------------------------------------------------------------------------------------


def test_landmarks_hit_what_is_drawn() -> None:
    for index in range(20):
        pose = dataclasses.replace(WORLD.pose(index), lids=0.3, mouth=0.5)
        scene = portrait(bare(WORLD.identity(index)), pose)
        picture = draw(scene, 512)
        (x0, y0, x1, _) = picture.boxes[0]
        points = picture.landmarks[0] * (x1 - x0) + (x0, y0)

        def part_at(*numbers: int, points: Any = points, picture: Picture = picture) -> str:
            x, y = np.floor(points[list(numbers)].mean(axis=0)).astype(int)
            return PARTS[picture.parts[y, x]]

        for iris in (RIGHT_IRIS, LEFT_IRIS):
            assert part_at(iris[0]) == "eyes"
        for upper, lower in (RIGHT_BROW, LEFT_BROW):
            assert part_at(upper[2], lower[2]) == "brows"
        assert part_at(NOSE_RIDGE[-1]) == "nose"
        assert part_at(OUTER_LIPS[5], INNER_LIPS[5]) == part_at(OUTER_LIPS[15], INNER_LIPS[15]) == "mouth"
        assert part_at(*INNER_LIPS) == "mouth"
        contour = cv2.findContours(face_masks(scene, 512)[0] // 128, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0][0]
        for point in points[list(JAW + FOREHEAD)]:
            assert abs(cv2.pointPolygonTest(contour, (point[0] - 0.5, point[1] - 0.5), True)) <= 1.5


def test_the_runtimes_drawing_of_an_iris_covers_the_drawn_eye() -> None:
    for index in range(8):
        pose = dataclasses.replace(WORLD.pose(index), lids=0.5)
        picture = draw(portrait(bare(WORLD.identity(index)), pose), 512)
        x0, y0, x1, y1 = picture.boxes[0].astype(int)
        drawing = picture.pose_image(0, x1 - x0)
        iris = np.all(np.round(drawing * 255).transpose(1, 2, 0) == YELLOW, axis=2)
        eyes = picture.shows("eyes", 0)[y0:y1, x0:x1]
        assert iris.sum() > 50 and (iris & eyes).sum() >= 0.95 * iris.sum()


def test_landmarks_of_many_are_those_of_each() -> None:
    factors = np.stack([WORLD.identity(index).factors for index in range(9)])
    poses = np.stack([WORLD.pose(index).values for index in range(9)])
    together = landmarks(factors, poses)
    assert together.shape == (9, 478, 2) and np.isfinite(together).all()
    for number in range(9):
        alone = landmarks(factors[number : number + 1], poses[number : number + 1])[0]
        np.testing.assert_array_equal(together[number], alone)
        checked_landmarks(alone, "landmarks of the world")
    scene = portrait(WORLD.identity(2), WORLD.pose(2))
    np.testing.assert_array_equal(draw(scene, 64).landmarks[0], together[2])
    np.testing.assert_array_equal(scene.actors[0].landmarks(), together[2])
    for size in (32, 200):
        np.testing.assert_array_equal(draw(scene, size).landmarks[0], together[2])


def test_the_face_oval_fills_the_square_exactly() -> None:
    factors = np.random.default_rng(0).random((200, len(FACTORS)))
    poses = np.stack([WORLD.pose(index).values for index in range(200)])
    heads = Heads(factors, poses)
    outline = heads.project(heads.outline(np.arange(OUTLINE_STEPS) / OUTLINE_STEPS))
    low, high = outline.min(axis=1), outline.max(axis=1)
    np.testing.assert_allclose((high - low).max(axis=1), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose((high + low) / 2, 0.5, rtol=0, atol=1e-12)
    placed = heads.landmarks()[:, PLACED]
    assert placed.min() > -0.01 and placed.max() < 1.01


def test_no_eye_and_no_mouth_leaves_the_face_at_the_limits_of_a_pose() -> None:
    rng = np.random.default_rng(1)
    turned = list(itertools.product(*(POSE_LIMITS[name] for name in ("yaw", "pitch", "roll"))))
    for yaw, pitch, roll in turned:
        poses = np.tile(Pose(yaw=yaw, pitch=pitch, roll=roll, smile=1.0, lids=1.0).values, (40, 1))
        heads = Heads(rng.random((40, len(FACTORS))), poses)
        outline = heads.project(heads.outline(np.arange(OUTLINE_STEPS) / OUTLINE_STEPS)).astype(np.float32)
        points = heads.landmarks()[:, [*RIGHT_EYE, *LEFT_EYE, *OUTER_LIPS]]
        for edge, inside in zip(outline, points, strict=True):
            assert min(cv2.pointPolygonTest(edge, (float(x), float(y)), True) for x, y in inside) > 0


def test_poses_and_expressions_are_seen_in_the_landmarks() -> None:
    person = WORLD.identity(4)

    def at(number: int, **pose: float) -> Any:
        return landmarks(person.factors[None], Pose(**pose).values[None])[0][number]

    tip, right_eye, left_eye = NOSE_RIDGE[-1], RIGHT_IRIS[0], LEFT_IRIS[0]
    assert at(right_eye)[0] < 0.5 < at(left_eye)[0]  # the person's right eye is on the left of the picture
    np.testing.assert_allclose(at(tip)[0], 0.5, atol=1e-12)
    assert at(tip, yaw=0.4)[0] > 0.56 and at(tip, yaw=-0.4)[0] < 0.44
    assert at(tip, pitch=0.3)[1] < at(tip)[1] - 0.03 < at(tip, pitch=-0.3)[1] - 0.06
    eyes = at(left_eye, roll=0.3) - at(right_eye, roll=0.3)
    np.testing.assert_allclose(np.arctan2(eyes[1], eyes[0]), 0.3, atol=1e-9)
    opening = [at(INNER_LIPS[5], mouth=mouth)[1] - at(INNER_LIPS[15], mouth=mouth)[1] for mouth in (0, 0.5, 1)]
    assert opening[0] < 1e-9 < 0.05 < opening[1] < opening[2]
    corner, middle = INNER_LIPS[0], INNER_LIPS[5]
    bend = [at(middle, smile=smile)[1] - at(corner, smile=smile)[1] for smile in (-1, 0, 1)]
    assert bend[0] < 0 <= bend[1] < bend[2]
    shut, wide = (at(RIGHT_EYE[4], lids=lids)[1] - at(RIGHT_EYE[12], lids=lids)[1] for lids in (-1, 1))
    assert shut < 0.01 < 0.05 < wide
    assert at(right_eye, gaze_x=1)[0] > at(right_eye)[0] + 0.01 and at(right_eye, gaze_y=1)[1] > at(right_eye)[1]
    assert at(RIGHT_BROW[0][2], brows=1)[1] < at(RIGHT_BROW[0][2])[1] - 0.03
