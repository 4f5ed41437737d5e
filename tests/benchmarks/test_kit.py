"""A kit: files that travel without their weights are restored to the byte, from parts that are no larger than asked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import onnx
import pytest
import torch

from benchmarks.kit.index import File, Item, Kit, KitError
from benchmarks.kit.place import place
from benchmarks.kit.plan import ITEMS, Plan
from benchmarks.kit.prepare import prepare
from benchmarks.kit.store import Store
from benchmarks.kit.weightless import Gap, TensorIndex, put_back, source_of, source_of_checkpoint, take_out
from benchmarks.kit.wheels import WHEELS, download, unzip
from export.files import locked
from realisid_trt.errors import BuildError, CheckpointError, RequestError
from realisid_trt.files import file_sha256
from realisid_trt.manifest import MANIFEST, Manifest, seal
from tests.benchmarks.support import for_onnxruntime
from tests.conftest import ROOT

MIB = 2**20


def restored(path: Path, checkpoint: Path, out: Path) -> tuple[int, int]:
    """A file taken apart and put together in `out`. Returns the bytes of its weights, and of the rest."""
    rest, gaps = take_out(path, TensorIndex(checkpoint))
    source = source_of_checkpoint(checkpoint)
    assert source is not None
    description = json.loads(json.dumps(source.description))  # as it travels
    put_back([(out, path.stat().st_size, rest, gaps)], source_of(description))
    assert file_sha256(out) == file_sha256(path)
    return path.stat().st_size - len(rest), len(rest)


@pytest.mark.parametrize("network", ["unet_decoder", "local_branch", "vae_decoder", "text_encoder_2", "id_encoder"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_graphs_without_weights(
    engine_dir: Path, checkpoint_dir: Path, tmp_path: Path, device: str, network: str
) -> None:
    """For the seeded checkpoint, in float32 and float16: less than a tenth of a graph's weights stay in the kit."""
    manifest = Manifest.read(engine_dir)
    path = engine_dir / manifest.networks(manifest.build_for("onnxruntime", device))[network].file
    weights, _ = restored(path, checkpoint_dir, tmp_path / "graph.onnx")
    held = sum(len(tensor.raw_data) for tensor in onnx.load(path).graph.initializer)
    assert weights > 0.9 * held


def test_weights_beside_a_graph(engine_dir: Path, checkpoint_dir: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(engine_dir)
    file = manifest.networks(manifest.build_for("onnxruntime", "cuda"))["unet_decoder"].file
    onnx.save(
        onnx.load(engine_dir / file), tmp_path / "x.onnx", save_as_external_data=True, location="x.onnx.data",
        size_threshold=0,
    )  # fmt: skip
    weights, left = restored(tmp_path / "x.onnx.data", checkpoint_dir, tmp_path / "restored")
    assert weights > 9 * left


def test_weights_of_the_source_tree_are_read(tmp_path: Path) -> None:
    checkpoint = ROOT / "checkpoints" / "miniature"
    assert source_of_checkpoint(checkpoint).description == {"in_tree": "checkpoints/miniature"}  # type: ignore[union-attr]
    for file in sorted(checkpoint.glob("*/*.safetensors"))[:3]:
        weights, left = restored(file, checkpoint, tmp_path / "restored")
        assert weights > left


def test_a_checkpoint_of_somebody_stays_whole(checkpoint_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint_dir, tmp_path / "trained")
    index = json.loads((checkpoint_dir / "model_index.json").read_text())
    del index["_made_by"]
    (tmp_path / "trained" / "model_index.json").write_text(json.dumps(index))
    assert source_of_checkpoint(tmp_path / "trained") is None


@pytest.fixture(scope="module")
def engine(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return for_onnxruntime(engine_dir, tmp_path_factory.mktemp("engine") / "miniature")


@pytest.fixture(scope="module")
def kit(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit") / "kit"
    assert prepare(Plan(folder, ("miniature", "cubins"), part_mib=1, engine=engine))["items"] == ["cubins", "miniature"]
    return folder


def test_an_engine_travels_and_comes_together(kit: Path, engine: Path, tmp_path: Path) -> None:
    listed = Manifest.read(engine).values["files"]
    whole = sum(file["bytes"] for file in listed.values())
    parts = sorted(kit.glob("part-*"))
    sizes = [sum(file.stat().st_size for file in part.iterdir()) for part in parts]
    assert len(parts) > 1 and max(sizes) <= MIB and sum(sizes) < whole / 3
    for part in parts:  # what is carried, and nothing of the store
        shutil.copytree(part, tmp_path / "kit" / part.name)
    carried, out = Kit.open(tmp_path / "kit"), tmp_path / "engine"
    assert place(carried, "miniature", out) == sum(file.bytes for file in carried.items["miniature"].files)
    Manifest.read(out).check_files()
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {*listed, MANIFEST}
    assert place(carried, "miniature", out) == 0  # it stands
    (out / "manifest.json").write_text("{}")
    with pytest.raises(RequestError, match="exists and is not the miniature of .* Move it away"):
        place(carried, "miniature", out)


def test_the_same_again_makes_nothing(kit: Path, engine: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_ino) for path in kit.glob("store/*") if path.suffix != ".json"}
    parts = {path: path.read_bytes() for path in kit.glob("part-*/*")}
    again = prepare(Plan(kit, ("cubins", "miniature"), part_mib=1, engine=engine))
    assert again["made"] == []
    assert before == {p: (p.read_bytes(), p.stat().st_ino) for p in kit.glob("store/*") if p.suffix != ".json"}
    assert parts == {path: path.read_bytes() for path in kit.glob("part-*/*")}


def test_what_was_lost_in_the_store_is_made_again(kit: Path, engine: Path, tmp_path: Path) -> None:
    shutil.copytree(kit, tmp_path / "kit")
    item = Kit.open(kit).items["cubins"]
    [lost] = (tmp_path / "kit" / "store").glob(f"{item.blobs[0]}*")
    lost.write_bytes(lost.read_bytes()[:-1] + b"?")
    plan = Plan(tmp_path / "kit", ("cubins", "miniature"), part_mib=1, engine=engine)
    assert prepare(plan)["made"] == ["cubins"]
    assert Kit.open(tmp_path / "kit").content(item.blobs[0]) == Kit.open(kit).content(item.blobs[0])


def test_parts_that_were_not_carried_are_named(kit: Path, tmp_path: Path) -> None:
    shutil.copytree(kit / "part-01", tmp_path / "kit" / "part-01")
    carried = Kit.open(tmp_path / "kit")
    assert carried.missing("cubins") is None
    said = carried.missing("miniature")
    assert said is not None and "part-02 is not here" in said and "part-01" not in said
    with pytest.raises(KitError, match="part-02 is not here"):
        place(carried, "miniature", tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
    assert carried.missing("sdxl") == f"{tmp_path / 'kit'} was prepared without sdxl"
    with pytest.raises(KitError, match="holds no part of a kit"):
        Kit.open(tmp_path)


def test_parts_that_are_damaged_or_of_another_kit(kit: Path, tmp_path: Path) -> None:
    for part in kit.glob("part-*"):
        shutil.copytree(part, tmp_path / "kit" / part.name)
    index = tmp_path / "kit" / "part-02" / "index.json"
    index.write_text(index.read_text() + " ")
    said = Kit.open(tmp_path / "kit").missing("miniature")
    assert said is not None and "part-02 is of another preparation than the first" in said
    index.write_text(index.read_text()[:-1])
    piece = next(path for path in index.parent.iterdir() if path != index)
    piece.write_bytes(piece.read_bytes()[:-1] + b"?")
    with pytest.raises(KitError, match=f"{piece.name} is damaged.* Carry part-02 again"):
        place(Kit.open(tmp_path / "kit"), "miniature", tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
    first = tmp_path / "kit" / "part-01" / "index.json"
    for content in (first.read_bytes()[:100], b"\xff", b"[]", b'{"schema": 1}'):
        first.write_bytes(content)
        with pytest.raises(KitError, match="part-01/index.json cannot be read .* Carry part-01 again"):
            Kit.open(tmp_path / "kit")
    first.write_text('{"schema": 7}')
    with pytest.raises(KitError, match="a kit of schema 7, expected 1"):
        Kit.open(tmp_path / "kit")


def test_what_a_killed_process_left_goes(kit: Path, tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    leftover = tmp_path / f".engine.{process.pid}.part"
    leftover.mkdir()
    place(Kit.open(kit), "miniature", tmp_path / "engine")
    assert not leftover.exists()
    with locked(tmp_path / ".engine.lock", RequestError("")), pytest.raises(RequestError, match="another process is"):
        place(Kit.open(kit), "miniature", tmp_path / "engine")
    with locked(kit / ".lock", RequestError("")), pytest.raises(RequestError, match="another process is preparing"):
        prepare(Plan(kit, ("cubins",), part_mib=1))


def test_an_engine_that_was_placed_is_not_read_again(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place(Kit.open(kit), "miniature", tmp_path / "engine")

    def read(path: Path) -> str:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr("realisid_trt.files.file_sha256", read)
    Manifest.read(tmp_path / "engine").check_files()


def test_a_weight_of_another_shape_is_refused() -> None:
    gap = Gap(0, "unet", "conv_in.weight", (2, 3), "float16", False)
    with pytest.raises(CheckpointError, match=r"unet conv_in.weight is \(3, 2\), expected \(2, 3\)"):
        gap.content(torch.zeros(3, 2))


def test_an_engine_of_other_weights_is_not_carried(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint was drawn again from another seed after the build."""
    other = tmp_path / "other"
    subprocess.run(
        [sys.executable, "-m", "export.miniature", "--seed", "5", "--out", str(other)], cwd=ROOT, check=True,
        capture_output=True,
    )  # fmt: skip
    monkeypatch.setattr("benchmarks.kit.items.recall", lambda manifest: {"path": str(other)})
    with pytest.raises(BuildError, match=f"MB of {engine} are not weights of {other}: it was built from other"):
        prepare(Plan(tmp_path / "kit", ("miniature",), engine=engine))


def test_weights_that_come_out_otherwise_are_refused(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another NumPy could draw other numbers. Then a hash differs, and no engine is left behind."""
    from export.miniature import weights

    monkeypatch.setattr(weights, "CARRY", 1.2)
    with pytest.raises(KitError, match="unet_decoder.* another sha256 than the index states"):
        place(Kit.open(kit), "miniature", tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_pieces_fill_the_parts(tmp_path: Path) -> None:
    """Sizes that are hard to cut: nothing, one byte, more than a part, several parts. Equal pieces are stored once."""
    store = Store(tmp_path / "kit")
    contents = [b"", b"x", bytes(range(256)) * 5000, b"y" * (3 * MIB), b"x"]
    files = []
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.whl"  # which is not compressed
        path.write_bytes(content)
        files.append(store.add_file(path, path.name))
    store.record("odd", Item("key", tuple(files)))
    parts = store.cut(["odd"], MIB)
    assert all(sum(file.stat().st_size for file in part.iterdir()) <= MIB for part in parts) and len(parts) == 5
    kit = Kit.open(tmp_path / "kit")
    assert [kit.content(file.blob) for file in kit.items["odd"].files] == contents
    assert len(kit.blobs) == 4
    store.record("odd", Item("other", (File("0", 0, files[0].sha256, files[0].blob),)))
    assert len(store.cut(["odd"], MIB)) == 1 and len(list((tmp_path / "kit").glob("part-*"))) == 1
    assert len(list((tmp_path / "kit" / "store").iterdir())) == 2  # one blob, and the records


def test_what_cannot_be_asked_for(tmp_path: Path, engine_dir: Path, engine: Path) -> None:
    single = tmp_path / "single"
    shutil.copytree(engine, single, ignore=shutil.ignore_patterns(".*"))
    values = json.loads((single / MANIFEST).read_text())
    for build in [name for name, build in values["builds"].items() if build["device"] == "cuda"]:
        del values["builds"][build]
        for network in values["networks"].values():
            del values["files"][network["builds"].pop(build)["file"]]
    (single / MANIFEST).write_text(json.dumps(values | {"seal": seal(values)}))
    for plan, said in (
        (Plan(tmp_path, part_mib=61), "--part-mib is 61, expected 1 to 60"),
        (Plan(tmp_path, ("tensorrt",)), "--items tensorrt: unknown. Known: cubins"),
        (Plan(tmp_path, ("miniature",), engine=engine_dir), "plans are too large to copy. Name another --engine"),
        (Plan(tmp_path, ("miniature",), engine=single), "has float32 networks for a GPU, .* built with --fp16"),
    ):
        with pytest.raises(RequestError, match=said):
            prepare(plan)
    assert set(WHEELS) < set(ITEMS)
    with pytest.raises(RequestError, match="--part-mib 0.000476837 is too small"):
        Store(tmp_path / "small").cut([], 500)


def test_wheels_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(
        BuildError, match="diffusers.* for Python 3.12 cannot be downloaded: ERROR.* --items with the others"
    ):
        download("diffusers", "3.12", tmp_path / "out")
    _wheel(tmp_path, "diffusers", "0.42.9")
    [wheel] = download("diffusers", "3.12", tmp_path / "out")
    assert wheel.name == "diffusers-0.42.9-py3-none-any.whl"


def test_wheels_are_unzipped_where_something_is_missing(tmp_path: Path) -> None:
    site = tmp_path / "site"
    assert unzip("cuda-python", [_wheel(tmp_path, "cuda_core", "1.9.0")], site).startswith("installed: cuda-core 1.")
    assert not site.exists()
    said = unzip("onnxruntime-gpu", [_wheel(tmp_path, "onnxruntime_gpu", "1.31.1")], site)
    assert said == f"onnxruntime_gpu 1.31.1 in {site}"
    assert {path.name for path in site.iterdir()} == {"onnxruntime_gpu.py", "onnxruntime_gpu-1.31.1.dist-info"}


def test_wheels_for_another_python(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path, "onnxruntime_gpu", "1.31.1", "cp36-cp36m-manylinux2014_x86_64")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    with pytest.raises(KitError, match=f"is not for this machine's Python {here}. Prepare .* --python {here}"):
        unzip("onnxruntime-gpu", [wheel], tmp_path / "site")
    assert not (tmp_path / "site").exists()


def _wheel(folder: Path, name: str, version: str, tag: str = "py3-none-any") -> Path:
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"__version__ = {version!r}\n")
        archive.writestr(
            f"{name}-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        archive.writestr(
            f"{name}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
    return path
