"""Flags come from the dataclass of a command's options: their names, types and defaults are written once."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import pytest

from realisid_trt.commands.flags import flags_of


@dataclass(frozen=True, kw_only=True)
class Options:
    engine: Path
    steps: int = 30
    batch_size: int | None = None
    names: tuple[str, ...] = ()
    face: tuple[float, float] = (0.25, 0.5)
    only: bool = False


def parsed(*words: str) -> Options:
    parser = argparse.ArgumentParser()
    help_of = dict.fromkeys(("engine", "steps", "batch_size", "names", "face", "only"), "default %(default)s")
    for flag, arguments in flags_of(Options, help_of, names={"flag": "--name", "choices": ("a", "b")}):
        parser.add_argument(flag, **arguments)
    return Options(**vars(parser.parse_args(words)))


def test_what_is_not_given_is_the_fields_default() -> None:
    assert parsed("--engine", "here") == Options(engine=Path("here"))


def test_what_is_given_has_the_fields_type() -> None:
    given = parsed(
        "--engine", "e", "--steps", "4", "--batch-size", "2", "--name", "a", "b", "--face", "0.1", "1", "--only"
    )
    assert given.names == ["a", "b"] and given.face == [0.1, 1.0]  # argparse gives lists
    assert (given.steps, given.batch_size, given.only) == (4, 2, True)


@pytest.mark.parametrize("words", [(), ("--engine", "e", "--steps", "x"), ("--engine", "e", "--name", "c"),
                                   ("--engine", "e", "--face", "1")])  # fmt: skip
def test_what_the_field_cannot_be_is_refused(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(*words)
    assert "error: " in capsys.readouterr().err


def test_a_field_that_is_not_named_has_no_flag() -> None:
    assert [flag for flag, _ in flags_of(Options, {"steps": "", "only": ""})] == ["--steps", "--only"]
