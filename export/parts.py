"""The small parts of an engine: constants, tokenizers, face models. And the manifest that describes the whole."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from realisid_trt.errors import BuildError
from realisid_trt.manifest import CONSTANTS, FORMAT
from realisid_trt.verified import file_sha256

from .checkpoint import Checkpoint
from .face_models import fetch_face_models
from .staging import Artifact, Staging, content_key
from .variants import VARIANTS, artifact_name


def versions() -> dict[str, str]:
    """Of everything whose version can change what is built."""
    packages = ("realisid_trt", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")
    return {package: importlib.metadata.version(package) for package in packages}


def sources(*names: str) -> list[str]:
    """The text of files of this package: an artifact is stale when what makes it has changed."""
    return [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names]


def small_parts(
    staging: Staging, checkpoint: Checkpoint, face_landmarker: Path | None, face_parser: Path | None
) -> dict[str, Artifact]:
    """Everything of an engine but its networks, by artifact name."""
    made = {"constants": _constants(staging, checkpoint)}
    for name in checkpoint.text_encoder_names:
        tokenizer = name.replace("text_encoder", "tokenizer")
        made[tokenizer] = _tokenizer(staging, checkpoint, tokenizer)
    made["faces"] = _faces(staging, face_landmarker, face_parser)
    return made


def _constants(staging: Staging, checkpoint: Checkpoint) -> Artifact:
    """null_id_tokens (T, D) float32, and alphas_cumprod (T,) float64: as precise as diffusers has them."""
    key = content_key("constants", checkpoint.weights_key("null_id"), checkpoint.weights_key("scheduler"), versions())
    if found := staging.find("constants", key):
        return found
    folder = staging.workspace("constants")
    constants = {
        "null_id_tokens": checkpoint.null_id_tokens().float().numpy(),
        "alphas_cumprod": checkpoint.load_scheduler().alphas_cumprod.double().numpy(),
    }
    save_file(constants, folder / CONSTANTS)
    return staging.add("constants", key, folder)


def _tokenizer(staging: Staging, checkpoint: Checkpoint, name: str) -> Artifact:
    """tokenizer.json, which the runtime reads without transformers."""
    key = content_key(name, checkpoint.weights_key(name), versions())
    if found := staging.find(name, key):
        return found
    tokenizer = checkpoint.load_tokenizer(name)
    folder = staging.workspace(name)
    file = Path(name) / "tokenizer.json"
    (folder / name).mkdir()
    (folder / file).write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    info = {"file": file.as_posix(), "max_length": checkpoint.max_length, "pad_id": tokenizer.pad_token_id}
    return staging.add(name, key, folder, info)


def _faces(staging: Staging, face_landmarker: Path | None, face_parser: Path | None) -> Artifact:
    makers = sources("face_models.py", "mtcnn_to_onnx.py", "tflite_to_onnx.py")
    key = content_key("faces", makers, _file_key(face_landmarker), _file_key(face_parser), versions()["onnx"])
    if found := staging.find("faces", key):
        return found
    folder = staging.workspace("faces")
    info = fetch_face_models(folder / "faces", landmarker_task=face_landmarker, face_parser=face_parser)
    return staging.add("faces", key, folder, {name: info[name] for name in ("model_id", "landmarks", "sources")})


def _file_key(path: Path | None) -> str | None:
    try:
        return None if path is None else file_sha256(path)
    except OSError as error:
        raise BuildError(f"{path} cannot be read ({error.strerror}). Correct the path.") from None


def describe(
    checkpoint: Checkpoint, made: dict[str, Artifact], networks: Sequence[str], backends: Sequence[str]
) -> dict[str, Any]:
    """The manifest: all that the runtime must know. Without its seal, and without the verification of the whole."""
    c, installed, scheduler = checkpoint, versions(), checkpoint.scheduler_config
    described: dict[str, Any] = {}
    for network in networks:
        builds = {backend: made[artifact_name(network, VARIANTS[backend])].info for backend in backends}
        described[network] = {"flops_per_row": builds[backends[0]]["flops_per_row"], "builds": builds}
    return {
        "format": FORMAT,
        "name": c.path.name,
        "made_by": installed,
        "realisid_config": c.config.to_dict(),
        "checkpoint": {name: c.weights_key(name) for name in c.components},
        "model": {
            "sample_size": c.sample_size,
            "latent_channels": c.latent_channels,
            "vae_scale_factor": c.vae_scale_factor,
            "levels": c.levels,
            "residual_levels": [level for _, level in c.residuals],
            "cross_attention_dim": c.cross_attention_dim,
            "pooled_dim": c.pooled_dim,
            "tokenizers": {name: made[name.replace("text_encoder", "tokenizer")].info for name in c.text_encoder_names},
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
        "networks": described,
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
