"""The GPU memory that an engine needs: counted from its manifest, before a picture is asked for.

    normal = weights of all networks + arena + max(scratch of the plans, peak of the VAE decoder)
    low    = arena + the largest stage: its weights + its scratch, or a tile's peak of the VAE decoder

ONNX Runtime's arena does not shrink: with it, low = arena + the largest weights of a stage + the largest work memory.

Scratch and the VAE's activations lie in one memory, because networks run one after another. No GPU is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backends.counting import CountingBackend
from .backends.tensorrt_flavours import FLAVOURS
from .branches import Branch
from .checks import whole
from .errors import RequestError
from .loop.controls import Setting
from .loop.drafts import Draft
from .loop.outcomes import Stopwatch
from .loop.passes import Passes
from .loop.picture import decode
from .loop.prologue import Prologue
from .loop.prompt import TextEmbedding
from .loop.stages import networks_of_stages
from .manifest import Axis, Build, Manifest
from .persons.person import Person
from .request import Request

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Size:
    """Pictures of one batch, persons of each, and the side of a picture in px."""

    batch: int
    persons: int
    resolution: int

    def __str__(self) -> str:
        parts = (self.batch, "picture"), (self.persons, "person")
        counted = ", ".join(f"{count} {name}{'s' * (count != 1)}" for count, name in parts)
        return f"{counted}, {self.resolution} px"

    @classmethod
    def asked(
        cls, manifest: Manifest, batch: int | None = None, persons: int | None = None, resolution: int | None = None
    ) -> Size:
        """The size with defaults filled in: one picture of one person, as large as those the model was trained on.

        Raises RequestError for an impossible number.
        """
        given = {"batch": (batch, 1, 1), "persons": (persons, 1, 0), "resolution": (resolution, None, 1)}
        for name, (value, _, least) in given.items():
            if value is not None and (whole(value) is None or value < least):
                raise RequestError(f"{name} is {value!r}, expected a whole number of at least {least}.")
        limits = cls.largest(manifest)
        usual = 1 if limits is None else min(1, limits.persons)  # an engine may be built for nobody
        return cls(
            1 if batch is None else batch,
            usual if persons is None else persons,
            manifest.model.default_size if resolution is None else resolution,
        )

    @classmethod
    def largest(cls, manifest: Manifest) -> Size | None:
        """The size that the engine was built for; None for an engine of an earlier version, which does not say."""
        limits = manifest.values.get("built_for")
        return None if limits is None else cls(**limits)


@dataclass(frozen=True)
class Needs:
    """GPU memory of one build for batches of one size, in bytes.

    weights:  of the networks of each stage; what no stage runs is under "other". Of an ONNX file its size, of a plan
              the size of its tensors.
    arena:    latents, embeddings, conditions, skips, residuals, merged skips, tables: the runtime's own arrays, of the
              requests and of the pass that they share.
    scratch:  of the plans, by network, at the largest sizes that they were built for; None if no GPU has run them, and
              for ONNX Runtime, which does not say.
    vae:      the largest live activations of the VAE decoder, float32, nothing fused; None for an engine of an earlier
              version. Work memory of convolutions is not in it.
    low_arena, low_vae: the same with memory="low", where large pictures are decoded in tiles.
    shrinks:  whether work memory is given back after its stage. ONNX Runtime keeps it for the next request.
    """

    build: str
    size: Size
    weights: Mapping[str, int]
    arena: int
    scratch: Mapping[str, int] | None
    vae: int | None
    low_arena: int
    low_vae: int | None
    shrinks: bool

    @property
    def loop_weights(self) -> int:
        return self.weights["denoise"]

    @property
    def other_weights(self) -> int:
        return sum(self.weights.values()) - self.loop_weights

    @property
    def normal(self) -> int:
        """Bytes needed with all networks loaded: at least this where scratch is None."""
        return sum(self.weights.values()) + self.arena + max(self.vae or 0, *(self.scratch or {"": 0}).values())

    @property
    def low(self) -> int:
        """Bytes needed with memory="low"."""
        scratch = max((self.scratch or {"": 0}).values())
        vae = self.low_vae or 0
        work = {stage: scratch if self.shrinks else max(scratch, vae) for stage in self.weights}
        work["vae"] = max(scratch, vae)
        loaded = {stage: nbytes for stage, nbytes in self.weights.items() if stage != "other"}
        return self.low_arena + max(nbytes + work[stage] for stage, nbytes in loaded.items())

    def as_json(self) -> dict[str, Any]:
        names = ("build", "loop_weights", "other_weights", "arena", "vae", "normal", "low")
        scratch = None if self.scratch is None else max(self.scratch.values())
        return {**{name: getattr(self, name) for name in names}, "scratch": scratch, "size": vars(self.size)}


def gpu_builds(manifest: Manifest) -> list[Build]:
    """The builds of an engine that run on a GPU."""
    return [build for build in manifest.builds.values() if build.device == "cuda"]


def needs(manifest: Manifest, build: Build, size: Size) -> Needs:
    """The GPU memory of a build for batches of this size. Raises ShapeError for more than the engine was built for."""
    model, cells = manifest.model, size.resolution // manifest.model.vae_scale_factor
    vae, tile = manifest.values.get("vae"), min(cells, model.sample_size)
    return Needs(
        build=build.id,
        size=size,
        weights=weights_bytes(manifest, build),
        arena=arena_bytes(manifest, build, size),
        scratch=manifest.values["verified"].get(build.id, {}).get("scratch_bytes"),
        vae=None if vae is None else vae_peak_bytes(vae, cells, cells),
        low_arena=arena_bytes(manifest, build, size, model.sample_size),
        low_vae=None if vae is None else vae_peak_bytes(vae, tile, tile),
        shrinks=build.backend in FLAVOURS,
    )


def weights_bytes(manifest: Manifest, build: Build) -> dict[str, int]:
    """Bytes of the weights that each stage loads; what no stage runs is under "other"."""
    sizes = {name: _weights(network["builds"][build.id]) for name, network in manifest.values["networks"].items()}
    stages = networks_of_stages(manifest)
    found = {stage: sum(sizes[name] for name in names) for stage, names in stages.items()}
    return found | {"other": sum(sizes.values()) - sum(found.values())}


def _weights(entry: Mapping[str, Any]) -> int:
    proof = entry.get("proof")  # a plan holds code for several GPUs beside its weights
    return int(entry["bytes"] if proof is None else sum(proof["weights_bytes"].values()))


def arena_bytes(manifest: Manifest, build: Build, size: Size, tile: int | None = None) -> int:
    """Bytes of all arrays of a batch in which every picture has texts and persons of its own.

    The batch is made by the stages themselves, with a backend that only counts. So this is what a GPU's backend
    allocates. tile: as for `decode`. Raises ShapeError.
    """
    backend, model = CountingBackend(manifest, build), manifest.model
    prologue = Prologue(manifest, backend, share_rows=True)
    sampler, grid = prologue.sampler_table(None, None), prologue.grid(size.resolution, size.resolution)
    table, request = manifest.config.table, Request("", [Person("")] * size.persons)
    given = tuple(
        Setting(1.0, branch.start, branch.end, _zeros(1) if branch.per == "picture" else None, (True,) * size.persons)
        for branch in table
    )
    texts = [(((2 * picture,),), ((2 * picture + 1,),)) for picture in range(size.batch)]
    drafts = [Draft(request, 0, pair, None, given) for pair in texts]
    prologue.planner.plan(drafts, sampler, grid)  # refuses what is too large
    # Begun stage by stage, as by `Beginning`.
    works = [prologue.work(draft, sampler, grid, Stopwatch()) for draft in drafts]
    text = TextEmbedding.zeros(
        next(iter(model.tokenizers.values())).max_length, model.cross_attention_dim, model.pooled_dim
    )
    id_shape = model.num_id_tokens, model.cross_attention_dim
    for work in works:
        work.boxes = _zeros(size.persons, model.levels, 4, dtype=np.int32)
        if manifest.config.id_input != "none":
            work.id_tokens = _zeros(size.persons, *id_shape)
        work.texts = [text] * len(work.plan.texts.distinct)
    for work in works:
        backend.start_request()
        prologue.embed_times(work)
    for work in works:
        backend.start_request()
        for branch, evaluated in zip(table, work.plan.evaluated, strict=True):
            subjects = size.persons if branch.per == "person" else 1
            shown = _condition(manifest, build, backend, branch, subjects, size.resolution) if evaluated else None
            work.conditions.append(shown)
        prologue.place_latents(work, _zeros(1, model.latent_channels, *grid.size(0)), previews=False)
    null = None if manifest.config.id_input == "none" else _zeros(*id_shape)
    passes = Passes(manifest.config, backend, prologue.planner, null)
    for work in works:
        work.owner = passes.token
    for _ in range(works[0].steps):
        passes.step(works)
    for work in works:
        latents = passes.latents(work)
        backend.start_request()
        for _ in decode(backend, latents, tile):
            pass
        passes.drop(work)
    return backend.arena_bytes


def _condition(
    manifest: Manifest, build: Build, backend: CountingBackend, branch: Branch, subjects: int, side_px: int
) -> Any:
    """What `Prologue.embed_conditions` keeps of a branch, without drawing a picture for each subject."""
    name = f"{branch.name}_condition"
    [source] = manifest.networks(build)[name].inputs
    sides = {"rows": subjects, "height": side_px, "width": side_px}
    shape = tuple(sides[axis.name] if isinstance(axis, Axis) else axis for axis in source.shape)
    fed = {source.name: backend.put(_zeros(*shape), for_networks=True)}
    return backend.keep(backend.run(name, fed)["condition"])


def _zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return np.broadcast_to(np.zeros((), dtype), shape)


def vae_peak_bytes(vae: Mapping[str, Any], height: int, width: int) -> int:
    """The most bytes of activations that live at one time in the decoder of diffusers' AutoencoderKL, float32, if every
    operation writes a new array: nothing is fused, nothing is done in place, attention keeps its scores.

    vae:           its block_out_channels, layers_per_block and mid_block_add_attention.
    height, width: of the latents, in cells.

    A resnet of c → d channels has in turn: x, norm, SiLU (3c); x, SiLU, conv (2c + d); x, norm, SiLU or shortcut
    (c + 2d). Attention over n cells of c channels: x, q, k, v, scaled q and k, scores, softmax (6cn + 2n²).
    """
    widths, cells = list(reversed(vae["block_out_channels"])), height * width

    def resnet(source: int, target: int) -> int:
        return max(3 * source, 2 * source + target, source + 2 * target) * cells

    channels = widths[0]
    peaks = [resnet(channels, channels)]  # the mid block
    if vae["mid_block_add_attention"]:
        peaks.append(6 * channels * cells + 2 * cells**2)
    for level, target in enumerate(widths):
        peaks += [resnet(channels, target), resnet(target, target) if vae["layers_per_block"] else 0]
        channels = target
        if level + 1 < len(widths):
            cells *= 4
            peaks.append(2 * channels * cells)  # enlarged, and its convolution
    return FLOAT32 * max(peaks)
