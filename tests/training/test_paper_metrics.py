"""The paper's metrics through tiny random networks of the real classes: each compares the right things."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from export.miniature.tokenizer import write_tokenizer
from realisid_trt.persons.photo import LoadedPhoto, load_photo
from tests.conftest import Photos
from training import paper_metrics
from training.paper_metrics import Aesthetic, Clip, Faces, main, measure
from training.statistics import Sample, estimate


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip") / "clip"
    write_tokenizer(folder, "!")
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": 1014, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(crop_size=size, size={"shortest_edge": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An aesthetic head whose mark is 5 plus a thousandth of the first layer's first unit: the test can compute it."""
    sizes = [(0, 24, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)]
    weights = {}
    for number, a, b in sizes:
        weights[f"layers.{number}.weight"] = torch.zeros(b, a)
        weights[f"layers.{number}.weight"][0, 0] = 2.0
        weights[f"layers.{number}.bias"] = torch.zeros(b)
    weights["layers.7.bias"] += 5
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 100, 16))

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            embedded: torch.Tensor = self.layers(pixels)
            return embedded

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("recogniser") / "face.onnx"
    torch.onnx.export(Tiny().eval(), (torch.zeros(1, 3, 80, 80),), path, dynamo=True, verbose=False)
    return path


@pytest.fixture(scope="module")
def folders(photos: Photos, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A picture that is its ID photo, one of another person, and one without a person."""
    made, references = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("references")
    for name, picture, reference in (
        ("same", photos.astronaut, photos.astronaut),
        ("other", photos.hopper, photos.astronaut),
    ):
        Image.open(picture).convert("RGB").save(made / f"{name}.png")
        Image.open(reference).convert("RGB").save(references / f"{name}.png")
    Image.fromarray(np.full((200, 200, 3), 99, np.uint8)).save(made / "wall.png")
    Image.open(photos.hopper).convert("RGB").save(references / "wall.png")
    for name in ("same", "other", "wall"):
        (made / f"{name}.txt").write_text(f"a photo called {name}")
    return made, references


def test_every_metric_compares_what_it_says(
    folders: tuple[Path, Path], clip: Path, head: Path, recogniser: Path, face_models: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    made, references = folders
    arguments = ["--pictures", str(made), "--references", str(references), "--clip", str(clip), "--aesthetic",
                 str(head), "--facenet", str(recogniser), "--face-models", str(face_models), "--json"]  # fmt: skip
    assert main(arguments) == 0
    told = capsys.readouterr()
    found = {name: one["values"] for name, one in json.loads(told.out.splitlines()[-1]).items()}
    names = ["other", "same", "wall"]  # the order of names
    clip_i = dict(zip(names, found["clip_i"], strict=True))
    assert clip_i["same"] == pytest.approx(1, abs=1e-6) and max(clip_i["other"], clip_i["wall"]) < 1 - 1e-4
    facenet = dict(zip(names, found["facenet"], strict=True))
    assert facenet["same"] == pytest.approx(1, abs=1e-6) and facenet["other"] < 0.999 and facenet["wall"] is None
    assert "1 of 3 without a face" in told.err
    # CLIP-T against the library's own scores
    model = Clip(clip)
    texts = [f"a photo called {name}" for name in names]
    pictures = [Image.open(made / f"{name}.png") for name in names]
    inputs = {**model.tokenizer(texts, padding=True, return_tensors="pt"),
              **model.processor(pictures, return_tensors="pt")}  # fmt: skip
    with torch.no_grad():
        logits = model.model(**inputs).logits_per_image / model.model.logit_scale.exp()
    assert found["clip_t"] == pytest.approx(logits.diag().tolist(), abs=1e-5)
    embedded = model.images([made / f"{name}.png" for name in names])
    assert found["aesthetic"] == pytest.approx((5 + 32 * embedded[:, 0]).tolist(), abs=1e-4)


def test_pictures_of_one_person_are_not_so_many_persons(
    folders: tuple[Path, Path], clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three pictures each of two ID photos, in sub-folders: the interval is over two persons."""
    made, references = tmp_path / "made", tmp_path / "references"
    for number, name in enumerate(("same", "wall") * 3):
        for folder, source in ((made, folders[0]), (references, folders[1])):
            (folder / f"{number % 2}").mkdir(parents=True, exist_ok=True)
            shutil.copy(source / f"{name}.png", folder / f"{number % 2}" / f"{number}.png")
        (made / f"{number % 2}" / f"{number}.txt").write_text(f"a photo called {name}")
    arguments = ["--pictures", str(made), "--references", str(references), "--clip", str(clip), "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["clip_i"]
    _, who = measure(made, references, Clip(clip), None, None)
    assert len(set(who)) == 2 and len(set(who[:3])) == len(set(who[3:])) == 1
    by_person, by_picture = (estimate(Sample(found["values"], whose, range(6))) for whose in (who, range(6)))
    assert found["interval95"] == [by_person.low, by_person.high]
    assert by_person.high - by_person.low > by_picture.high - by_picture.low


def test_an_id_photo_is_looked_at_once_and_pictures_come_a_few_at_a_time(
    folders: tuple[Path, Path], clip: Path, recogniser: Path, face_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def load(path: Path) -> LoadedPhoto:
        read.append("photo" if path.parent == folders[1] else "picture")
        return load_photo(path)

    monkeypatch.setattr(paper_metrics, "load_photo", load)
    monkeypatch.setattr(paper_metrics, "BATCH", 2)
    model = Clip(clip)
    processor = model.processor
    monkeypatch.setattr(model, "processor", lambda *given, **more: read.append("batch") or processor(*given, **more))
    measure(*folders, model, None, None)
    assert read == ["picture", "picture", "batch", "picture", "batch", "photo", "photo", "batch"]
    read.clear()
    measure(*folders, None, None, Faces(recogniser, face_models))
    assert read == ["picture"] * 3 + ["photo"] * 2


def test_where_clip_computes(folders: tuple[Path, Path], clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--pictures", str(folders[0]), "--references", str(folders[1]), "--clip", str(clip), "--json"]
    found = []
    for device in ["cpu", *(["cuda:0"] if torch.cuda.is_available() else [])]:
        assert main([*base, "--device", device]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["clip_i"]["values"])
    assert found[-1] == pytest.approx(found[0], abs=1e-3)
    assert main([*base, "--device", "abacus"]) == 2
    assert "device 'abacus' is unknown, expected cpu, cuda or cuda:N" in capsys.readouterr().err
    assert main([*base, "--device", "cuda:99"]) == 2
    assert "and --device is cuda:99. Install a CUDA build of torch, or" in capsys.readouterr().err
    assert Clip(clip, torch.device("meta")).model.device.type == "meta"  # the model is on the requested device


def test_weights_that_are_something_else_are_refused(
    folders: tuple[Path, Path], head: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, references = folders
    base = ["--pictures", str(made), "--references", str(references)]
    assert main(base) == 2 and "Give --clip, --facenet" in capsys.readouterr().err
    assert main([*base, "--clip", str(tmp_path)]) == 1 and "is not a CLIP model" in capsys.readouterr().err
    assert main([*base, "--aesthetic", str(head)]) == 2 and "Give --clip" in capsys.readouterr().err
    assert main([*base, "--facenet", str(head)]) == 2 and "--face-models" in capsys.readouterr().err
    save_file({"weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert main([*base, "--clip", str(clip), "--aesthetic", str(tmp_path / "x.safetensors")]) == 1
    assert "is not the aesthetic head" in capsys.readouterr().err
    (tmp_path / "few").mkdir()
    assert main(["--pictures", str(made), "--references", str(tmp_path / "few"), "--clip", str(clip)]) == 2
    assert "holds no ID photo other" in capsys.readouterr().err
    assert Aesthetic(head).marks(np.zeros((2, 24))).tolist() == [5, 5]
