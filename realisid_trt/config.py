"""`realisid_config.json`: the settings of a checkpoint that its weights do not state, and its table of branches.

A branch is one ControlNet beside the UNet. RealisID is two rows of the table, an openpose ControlNet is another.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .checks import is_finite, is_whole
from .errors import CheckpointError

METHODS = ("realisid", "controlnet")
FACE_STYLES = ("realisid-v1", "mediapipe-face", "dots-68")  # of persons.conditions
BODY_STYLES = ("openpose-mmpose", "openpose-xinsir")  # of persons.bodies
OPTIONS: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "id_input": ("face_crop", "none"),
    "null_id": ("zero_image", "zero_tokens", "file"),
    "relocate_mode": ("bilinear", "area"),
    "overlap": ("sum", "average", "priority"),
    "pose_style": FACE_STYLES,
}
BRANCH_OPTIONS: dict[str, tuple[str, ...]] = {
    "view": ("face", "picture"),
    "writes": ("box", "everywhere"),
    "condition": ("pose", "location", "image"),
    "tokens": ("id", "text"),
    "pooled": ("zeros", "per_row"),
    "per": ("person", "picture"),
    "merge": ("sum", "mean"),
}
REQUIRED = ("name", "condition", "tokens", "pooled")
NAME = re.compile(r"[a-z][a-z0-9_]*")
FOLDER = re.compile(r"[A-Za-z0-9][\w.-]*")
RESERVED = ("unet", "vae", "id", "text")  # other networks are named so


def is_branch_name(name: object) -> bool:
    """Whether a branch may have this name: no network of an engine has a name like those of the branch then."""
    return isinstance(name, str) and bool(NAME.fullmatch(name)) and name not in RESERVED


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One row of the table: a ControlNet, and how it takes part.

    name:      prefix of its networks (NAME_condition, NAME_time, NAME_branch) and its key in `controls`.
    folder:    in the checkpoint; by default controlnet_NAME.
    view:      latents that it sees: "face", a person's box cut out and up-sampled, or "picture".
    writes:    cells that get its residuals: "box" (the persons' boxes) or "everywhere". By default what it sees.
    condition: what is drawn for it: "pose" (of persons), "location" (mask of a person's box), "image" (the caller's).
    style:     name of a drawing: of a face or a body. For "pose" by default the config's pose_style; for "image" none,
               or the drawing of given bodies where the caller gives no picture.
    channels:  of the condition, 1 or 3.
    tokens:    its encoder_hidden_states: "id" (of one person) or "text" (the UNet's).
    pooled:    pooled text in its added conditions: "zeros" or "per_row" (the row's own).
    per:       its rows: one for each "person", or one for the "picture".
    merge:     of the persons' residuals: "sum" or "mean".
    scale, start, end: defaults of a request: the factor of its residuals, and the first and last share of the steps,
               as `control_guidance_start` and `control_guidance_end` of diffusers.
    optional:  absent from a request that gives nothing to draw.
    """

    name: str
    folder: str
    view: str
    writes: str
    condition: str
    style: str | None
    channels: int
    tokens: str
    pooled: str
    per: str
    merge: str
    scale: float
    start: float
    end: float
    optional: bool

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], pose_style: str, source: str, advice: str = "Correct the file."
    ) -> Branch:
        """The checked row, defaults filled in. Raises CheckpointError.

        pose_style: of the config. source, advice: for its messages, the file and the place of the row, and what to do.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{source} is {values!r}, expected an object with the keys {', '.join(REQUIRED)}.")
        if unknown := sorted(set(values) - set(fields)):
            raise CheckpointError(f"{source}: unknown key {unknown[0]}. Known keys: {', '.join(fields)}.")
        if missing := [key for key in REQUIRED if values.get(key) is None]:
            expected = f"one of {', '.join(BRANCH_OPTIONS[missing[0]])}" if missing[0] != "name" else "a name"
            raise CheckpointError(f"{source}: {missing[0]} is missing and has no default, expected {expected}.")
        view, condition = values.get("view", "picture"), values["condition"]
        defaults = {
            "folder": f"controlnet_{values['name']}",
            "view": view,
            "writes": "box" if view == "face" else "everywhere",
            "style": pose_style if condition == "pose" else None,
            "channels": 1 if condition == "location" else 3,
            "per": "person" if view == "face" or condition == "location" else "picture",
            "merge": "sum", "scale": 1.0, "start": 0.0, "end": 1.0,
            "optional": condition == "image",
        }  # fmt: skip
        branch = cls(**{**defaults, **values})
        if refused := branch._refused():
            key, expected = refused
            value = getattr(branch, key)
            raise CheckpointError(f"{source}: {key} is {value!r}, expected {expected}. {advice}")
        return branch

    def _refused(self) -> tuple[str, str] | None:
        """The first key whose value is impossible, and what is expected instead."""
        if not is_branch_name(self.name):
            return "name", f"small letters, digits and _, and none of {', '.join(RESERVED)}"
        if not isinstance(self.folder, str) or not FOLDER.fullmatch(self.folder):
            return "folder", "the name of a folder in the checkpoint"
        for key, options in BRANCH_OPTIONS.items():
            if getattr(self, key) not in options:
                return key, f"one of {', '.join(options)}"
        styles = {"pose": (*FACE_STYLES, *BODY_STYLES), "image": (None, *BODY_STYLES), "location": (None,)}
        if self.style not in styles[self.condition]:
            return "style", f"one of {', '.join(map(str, styles[self.condition]))} for a {self.condition}"
        if self.channels not in (1, 3) or isinstance(self.channels, (bool, float)):
            return "channels", "1 or 3"
        if self.view == "face" and (self.condition != "pose" or self.style in BODY_STYLES or self.per != "person"):
            return "view", '"picture": a view of the face takes the pose of a face, per person'
        if self.writes == "box" and self.per != "person":
            return "writes", '"everywhere": only rows of a person have a box'
        if self.view == "face" and self.writes != "box":
            return "writes", '"box": what is seen in a box is written there'
        if self.tokens == "id" and self.per != "person":
            return "tokens", '"text": ID tokens are those of one person, so per must be "person"'
        if self.per == "person" and self.condition == "image":
            return "per", '"picture": a given image is that of the whole picture'
        if self.per == "picture" and self.condition == "location":
            return "per", '"person": the mask is that of one box'
        if self.merge == "mean" and self.per != "person":
            return "merge", '"sum": a picture has one row'
        if not is_finite(self.scale):
            return "scale", "a finite number"
        if not (is_finite(self.end) and 0 < self.end <= 1):
            return "end", "a number above 0, at most 1"
        if not (is_finite(self.start) and 0 <= self.start < self.end):
            return "start", "a number from 0 to 1, less than end"
        if not isinstance(self.optional, bool):
            return "optional", "true or false"
        return None

    @property
    def condition_input(self) -> str:
        """The name of its condition network's input."""
        return {"pose": "pose_image", "location": "location_mask", "image": "image"}[self.condition]

    @property
    def tokens_input(self) -> str:
        """The name of the input that takes its tokens."""
        return "id_tokens" if self.tokens == "id" else "prompt_embeds"

    @property
    def draws_faces(self) -> bool:
        """Whether its drawing is of face landmarks, which stand in a person's box."""
        return self.condition == "pose" and self.style in FACE_STYLES

    @property
    def draws_bodies(self) -> bool:
        """Whether its drawing is of body keypoints."""
        return self.style in BODY_STYLES

    @property
    def needs_box(self) -> bool:
        """Whether it needs to know where each person's face is."""
        return self.draws_faces or self.condition == "location" or self.writes == "box"


def realisid_branches(pooled: str) -> tuple[dict[str, Any], ...]:
    """The two rows of RealisID. pooled: `branch_pooled_text`."""
    shared = {"tokens": "id", "pooled": pooled, "per": "person"}
    return (
        {"name": "local", "view": "face", "condition": "pose", "merge": "sum", **shared},
        {"name": "global", "view": "picture", "condition": "location", "merge": "mean", **shared},
    )


# Defaults of the keys that a method sets otherwise than RealisID.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "realisid": {},
    "controlnet": {"id_input": "none", "subject_conditioning_ratio": None, "guidance_scale": 5.0},
}


@dataclass(frozen=True, kw_only=True)
class RealisIDConfig:
    """The keys of `realisid_config.json`. A checkpoint states what its weights were trained with.

    method:              "realisid" or "controlnet": decides the defaults of absent keys, and nothing else.
    branches:            rows of the table, in the order of the sums; None: those of the method.
    branch_pooled_text:  of RealisID's two rows, where `branches` is absent: their `pooled`. No default.
    id_input:            "face_crop" (image encoder and ID projection) or "none": an engine without identities.
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

    method: str = "realisid"
    branches: tuple[Branch, ...] | None = None
    branch_pooled_text: str | None = None
    id_input: str = "face_crop"
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
        given = dict(values)
        rows = given.pop("branches", None)
        config = cls(**{**METHOD_DEFAULTS.get(str(given.get("method")), {}), **given})
        if refused := config._refused():
            key, expected = refused
            raise CheckpointError(f"{source}: {key} is {getattr(config, key)!r}, expected {expected}. {advice}")
        if rows is not None:
            if config.branch_pooled_text is not None:
                raise CheckpointError(
                    f"{source}: branches and branch_pooled_text are both given. With branches each row says its own "
                    '"pooled": remove branch_pooled_text.'
                )
            config = replace(config, branches=_table(rows, config.pose_style, source))
        elif config.method == "controlnet":
            raise CheckpointError(
                f'{source}: method "controlnet" has no branches of its own. Give "branches": one object for each '
                f"ControlNet, with the keys {', '.join(REQUIRED)}."
            )
        elif config.branch_pooled_text is None:
            raise CheckpointError(
                f'{source}: branch_pooled_text is missing and has no default. Write "zeros" if the branches were '
                "trained without pooled text, \"per_row\" if they were trained with the UNet's (as InstantID's are)."
            )
        for branch in config.table:
            if branch.tokens == "id" and config.id_input == "none":
                raise CheckpointError(
                    f'{source}: the branch {branch.name} reads ID tokens, and id_input is "none". Give its row '
                    '"tokens": "text", or the checkpoint an id_input.'
                )
        return config

    @property
    def table(self) -> tuple[Branch, ...]:
        """The rows of the table of branches: those given, else those of the method."""
        if self.branches is not None:
            return self.branches
        assert self.branch_pooled_text is not None
        rows = realisid_branches(self.branch_pooled_text)
        return tuple(Branch.from_dict(row, self.pose_style, "RealisID's rows") for row in rows)

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
        values = dataclasses.asdict(self)
        if self.branches is None:
            del values["branches"]
        else:
            values["branches"] = list(values["branches"])  # as JSON reads it
        if self.branch_pooled_text is None:
            del values["branch_pooled_text"]
        if self.branches is None and self.method == "realisid":
            for key in ("method", "id_input"):  # as before there was a table
                del values[key]
        return values


def _table(rows: Any, pose_style: str, source: str) -> tuple[Branch, ...]:
    """The checked rows. Raises CheckpointError."""
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise CheckpointError(f"{source}: branches is {rows!r}, expected a list of objects, one for each ControlNet.")
    table = tuple(
        Branch.from_dict(row, pose_style, f"{source}, branch {number}") for number, row in enumerate(rows, start=1)
    )
    for key in ("name", "folder"):
        values = [getattr(branch, key) for branch in table]
        if twice := [value for value in values if values.count(value) > 1]:
            raise CheckpointError(f"{source}: two branches have the {key} {twice[0]!r}. Give each its own.")
    return table
