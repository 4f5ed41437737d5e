"""Claims about the ID projections and the null ID: IP-Adapter's mathematics, and what the config says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from safetensors.torch import load_file

from export.checkpoint import Checkpoint
from export.checkpoint.id_projection import LinearProjection, Resampler
from tests.export.checkpoint.bad_checkpoints import edit

# Key inside a layer of ours → of diffusers'.
RENAMED = {
    "0.norm1": "ln0", "0.norm2": "ln1", "0.to_q": "attn.to_q", "0.to_out": "attn.to_out.0",
    "1.0": "ff.0", "1.1": "ff.1.net.0.proj", "1.3": "ff.1.net.2",
}  # fmt: skip
# Some keys of IP-Adapter-plus's published files.
PUBLISHED = {
    "latents", "proj_in.weight", "proj_out.bias", "norm_out.weight", "layers.0.0.norm1.weight",
    "layers.0.0.to_q.weight", "layers.1.0.to_kv.weight", "layers.0.0.to_out.weight",
    "layers.1.1.0.bias", "layers.1.1.1.weight", "layers.1.1.3.weight",
}  # fmt: skip


def test_the_linear_projection_is_the_layer_norm_of_an_affine_map() -> None:
    module = LinearProjection(6, 4).double()
    features = torch.randn(2, 5, 6, dtype=torch.float64)
    affine = torch.einsum("bni,oi->bno", features, module.proj.weight) + module.proj.bias
    spread = affine.var(-1, unbiased=False, keepdim=True)
    expected = (affine - affine.mean(-1, keepdim=True)) / (spread + 1e-5).sqrt()
    assert torch.allclose(module(features), expected * module.norm.weight + module.norm.bias, rtol=0, atol=1e-12)


def test_the_resampler_is_ip_adapter_plus() -> None:
    """Its keys are the published ones, and diffusers' own module gives the same tokens with the same weights."""
    ours = Resampler(12, 2, 5, 3, 7, 9, 8, 2).double().eval()
    assert set(ours.state_dict()) >= PUBLISHED
    weights = {}
    for key, value in ours.state_dict().items():
        layers, layer, rest = key.split(".", 2) if key.startswith("layers.") else ("", "", key)
        if rest == "0.to_kv.weight":
            keys, values = value.chunk(2)
            weights |= {f"layers.{layer}.attn.to_k.weight": keys, f"layers.{layer}.attn.to_v.weight": values}
        elif layers:
            part, kind = rest.rsplit(".", 1)
            weights[f"layers.{layer}.{RENAMED[part]}.{kind}"] = value
        else:
            weights[key] = value
    theirs = IPAdapterPlusImageProjection(9, 8, 12, 2, 5, 3, 7, 2).double().eval()
    theirs.load_state_dict(weights)
    features = torch.randn(2, 11, 9, dtype=torch.float64)
    assert ours(features).shape == (2, 7, 8)
    assert torch.allclose(ours(features), theirs(features), rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_null_id_is_what_the_config_says(copy: Callable[..., Path], made: dict[str, Path]) -> None:
    folder = copy()
    c = Checkpoint.open(folder)
    features = c.load_image_encoder()(torch.zeros(1, 3, 64, 64), output_hidden_states=True).hidden_states[-2]
    assert torch.equal(c.null_id_tokens(), c.load_id_projection()(features)[0])
    edit(folder / "realisid_config.json", null_id="zero_tokens")
    assert torch.equal(Checkpoint.open(folder).null_id_tokens(), torch.zeros(65, 64))
    kept = load_file(made["file"] / "null_id.safetensors")["null_id_tokens"]
    assert torch.equal(Checkpoint.open(made["file"]).null_id_tokens(), kept) and kept.shape == (7, 64)
