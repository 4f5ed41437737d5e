"""Shared by all commands of the project: run, print, report errors, exit."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TextIO

from ..errors import RealisIDError, RealisIDWarning, RequestError


@dataclass
class Outcome:
    """The result of a command: JSON values for scripts, lines for people, exit status (0 done, 1 failed)."""

    values: dict[str, Any]
    lines: Sequence[str] = field(default_factory=list)
    status: int = 0


def run(command: Callable[[], Outcome], as_json: bool) -> int:
    """Runs a command and returns the exit status: 0 done, 1 failed, 2 bad usage.

    as_json: the last line of stdout is one JSON object, and people's lines go to stderr.
    """
    try:
        with _notes():
            outcome = command()
    except RealisIDError as error:
        say(f"error: {error}", sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        say("stopped.", sys.stderr)
        return 1
    printed = not outcome.lines or say("\n".join(outcome.lines), sys.stderr if as_json else sys.stdout)
    if as_json:  # scripts need only the JSON: it alone decides
        printed = say(json.dumps(outcome.values), sys.stdout)
    return outcome.status if printed else outcome.status or 1


def execute(main: Callable[[], int]) -> int:
    """Runs a program's `main` so that its own output cannot stop it. A character that the terminal's encoding lacks is
    written as \\u03bb; a closed pipe or a full disk gives at most one line. Returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
    except SystemExit as exit_:  # argparse's
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    # flushes the text of --help, which the interpreter would write at its end
    printed = [say("", stream, end="") for stream in (sys.stdout, sys.stderr)]
    return status if all(printed) else status or 1


def reporter(as_json: bool) -> Callable[[str], None]:
    """Prints a line while a command runs: to stdout, or to stderr when stdout is for JSON."""

    def report(line: str) -> None:
        say(line, sys.stderr if as_json else sys.stdout)

    return report


def say(text: str, stream: TextIO | None, end: str = "\n") -> bool:
    """Prints at once. Returns whether it could. After a failure the stream is silenced and the command goes on.

    stream: None if the program was started without it (`>&-`); the text is lost.
    """
    if stream is None:
        return not text
    try:
        print(text, file=stream, end=end, flush=True)
        return True
    except BrokenPipeError:  # the reader has closed the pipe
        _silence(stream)
        return True
    except OSError as error:
        _silence(stream)
        if stream is not sys.stderr:
            say(f"error: the output could not be written ({error.strerror or error}).", sys.stderr)
        return False


def _silence(stream: TextIO) -> None:
    """Redirects the stream to the null device: otherwise closing it would raise again."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def timing_table(timings: Mapping[str, float], rows: Mapping[str, int]) -> list[str]:
    """A line per stage of a Result: milliseconds, and rows where a network ran. Parts of a stage are indented."""
    lines = [f"{'stage':<24}{'ms':>10}{'rows':>8}"]
    for stage, ms in timings.items():
        _, _, part = stage.partition(".")
        lines.append(f"{'  ' + part if part else stage:<24}{ms:>10.1f}{rows.get(part, ''):>8}")
    return lines


def ratio(text: str, flag: str) -> float | None:
    """A number from 0 to 1, or None for "none". Raises RequestError."""
    if text.lower() in ("none", "null"):
        return None
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"{flag} is {text!r}, expected a number from 0 to 1, or none.") from None


@contextmanager
def _notes() -> Iterator[None]:
    """Our warnings are notes on stderr; others are shown as Python shows them."""
    show = warnings.showwarning

    def show_note(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if issubclass(category, RealisIDWarning):
            say(f"note: {message}", sys.stderr)
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = show_note
    try:
        yield
    finally:
        warnings.showwarning = show
