"""A procedural world of people: scenes with captions, exact face boxes, landmarks, references and masks, by number.

    world = World(seed=0)
    scene = world.scene(17, persons=2)              # people, their places and the caption
    picture = draw(scene, 256)                      # rgb, parts, owners, boxes, landmarks
    photo = draw(world.reference(scene.actors[0].identity), 256)
    id_crop(photo, 0, 64)                           # the input of the ID encoder
    picture.pose_image(0, 256)                      # the input of the local branch, drawn by the runtime

No file, no network, no torch: NumPy and OpenCV. Read sampling.py for what varies, scenes.py for how it is drawn,
heads.py for where a landmark is.
"""

from .crops import id_crop
from .heads import PLACED, landmarks
from .inks import HEAD_PARTS, PARTS
from .people import FACTORS, POSE, POSE_LIMITS, Identity, Pose
from .sampling import REGULAR, SMALL, SPLITS, World
from .scenes import Actor, Light, Picture, Scene, draw, face_masks
from .words import HATS, PLACES, SHIRTS, VOCABULARY, Description, describe

__all__ = [
    "FACTORS", "HATS", "HEAD_PARTS", "PARTS", "PLACED", "PLACES", "POSE", "POSE_LIMITS", "REGULAR", "SHIRTS", "SMALL",
    "SPLITS", "VOCABULARY", "Actor", "Description", "Identity", "Light", "Picture", "Pose", "Scene", "World",
    "describe", "draw", "face_masks", "id_crop", "landmarks",
]  # fmt: skip
