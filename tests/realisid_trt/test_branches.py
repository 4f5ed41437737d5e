"""The table of branches: what a config may say, and what an engine makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realisid_trt import Control, Engine, Person, Request
from realisid_trt.branches import BODY_STYLES, FACE_STYLES, IDPATCH_BRANCHES, Branch, realisid_branches
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import CheckpointError, RequestError
from realisid_trt.loop.controls import control_image, settings
from realisid_trt.persons.bodies import BODY_STYLES as BODIES
from realisid_trt.persons.boxes import Grid
from realisid_trt.persons.conditions import POSE_STYLES

OPENPOSE = {"name": "openpose", "condition": "image", "tokens": "text", "pooled": "per_row"}
GRID = Grid(64, 96, 4, 3, 4)


def table(*rows: dict[str, Any], **config: Any) -> tuple[Branch, ...]:
    values = {"method": "controlnet", "branches": list(rows), **config}
    return RealisIDConfig.from_dict(values).table


# -- what a config may say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooled", ["zeros", "per_row"])
def test_without_branches_there_are_the_two_rows_of_realisid(pooled: str) -> None:
    config = RealisIDConfig.from_dict({"branch_pooled_text": pooled})
    local, whole = config.table
    assert (local.name, local.view, local.writes, local.condition, local.merge) == (
        "local",
        "face",
        "box",
        "pose",
        "sum",
    )
    assert (whole.name, whole.view, whole.writes) == ("global", "picture", "everywhere")
    assert (whole.condition, whole.channels, whole.merge) == ("location", 1, "mean")
    for row in (local, whole):
        assert (row.tokens, row.pooled, row.per, row.scale, row.start, row.end) == ("id", pooled, "person", 1, 0, 1)
    assert "branches" not in config.to_dict() and "method" not in config.to_dict()  # the file stays what it was
    assert RealisIDConfig.from_dict(config.resolved().to_dict()) == config.resolved()
    assert config.resolved().table == config.table


def test_a_row_has_the_defaults_of_its_condition() -> None:
    [openpose] = table(OPENPOSE)
    assert openpose.folder == "controlnet_openpose" and openpose.optional and openpose.per == "picture"
    assert (openpose.view, openpose.writes, openpose.channels, openpose.style) == ("picture", "everywhere", 3, None)
    [face] = table({**OPENPOSE, "name": "face", "condition": "pose"}, pose_style="mediapipe-face")
    assert (face.style, face.per, face.optional) == ("mediapipe-face", "picture", False)
    config = RealisIDConfig.from_dict({"method": "controlnet", "branches": [OPENPOSE]})
    assert (config.id_input, config.guidance_scale, config.subject_conditioning_ratio) == ("none", 5.0, None)


def test_names_of_coming_branches_are_free() -> None:
    for name in ("id_patch", "identity", "texture", "unetwork"):
        assert table({**OPENPOSE, "name": name})[0].folder == f"controlnet_{name}"


def test_the_styles_are_those_that_can_be_drawn() -> None:
    assert set(FACE_STYLES) == set(POSE_STYLES) and set(BODY_STYLES) == set(BODIES)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no rows": ({"method": "controlnet"}, 'method "controlnet" has no branches of its own. Give "branches"'),
    "an empty table": ({"branches": []}, "branches is [], expected a list of objects, one for each ControlNet"),
    "both": (
        {"branches": [OPENPOSE], "branch_pooled_text": "zeros"},
        'branches and branch_pooled_text are both given. Each row of a table says its own "pooled": remove',
    ),
    "a method": ({"method": "photomaker"}, "method is 'photomaker', expected one of realisid, idpatch, controlnet"),
    "ids without identities": (
        {"method": "controlnet", "branches": list(realisid_branches("zeros"))},
        'the branch local reads ID tokens, and id_input is "none"',
    ),
    "tokens behind the text without a face encoder": (
        {"unet_tokens": "text_and_id", "branches": [{**OPENPOSE, "tokens": "text_and_id"}]},
        'unet_tokens is "text_and_id", and id_input "face_crop". No published model is so: write unet_tokens "text", '
        'or id_input "aligned_face" with a face encoder.',
    ),
    "a name twice": ({"branches": [OPENPOSE, OPENPOSE]}, "two branches have the name 'openpose'"),
    "a folder twice": (
        {"branches": [OPENPOSE, {**OPENPOSE, "name": "depth", "folder": "controlnet_openpose"}]},
        "two branches have the folder 'controlnet_openpose'",
    ),
    "text": ({"branches": ["openpose"]}, "branch 1 is 'openpose', expected an object with the keys name, condition"),
}


@pytest.mark.parametrize(("values", "said"), REFUSED.values(), ids=REFUSED)
def test_a_table_that_cannot_be_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        RealisIDConfig.from_dict(values)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scael": 1}, "branch 1: unknown key scael. Known keys: name, folder, view"),
        ({"tokens": None}, "branch 1: tokens is missing and has no default, expected one of id, text"),
        ({"name": "Open Pose"}, "name is 'Open Pose', expected small letters, digits and _"),
        ({"name": "unet"}, "name is 'unet', expected small letters, digits and _, and none of unet, vae, id, text"),
        ({"folder": "../other"}, "folder is '../other', expected the name of a folder in the checkpoint"),
        ({"condition": "depth"}, "condition is 'depth', expected one of pose, location, image"),
        (
            {"style": "realisid-v1"},
            "style is 'realisid-v1', expected one of None, openpose-mmpose, openpose-xinsir for a",
        ),
        ({"channels": 4}, "channels is 4, expected 1 or 3"),
        ({"view": "face", "writes": "box"}, "view is 'face', expected \"picture\": a view of the face takes the pose"),
        ({"writes": "box"}, "writes is 'box', expected \"everywhere\": only rows of a person have a box"),
        ({"tokens": "id"}, "tokens is 'id', expected \"text\": ID tokens are those of one person"),
        ({"per": "person"}, "per is 'person', expected \"picture\": its condition shows the whole picture"),
        ({"merge": "mean"}, "merge is 'mean', expected \"sum\": a picture has one row"),
        ({"scale": float("nan")}, "scale is nan, expected a finite number"),
        ({"start": 0.5, "end": 0.5}, "start is 0.5, expected a number from 0 to 1, less than end"),
        ({"end": 1.5}, "end is 1.5, expected a number above 0, at most 1"),
        ({"optional": 1}, "optional is 1, expected true or false"),
    ],
)
def test_a_row_that_cannot_be_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        table({**OPENPOSE, **change})
    assert said in str(error.value)


def test_a_row_of_patches_is_never_optional() -> None:
    """Every person of a request has a patch: nothing could leave the branch out."""
    [row] = IDPATCH_BRANCHES
    assert not Branch.from_dict({**row, "optional": False}, "realisid-v1", "branch 1").optional
    with pytest.raises(CheckpointError, match="optional is True, expected false: it shows every person of a request"):
        Branch.from_dict({**row, "optional": True}, "realisid-v1", "branch 1")


# -- what a request says -----------------------------------------------------------------------------------------------


def image(height: int = 64, width: int = 96, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).random((channels, height, width)).astype(np.float32)


def asked(rows: tuple[Branch, ...], persons: tuple[Person, ...] = (), **controls: Control) -> Any:
    return settings(Request("x", persons, controls=controls).check(), rows, GRID)


def test_a_control_overrides_the_row() -> None:
    rows = table({**OPENPOSE, "scale": 0.8, "start": 0.1, "end": 0.9})
    [default] = asked(rows)
    assert (default.scale, default.start, default.end, default.given) == (0.8, 0.1, 0.9, False)
    [given] = asked(rows, openpose=Control(image(), scale=np.float32(0.5), end=0.6))
    assert (given.scale, given.start, given.end, given.given) == (0.5, 0.1, 0.6, True)
    assert np.array_equal(given.image, image())


def test_an_image_is_resized_like_diffusers_does() -> None:
    """RGB / 255, no mean; Lanczos if the size differs; grey for a branch of one channel."""
    from PIL import Image

    rgb = np.random.default_rng(1).integers(0, 256, (128, 192, 3), np.uint8)
    [row] = table(OPENPOSE)
    drawn, notes = control_image(rgb, row, GRID)
    small = np.asarray(Image.fromarray(rgb).resize((96, 64), Image.Resampling.LANCZOS), np.float32)
    assert np.array_equal(drawn, small.transpose(2, 0, 1) / np.float32(255))
    assert notes == ("the image of the control openpose was resized from 192×128 to 96×64 px.",)
    [grey] = table({**OPENPOSE, "channels": 1})
    same, notes = control_image(np.asarray(Image.fromarray(rgb).resize((96, 64))), grey, GRID)
    assert same.shape == (1, 64, 96) and not notes


def test_transparency_of_a_drawing_is_black() -> None:
    rgba = np.zeros((64, 96, 4), np.uint8)
    rgba[:32] = 255
    drawn, _ = control_image(rgba, table(OPENPOSE)[0], GRID)
    assert drawn[:, :32].min() == 1 and drawn[:, 32:].max() == 0


@pytest.mark.parametrize(
    ("controls", "said"),
    [
        ({"depth": Control()}, "controls names 'depth', and this engine has no such branch: it has openpose."),
        ({"openpose": Control(image(32, 48))}, "is 48×32 px, the picture 96×64. Give an array of the picture's size"),
        ({"openpose": Control(image(64, 96, 1))}, "has shape (1, 64, 96), expected (3, H, W) floats in [0, 1]"),
        ({"openpose": Control(np.zeros((3, 0, 0), np.float32))}, "is 0×0 px, the picture 96×64"),
        ({"openpose": Control(image() * 255)}, "expected [0, 1]. Divide by 255?"),
        ({"openpose": Control(np.zeros((96, 96, 3), np.uint8))}, "is 96×96 px, the picture 96×64: another aspect"),
        ({"openpose": Control(scale=float("inf"))}, "scale of the control openpose is inf, expected a finite number"),
        ({"openpose": Control(start=0.7, end=0.2)}, "has start 0.7 and end 0.2, expected 0 <= start < end <= 1"),
        ({"openpose": "pose.png"}, 'controls is not a dict of Control. Write {"openpose": Control("pose.png")}'),
    ],
)
def test_a_control_that_cannot_be_is_refused(controls: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as error:
        settings(Request("x", controls=controls).check(), table(OPENPOSE), GRID)
    assert said in str(error.value)


def test_a_branch_that_is_not_optional_needs_its_picture() -> None:
    with pytest.raises(
        RequestError, match=r"the branch openpose needs something to draw. Give its picture, or the drawing: controls="
    ):
        asked(table({**OPENPOSE, "optional": False}))
    bodies = table({**OPENPOSE, "condition": "pose", "style": "openpose-xinsir"})
    with pytest.raises(
        RequestError,
        match=r"needs something to draw. Give a person a body: Person\(body=…\), or the drawing: controls=",
    ):
        asked(bodies, (Person(landmarks=np.zeros((478, 2)), box=(0, 0, 32, 32)),))
    [setting] = asked(bodies, (Person(body=np.full((17, 2), 20.0)),))
    assert setting.given and setting.image is None
    each = table({**OPENPOSE, "condition": "pose", "style": "openpose-xinsir", "per": "person", "optional": False})
    with pytest.raises(RequestError, match=r"Give every person a body: Person\(body=…\)\.$"):
        asked(each, (Person(landmarks=np.zeros((478, 2)), box=(0, 0, 32, 32)),))
    [off] = asked(table({**OPENPOSE, "optional": False}), openpose=Control(scale=0))
    assert not off.given  # what acts nowhere needs no drawing
    [absent] = asked(bodies)  # nobody is plain text-to-image, as for RealisID's rows
    assert not absent.given


def test_the_scales_of_realisid_are_controls_by_another_name() -> None:
    config = RealisIDConfig(branch_pooled_text="zeros")
    local, whole = settings(Request("x", local_scale=0.5, global_scale=0).check(), config.table, GRID)
    assert (local.scale, whole.scale) == (0.5, 0)
    once = Request("x", local_scale=0.5, controls={"global": Control(scale=0.25)}).check()
    assert settings(once.check(), config.table, GRID)[0].scale == 0.5  # checked twice is checked
    with pytest.raises(RequestError, match="local_scale and the scale of controls"):
        Request("x", local_scale=0.5, controls={"local": Control(scale=0.5)}).check()
    with pytest.raises(
        RequestError, match="controls names 'local' .or local_scale was given., and this engine has no such branch"
    ):
        settings(Request("x", local_scale=0.5).check(), table(OPENPOSE), GRID)
    with pytest.raises(RequestError, match="the control local has an image, but that branch draws every person"):
        asked(config.table, local=Control(image()))


# -- what an engine makes of it ----------------------------------------------------------------------------------------


def person(engine: Engine, **given: Any) -> Person:
    model = engine.model
    tokens = np.random.default_rng(0).standard_normal((model.num_id_tokens, model.cross_attention_dim))
    return Person(id_tokens=tokens, box=(8, 8, 72, 72), landmarks=np.random.default_rng(1).random((478, 2)), **given)


def test_a_window_leaves_rows_out_and_nothing_else(engine_dir: Path) -> None:
    """A branch outside of its window: no rows, and the same picture as with its scale 0 there."""
    with Engine.load(engine_dir) as engine:
        given = {"seed": 5, "num_inference_steps": 4, "output": "latents", "subject_conditioning_ratio": None}
        somebody = [person(engine)]
        half = engine.generate("x", somebody, controls={"global": Control(end=0.5)}, **given)
        assert half.rows["global_branch"] == 2 * 2 and half.rows["local_branch"] == 4 * 2
        full = engine.generate("x", somebody, **given)
        off = engine.generate("x", somebody, global_scale=0, **given)
        assert "global_branch" not in off.rows
        assert not np.array_equal(half.latents, full.latents) and not np.array_equal(half.latents, off.latents)
        [first, second] = engine.generate_batch(
            [Request("x", somebody, seed=5, subject_conditioning_ratio=None, controls={"global": Control(end=0.5)}),
             Request("y", somebody, seed=5, subject_conditioning_ratio=None)],
            num_inference_steps=4, output="latents",
        )  # fmt: skip
        assert np.array_equal(first.latents, half.latents) and first.rows["global_branch"] == 2 * 2
        assert second.rows["global_branch"] == 4 * 2
        assert not np.array_equal(first.latents, second.latents)
        # from the middle on, neither branch acts: then nothing carries the ID, and two rows are enough
        both = {name: Control(end=0.5) for name in ("local", "global")}
        plain = engine.generate("x", somebody, controls=both, **given)
        assert plain.rows["unet_decoder"] == 2 * 3 + 2 * 2 and plain.rows["relocate_merge"] == 2 * 3


def test_what_the_branches_are_shown(engine_dir: Path, tmp_path: Path) -> None:
    with Engine.load(engine_dir) as engine:
        somebody = person(engine)
        shown = engine.conditions("x", [somebody, somebody])
        side = engine.model.default_size
        assert {name: [d.shape for d in drawn] for name, drawn in shown.items()} == {
            "local": [(3, side, side)] * 2, "global": [(1, side, side)] * 2,
        }  # fmt: skip
        assert shown["global"][0].sum() == 64 * 64
        assert engine.conditions("x") == {}


def test_a_person_of_an_engine_with_identities_needs_one(engine_dir: Path) -> None:
    who = "person 1 needs exactly one of photo, identity and id_tokens; got none of them"
    with Engine.load(engine_dir) as engine, pytest.raises(RequestError, match=who):
        engine.generate("x", [Person(landmarks=np.zeros((478, 2)), box=(8, 8, 72, 72))])
    with pytest.raises(
        RequestError, match="needs exactly one of photo, identity, id_tokens and embedding; got none of them"
    ):
        Person()


def test_a_manifest_of_an_older_format_names_the_command(engine_dir: Path, with_config: Callable[..., Path]) -> None:
    import json

    from realisid_trt.errors import EngineMismatch

    folder = with_config(engine_dir)
    manifest = json.loads((folder / "manifest.json").read_text())
    for older in (1, 2, 3, 4):
        (folder / "manifest.json").write_text(json.dumps(manifest | {"format": older}))
        with pytest.raises(EngineMismatch, match=f"engine format {older}; this realisid_trt reads format 6. Build it"):
            Engine.load(folder)
