"""Folders → torch modules: the only importer of diffusers' and transformers' loaders.

>>> checkpoint = Checkpoint.open("checkpoints/miniature")     # reads JSON and file headers, checks everything
>>> unet = checkpoint.load_unet(torch.float16)                # reads weights
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import CheckpointError
from realisid_trt.loop.samplers import NoiseSchedule

from .checks import check_all, check_steps, check_tokenizer
from .classes import (
    PROJECTIONS,
    Component,
    check_headers,
    check_keys,
    check_numbers,
    compare,
    component_of,
    ddim_config,
    diffusers_kind,
    full_config,
    module_class,
    quiet,
)
from .face_encoder import FaceEncoder, read_face_encoder
from .files import BRANCH, component_key, read_header, read_json, read_weights, readable
from .folders import Folders, tokenizer_of
from .id_projection import build_projection

__all__ = ["Checkpoint", "tokenizer_of"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose configs agree with each other; weights are read by the load_* methods.

    config:               realisid_config.json; box_snap is filled in.
    vae_scale_factor:     f, output pixels per latent cell.
    levels:               L, resolutions of the UNet.
    sample_size:          side of the latents that the UNet was trained on, and of the canvas for faces.
    residuals:            (channels, level) of every skip in the encoder's order, then of the mid block.
    pooled_dim:           P, width of the pooled text; 0 without added conditions.
    cross_attention_dim:  D, width of text and ID tokens. emb_dim: E, width of the time embedding.
    image_size, image_mean, image_std: of the image encoder's input, px and per colour; 0 and empty without one.
    face_encoder:         face_encoder/config.json, where `id_input` is "aligned_face".
    num_id_tokens:        T.
    scheduler_config:     of the DDIMScheduler, every key.
    base:                 folder of the base model, if something was taken from it; else None.
    """

    path: Path
    components: Mapping[str, Component] = field(repr=False)
    folders: Mapping[str, Path] = field(repr=False)
    scheduler_config: Mapping[str, Any] = field(repr=False)
    text_encoder_names: tuple[str, ...]
    config: RealisIDConfig
    vae_scale_factor: int
    levels: int
    sample_size: int
    latent_channels: int
    residuals: tuple[tuple[int, int], ...]
    has_added_conditions: bool
    pooled_dim: int
    cross_attention_dim: int
    emb_dim: int
    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    num_id_tokens: int
    face_encoder: FaceEncoder | None = None
    base: Path | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        base_model: str | Path | None = None,
        variant: str | None = None,
        local_files_only: bool = False,
    ) -> Checkpoint:
        """The checked checkpoint in the folder `path`.

        base_model:       folder or hub id for what the checkpoint lacks; None takes "base_model" of model_index.json,
                          which is relative to the checkpoint.
        variant:          of the weight files, e.g. "fp16"; a component without it uses its plain files.
        local_files_only: never ask the hub, only its local cache.
        Raises CheckpointError for everything that can be wrong without reading weights.
        """
        path = Path(path).absolute()
        with readable(path), _possible(path):
            folders = Folders(path, base_model, variant, local_files_only)
            realisid = RealisIDConfig.from_dict(
                read_json(path / "realisid_config.json", "it says what the weights were trained with"),
                source=str(path / "realisid_config.json"),
            )
            unet = component_of("unet", folders.find("unet"), variant)
            added = unet.config.get("addition_embed_type") == "text_time"
            texts = ("text_encoder", "text_encoder_2") if added else ("text_encoder",)
            components = {"unet": unet}
            for name in ("vae", *texts):
                components[name] = component_of(name, folders.find(name), variant)
            if realisid.id_input == "face_crop":
                components["image_encoder"] = component_of("image_encoder", folders.find("image_encoder"), variant)
            for branch in realisid.table:
                name = f"{BRANCH}{branch.name}"
                components[name] = component_of(name, folders.find(branch.folder, own=True), variant)
            for name in _projections(realisid):
                components[name] = component_of(name, folders.find(name, own=True), variant)
            face_encoder = None
            if realisid.id_input == "aligned_face":
                face_encoder = read_face_encoder(folders.find("face_encoder", own=True))
            ddim = ddim_config(folders.find("scheduler"))
            configs = {name: full_config(component) for name, component in components.items()}
            if realisid.id_input == "face_crop":
                extractor = folders.find("feature_extractor") / "preprocessor_config.json"
                configs["feature_extractor"] = read_json(extractor, "it says how photos are normalised")
            facts = check_all(configs, realisid, texts, face_encoder)
            for name in texts:
                check_tokenizer(folders.find(tokenizer_of(name)), configs[name])
            checkpoint = cls(
                path=path,
                components=components,
                folders=dict(folders.found),
                base=folders.base,
                scheduler_config=ddim,
                text_encoder_names=texts,
                face_encoder=face_encoder,
                **facts,
            )
            check_steps(realisid, ddim, checkpoint.noise_schedule)
            if realisid.null_id == "file" and realisid.id_input != "none":
                checkpoint._check_null_id_file()
        return checkpoint

    def check_weights(self) -> None:
        """Raises CheckpointError unless every part has the keys and shapes that its config asks for.

        Reads file headers only (seconds at full size): for the start of an hour-long build. The load_* methods check
        the same, and also the values.
        """
        with readable(self.path):
            for component in self.components.values():
                check_headers(component)

    @property
    def feature_extractor(self) -> dict[str, Any]:
        """How a photo becomes the image encoder's input, as JSON values: image_size, image_mean and image_std."""
        return {
            "image_size": self.image_size,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }

    @property
    def max_length(self) -> int:
        """Tokens of a prompt, 77 for CLIP."""
        length: int = full_config(self.components[self.text_encoder_names[0]])["max_position_embeddings"]
        return length

    @property
    def has_patches(self) -> bool:
        """Whether a branch is shown the patches of IDs, which `id_patch_projection/` makes."""
        return "id_patch_projection" in self.components

    def token_limits(self, persons: int) -> tuple[int, int] | None:
        """Least and most tokens of a row that reads the text and the IDs of up to `persons` persons; None if none does.

        They are max_length and max_length + T·persons: equal for an engine without persons.
        """
        if self.config.unet_tokens != "text_and_id":
            return None
        return self.max_length, self.max_length + self.num_id_tokens * persons

    def text_encoder_dims(self, name: str) -> tuple[int, int]:
        """Widths of a text encoder's hidden states and of its pooled output."""
        config = full_config(self.components[name])
        projected = self.components[name].class_name == "CLIPTextModelWithProjection"
        return config["hidden_size"], config["projection_dim" if projected else "hidden_size"]

    def weights_bytes(self, component: str) -> int:
        """Size of a component's weight files."""
        with readable(self.path):
            return sum(file.stat().st_size for file in self.components[component].files)

    def elements(self, component: str) -> dict[str, int]:
        """The number of elements of each of a component's weights, by key. Reads headers only."""
        with readable(self.path):
            headers = [read_header(file) for file in self.components[component].files]
        return {name: math.prod(shape) for header in headers for name, (_, shape) in header.items()}

    def load_unet(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The UNet2DConditionModel, in evaluation mode and without gradients, as all load_* give it."""
        return self._load("unet", dtype)

    def load_vae(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The AutoencoderKL."""
        return self._load("vae", dtype)

    def load_text_encoder(self, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """One of `text_encoder_names`: a CLIPTextModel or CLIPTextModelWithProjection."""
        assert name in self.text_encoder_names, name
        return self._load(name, dtype)

    def load_image_encoder(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The CLIPVisionModelWithProjection; the ID projection reads its hidden_states[-2]."""
        return self._load("image_encoder", dtype)

    def load_controlnet(self, which: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The ControlNetModel of the branch with this name."""
        return self._load(f"{BRANCH}{which}", dtype)

    def load_id_projection(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A LinearProjection or a Resampler: (B, N, hidden) → (B, T, D); of an embedding, N is 1."""
        return self._load_projection("id_projection", dtype)

    def load_patch_projection(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The Resampler of patches: an embedding (B, 1, hidden) → (B, 3, p²), one query a colour, row-major."""
        return self._load_projection("id_patch_projection", dtype)

    def _load_projection(self, name: str, dtype: torch.dtype) -> nn.Module:
        component = self.components[name]
        with torch.device("meta"):
            module = build_projection(component.config)
        weights = read_weights(component.files)
        shapes = {key: tuple(value.shape) for key, value in weights.items()}
        check_keys(component, *compare(shapes, {key: tuple(value.shape) for key, value in module.state_dict().items()}))
        module.load_state_dict({key: value.to(dtype) for key, value in weights.items()}, assign=True)
        check_numbers(component, module)
        return module.eval().requires_grad_(False)

    def load_scheduler(self) -> Any:
        """The DDIMScheduler of `scheduler_config`."""
        from diffusers import DDIMScheduler

        with quiet():
            return DDIMScheduler.from_config(dict(self.scheduler_config))  # type: ignore[no-untyped-call]

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The noise schedule, as an engine has it."""
        scheduler = self.load_scheduler()
        return NoiseSchedule(
            alphas_cumprod=scheduler.alphas_cumprod.double().numpy(),
            final_alpha_cumprod=float(scheduler.final_alpha_cumprod),
            timestep_spacing=scheduler.config.timestep_spacing,
            steps_offset=scheduler.config.steps_offset,
            prediction_type=scheduler.config.prediction_type,
        )

    def tokenizer_folder(self, name: str) -> Path:
        """The tokenizer's folder; `name` is the tokenizer's or its text encoder's."""
        return self.folders[tokenizer_of(name)]

    def load_tokenizer(self, name: str) -> Any:
        """The CLIPTokenizer, from the files that the folder has; `name` as in `tokenizer_folder`.

        Its backend_tokenizer.to_str() is the tokenizer.json that folders with vocab.json and merges.txt lack.
        """
        from transformers import CLIPTokenizer

        folder = self.tokenizer_folder(name)
        try:
            with quiet():
                return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise CheckpointError(f"{folder} is not a CLIP tokenizer: {error}. Copy its files again.") from error

    @torch.no_grad()
    def null_id_tokens(self) -> Tensor:
        """(T, D) float32: the ID tokens of a dropped ID, by the checkpoint's `null_id`.

        zero_image: projection of the image encoder's features of a zero *normalised* image, which is the mean colour,
        not black (IP-Adapter's way). zero_embedding: projection of an embedding of zeros, which is not zero (biases,
        queries). zero_tokens: zeros. file: null_id.safetensors.
        """
        if self.config.null_id == "file":
            file = self.path / "null_id.safetensors"
            tokens = read_weights([file])["null_id_tokens"].float()
            if not torch.isfinite(tokens).all():
                raise CheckpointError(f"{file}: null_id_tokens holds NaN or infinite numbers. Copy the file again.")
            return tokens
        if self.config.null_id == "zero_tokens":
            return torch.zeros(self.num_id_tokens, self.cross_attention_dim)
        if self.face_encoder is not None:
            of_zero: Tensor = self.load_id_projection()(torch.zeros(1, 1, self.face_encoder.output_dim))[0]
            return of_zero
        zero = torch.zeros(1, 3, self.image_size, self.image_size)
        features = self.load_image_encoder()(zero, output_hidden_states=True).hidden_states[-2]
        projected: Tensor = self.load_id_projection()(features)[0]
        return projected

    def weights_key(self, component: str) -> str:
        """sha256 over all that a component's export depends on: its config and the contents of its weight files.

        component: a folder of the layout, or "null_id" for the null ID's tokens. File hashes are remembered, between
                   processes too (realisid_trt.files.VerifiedFiles).
        """
        with readable(self.path):
            if component == "null_id":
                file = [self.path / "null_id.safetensors"] if self.config.null_id == "file" else []
                makers = [name for name in ("image_encoder", "id_projection") if name in self.components]
                parts = {name: self.weights_key(name) for name in makers}
                return component_key({"null_id": self.config.null_id, **(parts if not file else {})}, file)
            if component == "scheduler":
                return component_key(self.scheduler_config, [])
            if component in self.components:
                return component_key(self.components[component].config, self.components[component].files)
            return component_key({}, sorted(file for file in self.folders[component].iterdir() if file.is_file()))

    def _load(self, name: str, dtype: torch.dtype) -> nn.Module:
        component = self.components[name]
        kind = "torch_dtype" if diffusers_kind(name) is not None else "dtype"
        try:
            with quiet():
                module, info = module_class(component.class_name).from_pretrained(
                    component.folder,
                    **{kind: dtype},
                    variant=component.variant,
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # reported with the other keys below, not by an exception
                )
        except MemoryError:
            raise
        except Exception as error:  # a library's exception for a config or a file that it cannot use
            raise CheckpointError(
                f"{component.folder} could not be loaded as {component.class_name}: {error}. Copy the folder again, or "
                "correct its config.json."
            ) from error
        check_keys(component, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
        loaded: nn.Module = module.eval().requires_grad_(False)
        check_numbers(component, loaded)
        return loaded

    def _check_null_id_file(self) -> None:
        file = self.path / "null_id.safetensors"
        shape = (self.num_id_tokens, self.cross_attention_dim)
        if not file.is_file():
            raise CheckpointError(
                f'{file} is missing, and realisid_config.json says null_id "file". Expected the key null_id_tokens of '
                f'shape {shape}. Copy the file, or set null_id to "zero_image" if the model was trained so.'
            )
        found = {key: entry[1] for key, entry in read_header(file).items()}
        if found != {"null_id_tokens": shape}:
            raise CheckpointError(
                f"{file} holds {found}, expected the one key null_id_tokens of shape {shape} (ID tokens, width). "
                "Save it like that."
            )


def _projections(config: RealisIDConfig) -> tuple[str, ...]:
    """The folders of the projections that a checkpoint needs."""
    if config.id_input == "none":
        return ()
    shown = any(branch.condition == "id_patches" for branch in config.table)
    return PROJECTIONS if shown else PROJECTIONS[:1]


@contextmanager
def _possible(path: Path) -> Iterator[None]:
    """Turns the exceptions of values that no check covers into a CheckpointError."""
    try:
        yield
    except (TypeError, KeyError, IndexError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path}: a config.json has a value of an impossible kind ({type(error).__name__}: {error}). Compare the "
            "configs with those of the base model."
        ) from error
