"""`realisid_config.json`: the settings of a RealisID checkpoint that the paper does not state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .checks import is_finite, is_whole
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
    def from_dict(
        cls, values: Mapping[str, Any], source: str = "realisid_config.json", advice: str = "Correct the file."
    ) -> RealisIDConfig:
        """The checked config. Raises CheckpointError for a missing, unknown or impossible key.

        source, advice: for its message: the file of the values, and what to do.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise CheckpointError(
                f"{source}: unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)}. "
                f"Known keys: {', '.join(fields)}. Correct the spelling or remove the key."
            )
        if "branch_pooled_text" not in values:
            raise CheckpointError(
                f'{source}: branch_pooled_text is missing and has no default. Write "zeros" if the branches were '
                "trained without pooled text, \"per_row\" if they were trained with the UNet's (as InstantID's are)."
            )
        config = cls(**values)
        if refused := config._refused():
            key, expected = refused
            raise CheckpointError(f"{source}: {key} is {values[key]!r}, expected {expected}. {advice}")
        return config

    def _refused(self) -> tuple[str, str] | None:
        """The first key whose value is impossible, and what is expected instead."""
        for key, options in OPTIONS.items():
            if getattr(self, key) not in options:
                return key, f"one of {', '.join(options)}"
        ratio = self.subject_conditioning_ratio
        if ratio is not None and not (is_finite(ratio) and 0 <= ratio <= 1):
            return "subject_conditioning_ratio", "a number from 0 to 1, or null to switch the delay off"
        for key in ("guidance_scale", "id_guidance_scale"):
            if not is_finite(getattr(self, key)):
                return key, "a finite number"
        if not (is_finite(self.face_margin) and 0.5 <= self.face_margin <= 4):
            return "face_margin", "a number from 0.5 to 4"
        if not (is_whole(self.num_inference_steps) and self.num_inference_steps >= 1):
            return "num_inference_steps", "a whole number of at least 1"
        if self.box_snap is not None and not (is_whole(self.box_snap) and self.box_snap >= 1):
            return "box_snap", "a whole number of pixels: the VAE's scale factor f, or 4f"
        if not isinstance(self.force_zeros_for_empty_prompt, bool):
            return "force_zeros_for_empty_prompt", "true or false"
        return None

    def to_dict(self) -> dict[str, Any]:
        """The keys and values, as they stand in the file."""
        return dataclasses.asdict(self)
