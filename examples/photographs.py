"""python -m examples.photographs: two people out of two photographs, in one picture. A first program of your own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from export.wheels import demo_photos
from realisid_trt import Engine, Person, RealisIDError
from realisid_trt.commands.command_line import execute, timing_table
from realisid_trt.commands.drawing import side_by_side, with_boxes
from realisid_trt.loop.picture import to_pil
from realisid_trt.persons.conditions import location_mask, pose_image

PROMPT = "two friends hiking, golden hour"
PLACES = ((0.06, 0.15, 0.5, 0.59), (0.52, 0.22, 0.94, 0.64))  # of the picture's width and height


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="engines/miniature")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    photos = demo_photos(options.out / "photos")
    engine = Engine.load(options.engine)
    side = engine.model.default_size
    identities = [engine.embed(photo) for photo in photos]
    for photo, identity in zip(photos, identities, strict=True):
        print(f"{photo.name}: face found at ({', '.join(f'{v:.0f}' for v in identity.box)}) px")

    persons = [
        Person(identity, box=[fraction * side for fraction in place])
        for identity, place in zip(identities, PLACES, strict=True)
    ]
    with tqdm(total=engine.config.num_inference_steps, desc="denoising", unit="step") as bar:
        result = engine.generate(PROMPT, persons, seed=7, progress=lambda *_: bar.update())

    [picture] = result.images
    boxes = with_boxes(picture, [person.box for person in result.persons])
    picture.save(options.out / "photographs.png")
    boxes.save(options.out / "photographs-boxes.png")
    style = engine.config.pose_style
    drawings = [to_pil(pose_image(identity.landmarks, 256, style).transpose(1, 2, 0)) for identity in identities]
    masks = [Image.fromarray((location_mask(p.box, side, side)[0] * 255).astype("uint8")) for p in result.persons]
    side_by_side([*drawings, *masks, boxes], 256).save(options.out / "photographs-conditions.png")

    table = "\n".join([*timing_table(result.timings, result.rows), result.backend])
    (options.out / "photographs.txt").write_text(table + "\n", encoding="utf-8")
    print(table)
    print(f"{options.out}/photographs.png; -boxes.png with the boxes, -conditions.png with the networks' inputs")
    print("(The miniature was trained on drawings, not on photographs: expect drawn people, not these two.)")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(execute(main))
    except (RealisIDError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_status", 1))
