"""Shared by the commands: adding a command, and ``--config FILE.yaml``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from labkit.common.errors import LabError
from labkit.common.files import user_path
from labkit.common.options import Kind, Parser, settings_of

MODEL = "a name from `labkit models`, a checkpoint's folder, a folder of `labkit quantize`, or a hub id"
UNQUANTIZED_MODEL = "a name from `labkit models`, a checkpoint's folder, or a hub id"
T = TypeVar("T")
count = Kind(int, least=1)
"""A whole number of at least 1."""


class CommandParser(Parser):
    """A parser that allows options between positional arguments, as in ``labkit ask pocket --image FILE "instruction"``,
    and reads missing arguments from ``--config FILE``."""

    _nested = False

    def parse_known_args(self, args=None, namespace=None):
        """Parse intermixed arguments; argparse calls this method again for each kind of argument."""
        if self._nested:
            return super().parse_known_args(args, namespace)
        self._nested = True
        try:
            path = self._config_path(args)
            if path is None:
                return self.parse_known_intermixed_args(args, namespace)
            values = read_config(path, self)
            defaults = {action.dest: action.default for action in self.settings()}
            for action in self.settings():
                action.default = argparse.SUPPRESS
                if action.dest in values:
                    action.required, action.nargs = False, action.nargs if action.option_strings else "?"
            for group in self._mutually_exclusive_groups:
                group.required = group.required and not _names(group) & values.keys()
            parsed, rest = self.parse_known_intermixed_args(args, namespace)
            for group in self._mutually_exclusive_groups:
                if any(hasattr(parsed, name) for name in _names(group)):
                    values = {name: value for name, value in values.items() if name not in _names(group)}
            for name, default in defaults.items():
                if not hasattr(parsed, name):
                    setattr(parsed, name, values.get(name, default))
            return parsed, rest
        finally:
            self._nested = False

    def settings(self) -> list[argparse.Action]:
        """The arguments that a configuration file may hold."""
        return [action for action in self._actions if action.dest not in ("help", "config")]

    def _config_path(self, args: Sequence[str] | None) -> str | None:
        if not any(action.dest == "config" for action in self._actions):
            return None
        probe = Parser(prog=self.prog, add_help=False)
        probe.add_argument("--config")
        return probe.parse_known_args(args)[0].config


Commands: TypeAlias = "argparse._SubParsersAction[CommandParser]"
"""The place in the parser where a command adds itself."""


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    help: str,
    description: str | None = None,
    epilog: str | None = None,
    *,
    config: bool = True,
) -> CommandParser:
    """Add a command that calls ``run`` with the parsed arguments; ``command`` among them is its `CommandParser`."""
    command = commands.add_parser(
        name,
        help=help,
        description=description or f"{help[0].upper()}{help[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if config:
        command.add_argument(
            "--config", metavar="FILE", help="a YAML file with any of these arguments; those given here win"
        )
    command.set_defaults(run=run, command=command)
    return command


def read_config(path: str, command: CommandParser) -> dict[str, Any]:
    """The arguments in a configuration file, by their names in the parsed namespace.

    Raises:
        LabError: an unreadable file, or a wrong key or value; the message names the file, the key and the known keys.
    """
    from labkit.common.yaml_text import read_yaml

    content = read_yaml(path)
    if not isinstance(content, dict):
        raise LabError(f"{path} must hold one `option: value` a line")
    name = command.prog.split()[-1]
    if (stored_name := content.pop("command", name)) != name:
        raise LabError(f"{path} is for `labkit {stored_name}`, not for `labkit {name}`")
    actions = {_key(action): action for action in command.settings()}
    values = {}
    for key, value in content.items():
        if key not in actions:
            raise LabError(f"{path}: unknown key {key!r}; known are {', '.join(actions)}")
        try:
            values[actions[key].dest] = _checked(actions[key], value)
        except argparse.ArgumentTypeError as error:
            raise LabError(f"{path}: {key} {error}; `labkit {name} --help` explains it") from None
    for group in command._mutually_exclusive_groups:
        if len(conflicting := [_key(action) for action in group._group_actions if action.dest in values]) > 1:
            raise LabError(f"{path}: {' and '.join(conflicting)} exclude each other; give one")
    return values


def measured(
    options: argparse.Namespace, measure: Callable[..., T], settings: type, name: str = "{model}", **more: Any
) -> tuple[T, Path]:
    """Call ``measure`` with the model, the fields of ``settings``, ``more`` and the result folder.

    Returns:
        Its result, and the folder, in which it keeps ``config.yaml`` (`labkit.results.config`).
    """
    folder = result_folder(options, name)
    arguments = {**vars(settings_of(options, settings)), **more, "output": folder}
    return measure(options.model, **arguments), folder


def result_folder(options: argparse.Namespace, name: str) -> Path:
    """The result folder of a command: ``--output``, or ``results/NAME``, with ``{model}`` in the name filled."""
    from labkit.models.spec import get_spec

    model = Path(get_spec(options.model).name).name
    return user_path(options.output or Path("results") / name.format(model=model))


def _checked(action: argparse.Action, value: Any) -> Any:
    if value is None and action.default is None and not action.required:
        return None
    if isinstance(action, argparse.BooleanOptionalAction):
        return Kind(bool).check(value)
    kind = action.type if isinstance(action.type, Kind) else Kind()
    if isinstance(action, argparse._AppendAction):
        return list(Kind(kind.base, many=True).check(value))
    return kind.check(value)


def _key(action: argparse.Action) -> str:
    return action.option_strings[0].removeprefix("--") if action.option_strings else action.dest


def _names(group: argparse._MutuallyExclusiveGroup) -> set[str]:
    return {action.dest for action in group._group_actions}
