"""python -m export.build: a checkpoint → a verified engine directory. The whole road, resumable and atomic."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from realisid_trt.errors import BuildError, RealisIDError, RequestError
from realisid_trt.manifest import CONSTANTS, FORMAT, MANIFEST, seal
from realisid_trt.verified import cache_folder

from .staging import Artifact, Staging, check_space, content_key, open_staging
from .variants import Limits, Variant

# backend → how its networks are exported
VARIANTS = {"onnxruntime": Variant(opset=20, precision="fp32")}
LATER = ("tensorrt", "tensorrt-rtx")
SMALL_BYTES = 2**30  # weights up to this size are exported two at a time and compared in float64


@dataclass(frozen=True)
class Options:
    """What a build was asked for. The command line takes its defaults from here.

    checkpoint:      folder; None builds the miniature (random weights).
    out:             engine directory; None: engines/<name of the checkpoint's folder>.
    base_model, variant: see Checkpoint.open.
    precision:       of GPU backends: "fp32", "fp16" or "bf16". ONNX Runtime on a CPU runs float32 whatever is asked.
    backends:        which to build for.
    only:            networks to build now; the engine is complete when no network is missing.
    jobs:            networks exported at a time; None: 2 for small checkpoints, else 1.
    face_landmarker: MediaPipe's face_landmarker.task, converted and used instead of the mesh of the wheel.
    face_parser:     BiSeNet face parsing as ONNX.
    """

    checkpoint: Path | None = None
    out: Path | None = None
    base_model: str | None = None
    variant: str | None = None
    precision: str = "fp32"
    backends: tuple[str, ...] = ("onnxruntime",)
    only: tuple[str, ...] = ()
    jobs: int | None = None
    face_landmarker: Path | None = None
    face_parser: Path | None = None
    limits: Limits = field(default_factory=Limits)


Report = Callable[[str], None]


def build(options: Options, report: Report = lambda line: None, progress: bool = False) -> dict[str, Any]:
    """Builds, verifies and publishes an engine. Returns what was done, as JSON values.

    report:   gets a line of text for everything a person should know.
    progress: draw a bar on stderr.

    Raises BuildError, ParityError, DiskError or CheckpointError; the engine that was there before is then untouched,
    and the same command goes on where it stopped.
    """
    start = time.perf_counter()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two exporting processes must not spin against each other
    backends = _check_backends(options, report)
    checkpoint_path = options.checkpoint or miniature_checkpoint(report)
    # torch is imported only behind the cheap checks
    from .checkpoint import Checkpoint
    from .networks import networks

    checkpoint = Checkpoint.open(checkpoint_path, base_model=options.base_model, variant=options.variant)
    checkpoint.check_weights()
    specs = networks(checkpoint)
    unknown = sorted(set(options.only) - set(specs))
    if unknown:
        raise RequestError(f"--only {' '.join(unknown)}: no such network. Known: {', '.join(specs)}.")
    out = options.out or Path("engines") / (
        "miniature" if options.checkpoint is None else Path(checkpoint_path).resolve().name
    )

    weights_bytes = {name: checkpoint.weights_bytes(name) for name in checkpoint.components}
    per_variant = sum(weights_bytes.values()) * 4 // 2  # float32 from halves at worst; a component's networks share it
    check_space(out.parent, per_variant * len({VARIANTS[name].name for name in backends}) + 2**28)

    with open_staging(out) as staging:
        made: dict[str, Artifact] = {}
        todo: list[tuple[str, str, dict[str, Any]]] = []
        for backend in backends:
            variant = VARIANTS[backend]
            for name, network in specs.items():
                artifact = network_artifact(name, variant)
                key = _network_key(checkpoint, network.components, name, variant, options.limits)
                if found := staging.find(artifact, key):
                    made[artifact] = found
                elif not options.only or name in options.only:
                    size = sum(weights_bytes[component] for component in network.components)
                    todo.append((artifact, key, {"name": name, "variant": variant, "bytes": size}))
        if made:
            report(f"{len(made)} of {len(made) + len(todo)} networks stand from an earlier build")

        from .exporters import export_networks

        made |= export_networks(staging, checkpoint, options, todo, small_bytes=SMALL_BYTES, progress=progress)
        missing = [
            network_artifact(name, VARIANTS[b])
            for b in backends
            for name in specs
            if network_artifact(name, VARIANTS[b]) not in made
        ]
        if missing:
            report(
                f"{len(missing)} networks are still missing; the engine is not exchanged. Run without --only to finish."
            )
            return {"out": str(out), "complete": False, "built": [name for name, *_ in todo], "missing": missing}
        made |= _small_artifacts(staging, checkpoint, options)
        manifest = _manifest(out.name, checkpoint, made, list(specs), backends)
        _verify_whole(staging, checkpoint, manifest, weights_bytes, report)
        staging.publish(manifest, list(made))
    return {
        "out": str(out),
        "complete": True,
        "built": [name for name, *_ in todo],
        "reused": [name for name in made if name not in {artifact for artifact, *_ in todo}],
        "bytes": sum(listed["bytes"] for listed in manifest["files"].values()),
        "seconds": round(time.perf_counter() - start, 1),
        "verified": manifest["verified"],
    }


def network_artifact(name: str, variant: Variant) -> str:
    return f"{name}:{variant.name}"


def miniature_checkpoint(report: Report) -> Path:
    """The checkpoint built without --checkpoint: the miniature with random weights, made once."""
    from .miniature import make_checkpoint

    folder = cache_folder() / "checkpoints" / "miniature"
    if not (folder / "model_index.json").is_file():
        report(f"making the miniature checkpoint (random weights) in {folder}")
        make_checkpoint(folder, seed=0)
    return folder


def _check_backends(options: Options, report: Report) -> tuple[str, ...]:
    for name in options.backends:
        if name in LATER:
            raise BuildError(
                f"--backend {name}: this version does not build TensorRT plans yet. Use --backend onnxruntime."
            )
        if name not in VARIANTS:
            raise RequestError(f"--backend {name} is unknown. Known: {', '.join(VARIANTS)}.")
    if options.precision != "fp32" and set(options.backends) == {"onnxruntime"}:
        report(f"ONNX Runtime on a CPU runs float32: --{options.precision} changes nothing for backend onnxruntime.")
    return tuple(dict.fromkeys(options.backends))


def _network_key(checkpoint: Any, components: Sequence[str], name: str, variant: Variant, limits: Limits) -> str:
    sources = [
        Path(__file__).with_name(file).read_text(encoding="utf-8")
        for file in ("networks.py", "to_onnx.py", "variants.py", "verify.py")
    ]
    return content_key(
        name, variant.name, asdict(limits), {c: checkpoint.weights_key(c) for c in components}, sources, versions()
    )


def versions() -> dict[str, str]:
    """Of everything whose version can change what is built."""
    import importlib.metadata

    packages = ("realisid_trt", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")
    return {package: importlib.metadata.version(package) for package in packages}


def _small_artifacts(staging: Staging, checkpoint: Any, options: Options) -> dict[str, Artifact]:
    """Constants, tokenizers and face models."""
    from safetensors.numpy import save_file

    from .face_models import fetch_face_models

    made = {}
    scheduler = checkpoint.load_scheduler()
    key = content_key("constants", checkpoint.weights_key("null_id"), checkpoint.weights_key("scheduler"), versions())
    if not (found := staging.find("constants", key)):
        with staging.workspace("constants") as folder:
            constants = {
                "null_id_tokens": checkpoint.null_id_tokens().float().numpy(),
                "alphas_cumprod": scheduler.alphas_cumprod.double().numpy(),
            }
            save_file(constants, folder / CONSTANTS)
            found = staging.add("constants", key, folder)
    made["constants"] = found
    for name in checkpoint.text_encoder_names:
        artifact = name.replace("text_encoder", "tokenizer")
        key = content_key(artifact, checkpoint.weights_key(artifact), versions())
        if not (found := staging.find(artifact, key)):
            tokenizer = checkpoint.load_tokenizer(name)
            with staging.workspace(artifact) as folder:
                file = folder / artifact / "tokenizer.json"
                file.parent.mkdir()
                file.write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
                pad = {
                    "file": f"{artifact}/tokenizer.json",
                    "max_length": checkpoint.max_length,
                    "pad_id": tokenizer.pad_token_id,
                }
                found = staging.add(artifact, key, folder, pad)
        made[artifact] = found
    given = [options.face_landmarker, options.face_parser]
    sources = [
        Path(__file__).with_name(f).read_text() for f in ("face_models.py", "mtcnn_to_onnx.py", "tflite_to_onnx.py")
    ]
    key = content_key("faces", sources, [_file_key(path) for path in given], versions()["onnx"])
    if not (found := staging.find("faces", key)):
        with staging.workspace("faces") as folder:
            info = fetch_face_models(
                folder / "faces", landmarker_task=options.face_landmarker, face_parser=options.face_parser
            )
            found = staging.add("faces", key, folder, {k: info[k] for k in ("model_id", "landmarks", "sources")})
    made["faces"] = found
    return made


def _file_key(path: Path | None) -> str | None:
    from realisid_trt.verified import file_sha256

    if path is None:
        return None
    try:
        return file_sha256(path)
    except OSError as error:
        raise BuildError(f"{path} cannot be read ({error.strerror}). Correct the path.") from None


def _manifest(
    name: str, checkpoint: Any, made: dict[str, Artifact], names: Sequence[str], backends: Sequence[str]
) -> dict[str, Any]:
    """What the runtime must know, with a seal on every section."""
    c, installed = checkpoint, versions()
    tokenizers = {text: made[text.replace("text_encoder", "tokenizer")].info for text in c.text_encoder_names}
    networks: dict[str, Any] = {}
    for network in names:
        builds = {backend: made[network_artifact(network, VARIANTS[backend])].info for backend in backends}
        networks[network] = {"flops_per_row": next(iter(builds.values()))["flops_per_row"], "builds": builds}
    scheduler = c.scheduler_config
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "made_by": installed,
        "realisid_config": c.config.to_dict(),
        "model": {
            "sample_size": c.sample_size,
            "latent_channels": c.latent_channels,
            "vae_scale_factor": c.vae_scale_factor,
            "levels": c.levels,
            "residual_levels": [level for _, level in c.residuals],
            "cross_attention_dim": c.cross_attention_dim,
            "pooled_dim": c.pooled_dim,
            "tokenizers": tokenizers,
            "num_id_tokens": c.num_id_tokens,
            "image_size": c.image_size,
            "image_mean": list(c.image_mean),
            "image_std": list(c.image_std),
            "id_encoder_key": content_key(c.weights_key("image_encoder"), c.weights_key("id_projection")),
        },
        "scheduler": {
            "timestep_spacing": scheduler["timestep_spacing"],
            "steps_offset": scheduler["steps_offset"],
            "prediction_type": scheduler["prediction_type"],
            "final_alpha_cumprod": float(c.load_scheduler().final_alpha_cumprod),
        },
        "networks": networks,
        "backends": {
            backend: {
                "onnxruntime": installed["onnxruntime"],
                "opset": VARIANTS[backend].opset,
                "precision": VARIANTS[backend].precision,
                "architecture": "portable",
            }
            for backend in backends
        },
        "faces": made["faces"].info,
        "files": {file: listed for artifact in made.values() for file, listed in sorted(artifact.files.items())},
    }
    manifest["seal"] = seal(manifest)
    return manifest


def _verify_whole(
    staging: Staging, checkpoint: Any, manifest: dict[str, Any], weights_bytes: dict[str, int], report: Report
) -> None:
    """The whole engine against the reference, before it is published; the figures go into the manifest."""
    from .staging import write_json

    if sum(weights_bytes.values()) > SMALL_BYTES:
        report("the whole engine was not compared with the reference: the checkpoint is too large for float64 here")
        manifest["verified"] = None
    else:
        from .verify_engine import verify_engine

        manifest["verified"] = {}
        manifest["seal"] = seal(manifest)
        write_json(staging.folder / MANIFEST, manifest)
        manifest["verified"] = verify_engine(staging.folder, checkpoint)
    manifest["seal"] = seal(manifest)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m export.build",
        description="Build an engine from a RealisID checkpoint: export every network, verify it, publish it.",
        epilog="""examples:
  python -m export.build                                            the miniature, into engines/miniature
  python -m export.build --checkpoint CKPT --out engines/NAME --fp16
  python -m export.build --checkpoint CKPT --only vae_decoder       one network now, the rest later
A build that was stopped goes on where it stood when the same command is given again.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="checkpoint folder; without it: the miniature")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="engine directory (default: engines/<checkpoint's name>)"
    )
    parser.add_argument(
        "--base-model", metavar="DIR|ID", help="where unet, vae, text encoders are, instead of the checkpoint's word"
    )
    parser.add_argument("--variant", help="of the weight files, such as fp16")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--fp16", dest="precision", action="store_const", const="fp16", help="half precision on GPU backends"
    )
    precision.add_argument(
        "--bf16", dest="precision", action="store_const", const="bf16", help="bfloat16 on GPU backends"
    )
    parser.add_argument(
        "--backend", action="append", dest="backends", metavar="NAME", help="may be repeated (default: onnxruntime)"
    )
    parser.add_argument("--only", nargs="+", metavar="NETWORK", help="build these networks only")
    parser.add_argument(
        "--jobs", type=int, help="networks exported at a time (default: 2 for small checkpoints, else 1)"
    )
    parser.add_argument("--face-landmarker", type=Path, metavar="FILE", help="MediaPipe's face_landmarker.task")
    parser.add_argument("--face-parser", type=Path, metavar="FILE", help="BiSeNet face parsing, as ONNX")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    given = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    as_json = given.pop("json")
    for key in ("backends", "only"):
        if key in given:
            given[key] = tuple(given[key])

    def report(line: str) -> None:
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    try:
        if given.get("jobs", 1) < 1:
            raise RequestError(f"--jobs is {given['jobs']}, expected at least 1.")
        result = build(Options(**given), report, progress=True)
    except RealisIDError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("stopped. The same command goes on where it stood.", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(result))
    elif result["complete"]:
        verified = result["verified"]
        report(
            f"{result['out']}: {result['bytes'] / 1e6:.1f} MB, {len(result['built'])} networks built and "
            f"{len(result['reused'])} parts reused in {result['seconds']} s"
            + (f"; error of the whole engine {verified['ratio']:.2f} times float32 torch's" if verified else "")
        )
        report(f"Try it: python -m realisid_trt inspect --engine {result['out']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
