"""Claims about the checkpoints we make: reproducible, of the real shapes, alive, and never at another folder's cost."""

from __future__ import annotations

import errno
import hashlib
import json
import math
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from export import miniature
from export.checkpoint import Checkpoint
from export.miniature import main, make_checkpoint, meta_module, recipe_of
from export.miniature_presets import component_configs
from export.miniature_tokenizer import END, byte_symbols, vocabulary_and_merges
from export.miniature_weights import draw, write_weights
from realisid_trt.errors import DiskError, RequestError

VARIETIES: dict[str, dict[str, Any]] = {
    "default": {},
    "velocity": {"prediction": "v_prediction", "vae_factor": 8, "id_tokens": 77, "null_id": "file"},
    "sd15": {"family": "sd15"},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Nets this small are slower on several threads, and much slower when other tests run beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: Checkpoint.open(make_checkpoint(folder / name, **options)) for name, options in VARIETIES.items()}


def digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# --- the bytes


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    first = digests(checkpoints["default"].path)
    torch.manual_seed(123)  # nobody's random state may matter
    assert digests(make_checkpoint(tmp_path / "again")) == first
    other = digests(make_checkpoint(tmp_path / "other", seed=1))
    assert other.keys() == first.keys()
    differing = {name for name in first if first[name] != other[name]}
    assert differing == {name for name in first if name.endswith(".safetensors")} | {"model_index.json"}


def test_every_tensor_is_a_stream_of_its_own(checkpoints: dict[str, Checkpoint]) -> None:
    path = checkpoints["default"].path
    seen: dict[tuple[float, ...], str] = {}
    for file in sorted(path.rglob("*.safetensors")):
        for key, tensor in load_file(file).items():
            start = tuple((tensor.flatten()[:4] / tensor.flatten()[:4].norm()).tolist())
            if tensor.numel() >= 4 and not (file.parent.name == "unet" and key == "conv_in.weight"):
                assert start not in seen, f"{file.parent.name}/{key} starts like {seen[start]}"
                seen[start] = f"{file.parent.name}/{key}"
    assert len(seen) > 1000


def test_what_the_loaders_give_is_what_was_drawn(checkpoints: dict[str, Checkpoint]) -> None:
    """Also the text encoder, whose keys transformers renames while it loads."""
    checkpoint = checkpoints["default"]
    loaded = checkpoint.load_text_encoder("text_encoder").state_dict()
    key = "encoder.layers.1.mlp.fc2.weight"
    written = draw(0, "text_encoder", f"text_model.{key}", (32, 64))
    assert torch.equal(next(value for name, value in loaded.items() if name.endswith(key)), written)
    key = "down_blocks.1.attentions.0.proj_in.weight"
    assert torch.equal(checkpoint.load_unet().state_dict()[key], draw(0, "unet", key, (32, 32)))


def test_shards_hold_the_same_tensors_and_are_written_one_after_the_other(tmp_path: Path) -> None:
    shapes = {f"layer{n}.weight": (30, 50) for n in range(7)}
    made: list[tuple[str, int]] = []

    def make(key: str, shape: tuple[int, ...]) -> torch.Tensor:
        made.append((key, len(list((tmp_path / "many").glob("*.safetensors")))))
        return draw(5, "x", key, shape)

    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
    write_weights(tmp_path / "one", "model", shapes, lambda key, shape: draw(5, "x", key, shape), torch.float16)
    write_weights(tmp_path / "many", "model", shapes, make, torch.float16, shard_bytes=2 * 3000)
    assert [shards for _, shards in made] == [0, 0, 1, 1, 2, 2, 3]  # a shard is on the disk before the next is made
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 3000
    whole, parts = load_file(tmp_path / "one" / "model.safetensors"), {}
    for name in set(index["weight_map"].values()):
        parts.update(load_file(tmp_path / "many" / name))
        with safe_open(tmp_path / "many" / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}  # transformers insists
    assert parts.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(parts[key], whole[key]) for key in whole)


# --- the shapes


def parameters(preset: str) -> dict[str, int]:
    configs = component_configs(recipe_of(preset=preset), vocabulary=1013)
    modules = {name: meta_module(name, config) for name, config in configs.items()}
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}


def test_the_full_size_preset_is_sdxl_with_ip_adapters_image_encoder() -> None:
    assert parameters("sdxl") == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "image_encoder": 632_076_800,
        "controlnet_local": 1_251_014_160,
        "controlnet_global": 1_251_013_872,
        "id_projection": 1280 * 2048 + 3 * 2048,
    }
    assert recipe_of(preset="sdxl").image_tokens == 257


def test_the_middle_preset_has_about_116_million_parameters_in_its_unet() -> None:
    assert 115e6 < parameters("mid")["unet"] < 117e6


# --- the networks are alive


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())


class Sampler:
    """The three rows and both branches in plain torch, for one person; written from the equations for these tests."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.unet = checkpoint.load_unet()
        self.branches = {which: checkpoint.load_controlnet(which) for which in ("local", "global")}
        self.encoder, self.projection = checkpoint.load_image_encoder(), checkpoint.load_id_projection()
        self.texts = {n: (checkpoint.load_tokenizer(n), checkpoint.load_text_encoder(n)) for n in
                      checkpoint.text_encoder_names}  # fmt: skip
        self.side = checkpoint.sample_size
        self.null = checkpoint.null_id_tokens()[None]

    def text(self, prompt: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and pooled text, zeros for no prompt. Pooled text has no columns without added conditions."""
        states, pooled = [], torch.zeros(1, 0)
        for tokenizer, encoder in self.texts.values():
            ids = tokenizer(prompt or "", padding="max_length", truncation=True, return_tensors="pt").input_ids
            out = encoder(ids, output_hidden_states=True)
            states.append(out.hidden_states[-2])
            pooled = out.get("text_embeds", pooled)
        keep = 0.0 if prompt is None else 1.0
        return torch.cat(states, -1) * keep, pooled * keep

    def id_tokens(self, seed: int) -> torch.Tensor:
        size = self.checkpoint.image_size
        patches = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
        features = self.encoder(F.interpolate(patches, size, mode="bicubic"), output_hidden_states=True)
        return self.projection(features.hidden_states[-2])

    def pose(self, seed: int) -> torch.Tensor:
        """Thin lines on black, like a drawing of landmarks."""
        stream = torch.Generator().manual_seed(seed)
        small = torch.rand(1, 3, self.side, self.side, generator=stream)
        return F.interpolate((small > 0.9).float(), scale_factor=self.checkpoint.vae_scale_factor)

    def added(self, pooled: torch.Tensor) -> dict[str, Any]:
        if not self.checkpoint.has_added_conditions:
            return {}
        pixels = float(self.side * self.checkpoint.vae_scale_factor)
        time_ids = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]]).expand(len(pooled), -1)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}

    def residuals(self, latents: torch.Tensor, t: int, tokens: torch.Tensor, pose: torch.Tensor, box: tuple[int, ...]):
        """(local, merged) residuals, a row for every row of `tokens`."""
        x, y, side = box
        f, rows = self.checkpoint.vae_scale_factor, len(tokens)
        crop = F.interpolate(latents[:, :, y : y + side, x : x + side], self.side, mode="bilinear")
        mask = torch.zeros(1, 1, self.side * f, self.side * f)
        mask[:, :, y * f : (y + side) * f, x * f : (x + side) * f] = 1
        out = []
        for which, seen, condition in (("local", crop, pose), ("global", latents, mask)):
            seen, condition = seen.expand(rows, -1, -1, -1), condition.expand(rows, -1, -1, -1)
            added = self.added(torch.zeros(rows, self.checkpoint.pooled_dim))
            skips, middle = self.branches[which](seen, t, tokens, condition, return_dict=False, **added)
            out.append([*skips, middle])
        merged = []
        for r, g in zip(*out, strict=True):
            k = self.side // r.shape[-1]
            s, u, v = max(1, side // k), x // k, y // k
            canvas = g.clone()
            canvas[:, :, v : v + s, u : u + s] += F.interpolate(r, (s, s), mode="bilinear")
            merged.append(canvas)
        return out[0], merged

    def predict(self, latents: torch.Tensor, t: int, texts: list[Any], tokens: list[torch.Tensor], pose: Any, box: Any):
        """One row for every pair of a text and ID tokens."""
        _, merged = self.residuals(latents, t, torch.cat(tokens), pose, box)
        states, pooled = (torch.cat(parts) for parts in zip(*texts, strict=True))
        return self.unet(
            latents.expand(len(states), -1, -1, -1), t, states, down_block_additional_residuals=merged[:-1],
            mid_block_additional_residual=merged[-1], return_dict=False, **self.added(pooled),
        )[0]  # fmt: skip


@pytest.mark.parametrize("name", VARIETIES)
@torch.no_grad()
def test_prompt_id_pose_and_box_all_change_the_prediction(checkpoints: dict[str, Checkpoint], name: str) -> None:
    s = Sampler(checkpoints[name])
    latents = torch.randn(1, 4, s.side, s.side, generator=torch.Generator().manual_seed(0))
    texts, tokens = [s.text("two friends hiking"), s.text("a man at night")], [s.id_tokens(1), s.id_tokens(2), s.null]
    rows = [(0, 0), (1, 0), (0, 1), (0, 2)]  # (text, ID)
    first, second = (4, 4, 12), (16, 16, 12)
    base, *others = s.predict(latents, 500, [texts[i] for i, _ in rows], [tokens[j] for _, j in rows], s.pose(1), first)
    changed = dict(zip(("prompt", "ID", "null ID"), others, strict=True))
    changed["pose"] = s.predict(latents, 500, texts[:1], tokens[:1], s.pose(2), first)[0]
    changed["box"] = s.predict(latents, 500, texts[:1], tokens[:1], s.pose(1), second)[0]
    assert 0.3 < rms(base) < 3
    for what, other in changed.items():
        change = rms(other - base) / rms(base)
        assert change >= 0.01, f"another {what} changes the prediction by {change:.2%}"


@pytest.mark.parametrize("name", VARIETIES)
@torch.no_grad()
def test_residuals_are_a_tenth_to_all_of_the_skips(checkpoints: dict[str, Checkpoint], name: str) -> None:
    s = Sampler(checkpoints[name])
    latents = torch.randn(1, 4, s.side, s.side, generator=torch.Generator().manual_seed(0))
    skips: list[torch.Tensor] = []
    s.unet.conv_in.register_forward_hook(lambda module, args, out: skips.append(out))
    for block in s.unet.down_blocks:
        block.register_forward_hook(lambda module, args, out: skips.extend(out[1]))
    s.unet.mid_block.register_forward_hook(lambda module, args, out: skips.append(out))
    text, pooled = s.text("two friends hiking")
    s.unet(latents, 500, text, **s.added(pooled))
    local, _ = s.residuals(latents, 500, s.id_tokens(1), s.pose(1), (0, 0, s.side))
    assert len(local) == len(skips) == len(checkpoints[name].residuals)
    for residual, skip in zip(local, skips, strict=True):
        assert 0.1 <= rms(residual) / rms(skip) <= 1


@pytest.mark.parametrize("name", VARIETIES)
@torch.no_grad()
def test_thirty_steps_of_ddim_stay_finite_and_small(checkpoints: dict[str, Checkpoint], name: str) -> None:
    s, config = Sampler(checkpoints[name]), checkpoints[name].config
    scheduler = checkpoints[name].load_scheduler()
    scheduler.set_timesteps(config.num_inference_steps)
    latents = torch.randn(1, 4, s.side, s.side, generator=torch.Generator().manual_seed(0))
    texts, pose, box = [s.text(None), *[s.text("two friends hiking")] * 2], s.pose(1), (4, 4, 12)
    tokens = [s.null, s.null, s.id_tokens(1)]
    for i, t in enumerate(scheduler.timesteps.tolist()):
        rows = 3 if i > 0.3 * config.num_inference_steps else 2
        none, text, *full = s.predict(latents, t, texts[:rows], tokens[:rows], pose, box)
        guided = none + config.guidance_scale * (text - none)
        if full:
            guided = guided + config.id_guidance_scale * (full[0] - text)
        latents = scheduler.step(guided[None], t, latents, eta=0.0).prev_sample
    # A trained model ends with an RMS of 1, a random ε that ignores its input at 1/√ᾱ_T: about 14 to 20.
    assert rms(latents) < 14
    vae = s.checkpoint.load_vae()
    picture = vae.decode(latents / vae.config.scaling_factor).sample
    assert picture.shape[-1] == s.side * s.checkpoint.vae_scale_factor
    assert 0.1 < rms(picture) < 1.5


# --- the flags


def test_every_flag_ends_up_in_a_config(tmp_path: Path) -> None:
    flags = (
        "--seed 3 --vae-factor 8 --prediction v_prediction --projection resampler --id-tokens 5 "
        "--branch-pooled-text per_row --null-id file --subject-conditioning-ratio none --relocate-mode area "
        "--overlap priority --box-snap 32 --face-margin 1.5 --guidance-scale 4 --id-guidance-scale 2.5 "
        "--num-inference-steps 12 --no-force-zeros-for-empty-prompt"
    )
    assert main(["--out", str(tmp_path / "made"), *flags.split()]) == 0
    checkpoint = Checkpoint.open(tmp_path / "made")
    assert json.loads((tmp_path / "made" / "realisid_config.json").read_text()) == {
        "branch_pooled_text": "per_row", "null_id": "file", "subject_conditioning_ratio": None,
        "relocate_mode": "area", "overlap": "priority", "box_snap": 32, "face_margin": 1.5,
        "pose_style": "realisid-v1", "guidance_scale": 4.0, "id_guidance_scale": 2.5, "num_inference_steps": 12,
        "force_zeros_for_empty_prompt": False,
    }  # fmt: skip
    assert (checkpoint.vae_scale_factor, checkpoint.num_id_tokens) == (8, 5)
    assert checkpoint.scheduler_config["prediction_type"] == "v_prediction"
    assert checkpoint.components["id_projection"].config["class"] == "resampler"
    assert json.loads((tmp_path / "made" / "model_index.json").read_text())["_recipe"]["seed"] == 3
    file = tmp_path / "made" / "unet" / "diffusion_pytorch_model.safetensors"
    assert file.stat().st_mode & 0o044 == (tmp_path / "made").stat().st_mode & 0o044  # readable by whom the folder is


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"preset": "huge"}, "preset is 'huge', expected one of miniature, mid, sdxl"),
        ({"seed": -1}, "seed is -1, expected a whole number"),
        ({"family": "sd15", "preset": "mid"}, "preset mid has SDXL's shape. Use --family sdxl"),
        ({"preset": "sdxl", "vae_factor": 4}, "whose factor is 8. Leave --vae-factor out"),
        ({"projection": "linear", "id_tokens": 77}, "one token per image token: 65. Use --projection resampler"),
        ({"id_tokens": 0}, "id_tokens is 0, expected at least 1"),
        ({"box_snap": 5}, "box_snap is 5, expected 4 or 16"),
        ({"null_id": "nothing"}, "null_id is 'nothing', expected one of zero_image"),
        ({"vae_faktor": 4}, "unknown option vae_faktor. Known: box_snap"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(
    options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError) as caught:
        make_checkpoint(tmp_path / "made", **options)
    assert sentence in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_command_line_statuses_help_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made"
    assert main(["--out", str(out), "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["path"] == str(out) and last["bytes"] == sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    assert main(["--out", str(out)]) == 2  # taken
    assert capsys.readouterr().err.startswith(f"RequestError: {out} exists. Replace it with --force")
    (tmp_path / "file").touch()
    assert main(["--out", str(tmp_path / "file" / "made")]) == 1  # no folder can be made inside a file
    assert "could not be written" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["--out", str(out), "--prediction", "sample"])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "python -m export.miniature --out" in capsys.readouterr().out.rstrip().splitlines()[-1]


# --- other people's folders


def test_only_a_checkpoint_of_ours_is_replaced_and_only_when_asked(tmp_path: Path) -> None:
    out = make_checkpoint(tmp_path / "made")
    before = digests(out)
    with pytest.raises(RequestError, match="exists. Replace it with --force"):
        make_checkpoint(out, seed=1)
    assert digests(out) == before
    make_checkpoint(out, seed=1, force=True)
    assert digests(out) != before

    index = json.loads((out / "model_index.json").read_text())
    del index["_made_by"]  # now it could be somebody's trained model
    (out / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    for precious in (out, tmp_path / "notes", tmp_path / "notes" / "thesis.txt"):
        with pytest.raises(RequestError, match="never overwritten"):
            make_checkpoint(precious, force=True)
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    Checkpoint.open(make_checkpoint(tmp_path / "empty"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "made", "notes"]  # nothing left over


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_what_was_there(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make_checkpoint(tmp_path / "made")
    before = digests(out)
    calls = []

    def fail(folder: Path, *args: Any, **kwargs: Any) -> None:
        calls.append(folder)
        if len(calls) == 3:
            raise error
        write_weights(folder, *args, **kwargs)

    monkeypatch.setattr(miniature, "write_weights", fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DiskError):
        make_checkpoint(out, seed=1, force=True)
    assert digests(out) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["made"]


def test_the_disk_is_asked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(miniature.shutil, "disk_usage", lambda path: usage(10**11, 10**11 - 10**10, 10**10))
    with pytest.raises(DiskError, match=r"preset sdxl needs 13\.3 GB in .*, which has 10\.0 GB free\. Free some space"):
        make_checkpoint(tmp_path / "made", preset="sdxl")
    assert not list(tmp_path.iterdir())


# --- the tokenizer


def test_the_tokenizer_is_clips(checkpoints: dict[str, Checkpoint]) -> None:
    first, second = (checkpoints["default"].load_tokenizer(name) for name in ("tokenizer", "tokenizer_2"))
    vocabulary, _ = vocabulary_and_merges()
    assert vocabulary["!"] == 0 and vocabulary[END] == len(vocabulary) - 1  # pooling takes the highest id of a row
    assert len(set(byte_symbols())) == 256
    assert len(first("Two friends hiking, golden hour").input_ids) == 2 + 6  # a token for a common word
    padded = [t("a cat", padding="max_length").input_ids for t in (first, second)]
    assert len(padded[0]) == len(padded[1]) == 77
    assert padded[0][4:] == [vocabulary[END]] * 73 and padded[1][4:] == [0] * 73
    assert padded[0][3] == padded[1][3] == vocabulary[END]
    for prompt in ("naïve café 日本 🙂", "x" * 300, ""):
        ids = first(prompt, truncation=False).input_ids
        assert ids[0] == vocabulary["<|startoftext|>"] and ids[-1] == vocabulary[END]
        assert vocabulary[END] not in ids[1:-1]  # nothing is unknown to a byte-level tokenizer
    assert len(first("x" * 300, truncation=True).input_ids) == 77
    assert first("CAT").input_ids == first("cat").input_ids


def test_the_merges_are_plain_byte_pair_encoding() -> None:
    """Merging by rank with the written files gives what the words were trained to."""
    vocabulary, merges = vocabulary_and_merges()
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    assert len(ranks) == len(merges) and all(a + b in vocabulary and a in vocabulary for a, b in merges)
    pieces = [*"perso", "n</w>"]
    while True:
        pairs = list(zip(pieces, pieces[1:], strict=False))
        rank, i = min(((ranks.get(pair, math.inf), i) for i, pair in enumerate(pairs)), default=(math.inf, 0))
        if rank == math.inf:
            break
        pieces[i : i + 2] = ["".join(pairs[i])]
    assert pieces == ["person</w>"]
