"""The interleaved runs: every contender takes its turn in every round, and their pictures are compared."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from .contenders import measured_as_warm
from .measure import Run, turns
from .options import Options
from .same import check_same_picture
from .scene import Scene

if TYPE_CHECKING:
    from .contenders import Contender

Taken = Mapping[str, Sequence[Run]]
Differences = Mapping[tuple[str, str], float]


def interleaved(
    options: Options, scene: Scene, engines: Sequence[str], contenders: Mapping[str, Contender], precision: str
) -> Iterator[tuple[int, Taken, Differences]]:
    """Per case: the number of persons, the measured runs of each contender, and the differences of their pictures.

    A difference is the relative RMS of the final latents' difference in the worst round, by (engine, baseline). A
    progress bar goes to stderr.

    Raises CheckpointError if two pictures differ too much, RuntimeError if torch would compile in a measured run.
    """
    names = list(contenders)
    pairs = [(engine, baseline) for engine in engines for baseline in names if baseline not in engines]
    rounds = [scene.warm_steps] * options.warmup + [scene.steps] * options.runs
    numbers = itertools.count()
    cases = options.persons or ()
    with tqdm(total=len(cases) * len(names) * sum(rounds), unit="step", file=sys.stderr) as bar:
        for persons in cases:
            bar.set_description(f"persons: {persons}")
            taken: list[dict[str, Run]] = []
            worst = dict.fromkeys(pairs, 0.0)
            for steps, number in zip(rounds, numbers, strict=False):
                prompt = f"{number}: {options.prompt}"  # a new one every time: engines cache prompts
                given = scene.given(persons, steps)
                warm = len(taken) < options.warmup
                with contextlib.nullcontext() if warm else measured_as_warm(contenders):
                    runs = {
                        name: contenders[name].run(prompt, lambda *_: bar.update(), **given)
                        for name in turns(names, number)
                    }
                for engine, baseline in pairs:
                    difference = check_same_picture(runs[engine], runs[baseline], precision)
                    worst[engine, baseline] = max(worst[engine, baseline], difference)
                taken.append(runs)
            yield persons, {name: [runs[name] for runs in taken[options.warmup :]] for name in names}, worst
