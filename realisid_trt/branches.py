"""The table of branches: a branch is one ControlNet beside the UNet, and its row says how it takes part.

RealisID is two rows of the table, ID-Patch is one, and an openpose ControlNet another.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .checks import is_finite
from .errors import CheckpointError

FACE_STYLES = ("realisid-v1", "mediapipe-face", "dots-68")  # of persons.conditions
BODY_STYLES = ("openpose-mmpose", "openpose-xinsir")  # of persons.bodies
BRANCH_OPTIONS: dict[str, tuple[str, ...]] = {
    "view": ("face", "picture"),
    "writes": ("box", "everywhere"),
    "condition": ("pose", "location", "image", "id_patches"),
    "tokens": ("id", "text", "text_and_id"),
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
    condition: what is drawn for it: "pose" (of persons), "location" (mask of a person's box), "image" (the caller's),
               or "id_patches" (the persons' patches on a drawing of their bodies, or on the caller's).
    style:     name of a drawing: of a face or a body. For "pose" by default the config's pose_style, for "id_patches"
               "openpose-mmpose"; for "image" none, or the drawing of given bodies where the caller gives no picture.
    channels:  of the condition, 1 or 3.
    tokens:    its encoder_hidden_states: "id" (of one person), "text", or "text_and_id" (the text, then the IDs of all
               persons of the picture).
    pooled:    pooled text in its added conditions: "zeros" or "per_row" (the row's own).
    per:       its rows: one for each "person", or one for the "picture".
    merge:     of the persons' residuals: "sum" or "mean".
    scale, start, end: defaults of a request: the factor of its residuals, and the first and last share of the steps,
               as `control_guidance_start` and `control_guidance_end` of diffusers.
    optional:  absent from a request that gives nothing to draw; false for "id_patches".
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
            "style": {"pose": pose_style, "id_patches": BODY_STYLES[0]}.get(condition),
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
        styles = {
            "pose": (*FACE_STYLES, *BODY_STYLES),
            "image": (None, *BODY_STYLES),
            "location": (None,),
            "id_patches": BODY_STYLES,
        }
        if self.style not in styles[self.condition]:
            return "style", f"one of {', '.join(map(str, styles[self.condition]))} for a {self.condition}"
        if self.channels not in (1, 3) or isinstance(self.channels, (bool, float)):
            return "channels", "1 or 3"
        if self.condition == "id_patches" and self.channels != 3:
            return "channels", "3: a patch has three colours"
        if self.view == "face" and (self.condition != "pose" or self.style in BODY_STYLES or self.per != "person"):
            return "view", '"picture": a view of the face takes the pose of a face, per person'
        if self.writes == "box" and self.per != "person":
            return "writes", '"everywhere": only rows of a person have a box'
        if self.view == "face" and self.writes != "box":
            return "writes", '"box": what is seen in a box is written there'
        if self.tokens == "id" and self.per != "person":
            return "tokens", '"text": ID tokens are those of one person, so per must be "person"'
        if self.tokens == "text_and_id" and self.per != "picture":
            return "tokens", '"id" or "text": the tokens of all persons belong to the row of a picture'
        if self.per == "person" and self.condition in ("image", "id_patches"):
            return "per", '"picture": its condition shows the whole picture'
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
        if self.condition == "id_patches" and self.optional:
            return "optional", "false: it shows every person of a request"
        return None

    @property
    def condition_input(self) -> str:
        """The name of its condition network's input."""
        return {"pose": "pose_image", "location": "location_mask"}.get(self.condition, self.condition)

    @property
    def tokens_input(self) -> str:
        """The name of the input that takes its tokens."""
        return tokens_input(self.tokens)

    @property
    def reads_id(self) -> bool:
        """Whether the ID reaches its residuals."""
        return self.tokens != "text" or self.condition == "id_patches"

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


def tokens_input(tokens: str) -> str:
    """The name of the input for tokens "id", "text" or "text_and_id"."""
    return {"id": "id_tokens", "text": "prompt_embeds", "text_and_id": "tokens"}[tokens]


def realisid_branches(pooled: str) -> tuple[dict[str, Any], ...]:
    """The two rows of RealisID. pooled: `branch_pooled_text`."""
    shared = {"tokens": "id", "pooled": pooled, "per": "person"}
    return (
        {"name": "local", "view": "face", "condition": "pose", "merge": "sum", **shared},
        {"name": "global", "view": "picture", "condition": "location", "merge": "mean", **shared},
    )


# ID-Patch's row: one ControlNet that sees the persons' patches on a drawing of their bodies.
IDPATCH_BRANCHES: tuple[dict[str, Any], ...] = (
    {"name": "id_patch", "condition": "id_patches", "tokens": "text_and_id", "pooled": "per_row", "scale": 0.8},
)


def table_of(rows: Any, pose_style: str, source: str) -> tuple[Branch, ...]:
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
