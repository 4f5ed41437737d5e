"""The counted GPU memory: against the engine's files, torch's live arrays, and the sentences that are printed.

tests/gpu/test_memory.py compares the arena with what a GPU's backend allocates.
"""

from __future__ import annotations

import json
import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from export.checkpoint import Checkpoint
from export.networks import VaeDecoder
from realisid_trt.__main__ import main
from realisid_trt.commands.memory_table import CARDS_GIB, RESERVE_BYTES, Card, amount, memory_lines, sizes_of, verdict
from realisid_trt.errors import RequestError, ShapeError
from realisid_trt.manifest import Manifest
from realisid_trt.memory import Needs, Size, arena_bytes, gpu_builds, needs, vae_peak_bytes, weights_bytes
from tests.conftest import ROOT
from tests.realisid_trt.full_size import checkpoint_without_weights, full_size_manifest, with_one_branch

GIB = 2**30


@pytest.fixture(scope="module")
def manifest(engine_dir: Path) -> Manifest:
    return Manifest.read(engine_dir)


def changed(manifest: Manifest, **sections: Any) -> Manifest:
    """The manifest with other sections; None leaves one out."""
    values = {**manifest.values, **sections}
    return Manifest(manifest.path, {name: value for name, value in values.items() if value is not None})


# Weights


def test_weights_of_graphs_are_their_files(manifest: Manifest) -> None:
    [build] = [build for build in gpu_builds(manifest) if build.backend == "onnxruntime"]
    found = weights_bytes(manifest, build)
    sizes = {
        name: sum(file.stat().st_size for file in (manifest.path / network.file).parent.glob(f"{name}.onnx*"))
        for name, network in manifest.networks(build).items()
    }
    loop = ("local_branch", "global_branch", "unet_encoder", "unet_decoder")
    assert found["denoise"] == sum(sizes[name] for name in loop) and found["vae"] == sizes["vae_decoder"]
    assert found["persons"] == sizes["id_encoder"] and found["other"] == 0
    assert sum(found.values()) == sum(sizes.values())


def test_weights_of_plans_are_their_tensors(manifest: Manifest, checkpoint_dir: Path) -> None:
    """As many numbers as the checkpoint's UNet and branches have, two bytes each, but for few constants."""
    builds = [build for build in gpu_builds(manifest) if build.backend == "tensorrt-rtx"]
    if not builds:
        pytest.skip("tensorrt-rtx is not installed")
    checkpoint = Checkpoint.open(checkpoint_dir)
    from export.networks import networks

    known = networks(checkpoint)
    loop = ("local_branch", "global_branch", "unet_encoder", "unet_decoder")
    numbers = sum(known[name].elements(checkpoint) for name in loop)
    assert 2 * numbers <= weights_bytes(manifest, builds[0])["denoise"] < 2.01 * numbers


def test_a_network_that_no_stage_runs_is_counted_too(manifest: Manifest) -> None:
    networks = manifest.values["networks"]
    [build, *_] = gpu_builds(manifest)
    found = weights_bytes(changed(manifest, networks={**networks, "face_encoder": networks["id_encoder"]}), build)
    assert found["other"] == networks["id_encoder"]["builds"][build.id]["bytes"] == found["persons"]
    config = manifest.values["realisid_config"]
    more = {**config["branches"][0], "name": "third", "folder": "controlnet_third"}
    with_third = changed(
        manifest,
        networks={**networks, "third_branch": networks["local_branch"]},
        realisid_config={**config, "branches": [*config["branches"], more]},
    )
    third = weights_bytes(with_third, build)
    assert third["denoise"] > found["denoise"] and third["other"] == 0  # any number of branches


# The VAE


class Live(TorchDispatchMode):
    """The most bytes of new arrays that live at one time."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.now = self.most = 0
        self.seen: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        self.most = max(self.most, self.now)
        return out

    def _add(self, storage: Any) -> None:
        address, nbytes = storage.data_ptr(), storage.nbytes()
        if not nbytes or address in self.known or (address in self.seen and self.seen[address].alive):
            return
        self.now += nbytes
        self.seen[address] = weakref.finalize(storage, self._gone, nbytes)

    def _gone(self, nbytes: int) -> None:
        self.now -= nbytes


@pytest.mark.parametrize("size", [(16, 16), (24, 40)])
def test_the_vae_s_peak_is_that_of_torch(size: tuple[int, int]) -> None:
    """Operation by operation, of the trained miniature's decoder, which has no attention."""
    checkpoint = Checkpoint.open(ROOT / "checkpoints" / "miniature")
    module = VaeDecoder(checkpoint.load_vae())
    latents = torch.zeros(1, checkpoint.latent_channels, *size)
    with torch.inference_mode(False), torch.no_grad(), Live(*module.state_dict().values(), latents) as live:
        module(latents)
    config = {"block_out_channels": (16, 32, 64), "layers_per_block": 1, "mid_block_add_attention": False}
    assert 0.99 * live.most <= vae_peak_bytes(config, *size) <= 1.01 * live.most


def test_attention_that_keeps_its_scores(checkpoint_dir: Path) -> None:
    """At 64 × 64 cells they are the most of all: the share of everything else is small."""
    checkpoint = Checkpoint.open(checkpoint_dir)
    module = VaeDecoder(checkpoint.load_vae())
    latents = torch.zeros(1, checkpoint.latent_channels, 64, 64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Live(*module.state_dict().values(), latents) as live:
        module(latents)
    config = {"block_out_channels": (8, 16, 32), "layers_per_block": 1, "mid_block_add_attention": True}
    assert 0.99 * live.most <= vae_peak_bytes(config, 64, 64) <= 1.01 * live.most
    without = vae_peak_bytes({**config, "mid_block_add_attention": False}, 64, 64)
    assert vae_peak_bytes(config, 64, 64) > 4 * without


# The whole


def test_the_parts_and_the_whole(manifest: Manifest) -> None:
    [build] = [build for build in gpu_builds(manifest) if build.backend == "onnxruntime"]
    plans = replace(build, backend="tensorrt")
    found = needs(manifest, build, Size(1, 1, 128))
    assert found.scratch is None and found.vae == found.low_vae == vae_peak_bytes(manifest.values["vae"], 32, 32)
    assert found.normal == sum(found.weights.values()) + found.arena + found.vae
    assert found.low == found.arena + found.weights["denoise"] + found.vae  # whose memory ONNX Runtime keeps
    shrunk = needs(manifest, plans, Size(1, 1, 128))
    assert shrunk.low == found.arena + max(found.weights["denoise"], found.weights["vae"] + found.vae) < found.low
    assert shrunk.normal == found.normal
    larger = needs(manifest, build, Size(1, 1, 256))
    assert larger.vae is not None and larger.vae > 10 * found.vae and larger.low_vae == found.vae  # in tiles
    scratch = {"unet_decoder": 3 * GIB, "vae_decoder": 2 * GIB}
    known = needs(changed(manifest, verified={build.id: {"scratch_bytes": scratch}}), plans, Size(1, 1, 128))
    assert known.normal == found.normal - found.vae + 3 * GIB
    assert known.low == found.arena + found.weights["denoise"] + 3 * GIB


def test_the_arena_grows_with_what_is_asked(manifest: Manifest) -> None:
    [build, *_] = gpu_builds(manifest)
    sizes = [Size(1, 0, 256), Size(1, 3, 256), Size(2, 3, 256), Size(4, 8, 256)]
    found = [arena_bytes(manifest, build, size) for size in sizes]
    assert found == sorted(set(found)), found
    with pytest.raises(ShapeError, match="larger --batch, --persons or --resolution"):
        arena_bytes(manifest, build, Size(1, 1, 512))


def counted(normal: float, low: float, scratch: float | None = 0.0) -> Needs:
    weights = {"denoise": int(low * GIB), "text": int((normal - low) * GIB)}
    known = None if scratch is None else {"unet_decoder": int(scratch * GIB)}
    return Needs("b", Size(1, 1, 1024), weights, 0, known, 0, 0, 0, shrinks=True)


@pytest.mark.parametrize(
    ("found", "card", "sentence"),
    [
        (counted(7, 5), None, "fits GPUs of 8, 12, 16 and 24 GB."),
        (counted(12, 7), None, 'fits GPUs of 16 and 24 GB; with memory="low" of 8, 12, 16 and 24 GB.'),
        (counted(16, 11), None, 'fits GPUs of 24 GB; with memory="low" of 12, 16 and 24 GB; not of 8 GB.'),
        (counted(40, 20), None, 'fits only with memory="low": GPUs of 24 GB; not of 8, 12 and 16 GB.'),
        (counted(40, 30), None, 'does not fit GPUs of 8, 12, 16 and 24 GB, with memory="low" neither.'),
        (counted(7.5, 5), None, "fits GPUs of 8, 12, 16 and 24 GB."),  # half a GiB is left, which CUDA gets
        (counted(7.6, 5), None, 'fits GPUs of 12, 16 and 24 GB; with memory="low" of 8, 12, 16 and 24 GB.'),
        (counted(7, 5, None), None, "without the unknown scratch it fits GPUs of 8, 12, 16 and 24 GB."),
        (counted(7, 5), Card("X", 10 * GIB), "fits X with 10.00 GiB."),
        (counted(10, 5), Card("X", 10 * GIB), 'fits X with 10.00 GiB only with memory="low".'),
        (
            counted(20, 12),
            Card("X", 10 * GIB),
            'does not fit X with 10.00 GiB, with memory="low" neither: 2.50 GiB are missing. Make fewer or smaller '
            "pictures at a time.",
        ),
    ],
)
def test_the_sentence(found: Needs, card: Card | None, sentence: str) -> None:
    assert verdict(found, card) == sentence


def test_an_engine_of_an_earlier_version(manifest: Manifest) -> None:
    old = changed(manifest, vae=None, built_for=None)
    text = "\n".join(memory_lines(old, sizes_of(old), None))
    assert "an earlier version built this engine. Build it again to know it." in text
    assert re.search(r"VAE decoder at its peak +unknown", text) and "needed  " in text
    assert sizes_of(old) == [Size(1, 1, 128)]
    assert sizes_of(manifest) == [Size(1, 1, 128), Size(4, 8, 256)]  # what it was built for


def test_an_engine_for_a_cpu_needs_no_gpu(built: Any) -> None:
    other = Manifest.read(built["x8"].engine)
    assert gpu_builds(other) == [] and memory_lines(other, sizes_of(other), None) == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"batch": 0}, "batch is 0, expected a whole number of at least 1."),
        ({"persons": -1}, "persons is -1, expected a whole number of at least 0."),
        ({"resolution": 1.5}, "resolution is 1.5, expected a whole number of at least 1."),
    ],
)
def test_a_size_that_cannot_be(manifest: Manifest, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        Size.asked(manifest, **asked)


# The commands


def test_inspect_prints_it(manifest: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["inspect", str(manifest.path), "--batch", "2", "--persons", "3", "--resolution", "256", "--json"]
    assert main(given) == 0
    out, text = capsys.readouterr()
    [first, *_] = json.loads(out)["memory"]
    [build, *_] = gpu_builds(manifest)
    expected = needs(manifest, build, Size(2, 3, 256))
    assert first == expected.as_json() and first["arena"] > 2**24
    assert f"GPU memory, {build.id}" in text and "2 pictures, 3 persons, 256 px" in text
    assert f"≥ {amount(expected.normal)}" in text and "measured by nobody" in text
    assert main([*given[:2], "--batch", "50"]) == 2 and "larger --batch" in capsys.readouterr().err
    assert main([*given[:2], "--batch", "0"]) == 2 and "--batch" not in capsys.readouterr().out


def test_doctor_prints_it(
    manifest: Manifest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor", "--engine", str(manifest.path), "--persons", "2"]) == 0
    assert "1 picture, 2 persons, 128 px: ≥ " in capsys.readouterr().out
    monkeypatch.setattr("realisid_trt.commands.doctor.present_card", lambda: Card("X", GIB // 2))
    assert main(["doctor", "--engine", str(manifest.path)]) == 0  # it runs on this machine's CPU
    out = capsys.readouterr().out
    assert "optional  GPU memory" in out and 'does not fit X with 0.50 GiB, with memory="low" neither' in out
    assert f"python -m realisid_trt inspect {manifest.path} shows each part" in out


# Full size


def fits_in_words(found: Needs, card_bytes: int) -> str:
    """As the page says it: with a question mark if less than 1 GiB is left for the scratch, which is unknown."""
    for word, nbytes in (("yes", found.normal), ("low", found.low)):
        left = card_bytes - RESERVE_BYTES - nbytes
        if left >= 0:
            return word if left >= GIB else f"{word}?"
    return "no"


@pytest.mark.slow
def test_the_table_of_the_docs(tmp_path: Path) -> None:
    """docs/weights.md says what is counted for SDXL's shapes."""
    two = full_size_manifest(checkpoint_without_weights(tmp_path / "CKPT"), tmp_path)
    page = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (one|two) \| (\d), (\d), (\d+) px \|(.*)\|$", page, re.MULTILINE)
    assert len(rows) == 12
    for branches, batch, persons, side, cells in rows:
        manifest = two if branches == "two" else with_one_branch(two)
        [build] = gpu_builds(manifest)
        plans = replace(build, backend="tensorrt")  # of the same networks and weights
        found = needs(manifest, plans, Size(int(batch), int(persons), int(side)))
        by_onnxruntime = needs(manifest, build, Size(int(batch), int(persons), int(side)))
        assert f"{(by_onnxruntime.low - found.low) / GIB:.1f}" in ("2.8", "3.0")  # the page: about 3 GiB more
        values = (found.loop_weights, found.other_weights, found.arena, found.vae or 0, found.normal, found.low)
        fits = [fits_in_words(found, card_gib * GIB) for card_gib in CARDS_GIB]
        assert [cell.strip() for cell in cells.split("|")] == [*(f"{value / GIB:.1f}" for value in values), *fits]
        assert found.normal == sum(values[:4])
