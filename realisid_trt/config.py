"""`realisid_config.json`: the settings of a checkpoint that its weights do not state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .branches import BRANCH_OPTIONS, FACE_STYLES, IDPATCH_BRANCHES, REQUIRED, Branch, realisid_branches, table_of
from .checks import is_finite, is_whole
from .errors import CheckpointError, RequestError
from .loop.samplers import Sampler

METHODS = ("realisid", "idpatch", "controlnet")
OPTIONS: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "unet_tokens": ("text", "text_and_id"),
    "id_input": ("face_crop", "aligned_face", "none"),
    "null_id": ("zero_image", "zero_embedding", "zero_tokens", "file"),
    "delayed_id": ("null", "absent"),
    "delay_rule": ("inclusive", "exclusive"),
    "relocate_mode": ("bilinear", "area"),
    "overlap": ("sum", "average", "priority"),
    "pose_style": FACE_STYLES,
    "steps": ("free", "fixed"),
}

# Defaults of the keys that a method sets otherwise than RealisID.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "realisid": {},
    "idpatch": {
        "unet_tokens": "text_and_id",
        "id_input": "aligned_face",
        "null_id": "zero_embedding",
        "delayed_id": "absent",
        "delay_rule": "exclusive",
        "subject_conditioning_ratio": 0.8,
        "guidance_scale": 5.5,
        "id_guidance_scale": None,
        "num_inference_steps": 50,
        "force_zeros_for_empty_prompt": False,
        "patch_px": 64,
    },
    "controlnet": {"id_input": "none", "subject_conditioning_ratio": None, "guidance_scale": 5.0},
}


# Keys that RealisID's own checkpoints leave out where they have their defaults, as before there was a table.
BEFORE_TABLES = ("method", "unet_tokens", "id_input", "delayed_id", "delay_rule", "patch_px")


@dataclass(frozen=True, kw_only=True)
class RealisIDConfig:
    """The keys of `realisid_config.json`. A checkpoint states what its weights were trained with.

    method:              "realisid", "idpatch" or "controlnet": decides the defaults of absent keys, and nothing else.
    branches:            rows of the table, in the order of the sums; None: those of the method.
    branch_pooled_text:  of RealisID's two rows, where `branches` is absent: their `pooled`. No default.
    unet_tokens:         the UNet's encoder_hidden_states: "text", or "text_and_id": the text, then all persons' IDs,
                         which asks for "aligned_face".
    id_input:            "face_crop" (image encoder and ID projection), "aligned_face" (face encoder and ID projection)
                         or "none": an engine without identities.
    null_id:             ID tokens of a dropped ID: "zero_image" or "zero_embedding" (projections of zeros),
                         "zero_tokens" or "file".
    subject_conditioning_ratio: α in [0, 1]: the first (1 - α)·S steps run without ID; None switches the delay off.
    delayed_id:          ID tokens of those steps: "null" ones, or "absent" (of "text_and_id": the text alone).
    delay_rule:          those steps are i <= (1 - α)·S, "inclusive", or i < (1 - α)·S, "exclusive".
    patch_px:            side of the patches of "id_patches", px of the output.
    relocate_mode:       down-sampling of R, Eq. (4): "bilinear" or "area".
    overlap:             where boxes overlap: "sum" (the paper), "average" or "priority".
    box_snap:            px grid of the squared box; None means f, the VAE's scale factor.
    face_margin:         side of the ID crop over the side of the detected square.
    pose_style:          named preset by which landmarks are drawn.
    guidance_scale, id_guidance_scale: λt and λi of Eq. (8); λi None is the request's λt: two-way guidance.
    num_inference_steps: default of a request.
    sampler:             default of a request: a name, or an object of Sampler's fields; None: DDIM by scheduler/.
    steps:               "fixed" for distilled weights, which know no other number of steps than num_inference_steps.
                         `timesteps` of the sampler say the same. "free": any number.
    force_zeros_for_empty_prompt: no negative prompt → zeros for both text embeddings of the none row.
    """

    method: str = "realisid"
    branches: tuple[Branch, ...] | None = None
    branch_pooled_text: str | None = None
    unet_tokens: str = "text"
    id_input: str = "face_crop"
    null_id: str = "zero_image"
    subject_conditioning_ratio: float | None = 0.7
    delayed_id: str = "null"
    delay_rule: str = "inclusive"
    patch_px: int | None = None
    relocate_mode: str = "bilinear"
    overlap: str = "sum"
    box_snap: int | None = None
    face_margin: float = 1.0
    pose_style: str = "realisid-v1"
    guidance_scale: float = 7.5
    id_guidance_scale: float | None = 5.0
    num_inference_steps: int = 30
    sampler: Sampler | None = None
    steps: str = "free"
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
        given = dict(values)
        rows = given.pop("branches", None)
        given["sampler"] = _sampler(given.get("sampler"), source, advice)
        config = cls(**{**METHOD_DEFAULTS.get(str(given.get("method")), {}), **given})
        if refused := config._refused():
            key, expected = refused
            raise CheckpointError(f"{source}: {key} is {getattr(config, key)!r}, expected {expected}. {advice}")
        if config.branch_pooled_text is not None and (rows is not None or config.method != "realisid"):
            table = "branches" if rows is not None else f'method "{config.method}"'
            raise CheckpointError(
                f"{source}: {table} and branch_pooled_text are both given. Each row of a table says its own "
                '"pooled": remove branch_pooled_text.'
            )
        if rows is not None:
            config = replace(config, branches=table_of(rows, config.pose_style, source))
        elif config.method == "controlnet":
            raise CheckpointError(
                f'{source}: method "controlnet" has no branches of its own. Give "branches": one object for each '
                f"ControlNet, with the keys {', '.join(REQUIRED)}."
            )
        elif config.method == "realisid" and config.branch_pooled_text is None:
            raise CheckpointError(
                f'{source}: branch_pooled_text is missing and has no default. Write "zeros" if the branches were '
                "trained without pooled text, \"per_row\" if they were trained with the UNet's (as InstantID's are)."
            )
        if contradiction := config._contradiction():
            raise CheckpointError(f"{source}: {contradiction}")
        return config

    @property
    def table(self) -> tuple[Branch, ...]:
        """The rows of the table of branches: those given, else those of the method."""
        if self.branches is not None:
            return self.branches
        rows = IDPATCH_BRANCHES
        if self.method != "idpatch":
            assert self.branch_pooled_text is not None
            rows = realisid_branches(self.branch_pooled_text)
        return tuple(Branch.from_dict(row, self.pose_style, f"the rows of {self.method}") for row in rows)

    @property
    def default_sampler(self) -> Sampler:
        """The sampler of a request that names none."""
        return self.sampler or Sampler("ddim")

    @property
    def fixed_steps(self) -> int | None:
        """The number of steps that distilled weights know; None where any number will do."""
        listed = self.sampler is not None and self.sampler.timesteps is not None
        return self.num_inference_steps if listed or self.steps == "fixed" else None

    def resolved(self) -> RealisIDConfig:
        """The same with the table written out, as a manifest holds it."""
        return replace(self, branches=self.table, branch_pooled_text=None)

    def _refused(self) -> tuple[str, str] | None:
        """The first key whose value is impossible, and what is expected instead."""
        if self.branch_pooled_text not in (None, *BRANCH_OPTIONS["pooled"]):
            return "branch_pooled_text", f"one of {', '.join(BRANCH_OPTIONS['pooled'])}"
        for key, options in OPTIONS.items():
            if getattr(self, key) not in options:
                return key, f"one of {', '.join(options)}"
        ratio = self.subject_conditioning_ratio
        if ratio is not None and not (is_finite(ratio) and 0 <= ratio <= 1):
            return "subject_conditioning_ratio", "a number from 0 to 1, or null to switch the delay off"
        if not is_finite(self.guidance_scale):
            return "guidance_scale", "a finite number"
        if self.id_guidance_scale is not None and not is_finite(self.id_guidance_scale):
            return "id_guidance_scale", "a finite number, or null for the same as guidance_scale"
        if self.patch_px is not None and not (is_whole(self.patch_px) and 1 <= self.patch_px <= 1024):
            return "patch_px", "a whole number of pixels from 1 to 1024, or null without patches"
        if not (is_finite(self.face_margin) and 0.5 <= self.face_margin <= 4):
            return "face_margin", "a number from 0.5 to 4"
        if not (is_whole(self.num_inference_steps) and self.num_inference_steps >= 1):
            return "num_inference_steps", "a whole number of at least 1"
        if self.box_snap is not None and not (is_whole(self.box_snap) and self.box_snap >= 1):
            return "box_snap", "a whole number of pixels: the VAE's scale factor f, or 4f"
        if not isinstance(self.force_zeros_for_empty_prompt, bool):
            return "force_zeros_for_empty_prompt", "true or false"
        return None

    def _contradiction(self) -> str | None:
        """What keys that are possible by themselves say against each other, and what to do."""
        table, aligned = self.table, self.id_input == "aligned_face"
        timesteps = None if self.sampler is None else self.sampler.timesteps
        if timesteps is not None and len(timesteps) != self.num_inference_steps:
            return (
                f"sampler has {len(timesteps)} timesteps, and num_inference_steps is {self.num_inference_steps}. Write "
                f"num_inference_steps {len(timesteps)}, or as many timesteps as there are steps."
            )
        if aligned and self.null_id == "zero_image":
            return (
                'null_id is "zero_image", and id_input "aligned_face" has no image encoder. Write null_id '
                '"zero_embedding", or what the weights were trained with.'
            )
        if self.null_id == "zero_embedding" and not aligned:
            return (
                f'null_id is "zero_embedding", and id_input {self.id_input!r} has no embedding. Write another null_id.'
            )
        if self.unet_tokens == "text_and_id" and self.id_input == "none":
            return (
                'unet_tokens is "text_and_id", and id_input is "none". Write unet_tokens "text", or give an id_input.'
            )
        if self.unet_tokens == "text_and_id" and not aligned:
            return (
                f'unet_tokens is "text_and_id", and id_input "{self.id_input}". No published model is so: write '
                'unet_tokens "text", or id_input "aligned_face" with a face encoder.'
            )
        if self.delayed_id == "absent" and self.unet_tokens != "text_and_id":
            return (
                'delayed_id is "absent", and the UNet reads text alone: only "text_and_id" can lack the tokens of the '
                'ID. Write delayed_id "null".'
            )
        for branch in table:
            if branch.tokens == "id" and self.id_input == "none":
                return (
                    f'the branch {branch.name} reads ID tokens, and id_input is "none". Give its row "tokens": "text", '
                    "or the checkpoint an id_input."
                )
            if branch.tokens == "id" and self.delayed_id == "absent":
                return (
                    f'the branch {branch.name} reads ID tokens alone, which cannot be absent. Write delayed_id "null".'
                )
            if branch.tokens == "text_and_id" and self.unet_tokens != "text_and_id":
                return (
                    f'the branch {branch.name} reads "text_and_id", and the UNet "{self.unet_tokens}". No published '
                    'model is so: write unet_tokens "text_and_id", or give the row other tokens.'
                )
            if branch.condition == "id_patches" and not (aligned and self.patch_px):
                return (
                    f'the branch {branch.name} is shown ID patches, which need id_input "aligned_face" and patch_px. '
                    "Give both, or its row another condition."
                )
        return None

    def to_dict(self) -> dict[str, Any]:
        """The keys and values, as they stand in the file."""
        values = dataclasses.asdict(self)
        if self.branches is None:
            del values["branches"]
        else:
            values["branches"] = list(values["branches"])  # as JSON reads it
        if self.branch_pooled_text is None:
            del values["branch_pooled_text"]
        if self.sampler is None:
            del values["sampler"]
        else:
            values["sampler"] = self.sampler.to_json()
        if self.steps == "free":
            del values["steps"]
        if self.branches is None and self.method == "realisid":
            for key in BEFORE_TABLES:
                if values[key] == getattr(RealisIDConfig, key):
                    del values[key]
        return values


def _sampler(value: Any, source: str, advice: str) -> Sampler | None:
    """The value of the key `sampler`. Raises CheckpointError."""
    try:
        return None if value is None else Sampler.of(value)
    except RequestError as error:
        key = "" if str(error).startswith("sampler") else "sampler: "
        raise CheckpointError(f"{source}: {key}{error} {advice}") from error
