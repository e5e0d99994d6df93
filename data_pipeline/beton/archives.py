"""Webdataset archives: tars in which files that share a name up to its first dot belong together."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from data_pipeline.beton.places import Found, Member
from data_pipeline.core.errors import UserError

_LABELS = ("cls", "json")
_LABEL_BYTES = 1 << 20
_BLOCK = 512


def images_in_archive(archive: Path, suffixes: Set[str]) -> Found:
    """The images of a tar in its order. KEY.jpg has its class from KEY.cls, or `label`, `cls` or `class` of KEY.json.

    Only the heads of its files and the labels are read. UserError when it is damaged or cut off.
    """
    images: dict[str, list[tuple[str, Member]]] = {}
    labels: dict[str, str | None] = {}
    for member in _members(archive):
        folder, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        key, extension = folder + slash + stem, extension.lower()
        if name.startswith("."):
            continue
        if extension in _LABELS:
            if labels.get(key) is None:
                labels[key] = _label(member, extension)
        elif "." + extension.rpartition(".")[2] in suffixes:
            images.setdefault(key, []).append((extension, member))
    found: Found = []
    for key, candidates in images.items():
        # KEY.jpg is the image where there is one, and KEY.mask.png something about it
        plain = [member for extension, member in candidates if "." not in extension]
        found += [(labels.get(key), member) for member in plain or [member for _, member in candidates]]
    return found


def _members(archive: Path) -> Iterator[Member]:
    try:
        with tarfile.open(archive, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # a list that would grow to the end
                if info.isreg():
                    yield Member(archive, info.name, info.offset_data, info.size)
            # tarfile takes the end of the file for the end of the archive
            with open(archive, "rb") as file:
                file.seek(tar.offset)
                whole = file.read(_BLOCK) == bytes(_BLOCK)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive}: not a tar archive, or damaged: {error}") from None
    except OSError as error:
        raise UserError(f"{archive}: cannot be read: {error.strerror}") from None
    if not whole:
        raise UserError(f"{archive}: cut off: the end of the archive is missing; fetch it again")


def _label(member: Member, extension: str) -> str | None:
    if member.size > _LABEL_BYTES:
        raise UserError(f"{member}: too large for a label ({member.size} bytes)")
    try:
        text = member.read().decode().strip()
        value: Any = json.loads(text) if extension == "json" else text
    except ValueError:
        raise UserError(f"{member}: not a label that can be read") from None
    if isinstance(value, dict):
        value = next((value[key] for key in ("label", "cls", "class") if key in value), None)
    if isinstance(value, bool) or not isinstance(value, str | int | None) or value == "":
        raise UserError(f"{member}: its class is neither a number nor a name")
    return None if value is None else str(value)
