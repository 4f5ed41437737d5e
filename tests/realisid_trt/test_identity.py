"""Identities: their fields, their files, and files that are refused."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from realisid_trt.errors import DiskError, EngineMismatch, PhotoError, RequestError
from realisid_trt.persons.identity import Identity


def make(**changes: Any) -> Identity:
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {
        "id_tokens": rng.standard_normal((5, 8)).astype(np.float32),
        "landmarks": rng.random((478, 2)),
        "box": (10.5, 20.0, 110.5, 120.0),
        "photo_size": (600, 512),
        "id_encoder_key": "k" * 64,
        "mask_source": "hull+person",
        "notes": ("2 faces; the clearly largest was taken, face=1 from the left.",),
    }
    return Identity(**values | changes)


def embedded(**changes: Any) -> Identity:
    """One that holds an embedding."""
    rng = np.random.default_rng(1)
    values = {
        "id_tokens": None,
        "embedding": rng.standard_normal(512).astype(np.float32),
        "keypoints": rng.random((5, 2)),
    }
    return make(**values | {"mask_source": "aligned"} | changes)


def same(one: Identity, other: Identity) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(Identity)]
    return all(np.array_equal(a, b) and type(a) is type(b) for a, b in pairs)


def test_two_threads_may_write_the_same_file(tmp_path: Path) -> None:
    """It is whole at any moment, and neither fails."""
    identity, file, failed = make(), tmp_path / "alice.safetensors", []

    def save() -> None:
        try:
            for _ in range(50):
                identity.save(file)
                Identity.load(file)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=save) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and [path.name for path in tmp_path.iterdir()] == ["alice.safetensors"]


@pytest.mark.parametrize("identity", [make(), embedded()], ids=["id_tokens", "embedding"])
def test_stored_and_loaded_is_the_same(tmp_path: Path, identity: Identity) -> None:
    identity.save(tmp_path / "alice.safetensors")
    assert same(Identity.load(tmp_path / "alice.safetensors"), identity)
    assert [path.name for path in tmp_path.iterdir()] == ["alice.safetensors"]
    for umask in (0o022, 0o077):
        before = os.umask(umask)
        try:
            identity.save(tmp_path / "alice.safetensors")
        finally:
            os.umask(before)
        assert (tmp_path / "alice.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_arrays_in_column_order_are_stored_as_what_they_are(tmp_path: Path) -> None:
    """safetensors writes memory in its order, so a transposed array once came back changed."""
    plain = make()
    turned = make(id_tokens=np.asfortranarray(plain.id_tokens), landmarks=np.asfortranarray(plain.landmarks))
    turned.save(tmp_path / "alice.safetensors")
    assert same(Identity.load(tmp_path / "alice.safetensors"), plain)


def test_arrays_belong_to_the_identity_and_cannot_be_written(tmp_path: Path) -> None:
    tokens = np.ones((5, 8), np.float64)
    identity = make(id_tokens=tokens)
    tokens[:] = 7
    assert (identity.id_tokens == 1).all() and identity.id_tokens.dtype == np.float32
    identity.save(tmp_path / "alice.safetensors")
    other = embedded()
    other.save(tmp_path / "bob.safetensors")
    loaded = Identity.load(tmp_path / "alice.safetensors"), Identity.load(tmp_path / "bob.safetensors")
    for found in (identity, other, *loaded):
        arrays = (found.id_tokens, found.embedding, found.keypoints, found.landmarks)
        for array in (array for array in arrays if array is not None):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0


def test_copies_for_other_processes_hold_the_same() -> None:
    for identity in (make(), embedded()):
        copied = pickle.loads(pickle.dumps(identity))
        assert same(copied, identity) and not copied.landmarks.flags.writeable


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding": np.ones(512)}, "an identity has both id_tokens and embedding, expected exactly one of them"),
        ({"id_tokens": None}, "an identity has neither id_tokens and embedding, expected exactly one of them"),
        ({"keypoints": np.ones((5, 2))}, "keypoints of an identity belong to an embedding: give both or neither"),
    ],
)
def test_tokens_or_an_embedding(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make(**changes)
    with pytest.raises(RequestError, match="keypoints of an identity belong to an embedding: give both or neither"):
        embedded(keypoints=None)
    with pytest.raises(RequestError, match=r"embedding of an identity has shape \(1, 512\), expected \(E,\)"):
        embedded(embedding=np.ones((1, 512)))
    with pytest.raises(RequestError, match="embedding of an identity holds NaN or infinity"):
        embedded(embedding=np.full(512, np.nan))
    with pytest.raises(RequestError, match=r"keypoints of an identity has shape \(4, 2\), expected \(5, 2\)"):
        embedded(keypoints=np.ones((4, 2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id_tokens": np.zeros(8)}, r"id_tokens of an identity has shape \(8,\), expected \(T, D\)"),
        ({"id_tokens": [["a"]]}, "not an array of numbers"),
        ({"id_tokens": np.full((5, 8), np.nan)}, "NaN or infinity"),
        ({"landmarks": np.zeros((468, 2))}, r"\(468, 2\), expected \(478, 2\)"),
        ({"landmarks": np.full((478, 2), np.inf)}, "NaN or infinity"),
        ({"box": (0, 0, 10)}, "expected x0, y0, x1, y1"),
        ({"box": (0, 0, float("nan"), 10)}, "expected x0, y0, x1, y1"),
        ({"box": (10, 0, 0, 10)}, "with x0 < x1"),
        ({"box": "left"}, "expected x0, y0, x1, y1"),
        ({"box": None}, "expected x0, y0, x1, y1"),
        ({"photo_size": (600.5, 512)}, r"expected \(height, width\) in pixels"),
        ({"photo_size": (0, 512)}, r"expected \(height, width\) in pixels"),
        ({"photo_size": 512}, r"expected \(height, width\) in pixels"),
    ],
)
def test_fields_that_cannot_be_meant(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make(**changes)


def test_numbers_of_numpy_are_stored_too(tmp_path: Path) -> None:
    """JSON cannot hold a float32."""
    made = make(box=np.array([1, 2, 3, 4], np.float32), photo_size=np.array([600, 512]))
    assert made.box == (1.0, 2.0, 3.0, 4.0) and made.photo_size == (600, 512)
    made.save(tmp_path / "alice.safetensors")
    assert same(Identity.load(tmp_path / "alice.safetensors"), made)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "alice.safetensors", tmp_path / "folder.safetensors", tmp_path / ("a" * 300)):
        with pytest.raises(DiskError, match="could not be written.*Choose another place"):
            make().save(path)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.safetensors"}
    make().save(tmp_path / "new" / "alice.safetensors")  # a folder that is missing is made


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "alice.safetensors"
    make().save(path)
    before = path.read_bytes()

    def write(target: Path, content: bytes) -> int:
        with open("/dev/full", "wb", buffering=0) as full:
            return full.write(content)

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(DiskError, match="No space left on device.*Free some space"):
        make(mask_source="bisenet").save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    make().save(tmp_path / "alice.safetensors")
    return tmp_path / "alice.safetensors"


def file_of(header: dict[str, Any], content: bytes) -> bytes:
    """A safetensors file, as its format says: length, header, tensors."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


NOTED = {
    "box": "[10.5, 20.0, 110.5, 120.0]", "photo_size": "[600, 512]", "id_encoder_key": "kkkk", "mask_source": "hull",
    "notes": '["a note"]',
}  # fmt: skip
LANDMARKS = np.linspace(0, 1, 956).reshape(478, 2)


def test_files_of_both_formats_are_read_for_ever(tmp_path: Path) -> None:
    """The bytes of an identity of version 0.4, and of one with an embedding; words in it are for later versions."""
    tokens, embedding = np.arange(40, dtype="<f4").reshape(5, 8), np.arange(512, dtype="<f4")
    keypoints, words = np.arange(10, dtype="<f8").reshape(5, 2), np.ones((2, 8), "<f4")
    first = file_of(
        {
            "__metadata__": {"format": "realisid-identity-1", **NOTED},
            "landmarks": {"dtype": "F64", "shape": [478, 2], "data_offsets": [0, 7648]},
            "id_tokens": {"dtype": "F32", "shape": [5, 8], "data_offsets": [7648, 7808]},
        },
        LANDMARKS.tobytes() + tokens.tobytes(),
    )
    second = file_of(
        {
            "__metadata__": {"format": "realisid-identity-2", **NOTED, "words.text_encoder_key": "tttt"},
            "landmarks": {"dtype": "F64", "shape": [478, 2], "data_offsets": [0, 7648]},
            "keypoints": {"dtype": "F64", "shape": [5, 2], "data_offsets": [7648, 7728]},
            "embedding": {"dtype": "F32", "shape": [512], "data_offsets": [7728, 9776]},
            "words.text_encoder": {"dtype": "F32", "shape": [2, 8], "data_offsets": [9776, 9840]},
        },
        LANDMARKS.tobytes() + keypoints.tobytes() + embedding.tobytes() + words.tobytes(),
    )
    common = ((10.5, 20.0, 110.5, 120.0), (600, 512), "kkkk", "hull", ("a note",))
    expected = Identity(tokens, LANDMARKS, *common), Identity(None, LANDMARKS, *common, embedding, keypoints)
    for content, identity, kind in zip((first, second), expected, ("id_tokens", "embedding"), strict=True):
        (tmp_path / "alice.safetensors").write_bytes(content)
        found = Identity.load(tmp_path / "alice.safetensors")
        assert same(found, identity) and found.kind == kind
        found.save(tmp_path / "again.safetensors")
        with safe_open(tmp_path / "again.safetensors", framework="numpy") as file:
            written = file.metadata()
        with safe_open(tmp_path / "alice.safetensors", framework="numpy") as file:
            kept = {name: value for name, value in file.metadata().items() if not name.startswith("words.")}
        assert written == kept


def test_other_formats_are_refused(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "realisid-identity-3", **NOTED},
        "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    (tmp_path / "alice.safetensors").write_bytes(file_of(header, bytes(4)))
    message = "format 'realisid-identity-3', expected 'realisid-identity-1' or 'realisid-identity-2'.* embed --engine"
    with pytest.raises(PhotoError, match=message):
        Identity.load(tmp_path / "alice.safetensors")


def rewrite(path: Path, tensors: dict[str, Any], metadata: dict[str, Any]) -> None:
    """The stored file with some tensors and metadata changed; None removes one."""
    with safe_open(path, framework="numpy") as file:
        old = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        words = dict(file.metadata())
    kept = {name: value for name, value in (old | tensors).items() if value is not None}
    save_file(kept, path, {name: value for name, value in (words | metadata).items() if value is not None})


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"id_tokens": np.zeros(40, np.float32)}, {}),
        ({"id_tokens": np.full((5, 8), np.nan, np.float32)}, {}),
        ({"id_tokens": None}, {}),
        ({"landmarks": np.zeros((468, 2))}, {}),
        ({"landmarks": np.full((478, 2), np.inf)}, {}),
        ({}, {"box": "[1, 2]"}),
        ({}, {"box": "{"}),
        ({}, {"box": "7"}),
        ({}, {"box": '["a", "b", "c", "d"]'}),
        ({}, {"photo_size": "[-1, 5]"}),
        ({}, {"notes": "null"}),
        ({}, {"mask_source": None}),
    ],
)
def test_altered_files_are_refused(stored: Path, tensors: dict[str, Any], metadata: dict[str, Any]) -> None:
    rewrite(stored, tensors, metadata)
    with pytest.raises(PhotoError, match="cannot be read as a stored identity .*Make it again with embed") as caught:
        Identity.load(stored)
    assert caught.value.code == "identity"


def test_files_that_are_no_identity(stored: Path, tmp_path: Path) -> None:
    content = stored.read_bytes()
    damaged = [content[:100], content[:-8], b"", b"Dear Alice", bytes(200), content[:8] + b"\xff" * 50 + content[58:]]
    for damage in damaged:
        stored.write_bytes(damage)
        with pytest.raises(PhotoError, match="alice.safetensors cannot be read as a stored identity"):
            Identity.load(stored)
    save_file({"x": np.zeros(3)}, stored)
    with pytest.raises(PhotoError, match="is not a stored identity .* Make one: python -m realisid_trt embed"):
        Identity.load(stored)
    for path in (tmp_path / "nobody.safetensors", tmp_path, "a" * 5000 + ".safetensors", "zero\0byte.safetensors"):
        with pytest.raises(PhotoError, match="cannot be read as a stored identity"):
            Identity.load(path)


def test_random_damage_never_escapes_as_another_exception(stored: Path) -> None:
    content, chance = stored.read_bytes(), np.random.default_rng(3)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(150):
        damaged = bytearray(content)
        for place in chance.integers(0, header, 3):
            damaged[place] = chance.integers(0, 256)
        stored.write_bytes(damaged)
        try:
            assert Identity.load(stored).id_tokens.ndim == 2
        except PhotoError as error:
            assert error.code == "identity"


def test_another_encoders_identity_is_refused() -> None:
    make().check("k" * 64, "alice")
    with pytest.raises(EngineMismatch, match="alice was made by another ID encoder .*Embed the photo again"):
        make().check("0" * 64, "alice")


def test_the_other_kind_names_the_command_that_makes_it() -> None:
    embedded().check("k" * 64, "alice", "embedding")
    command = "embed the photo with this engine, python -m realisid_trt embed --engine … photo.jpg --out"
    with pytest.raises(EngineMismatch, match=f"alice holds an embedding, and this engine needs ID tokens.*{command}"):
        embedded().check("k" * 64, "alice")
    with pytest.raises(EngineMismatch, match=f"alice holds ID tokens, and this engine needs an embedding.*{command}"):
        make().check("k" * 64, "alice", "embedding")
    with pytest.raises(EngineMismatch, match="alice was made by another ID encoder"):
        embedded().check("0" * 64, "alice", "embedding")


def test_notes_are_json(stored: Path) -> None:
    with safe_open(stored, framework="numpy") as file:
        assert json.loads(file.metadata()["notes"]) == list(make().notes)
