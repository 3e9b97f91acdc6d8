"""Options: dataclass fields with their help, for the command line, widgets and documentation."""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from labkit.common.errors import LabError

REQUIRED = MISSING
"""The default of a required option."""


def option(
    default: Any,
    help: str,
    choices: tuple | None = None,
    *,
    metavar: str | None = None,
    least: int | None = None,
    most: int | None = None,
    usual: str | None = None,
    check: Callable[[str], object] | None = None,
    **more: Any,
) -> Any:
    """A dataclass field with its help.

    choices: the allowed values, if there are few. metavar: the placeholder of a value in the help. least, most: the
    bounds of a number. usual: the help's text for a default of None. check: raises `LabError` for a text that is no
    value. more: arguments of `dataclasses.field`.
    """
    limits = {"least": least, "most": most, "choices": choices, "check_text": check}
    return field(
        default=default, metadata={"help": help, "metavar": metavar, "usual": usual, **limits}, **more
    )


class Parser(argparse.ArgumentParser):
    """A parser that raises its errors as `LabError`, which prints in one line."""

    def error(self, message: str) -> NoReturn:
        raise LabError(f"{message} (see `{self.prog} --help`)")


def help_of(settings: type, name: str) -> str:
    """The help of one option, with its default in brackets: ``how many test items (200)``."""
    item = next(item for item in fields(settings) if item.name == name)
    usual = item.metadata["usual"] or _shown_default(item)
    return f"{item.metadata['help']} ({usual})" if usual else item.metadata["help"]


def flag_of(name: str) -> str:
    """The flag of an option: ``timeout_s`` is ``--timeout``, ``batch_size`` is ``--batch-size``."""
    return "--" + name.removesuffix("_s").replace("_", "-")


@dataclass(frozen=True)
class Kind:
    """The type of an option's values: a ``base`` (int, float, str or bool), or a tuple of them with ``many``."""

    base: type = str
    many: bool = False
    least: int | None = None
    most: int | None = None
    choices: tuple | None = None
    check_text: Callable[[str], object] | None = None

    @classmethod
    def of(cls, annotation: Any, item: Field) -> Kind:
        """The kind of a field with its annotation, such as ``int | None`` or ``tuple[str, ...]``."""
        if get_origin(annotation) is types.UnionType:
            annotation = next(part for part in get_args(annotation) if part is not type(None))
        many = get_origin(annotation) is tuple
        limits = {name: item.metadata[name] for name in ("least", "most", "choices", "check_text")}
        return cls(get_args(annotation)[0] if many else annotation, many, **limits)

    def __call__(self, text: str) -> Any:
        """Parse a value from the command line."""
        if not self.many:
            return self._read(text)
        return tuple(self._read(part.strip()) for part in text.split(",") if part.strip())

    def check(self, value: Any) -> Any:
        """Check a value from a file; a list may also be text in the command line's form.

        Raises:
            ArgumentTypeError: the value has another type, is too small, or is not among the choices.
        """
        if self.many:
            if isinstance(value, str):
                return self(value)
            if not isinstance(value, list):
                raise argparse.ArgumentTypeError(f"must be a list, not {value!r}")
            return tuple(self._check(part) for part in value)
        return self._check(value)

    def _read(self, text: str) -> Any:
        try:
            value = self.base(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {_NAMES[self.base]}, not {text!r}") from None
        return self._check(value)

    def _check(self, value: Any) -> Any:
        if self.base is float and type(value) is int:
            value = float(value)
        if self.check_text is not None and type(value) in (int, float):
            value = str(value)  # an amount without its unit, in a file
        if type(value) is not self.base:
            raise argparse.ArgumentTypeError(f"must be {_NAMES[self.base]}, not {value!r}")
        if self.least is not None and value < self.least:
            bound = "at least 1" if self.least == 1 else f"{self.least} or more"
            raise argparse.ArgumentTypeError(f"must be {bound}, not {value}")
        if self.most is not None and value > self.most:
            raise argparse.ArgumentTypeError(f"must be at most {self.most}, not {value}")
        if self.choices and value not in self.choices:
            allowed = ", ".join(map(str, self.choices))
            raise argparse.ArgumentTypeError(f"must be one of {allowed}, not {value!r}")
        if self.check_text is not None:
            try:
                self.check_text(value)
            except LabError as error:
                raise argparse.ArgumentTypeError(str(error)) from None
        return value


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_METAVARS = {(int, False): "N", (float, False): "X", (str, True): "A,B,…", (int, True): "N,M,…"}


def add_options(
    command: Any, settings: type, names: Collection[str] | None = None, *, prefix: str = ""
) -> None:
    """Add an argument to ``command`` (a parser or an argument group) for each field of the dataclass ``settings``.

    names: only these fields. prefix: precedes each name, as in ``--calibration-items``.
    """
    annotations = get_type_hints(settings)
    for item in fields(settings):
        if names is not None and item.name not in names:
            continue
        kind = Kind.of(annotations[item.name], item)
        arguments: dict[str, Any] = {
            "dest": prefix + item.name,
            "help": help_of(settings, item.name).replace("%", "%%"),
            "default": None if item.default is REQUIRED else item.default,
            "required": item.default is REQUIRED,
        }
        if kind.base is bool:
            arguments |= {"action": argparse.BooleanOptionalAction}
        else:
            metavar = item.metadata["metavar"] or _METAVARS.get((kind.base, kind.many))
            arguments |= {"type": kind, "choices": kind.choices, "metavar": None if kind.choices else metavar}
        command.add_argument(flag_of(prefix + item.name), **arguments)


def settings_of(namespace: argparse.Namespace, settings: type, *, prefix: str = "") -> Any:
    """The dataclass ``settings``, filled from parsed arguments; fields without an argument keep their default."""
    names = [item.name for item in fields(settings) if hasattr(namespace, prefix + item.name)]
    return settings(**{name: getattr(namespace, prefix + name) for name in names})


def _shown_default(item: Field) -> str:
    if item.default is True or item.default is False:
        return flag_of(item.name if item.default else f"no_{item.name}")
    if item.default is None or item.default is REQUIRED:
        return ""
    if isinstance(item.default, tuple):
        return ",".join(map(str, item.default))
    return f"{item.default:g}" if isinstance(item.default, float) else str(item.default)
