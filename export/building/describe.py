"""An engine's manifest, and the versions and sources of its parts."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realisid_trt.backends.gpu_facts import gpu_facts
from realisid_trt.backends.tensorrt_flavours import FLAVOURS
from realisid_trt.manifest import FORMAT

from ..checkpoint import Checkpoint, tokenizer_of
from ..checkpoint.classes import full_config
from ..checkpoint.licences import read_licences
from ..forms import FLOAT32_NETWORKS, Target
from .staging import Artifact, content_key

FOR_PEOPLE = ("file", "name", "licence")  # keys of a face encoder on which an embedding does not depend
VAE_KEYS = ("block_out_channels", "layers_per_block", "mid_block_add_attention")  # its memory depends on them


def versions() -> dict[str, str]:
    """The version of every package that can change the build."""
    import onnxruntime  # a module of several distributions: onnxruntime, onnxruntime-gpu

    packages = ("realisid_trt", "torch", "diffusers", "transformers", "onnx", "onnxscript")
    found = {package: importlib.metadata.version(package) for package in packages}
    return found | {"onnxruntime": onnxruntime.__version__}


def sources(*names: str) -> dict[str, str]:
    """The text of files and folders of export/. An artifact is stale when the sources that make it have changed."""
    export, files = Path(__file__).parents[1], list[Path]()
    for name in names:
        found = [export / name] if (export / name).is_file() else list((export / name).rglob("*.py"))
        assert found, f"{name} is not in {export}"
        files += found
    return {file.relative_to(export).as_posix(): file.read_text(encoding="utf-8") for file in sorted(files)}


def describe(
    checkpoint: Checkpoint,
    made: dict[str, Artifact],
    networks: Sequence[str],
    targets: Sequence[Target],
    architectures: Sequence[str],
    built_for: Mapping[str, int],
) -> dict[str, Any]:
    """The manifest: everything that the runtime needs. It lacks the seal and the verification of the whole engine.

    architectures: of the portable plans.
    built_for:     the largest batch, persons and resolution (px) of a request.
    """
    c, installed, schedule = checkpoint, versions(), dataclasses.asdict(checkpoint.noise_schedule)
    vae, described = full_config(c.components["vae"]), dict[str, Any]()
    for network in networks:
        artifacts = {target.build: made[target.artifact(network)] for target in targets}
        flops = {artifact.info["flops_per_row"] for artifact in artifacts.values()}
        described[network] = {
            "flops_per_row": flops.pop(),
            "builds": {build: _network(artifact) for build, artifact in artifacts.items()},
        }
    return {
        "format": FORMAT,
        "name": c.path.name,
        "made_by": installed,
        "realisid_config": c.config.resolved().to_dict(),
        "licences": read_licences(c.path),
        "checkpoint": {name: c.weights_key(name) for name in c.components},
        "model": {
            "sample_size": c.sample_size,
            "latent_channels": c.latent_channels,
            "vae_scale_factor": c.vae_scale_factor,
            "levels": c.levels,
            "residual_levels": [level for _, level in c.residuals],
            "cross_attention_dim": c.cross_attention_dim,
            "pooled_dim": c.pooled_dim,
            "tokenizers": {name: made[tokenizer_of(name)].info for name in c.text_encoder_names},
            "num_id_tokens": c.num_id_tokens,
            **c.feature_extractor,
            "face_encoder": None if c.face_encoder is None else c.face_encoder.to_dict(),
            "id_encoder_key": _id_encoder_key(c),
        },
        "vae": {key: vae[key] for key in VAE_KEYS},
        "built_for": dict(built_for),
        "scheduler": {name: value for name, value in schedule.items() if name != "alphas_cumprod"},  # in the constants
        "networks": described,
        "builds": {target.build: _build(target, installed, architectures) for target in targets},
        "kernels": made["kernels"].info if "kernels" in made else None,
        "faces": made["faces"].info,
        "files": {file: listed for artifact in made.values() for file, listed in sorted(artifact.files.items())},
    }


def _id_encoder_key(c: Checkpoint) -> str | None:
    """What an identity depends on; None for an engine without identities."""
    if c.config.id_input == "none":
        return None
    if c.face_encoder is not None:  # the identity holds the embedding: projections may change
        return content_key({key: value for key, value in c.face_encoder.to_dict().items() if key not in FOR_PEOPLE})
    weights = [c.weights_key(name) for name in ("image_encoder", "id_projection")]
    return content_key(*weights, c.feature_extractor, c.config.face_margin)


def _build(target: Target, installed: dict[str, str], architectures: Sequence[str]) -> dict[str, Any]:
    """A build's entry: its target, and the versions and the GPU that it was made with."""
    versions, gpu, architecture = {"onnxruntime": installed["onnxruntime"]}, None, "portable"
    if target.has_plans:
        flavour = FLAVOURS[target.backend]
        versions = {flavour.package: flavour.version}
        gpu = None if flavour.portable else gpu_facts().as_json()
        architecture = "+".join(architectures) if gpu is None else str(gpu["architecture"])
    return {
        "backend": target.backend,
        "device": target.device,
        "precision": str(target.form.dtype).removeprefix("torch."),
        "wide": FLOAT32_NETWORKS if target.form.precision != "fp32" else {},
        "opset": target.form.opset,
        "architecture": architecture,
        "gpu": gpu,
        "versions": versions,
    }


def _network(artifact: Artifact) -> dict[str, Any]:
    """One network of one build: the hash of its graph or plan, the bytes of all its files, and the worker's results."""
    info = {key: value for key, value in artifact.info.items() if key != "flops_per_row"}
    sizes = [listed["bytes"] for listed in artifact.files.values()]
    return {"sha256": artifact.files[info["file"]]["sha256"], "bytes": sum(sizes), **info}
