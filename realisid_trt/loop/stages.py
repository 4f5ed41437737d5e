"""The networks of each stage of a request, and engines that hold those of one stage at a time."""

from __future__ import annotations

from ..backends import Backend
from ..manifest import Manifest
from .denoise import loop_networks

MEMORY = ("normal", "low")  # all networks stay loaded; only those of the current stage


def networks_of_stages(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    """The networks that each stage runs, by the stage's name in `Result.timings`, in the order of the stages."""
    names = tuple(manifest.values["networks"])
    return {
        "persons": tuple(name for name in names if name == "id_encoder"),
        "text": tuple(name for name in names if name in manifest.model.tokenizers),
        "time": tuple(name for name in names if name.endswith("_time")),
        "conditions": tuple(name for name in names if name.endswith("_condition")),
        "denoise": tuple(name for name in names if name in loop_networks(manifest.config.table)),
        "vae": tuple(name for name in names if name == "vae_decoder"),
    }


class Stages:
    """Frees, at the beginning of a stage, the networks of all others. A backend loads a network when it first runs."""

    def __init__(self, manifest: Manifest, backend: Backend, memory: str) -> None:
        """memory: "normal" frees nothing."""
        self._backend, self._low, self._current = backend, memory == "low", ""
        self._names, self._networks = tuple(manifest.values["networks"]), networks_of_stages(manifest)

    def begin(self, stage: str) -> None:
        """Called before the first network of a stage runs."""
        if self._low and stage != self._current:
            self._current = stage
            self._backend.unload([name for name in self._names if name not in self._networks[stage]])
