"""The licence of a published folder: what its model card says, else the first line of its LICENSE file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..checkpoint.files import readable
from ..checkpoint.licences import LicenceLine

UNKNOWN = "no licence was found: ask its publisher"
LICENCE_FILES = re.compile(r"(LICEN[CS]E|COPYING)([.-].*)?", re.IGNORECASE)
HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # folder of the hub's cache: models--OWNER--NAME
FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\n(.*?)^---", re.MULTILINE | re.DOTALL)
MOST_BYTES, MOST_LETTERS = 2**16, 100


def licence_line(part: str, name: str, folders: Iterable[Path]) -> LicenceLine:
    """The line of one part. name: of its source. folders: where its licence may stand; the first one found counts."""
    found = next((licence for folder in folders if (licence := licence_of(folder))), None)
    return {"part": part, "licence": found, "source": name}


def licence_of(folder: Path) -> str | None:
    """The licence that a folder states, or None."""
    with readable(folder):
        files = sorted(file for file in folder.iterdir() if file.is_file())
        for file in files:
            if file.name.lower() == "readme.md" and (stated := _of_card(_beginning(file))):
                return stated
        for file in files:
            if LICENCE_FILES.fullmatch(file.name):
                lines = (_plain(line.strip("#* \t")) for line in _beginning(file).splitlines())
                if first := next(filter(None, lines), ""):
                    return f"{first} ({file.name})"
    return None


def source_name(folder: Path) -> str:
    """The name by which a folder is known: OWNER/NAME in the hub's cache, else the folder's own name."""
    for part in folder.parts:
        if hub := HUB_CACHE.fullmatch(part):
            return f"{hub[1]}/{hub[2]}"
    return _plain(folder.name)


def shown(line: LicenceLine) -> str:
    """A licence line for people."""
    return f"licence of {line['part']} ({line['source']}): {line['licence'] or UNKNOWN}"


def _of_card(text: str) -> str | None:
    """`license` of a model card's front matter; its license_name where the licence is "other"."""
    card = FRONT_MATTER.match(text)
    values = {key: _value(card[1], key) for key in ("license", "license_name")} if card else {}
    stated = values.get("license")
    return values.get("license_name") or stated if stated == "other" else stated


def _value(card: str, key: str) -> str | None:
    """A text, or the texts of a list, of YAML's plain kinds."""
    found = re.search(rf"^{key}:[ \t]*(.*)\n((?:[ \t]*-[ \t].*\n)*)", card, re.MULTILINE)
    if not found:
        return None
    items = found[1].strip("[] \t").split(",") if found[1].strip() else re.findall(r"-[ \t]+(.*)", found[2])
    return ", ".join(filter(None, (_plain(item.strip(" \t\"'")) for item in items))) or None


def _plain(text: str) -> str:
    """One short line without control characters: it is printed, and written into engines."""
    return "".join(letter for letter in text if letter.isprintable()).strip()[:MOST_LETTERS]


def _beginning(file: Path) -> str:
    with file.open("rb") as stream:
        return stream.read(MOST_BYTES).decode("utf-8", errors="replace").replace("\r\n", "\n")
