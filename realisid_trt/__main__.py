"""python -m realisid_trt generate | inspect | embed | doctor."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .commands.arguments import (
    parse_box,
    parse_controls,
    parse_numbers,
    parse_person,
    parse_sampler,
    with_options,
)
from .commands.command_line import Outcome, execute, ratio, run
from .errors import RequestError
from .files import whole_or_not

DEFAULT_ENGINE = "engines/miniature"
PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 bad usage."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], Outcome] = options.command
    return run(lambda: command(options), options.json)


def generate(options: argparse.Namespace) -> Outcome:
    from tqdm import tqdm

    from .commands.command_line import timing_table
    from .commands.drawing import with_persons
    from .engine import Engine

    paths = picture_paths(options.out, options.num_images)
    boxes_paths = picture_paths(options.draw_boxes, options.num_images) if options.draw_boxes else []
    persons = [parse_person(text) for text in options.person]
    controls = parse_controls(options.control)
    if options.save_conditions is not None:
        check_writable(options.save_conditions / "conditions")
    given = {key: getattr(options, key) for key in _GENERATE if getattr(options, key) is not None}
    if (alpha := options.subject_conditioning_ratio) is not None:
        given["subject_conditioning_ratio"] = ratio(alpha, "--subject-conditioning-ratio")
    if options.guidance_interval is not None:
        given["guidance_interval"] = parse_numbers(options.guidance_interval, "--guidance-interval", "0.28,5.42")
    named = None if options.sampler is None else parse_sampler(options.sampler)
    timesteps = None
    if options.timesteps is not None:
        timesteps = parse_numbers(options.timesteps, "--timesteps", "999,749,499,249")
    engine = Engine.load(options.engine, options.backend, options.device, memory=options.memory)
    given["sampler"] = with_options(named or engine.config.default_sampler, options.eta, timesteps)
    with tqdm(desc="denoising", unit="step") as bar:

        def progress(step: int, total: int) -> None:
            bar.total = total
            bar.update(step - bar.n)

        result = engine.generate(options.prompt, persons, controls=controls, progress=progress, **given)
    for image, path in zip(result.images, paths, strict=True):
        save_picture(image, path)
    for image, path in zip(result.images, boxes_paths, strict=False):
        save_picture(with_persons(image, result.persons), path)
    lines = [f"{path} (seed {result.seed + i})" for i, path in enumerate(paths)]
    if options.save_conditions is not None:
        size = {key: given[key] for key in ("height", "width") if key in given}
        shown = engine.conditions(options.prompt, persons, controls=controls, **size)
        lines += [f"{path}: shown to a branch" for path in save_conditions(shown, options.save_conditions)]
    lines += result.notes
    for number, person in enumerate(result.persons, start=1):
        lines.append(f"person {number} at {person.box} px" if person.box else f"person {number}")
        if person.anchor is not None:
            lines[-1] += f", ID patch about ({person.anchor[0]:.0f}, {person.anchor[1]:.0f}) px"
        lines += [f"person {number}: {note}" for note in person.notes]
    lines += ["", *timing_table(result.timings, result.rows), result.sampler, result.backend]
    values = {
        "out": [str(path) for path in paths],
        "seed": result.seed,
        "persons": [dataclasses.asdict(person) for person in result.persons],
        "timings_ms": result.timings,
        "step_ms": result.step_ms,
        "rows": result.rows,
        "backend": result.backend,
        "sampler": result.sampler,
        "notes": result.notes,
    }
    return Outcome(values, lines)


def embed(options: argparse.Namespace) -> Outcome:
    from .engine import Engine
    from .manifest import Manifest

    if options.out.suffix != ".safetensors":
        raise RequestError(f"--out {options.out} does not end in .safetensors, the format of a stored identity.")
    check_writable(options.out)
    box = None if options.box is None else parse_box(options.box, "--box")
    config = Manifest.read(options.engine).config
    if config.id_input == "none":
        raise RequestError(
            f"{options.engine} has no identities: its checkpoint's id_input is none. Give another --engine."
        )
    networks = () if config.id_input == "aligned_face" else ("id_encoder",)  # a face encoder is no network of a build
    engine = Engine.load(options.engine, options.backend, options.device, networks=networks)
    identity = engine.embed(options.photo, face=options.face, box=box)
    identity.save(options.out)
    made, how = "an embedding", "aligned by its eyes, nose and mouth"
    if identity.id_tokens is not None:
        made, how = f"{len(identity.id_tokens)} ID tokens", f"background removed by {identity.mask_source}"
    place = ", ".join(f"{value:.0f}" for value in identity.box)
    lines = [f"{options.out}: {made} of the face at ({place}) px, {how}", *identity.notes]
    values = {
        "out": str(options.out),
        "kind": identity.kind,
        "box": identity.box,
        "photo_size": identity.photo_size,
        "mask_source": identity.mask_source,
        "id_encoder_key": identity.id_encoder_key,
        "notes": identity.notes,
    }
    return Outcome(values, lines)


def inspect(options: argparse.Namespace) -> Outcome:
    target = options.target if options.target is not None else options.engine
    if not os.path.isfile(target) and Path(target).suffix.lower() not in PHOTO_ENDINGS:
        from .commands.inspect_engine import inspect_engine

        return inspect_engine(target, options.batch, options.persons, options.resolution)
    from .commands.inspect_photo import inspect_photo

    out = options.out or Path(target).with_name(Path(target).stem + "-found.png")
    [out] = picture_paths(out, 1)
    outcome, sheet = inspect_photo(target, options.engine, options.face)
    save_picture(sheet, out)
    return Outcome(outcome.values | {"out": str(out)}, [*outcome.lines, f"{out}: the faces"], outcome.status)


def doctor(options: argparse.Namespace) -> Outcome:
    from .commands.doctor import examine

    return examine(options.engine, options.batch, options.persons, options.resolution)


def save_conditions(shown: Mapping[str, Sequence[Any]], folder: Path) -> list[Path]:
    """Writes (C, H, W) drawings as NAME-0.png, …, of every branch, values beyond [0, 1] cut. Returns the files."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, drawings in shown.items():
        for number, drawing in enumerate(drawings):
            pixels = np.round(np.clip(drawing, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
            paths.append(folder / f"{name}-{number}.png")
            save_picture(Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]), paths[-1])
    return paths


def picture_paths(out: Path, count: int) -> list[Path]:
    """out.png, or out-0.png, out-1.png, … for several pictures. Raises RequestError if they could not be saved."""
    from PIL import Image

    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise RequestError(f"{out}: {out.suffix or 'no ending'} is not a picture format. Use .png, .jpg or .webp.")
    check_writable(out)
    return [out] if count == 1 else [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(count)]


def check_writable(path: Path) -> None:
    """Raises RequestError if no file can be written there. Creates nothing."""
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise RequestError(f"{path} cannot be written. Choose another place.")


def save_picture(image: Any, path: Path) -> None:
    with whole_or_not(path) as partial:
        image.save(partial)


# Options of `generate` that Engine.generate takes by the same name.
_GENERATE = (
    "negative_prompt",
    "num_images",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "id_guidance_scale",
    "local_scale",
    "global_scale",
    "height",
    "width",
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m realisid_trt",
        description="Pictures from a built engine: of a text, given persons and control pictures.",
        epilog="Each command has its own --help, with examples.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, call: Callable[..., Outcome], summary: str, examples: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=call)
        sub.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
        sub.add_argument("--engine", default=DEFAULT_ENGINE, metavar="DIR", help="engine (default: %(default)s)")
        return sub

    def machine(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--backend", default="auto", help="default: the first that was built and is installed")
        sub.add_argument(
            "--device", help="cpu, cpu:N for N threads, cuda or cuda:N (default: a GPU if the engine was built for one)"
        )

    def memory_of(sub: argparse.ArgumentParser, target: str) -> None:
        for flag, text in (
            ("--batch", "pictures of one batch (default: 1)"),
            ("--persons", "persons of each picture (default: 1)"),
            ("--resolution", "side of a picture, px (default: the model's own)"),
        ):
            sub.add_argument(flag, type=int, metavar="N", help=f"{target} GPU memory: {text}")

    sub = command(
        "generate",
        generate,
        "Make pictures of a prompt, given persons and control pictures.",
        """  python -m realisid_trt generate --prompt "two friends hiking" --seed 7 --out out.png \\
      --person alice.jpg@160,180,416,436 --person bob.jpg@600,200,800,400,pose=laughing.jpg
  python -m realisid_trt generate --prompt "a portrait" --person alice.safetensors@300,200,700,600 --out out.png
  python -m realisid_trt generate --prompt "an empty beach" --num-images 4 --out beach.png
  python -m realisid_trt generate --prompt "an empty beach" --sampler dpmpp-2m-karras --steps 12 --out beach.png""",
    )
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--negative-prompt", help="default: none; the checkpoint decides between zeros and empty text")
    sub.add_argument(
        "--person",
        action="append",
        default=[],
        metavar="PHOTO@X0,Y0,X1,Y1[,pose=PHOTO][,body=JSON][,at=X:Y][,face=N]",
        help="may be repeated; PHOTO may be a stored identity, or - for nobody in particular (--person=-@…); a single "
        "person may omit the box; at is the nose, for engines with ID patches",
    )
    sub.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="NAME=FILE[,scale=S][,start=A][,end=B]",
        help="the picture that a branch of the engine is shown, its scale and its share of the steps; may be repeated",
    )
    sub.add_argument("--save-conditions", type=Path, metavar="DIR", help="what each branch was shown, as PNG files")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="several pictures: FILE-0, FILE-1, …")
    sub.add_argument(
        "--draw-boxes", type=Path, metavar="FILE", help="the picture with the box of each person, or its anchor"
    )
    sub.add_argument("--seed", type=int, help="default: random, and printed")
    sub.add_argument("--num-images", type=int, default=1)
    sub.add_argument("--steps", dest="num_inference_steps", type=int, metavar="S")
    sub.add_argument(
        "--sampler",
        metavar="NAME|JSON",
        help='such as dpmpp-2m-karras, or {"name": "euler", "spacing": "trailing"}; default: the checkpoint\'s',
    )
    sub.add_argument("--eta", type=float, metavar="η", help="of ddim: share of fresh noise, 0 to 1; of tcd: its γ")
    sub.add_argument("--timesteps", metavar="T,T,…", help="one for each step, from noise to picture: 999,749,499,249")
    sub.add_argument("--guidance-scale", type=float, metavar="λt", help="1: no guidance, which model cards may call 0")
    sub.add_argument("--id-guidance-scale", type=float, metavar="λi")
    sub.add_argument(
        "--guidance-interval", metavar="LOW,HIGH", help="noise levels σ; other steps have no guidance and cost one row"
    )
    sub.add_argument("--subject-conditioning-ratio", metavar="α", help="0 to 1, or none to switch the delay off")
    for name in ("local", "global"):
        text = f"of the branch {name}, if the engine has one; the same as --control {name}=scale=S"
        sub.add_argument(f"--{name}-scale", type=float, metavar="S", help=text)
    sub.add_argument("--height", type=int, metavar="PX")
    sub.add_argument("--width", type=int, metavar="PX")
    sub.add_argument(
        "--memory",
        default="normal",
        choices=("normal", "low"),
        help="low: load only the networks of the current stage, and decode large pictures in tiles; slower",
    )
    machine(sub)

    sub = command(
        "inspect",
        inspect,
        "Show what an engine holds, or what is found in a photo.",
        """  python -m realisid_trt inspect engines/miniature
  python -m realisid_trt inspect engines/miniature --batch 2 --persons 3
  python -m realisid_trt inspect group.jpg --face 2 --out found.png""",
    )
    sub.add_argument("target", nargs="?", help="engine directory or photo (default: --engine)")
    sub.add_argument("--face", type=int, metavar="N", help="of a photo: which face, counted from the left")
    sub.add_argument("--out", type=Path, metavar="FILE", help="of a photo: where to draw (default: PHOTO-found.png)")
    memory_of(sub, "of an engine's")

    sub = command(
        "embed",
        embed,
        "Store the identity of a photo. The stored file can replace the photo.",
        "  python -m realisid_trt embed alice.jpg --out alice.safetensors",
    )
    sub.add_argument("photo", help="a photo with one face, or one that is clearly the largest")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="ends in .safetensors")
    sub.add_argument("--face", type=int, metavar="N", help="which face, counted from the left")
    sub.add_argument("--box", metavar="X0,Y0,X1,Y1", help="the face in px of the upright photo; skips detection")
    machine(sub)

    sub = command(
        "doctor",
        doctor,
        "Show what this machine can run, what is missing, and the command that installs it.",
        "  python -m realisid_trt doctor\n  python -m realisid_trt doctor --engine engines/NAME --json",
    )
    memory_of(sub, "of the engine's")
    return parser


if __name__ == "__main__":
    sys.exit(execute(main))
