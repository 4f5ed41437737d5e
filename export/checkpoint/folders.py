"""The folders of a checkpoint: its own, and those that it takes from a base model named by reference."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from realisid_trt.errors import CheckpointError

from .files import read_json, stem_of

FROM_BASE = (
    "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler", "image_encoder",
    "feature_extractor",
)  # fmt: skip
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def tokenizer_of(name: str) -> str:
    """The folder of a text encoder's tokenizer: "tokenizer_2" of "text_encoder_2". A tokenizer's own name stays."""
    return name.replace("text_encoder", "tokenizer")


class Folders:
    """Finds the folders of a checkpoint: its own first, then the base model's, which is looked up when first needed."""

    def __init__(self, path: Path, base_model: str | Path | None, variant: str | None, local_files_only: bool) -> None:
        if path.is_file():
            raise CheckpointError(
                f"{path} is a file, expected a checkpoint's folder. {unpack(path)} A checkpoint is begun from it "
                "by: python -m export.adopt --help (published ControlNets), python -m training.start --help (RealisID)."
            )
        if not path.is_dir():
            what = "is not a folder" if path.exists() else "does not exist"
            raise CheckpointError(
                f"{path} {what}, expected a checkpoint's folder. A small one to try with, of random weights: "
                "python -m export.miniature --out CKPT"
            )
        index = read_json(path / "model_index.json", "it lists the checkpoint's parts and its base model")
        self.path, self.variant, self.local_files_only = path, variant, local_files_only
        if base_model is not None and (given := Path(os.path.expanduser(base_model))).exists():
            base_model = given.absolute()  # an argument is relative to the working directory
        self.reference = str(base_model or index.get("base_model") or "")
        self.base: Path | None = None
        self.found: dict[str, Path] = {}

    def find(self, name: str, own: bool = False) -> Path:
        """The folder of one part. own: a base model never has it. Raises CheckpointError."""
        folder = self.path / name
        if not folder.is_dir() and own:
            raise CheckpointError(
                f"{folder} is missing. realisid_config.json makes it a part of the checkpoint, and no base model has "
                "it. Copy it from where the checkpoint comes from."
            )
        if not folder.is_dir():
            if not self.reference:
                raise CheckpointError(
                    f'{folder} is missing, and model_index.json names no "base_model" to take it from. Copy the '
                    "folder, or name the base model (a folder or a hub id) there or with --base-model."
                )
            if self.base is None:
                lacking = [part for part in FROM_BASE if not (self.path / part).is_dir()]
                self.base = base_folder(self.reference, self.path, lacking, self.variant, self.local_files_only)
            folder = self.base / name
            if not folder.is_dir():
                raise CheckpointError(
                    f"{name} is neither in {self.path} nor in the base model {self.reference} ({self.base}). Copy the "
                    "folder into the checkpoint, or name another base model."
                )
        self.found[name] = folder
        return folder


def unpack(file: Path) -> str:
    """The sentence with the command that turns a model in one file into a folder."""
    folder, given = shlex.quote(str(file.with_suffix(""))), shlex.quote(str(file))
    code = "import sys; from diffusers import StableDiffusionXLPipeline as P; P.from_single_file(sys.argv[1])"
    return (
        "A Stable Diffusion XL model in one file becomes a folder, which is a base model, by: "
        f"python -c '{code}.save_pretrained(sys.argv[2])' {given} {folder} (StableDiffusionPipeline for SD 1.5)."
    )


def base_folder(
    reference: str, checkpoint: Path, components: Iterable[str], variant: str | None, local_files_only: bool
) -> Path:
    """The folder of a base model: a local one (absolute, or relative to the checkpoint), or a hub snapshot.

    components: folders of it that are needed; of a hub model only their JSON, tokenizer files and safetensors are
                downloaded, in the requested variant where there is one. Raises CheckpointError.
    """
    folder = Path(os.path.normpath(checkpoint / os.path.expanduser(reference)))  # Path.expanduser raises for ~nobody
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(reference):
        if folder.is_file():
            raise CheckpointError(f"the base model {folder} is a file, expected a folder. {unpack(folder)}")
        raise CheckpointError(
            f"the base model {reference} is not a folder ({folder}), and not the id of a hub model (owner/name). "
            'Correct "base_model" in model_index.json, or give another with --base-model.'
        )
    from huggingface_hub import HfApi, snapshot_download

    try:
        if local_files_only:
            return Path(snapshot_download(reference, local_files_only=True))
        wanted = _wanted(HfApi().list_repo_files(reference), components, variant)
        return Path(snapshot_download(reference, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises its own, httpx's and the system's kinds
        how = "is not in the local cache" if local_files_only else "could not be downloaded"
        raise CheckpointError(
            f"the base model {reference} is not a folder in {checkpoint}, and as a hub model it {how}: "
            f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}. "
            f"Download it where there is a network (hf download {reference}) and name its folder with --base-model, "
            'or in "base_model" of model_index.json.'
        ) from error


def _wanted(names: Iterable[str], components: Iterable[str], variant: str | None) -> list[str]:
    """The files of a hub model that the components need: small files, and one set of safetensors each."""
    wanted = []
    names = list(names)
    for component in components:
        files = [name for name in names if name.startswith(f"{component}/") and name.count("/") == 1]
        wanted += [name for name in files if name.endswith((".json", ".txt"))]
        weights = [name for name in files if name.endswith(".safetensors")]
        stem = re.escape(f"{component}/{stem_of(component)}")
        for dotted in dict.fromkeys((f"\\.{re.escape(variant)}" if variant else "", "")):
            found = [name for name in weights if re.fullmatch(rf"{stem}{dotted}(-\d+-of-\d+)?\.safetensors", name)]
            if found:
                wanted += found
                break
    return [*wanted, "model_index.json"]
