"""The family of results: what was measured, with what settings and where, in one JSON file. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, TypeVar, get_args, get_origin, get_type_hints

from labkit.common.errors import ResultsError
from labkit.common.files import atomic_path, read_json

COMPACT_FROM = 200_000
"""Files of more characters are written without line breaks: a reader has a program for those."""

T = TypeVar("T")


@dataclass
class Record:
    """What every result has; a kind of result adds its samples, tables and plots.

    Attributes:
        settings: what it was measured with.
        environment: where, as `labkit.common.machine.environment` says.
        environments: of every run that measured any of it, where several runs may.
    """

    FILE: ClassVar[str] = "results.json"
    """The file's name in a folder."""
    COMMAND: ClassVar[str]
    """The command that makes it."""
    ALLOW_NAN: ClassVar[bool] = False
    """Whether a figure may be infinite (the SQNR of an exact layer) or no number."""

    settings: dict[str, Any] = field(default_factory=dict, kw_only=True)
    environment: dict[str, Any] = field(default_factory=dict, kw_only=True, repr=False)
    environments: list[dict[str, Any]] = field(default_factory=list, kw_only=True, repr=False)

    @property
    def file_name(self) -> str:
        """The file's name in a folder."""
        return self.FILE

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for JSON; a field at its default is left out."""
        defaults = {item.name: _default(item) for item in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    def save(self, path: str | os.PathLike) -> Path:
        """Write the file `path` if it ends in .json, else `FILE` in that folder, whole or not at all; returns it."""
        file = Path(path) if Path(path).suffix == ".json" else Path(path) / self.file_name
        values, options = self.to_dict(), {"ensure_ascii": False, "allow_nan": self.ALLOW_NAN}
        text = json.dumps(values, indent=1, **options)
        if len(text) > COMPACT_FROM:
            text = json.dumps(values, separators=(",", ":"), **options)
        with atomic_path(file) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        return file

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read what `save` wrote, a file or its folder.

        Raises:
            ResultsError: it is missing or damaged; the message names the file, and the field.
        """
        path = Path(path)
        file = path if path.suffix == ".json" or path.is_file() else path / cls.FILE
        if not file.exists():
            raise ResultsError(f"{file}: no such file: measure with `labkit {cls.COMMAND}` first")
        body = read_json(file)
        where = f"{file} is damaged, or no record of labkit {cls.COMMAND}"
        return read_fields(cls, cls._from_json(body, file) if isinstance(body, dict) else {}, where)

    @classmethod
    def _from_json(cls, values: dict[str, Any], file: Path) -> dict[str, Any]:
        """The fields, of what a file holds: where older files had another shape, a kind brings it to today's."""
        return values


@dataclass
class OpenRecord(Record):
    """A record whose further fields, in ``values``, are its program's own: of scripts that are no command."""

    COMMAND: ClassVar[str] = "(a script)"

    values: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The values stand beside settings and environment."""
        facts = super().to_dict()
        return facts.pop("values", {}) | facts

    @classmethod
    def _from_json(cls, values: dict[str, Any], file: Path) -> dict[str, Any]:
        own = {item.name for item in fields(Record)}
        shared = {name: value for name, value in values.items() if name in own}
        return {**shared, "values": {name: value for name, value in values.items() if name not in own}}


def read_fields(cls: type[T], values: Any, where: str) -> T:
    """A dataclass of JSON's values, lists of dataclasses inside included.

    Raises:
        ResultsError: a field is missing, unknown or of another type; the message begins with ``where``.
    """
    if not isinstance(values, Mapping):
        raise ResultsError(f"{where}: expected an object, found {type(values).__name__}")
    hints = get_type_hints(cls)
    wanted = {item.name: hints[item.name] for item in fields(cls)}
    for item in fields(cls):
        if item.name not in values and _default(item) is MISSING:
            raise ResultsError(f"{where}: field {item.name!r} is missing")
    parsed = {}
    for name, value in values.items():
        if name not in wanted:
            raise ResultsError(f"{where}: unknown field {name!r}; known are {', '.join(wanted)}")
        hint = wanted[name]
        if not _matches(value, hint):
            raise ResultsError(f"{where}: field {name!r} must be {_type_name(hint)}, not {value!r}"[:400])
        if (inner := _inner(hint)) is not None:
            value = [read_fields(inner, row, f"{where}: {name}[{at}]") for at, row in enumerate(value)]
        parsed[name] = value
    return cls(**parsed)


def _default(item: Field) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _inner(hint: Any) -> type | None:
    """The dataclass that a list is of, if it is."""
    kinds = get_args(hint) if get_origin(hint) is list else ()
    return kinds[0] if kinds and is_dataclass(kinds[0]) else None


def _matches(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_matches(value, option) for option in get_args(hint))
    plain = get_origin(hint) or hint
    if plain is float:
        return type(value) in (int, float)
    if plain is int:
        return type(value) is int
    if plain is list and isinstance(value, list) and _inner(hint) is None:
        return all(_matches(entry, get_args(hint)[0]) for entry in value)
    return isinstance(value, plain)


def _type_name(hint: Any) -> str:
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    names = {
        int: "a whole number",
        float: "a number",
        str: "a string",
        bool: "true or false",
        dict: "an object",
        list: "a list",
    }
    return " or ".join("null" if o is NoneType else names[get_origin(o) or o] for o in options)
