"""Checkpoints of the real classes with random weights: a small one for tests and demos, a full-size one for timing.

    python -m export.miniature --out checkpoints/miniature --seed 0

Pictures made with them are coloured noise, but everything else is as with trained weights: files, shapes, configs,
tokens, how the prompt, the ID, the pose and the box reach the prediction.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from realisid_trt.config import OPTIONS, RealisIDConfig
from realisid_trt.errors import BuildError, CheckpointError, DiskError, RealisIDError, RequestError

from .checkpoint_classes import module_class, quiet
from .checkpoint_files import STEMS
from .id_projection import build_projection
from .miniature_presets import PRESETS, Recipe, component_configs, preprocessor_config, scheduler_config
from .miniature_tokenizer import END, vocabulary_and_merges, write_tokenizer
from .miniature_weights import carry_noise, draw, write_weights

MADE_BY = "export.miniature"  # stands in model_index.json; only folders that say so are ever replaced
RESERVE_BYTES = 64 * 2**20
CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "image_encoder": "CLIPVisionModelWithProjection",
    "controlnet_local": "ControlNetModel",
    "controlnet_global": "ControlNetModel",
}


def make_checkpoint(out: str | Path, *, force: bool = False, progress: bool = False, **options: Any) -> Path:
    """A complete checkpoint in DESIGN.md's layout at `out`, which appears whole or not at all. Returns its path.

    force:    replace a checkpoint that an earlier call made; nothing else is ever overwritten.
    progress: show a progress bar on stderr.
    options:  fields of Recipe (seed, preset, family, vae_factor, prediction, projection, id_tokens) and keys of
              realisid_config.json (branch_pooled_text, null_id, …).
    Raises RequestError for options that cannot be made or a path that is taken, DiskError when the disk is too small,
    BuildError when files cannot be written.
    """
    recipe = recipe_of(**options)
    out = Path(os.path.abspath(out))
    _check_target(out, force)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        temporary.mkdir()
        _write(temporary, recipe, progress)
        _exchange(temporary, out)
    except (OSError, SafetensorError) as error:
        kind = DiskError if "No space left" in str(error) else BuildError
        raise kind(f"{out} could not be written: {error}. Nothing was changed; choose another --out.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def recipe_of(**options: Any) -> Recipe:
    """The checked Recipe of `make_checkpoint`'s options. Raises RequestError."""
    keys = {field.name for field in dataclasses.fields(RealisIDConfig)}
    fields = {field.name for field in dataclasses.fields(Recipe)} - {"realisid"}
    unknown = sorted(set(options) - keys - fields)
    if unknown:
        raise RequestError(f"unknown option {', '.join(unknown)}. Known: {', '.join(sorted(keys | fields))}.")
    defaults = Recipe().realisid.to_dict()
    try:
        realisid = RealisIDConfig.from_dict({**defaults, **{k: v for k, v in options.items() if k in keys}}, "options")
    except CheckpointError as error:
        raise RequestError(str(error)) from error
    recipe = Recipe(realisid=realisid, **{k: v for k, v in options.items() if k in fields})
    recipe.check()
    factor = recipe.factor
    if realisid.box_snap not in (None, factor, 4 * factor):
        raise RequestError(f"box_snap is {realisid.box_snap}, expected {factor} or {4 * factor} with this VAE.")
    return dataclasses.replace(recipe, realisid=dataclasses.replace(realisid, box_snap=realisid.box_snap or factor))


def meta_module(component: str, config: dict[str, Any]) -> torch.nn.Module:
    """The component's module without memory for its weights: for shapes, parameter counts and config.json."""
    with quiet(), torch.device("meta"):
        if component == "id_projection":
            return build_projection(config)
        cls = module_class(CLASSES[component])
        config_class = getattr(cls, "config_class", None)  # transformers' classes have one, diffusers' take arguments
        module: torch.nn.Module = cls(config_class(**config)) if config_class else cls(**config)
        return module


def _write(folder: Path, recipe: Recipe, progress: bool) -> None:
    """All files of the checkpoint, into `folder`."""
    configs = component_configs(recipe, vocabulary=len(vocabulary_and_merges()[0]))
    modules = {component: meta_module(component, config) for component, config in configs.items()}
    dtype = torch.float16 if recipe.sharded_half else torch.float32
    shapes = {name: {key: tuple(t.shape) for key, t in module.state_dict().items()} for name, module in modules.items()}
    total = sum(math.prod(shape) * dtype.itemsize for keys in shapes.values() for shape in keys.values())
    free = shutil.disk_usage(folder).free
    if free < total + RESERVE_BYTES:
        raise DiskError(
            f"preset {recipe.preset} needs {(total + RESERVE_BYTES) / 1e9:.1f} GB in {folder.parent}, which has "
            f"{free / 1e9:.1f} GB free. Free some space, or choose an --out on another disk."
        )
    _write_small_files(folder, recipe, configs)
    branch_gain = 0.25 if recipe.preset == "sdxl" else 0.5
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress, file=sys.stderr) as bar:
        for component, module in modules.items():
            bar.set_description(component)
            carry = component == "unet" and recipe.prediction == "epsilon"

            def make(key: str, shape: tuple[int, ...], component: str = component, carry: bool = carry) -> torch.Tensor:
                tensor = draw(recipe.seed, component, key, shape, branch_gain)
                if carry:
                    carry_noise(key, tensor, configs["unet"])
                return tensor

            _write_config(folder / component, module, configs[component])
            # transformers 5 keeps CLIPTextModel's keys without this prefix; published files have it, so ours do.
            prefix = "text_model." if component == "text_encoder" else ""
            keys = {key if key.startswith(prefix) else prefix + key: shape for key, shape in shapes[component].items()}
            write_weights(folder / component, STEMS[component], keys, make, dtype, wrote=bar.update)


def _write_config(folder: Path, module: Any, config: dict[str, Any]) -> None:
    """The component's config.json, in its library's own form."""
    folder.mkdir()
    with quiet():
        if hasattr(module, "save_config"):
            module.save_config(folder)
        elif hasattr(module, "config"):
            module.config.architectures = [type(module).__name__]
            module.config.save_pretrained(folder)
        else:
            _write_json(folder / "config.json", config)


def _write_small_files(folder: Path, recipe: Recipe, configs: dict[str, dict[str, Any]]) -> None:
    """Tokenizers, scheduler, feature extractor, null ID, realisid_config.json and model_index.json."""
    import diffusers

    write_tokenizer(folder / "tokenizer", pad_token=END)
    if "text_encoder_2" in configs:
        write_tokenizer(folder / "tokenizer_2", pad_token="!")
    with quiet():
        scheduler: Any = diffusers.DDIMScheduler(**scheduler_config(recipe.prediction))  # type: ignore[no-untyped-call]
        scheduler.save_config(folder / "scheduler")
    (folder / "feature_extractor").mkdir()
    preprocessor = preprocessor_config(configs["image_encoder"]["image_size"])
    _write_json(folder / "feature_extractor" / "preprocessor_config.json", preprocessor)
    if recipe.realisid.null_id == "file":
        projection = configs["id_projection"]
        shape = (projection.get("num_tokens") or projection["num_queries"], projection["output_dim"])
        values = {"null_id_tokens": shape}
        write_weights(
            folder, "null_id", values, lambda key, shape: draw(recipe.seed, "null_id", key, shape), torch.float32
        )
    _write_json(folder / "realisid_config.json", recipe.realisid.to_dict())
    library = {name: "transformers" if "encoder" in name else "diffusers" for name in CLASSES}
    tokenizers = {name.replace("text_encoder", "tokenizer"): "CLIPTokenizer" for name in configs if "text" in name}
    index: dict[str, Any] = {
        "_class_name": "RealisIDPipeline",
        "_diffusers_version": diffusers.__version__,
        "_made_by": MADE_BY,
        "_recipe": {k: v for k, v in dataclasses.asdict(recipe).items() if k != "realisid"},
        **{name: [library[name], CLASSES[name]] for name in configs if name in CLASSES},
        **{name: ["transformers", cls] for name, cls in tokenizers.items()},
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "id_projection": ["realisid", configs["id_projection"]["class"]],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    _write_json(folder / "model_index.json", index)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _check_target(out: Path, force: bool) -> None:
    """Raises RequestError unless `out` is free, or ours and `force` was given."""
    if not os.path.lexists(out) or (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        return
    try:
        ours = json.loads((out / "model_index.json").read_text()).get("_made_by") == MADE_BY and not out.is_symlink()
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise RequestError(
            f"{out} exists and is not a checkpoint made by {MADE_BY}, so it is never overwritten. Choose another --out."
        )
    if not force:
        raise RequestError(f"{out} exists. Replace it with --force, or choose another --out.")


def _exchange(temporary: Path, out: Path) -> None:
    """Puts `temporary` in the place of `out`; what was there is deleted after."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(old)
    try:
        temporary.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sweep(out: Path) -> None:
    """Deletes what killed runs left beside `out`: 13 GB at full size."""
    for leftover in out.parent.glob(f".{out.name}.*.part"):
        owner = leftover.name.split(".")[-2]
        if owner.isdigit() and not Path("/proc", owner).exists() and Path("/proc").exists():
            shutil.rmtree(leftover, ignore_errors=True)


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults are Recipe's and RealisIDConfig's."""
    line = argparse.ArgumentParser(
        prog="python -m export.miniature",
        description="Make a RealisID checkpoint of the real classes with random weights.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m export.miniature --out checkpoints/miniature
  python -m export.miniature --out checkpoints/sd15 --family sd15 --vae-factor 8
  python -m export.miniature --out checkpoints/tokens77 --id-tokens 77 --null-id file
  python -m export.miniature --out checkpoints/full-size --preset sdxl     # 13 GB""",
    )
    default = Recipe()
    line.add_argument("--out", required=True, help="folder to make")
    line.add_argument("--seed", type=int, default=default.seed, help="same seed, same bytes (default %(default)s)")
    line.add_argument("--preset", choices=PRESETS, default=default.preset, help="default %(default)s")
    line.add_argument("--family", choices=("sdxl", "sd15"), default=default.family, help="default %(default)s")
    line.add_argument("--vae-factor", type=int, choices=(4, 8), help="default 4 for the miniature, else 8")
    line.add_argument("--prediction", choices=("epsilon", "v_prediction"), default=default.prediction)
    line.add_argument("--projection", choices=("linear", "resampler"), help="default linear, unless --id-tokens bars")
    line.add_argument("--id-tokens", type=int, metavar="N", help="default: one per image token; 16 for the resampler")
    keys = line.add_argument_group("keys of realisid_config.json")
    for key, value in default.realisid.to_dict().items():
        flag = "--" + key.replace("_", "-")
        if key in OPTIONS:
            keys.add_argument(flag, choices=OPTIONS[key], default=value, help="default %(default)s")
        elif isinstance(value, bool):
            keys.add_argument(flag, action=argparse.BooleanOptionalAction, default=value, help="default %(default)s")
        elif key == "subject_conditioning_ratio":
            keys.add_argument(flag, type=_ratio, default=value, metavar="α", help='or "none"; default %(default)s')
        else:
            kind = float if isinstance(value, float) else int
            keys.add_argument(flag, type=kind, default=value, metavar="N", help=f"default {value or 'the VAE factor'}")
    line.add_argument("--force", action="store_true", help="replace a checkpoint that this command made")
    line.add_argument("--json", action="store_true", help="last line of stdout is one JSON object")
    return line


def _ratio(text: str) -> float | None:
    return None if text.lower() in ("none", "null") else float(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0 made, 1 failed, 2 bad usage."""
    arguments = vars(parser().parse_args(argv))
    out, force, as_json = (arguments.pop(name) for name in ("out", "force", "json"))
    start = time.monotonic()
    try:
        path = make_checkpoint(out, force=force, progress=True, **arguments)
    except RealisIDError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("Interrupted; nothing was left behind.", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    seconds = time.monotonic() - start
    print(f"{path}: {size / 1e6:.1f} MB in {seconds:.1f} s")
    if as_json:
        print(json.dumps({"path": str(path), "bytes": size, "seconds": round(seconds, 2)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
