"""The ID projection: image-encoder features → ID tokens, the `id_projection/` folder of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realisid_trt.checks import is_finite, is_whole
from realisid_trt.errors import CheckpointError

LINEAR_KEYS = ("input_dim", "output_dim", "num_tokens")
RESAMPLER_KEYS = ("dim", "depth", "dim_head", "heads", "num_queries", "embedding_dim", "output_dim", "ff_mult")


class LinearProjection(nn.Module):
    """One ID token per image token: LayerNorm(W·h + b), RealisID's "projection layer" read literally.

    features: (B, N, input_dim) float, `hidden_states[-2]` of the image encoder, CLS first.
    Returns   (B, N, output_dim).
    Keys: proj.weight, proj.bias, norm.weight, norm.bias.
    """

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(input_dim, output_dim)
        self.norm = nn.LayerNorm(output_dim)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.norm(self.proj(features))
        return projected


class QueryAttention(nn.Module):
    """The queries' attention: softmax(q·kᵀ/√d)·v over the image tokens *and* the queries themselves.

    features: (B, N, dim), queries: (B, Q, dim). Returns (B, Q, dim), without the residual sum.
    """

    def __init__(self, dim: int, dim_head: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)  # of the features
        self.norm2 = nn.LayerNorm(dim)  # of the queries
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, features: Tensor, queries: Tensor) -> Tensor:
        queries = self.norm2(queries)
        key, value = self.to_kv(torch.cat([self.norm1(features), queries], dim=1)).chunk(2, dim=-1)
        query = self.to_q(queries)
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value)  # (B, heads, Q, dim_head)
        out: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return out


class Resampler(nn.Module):
    """A fixed number of ID tokens: learned queries that read the image tokens `depth` times.

    Source: IP-Adapter-plus (tencent-ailab/IP-Adapter, ip_adapter/resampler.py, Apache-2.0). Key names and mathematics
    are the same, so that its weights load. InstantID's resampler has the same shape.
    features: (B, N, embedding_dim) float. Returns (B, num_queries, output_dim).
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        dim_head: int,
        heads: int,
        num_queries: int,
        embedding_dim: int,
        output_dim: int,
        ff_mult: int | float = 4,
    ) -> None:
        super().__init__()
        inner = int(dim * ff_mult)
        self.latents = nn.Parameter(torch.randn(1, num_queries, dim) / dim**0.5)
        self.proj_in = nn.Linear(embedding_dim, dim)
        self.proj_out = nn.Linear(dim, output_dim)
        self.norm_out = nn.LayerNorm(output_dim)
        # Positions in the lists are part of the key names: layers.N.0 attends, layers.N.1.{0,1,3} is the feed-forward.
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    QueryAttention(dim, dim_head, heads),
                    nn.Sequential(
                        nn.LayerNorm(dim),
                        nn.Linear(dim, inner, bias=False),
                        nn.GELU(),
                        nn.Linear(inner, dim, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, features: Tensor) -> Tensor:
        features = self.proj_in(features)
        queries = self.latents.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            queries = queries + layer[0](features, queries)
            queries = queries + layer[1](queries)
        tokens: Tensor = self.norm_out(self.proj_out(queries))
        return tokens


def projection_dims(config: Mapping[str, Any], source: str) -> tuple[int, int, int | None]:
    """(input dim, output dim, number of ID tokens or None) of an `id_projection/config.json`.

    None means "as many as the image encoder has tokens". Raises CheckpointError for an unknown class, and for a key
    that is missing, surplus or not a positive number.
    """
    kind = config.get("class")
    if kind not in ("linear", "resampler"):
        raise CheckpointError(f'{source}: class is {kind!r}, expected "linear" or "resampler". Correct the file.')
    keys = LINEAR_KEYS if kind == "linear" else RESAMPLER_KEYS
    optional = {"num_tokens", "ff_mult"}
    unknown = sorted(set(config) - set(keys) - {"class"})
    missing = sorted(set(keys) - optional - set(config))
    if unknown or missing:
        said = [f"unknown {', '.join(unknown)}"] * bool(unknown) + [f"missing {', '.join(missing)}"] * bool(missing)
        raise CheckpointError(
            f'{source}: {"; ".join(said)}. Keys of class "{kind}": {", ".join(keys)}. Correct the file.'
        )
    for key in keys:
        value = config.get(key, 1)
        if not (is_finite(value) if key == "ff_mult" else is_whole(value)) or value <= 0:
            raise CheckpointError(f"{source}: {key} is {value!r}, expected a positive number. Correct the file.")
    if kind == "linear":
        return config["input_dim"], config["output_dim"], config.get("num_tokens")
    return config["embedding_dim"], config["output_dim"], config["num_queries"]


def build_projection(config: Mapping[str, Any]) -> LinearProjection | Resampler:
    """The module of an `id_projection/config.json` that `projection_dims` accepts, with fresh weights."""
    if config["class"] == "linear":
        return LinearProjection(config["input_dim"], config["output_dim"])
    return Resampler(**{key: config[key] for key in RESAMPLER_KEYS if key in config})
