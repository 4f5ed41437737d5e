"""memory="low": the networks of one stage at a time, and tiles for large pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.checkpoint import Checkpoint
from export.checkpoint.vae import from_latents, to_latents
from export.networks import VaeDecoder
from realisid_trt import Engine, Person, Request
from realisid_trt.__main__ import main
from realisid_trt.errors import BackendError, BoxError, EngineMismatch, NumericsError, RequestError
from realisid_trt.files import file_sha256
from realisid_trt.loop.picture import decode, tile_starts
from realisid_trt.loop.stages import networks_of_stages
from tests.conftest import ROOT
from training.world.sampling import World
from training.world.scenes import draw

PROMPT = "two people"
STEPS = {"num_inference_steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def low(engine_dir: Path) -> Iterator[Engine]:
    with Engine.load(engine_dir, device="cpu:1", memory="low") as engine:
        yield engine


@pytest.fixture(scope="module")
def normal(engine_dir: Path) -> Iterator[Engine]:
    with Engine.load(engine_dir, device="cpu:1") as engine:
        yield engine


def sessions(engine: Engine) -> dict[str, Any]:
    return engine.backend._sessions  # type: ignore[attr-defined]


@pytest.fixture
def loaded(low: Engine, monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The networks that were open when each run began."""
    found: list[set[str]] = []
    run = low.backend.run

    def watched(network: str, inputs: Any) -> Any:
        outputs = run(network, inputs)
        found.append(set(sessions(low)))
        return outputs

    monkeypatch.setattr(low.backend, "run", watched)
    return found


def test_nothing_is_loaded_before_it_is_needed(engine_dir: Path) -> None:
    with Engine.load(engine_dir, device="cpu:1", memory="low") as engine:
        assert not sessions(engine)
    engine = Engine.load(engine_dir, device="cpu:1", memory="low", networks=("id_encoder",))
    with engine, pytest.raises(BackendError, match="was not opened: Engine.load"):
        engine.generate(PROMPT, num_inference_steps=1)


def test_one_stage_at_a_time_makes_the_same_picture(
    normal: Engine, low: Engine, loaded: list[set[str]], photos: Any
) -> None:
    people = [Person(photos.astronaut, box=(5, 10, 69, 75)), Person(photos.hopper, box=(60, 20, 110, 70))]
    expected = normal.generate(PROMPT, people, output="np", **STEPS)
    seen: list[tuple[int, int]] = []
    for _ in range(2):  # from photos and prompts, then from what is known of them
        seen.clear()
        found = low.generate(PROMPT, people, output="np", progress=lambda *step: seen.append(step), **STEPS)
        assert np.array_equal(found.latents, expected.latents)
        assert np.array_equal(found.images[0], expected.images[0]) and seen == [(1, 2), (2, 2)]
        assert set(found.timings) == set(expected.timings) and all(ms >= 0 for ms in found.timings.values())
        assert sum(ms for name, ms in found.timings.items() if name.startswith("denoise.")) <= found.timings["denoise"]
        assert set(sessions(low)) == {"vae_decoder"}
    stages = [set(names) for names in networks_of_stages(low.manifest).values()]
    assert all(any(names <= stage for stage in stages) for names in loaded)
    assert set.union(*loaded) == set(low.manifest.values["networks"]) == set(sessions(normal))


def test_its_other_uses(normal: Engine, engine_dir: Path, photos: Any) -> None:
    """Identities, a batch with errors, an unloading, a warm-up."""
    low = Engine.load(engine_dir, device="cpu:1", memory="low")  # which knows nobody
    low.generate("a beach", num_inference_steps=1)
    identity = low.embed(photos.hopper)
    assert np.array_equal(identity.id_tokens, normal.embed(photos.hopper).id_tokens)
    assert set(sessions(low)) == {"id_encoder"}
    requests = [
        Request(PROMPT, [Person(identity, box=(5, 10, 69, 75))], seed=1),
        Request(PROMPT, [Person(identity, box=(500, 10, 600, 75))]),
        Request("a beach", seed=2, num_images=2),
    ]
    ours, theirs = (
        engine.generate_batch(requests, num_inference_steps=2, output="np", errors="return") for engine in (low, normal)
    )
    assert isinstance(ours[1], BoxError) and ours[1].request == 2
    for found, expected in zip(ours, theirs, strict=True):
        if not isinstance(found, Exception) and not isinstance(expected, Exception):
            assert all(map(np.array_equal, found.images, expected.images)) and len(found.images) in (1, 2)
    low.unload()
    assert not sessions(low)
    low.warm_up(1, num_inference_steps=1)


def test_it_closes(engine_dir: Path) -> None:
    with Engine.load(engine_dir, device="cpu:1", memory="low") as engine:
        engine.generate(PROMPT, num_inference_steps=1)
        with pytest.raises(RequestError, match="a progress callback called the engine that runs it"):
            engine.generate(PROMPT, num_inference_steps=1, progress=lambda done, total: engine.close())
        assert engine.generate(PROMPT, num_inference_steps=1).images
    assert not sessions(engine)
    with pytest.raises(BackendError, match="this engine was closed"):
        engine.generate(PROMPT)


def test_an_engine_that_was_replaced_meanwhile(engine_copy: Path) -> None:
    with Engine.load(engine_copy, device="cpu:1", memory="low") as engine:
        engine.generate(PROMPT, num_inference_steps=1)
        file = engine_copy / "onnx" / "opset20-fp32" / "unet_encoder.onnx"
        before = file_sha256(file)
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
        assert file_sha256(file) != before
        with pytest.raises(EngineMismatch, match="no longer the engine that was loaded, so unet_encoder cannot be"):
            engine.generate(PROMPT, num_inference_steps=1)
        work = engine.begin(Request(PROMPT), num_inference_steps=1)
        with pytest.raises(BackendError, match="no longer the engine that was loaded"):
            engine.step([work])


@pytest.mark.parametrize("memory", ["tiny", None, 1, ["low"]])
def test_another_word(engine_dir: Path, memory: Any) -> None:
    with pytest.raises(RequestError, match=re.escape(f'memory is {memory!r}, expected "normal" or "low".')):
        Engine.load(engine_dir, memory=memory)


def test_the_flag(engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    load = Engine.load
    monkeypatch.setattr(
        Engine, "load", lambda *given, **options: (begun.append(options["memory"]), load(*given, **options))[1]
    )
    given = ["generate", "--engine", str(engine_dir), "--prompt", PROMPT, "--steps", "1", "--seed", "3"]
    for name, flags in (("a", []), ("b", ["--memory", "low"])):
        assert main([*given, "--out", str(tmp_path / f"{name}.png"), *flags]) == 0
    assert begun == ["normal", "low"]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(SystemExit):
        main([*given, "--out", "c.png", "--memory", "tiny"])


# Tiles


@pytest.mark.parametrize("tile", [8, 32, 128])
def test_tiles_cover_a_side(tile: int) -> None:
    for size in range(1, 5 * tile):
        starts = tile_starts(size, tile)
        assert starts[0] == 0 and starts[-1] == max(0, size - tile)
        assert all(0 < later - before <= tile - tile // 4 for before, later in zip(starts, starts[1:], strict=False))
        assert len(starts) == (1 if size <= tile else 1 + -(-(size - tile) // (tile - tile // 4)))  # no more than that


class Vae:
    """A backend with a VAE in torch, and nothing else."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.vae: Any = checkpoint.load_vae()
        self._decoder, self.sizes = VaeDecoder(checkpoint.load_vae()), list[Any]()

    def put(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(array)

    def get(self, tensor: torch.Tensor) -> Any:
        return tensor.numpy()

    def run(self, network: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.sizes.append(tuple(inputs["latents"].shape[2:]))
        with torch.inference_mode():
            return {"image": self._decoder(inputs["latents"])}

    def pictures(self, latents: Any, tile: int | None = None) -> Any:
        return next(decode(self, latents, tile))  # type: ignore[arg-type]

    def diffusers_tiles(self, latents: Any, tile: int) -> Any:
        """The field's way: diffusers' own tiled decoding, with tiles of the same size."""
        self.vae.tile_latent_min_size, self.vae.tile_sample_min_size = tile, tile * 4
        self.vae.enable_tiling()
        with torch.inference_mode():
            image = self.vae.decode(from_latents(torch.from_numpy(latents), self.vae.config)).sample
        self.vae.disable_tiling()
        return (image[0].permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1)


def rms(array: Any) -> float:
    return float(np.sqrt(np.mean(np.square(array))))


@pytest.fixture(scope="module")
def trained() -> Vae:
    return Vae(Checkpoint.open(ROOT / "checkpoints" / "miniature"))


@pytest.mark.parametrize("number", range(4))
def test_tiles_of_drawn_pictures(trained: Vae, number: int) -> None:
    """256 px in tiles of 128, by the trained miniature: less wrong than diffusers' tiles, and than the VAE itself is
    about the picture that it encoded. docs/weights.md has these bounds."""
    rgb = draw(World().scene(number), 256).rgb
    with torch.inference_mode():
        encoded = trained.vae.encode(torch.from_numpy(rgb.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1))
        latents = to_latents(encoded.latent_dist.mean, trained.vae.config).numpy()
    whole, tiles = trained.pictures(latents), trained.pictures(latents, 32)
    error = tiles - whole
    assert 0 < rms(error) < min(rms(trained.diffusers_tiles(latents, 32) - whole), rms(whole - rgb / 255), 0.013)
    assert np.abs(error).max() < 0.11 and np.abs(error.mean((0, 1))).max() < 0.009
    # Nothing jumps where a tile begins or ends: the error changes there as it does elsewhere.
    edges = {4 * edge for start in tile_starts(64, 32) for edge in (start, start + 32)} - {0, 256}
    for axis in (0, 1):
        jumps = [rms(line) for line in np.moveaxis(np.diff(error, axis=axis), axis, 0)]
        rest = [jump for place, jump in enumerate(jumps) if place + 1 not in edges]
        assert max(jumps[edge - 1] for edge in edges) < max(rest)


def test_all_tiles_have_one_size(trained: Vae) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 4, 24, 44)).astype(np.float32)
    trained.sizes.clear()
    picture = trained.pictures(latents, 32)
    assert set(trained.sizes) == {(24, 32)} and len(trained.sizes) == 2 and picture.shape == (96, 176, 3)
    assert np.array_equal(trained.pictures(latents, 44), trained.pictures(latents))  # one tile is the picture


def test_a_constant_picture_has_no_seams() -> None:
    """Weights of all tiles sum to one."""

    class Constant:
        put = get = staticmethod(lambda array: array)

        def run(self, network: str, inputs: Any) -> Any:
            height, width = inputs["latents"].shape[2:]
            return {"image": np.full((1, 3, 8 * height, 8 * width), 0.25, np.float32)}

    backend: Any = Constant()
    [picture] = decode(backend, np.zeros((1, 4, 70, 33), np.float32), 16)
    np.testing.assert_allclose(picture, 0.625, rtol=1e-6)
    assert picture.shape == (560, 264, 3)


def test_a_large_picture(normal: Engine, low: Engine, checkpoint_dir: Path) -> None:
    """The latents are the same to the bit; the random VAE's tiles err less than diffusers'."""
    options: dict[str, Any] = {"height": 256, "width": 192, "output": "np", "num_images": 2, **STEPS}
    expected, found = (engine.generate("a beach", **options) for engine in (normal, low))
    assert np.array_equal(found.latents, expected.latents)
    assert expected.rows["vae_decoder"] == 2 and found.rows["vae_decoder"] == 2 * 6
    theirs = Vae(Checkpoint.open(checkpoint_dir))
    for number in range(2):
        whole, tiles = expected.images[number], found.images[number]
        assert 0 < rms(tiles - whole) < rms(theirs.diffusers_tiles(found.latents[number : number + 1], 32) - whole)
    with pytest.raises(NumericsError, match="the final latents"):
        low.generate("a beach", latents=np.full((2, 4, 64, 48), 3e38, np.float32), **options)
