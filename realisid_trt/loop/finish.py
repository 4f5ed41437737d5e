"""Everything of a request after the loop: its latents, the pictures that the VAE makes of them, and what they took."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends import Backend
from ..checks import check_finite
from ..manifest import Manifest
from ..request import Result
from .denoise import loop_networks
from .passes import Passes
from .picture import decode, to_pil
from .stages import Stages
from .work import Work


class Ending:
    """Makes the pictures of an engine's works."""

    def __init__(self, manifest: Manifest, backend: Backend, passes: Passes, stages: Stages, tile: int | None) -> None:
        """tile: as for `decode`."""
        self._backend, self._passes, self._stages, self._tile = backend, passes, stages, tile
        self._table, self._networks = manifest.config.table, loop_networks(manifest.config.table)

    def result(self, work: Work, output: str) -> Result:
        """The Result of a work that took all its steps. output: of `Engine.generate_batch`. Raises NumericsError."""
        latents = check_finite(self._passes.latents(work), "the final latents")
        work.count_steps(self._table)
        self._backend.start_request()
        with work.watch("vae"):
            images = [] if output == "latents" else self._pictures(latents, output)
        backend = self._backend
        work.count(backend.usage.rows)
        return Result(
            images=images,
            latents=latents,
            seed=work.seed,
            persons=work.persons,
            timings=work.timings(self._networks),
            step_ms=tuple(work.step_ms),
            rows=work.rows,
            sampler=work.plan.sampler.description,
            backend=f"{backend.name} on {backend.device}, {backend.precision}",
            notes=work.notes,
        )

    def preview(self, work: Work, output: str) -> list[Any]:
        """The pictures as the last step predicted them. output: as for `result`. Raises NumericsError."""
        latents = check_finite(self._passes.preview(work), "the predicted latents")
        self._backend.start_request()
        return list(latents) if output == "latents" else self._pictures(latents, output)

    def _pictures(self, latents: NDArray[np.float32], output: str) -> list[Any]:
        self._stages.begin("vae")
        pictures = decode(self._backend, latents, self._tile)
        return [to_pil(picture) for picture in pictures] if output == "pil" else list(pictures)
