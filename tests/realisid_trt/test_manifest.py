"""The engine directory: whole, unaltered, and of this format, or refused with the sentence that says so."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import realisid_trt.engine
import realisid_trt.files
from realisid_trt import Engine
from realisid_trt.errors import BackendError, EngineDamaged, EngineMismatch, EngineMissing, RequestError, ShapeError
from realisid_trt.files import VerifiedFiles, file_sha256
from realisid_trt.manifest import CONSTANTS, FORMAT, MANIFEST, Axis, Manifest, Port, seal
from tests.conftest import ROOT

KEPT = sorted((ROOT / "tests" / "data").glob("format_*.json"))  # manifests of earlier formats


def edit(folder: Path, change: Any, reseal: bool = False) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    if reseal:
        values["seal"] = seal(values)
    (folder / MANIFEST).write_text(json.dumps(values))


def listed_files(folder: Path) -> list[str]:
    return list(json.loads((folder / MANIFEST).read_text())["files"])


def test_every_file_of_the_engine_is_listed(engine_dir: Path) -> None:
    there = {p.relative_to(engine_dir).as_posix() for p in engine_dir.rglob("*") if p.is_file()}
    compiled = {name for name in there if name.startswith("plans/") and name.endswith(".cache")}  # by who ran it
    assert there - compiled - set(listed_files(engine_dir)) == {MANIFEST, "build.json"}


def test_a_changed_byte_anywhere_is_refused(engine_copy: Path) -> None:
    """The first, a middle and the last byte of every listed file, with any modification time."""
    Manifest.read(engine_copy).check_files()
    for name in listed_files(engine_copy):
        file = engine_copy / name
        content, stat = file.read_bytes(), file.stat()
        for position in (0, len(content) // 2, len(content) - 1):
            altered = bytearray(content)
            altered[position] ^= 1
            file.write_bytes(altered)
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a person who hides the change would do
            with pytest.raises(
                EngineDamaged, match=rf"{file.name} was altered after the build: its sha256 is .* Build it"
            ):
                Manifest.read(engine_copy).check_files()
        file.write_bytes(content)
    Manifest.read(engine_copy).check_files()


def test_a_missing_and_a_truncated_file(engine_copy: Path) -> None:
    file = engine_copy / listed_files(engine_copy)[0]
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(
        EngineDamaged, match=rf"{file.name} is {len(content) - 1} bytes; the build wrote {len(content)}"
    ):
        Engine.load(engine_copy)
    file.unlink()
    with pytest.raises(EngineDamaged, match=rf"{file.name} is missing .* python -m export.build"):
        Engine.load(engine_copy)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m["realisid_config"].update(overlap="average"), "realisid_config.overlap"),
        (lambda m: m["model"].update(vae_scale_factor=8), "model.vae_scale_factor"),
        (lambda m: m["networks"]["unet_decoder"].update(flops_per_row=1), "networks.unet_decoder"),
        (lambda m: m["files"].pop("constants.safetensors"), "files.constants.safetensors"),
        (lambda m: m["files"].update({"extra.onnx": {"bytes": 1, "sha256": ""}}), "files.extra.onnx"),
        (lambda m: m["builds"].update(tensorrt={}), "builds.tensorrt"),
        (lambda m: m.update(name="another"), "name"),
        (lambda m: m.pop("scheduler"), "scheduler.timestep_spacing"),
        (lambda m: m.pop("seal"), "format, name"),
        (lambda m: m.update(seal=None), "format, name"),
        (lambda m: m.update(seal=[1]), "format, name"),
    ],
)  # fmt: skip
def test_an_edited_manifest_is_named(engine_copy: Path, change: Any, named: str) -> None:
    edit(engine_copy, change)
    with pytest.raises(EngineDamaged, match=rf"was edited after the build: .*{named}.* no longer match its seal"):
        Engine.load(engine_copy)


def test_another_format_is_a_mismatch(engine_copy: Path) -> None:
    edit(engine_copy, lambda m: m.update(format=99), reseal=True)
    with pytest.raises(EngineMismatch, match="has engine format 99; this realisid_trt reads format 6. Build it again"):
        Engine.load(engine_copy)


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.stem)
def test_manifests_of_earlier_formats_get_their_sentence(kept: Path, tmp_path: Path) -> None:
    """They were written by the versions of then."""
    number = int(kept.stem.removeprefix("format_"))
    (tmp_path / MANIFEST).write_bytes(kept.read_bytes())
    sentence = f"{tmp_path} has engine format {number}; this realisid_trt reads format {FORMAT}. Build it again: python"
    with pytest.raises(EngineMismatch) as caught:
        Engine.load(tmp_path)
    assert str(caught.value).startswith(sentence)


def test_a_manifest_is_kept_of_the_format_before_this() -> None:
    assert f"format_{FORMAT - 1}" in [path.stem for path in KEPT]


def test_a_manifest_that_is_no_json(engine_copy: Path) -> None:
    (engine_copy / MANIFEST).write_text("{")
    with pytest.raises(EngineDamaged, match="cannot be read as JSON"):
        Engine.load(engine_copy)


def test_no_engine_there(tmp_path: Path) -> None:
    with pytest.raises(EngineMissing, match="no such engine directory. Build one: python -m export.build"):
        Engine.load(tmp_path / "nowhere")
    with pytest.raises(EngineMissing, match="holds no manifest.json"):
        Engine.load(tmp_path)


def test_a_build_killed_between_its_renames_is_recovered(engine_copy: Path) -> None:
    os.rename(engine_copy, engine_copy.with_name("engine.old"))
    assert Manifest.read(engine_copy).path == engine_copy.with_name("engine.old")


def test_backends_that_are_not_there(engine_copy: Path) -> None:
    known = "auto, tensorrt, tensorrt-rtx, onnxruntime"
    with pytest.raises(BackendError, match=f"backend 'cuda-fast' is unknown. Known: {known}"):
        Engine.load(engine_copy, backend="cuda-fast")
    with pytest.raises(
        RequestError,
        match="device 'gpu' is unknown to backend onnxruntime. Use cpu, cpu:N for N threads, cuda or cuda:N.",
    ):
        Engine.load(engine_copy, device="gpu")

    def rename(values: Any, name: str) -> None:
        for build in values["builds"].values():
            build["backend"] = name

    edit(engine_copy, lambda values: rename(values, "tensorrt"), reseal=True)
    advice = r"none of them can run here. pip install 'realisid_trt\[tensorrt\]'."
    with pytest.raises(BackendError, match=f"was built for tensorrt; {advice}"):
        Engine.load(engine_copy)
    with pytest.raises(
        EngineMissing, match="was built for tensorrt, not for onnxruntime. Build it again: .* --backend onnxruntime"
    ):
        Engine.load(engine_copy, backend="onnxruntime")
    edit(engine_copy, lambda values: rename(values, "directml"), reseal=True)
    with pytest.raises(BackendError, match="was built for directml; none of them can run here. This version knows"):
        Engine.load(engine_copy)


def test_plans_without_a_gpu(engine_dir: Path) -> None:
    """Without a GPU, an engine runs on the CPU; if its plans are asked for, the error says what is missing."""
    assert Engine.load(engine_dir, networks=()).backend.name == "onnxruntime"
    with pytest.raises(BackendError, match="there is no NVIDIA driver here .* On the CPU: device='cpu'"):
        Engine.load(engine_dir, backend="tensorrt-rtx")
    with pytest.raises(RequestError, match="device 'cpu' is unknown to backend tensorrt-rtx. Use cuda, or cuda:N"):
        Engine.load(engine_dir, backend="tensorrt-rtx", device="cpu")


def test_what_was_verified_is_what_runs(engine_copy: Path) -> None:
    """Networks are opened at once, so later changes of the folder do not reach a loaded engine."""
    loaded = Engine.load(engine_copy)
    expected = loaded.generate("a beach", seed=1, num_inference_steps=1).images[0].tobytes()
    shutil.rmtree(engine_copy)
    assert loaded.generate("a beach", seed=1, num_inference_steps=1).images[0].tobytes() == expected


def test_what_was_unloaded_is_not_taken_from_another_build(engine_copy: Path) -> None:
    """Otherwise the loop's networks would be of one model and the VAE of another."""
    loaded = Engine.load(engine_copy)
    loaded.unload()
    for file in engine_copy.glob("onnx/*/vae_decoder.onnx"):  # of every precision
        file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(EngineMismatch, match="no longer the engine that was loaded.* Load the engine again"):
        loaded.generate("a beach", num_inference_steps=1)


def test_what_is_built_anew_while_it_is_loaded_is_refused(engine_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = realisid_trt.engine.open_backend

    def while_another_builds(*arguments: Any, **options: Any) -> Any:
        edit(engine_copy, lambda values: values["model"].update(id_encoder_key="another"), reseal=True)
        return opened(*arguments, **options)

    monkeypatch.setattr(realisid_trt.engine, "open_backend", while_another_builds)
    with pytest.raises(EngineMismatch, match="was rebuilt while it was being loaded. Load it again"):
        Engine.load(engine_copy)


def test_a_face_model_that_no_build_put_there_is_not_used(engine_copy: Path) -> None:
    (engine_copy / "faces" / "face_parsing.onnx").write_bytes(b"not even a model")
    (engine_copy / "faces" / "landmarks_v2.onnx").write_bytes(b"nor this")
    Engine.load(engine_copy).generate("a beach", num_inference_steps=1)


def test_only_the_networks_that_are_needed(engine_dir: Path, photos: Any) -> None:
    engine = Engine.load(engine_dir, networks=("id_encoder",))
    assert engine.embed(photos.hopper).id_tokens.shape == (65, 64)
    with pytest.raises(BackendError, match="text_encoder was not opened"):
        engine.generate("a beach")


def test_relative_and_odd_paths(engine_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(engine_copy)
    assert Manifest.read(".").path == engine_copy and Manifest.read(f"{engine_copy}/").path == engine_copy
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for path in (".", ""):
        with pytest.raises(EngineMissing, match="holds no manifest.json"):
            Engine.load(path)


def test_hashes_are_remembered_and_forgotten_when_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "file"
    file.write_bytes(b"one")
    with VerifiedFiles() as verified:
        first = verified.sha256(file)
    read: list[Path] = []
    monkeypatch.setattr("realisid_trt.files.file_sha256", lambda path: read.append(path) or "new")
    with VerifiedFiles() as verified:
        assert verified.sha256(file) == first and not read
    file.write_bytes(b"two")
    with VerifiedFiles() as verified:
        assert verified.sha256(file) == "new" and read == [file]


def test_a_cache_that_cannot_be_used_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "file"
    file.write_bytes(b"one")
    with VerifiedFiles() as verified:
        assert len(verified.sha256(file)) == 64
    (tmp_path / "cache").unlink()
    (tmp_path / "cache" / "realisid_trt").mkdir(parents=True)
    (tmp_path / "cache" / "realisid_trt" / "verified.json").write_text("[]")
    with VerifiedFiles() as verified:
        assert len(verified.sha256(file)) == 64
    assert [path.name for path in (tmp_path / "cache" / "realisid_trt").iterdir()] == ["verified.json"]


def test_ports_explain_what_they_expect() -> None:
    port = Port("prompt_embeds", "float32", (Axis("rows", 1, 12), 77, Axis("width", 8, 64, 4)))
    port.check((12, 77, 64), "unet_decoder")
    expected = r"input prompt_embeds is .*expected \(rows, 77, width\) with rows in 1..12, width in 8..64 in steps of 4"
    for shape in ((13, 77, 64), (1, 76, 64), (1, 77, 10), (1, 77), (0, 77, 64)):
        with pytest.raises(ShapeError, match=expected):
            port.check(shape, "unet_decoder")


def outside(values: dict[str, Any], name: str, listed: bool) -> None:
    """A network's file that lies elsewhere."""
    [build, *_] = values["networks"]["unet_time"]["builds"].values()
    entry = values["files"].pop(build["file"])
    build["file"] = name
    if listed:
        values["files"][name] = entry


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", ["../outside.onnx", "/outside.onnx", "onnx/../../outside.onnx", "a\\..\\b.onnx"])
def test_a_network_that_lies_outside_is_refused(engine_copy: Path, name: str, listed: bool) -> None:
    """It is refused even with the right hash: all files of an engine lie in its folder."""
    edit(engine_copy, lambda values: outside(values, name, listed), reseal=True)
    said = "does not lie in the folder" if listed else "is used and not listed among the files"
    with pytest.raises(EngineDamaged, match=said):
        Engine.load(engine_copy)


@pytest.mark.parametrize("what", ["tokenizer", "constants", "network"])
def test_what_is_not_listed_is_not_opened(engine_copy: Path, what: str) -> None:
    def change(values: dict[str, Any]) -> None:
        if what == "network":
            outside(values, "onnx/unlisted.onnx", False)
        else:
            tokenizer = next(iter(values["model"]["tokenizers"].values()))["file"]
            del values["files"][{"tokenizer": tokenizer, "constants": CONSTANTS}[what]]

    edit(engine_copy, change, reseal=True)
    with pytest.raises(EngineDamaged, match="is used and not listed among the files"):
        Engine.load(engine_copy)


@pytest.mark.parametrize("section", ["files", "model", "networks"])
@pytest.mark.parametrize("content", [None, 7, [], {"x": 1}])
def test_a_manifest_of_other_contents_is_damaged(engine_copy: Path, section: str, content: Any) -> None:
    edit(engine_copy, lambda values: values.update({section: content}), reseal=True)
    with pytest.raises(EngineDamaged):
        Manifest.read(engine_copy)


def test_only_what_is_opened_is_read(engine_copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The engine holds several builds, and the container remembers no hash."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read: list[str] = []
    monkeypatch.setattr(realisid_trt.files, "file_sha256", lambda path: (read.append(path.name), file_sha256(path))[1])
    manifest = Manifest.read(engine_copy)
    everything = set(listed_files(engine_copy))
    others = {name for name in everything if name.startswith("plans/") or "fp16" in name}
    assert others
    Engine.load(engine_copy, "onnxruntime", "cpu:1", networks=("id_encoder",)).close()
    names = manifest.files_of(manifest.build_for("onnxruntime"), ("id_encoder",))
    assert sorted(read) == sorted(Path(name).name for name in names)
    assert sum(name.endswith(".onnx") and not name.startswith("faces/") for name in names) == 1
    (engine_copy / next(iter(others))).write_bytes(b"damaged")  # which is not an error until it is opened
    Engine.load(engine_copy, "onnxruntime", "cpu:1").close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": None}, "path is None, expected the path of an engine directory"),
        ({"path": b"engine"}, "path is b'engine', expected"),
        ({"backend": None}, "backend is None, expected a name"),
        ({"device": 0}, "device is 0, expected cpu, cpu:N, cuda, cuda:N or None"),
        ({"networks": "id_encoder"}, "networks is 'id_encoder', expected names"),
        ({"networks": ("id_encodr",)}, "Known: .*id_encoder"),
        ({"networks": [None]}, "Known: .*id_encoder"),
        ({"networks": [["id_encoder"]]}, "Known: .*id_encoder"),
        ({"face_landmarker": 5}, "face_landmarker is 5, expected the path"),
        ({"device": "cpu:²"}, "device 'cpu:²' is unknown"),
        ({"device": "cpu:99999"}, "device 'cpu:99999' is unknown"),
        ({"device": "cuda:²"}, "device 'cuda:²' is unknown"),
        ({"networks": 3}, "networks is 3, expected names"),
    ],
)
def test_arguments_of_load(engine_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Engine.load(**{"path": engine_dir, **options})


def test_a_torch_device_is_a_device(engine_dir: Path) -> None:
    with Engine.load(engine_dir, device=torch.device("cpu"), networks={"id_encoder"}) as engine:  # type: ignore[arg-type]
        assert engine.backend.device == "cpu"
