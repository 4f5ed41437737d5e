"""The small parts of an engine: constants, tokenizers, face encoder, face models, CUDA kernels."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.numpy import save

from realisid_trt.errors import BuildError
from realisid_trt.files import file_sha256
from realisid_trt.manifest import CONSTANTS, FACE_ENCODER

from ..checkpoint import Checkpoint, tokenizer_of
from ..checkpoint.face_encoder import FaceEncoder, check_graph
from ..face_models import fetch_face_models
from .describe import sources, versions
from .staging import Artifact, Staging, content_key


def small_parts(
    staging: Staging, checkpoint: Checkpoint, face_landmarker: Path | None, face_parser: Path | None
) -> dict[str, Artifact]:
    """Constants, tokenizers, face encoder and face models, by artifact name. Raises BuildError or CheckpointError."""
    made = {"constants": _constants(staging, checkpoint)}
    for name in checkpoint.text_encoder_names:
        made[tokenizer_of(name)] = _tokenizer(staging, checkpoint, tokenizer_of(name))
    if checkpoint.face_encoder is not None:
        made[FACE_ENCODER] = _face_encoder(staging, checkpoint, checkpoint.face_encoder)
    made["faces"] = _faces(staging, face_landmarker, face_parser)
    return made


def kernel_pack(staging: Staging) -> dict[str, Artifact]:
    """The fused CUDA kernels for every architecture, by artifact name. Raises BuildError, with the compiler's log."""
    from realisid_trt.kernels import compile as kernels

    key = content_key("kernels", kernels.key(), kernels.ARCHITECTURES, kernels.LATER)
    found = staging.find("kernels", key)
    if found is None:
        folder = staging.workspace("kernels")
        (folder / "kernels").mkdir()
        names = kernels.compile_kernels(folder / "kernels")
        info = {"key": kernels.key(), "nvrtc": kernels.nvrtc_version(), "files": names}
        found = staging.add("kernels", key, folder, info)
    return {"kernels": found}


def _constants(staging: Staging, checkpoint: Checkpoint) -> Artifact:
    """alphas_cumprod (T,) float64, as precise as diffusers has them; with identities, null_id_tokens (T, D) float32."""
    has_ids = checkpoint.config.id_input != "none"
    key = content_key(
        "constants",
        sources("building/small_parts.py"),
        checkpoint.weights_key("null_id") if has_ids else None,
        checkpoint.weights_key("scheduler"),
        versions(),
    )
    if found := staging.find("constants", key):
        return found
    folder = staging.workspace("constants")
    constants = {"alphas_cumprod": checkpoint.load_scheduler().alphas_cumprod.double().numpy()}
    if has_ids:
        constants["null_id_tokens"] = checkpoint.null_id_tokens().float().numpy()
    (folder / CONSTANTS).write_bytes(save(constants))
    return staging.add("constants", key, folder)


def _tokenizer(staging: Staging, checkpoint: Checkpoint, name: str) -> Artifact:
    """tokenizer.json, which the runtime reads without transformers."""
    key = content_key(name, sources("building/small_parts.py"), checkpoint.weights_key(name), versions())
    if found := staging.find(name, key):
        return found
    tokenizer = checkpoint.load_tokenizer(name)
    folder = staging.workspace(name)
    file = Path(name) / "tokenizer.json"
    (folder / name).mkdir()
    (folder / file).write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    info = {"file": file.as_posix(), "max_length": checkpoint.max_length, "pad_id": tokenizer.pad_token_id}
    return staging.add(name, key, folder, info)


def _face_encoder(staging: Staging, checkpoint: Checkpoint, encoder: FaceEncoder) -> Artifact:
    """The checkpoint's face encoder as it is: float32 in every engine. Raises CheckpointError if it cannot run here."""
    makers = sources("building/small_parts.py", "checkpoint/face_encoder.py")
    key = content_key(FACE_ENCODER, encoder.sha256, encoder.norm, makers, versions()["onnx"])
    if found := staging.find(FACE_ENCODER, key):
        return found
    file = checkpoint.folders[FACE_ENCODER] / encoder.file
    check_graph(file, encoder.size, encoder.output_dim, encoder.norm)
    folder = staging.workspace(FACE_ENCODER)
    (folder / FACE_ENCODER).mkdir()
    shutil.copyfile(file, folder / FACE_ENCODER / encoder.file)
    return staging.add(FACE_ENCODER, key, folder)


def _faces(staging: Staging, face_landmarker: Path | None, face_parser: Path | None) -> Artifact:
    makers = sources("face_models.py", "faces")
    key = content_key("faces", makers, _file_key(face_landmarker), _file_key(face_parser), versions()["onnx"])
    if found := staging.find("faces", key):
        return found
    folder = staging.workspace("faces")
    info = fetch_face_models(folder / "faces", face_landmarker=face_landmarker, face_parser=face_parser)
    return staging.add("faces", key, folder, {name: info[name] for name in ("model_id", "landmarks", "sources")})


def _file_key(path: Path | None) -> str | None:
    try:
        return None if path is None else file_sha256(path)
    except OSError as error:
        raise BuildError(f"{path} cannot be read ({error.strerror}). Correct the path.") from None
