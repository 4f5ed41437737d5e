"""The flags of a command line, from a dataclass of its options: name, type and default are written once."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any


def flags_of(
    options: type, words: Mapping[str, str], **changes: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(flag, arguments of `add_argument`) for each field of `options` that `words` names, in the order of `words`.

    options: a dataclass. A field without a default is required, a bool is a switch, a tuple takes several values.
    words:   field → help.
    changes: field → arguments that differ, such as metavar or choices; `flag` gives it another name.
    """
    fields, hints = {field.name: field for field in dataclasses.fields(options)}, typing.get_type_hints(options)
    for name, text in words.items():
        arguments = {**_arguments(fields[name].default, hints[name]), "help": text, **changes.get(name, {})}
        flag = arguments.pop("flag", f"--{name.replace('_', '-')}")
        yield flag, {"dest": name, **arguments}


def _arguments(default: Any, hint: Any) -> dict[str, Any]:
    if hint is bool:
        return {"action": "store_true", "default": default}
    found = {"required": True} if default is dataclasses.MISSING else {"default": default}
    if isinstance(hint, types.UnionType):  # X | None
        [hint] = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is tuple:
        kind, *others = typing.get_args(hint)
        return {"type": kind, "nargs": "+" if others == [...] else 1 + len(others), **found}
    return {"type": hint, **found}
