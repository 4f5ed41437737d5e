"""A folder of the user's photos: ten, made from two by augmentation, with captions; up to a few training steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from export.miniature import make_checkpoint
from realisid_trt.errors import RequestError
from tests.conftest import Photos
from training.log import read_log
from training.pictures import PictureFolder, captions_of, framed
from training.prepare import main as prepare
from training.store import LeftOut, Store
from training.train import main as train


@pytest.fixture(scope="module")
def folder(photos: Photos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten photos with faces, five of each person, and one of a wall."""
    out = tmp_path_factory.mktemp("photos")
    changes = {
        "plain": lambda image: image,
        "mirrored": ImageOps.mirror,
        "bright": lambda image: ImageEnhance.Brightness(image).enhance(1.25),
        "wide": lambda image: ImageOps.expand(image, (180, 0, 60, 0), fill=(90, 110, 130)),
        "grey": lambda image: ImageOps.grayscale(image).convert("RGB"),
    }
    for name, path in (("astronaut", photos.astronaut), ("hopper", photos.hopper)):
        image = Image.open(path).convert("RGB")
        for how, change in changes.items():
            change(image).save(out / f"{name}-{how}.png")
            (out / f"{name}-{how}.txt").write_text(f"a photo of the {name}, {how}\n")
    Image.fromarray(np.full((300, 400, 3), 180, np.uint8)).save(out / "wall.png")
    (out / "wall.txt").write_text("a wall")
    return out


@pytest.fixture(scope="module")
def store(folder: Path, face_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "store"
    status = prepare(["pictures", "--folder", str(folder), "--face-models", str(face_models), "--size-px", "128",
                      "--crop-px", "64", "--out", str(out)])  # fmt: skip
    assert status == 0
    return out


def test_faces_captions_and_crops_are_found(store: Path) -> None:
    found = Store(store)
    assert len(found) == 10 and list(found.left_out) == ["wall.png"]
    assert "no face" in found.left_out["wall.png"]
    assert found.captions[0] == "a photo of the astronaut, bright"
    assert found["rgb"].shape == (10, 128, 128, 3) and found["crops"].shape == (10, 1, 64, 64, 3)
    boxes, points = found["boxes"][:, 0], found["landmarks"][:, 0]
    assert (boxes >= -1).all() and (boxes <= 129).all() and ((boxes[:, 2] - boxes[:, 0]) > 20).all()
    assert (np.abs(points - 0.5) < 0.75).all()
    # the eyes stand level, above the mouth, inside the box: irises 468 and 473, lips 13
    assert (points[:, [468, 473], 1].max(1) < points[:, 13, 1]).all()
    crops = found["crops"][:, 0]  # a face on nothing
    assert all(crops[:, y, x].max() == 0 for y in (0, -1) for x in (0, -1))
    assert (crops[:, 32, 32].max(axis=1) > 40).all()
    # a mirrored photo has its face on the other side
    names = [caption.rsplit(", ", 1)[1] for caption in found.captions[:5]]
    middle = {name: (box[0] + box[2]) / 2 for name, box in zip(names, boxes[:5], strict=True)}
    assert middle["plain"] + middle["mirrored"] == pytest.approx(128, abs=3)


def test_five_training_steps(store: Path, tmp_path: Path) -> None:
    start = make_checkpoint(
        tmp_path / "start", preset="world", prediction="epsilon", force_zeros_for_empty_prompt=False
    )
    status = train(["branches", "--checkpoint", str(start), "--data", str(store), "--out", str(tmp_path / "run"),
                    "--new", "--cpu", "--steps", "5", "--batch-size", "4", "--threads", "1"])  # fmt: skip
    assert status == 0
    losses = [line["loss"] for line in read_log(tmp_path / "run" / "log.jsonl")]
    assert len(losses) == 5 and np.isfinite(losses).all()
    assert (tmp_path / "run" / "checkpoint" / "controlnet_local" / "config.json").is_file()


def test_what_is_wrong_with_a_folder_is_said(folder: Path, face_models: Path, tmp_path: Path) -> None:
    def examples(path: Path) -> PictureFolder:
        return PictureFolder(folder=str(path), face_models=str(face_models))

    with pytest.raises(RequestError, match="is not a folder"):
        len(examples(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="holds no pictures"):
        len(examples(tmp_path / "empty"))
    (tmp_path / "mute").mkdir()
    shutil.copy(folder / "wall.png", tmp_path / "mute")
    with pytest.raises(RequestError, match=r"1 of 1 pictures have no caption.*wall\.txt beside it"):
        len(examples(tmp_path / "mute"))
    (tmp_path / "lines").mkdir()
    shutil.copy(folder / "wall.png", tmp_path / "lines")
    (tmp_path / "lines" / "metadata.jsonl").write_text('{"file_name": "wall.png"}\n')
    with pytest.raises(RequestError, match="line 1"):
        len(examples(tmp_path / "lines"))
    (tmp_path / "told").mkdir()
    shutil.copy(folder / "wall.png", tmp_path / "told")
    line = json.dumps({"file_name": "wall.png", "text": "a wall"})
    (tmp_path / "told" / "metadata.jsonl").write_text(line + "\n")
    assert len(examples(tmp_path / "told")) == 1


def test_sub_folders_are_read_and_hidden_files_are_not(folder: Path, tmp_path: Path) -> None:
    """Names are relative to the folder, those in a metadata.jsonl to its own folder. The nearest caption counts."""
    for name in ("b.png", "alice/one.png", "alice/deep/two.png", "bob/three.png", "._b.png", ".thumbs/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "wall.png", tmp_path / name)
    (tmp_path / "b.txt").write_text("b\n")
    (tmp_path / "bob" / "three.txt").write_text("three")
    with pytest.raises(
        RequestError, match=r"2 of 4 .*, alice/deep/two\.png for one\. Write it into alice/deep/two\.txt"
    ):
        captions_of(f"{tmp_path}")
    lines = {"": {"alice/one.png": "far", "alice/deep/two.png": "two"}, "alice": {"one.png": "near"}}
    for where, told in lines.items():
        text = "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in told.items())
        (tmp_path / where / "metadata.jsonl").write_text(text)
    told = [("alice/deep/two.png", "two"), ("alice/one.png", "near"), ("b.png", "b"), ("bob/three.png", "three")]
    assert captions_of(f"{tmp_path}/") == told


def test_photos_that_would_be_enlarged_are_left_out(folder: Path, face_models: Path) -> None:
    def first(size_px: int, least_px: int = 0) -> Any:  # of astronaut-bright.png, 512 px wide
        return PictureFolder(
            folder=str(folder), face_models=str(face_models), size_px=size_px, crop_px=16, least_px=least_px
        )[0]

    left = first(1026)
    assert isinstance(left, LeftOut) and left.name == "astronaut-bright.png"
    assert left.reason == "astronaut-bright.png: the shorter side is 512 px, expected at least 513 px."
    assert isinstance(first(128, 513), LeftOut) and not isinstance(first(1026, 512), LeftOut)
    assert not isinstance(first(1024), LeftOut)  # half of it is enough by default


def test_only_faceless_pictures_are_refused(
    face_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "walls").mkdir()
    Image.fromarray(np.full((300, 400, 3), 180, np.uint8)).save(tmp_path / "walls" / "wall.png")
    (tmp_path / "walls" / "wall.txt").write_text("a wall")
    status = prepare(["pictures", "--folder", str(tmp_path / "walls"), "--face-models", str(face_models),
                      "--size-px", "128", "--out", str(tmp_path / "store")])  # fmt: skip
    assert status == 2 and "none of 1 examples can be used. wall.png: wall.png: no face" in capsys.readouterr().err
    assert not (tmp_path / "store").exists() and not (tmp_path / ".store.making").exists()


@pytest.fixture(scope="module")
def company(photos: Photos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photo of two people, one of both too far apart for any square, and one of one person."""
    out = tmp_path_factory.mktemp("company")
    astronaut, hopper = (Image.open(path).convert("RGB") for path in (photos.astronaut, photos.hopper))
    face = astronaut.crop((100, 0, 356, 256)).resize((420, 420)), hopper.crop((20, 0, 500, 480)).resize((420, 420))
    for name, gap in (("together", 0), ("apart", 700)):
        both = Image.new("RGB", (840 + gap, 840), (90, 110, 130))
        both.paste(face[0], (0, 200))
        both.paste(face[1], (420 + gap, 200))
        both.save(out / f"{name}.png")
    hopper.save(out / "alone.png")
    for name in ("together", "apart", "alone"):
        (out / f"{name}.txt").write_text(name)
    return out


def test_pictures_of_several_people_are_learned_together(company: Path, face_models: Path, tmp_path: Path) -> None:
    """Both faces of a photo are found, each in its place with its own crop; and the branches train on them."""

    def prepared(persons: int) -> Store:
        out = tmp_path / str(persons)
        assert prepare(["pictures", "--folder", str(company), "--face-models", str(face_models), "--size-px", "128",
                        "--crop-px", "64", "--persons", str(persons), "--out", str(out)]) == 0  # fmt: skip
        return Store(out)

    found, single = prepared(3), prepared(1)
    assert found.captions == ["alone", "together"] and found["num_persons"].tolist() == [1, 2]
    assert found.left_out == {"apart.png": "apart.png: no square of the photo holds all of its 2 faces."}
    assert single.captions == ["alone"] and sorted(single.left_out) == ["apart.png", "together.png"]
    boxes, crops = found["boxes"], found["crops"]
    assert boxes.shape == (2, 3, 4) and not boxes[0, 1:].any() and not boxes[1, 2].any()
    for name in ("boxes", "landmarks", "crops"):  # a single person is found as before
        assert np.array_equal(found[name][0, 0], single[name][0, 0]), name
    left, right = boxes[1, :2]
    assert left[2] < 64 < right[0] and min(left[2] - left[0], right[2] - right[0]) > 15
    assert all(crops[1, person].max() > 60 for person in (0, 1)) and not np.array_equal(crops[1, 0], crops[1, 1])
    start = make_checkpoint(
        tmp_path / "start", preset="world", prediction="epsilon", force_zeros_for_empty_prompt=False
    )
    status = train(["branches", "--checkpoint", str(start), "--data", str(found.path), "--out", str(tmp_path / "run"),
                    "--new", "--cpu", "--steps", "2", "--batch-size", "2", "--threads", "1"])  # fmt: skip
    assert status == 0 and len(read_log(tmp_path / "run" / "log.jsonl")) == 2


@pytest.mark.parametrize(
    "square, left", [((100, 20, 140, 60), 50), ((2, 20, 42, 60), 0), ((150, 20, 190, 60), 96), ((0, 0, 100, 100), 0)]
)
def test_a_photo_is_cut_about_its_middle_as_far_as_the_face_allows(square: tuple[int, ...], left: int) -> None:
    """A photo of 200 × 100 px: its square is 100 px wide."""
    rgb = np.zeros((100, 200, 3), np.uint8)
    rgb[:, :, 0] = np.arange(200)
    cut, boxes = framed(rgb, np.array([square], float), 100)
    assert cut[0, 0, 0] == left and boxes.tolist() == [[square[0] - left, square[1], square[2] - left, square[3]]]


def test_a_photo_is_cut_so_that_all_faces_are_in_it() -> None:
    rgb = np.zeros((100, 200, 3), np.uint8)
    rgb[:, :, 0] = np.arange(200)
    cut, boxes = framed(rgb, np.array([(60, 20, 80, 40), (125, 20, 145, 40)], float), 100)
    assert cut[0, 0, 0] == 50 and boxes[:, 0].tolist() == [10, 75]
    cut, boxes = framed(rgb, np.array([(90, 20, 110, 40), (150, 20, 170, 40)], float), 100)
    assert cut[0, 0, 0] == 73 and boxes[:, 0].tolist() == [17, 77]


def test_nothing_in_the_folder_is_lost(photos: Photos, face_models: Path, tmp_path: Path, capsys: Any) -> None:
    """Every format that the runtime reads, and captions as Notepad writes them, are used. Other files are named."""
    folder, image = tmp_path / "photos", Image.open(photos.hopper).convert("RGB")
    folder.mkdir()
    kinds = {"a.JPG": "JPEG", "b.tif": "TIFF", "c.bmp": "BMP", "d.gif": "GIF", "e.jp2": "JPEG2000", "f.jfif": "JPEG",
             "g.avif": "AVIF", "h.jpeg": "JPEG", "i.webp": "WEBP"}  # fmt: skip
    Image.init()
    kinds = {name: kind for name, kind in kinds.items() if kind in Image.SAVE}
    assert len(kinds) >= 7
    for name, kind in kinds.items():
        image.save(folder / name, kind)
        (folder / name).with_suffix(".txt").write_text("a man in uniform\n", encoding="utf-8-sig")
    (folder / "x.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(100))
    (folder / "x.txt").write_text("a man", encoding="utf-8")
    for name in ("notes.md", "clip.mov", "Thumbs.db"):
        (folder / name).write_bytes(b"?")
    assert prepare(["pictures", "--folder", str(folder), "--face-models", str(face_models), "--size-px", "128",
                    "--crop-px", "64", "--out", str(tmp_path / "store"), "--json"]) == 0  # fmt: skip
    printed = capsys.readouterr()
    store, result = Store(tmp_path / "store"), json.loads(printed.out.splitlines()[-1])
    assert len(store) == len(kinds) and set(store.captions) == {"a man in uniform"}
    assert list(result["left_out"]) == ["x.heic"]
    assert result["not_looked_at"] == ["Thumbs.db", "clip.mov", "notes.md"]
    assert f"{len(kinds)} examples, 1 left out, 3 files not looked at" in printed.err
