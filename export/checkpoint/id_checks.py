"""Contradictions between what encodes an ID, the projections behind it, and the UNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from realisid_trt.checks import is_finite
from realisid_trt.errors import CheckpointError

from .face_encoder import FaceEncoder
from .files import refuse
from .id_projection import projection_dims

Config = Mapping[str, Any]
PATCH_COLOURS = 3


def check_face_crop(configs: Mapping[str, Config], width: int) -> tuple[int, int]:
    """(number of ID tokens, image size in px) of image encoder, feature extractor and projection.

    width: the UNet's cross_attention_dim. Raises CheckpointError.
    """
    encoder, extractor = configs["image_encoder"], configs["feature_extractor"]
    size, hidden = encoder["image_size"], encoder["hidden_size"]
    crop = extractor.get("crop_size", size)
    sides = set(crop.values()) if isinstance(crop, Mapping) else {crop}
    if sides != {size}:
        raise CheckpointError(
            f"feature_extractor/preprocessor_config.json: crop_size is {crop}, expected {size} px, the image encoder's "
            "image_size. Take the feature extractor that belongs to the encoder."
        )
    for key in ("image_mean", "image_std"):
        values = extractor.get(key)
        if not (isinstance(values, list) and len(values) == 3 and all(map(is_finite, values))):
            raise CheckpointError(
                f"feature_extractor/preprocessor_config.json: {key} is {values!r}, expected three numbers, one for "
                "each colour. Take the feature extractor that belongs to the image encoder."
            )
    if min(extractor["image_std"]) <= 0:
        raise CheckpointError(
            f"feature_extractor/preprocessor_config.json: image_std is {extractor['image_std']}, expected numbers "
            "above 0: colours are divided by them. Take the feature extractor that belongs to the image encoder."
        )
    features, output, tokens = projection_dims(configs["id_projection"], "id_projection/config.json")
    if features != hidden:
        raise refuse(
            "id_projection",
            _features_key(configs["id_projection"]),
            features,
            f"{hidden}, the image encoder's hidden_size",
            "Take the image encoder that the projection was trained with.",
        )
    _check_output(output, width)
    image_tokens = (size // encoder["patch_size"]) ** 2 + 1
    if configs["id_projection"]["class"] == "linear" and tokens not in (None, image_tokens):
        raise refuse(
            "id_projection",
            "num_tokens",
            tokens,
            f"{image_tokens}: ({size} / {encoder['patch_size']})² + 1, one for each token of the image encoder",
        )
    return tokens or image_tokens, size


def check_aligned_face(
    configs: Mapping[str, Config], face_encoder: FaceEncoder, width: int, patch_px: int | None
) -> int:
    """The number of ID tokens of a face encoder's projection; checks the projection of patches as well, if there is
    one.

    width: the UNet's cross_attention_dim. Raises CheckpointError.
    """
    projection = configs["id_projection"]
    features, output, tokens = projection_dims(projection, "id_projection/config.json")
    _check_embedding("id_projection", projection, features, face_encoder)
    _check_output(output, width)
    if tokens not in (None, 1) and projection["class"] == "linear":
        raise refuse("id_projection", "num_tokens", tokens, "1: a linear projection gives one token for an embedding")
    if (patches := configs.get("id_patch_projection")) is not None:
        assert patch_px is not None
        features, output, queries = projection_dims(patches, "id_patch_projection/config.json")
        _check_embedding("id_patch_projection", patches, features, face_encoder)
        if patches["class"] != "resampler" or queries != PATCH_COLOURS:
            key, expected = "num_queries", f"{PATCH_COLOURS}, one for each colour of a patch"
            if patches["class"] != "resampler":
                key, expected = "class", '"resampler", with one query for each colour of a patch'
            raise refuse("id_patch_projection", key, patches[key], expected)
        if output != patch_px**2:
            raise refuse(
                "id_patch_projection",
                "output_dim",
                output,
                f"{patch_px**2}: a patch of {patch_px} x {patch_px} px",
                "Correct patch_px in realisid_config.json, or take the projection that was trained with it.",
            )
    return tokens or 1


def _check_embedding(name: str, config: Config, features: int, face_encoder: FaceEncoder) -> None:
    if features != face_encoder.output_dim:
        raise refuse(
            name,
            _features_key(config),
            features,
            f"{face_encoder.output_dim}, the face encoder's output_dim",
            "Take the face encoder that the projection was trained with.",
        )


def _check_output(output: int, width: int) -> None:
    if output != width:
        raise refuse("id_projection", "output_dim", output, f"{width}, the branches' cross_attention_dim")


def _features_key(config: Config) -> str:
    return "input_dim" if config["class"] == "linear" else "embedding_dim"
