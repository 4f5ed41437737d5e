"""The options of `benchmarks.latency`, their checks, and the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from realisid_trt.branches import Branch
from realisid_trt.commands.flags import flags_of
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import RequestError
from realisid_trt.loop.samplers import Sampler
from realisid_trt.request import MAX_PERSONS

# Baseline → its arguments of NaivePipeline.generate. Those without any measure diffusers' own pipeline too.
BASELINES: dict[str, dict[str, Any]] = {
    "naive": {},
    "naive-shared": {"share_null": True},
    "naive-no-delay": {"delay": False},
    "naive-compiled": {},
}
COMPILED = ("naive-compiled",)  # the baselines whose networks torch.compile compiles


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a measurement. The command line takes its defaults from here.

    engine:        engine directory. device, cuda_graph: as in Engine.load.
    backend:       as in Engine.load; several, each a contender; or ("all",): every backend that the engine was built
                   for and that can be opened here.
    checkpoint:    the folder that it was built from, for the baselines' weights; None: its path at the build.
    base_model, variant: as in export.build; None: as at the build.
    baseline:      some of BASELINES, or ("none",).
    persons:       numbers of persons, each a case of its own; None: 1 and 2, or 0 where no branch is shown a person.
    controls:      names of the branches that are shown a picture; ("all",): every one that takes one; or ("none",).
                   One that is shown ID patches is shown a drawing in any case.
    sampler:       of the engine, by name; baselines sample with DDIM.
    steps:         None takes the engine's default; height, width: px, None takes the model's size.
    runs, warmup:  numbers of measured rounds, and of short rounds before them.
    threads:       of the engine and of the baselines; None takes every core that this process may use.
    memory_format: of the baselines' convolutions: "contiguous", "channels_last", or "auto" for the faster one here.
    compiler:      backend of torch.compile, for naive-compiled.
    memory:        measure memory too, every contender and case in a process of its own.
    photo:         measure the face front end on this photo too.
    out, plot:     files to write.
    """

    engine: Path
    checkpoint: Path | None = None
    base_model: str | None = None
    variant: str | None = None
    baseline: tuple[str, ...] = ("naive",)
    persons: tuple[int, ...] | None = None
    controls: tuple[str, ...] = ("all",)
    sampler: str = "ddim"
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    runs: int = 5
    warmup: int = 1
    threads: int | None = None
    backend: tuple[str, ...] = ("auto",)
    device: str = "cpu"
    cuda_graph: bool = False
    memory_format: str = "auto"
    compiler: str = "inductor"
    memory: bool = False
    seed: int = 0
    prompt: str = "two friends hiking, golden hour"
    photo: Path | None = None
    out: Path | None = None
    plot: Path | None = None

    @property
    def baselines(self) -> tuple[str, ...]:
        """The requested baselines, in the order of BASELINES."""
        return tuple(name for name in BASELINES if name in self.baseline)

    def check(self) -> None:
        """Raises RequestError for impossible options, before anything is loaded."""
        least = {"runs": 1, "warmup": 0, "steps": 1, "threads": 1, "seed": 0, "height": 1, "width": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise RequestError(f"--{name} is {value}, expected at least {bound}.")
        for count in self.persons or ():
            if not 0 <= count <= MAX_PERSONS:
                raise RequestError(f"--persons {count}: an engine takes 0 to {MAX_PERSONS}.")
        Sampler.of(self.sampler)
        if self.sampler != "ddim" and self.baselines:
            raise RequestError(f"--sampler {self.sampler}: baselines sample with DDIM. Add --baseline none.")
        unknown = sorted(set(self.baseline) - {*BASELINES, "none"})
        if unknown or ("none" in self.baseline and len(set(self.baseline)) > 1):
            raise RequestError(
                f"--baseline {' '.join(self.baseline)}: expected some of {', '.join(BASELINES)}, or none alone."
            )
        if len(set(self.backend)) < len(self.backend) or (len(self.backend) > 1 and {"all", "auto"} & {*self.backend}):
            raise RequestError(f"--backend {' '.join(self.backend)}: expected different names, or auto or all alone.")
        if not self.warmup and set(self.baselines) & set(COMPILED):
            raise RequestError("--warmup is 0, expected at least 1: else naive-compiled is compiled in a measured run.")
        if self.threads is not None and self.device != "cpu":
            raise RequestError(f"--threads {self.threads} is for --device cpu. Leave it out for {self.device}.")
        if self.photo is not None and not self.photo.is_file():
            raise RequestError(f"--photo {self.photo}: no such file.")
        for flag, path in (("--out", self.out), ("--plot", self.plot)):
            if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
                raise RequestError(f"{flag} {path}: expected a file in a folder that exists.")
        if self.plot is not None:
            from .report import check_plot

            check_plot(self.plot)

    def shown(self, config: RealisIDConfig) -> tuple[Branch, ...]:
        """The branches of an engine that are shown a picture. Raises RequestError for an unknown name."""
        known = {branch.name: branch for branch in config.table if branch.per == "picture"}
        patched = tuple(branch for branch in known.values() if branch.condition == "id_patches")
        if self.controls == ("all",):
            return tuple(known.values())
        if self.controls == ("none",):
            return patched
        if unknown := [name for name in self.controls if name not in known]:
            advice = f"Give one of: {', '.join(known)}; or all, or none." if known else "Leave --controls out."
            raise RequestError(
                f"--controls {unknown[0]}: this engine has no such branch that is shown a picture. {advice}"
            )
        return tuple(branch for branch in known.values() if branch.name in self.controls or branch in patched)

    def of_engine(self, config: RealisIDConfig) -> Options:
        """The same with the numbers of persons filled in. Raises RequestError for what the engine does not have."""
        self.shown(config)
        if self.photo is not None and config.id_input == "none":
            raise RequestError("--photo: this engine has no identities, so it reads no photo. Leave --photo out.")
        with_persons = has_persons(config)
        if self.persons is not None and any(self.persons) and not with_persons:
            shown = " ".join(map(str, self.persons))
            raise RequestError(f"--persons {shown}: no branch of this engine is shown a person. Leave --persons out.")
        only_way = {
            True: "where the ID is read after the text, all rows differ, and the",
            False: "without persons diffusers'",
        }
        has_one = config.unet_tokens == "text_and_id" or not with_persons
        if senseless := [name for name in self.baselines if BASELINES[name] and has_one]:
            raise RequestError(
                f"--baseline {senseless[0]}: {only_way[with_persons]} pipeline has one way to run. Give naive or "
                "naive-compiled."
            )
        if not with_persons:
            return replace(self, persons=(0,))
        return replace(self, persons=(1, 2) if self.persons is None else self.persons)


def has_persons(config: RealisIDConfig) -> bool:
    """Whether persons change the picture of an engine: a branch is shown them, or something reads their ID."""
    read = config.unet_tokens == "text_and_id" or any(branch.reads_id for branch in config.table)
    return read or any(branch.per == "person" for branch in config.table)


def parser() -> argparse.ArgumentParser:
    line = argparse.ArgumentParser(
        prog="python -m benchmarks.latency",
        description="Milliseconds per picture, stage and step, beside an honest baseline on the same weights.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""baselines:
  naive           diffusers' own modules, guidance rows batched, no third row before the ID is switched on
  naive-shared    the same, and the none and text rows share their ControlNet rows if these get no text
  naive-no-delay  as naive, with three rows at every step (of weight zero before the switch: the same picture)
  naive-compiled  as naive, UNet and ControlNets compiled by torch.compile, for every shape and in the warm-up
  Of an engine whose branches all read the text, naive is diffusers' own ControlNet pipeline; of ID-Patch's engine, the
  published pipeline: two guidance rows, the ID tokens after the text.
examples:
  python -m benchmarks.latency --engine engines/NAME --persons 1 2 --steps 30 --baseline naive
  python -m benchmarks.latency --engine engines/NAME --baseline naive naive-no-delay --out latency.json \\
      --plot latency.png
  python -m benchmarks.latency --engine engines/NAME --device cuda --backend all --persons 1 2 4 \\
      --baseline naive naive-compiled --memory --runs 20
  python -m benchmarks.latency --engine engines/NAME --controls openpose --baseline naive
  python -m benchmarks.latency --engine engines/idpatch --persons 1 2 4 --steps 50 --baseline naive naive-compiled
  python -m benchmarks.latency --engine engines/NAME --baseline none --photo alice.jpg""",
    )
    shown = "default %(default)s"
    words = {
        "engine": "engine directory",
        "checkpoint": "the folder it was built from, if that has moved",
        "base_model": "where its UNet, VAE and text encoders are, if moved too",
        "variant": "of its weight files, such as fp16 (default: as it was built)",
        "baseline": shown,
        "persons": "default 1 2, or 0 where no branch is shown a person",
        "controls": "branches that are shown a picture: names, all or none, default all",
        "sampler": f"of the engine, with --baseline none; {shown}",
        "steps": "denoising steps (default: the engine's)",
        "height": "of the picture (default: the model's)",
        "width": "of the picture (default: the model's)",
        "runs": f"measured rounds, {shown}",
        "warmup": f"short rounds before them, {shown}",
        "threads": "of engine and baselines (default: every core)",
        "backend": "one or several, each a contender; all: every one that can be opened here (default auto)",
        "device": shown,
        "cuda_graph": "on a GPU, capture a step and replay it",
        "memory_format": "of the baselines; auto tries both and takes the faster",
        "compiler": f"torch.compile's backend, for naive-compiled, {shown}",
        "memory": "measure memory too, each contender in its own process",
        "seed": shown,
        "prompt": shown,
        "photo": "measure the face front end on this photo too",
        "out": "store the JSON object",
        "plot": "draw steps and stages (.png, .svg, .pdf)",
    }
    flags = flags_of(
        Options, words,
        engine={"metavar": "DIR"}, checkpoint={"metavar": "DIR"}, base_model={"metavar": "DIR|ID"},
        baseline={"choices": (*BASELINES, "none"), "default": list(Options.baseline)},
        persons={"metavar": "N"}, controls={"metavar": "NAME", "default": list(Options.controls)},
        height={"metavar": "PX"}, width={"metavar": "PX"},
        backend={"action": "extend", "metavar": "NAME", "default": None},
        memory_format={"choices": ("auto", "contiguous", "channels_last")},
        photo={"metavar": "FILE"}, out={"metavar": "FILE"}, plot={"metavar": "FILE"},
    )  # fmt: skip
    for flag, arguments in flags:
        line.add_argument(flag, **arguments)
    line.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    return line
