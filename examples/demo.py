"""python -m examples.demo: people that no training showed, in one picture, each at a given place and in a given
pose."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from realisid_trt import Engine, Person, RealisIDError, Result
from realisid_trt.commands.command_line import execute
from training.world import Picture, Scene, World, draw, id_crop

from .sheet import PICTURE_PX, Line, sheet

SCENES = (  # number of a scene, its caption, least and greatest face over the picture's side
    (11, "a person in a red shirt and a person in a blue shirt in the park", (0.25, 0.34)),
    (12, "three people in a green shirt at the beach", (0.2, 0.25)),
)
PHOTO_PX = 256


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="engines/miniature")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    engine, world, lines = Engine.load(options.engine), World(grid=32), []
    for number, caption, face in SCENES:
        scene = world.scene(number, "unseen", caption=caption, face=face)
        photos = [draw(world.reference(actor.identity), PHOTO_PX) for actor in scene.actors]
        [picture] = generate(engine, scene, photos, seed=number).images
        lines.append(Line(caption, photos, draw(scene, PICTURE_PX), picture))
    sheet(lines, engine.config.pose_style).save(options.out / "demo.png")
    print(f"{options.out}/demo.png: photos, places and poses, the engine's picture, and the world's own")
    return 0


def generate(engine: Engine, scene: Scene, photos: Sequence[Picture], seed: int) -> Result:
    """The people of the photos in the places and poses of the scene's.

    A face finder for photographs does not find drawn people, so their boxes, landmarks and crops are given.
    """
    truth, persons = draw(scene, engine.model.default_size), []
    for photo, box, landmarks in zip(photos, truth.boxes, truth.landmarks, strict=True):
        crop = id_crop(photo, 0, engine.model.image_size, engine.config.face_margin)
        identity = engine.embed(photo.rgb, box=photo.boxes[0], landmarks=photo.landmarks[0], crop=crop)
        persons.append(Person(identity, box=tuple(box), landmarks=landmarks))
    with tqdm(total=engine.config.num_inference_steps, desc="denoising", unit="step") as bar:
        return engine.generate(scene.caption, persons, seed=seed, progress=lambda *_: bar.update())


if __name__ == "__main__":
    try:
        sys.exit(execute(main))
    except (RealisIDError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_status", 1))
