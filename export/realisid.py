"""`realisid`: every command of the product under one name, which no folder of the user's can shadow.

realisid generate | inspect | embed | doctor …     as python -m realisid_trt
realisid build …                                   as python -m export.build
realisid adopt …                                   as python -m export.adopt
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from realisid_trt.__main__ import main as run_command
from realisid_trt.commands.command_line import execute

COMMANDS = (
    "commands: build (python -m export.build), adopt (python -m export.adopt), "
    "generate, inspect, embed, doctor (python -m realisid_trt)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["build"]:
        from .build import main as build  # the other commands do not need it

        return build(given[1:])
    if given[:1] == ["adopt"]:
        from .adopt.__main__ import main as adopt

        return adopt(given[1:])
    if given in (["--help"], ["-h"]):
        print(COMMANDS)
    return run_command(given)


def script() -> int:
    """The entry point of the console script."""
    return execute(main)
