"""Claims about the bytes of a checkpoint: the same seed gives them again, every tensor has its own stream."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from export.checkpoint import Checkpoint
from export.miniature import make_checkpoint
from export.miniature.weights import draw, write_weights
from tests.export.miniature.digests import digests

ROOT = Path(__file__).resolve().parents[3]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    first = digests(checkpoints["default"].path)
    torch.manual_seed(123)  # the random state of the process must not matter
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
    """This holds for the text encoder too, whose keys transformers renames while it loads."""
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
