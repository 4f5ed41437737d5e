"""One flat-signature wrapper per network of the engine: the traced module, with its inputs and outputs in spec order.

The UNet is cut where the ControlNets' residuals enter: diffusers adds them to the skips after the last down block and
to the mid block's output, so the encoder half (conv_in, down blocks, mid block) never gets them. Time and condition
embeddings are networks of their own: they do not change over the steps, and no per-step graph holds a sinusoid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from realisid_trt.branches import tokens_input

from .checkpoint import Checkpoint
from .checkpoint.face_encoder import FaceEncoder
from .checkpoint.vae import from_latents
from .id_encoders import EmbeddingEncoder, IdEncoder


@dataclass(frozen=True)
class Size:
    """A dynamic dimension: `factor` times a unit.

    Units: "rows", "timesteps" (rows of the time networks), "tokens" (of text and IDs together), and "height", "width"
    in cells of the coarsest level.
    """

    unit: str
    factor: int = 1


@dataclass(frozen=True)
class Port:
    """An input or output of a network. dtype None: the precision of the network. unit: its vectors have length 1."""

    name: str
    shape: tuple[int | Size, ...]
    dtype: torch.dtype | None = None
    unit: bool = False


@dataclass(frozen=True)
class Network:
    """A network that is exported as one file.

    components: the checkpoint folders whose weights it holds (for the build's cache key).
    module:     makes the torch module with this flat signature, in a given dtype.
    only, without: beginnings of the names of the weights that it holds, or leaves out; empty: all, or none.
    """

    name: str
    components: tuple[str, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    module: Callable[[torch.dtype], nn.Module]
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def elements(self, checkpoint: Checkpoint) -> int:
        """The number of elements of its weights."""
        return sum(
            count
            for component in self.components
            for name, count in checkpoint.elements(component).items()
            if name.startswith(self.only or ("",)) and not name.startswith(self.without)
        )


# Parts of a UNet and of a ControlNet that are networks of their own.
TIME = ("time_embedding.", "add_embedding.")
CONDITION = ("controlnet_cond_embedding.",)
NOT_IN_BRANCH = (*CONDITION, *TIME)
NOT_IN_ENCODER = ("up_blocks.", "conv_norm_out.", "conv_out.", *TIME)
NOT_IN_DECODER = ("conv_in.", "down_blocks.", "mid_block.", *TIME)
IN_VAE_DECODER = ("decoder.", "post_quant_conv.")

ROWS = Size("rows")


def networks(checkpoint: Checkpoint) -> dict[str, Network]:
    """Every network of an engine, by name, from the text encoders to the VAE's decoder. DESIGN.md, "Networks"."""
    c = checkpoint
    coarsest = 2 ** (c.levels - 1)
    height, width = Size("height", coarsest), Size("width", coarsest)
    canvas = c.sample_size
    skip_names = [f"skip_{i}" for i in range(len(c.residuals) - 1)] + ["skip_mid"]
    residual_names = [name.replace("skip", "residual") for name in skip_names]

    def maps(names: list[str], on_canvas: bool) -> tuple[Port, ...]:
        return tuple(
            Port(name, (ROWS, channels, *((canvas >> level,) * 2 if on_canvas else _at(level, coarsest))))
            for name, (channels, level) in zip(names, c.residuals, strict=True)
        )

    emb = Port("emb", (ROWS, c.emb_dim))
    counts = {"text": c.max_length, "id": c.num_id_tokens, "text_and_id": Size("tokens")}
    tokens = {kind: Port(tokens_input(kind), (ROWS, count, c.cross_attention_dim)) for kind, count in counts.items()}
    unet_tokens = tokens[c.config.unet_tokens]
    latents = Port("latents", (ROWS, c.latent_channels, height, width))
    canvas_latents = Port("latents", (ROWS, c.latent_channels, canvas, canvas))
    timesteps = Size("timesteps")
    time_inputs = (Port("timestep", (timesteps,), torch.float32),)
    if c.has_added_conditions:
        time_inputs += (Port("pooled", (timesteps, c.pooled_dim)), Port("time_ids", (timesteps, 6), torch.float32))
    time_outputs = (Port("emb", (timesteps, c.emb_dim)),)

    found: list[Network] = []
    for name in c.text_encoder_names:
        hidden, pooled = c.text_encoder_dims(name)
        found.append(
            Network(
                name,
                (name,),
                (Port("input_ids", (ROWS, c.max_length), torch.int64),),
                (Port("hidden_states", (ROWS, c.max_length, hidden)), Port("pooled", (ROWS, pooled))),
                lambda dtype, name=name: TextEncoder(c.load_text_encoder(name, dtype), c.has_added_conditions),
            )
        )
    if c.config.id_input == "face_crop":
        found.append(
            Network(
                "id_encoder",
                ("image_encoder", "id_projection"),
                (Port("id_pixels", (ROWS, 3, c.image_size, c.image_size)),),
                (tokens["id"],),
                lambda dtype: IdEncoder(c.load_image_encoder(dtype), c.load_id_projection(dtype)),
            )
        )
    if c.face_encoder is not None:
        found.append(_of_embeddings(c, c.face_encoder, tokens["id"]))
    for branch in c.config.table:
        on_canvas = branch.view == "face"
        size: tuple[int | Size, int | Size] = (canvas, canvas) if on_canvas else (height, width)
        shown = Port(branch.condition_input, (ROWS, branch.channels, *(_px(side, c.vae_scale_factor) for side in size)))
        condition = Port("condition", (ROWS, c.residuals[0][0], *size))
        component = (f"controlnet_{branch.name}",)
        load = _loader(c.load_controlnet, branch.name)
        found += [
            Network(
                f"{branch.name}_condition", component, (shown,), (condition,), _wrap(Condition, load), only=CONDITION
            ),
            Network(f"{branch.name}_time", component, time_inputs, time_outputs, _wrap(TimeEmbedding, load), only=TIME),
            Network(
                f"{branch.name}_branch",
                component,
                (canvas_latents if on_canvas else latents, emb, tokens[branch.tokens], condition),
                maps(residual_names, on_canvas),
                _wrap(Branch, load),
                without=NOT_IN_BRANCH,
            ),
        ]
    skips = maps(skip_names, False)
    found += [
        Network("unet_time", ("unet",), time_inputs, time_outputs, _wrap(TimeEmbedding, c.load_unet), only=TIME),
        Network(
            "unet_encoder",
            ("unet",),
            (latents, emb, unet_tokens),
            skips,
            _wrap(UNetEncoder, c.load_unet),
            without=NOT_IN_ENCODER,
        ),
        Network(
            "unet_decoder",
            ("unet",),
            (*skips, emb, unet_tokens),
            (Port("noise_pred", latents.shape),),
            _wrap(UNetDecoder, c.load_unet),
            without=NOT_IN_DECODER,
        ),
        Network(
            "vae_decoder",
            ("vae",),
            (latents,),
            (Port("image", (ROWS, 3, *(Size(s.unit, s.factor * c.vae_scale_factor) for s in (height, width)))),),
            _wrap(VaeDecoder, c.load_vae),
            only=IN_VAE_DECODER,
        ),
    ]
    return {network.name: network for network in found}


def _of_embeddings(c: Checkpoint, encoder: FaceEncoder, id_tokens: Port) -> Network:
    """The ID encoder behind a face encoder: its embedding as ID tokens and, where a branch is shown it, as a patch."""
    components, outputs, side = ["id_projection"], [id_tokens], c.config.patch_px
    if c.has_patches:
        assert side is not None
        components.append("id_patch_projection")
        outputs.append(Port("id_patch", (ROWS, 3, side, side)))
    return Network(
        "id_encoder",
        tuple(components),
        (Port("embedding", (ROWS, 1, encoder.output_dim), unit=encoder.norm == "unit"),),
        tuple(outputs),
        lambda dtype: EmbeddingEncoder(
            c.load_id_projection(dtype), c.load_patch_projection(dtype) if c.has_patches else None, side
        ),
    )


def _at(level: int, coarsest: int) -> tuple[Size, Size]:
    return Size("height", coarsest >> level), Size("width", coarsest >> level)


def _px(cells: int | Size, factor: int) -> int | Size:
    """A side in px, of one in latent cells."""
    return Size(cells.unit, cells.factor * factor) if isinstance(cells, Size) else cells * factor


def _loader(load: Callable[[str, torch.dtype], nn.Module], name: str) -> Callable[[torch.dtype], nn.Module]:
    return lambda dtype: load(name, dtype)


def _wrap(wrapper: type[nn.Module], load: Callable[[torch.dtype], nn.Module]) -> Callable[[torch.dtype], nn.Module]:
    return lambda dtype: wrapper(load(dtype)).eval()


class TextEncoder(nn.Module):
    """input_ids (R, T) int64 → hidden states (R, T, D), pooled (R, P).

    SDXL conditions on the penultimate layer of both encoders, SD 1.5 on the last one after its LayerNorm.
    """

    def __init__(self, encoder: nn.Module, penultimate: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.penultimate = penultimate

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self.encoder(input_ids, output_hidden_states=self.penultimate)
        hidden_states = out.hidden_states[-2] if self.penultimate else out.last_hidden_state
        return hidden_states, out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output


class Condition(nn.Module):
    """The drawing, mask, image or patches (R, C, H, W) of a branch → Z(c; Θ_z1) at latent size, Eqs. (3) and (6)."""

    def __init__(self, controlnet: nn.Module) -> None:
        super().__init__()
        self.embedding = controlnet.controlnet_cond_embedding

    def forward(self, image: Tensor) -> Tensor:
        return self.embedding(image)


class Sinusoids(nn.Module):
    """diffusers' `Timesteps` with torch's own frequencies as a constant: (K,) → (K, F) float32.

    An exporter that computes their exponential rounds it differently, and a timestep of 1000 multiplies the difference
    by 1000.
    """

    def __init__(self, timesteps: nn.Module) -> None:
        super().__init__()
        half = timesteps.num_channels // 2
        exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - timesteps.downscale_freq_shift)
        self.register_buffer("frequencies", timesteps.scale * torch.exp(exponents), persistent=False)
        self.cosine_first = timesteps.flip_sin_to_cos

    def forward(self, values: Tensor) -> Tensor:
        angles = values[:, None] * self.frequencies
        sine, cosine = torch.sin(angles), torch.cos(angles)
        return torch.cat([cosine, sine] if self.cosine_first else [sine, cosine], dim=-1)


class TimeEmbedding(nn.Module):
    """timestep (K,), pooled (K, P), time_ids (K, 6) → emb (K, E): time + added conditions, before the first SiLU."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.time_proj, self.time_embedding = Sinusoids(model.time_proj), model.time_embedding
        self.add_embedding = getattr(model, "add_embedding", None)
        self.add_time_proj = Sinusoids(model.add_time_proj) if self.add_embedding is not None else None

    def forward(self, timestep: Tensor, pooled: Tensor | None = None, time_ids: Tensor | None = None) -> Tensor:
        emb = self.time_embedding(self._narrow(self.time_proj(timestep)))
        if self.add_embedding is None:
            return emb
        sinusoids = self._narrow(self.add_time_proj(time_ids.flatten()).reshape(time_ids.shape[0], -1))
        return emb + self.add_embedding(torch.cat([pooled, sinusoids], dim=-1))

    def _narrow(self, sinusoids: Tensor) -> Tensor:
        """The sinusoids in the weights' precision, as diffusers casts them. float64 stays, for the exact outputs."""
        return (
            sinusoids if sinusoids.dtype == torch.float64 else sinusoids.to(self.time_embedding.linear_1.weight.dtype)
        )


class Branch(nn.Module):
    """i_t of one branch, Eqs. (5) and (6), with Z(c) precomputed: latents, emb, tokens, condition → residuals."""

    def __init__(self, controlnet: nn.Module) -> None:
        super().__init__()
        _drop(controlnet, NOT_IN_BRANCH)
        self.controlnet = controlnet

    def forward(self, latents: Tensor, emb: Tensor, tokens: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        net = self.controlnet
        *skips, mid = _encode(net, net.conv_in(latents) + condition, emb, tokens)
        residuals = [zero(skip) for zero, skip in zip(net.controlnet_down_blocks, skips, strict=True)]
        return *residuals, net.controlnet_mid_block(mid)


class UNetEncoder(nn.Module):
    """latents, emb, tokens → the skips and the mid block's output."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        _drop(unet, NOT_IN_ENCODER)
        self.unet = unet

    def forward(self, latents: Tensor, emb: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        return _encode(self.unet, self.unet.conv_in(latents), emb, tokens)


class UNetDecoder(nn.Module):
    """Merged skips, merged mid, emb, tokens → noise_pred. The last input but two is the mid block's output."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        _drop(unet, NOT_IN_DECODER)
        self.unet = unet

    def forward(self, *inputs: Tensor) -> Tensor:
        *skips, hidden, emb, tokens = inputs
        unet = self.unet
        for block in unet.up_blocks:
            count = len(block.resnets)
            block_skips, skips = tuple(skips[-count:]), skips[:-count]
            text = {"encoder_hidden_states": tokens} if getattr(block, "has_cross_attention", False) else {}
            hidden = block(hidden_states=hidden, temb=emb, res_hidden_states_tuple=block_skips, **text)
        if unet.conv_norm_out is not None:
            hidden = unet.conv_act(unet.conv_norm_out(hidden))
        return unet.conv_out(hidden)


class VaeDecoder(nn.Module):
    """The sampler's final latents → image (R, 3, H, W), about [-1, 1]; the VAE's scaling is undone here."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        dtype = next(vae.parameters()).dtype
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        shift = from_latents(0 * one, vae.config)
        scale = from_latents(one, vae.config) - shift
        self.register_buffer("scale", scale.to(dtype), persistent=False)
        self.register_buffer("shift", shift.to(dtype), persistent=False)
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        latents = latents * self.scale + self.shift
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)


def _encode(net: nn.Module, hidden: Tensor, emb: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """conv_in's output → the skips of every down block, and the mid block's output."""
    skips = [hidden]
    for block in net.down_blocks:
        text = {"encoder_hidden_states": tokens} if getattr(block, "has_cross_attention", False) else {}
        hidden, outputs = block(hidden_states=hidden, temb=emb, **text)
        skips += outputs
    if net.mid_block is not None:
        text = {"encoder_hidden_states": tokens} if getattr(net.mid_block, "has_cross_attention", False) else {}
        hidden = net.mid_block(hidden, emb, **text)
    return *skips, hidden


def _drop(module: nn.Module, parts: tuple[str, ...]) -> None:
    """Frees the parts of a model that this network does not hold."""
    for name in (part.removesuffix(".") for part in parts):
        if getattr(module, name, None) is not None:
            setattr(module, name, None)
