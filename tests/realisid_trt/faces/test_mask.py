"""The crop: the face at its place in the photo, and the mask that removed the background."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.face_models import fetch_face_models
from realisid_trt.errors import EngineDamaged, RequestError
from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.faces.mask import CLASSES, KEPT_CLASSES, PARSING_CONTEXT, FaceParser, hull_mask
from realisid_trt.persons.faces.squares import apply, crop_square, grown
from realisid_trt.persons.photo import LoadedPhoto, load_photo
from tests.realisid_trt.faces.photographs import NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "margin"), [(224, 1.0), (112, 1.5), (336, 0.8)])
def test_crop_is_the_face_on_black(
    name: str, size: int, margin: float, pictures: dict[str, LoadedPhoto], finder: FaceFinder
) -> None:
    face = finder.find(pictures[name])
    crop, source = finder.crop(pictures[name], face, size, margin)
    assert crop.shape == (size, size, 3) and crop.dtype == np.uint8 and source == "hull+person"
    plain, to_crop = crop_square(pictures[name].rgb, grown(face.square, margin), size)
    landmarks = apply(to_crop, face.points_px)
    x, y = np.round(landmarks[4]).astype(int)  # the tip of the nose is kept as it is
    np.testing.assert_array_equal(crop[y, x], plain[y, x])
    hull = hull_mask(landmarks, size)
    assert not crop[hull == 0].any()
    if margin > 1:
        assert not crop[0].any() and not crop[-1].any() and not crop[:, 0].any() and not crop[:, -1].any()


def test_tight_crop_leaves_the_photo(finder: FaceFinder, hopper: LoadedPhoto) -> None:
    tight = load_photo(hopper.rgb[115:340, 170:350])
    face = finder.find(tight)
    assert face.box[0] < 0 and face.box[1] < 0 and face.box[2] > 180
    crop, _ = finder.crop(tight, face, 256)
    scale = 256 / (face.square[2] - face.square[0])
    outside = int(-face.square[0] * scale) - 2
    assert outside > 5 and not crop[:, :outside].any()  # zero where there is no photo


def test_crop_is_where_the_photo_says() -> None:
    """A square of whole pixels, cropped at its own size, is the photo itself; outside the photo it is zero."""
    rgb = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    crop, to_crop = crop_square(rgb, (20, 10, 84, 74), 64)
    np.testing.assert_array_equal(crop, rgb[10:74, 20:84])
    np.testing.assert_array_equal(to_crop, [[1, 0, -20], [0, 1, -10]])
    crop, _ = crop_square(rgb, (100, 50, 164, 114), 64)
    np.testing.assert_array_equal(crop[:40, :20], rgb[50:, 100:])
    assert not crop[40:].any() and not crop[:, 20:].any()
    edge, _ = crop_square(rgb, (100, 50, 164, 114), 64, repeat_edge=True)
    np.testing.assert_array_equal(edge[:40, 30], rgb[50:, -1])


def test_small_crop_of_a_large_photo_is_averaged_and_in_place() -> None:
    """A ramp stays the same ramp when it is reduced eight-fold, also at odd sizes; fine stripes turn grey."""
    ramp = np.repeat(np.repeat(np.linspace(0, 255, 1023)[None, :, None], 1023, 0), 3, 2).round().astype(np.uint8)
    crop, to_crop = crop_square(ramp, (100, 100, 900, 900), 100)
    expected = (np.arange(100) / to_crop[0, 0] + 100) * 255 / 1022
    np.testing.assert_allclose(crop[50, 2:-2, 0], expected[2:-2], atol=1)
    stripes = np.zeros((1024, 1024, 3), np.uint8)
    stripes[:, ::2] = 255
    crop, _ = crop_square(stripes, (0, 0, 1024, 1024), 64)
    assert np.abs(crop[8:-8, 8:-8].astype(int) - 127).max() <= 2


@pytest.mark.parametrize(("size", "margin"), [(0, 1.0), (64, 0.0), (64, float("nan"))])
def test_crop_refuses_impossible_sizes(finder: FaceFinder, hopper: LoadedPhoto, size: int, margin: float) -> None:
    with pytest.raises(RequestError, match="margin"):
        finder.crop(hopper, finder.find(hopper), size, margin)


# -- BiSeNet -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def parsing(hopper: LoadedPhoto, finder: FaceFinder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a BiSeNet of random weights, and which classes torch sees around hopper's face."""
    torch = pytest.importorskip("torch")
    from tests.export.faces.bisenet import export_bisenet, random_bisenet

    wide, _ = crop_square(hopper.rgb, grown(finder.find(hopper).square, PARSING_CONTEXT), 512, repeat_edge=True)
    pixels = (wide.astype(np.float32) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    example = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
    net = random_bisenet(example)
    folder = tmp_path_factory.mktemp("with_parser")
    export_bisenet(net, folder / "user.onnx")
    description = fetch_face_models(folder, face_parser=folder / "user.onnx")
    assert description["files"]["face_parsing.onnx"]["bytes"] > 50e6
    with torch.no_grad():
        return folder, net(example)[0][0].argmax(0).numpy()


def test_bisenet_keeps_its_face_classes(parsing: Any, hopper: LoadedPhoto, finder: FaceFinder) -> None:
    folder, classes = parsing
    with_parser = FaceFinder.load(folder)
    assert with_parser.model_id != finder.model_id and with_parser.parser is not None
    face = with_parser.find(hopper)
    _, to_wide = crop_square(hopper.rgb, grown(face.square, PARSING_CONTEXT), 512)  # the frame of `classes`
    mask = with_parser.parser(hopper.rgb, face.square, to_wide, 512)
    expected = np.isin(classes, [CLASSES.index(name) for name in KEPT_CLASSES])
    assert 0.1 < expected.mean() < 0.9
    assert (mask == expected).mean() > 0.999  # another runtime may decide a tie of two logits differently
    crop, source = with_parser.crop(hopper, face, 256)
    inside, _ = crop_square(hopper.rgb, face.square, 256)
    assert source == "bisenet" and with_parser.notes_on(source) == ()
    assert set(np.unique(crop.any(axis=2))) == {False, True} and (crop <= inside).all()


def save_parser(path: Path, everywhere: str | None) -> None:
    """A parser of one convolution that sees one class everywhere; None: with outputs that are not a parser's."""
    onnx = pytest.importorskip("onnx")
    count = 3 if everywhere is None else len(CLASSES)
    bias = np.zeros(count, np.float32)
    if everywhere is not None:
        bias[CLASSES.index(everywhere)] = 1
    constants = [
        onnx.numpy_helper.from_array(np.zeros((count, 3, 1, 1), np.float32), "weight"),
        onnx.numpy_helper.from_array(bias, "bias"),
    ]
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, channels, 512, 512])
        for name, channels in (("image", 3), ("classes", count))
    ]
    node = onnx.helper.make_node("Conv", ["image", "weight", "bias"], ["classes"], kernel_shape=[1, 1])
    graph = onnx.helper.make_graph([node], "parser", values[:1], values[1:], constants)
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), path)


@pytest.mark.parametrize(("everywhere", "source"), [("skin", "bisenet"), ("hat", "hull+person")])
def test_parser_that_sees_no_face_gives_way_and_the_note_says_so(
    everywhere: str, source: str, hopper: LoadedPhoto, face_models: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(face_models, tmp_path / "faces"))
    save_parser(folder / "face_parsing.onnx", everywhere)
    finder = FaceFinder.load(folder)
    assert finder.crop(hopper, finder.find(hopper), 128)[1] == source
    notes = finder.notes_on(source)
    assert (notes == ()) if source == "bisenet" else "BiSeNet finds no face here" in notes[0]


def test_notes_name_what_the_crop_is_made_with(finder: FaceFinder) -> None:
    assert "hull and person mask (no hair, no ears); for BiSeNet's" in finder.notes_on("hull+person")[0]
    assert "hull alone" in finder.notes_on("hull")[0]
    assert finder.notes_on("own") == finder.notes_on("bisenet") == ()


def test_parser_with_other_outputs_is_refused(hopper: LoadedPhoto, finder: FaceFinder, tmp_path: Path) -> None:
    folder = tmp_path / "my engine" / "faces"
    folder.mkdir(parents=True)
    save_parser(folder / "face_parsing.onnx", None)
    parser = FaceParser(folder)
    with pytest.raises(EngineDamaged, match=r"\(1, 3, 512, 512\), expected \(1, 19, 512, 512\)") as caught:
        parser(hopper.rgb, finder.find(hopper).square, np.eye(2, 3), 64)
    assert f"--out {shlex.quote(str(folder.parent))} --face-parser FILE.onnx" in str(caught.value)
