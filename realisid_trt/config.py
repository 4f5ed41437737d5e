"""`realisid_config.json`: what a RealisID checkpoint must say about itself, because the paper does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError

OPTIONS: dict[str, tuple[str, ...]] = {
    "branch_pooled_text": ("zeros", "per_row"),
    "null_id": ("zero_image", "zero_tokens", "file"),
    "relocate_mode": ("bilinear", "area"),
    "overlap": ("sum", "average", "priority"),
    "pose_style": ("realisid-v1",),
}


@dataclass(frozen=True, kw_only=True)
class RealisIDConfig:
    """The keys of `realisid_config.json`. A checkpoint states what its weights were trained with.

    branch_pooled_text:  pooled text in the branches' added conditions: "zeros" or "per_row". No default.
    null_id:             ID tokens of a dropped ID: "zero_image", "zero_tokens" or "file".
    subject_conditioning_ratio: α in [0, 1]: steps i <= (1 - α)·S run without ID; None switches the delay off.
    relocate_mode:       down-sampling of R, Eq. (4): "bilinear" or "area".
    overlap:             where boxes overlap: "sum" (the paper), "average" or "priority".
    box_snap:            px grid of the squared box; None means f, the VAE's scale factor.
    face_margin:         side of the ID crop over the side of the detected square.
    pose_style:          named preset by which landmarks are drawn.
    guidance_scale, id_guidance_scale: λt and λi of Eq. (8).
    num_inference_steps: default of a request.
    force_zeros_for_empty_prompt: no negative prompt → zeros for both text embeddings of the none row.
    """

    branch_pooled_text: str
    null_id: str = "zero_image"
    subject_conditioning_ratio: float | None = 0.7
    relocate_mode: str = "bilinear"
    overlap: str = "sum"
    box_snap: int | None = None
    face_margin: float = 1.0
    pose_style: str = "realisid-v1"
    guidance_scale: float = 7.5
    id_guidance_scale: float = 5.0
    num_inference_steps: int = 30
    force_zeros_for_empty_prompt: bool = True

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "realisid_config.json") -> RealisIDConfig:
        """The checked config. Raises CheckpointError for a missing, unknown or impossible key."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise CheckpointError(
                f"{source}: unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)}. "
                f"Known keys: {', '.join(fields)}. Correct the spelling or remove what this version does not know."
            )
        if "branch_pooled_text" not in values:
            raise CheckpointError(
                f'{source}: branch_pooled_text is missing and has no default. Write "zeros" if the branches were '
                "trained without pooled text, \"per_row\" if they saw the UNet's own (as InstantID's do)."
            )
        config = cls(**values)
        config._check(source)
        return config

    def _check(self, source: str) -> None:
        def refuse(key: str, expected: str) -> CheckpointError:
            return CheckpointError(f"{source}: {key} is {getattr(self, key)!r}, expected {expected}. Correct the file.")

        def number(key: str) -> bool:
            value = getattr(self, key)
            return isinstance(value, (int, float)) and not isinstance(value, bool)

        for key, options in OPTIONS.items():
            if getattr(self, key) not in options:
                raise refuse(key, "one of " + ", ".join(options))
        if self.subject_conditioning_ratio is not None and not (
            number("subject_conditioning_ratio") and 0 <= self.subject_conditioning_ratio <= 1
        ):
            raise refuse("subject_conditioning_ratio", "a number from 0 to 1, or null to switch the delay off")
        for key in ("guidance_scale", "id_guidance_scale"):
            if not number(key):
                raise refuse(key, "a number")
        if not (number("face_margin") and 0.5 <= self.face_margin <= 4):
            raise refuse("face_margin", "a number from 0.5 to 4")
        if (
            not isinstance(self.num_inference_steps, int)
            or isinstance(self.num_inference_steps, bool)
            or self.num_inference_steps < 1
        ):
            raise refuse("num_inference_steps", "a whole number of at least 1")
        if self.box_snap is not None and (
            not isinstance(self.box_snap, int) or isinstance(self.box_snap, bool) or self.box_snap < 1
        ):
            raise refuse("box_snap", "a whole number of pixels: the VAE's scale factor f, or 4f")
        if not isinstance(self.force_zeros_for_empty_prompt, bool):
            raise refuse("force_zeros_for_empty_prompt", "true or false")

    def to_dict(self) -> dict[str, Any]:
        """The keys and values, as they stand in the file."""
        return dataclasses.asdict(self)
