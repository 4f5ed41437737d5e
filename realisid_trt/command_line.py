"""What every command of the project does alike: run, print, report errors, end."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import RealisIDError, RealisIDWarning, RequestError


@dataclass
class Outcome:
    """What a command found: JSON values for scripts, lines for people, and how to end (0 done, 1 failed)."""

    values: dict[str, Any]
    lines: Sequence[str] = field(default_factory=list)
    status: int = 0


def run(command: Callable[[], Outcome], as_json: bool) -> int:
    """Runs a command and returns the exit status: 0 done, 1 failed, 2 bad usage.

    as_json: the last line of stdout is one JSON object, and people's lines go to stderr.
    """
    warnings.showwarning = _show_warning
    try:
        outcome = command()
    except RealisIDError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 1
    if outcome.lines:
        print("\n".join(outcome.lines), file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(outcome.values))
    return outcome.status


def reporter(as_json: bool) -> Callable[[str], None]:
    """Prints a line while a command runs: to stdout, or to stderr when stdout is for JSON."""
    return lambda line: print(line, file=sys.stderr if as_json else sys.stdout, flush=True)


def ratio(text: str, flag: str) -> float | None:
    """A number from 0 to 1, or None for "none". Raises RequestError."""
    if text.lower() in ("none", "null"):
        return None
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"{flag} is {text!r}, expected a number from 0 to 1, or none.") from None


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    if issubclass(category, RealisIDWarning):
        print(f"note: {message}", file=sys.stderr)
