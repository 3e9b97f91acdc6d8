"""The base class of results: measurements, settings and environment in one JSON file. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, TypeVar, get_args, get_origin, get_type_hints

from labkit.common.errors import ResultsError
from labkit.common.files import atomic_path, read_json, user_path

COMPACT_FROM = 200_000
"""Files of more characters than this have no line breaks: people read those with a program."""

T = TypeVar("T")


@dataclass
class Record:
    """The fields of every result; each kind of result adds its samples, tables and plots.

    Attributes:
        settings: of the measurement.
        environment: as `labkit.common.machine.environment` returns it.
        environments: of all runs, for results that several runs may measure.
    """

    FILE: ClassVar[str] = "results.json"
    """The file's name in a folder."""
    COMMAND: ClassVar[str]
    """The command that writes it."""
    ALLOW_NAN: ClassVar[bool] = False
    """Whether a figure may be infinite (the SQNR of an exact layer) or NaN."""

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
        """Write the file `path` if it ends in .json, else `FILE` in that folder; atomic. Returns the file."""
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
            ResultsError: the file is missing or damaged; the message names it, and the field.
        """
        path = user_path(path)
        file = path if path.suffix == ".json" or path.is_file() else path / cls.FILE
        if not file.exists():
            raise ResultsError(f"{file}: no such file: measure with `labkit {cls.COMMAND}` first")
        body = read_json(file)
        where = f"{file} is damaged, or no record of labkit {cls.COMMAND}"
        return read_fields(cls, cls._from_json(body, file) if isinstance(body, dict) else {}, where)

    @classmethod
    def _from_json(cls, values: dict[str, Any], file: Path) -> dict[str, Any]:
        """The fields from a file's values; subclasses convert the layout of older files."""
        return values


@dataclass
class OpenRecord(Record):
    """A record of a script that is no command; ``values`` has the script's own fields."""

    COMMAND: ClassVar[str] = "(a script)"

    values: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """``values`` as top-level fields, beside settings and environment."""
        facts = super().to_dict()
        return facts.pop("values", {}) | facts

    @classmethod
    def _from_json(cls, values: dict[str, Any], file: Path) -> dict[str, Any]:
        own = {item.name for item in fields(Record)}
        shared = {name: value for name, value in values.items() if name in own}
        return {**shared, "values": {name: value for name, value in values.items() if name not in own}}


def read_fields(cls: type[T], values: Any, where: str) -> T:
    """A dataclass from JSON values, with lists of dataclasses inside it.

    Raises:
        ResultsError: a field is missing, unknown or of a wrong type; the message begins with ``where``.
    """
    if not isinstance(values, Mapping):
        raise ResultsError(f"{where}: expected an object, found {type(values).__name__}")
    hints = get_type_hints(cls)
    expected = {item.name: hints[item.name] for item in fields(cls)}
    for item in fields(cls):
        if item.name not in values and _default(item) is MISSING:
            raise ResultsError(f"{where}: field {item.name!r} is missing")
    parsed = {}
    for name, value in values.items():
        if name not in expected:
            raise ResultsError(f"{where}: unknown field {name!r}; known are {', '.join(expected)}")
        hint = expected[name]
        if not _matches(value, hint):
            raise ResultsError(f"{where}: field {name!r} must be {_type_name(hint)}, not {value!r}"[:400])
        if (inner := _inner(hint)) is not None:
            value = [read_fields(inner, row, f"{where}: {name}[{at}]") for at, row in enumerate(value)]
        parsed[name] = value
    return cls(**parsed)


def _default(item: Field) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _inner(hint: Any) -> type | None:
    """The dataclass of a list's elements, or None."""
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
